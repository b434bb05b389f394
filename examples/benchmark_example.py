"""Sparse against dense on the default model: time, memory, bytes read and agreement, and a picture of it.

    python examples/benchmark_example.py [folder [context ...]]

Takes under two minutes on two cores. The records, the pictures and a page go into `folder`, ./benchmark_example if
left out; the contexts are 1,500 and 5,000 tokens. The same from the command line: sparse-decoder bench, then
sparse-decoder report.
"""

import sys
from pathlib import Path

from sparse_attention_decoder import AttentionConfig
from sparse_attention_decoder.measure.record import label
from sparse_attention_decoder.measure.report import write
from sparse_attention_decoder.measure.speed.bench import Listener
from sparse_attention_decoder.measure.speed.run import Plan, run

folder = Path(sys.argv[1] if len(sys.argv) > 1 else "benchmark_example")
plan = Plan(
    contexts=tuple(int(tokens) for tokens in sys.argv[2:]) or (1500, 5000),
    # dense_below=0: sparse from the first token past the budget, so that both sides of the crossover show
    configs=(AttentionConfig(dense_below=0), AttentionConfig(top_k=256, threshold=None, dense_below=0)),
    rounds=3,
    out=folder / "records.jsonl",
)
listener = Listener(
    stage=lambda text: print(f"  {text}"),
    ceiling=lambda setting, ceiling: print(
        f"  at best {ceiling.ms(ceiling.dense_bytes):.1f} ms a token if all is read"
    ),
    progress=lambda done, total: None,
)
for setting, rows in run(plan, listener):
    print(f"\n{setting.name} behind {setting.context} tokens, {setting.dtype}, {setting.threads} threads")
    for cell, result in rows:
        read = f"reads {result['share_read']:4.0%} of the KV bytes"
        agrees = f"KL {result['kl']:.4f}, top-1 {result['top1']:.2f}" if "kl" in result else ""
        print(f"  {result['step_ms']:7.1f} ms a token  {read}  {label(cell):24}  {agrees}")
    print()
for path in write([plan.out], folder):
    print(path)
