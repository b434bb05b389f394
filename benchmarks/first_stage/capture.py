"""Captures keys after RoPE and queries of a few layers, of a text that ends with a copied passage: for pages.py.

python benchmarks/first_stage/capture.py MODEL_DIRECTORY TEXT out.pt --context 7000
"""

import argparse
from pathlib import Path

import torch
from transformers import AttentionInterface, AutoModelForCausalLM, AutoTokenizer, DynamicCache
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.masking_utils import ALL_MASK_ATTENTION_FUNCTIONS, sdpa_mask

COPIED, LAST, CHUNK = 64, 128, 1024


class Capture:
    """An attention function that keeps keys, the last queries and a sample of the earlier ones."""

    def __init__(self, layers: list[int], total: int) -> None:
        self.total = total
        self.keys: dict[int, torch.Tensor] = {}
        self.last: dict[int, list[torch.Tensor]] = {layer: [] for layer in layers}
        self.sample: dict[int, list[torch.Tensor]] = {layer: [] for layer in layers}

    def __call__(self, module, query, key, value, mask, **keywords):
        """Keep what this layer is given, then attend as SDPA does."""
        layer = module.layer_idx
        if layer in self.last:
            held, new = key.shape[2], query.shape[2]
            position = torch.arange(held - new, held)
            self.last[layer].append(query[0][:, position >= self.total - LAST].half())
            self.sample[layer].append(query[0][:, (position % 16 == 5) & (position < self.total - LAST)].half())
            if held == self.total:
                self.keys[layer] = key[0].half()
        return sdpa_attention_forward(module, query, key, value, mask, **keywords)


def main() -> None:
    """Run the model over the text once."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model")
    parser.add_argument("text", type=Path)
    parser.add_argument("out", type=Path)
    parser.add_argument("--context", type=int, default=7000)
    parser.add_argument("--layers", default="0,4,8,12,16,20,24,28")
    options = parser.parse_args()
    layers = [int(layer) for layer in options.layers.split(",")]
    tokenizer = AutoTokenizer.from_pretrained(options.model)
    text = options.text.read_text(encoding="utf8", errors="ignore")[: options.context * 8]
    ids = tokenizer(text, add_special_tokens=False).input_ids[: options.context - COPIED]
    start = int(0.3 * len(ids))
    ids = torch.tensor(ids + ids[start : start + COPIED])[None]
    capture = Capture(layers, ids.shape[1])
    AttentionInterface.register("capture", capture)
    ALL_MASK_ATTENTION_FUNCTIONS.register("capture", sdpa_mask)
    model = AutoModelForCausalLM.from_pretrained(
        options.model, dtype=torch.float32, attn_implementation="capture"
    ).eval()
    cache = DynamicCache(config=model.config)
    with torch.no_grad():
        for at in range(0, ids.shape[1], CHUNK):
            model.model(ids[:, at : at + CHUNK], past_key_values=cache, use_cache=True)
    found = {
        name: {i: torch.cat(x, 1) for i, x in kept.items()}
        for name, kept in (("q", capture.last), ("qs", capture.sample))
    }
    torch.save({"k": capture.keys, **found, "T": ids.shape[1], "copy": [start, start + COPIED]}, options.out)


if __name__ == "__main__":
    main()
