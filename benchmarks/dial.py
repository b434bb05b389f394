"""What the dial is worth: bytes at equal KL beside a fixed threshold and a fixed top_k, how far its estimate is off,
and whether the loop holds its target. Decoded token by token behind a long prompt, against dense on the same cache.

    python benchmarks/dial.py TEXT... [--context 7000] [--tokens 128] [--skip 100000] [--out benchmarks/dial.jsonl]
    python benchmarks/dial.py --sum benchmarks/dial.jsonl

`--config FILE`, one of `sparse-decoder tune`, adds that config at several thresholds, the loop from there, and the loop
of `balanced` with its scales by layer. One JSON line a text and config; `--sum` reads them and says the three things.
"""

import argparse
import json
import math
from collections import defaultdict
from collections.abc import Iterator
from dataclasses import replace
from itertools import pairwise
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from sparse_attention_decoder import AttentionConfig, SparseAttention, SparseCache
from sparse_attention_decoder.measure.audit import audit
from sparse_attention_decoder.models.statistics import Statistics, record

PLAIN = AttentionConfig(dense_below=0)
THRESHOLDS = (3e-4, 1e-4, 5e-5, 3e-5, 1e-5)
BUDGETS = (256, 1024)
QUALITIES = ("fast", "balanced", "firm")
# what the loop is asked to hold, from where `balanced` starts
TARGETS = (0.10, 0.07, 0.04)
# what a tuned config's threshold is multiplied by, for a curve
FACTORS = (4.0, 1.0, 0.25)
# the sketch's estimate is set beside the true mass of every layer in one step of so many
CHECK_EVERY = 4
# steps the loop is given to find its threshold
SETTLED = 16


