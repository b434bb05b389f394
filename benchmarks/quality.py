"""Quality of the policies against dense decoding, token by token, on real text.

    python benchmarks/quality.py policies --text novel.txt --text code.txt     # five policies, fixed budgets
    python benchmarks/quality.py defaults --text novel.txt --text code.txt     # the sweep behind AttentionConfig()

Each text gives one passage (from its middle). Rows go to a JSON-lines file, the table beside it is
made from them; a cell that is already in the file is not run again. Without --text the passages
come from Python's own sources and documentation, which every Python has.
"""

import argparse
import hashlib
import json
import math
import pydoc_data.topics
import statistics
import sys
import time
from dataclasses import asdict
from pathlib import Path

import torch

from sparse_attention_decoder import AttentionConfig
from sparse_attention_decoder.measure.quality import Outcome, compare
from sparse_attention_decoder.models.loading import load

HERE = Path(__file__).parent
BUDGETS = (32, 64, 128, 256, 512)


def policy_configs() -> list[AttentionConfig]:
    """Sinks 4, window 64 and a fixed budget, as in the study: small on purpose, to stress the selector."""
    rows = []
    for policy in ("oracle", "sketch", "quest", "window"):
        for budget in BUDGETS:
            # the window policy spends its budget on a longer window
            window = 64 + budget if policy == "window" else 64
            rows.append(AttentionConfig(budget, None, window, 4, policy, dense_below=0))
    return rows


def default_configs() -> list[AttentionConfig]:
    """Candidates for AttentionConfig(): thresholds, windows and floors."""
    grid = [
        (32, 3e-5, 256),
        (32, 5e-5, 256),
        (32, 1e-4, 256),
        (32, 3e-5, 128),
        (32, 2e-5, 256),
        (128, 5e-5, 256),
    ]
    return [AttentionConfig(top_k, threshold, window, dense_below=0) for top_k, threshold, window in grid]


SETS = {"policies": policy_configs, "defaults": default_configs}


def passages(tokenizer, paths: list[Path], tokens: int) -> tuple[torch.Tensor, list[dict[str, str]]]:
    """One passage of `tokens` ids from the middle of each text."""
    if paths:
        texts = {path.name: path.read_text(encoding="utf-8") for path in paths}
    else:
        texts = {"pydoc topics": "\n".join(pydoc_data.topics.topics.values())}
        for module in ("argparse", "tarfile", "typing"):
            texts[module] = Path(__import__(module).__file__).read_text(encoding="utf-8")
    rows, about = [], []
    for name, text in texts.items():
        # five characters a token is more than any of these texts needs
        start = max(0, len(text) // 2 - tokens * 5 // 2)
        ids = tokenizer(text[start : start + tokens * 6]).input_ids
        if len(ids) < tokens:
            sys.exit(f"{name} has {len(ids)} tokens in its middle, {tokens} are needed: give a longer text")
        rows.append(ids[:tokens])
        about.append({"name": name, "sha256": hashlib.sha256(text.encode()).hexdigest()[:16]})
    return torch.tensor(rows), about


def record(outcome: Outcome, **cell: object) -> dict[str, object]:
    """One JSON row: the cell, what was read, agreement in the mean and per text."""
    texts = [asdict(text) for text in outcome.texts]
    mean = {key: statistics.fmean(text[key] for text in texts) for key in texts[0]}
    spread = {key: statistics.stdev(text[key] for text in texts) / math.sqrt(len(texts)) for key in texts[0]}
    return {
        **cell,
        "config": asdict(outcome.config),
        "share_read": outcome.share_read,
        "index_share": outcome.index_share,
        "retrieved": outcome.retrieved,
        "missing_mass": outcome.missing_mass,
        "sparse_share": outcome.sparse_share,
        "ppl_change": math.expm1(mean["ce_change"]),
        **mean,
        "standard_error": spread,
        "per_text": texts,
    }


def table(rows: list[dict]) -> str:
    """The rows as Markdown, one table per context."""
    lines = []
    for context in sorted({row["context"] for row in rows}):
        here = [row for row in rows if row["context"] == context]
        lines += [
            f"## Context {context}, {here[0]['steps']} tokens decoded on each of {len(here[0]['texts'])} texts",
            "",
            "| policy | top_k | threshold | window | KV bytes read | of it index | retrieved | KL | top-1 "
            "| cross-entropy change | perplexity change |",
            "|---|---|---|---|---|---|---|---|---|---|---|",
            "| dense | all | | | 100.0 % | | | 0 | 1.000 | 0 | 0 |",
        ]
        for row in here:
            config, error = row["config"], row["standard_error"]
            top_k = "" if config["policy"] == "window" else config["top_k"]
            threshold = f"{config['threshold']:.0e}" if config["threshold"] else "off"
            lines.append(
                f"| {config['policy']} | {top_k} | {threshold} | {config['attention_window']} "
                f"| {row['share_read']:.1%} | {row['index_share']:.1%} | {row['retrieved']:.0f} "
                f"| {row['kl']:.4f} ± {error['kl']:.4f} | {row['top1']:.3f} "
                f"| {row['ce_change']:+.4f} ± {error['ce_change']:.4f} | {row['ppl_change']:+.2%} |"
            )
        lines.append("")
    return "\n".join(lines)


def main() -> None:
    """Run what is missing, write rows and table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("set", choices=SETS)
    parser.add_argument("--text", type=Path, action="append", default=[], help="a UTF-8 text; repeat for several")
    parser.add_argument("--context", type=int, action="append", help="default: 4000 and 7000")
    parser.add_argument("--steps", type=int, help="tokens decoded on each text (128 for policies, 256 for defaults)")
    parser.add_argument("--model", help="directory, GGUF or hub name; default: the embedded model")
    parser.add_argument("--out", type=Path, help="default: benchmarks/<set>.jsonl")
    options = parser.parse_args()
    steps = options.steps or (128 if options.set == "policies" else 256)
    out = options.out or HERE / f"{options.set}.jsonl"
    model, tokenizer = load(options.model)
    for context in options.context or (4000, 7000):
        ids, texts = passages(tokenizer, options.text, context + steps + 1)
        cell = {"model": options.model or "SmolLM2-135M-Instruct", "context": context, "steps": steps, "texts": texts}
        rows = [json.loads(line) for line in out.read_text().splitlines()] if out.exists() else []
        done = [row["config"] for row in rows if all(row[key] == value for key, value in cell.items())]
        missing = [config for config in SETS[options.set]() if asdict(config) not in done]
        started = time.monotonic()
        for outcome in compare(model, ids, context, missing) if missing else []:
            # dense against dense would look perfect
            assert outcome.sparse_share > 0.99, outcome
            rows.append(record(outcome, **cell))
            out.write_text("".join(json.dumps(row) + "\n" for row in rows))
            shown = {key: rows[-1][key] for key in ("context", "config", "share_read", "kl", "top1", "ppl_change")}
            print(f"{time.monotonic() - started:6.0f} s  {json.dumps(shown)}", flush=True)
    command = "python benchmarks/quality.py " + options.set
    title = f"# {options.set.capitalize()}: sparse against dense decoding\n\nMade by `{command}`; rows in {out.name}.\n"
    out.with_suffix(".md").write_text(title + "\n" + table([json.loads(line) for line in out.read_text().splitlines()]))


if __name__ == "__main__":
    main()
