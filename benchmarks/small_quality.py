"""What small forms of weights, keys and values cost: KL and perplexity against float32 dense, decoded token by token.

    python benchmarks/small_quality.py TEXT... [--context 4096] [--tokens 192] [--out benchmarks/small_quality.jsonl]

For each text the context is read under each form, so that a packed prompt was read packed, and the tokens behind it are
decoded one by one. One JSON line a form and policy, over all the texts.
"""

import argparse
import json
import math
from dataclasses import replace
from pathlib import Path

import torch
from torch import Tensor

from sparse_attention_decoder import AttentionConfig, SparseAttention
from sparse_attention_decoder.models.memory import token_bytes

# weights, kv_dtype; the first is what the others are compared with
FORMS = (
    (None, None), (None, "int8"), (None, "int4"), ("int8", None), ("int8", "int8"), ("int4", None), ("int4", "int8"),
    ("int4", "int4"),
)  # fmt: skip


@torch.inference_mode()
def main() -> None:
    """Read, decode, record."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("texts", nargs="+", type=Path)
    parser.add_argument("--context", type=int, default=4096)
    parser.add_argument("--tokens", type=int, default=192)
    parser.add_argument("--out", type=Path, default=Path(__file__).with_name("small_quality.jsonl"))
    given = parser.parse_args()
    expected: list[Tensor] = []
    lines = []
    for weights, kv_dtype in FORMS:
        decoder = SparseAttention.from_pretrained(None, AttentionConfig(kv_dtype=kv_dtype), weights=weights)
        passages = [
            decoder.prompt_ids(path.read_text("utf-8", "replace"), chat=False)[:, : given.context + given.tokens]
            for path in given.texts
        ]
        found = decoded(decoder, passages, given.context)
        expected = expected or found["dense"][0]
        for policy, (logps, read) in found.items():
            line = {
                "weights": weights or "float32", "kv": kv_dtype or str(decoder.model.dtype).removeprefix("torch."),
                "policy": policy, "context": given.context, "tokens": given.tokens,
                "texts": [path.stem for path in given.texts],
                "token_bytes": token_bytes(decoder.model.config, kv_dtype, decoder.model.dtype), "share_read": read,
                "kl": kl(expected, logps), "perplexity": perplexity(logps, passages),
                "ppl_change": perplexity(logps, passages) / perplexity(expected, passages) - 1,
            }  # fmt: skip
            print(json.dumps(line), flush=True)
            lines.append(json.dumps(line) + "\n")
    given.out.write_text("".join(lines), encoding="utf-8")


def decoded(decoder: SparseAttention, passages: list[Tensor], context: int) -> dict[str, tuple[list[Tensor], float]]:
    """Per policy the log-probabilities [n, vocabulary] behind each token after the context, and the mean share read."""
    logps: dict[str, list[Tensor]] = {"dense": [], "sketch": []}
    shares: dict[str, list[float]] = {"dense": [], "sketch": []}
    for ids in passages:
        cache = decoder.prefill(ids[:, :context])
        for policy in logps:
            config = replace(decoder.config, policy=policy)
            reader = SparseAttention(config, decoder.model, decoder.tokenizer)
            own = cache.reconfigured(config)
            logits = [reader.model(token[None, None], past_key_values=own).logits[0, -1] for token in ids[0, context:]]
            logps[policy].append(torch.stack(logits).double().log_softmax(-1))
            shares[policy].append(own.reads.share_read)
            cache.crop(context - cache.get_seq_length())
    return {policy: (found, sum(shares[policy]) / len(found)) for policy, found in logps.items()}


def kl(expected: list[Tensor], found: list[Tensor]) -> float:
    """Mean over all tokens of the divergence of what was found from what was expected."""
    each = [(one.exp() * (one - other)).sum(-1) for one, other in zip(expected, found, strict=True)]
    return float(torch.cat(each).mean())


def perplexity(logps: list[Tensor], passages: list[Tensor]) -> float:
    """Of the tokens that were decoded, over all passages."""
    each = [-own[:-1].gather(-1, ids[0, -len(own) + 1 :, None]) for own, ids in zip(logps, passages, strict=True)]
    return math.exp(float(torch.cat(each).mean()))


if __name__ == "__main__":
    main()