@torch.inference_mode()
def main() -> None:
    """Read, decode, record; or sum up."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("texts", nargs="*", type=Path)
    parser.add_argument("--model", default=None)
    parser.add_argument("--dtype", default="float32")
    parser.add_argument("--context", type=int, default=7000)
    parser.add_argument("--tokens", type=int, default=128)
    parser.add_argument("--skip", type=int, default=100_000, help="characters of each text to leave out")
    parser.add_argument("--config", type=AttentionConfig.load, help="with layer_scales: set them beside the rest")
    parser.add_argument("--out", type=Path, default=Path(__file__).with_name("dial.jsonl"))
    parser.add_argument("--sum", type=Path)
    given = parser.parse_args()
    if given.sum is not None:
        sum_up([json.loads(line) for line in given.sum.read_text("utf-8").splitlines()])
        return
    decoder = SparseAttention.from_pretrained(given.model, PLAIN, dtype=getattr(torch, given.dtype))
    for path in given.texts:
        text = path.read_text("utf-8", "replace")[given.skip :][: 8 * (given.context + given.tokens)]
        ids = decoder.prompt_ids(text, chat=False)[:, : given.context + given.tokens]
        where = {"model": Path(given.model or "smollm2").stem, "text": path.stem, "context": given.context}
        for line in measured(decoder, ids, given.context, given.config):
            with given.out.open("a", encoding="utf-8") as out:
                out.write(json.dumps({**where, **line}) + "\n")
            print(line["side"], line["budget"], f"KL {line['kl']:.5f} retrieved {line['retrieved']:.2%}", flush=True)


def sides(tuned: AttentionConfig | None) -> Iterator[tuple[str, float | str, AttentionConfig]]:
    """What is compared: its name, its budget, its config; those of a tuned one last."""
    for threshold in THRESHOLDS:
        yield "threshold", threshold, replace(PLAIN, threshold=threshold)
    for top_k in BUDGETS:
        yield "top_k", top_k, replace(PLAIN, threshold=None, top_k=top_k)
    for quality in QUALITIES:
        yield "quality", quality, replace(PLAIN, quality=quality)
    for target in TARGETS:
        yield "dial", target, replace(PLAIN, quality="balanced", missing_mass=target)
    if tuned is None:
        return
    tuned = replace(tuned, dense_below=0, tuned_for=None)
    for factor in FACTORS:
        yield "tuned", factor, replace(tuned, threshold=(tuned.threshold or 0.0) * factor)
    by_layer = replace(PLAIN, quality="balanced", layer_scales=tuned.layer_scales)
    for target in TARGETS:
        yield "dial, tuned", target, replace(tuned, missing_mass=target)
        yield "dial, by layer", target, replace(by_layer, missing_mass=target)


def measured(
    decoder: SparseAttention, ids: Tensor, context: int, tuned: AttentionConfig | None
) -> Iterator[dict[str, Any]]:
    """One line a side, for one text."""
    cache = decoder.prefill(ids[:, :context])
    dense, _, _ = decoded(decoder, cache, ids, replace(PLAIN, policy="dense"))
    for side, budget, config in sides(tuned):
        logps, stats, checks = decoded(decoder, cache, ids, config)
        near = (config.sink_tokens + config.attention_window) * heads_of(cache)
        retrieved = (stats.tokens_read - near).sum() / stats.tokens_cached.sum()
        true = {step: sum(masses) / len(masses) for step, masses in checks.items()}
        settled = [mass for step, mass in true.items() if step >= SETTLED]
        kl = (dense.exp() * (dense - logps)).sum(-1).mean()
        yield {
            "side": side, "budget": budget, "tokens": len(logps), "kl": float(kl),
            "retrieved": float(retrieved), "audits": float(stats.audit_bytes.sum() / stats.bytes_dense.sum()),
            "share_read": stats.share_read, "true": sum(settled) / len(settled) if settled else None,
            "estimated_over_true": [float(stats.by_step[step]) / mass for step, mass in true.items()],
        }  # fmt: skip


def decoded(
    decoder: SparseAttention, cache: SparseCache, ids: Tensor, config: AttentionConfig
) -> tuple[Tensor, Statistics, dict[int, list[float]]]:
    """Log-probabilities behind each token, what was read, and of some steps the true missing mass of every layer."""
    reader, own, context = (
        SparseAttention(config, decoder.model, decoder.tokenizer),
        cache.reconfigured(config),
        cache.get_seq_length(),
    )
    record(own)
    logps, checks = [], {}
    for step, token in enumerate(ids[0, context:]):
        logps.append(reader.model(token[None, None], past_key_values=own).logits[0, -1].double().log_softmax(-1))
        if config.missing_mass is not None and step % CHECK_EVERY == 0:
            checks[step] = [1 - audit(layer).mass for layer in own.sparse_layers]
    cache.crop(context - cache.get_seq_length())
    return torch.stack(logps), Statistics.of(own), checks


def heads_of(cache: SparseCache) -> int:
    """KV heads of a layer."""
    return int(cache.sparse_layers[0].state.buffer.shape[1])


def sum_up(lines: list[dict[str, Any]]) -> None:
    """The curves, what the dial saves at equal KL, how far its estimate is off, and how it holds its target."""
    cells: dict[tuple[str, Any], list[dict[str, Any]]] = defaultdict(list)
    for line in lines:
        cells[line["side"], line["budget"]].append(line)
    curves: dict[str, list[tuple[float, float]]] = defaultdict(list)
    for (side, budget), found in cells.items():
        kl, retrieved, audits, read = (mean(found, name) for name in ("kl", "retrieved", "audits", "share_read"))
        curves[side].append((kl, retrieved + audits))
        print(
            f"{side:14} {budget!s:9} KL {kl:.5f}  retrieved {retrieved:6.2%}  audits {audits:.2%}  in all {read:6.2%}"
        )
        if side.startswith("dial"):
            ratios = sorted(ratio for line in found for ratio in line["estimated_over_true"])
            inside = sum(0.9 <= ratio <= 1.15 for ratio in ratios) / len(ratios)
            held = ", ".join(f"{line['true'] / budget:.2f}" for line in found)
            print(f"{'':20} estimate over true mass, by step: {ratios[0]:.2f} to {ratios[-1]:.2f}, {inside:.0%} within "
                  f"0.9 to 1.15; true mass over target, by text: {held}")  # fmt: skip
    for side in [side for side in curves if side not in ("threshold", "top_k")]:
        for kl, read in curves[side]:
            best, other = min((bytes_at(curves[plain], kl), plain) for plain in ("threshold", "top_k"))
            if math.isfinite(best):
                saved = 1 - read / best
                print(f"at a KL of {kl:.5f}: {side} {read:.2%}, audits included, {other} {best:.2%}: {saved:.0%} fewer")


def mean(found: list[dict[str, Any]], name: str) -> float:
    """Over texts."""
    return sum(float(line[name]) for line in found) / len(found)


def bytes_at(curve: list[tuple[float, float]], kl: float) -> float:
    """Bytes of a curve at a KL, by straight lines between logarithms; infinite outside of it."""
    curve = sorted(curve)
    for (low, more), (high, less) in pairwise(curve):
        if low <= kl <= high:
            part = math.log(kl / low) / math.log(high / low)
            return math.exp((1 - part) * math.log(more) + part * math.log(less))
    return math.inf


if __name__ == "__main__":
    main()
