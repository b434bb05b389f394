"""From which context on a sparse decode step is faster than a dense one, per kernel backend.

    scripts/bench crossover                        # the CPU kernels
    scripts/bench crossover --backend reference    # PyTorch alone

One layer's step at the shape of SmolLM2 (9 query and 3 KV heads of 64, float32), dense on our cache
against the sketch with as many tokens retrieved as the default retrieves on real text, in turns over
rotating layers larger than the caches. Medians; the last line is the record.
"""

import argparse
import json
import statistics
import time
from pathlib import Path

import torch

from sparse_attention_decoder import AttentionConfig
from sparse_attention_decoder.attention import LayerState, decode_step
from sparse_attention_decoder.selection import Rows

QUERY_HEADS, KV_HEADS, DIM = 9, 3, 64
# what the default retrieves at 7,000 tokens of real text, see report/report.md; of shorter texts about a quarter
RETRIEVED = 750
CACHES_BYTES = 400_000_000


def layers(config: AttentionConfig, tokens: int) -> list[LayerState]:
    """Layers of random keys and values, together larger than a CPU's caches."""
    count = max(2, CACHES_BYTES // (KV_HEADS * tokens * DIM * 2 * 4))
    made = []
    for _ in range(min(count, 30)):
        layer = LayerState(config)
        layer.buffer.append(torch.randn(1, KV_HEADS, tokens, DIM), torch.randn(1, KV_HEADS, tokens, DIM))
        made.append(layer)
    return made


@torch.inference_mode()
def measure(tokens: int, backend: str, rounds: int) -> dict[str, float]:
    """Median seconds of a dense and a sparse step at one context."""
    retrieved = min(RETRIEVED, (tokens - 260) // 4)
    sides = {
        "dense": layers(AttentionConfig(policy="dense", backend=backend), tokens),
        "sparse": layers(AttentionConfig(retrieved, None, 256, 4, dense_below=0, backend=backend), tokens),
    }
    query, rows = torch.randn(1, QUERY_HEADS, DIM), Rows.full(1, tokens)
    times: dict[str, list[float]] = {name: [] for name in sides}
    for turn in range(rounds + 1):
        for name, states in sides.items():
            for state in states:
                begun = time.perf_counter()
                decode_step(query, state, rows, DIM**-0.5)
                # the first turn builds the index
                if turn > 0:
                    times[name].append(time.perf_counter() - begun)
    assert all(state.reads.sparse_steps == state.reads.steps for state in sides["sparse"])
    return {name: statistics.median(seconds) for name, seconds in times.items()}


def main() -> None:
    """Print a line per context, then the record."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--backend", default="cpu")
    parser.add_argument("--rounds", type=int, default=10)
    options = parser.parse_args()
    rows = []
    for tokens in (512, 1024, 1536, 2048, 3072, 4096, 8192, 16384, 32768, 65536):
        median = measure(tokens, options.backend, options.rounds)
        ratio = median["dense"] / median["sparse"]
        rows.append({"tokens": tokens, "dense_over_sparse": ratio, "threads": torch.get_num_threads(), **median})
        print(
            f"{tokens:6} tokens: dense {median['dense'] * 1e3:.2f} ms, "
            f"sparse {median['sparse'] * 1e3:.2f} ms, {ratio:.2f}x"
        )
    lost = [row["tokens"] for row in rows if row["dense_over_sparse"] < 1]
    won = [row["tokens"] for row in rows if row["tokens"] > max(lost, default=0)]
    record = {"backend": options.backend, "crossover_tokens": min(won) if won else None, "rows": rows}
    out = Path(__file__).with_suffix(".jsonl")
    others = [line for line in out.read_text().splitlines() if json.loads(line)["backend"] != options.backend]
    out.write_text("\n".join([*others, json.dumps(record)]) + "\n")
    print(json.dumps(record))


if __name__ == "__main__":
    main()
