"""What makes a read token worth more: the far field, budgets by layer, dense first layers, a shared selection.

    python benchmarks/selection_study.py TEXT... [--unseen TEXT...] [--context 4096] [--out FILE.jsonl]

KL and tokens retrieved of SmolLM2, rehearsed (measure/rehearsal.py): 96 tokens of each text behind its context. Scales
by layer are made on the first texts and used on all. One JSON line a variant, threshold and text.
"""

import argparse
import json
import sys
from dataclasses import replace
from pathlib import Path

import torch
from torch import Tensor

from sparse_attention_decoder import AttentionConfig, SparseAttention
from sparse_attention_decoder.kernels.rotation import rotate, unrotate
from sparse_attention_decoder.measure.rehearsal import Part, Rehearsal, Rehearsed
from sparse_attention_decoder.measure.texts import passages
from sparse_attention_decoder.measure.tune import Search, Target

TOKENS = 96
PLAIN = AttentionConfig(dense_below=0)
FAR = replace(PLAIN, far_field=1.0)
STEP = 0.9957


class Pages(Part):
    """The far field by pages of 16: a page's unread share times its mean value."""

    def finish(self, output: Tensor, unread: Tensor, values: Tensor) -> Tensor:
        """Add every page."""
        room = -(-values.shape[2] // 16) * 16 - values.shape[2]
        pages = torch.nn.functional.pad(values, (0, 0, 0, room)).unflatten(2, (-1, 16)).mean(3)
        share = torch.nn.functional.pad(unread, (0, room)).unflatten(-1, (-1, 16)).sum(-1)
        return _added(output, unread, share @ pages)


class Coded(Part):
    """The far field by token: every unread token's share times its value in two bits a channel."""

    def finish(self, output: Tensor, unread: Tensor, values: Tensor) -> Tensor:
        """Add every token."""
        turned = rotate(values)
        deviation, mean = torch.std_mean(turned, dim=2, keepdim=True)
        z = (turned - mean) / deviation
        level = (z >= -STEP).float() + (z >= 0) + (z >= STEP) - 1.5
        size = (z * level).sum(-1, keepdim=True) / (level * level).sum(-1, keepdim=True)
        return _added(output, unread, unread @ unrotate(size * level * deviation + mean))


class GroupShare(Part):
    """The far field with one share for all heads of a group."""

    def finish(self, output: Tensor, unread: Tensor, values: Tensor) -> Tensor:
        """Replace each head's share by the group's mean."""
        own = unread.unflatten(2, (-1, TOKENS))
        return super().finish(output, own.mean(2, keepdim=True).expand_as(own).flatten(2, 3), values)


def _added(output: Tensor, unread: Tensor, far: Tensor) -> Tensor:
    return output * (1 - unread.sum(-1).flatten(1).unsqueeze(-1)) + far.flatten(1, 2)


class Follower(Part):
    """Reads what the layer before it read, and scores nothing of its own."""

    leader: "Leader"

    def choose(self, shares: Tensor) -> Tensor:
        """The leader's choice."""
        return self.leader.chosen


class Leader(Part):
    """Remembers its choice."""

    chosen: Tensor

    def choose(self, shares: Tensor) -> Tensor:
        """Its own."""
        self.chosen = super().choose(shares)
        return self.chosen


def all_of(rehearsal: Rehearsal, config: AttentionConfig, kind: type[Part] = Part, dense: int = 0) -> Rehearsed:
    """Every layer of one kind, the first ones dense."""
    each = config.of_layers(rehearsal.layers)
    return rehearsal.judge([None if n < dense else rehearsal.part(n, one, kind) for n, one in enumerate(each)])


def in_pairs(rehearsal: Rehearsal, config: AttentionConfig) -> Rehearsed:
    """Every second layer follows the one before it."""
    parts: list[Part | None] = []
    for number in range(rehearsal.layers):
        part = rehearsal.part(number, config, Follower if number % 2 else Leader)
        if isinstance(part, Follower):
            part.leader = parts[-1]  # type: ignore[assignment]
        parts.append(part)
    return rehearsal.judge(parts)


def main() -> None:
    """Read, rehearse, record."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("texts", nargs="+", type=Path)
    parser.add_argument("--unseen", nargs="*", type=Path, default=[])
    parser.add_argument("--context", type=int, default=4096)
    parser.add_argument("--out", type=Path, default=Path(__file__).with_name("selection_study.jsonl"))
    given = parser.parse_args()
    decoder = SparseAttention(AttentionConfig(policy="dense"))
    scales: dict[bool, tuple[float | None, ...]] = {}

    def rehearsal(paths: list[Path], context: int = given.context, tokens: int = TOKENS) -> Rehearsal:
        found = {path.stem: path.read_text("utf-8") for path in paths}
        ids = passages(found, lambda part: list(decoder.require_tokenizer()(part).input_ids), context + tokens + 1)
        return Rehearsal(decoder, ids, context)

    def tell(path: Path, variant: str, config: AttentionConfig, found: Rehearsed) -> None:
        line = {"text": path.stem, "context": given.context, "variant": variant, "threshold": config.threshold,
                "kl": float(found.kl.mean()), "ce_change": float(found.ce_change.mean()),
                "retrieved": sum(found.retrieved) / len(found.retrieved)}  # fmt: skip
        print(json.dumps(line), flush=True)
        with given.out.open("a", encoding="utf-8") as file:
            file.write(json.dumps(line) + "\n")

    seen = rehearsal(given.texts)
    for far in (False, True):
        search = Search(seen, Target(max_kl=1.0), lambda words: print(words, file=sys.stderr))
        scales[far] = search.scales(replace(PLAIN, threshold=6e-5 if far else 3e-5, far_field=float(far)))
        print(json.dumps({"scales": scales[far], "far_field": far}), flush=True)
    for path in given.unseen:
        # the same 64 tokens behind 256 that were decoded sparsely, and behind those read densely: all that a
        # correction of the cache could gain
        sparse, corrected = rehearsal([path], tokens=320), rehearsal([path], given.context + 256, 64)
        for config in (PLAIN, FAR):
            late = sparse.run(config)
            late = replace(late, kl=late.kl[-64:], ce_change=late.ce_change[-64:])
            tell(path, f"far field {config.far_field:g}, behind 256 sparse tokens", config, late)
            tell(path, f"far field {config.far_field:g}, behind 256 corrected", config, corrected.run(config))
    for path in [*given.texts, *given.unseen]:
        own = rehearsal([path])
        for threshold in (3e-4, 1e-4, 3e-5):
            plain, far = replace(PLAIN, threshold=threshold), replace(FAR, threshold=threshold)
            tell(path, "plain", plain, own.run(plain))
            tell(path, "by layer", plain, own.run(replace(plain, layer_scales=scales[False])))
            tell(path, "first layer dense", plain, all_of(own, plain, dense=1))
            tell(path, "first two dense", plain, all_of(own, plain, dense=2))
            tell(path, "shared by pairs", plain, in_pairs(own, plain))
            tell(path, "far field", far, own.run(far))
            tell(path, "half of the far field", far, own.run(replace(far, far_field=0.5)))
            tell(path, "far field, by layer", far, own.run(replace(far, layer_scales=scales[True])))
            tell(path, "far field, first layer dense", far, all_of(own, far, dense=1))
            tell(path, "far field, one share a group", far, all_of(own, far, GroupShare))
            tell(path, "far field by pages", plain, all_of(own, plain, Pages))
            tell(path, "far field by 2-bit values", plain, all_of(own, plain, Coded))


if __name__ == "__main__":
    with torch.inference_mode():
        main()
