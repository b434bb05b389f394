"""Lossless decoding beside dense decoding on the same cache: identical tokens, speed, acceptance, tokens a dense pass.

    python benchmarks/lossless.py --compile --readings 4 --cuts 3                               # embedded model
    python benchmarks/lossless.py --compile --lengths 4096 8192 16384 --cuts 3 --model qwen.gguf --text code.txt
    python benchmarks/lossless.py --weights int8 --compile --lengths 7000 16384

A text is read once, then cut back step by step: each cut is a prompt of its own. Dense and lossless decoding take turns
on its cache, which is cut back after each, and the index of the prompt is made anew each time. With --compile dense
steps are compiled, too: the faster dense way, and the one whose tokens it has to give. Readings alternate between text
to go on with and a question about it in the chat template. A length beyond the model's context is filled with
repetitions of what was read: only its times mean something, and its acceptance is that of such a text. A JSON line a
prompt, one a length.
"""

import argparse
import json
import statistics
import time
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from sparse_attention_decoder import AttentionConfig, Lossless, SparseAttention, SparseCache
from sparse_attention_decoder.measure.machine import facts
from sparse_attention_decoder.measure.texts import texts
from sparse_attention_decoder.models.compiled import prepare_pass
from sparse_attention_decoder.models.drafter import drafter_of, is_smaller

QUESTION = "\n\nWhat does the text above say about its most important term? Quote it."
# of a context that is filled, so many tokens are read
READ = 2048
# tokens between one cut of a text and the next
CUT = 97


