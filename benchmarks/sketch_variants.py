"""Attention mass that variants of the sketch cover, on the keys and queries of a real prompt.

    python benchmarks/sketch_variants.py --text novel.txt --text code.txt

One dense pass over a text; the queries of its last 128 positions then select among the keys before
them, offline. This measures the selector alone: figures of decoding come from `sparse-decoder eval`. Covered mass is
true attention mass on sinks, window and selection, the mean over layers, heads and positions.
"""

import argparse
import json
import statistics
from pathlib import Path

import torch
from torch import Tensor
from transformers import AttentionInterface, AttentionMaskInterface
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.masking_utils import sdpa_mask

from sparse_attention_decoder.kernels.reference import STEP, rotate
from sparse_attention_decoder.measure.texts import about, passages, texts
from sparse_attention_decoder.models.loading import load

SINKS, WINDOW, QUERIES = 4, 256, 128
UNIFORM = torch.tensor([-1.5, -0.5, 0.5, 1.5]) * STEP
LLOYD_MAX = torch.tensor([-1.510, -0.4528, 0.4528, 1.510])

# name -> levels (None: the keys themselves), rotated, share of the context the statistics are fitted on
VARIANTS = {
    "exact scores": (None, False, 1.0),
    "uniform levels, as shipped": (UNIFORM, True, 1.0),
    "Lloyd-Max levels": (LLOYD_MAX, True, 1.0),
    "uniform, not rotated": (UNIFORM, False, 1.0),
    "uniform, fitted on the first 4/5": (UNIFORM, True, 0.8),
    "uniform, fitted on the first half": (UNIFORM, True, 0.5),
}


def reconstruct(keys: Tensor, levels: Tensor, rotated: bool, fitted: float) -> Tensor:
    """What the sketch knows of keys [Hkv, T, D]: level times factor, back in the (rotated) scale."""
    keys = rotate(keys) if rotated else keys
    deviation, mean = torch.std_mean(keys[:, SINKS : int(keys.shape[1] * fitted)], dim=1, keepdim=True)
    z = (keys - mean) / deviation
    level = levels[torch.bucketize(z, (levels[1:] + levels[:-1]) / 2)]
    factor = (z * z).sum(-1, keepdim=True) / (z * level).sum(-1, keepdim=True)
    return mean + deviation * level * factor


def covered(query: Tensor, keys: Tensor, variant: tuple[Tensor | None, bool, float]) -> dict[str, float]:
    """Mass covered [at budgets 64, 256, threshold 3e-5] for queries [Hq, N, D] and keys [Hkv, T, D]."""
    levels, rotated, fitted = variant
    scale = keys.shape[-1] ** -0.5
    query = query.unflatten(0, (keys.shape[0], -1))
    exact = scale * query @ keys[:, None].transpose(-1, -2)
    estimate = exact
    if levels is not None:
        known = reconstruct(keys, levels, rotated, fitted)
        estimate = scale * (rotate(query) if rotated else query) @ known[:, None].transpose(-1, -2)
    position = torch.arange(keys.shape[1])
    own = position[-query.shape[2] :, None]
    past = position <= own
    near = past & ((position < SINKS) | (position > own - WINDOW))
    true = exact.masked_fill(~past, -torch.inf).softmax(-1)
    share = torch.where(near, exact, estimate).masked_fill(~past, -torch.inf).softmax(-1).mean(1)
    share = share.masked_fill(near | ~past, -1.0)
    result = {}
    for budget in (64, 256):
        read = torch.zeros_like(share, dtype=torch.bool).scatter_(-1, share.topk(budget).indices, True) | near
        result[f"top {budget}"] = float((true * read[:, None]).sum(-1).mean())
    above = share > 3e-5
    result["threshold 3e-5"] = float((true * (above | near)[:, None]).sum(-1).mean())
    result["tokens above"] = float(above.sum(-1).float().mean())
    return result


def main() -> None:
    """Measure every variant, write rows and table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--text", type=Path, action="append", default=[], help="a UTF-8 text; repeat for several")
    parser.add_argument("--context", type=int, default=7000)
    parser.add_argument("--model", help="directory, GGUF or hub name; default: the embedded model")
    parser.add_argument("--out", type=Path, default=Path(__file__).with_suffix(".jsonl"))
    options = parser.parse_args()
    model, tokenizer = load(options.model)
    seen: dict[int, tuple[Tensor, Tensor]] = {}

    def capture(module, query, key, value, mask, **kwargs):
        seen[module.layer_idx] = (query[0, :, -QUERIES:].clone(), key[0].clone())
        return sdpa_attention_forward(module, query, key, value, mask, **kwargs)

    AttentionInterface.register("capture", capture)
    AttentionMaskInterface.register("capture", sdpa_mask)
    model.set_attn_implementation("capture")
    found = texts(options.text)
    ids = passages(found, lambda text: tokenizer(text).input_ids, options.context)
    rows = []
    for row, text in zip(ids, about(found), strict=True):
        with torch.inference_mode():
            model(row[None], logits_to_keep=1, use_cache=False)
            for name, variant in VARIANTS.items():
                layers = [covered(query, keys, variant) for query, keys in seen.values()]
                mean = {key: statistics.fmean(layer[key] for layer in layers) for key in layers[0]}
                rows.append({"variant": name, "context": options.context, "text": text, **mean})
                print(json.dumps(rows[-1]), flush=True)
    options.out.write_text("".join(json.dumps(row) + "\n" for row in rows))
    keys = ("top 64", "top 256", "threshold 3e-5", "tokens above")
    lines = [
        "# Variants of the sketch: attention mass covered",
        "",
        f"Made by `python benchmarks/sketch_variants.py`; rows in {options.out.name}. "
        f"Context {options.context}, {len(texts)} texts, {QUERIES} queries each.",
        "",
        f"| variant | {' | '.join(keys)} |",
        "|---" * (len(keys) + 1) + "|",
    ]
    for name in VARIANTS:
        mean = [statistics.fmean(row[key] for row in rows if row["variant"] == name) for key in keys]
        lines.append(f"| {name} | {mean[0]:.4f} | {mean[1]:.4f} | {mean[2]:.4f} | {mean[3]:.0f} |")
    options.out.with_suffix(".md").write_text("\n".join(lines) + "\n")


if __name__ == "__main__":
    main()
