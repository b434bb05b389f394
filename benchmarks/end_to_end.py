"""Time per token of the embedded model at a long context: transformers, dense on our cache, our dense kernel, sparse.

    scripts/bench end_to_end                       # 7,000 tokens of Python's documentation, two threads

All four continue one prompt from one prefill, in turns of a few tokens; medians. The record says what
sparse read of the cache and how many of its tokens were dense's.
"""

import argparse
import copy
import json
import pydoc_data.topics
import statistics
import time
from pathlib import Path

import torch

from sparse_attention_decoder import AttentionConfig, SparseAttention, disable, enable

STOCK, SDPA, DENSE, SPARSE = "transformers", "dense, PyTorch's SDPA on our cache", "dense, our kernel", "sparse"
TURN = 8


@torch.inference_mode()
def measure(model: SparseAttention, ids: torch.Tensor, tokens: int) -> dict[str, object]:
    """Milliseconds a token of each side, and how far sparse agrees with dense."""
    cache = model.prefill(ids[:, :-1])
    caches = {
        STOCK: cache.to_stock(model.model.config),
        SDPA: copy.deepcopy(cache.reconfigured(AttentionConfig(policy="dense", backend="reference"))),
        DENSE: copy.deepcopy(cache.reconfigured(AttentionConfig(policy="dense"))),
        SPARSE: cache,
    }
    last = dict.fromkeys(caches, ids[:, -1:])
    seconds: dict[str, list[float]] = {name: [] for name in caches}
    written: dict[str, list[int]] = {name: [] for name in caches}
    for _ in range(tokens // TURN):
        for name, own in caches.items():
            if name == STOCK:
                disable(model.model)
            else:
                enable(model.model, model.config)
            for _ in range(TURN):
                begun = time.perf_counter()
                logits = model.model(last[name], past_key_values=own, use_cache=True).logits
                last[name] = logits[:, -1:].argmax(-1)
                seconds[name].append(time.perf_counter() - begun)
                written[name].append(int(last[name]))
    median = {name: statistics.median(found) * 1e3 for name, found in seconds.items()}
    assert cache.reads.sparse_steps == cache.reads.steps
    return {
        "context": ids.shape[1], "tokens": len(written[SPARSE]), "threads": torch.get_num_threads(),
        "dtype": str(model.model.dtype), "milliseconds": {name: round(value, 1) for name, value in median.items()},
        "sparse_over": {name: round(median[SPARSE] / value, 3) for name, value in median.items()},
        "share_read": cache.reads.share_read,
        "agreeing": sum(ours == theirs for ours, theirs in zip(written[SPARSE], written[DENSE], strict=True)),
    }  # fmt: skip


def main() -> None:
    """Print the record and append it."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--context", type=int, default=7000)
    parser.add_argument("--tokens", type=int, default=40)
    parser.add_argument("--text", type=Path, help="a UTF-8 text; default: Python's documentation")
    parser.add_argument("--out", type=Path, default=Path(__file__).with_suffix(".jsonl"))
    options = parser.parse_args()
    model = SparseAttention(AttentionConfig(dense_below=0))
    text = options.text.read_text() if options.text else "\n".join(pydoc_data.topics.topics.values())
    ids = model.tokenizer(text[: options.context * 8], return_tensors="pt").input_ids[:, : options.context]
    record = measure(model, ids, options.tokens)
    with options.out.open("a") as out:
        out.write(json.dumps(record) + "\n")
    for name, value in record["milliseconds"].items():
        print(f"{value:7.1f} ms a token  {name}; sparse takes {record['sparse_over'][name]:.2f} of it")
    print(f"sparse read {record['share_read']:.1%}; {record['agreeing']} of {record['tokens']} tokens are dense's")


if __name__ == "__main__":
    main()
