"""Made-up records for the report: two models, three contexts, several policies, holes and hostile text."""

import json
import math
from pathlib import Path

from sparse_attention_decoder.config import AttentionConfig
from sparse_attention_decoder.measure.record import as_cell

SMALL, HOSTILE = "SmolLM2-135M-Instruct", "<script>alert('x')</script> & \"$co|ns`"
CONTEXTS = (2048, 7000, 32768)
MACHINE = "made-up-2"
DENSE = {"engine": "ours", "config": as_cell(AttentionConfig(policy="dense"))}
SDPA = {"engine": "ours", "config": as_cell(AttentionConfig(policy="dense", backend="reference"))}
STOCK = {"engine": "transformers", "config": {}}
LLAMA = {"engine": "llama.cpp", "config": {"kv": "f16"}}
DEFAULT = {"engine": "ours", "config": as_cell(AttentionConfig())}
# of bytes at 2048 tokens, and KL there
POLICIES = {"sketch": (0.2, 0.01), "oracle": (0.55, 0.008), "quest": (0.2, 0.06), "window": (0.15, 0.13),
            "snapkv": (0.15, 0.09), "streaming": (0.15, 0.14)}  # fmt: skip
TASKS = {"niah_single": 1.0, "niah_multikey": 0.7, "variable_tracking": 0.5, "common_words": 0.05}


def side(policy, budget):
    near = {"attention_window": budget} if policy in ("window", "streaming") else {"top_k": budget}
    return {
        "engine": "ours",
        "config": as_cell(AttentionConfig(policy=policy, threshold=None, dense_below=0, **near)),
    }


def row(kind, cell, model=SMALL, **result):
    cell = {"model": model, "dtype": "float32", **cell}
    return {"kind": kind, "cell": cell, "result": result, "machine": MACHINE, "run": "2026-11-24T01:02:03Z"}


def machine():
    facts = {"cpu": "Made-up CPU <b>9</b>", "threads": 2, "torch": "2.13.0", "transformers": "5.23.0",
             "bandwidth_gb_s": 20.0, "commit": "abc1234"}  # fmt: skip
    return {"kind": "machine", "machine": MACHINE, "facts": facts}


def speed(where, context, step_ms, share=1.0, model=SMALL, **more):
    cell = {**where, "context": context, "batch": 1, "threads": 2, "device": "cpu"}
    ceiling = 20 + context * (share or 1) / 400
    result = {"step_ms": step_ms, "step_ms_low": 0.95 * step_ms, "step_ms_high": 1.1 * step_ms,
              "tokens_per_s": 1e3 / step_ms, "ttft_s": context / 1e3, "share_read": share,
              "peak_bytes": 9e8 + 3e4 * context, "ceiling_ms": ceiling, "over_ceiling": step_ms / ceiling}  # fmt: skip
    return row("speed", cell, model, **{**result, **more})


def speeds(model=SMALL):
    for context in CONTEXTS:
        share = 0.1 + 500 / context
        yield speed(STOCK, context, 60 + context / 140, model=model)
        yield speed(DENSE, context, 50 + context / 280, model=model, kl=0.0, top1=1.0)
        yield speed(SDPA, context, 55 + context / 180, model=model, kl=1e-9, top1=1.0)
        yield speed(LLAMA, context, 45 + context / 260, share=None, model=model, ceiling_ms=None, over_ceiling=None,
                    note="weights of its own", peak_bytes=None)  # fmt: skip
        yield speed(DEFAULT, context, 58 + context / 900, share, model, kl=0.0008, top1=0.98)
        yield speed(side("quest", 256), context, 60 + context / 800, 0.7 * share, model, kl=0.09, top1=0.82)
        yield speed(side("snapkv", 256), context, 56 + context / 2000, 0.4 * share, model, kl=0.12, top1=0.8)


def agreements(model=SMALL):
    for context in CONTEXTS:
        less = 2048 / context
        yield agreement(DEFAULT, context, 0.1 + 500 / context, 0.0008, model)
        for at, (policy, (share, kl)) in enumerate(POLICIES.items()):
            for budget in (64, 256, 1024):
                cost = (256 / budget) ** 0.8
                read = share * (0.4 + 0.6 * less) * (0.6 + budget / 640)
                yield agreement(side(policy, budget), context, min(1, read), kl * cost * (1 + at / 9), model)


def agreement(where, context, share, kl, model=SMALL):
    return row(
        "agreement", {**where, "context": context, "steps": 128, "texts": [{"name": "moby.txt", "sha256": "ab"}]},
        model, kl=kl, kl_ci=[0.8 * kl, 1.3 * kl], top1=1 - 2 * math.sqrt(kl) / 3, top1_ci=None,
        ppl_change=1.4 * kl, ppl_change_ci=[kl, 2 * kl], share_read=share, index_share=0.3 * share, retrieved=256.0,
        sparse_share=1.0, mass=1 - kl, recall=0.9, error=math.sqrt(kl), missing_mass=None,
    )  # fmt: skip


def retrievals(model=SMALL, samples=11):
    sides = {"dense": DENSE, "sketch": DEFAULT, "quest": side("quest", 256), "snapkv": side("snapkv", 256)}
    kept = {"dense": 1.0, "sketch": 0.98, "quest": 0.7, "snapkv": 0.4}
    for length in CONTEXTS[:2]:
        for task, able in TASKS.items():
            for name, where in sides.items():
                for sample in range(samples):
                    # a fixed order in which samples are lost
                    right = (7 * sample + len(task)) % samples < able * kept[name] * samples - 0.5
                    yield retrieval(where, task, length, sample, float(right), model, sample / (samples - 1))


def retrieval(where, task, length, sample, score, model=SMALL, depth=None, samples=11):
    cell = {**where, "task": task, "length": length, "format": "chat", "sample": sample, "samples": samples, "seed": 0}
    share = 1.0 if where in (DENSE, STOCK) else 0.25
    return row("retrieval", cell, model, score=score, depth=depth if task == "niah_single" else None, share_read=share)


def answers(model=SMALL):
    for where, f1 in ((DENSE, 0.8), (DEFAULT, 0.78), (side("window", 256), 0.2)):
        for sample in range(6):
            cell = {**where, "file": {"name": "qa.json", "sha256": "cd"}, "sample": sample, "format": "chat"}
            yield row("answers", cell, model, f1=f1 - sample / 20, exact=float(sample < 3), rouge_l=f1, share_read=0.3)


def everything():
    """Both models; the hostile one has holes: no retrieval, no answers, no agreement but one row, nulls."""
    found = [machine(), *speeds(), *agreements(), *retrievals(), *answers()]
    found += [speed(DEFAULT, 2048, 70.0, 0.5, HOSTILE, peak_bytes=None, note="<img src=x onerror=alert(1)>")]
    odd = speed({"engine": "_odd$<i>", "config": {}}, 2048, 80.0, model=HOSTILE)
    found += [{**odd, "result": {**dict.fromkeys(odd["result"]), "step_ms": 80.0}}]
    found += [agreement(DEFAULT, 2048, 0.5, 0.0, HOSTILE)]
    return found


def write(path: Path, rows) -> Path:
    path.write_text("".join(json.dumps(one) + "\n" for one in rows), encoding="utf-8")
    return path
