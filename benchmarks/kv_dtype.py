"""What keys and values in 8 and 4 bits cost: KL and perplexity against float, dense and sparse, decoded token by token.

    python benchmarks/kv_dtype.py TEXT... [--context 4096] [--tokens 192]

For each text the context is read under each kv_dtype, so that a packed prompt was read packed, and the tokens behind it
are decoded one by one. Prints a row a text, kv_dtype and policy.
"""

import argparse
from dataclasses import replace
from pathlib import Path

import torch
from torch import Tensor

from sparse_attention_decoder import AttentionConfig, SparseAttention
from sparse_attention_decoder.models.memory import token_bytes


@torch.inference_mode()
def main() -> None:
    """Read, decode, print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("texts", nargs="+", type=Path)
    parser.add_argument("--context", type=int, default=4096)
    parser.add_argument("--tokens", type=int, default=192)
    given = parser.parse_args()
    decoder = SparseAttention()
    for path in given.texts:
        ids = decoder.prompt_ids(path.read_text("utf-8", "replace"), chat=False)[:, : given.context + given.tokens]
        expected = None
        for kv_dtype in (None, "int8", "int4"):
            config = AttentionConfig(kv_dtype=kv_dtype, policy="dense")
            decoder = SparseAttention(config, decoder.model, decoder.tokenizer)
            cache = decoder.prefill(ids[:, : given.context])
            stored = token_bytes(decoder.model.config, kv_dtype, decoder.model.dtype)
            for policy in ("dense", "sketch"):
                cache.reserve(given.context + given.tokens)
                held = cache.reconfigured(replace(config, policy=policy))
                found = decode(decoder, held, ids[0, given.context :])
                expected = found if expected is None else expected
                print(
                    f"| {path.stem} | {kv_dtype or 'float32'} | {policy} | {stored:,} | {held.reads.share_read:.1%} "
                    f"| {kl(expected, found):.5f} | {loss(found, ids, expected):+.2%} |",
                    flush=True,
                )
                cache.crop(given.context - cache.get_seq_length())


def decode(decoder: SparseAttention, cache: object, ids: Tensor) -> Tensor:
    """Log-probabilities [n, vocabulary] behind each of the tokens [n], in float64."""
    logits = [decoder.model(token[None, None], past_key_values=cache).logits[0, -1] for token in ids]
    return torch.stack(logits).double().log_softmax(-1)


def kl(expected: Tensor, found: Tensor) -> float:
    """Mean over tokens of the divergence of what was found from what was expected."""
    return float((expected.exp() * (expected - found)).sum(-1).mean())


def loss(found: Tensor, ids: Tensor, expected: Tensor) -> float:
    """By how much the perplexity of the tokens is larger than expected."""
    targets = ids[0, -len(found) + 1 :, None]
    surplus = expected[:-1].gather(-1, targets) - found[:-1].gather(-1, targets)
    return float(surplus.mean().exp()) - 1


if __name__ == "__main__":
    main()