def main() -> None:
    """Every prompt of every length, one JSON line each; then one a length."""
    given = arguments()
    torch.set_num_threads(given.threads)
    config = AttentionConfig(kv_dtype=given.kv_dtype)
    decoder = SparseAttention.from_pretrained(given.model, config, weights=given.weights, compile=given.compile)
    machine, found = facts(), texts(given.text)
    about = {
        "model": Path(given.model or "embedded").name, "weights": given.weights, "kv_dtype": given.kv_dtype,
        "compile": given.compile, "drafts": given.drafts, "threads": given.threads, "tokens": given.tokens,
        "cpu": machine["cpu"], "commit": machine["commit"],
    }  # fmt: skip
    if given.compile:
        # made once for a model, and no part of what a token takes
        prepare_pass(decoder.model)
        if is_smaller(decoder.model):
            drafter_of(decoder.model)
    context = decoder.context_length or max(given.lengths) + given.tokens
    # longer ones are filled, and not to be refused
    decoder.model.config.max_position_embeddings = max(context, *(length + given.tokens for length in given.lengths))
    for length in given.lengths:
        lines, real = [], length if length + given.tokens <= context else READ
        for number in range(given.readings):
            text, question, cache = reading(
                decoder, list(found.values())[number // 2 % len(found)], number, real, length
            )
            cache.reserve(length + given.tokens)
            for cut in range(given.cuts):
                ids = prompt(decoder, text, question, cut, cache)
                line = {"context": length, "reading": number, "cut": cut, "filled": real < length}
                line |= compared(decoder, ids, cache, given)
                lines.append(line)
                record(given.out, about | line)
        record(given.out, about | summary(length, lines))


def arguments() -> argparse.Namespace:
    """What was asked for."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--lengths", type=int, nargs="+", default=[1024, 4096, 7000])
    parser.add_argument("--readings", type=int, default=2, help="texts of each length")
    parser.add_argument("--cuts", type=int, default=1, help="prompts out of each text")
    parser.add_argument("--tokens", type=int, default=200)
    parser.add_argument("--turns", type=int, default=1, help="of each side, for times")
    parser.add_argument("--drafts", type=int, help="always so many; else as many as pay")
    parser.add_argument("--sample", type=float, help="sample at this temperature, with the same seed on both sides")
    parser.add_argument("--model")
    parser.add_argument("--weights")
    parser.add_argument("--kv-dtype")
    parser.add_argument("--compile", action="store_true")
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--text", type=Path, nargs="*", default=[])
    parser.add_argument("--out", type=Path, default=Path(__file__).with_suffix(".jsonl"))
    given = parser.parse_args()
    return given


def reading(
    decoder: SparseAttention, text: str, number: int, real: int, length: int
) -> tuple[Tensor, Tensor, SparseCache]:
    """Ids [1, T] of a text, `real` of them its own, those of a question to put behind it, and a cache of the text."""
    encode = decoder.require_tokenizer()
    start = (2 * number + 1) * len(text) // 97 % (len(text) // 2)
    ids = encode(text[start : start + 8 * real], return_tensors="pt").input_ids[:, :real]
    question = ids[:, :0]
    if number % 2 == 1 and getattr(encode, "chat_template", None) is not None:
        words = encode.decode(ids[0, : real - 64])
        asked, plain = (decoder.prompt_ids(words + behind, chat=True) for behind in (QUESTION, ""))
        same = int((asked[0, : plain.shape[1]] == plain[0]).long().cumprod(0).sum())
        ids, question = asked[:, :same], asked[:, same:]
    with torch.inference_mode():
        cache = decoder.prefill(ids)
        for layer in cache.sparse_layers:
            keys, values = (x.clone() for x in layer.plain())
            while layer.state.buffer.length + keys.shape[2] <= length:
                layer.state.append(keys, values)
    return ids.repeat(1, cache.get_seq_length() // ids.shape[1]), question, cache


def prompt(decoder: SparseAttention, text: Tensor, question: Tensor, cut: int, cache: SparseCache) -> Tensor:
    """Ids [1, T] of the text but for its last cuts, and the question; the cache then holds all but the last two."""
    ids = torch.cat([text[:, : text.shape[1] - cut * CUT], question], 1)
    cache.crop(min(0, ids.shape[1] - max(2, question.shape[1]) - cache.get_seq_length()))
    unread = ids[:, cache.get_seq_length() : -2]
    if unread.shape[1]:
        with torch.inference_mode():
            decoder.read_into(unread, cache, None)
    return ids


def compared(decoder: SparseAttention, ids: Tensor, cache: SparseCache, given: argparse.Namespace) -> dict[str, Any]:
    """Both ways in turns: seconds of each, what they agree on, what drafting came to."""
    seconds: dict[str, list[float]] = {"dense": [], "lossless": []}
    outputs: dict[str, list[int]] = {}
    drafting = Lossless(given.drafts)
    length, choosing = cache.get_seq_length(), {"do_sample": given.sample is not None}
    if given.sample is not None:
        choosing["temperature"] = given.sample
    for _ in range(given.turns):
        for side in seconds:
            config = decoder.config if side == "lossless" else replace(decoder.config, policy="dense")
            own, drafting = cache.reconfigured(config), Lossless(given.drafts)
            torch.manual_seed(0)
            begun = time.perf_counter()
            output = decoder.generate(
                ids, attention_mask=torch.ones_like(ids), past_key_values=own, max_new_tokens=given.tokens,
                min_new_tokens=given.tokens, lossless=drafting if side == "lossless" else False, **choosing,
            )  # fmt: skip
            seconds[side].append(time.perf_counter() - begun)
            own.crop(length - own.get_seq_length())
            outputs.setdefault(side, output[0, ids.shape[1] :].tolist())
    same = [ours == theirs for ours, theirs in zip(outputs["lossless"], outputs["dense"], strict=True)]
    best = {side: min(times) for side, times in seconds.items()}
    return {
        "context_read": ids.shape[1], "agreeing": [*same, False].index(False), "of": len(same),
        **{f"{side}_ms": times / given.tokens * 1e3 for side, times in best.items()},
        "speedup": best["dense"] / best["lossless"], "acceptance": drafting.acceptance, "drafted": drafting.drafted,
        "tokens_per_pass": drafting.tokens_per_pass, "reason": drafting.reason,
    }  # fmt: skip


def summary(length: int, lines: list[dict[str, Any]]) -> dict[str, Any]:
    """One line of all prompts of a length."""
    speedups = sorted(line["speedup"] for line in lines)
    return {
        "context": length, "prompts": len(lines), "identical": sum(line["agreeing"] == line["of"] for line in lines),
        "tokens_compared": sum(line["of"] for line in lines),
        **{name: statistics.median(line[name] for line in lines) for name in lines[0] if name.endswith("_ms")},
        "speedup_median": statistics.median(speedups),
        "speedup_least": speedups[0], "speedup_most": speedups[-1],
        "acceptance": statistics.mean(line["acceptance"] for line in lines),
        "tokens_per_pass": statistics.mean(line["tokens_per_pass"] for line in lines),
    }  # fmt: skip


def record(place: Path, line: dict[str, Any]) -> None:
    """Show a line and append it."""
    print(json.dumps({key: round(value, 3) if isinstance(value, float) else value for key, value in line.items()}))
    with place.open("a", encoding="utf-8") as file:
        file.write(json.dumps(line) + "\n")


if __name__ == "__main__":
    main()
