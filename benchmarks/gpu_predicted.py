"""What an H200 should need, from bytes and compiled instructions. PREDICTED, not measured: gpu.py measures.

python benchmarks/gpu_resources.py --predict     # writes gpu_predicted.md and gpu_predicted.jsonl, about two minutes
"""

import json
from functools import cache
from pathlib import Path
from unittest.mock import patch

import torch
from gpu_cells import BATCHES, BUDGETS, CONTEXTS, SHAPES, Cell
from gpu_resources import MULTIPROCESSORS, RATES, Loop, Resources, compiled, table, ways_to_unpack
from gpu_timing import header, line

from sparse_attention_decoder.kernels.triton.shapes import (
    ATTEND_TILE,
    CANDIDATES,
    NEAR_TILE,
    SELECT_TILE,
    Scratch,
    Shape,
)

BANDWIDTH, ACHIEVED, CLOCK, ISSUED, LAUNCH = 4.3e12, 0.85, 1.755e9, 0.8, 2.0
# what stays in the L2 from one kernel to the next
KEPT_BYTES = 25e6
# quarter octaves are coarse: candidates over what an exact cut would leave; and halvings until the cut is exact
COARSENESS, HALVINGS = 1.5, 16
MEMORY, WEIGHTS, LAYERS = 141e9, 15.0e9, 32
# small kernels of a layer beside attention, and matrix products, whose start and end nothing hides
SMALL, PRODUCTS, PRODUCT_GAP = 8, 7, 1.0
TARGETS = ((1, 131072, 8.0), (16, 131072, 12.0))
MODEL_TARGETS = ((1, 131072, 1.8), (4, 131072, 3.5))
ASSUMED = f"""Assumed, none of it measured here:

- memory: {BANDWIDTH / 1e12:g} TB/s of copy bandwidth (design note), of which every kernel, ours and dense, achieves
  {ACHIEVED:.0%}; logits of less than {KEPT_BYTES / 1e6:.0f} MB stay in the L2 from score to select and cost nothing;
- instructions: {MULTIPROCESSORS} multiprocessors at {CLOCK / 1e9:g} GHz start {RATES["issue"]:g} a clock each,
  {RATES["alu"]:g} of integers and comparisons, {RATES["memory"]:g} of shared memory and shuffles,
  {RATES["special"]:g} of exponentials; {ISSUED:.0%} of that is achieved;
- latency: a program takes at least as long as one undisturbed warp, by the assembler's own stall counts and the
  latencies in gpu_resources.py; programs more than fit at once queue;
- a kernel in a graph costs {LAUNCH:g} us, then the longest of bytes, instructions and latency, then what the last
  program of a row does alone;
- candidates of select: those of an exact cut among random shares, times {COARSENESS:g} for the coarseness of quarter
  octaves, and {HALVINGS} halvings; counted in the interpreter at 131072 tokens, budget 1024: 1,627 and 15;
- dense reads keys and values once at the same share of bandwidth, one kernel and one that combines;
- end to end: {WEIGHTS / 1e9:g} GB of weights a token at the same share, {SMALL} small kernels a layer of {LAUNCH:g} us,
  {PRODUCTS} matrix products a layer with {PRODUCT_GAP:g} us around each, {LAYERS} layers, append included."""


@cache
def resources(batch: int, context: int) -> dict[str, Resources]:
    """The kernels as compiled for a batch and context of the 8B shape."""
    query_heads, heads, dim = SHAPES["8b"]
    return {of.name.removesuffix("_kernel"): of for of in compiled(query_heads, heads, dim, context, batch)}


def scratch(cell: Cell) -> tuple[Shape, Scratch]:
    """Sizes and splits that the launchers would take on an H200."""
    shape = Shape(cell.batch, cell.heads, cell.query_heads // cell.heads, cell.dim, cell.dim, torch.device("meta"))
    with patch.object(Shape, "multiprocessors", MULTIPROCESSORS):
        return shape, Scratch(shape, cell.context, cell.near)


def busy(code: Loop, warps: int) -> float:
    """Clocks of a multiprocessor that a program's pass through this code fills."""
    return warps * max(count / RATES[pipe] for pipe, count in code.pipes.items())


def microseconds(
    of: Resources, programs: float, body: list[tuple[Loop, float]], last: list[tuple[Loop, float]], moved: float
) -> float:
    """Time of a kernel: `programs` that run `body`, of each row the last one `last` too, and bytes moved."""
    work = programs * sum(times * busy(code, of.warps) for code, times in body) / MULTIPROCESSORS / ISSUED
    alone = sum(times * max(code.cycles, busy(code, of.warps)) for code, times in body)
    end = sum(times * max(code.cycles, busy(code, of.warps)) for code, times in last)
    clocks = max(work, alone * max(1.0, programs / of.resident))
    return LAUNCH + max(moved / BANDWIDTH / ACHIEVED * 1e6, clocks / CLOCK * 1e6) + end / CLOCK * 1e6


def loop(of: Resources, function: str, number: int = 0) -> Loop:
    """A loop of a function, in the order of the code.

    Raises:
        LookupError: it is not there: the kernels have changed, and this model of them has to follow.
    """
    found = [each for each in of.loops if each.function == function]
    if len(found) <= number:
        raise LookupError(f"{of.name} has {len(found)} loops of {function}; predicted() reckons with more: change it")
    return found[number]


def kept(cell: Cell, budget: int) -> float:
    """Candidates of a row: tokens above the bin of the `budget`-th best block of 16, the logits being random."""
    share = budget / ((cell.context - cell.near) / 16)
    return (cell.context - cell.near) * min(1.0, COARSENESS * (1 - max(0.0, 1 - share) ** (1 / 16)))


def predicted(cell: Cell, budget: int) -> dict[str, object]:
    """Microseconds of each kernel and of dense attention, and what that makes of the targets."""
    of, (shape, sizes) = resources(cell.batch, cell.context), scratch(cell)
    middle, tile = cell.context - cell.near, shape.score_tile
    moved = cell.bytes_of(cell.rows * middle, cell.rows * (cell.near + budget))
    logits = moved["select"] if moved["select"] > KEPT_BYTES else 0.0
    us = {}
    # score: programs of the middle, and shorter ones of what is near
    score, tiles = of["score"], middle / sizes.score_splits / tile
    body = [(score.straight, 1.0), (loop(score, "score_share"), tiles)]
    near = [(score.straight, 1.0), (loop(score, "near_mass"), cell.near / sizes.near_splits / NEAR_TILE)]
    length = [sum(times * code.cycles for code, times in each) for each in (body, near)]
    programs = cell.rows * (sizes.score_splits + sizes.near_splits * length[1] / length[0])
    us["score"] = microseconds(score, programs, body, [], moved["score"] - moved["select"] + logits)
    # weigh: each part's tiles, then its blocks
    weigh, programs = of["weigh"], cell.rows * sizes.weigh_splits
    part = -(-middle // sizes.weigh_splits // tile) * tile
    body = [
        (weigh.straight, 1.0),
        (loop(weigh, "weigh_kernel"), part / tile),
        (loop(weigh, "weigh_kernel", 1), part / 16 / tile),
    ]
    body.append((loop(weigh, "normaliser"), -(-(sizes.score_splits + sizes.near_splits) // 64)))
    us["weigh"] = microseconds(weigh, programs, body, [], logits)
    # select: the candidates of each part, then the last program of a row, which holds CANDIDATES of them at once
    select, found, programs = of["select"], kept(cell, budget), cell.rows * sizes.select_splits
    part = -(-middle // sizes.select_splits // tile) * tile
    listed = min(part / 16, COARSENESS * budget / sizes.select_splits)
    body = [(select.straight, 1.0), (loop(select, "list_blocks"), -(-part // 16 // SELECT_TILE))]
    body.append((loop(select, "keep_candidates"), -(-listed * 16 // SELECT_TILE)))
    rounds = -(-found // CANDIDATES)
    last = [(select.last, 1.0), (loop(select, "list_chosen"), rounds), (loop(select, "list_chosen", 1), rounds)]
    last += [(loop(select, "exact_cut"), HALVINGS), (loop(select, "count_behind"), rounds - 1)]
    last.append((loop(select, "count_behind", 1), HALVINGS * (rounds - 1)))
    us["select"] = microseconds(select, programs, body, last, 0.0)
    # attend: programs of whole tiles, those without a tile cost next to nothing
    attend, share = of["attend"], -(-(cell.near + budget) // sizes.attend_splits // ATTEND_TILE) * ATTEND_TILE
    body = [(attend.straight, 1.0), (loop(attend, "attend_share"), share / ATTEND_TILE)]
    active = cell.rows * -(-(cell.near + budget) // share)
    us["attend"] = microseconds(attend, active, body, [(attend.last, 1.0)], moved["attend"])
    # append: 5/4 at a time from 8 tokens on to see whether it has to fit
    body = [(of["append"].straight, 1.0), (loop(of["append"], "is_fit_length"), 45.0)]
    us["append"] = microseconds(of["append"], cell.rows, body, [(of["append"].last, 1.0)], 0.0)
    us["sparse"] = us["score"] + us["weigh"] + us["select"] + us["attend"]
    us["dense"] = 2 * LAUNCH + cell.dense_bytes / BANDWIDTH / ACHIEVED * 1e6
    return {
        "kind": "predicted kernel", "batch": cell.batch, "context": cell.context, "budget": budget,
        "microseconds": {name: round(each, 1) for name, each in us.items()}, "candidates": round(found),
        "must_bytes": round(moved["must"]), "moved_bytes": round(moved["score"] + moved["select"] + moved["attend"]),
        "dense_over_sparse": round(us["dense"] / us["sparse"], 2),
        "must_share_of_copy": round(moved["must"] / BANDWIDTH * 1e6 / us["sparse"], 3),
        "dense_over_must_bytes": round(cell.dense_bytes / moved["must"], 1),
    }  # fmt: skip


def model(kernel: dict[str, object], cell: Cell) -> dict[str, object] | None:
    """Milliseconds a token of the whole model, or None where it does not fit one GPU."""
    tokens = LAYERS * cell.rows * cell.context
    if tokens * (cell.kv_bytes + cell.code_bytes) + 1.1 * WEIGHTS > 0.95 * MEMORY:
        return None
    us = kernel["microseconds"]
    rest = WEIGHTS / BANDWIDTH / ACHIEVED * 1e3 + LAYERS * (SMALL * LAUNCH + PRODUCTS * PRODUCT_GAP) / 1e3
    dense, sparse = (rest + LAYERS * us[name] / 1e3 for name in ("dense", "sparse"))
    dense, sparse = dense + LAYERS * 2 * LAUNCH / 1e3, sparse + LAYERS * us["append"] / 1e3
    return {
        "kind": "predicted model", "batch": cell.batch, "context": cell.context, "budget": kernel["budget"],
        "milliseconds": {"dense": round(dense, 2), "sparse": round(sparse, 2)},
        "dense_over_sparse": round(dense / sparse, 2),
    }  # fmt: skip


def verdicts(kernels: list[dict], models: list[dict]) -> list[str]:
    """Each target, and whether the prediction reaches it."""
    lines = header("target", "wanted", "predicted", "", "if only must-read bytes counted")

    def tell(name: str, found: float, wanted: float, floor: object = "") -> None:
        lines.append(line(name, f"{wanted:g}", f"{found:.2f}", "reached" if found >= wanted else "**MISSED**", floor))

    def at(rows: list[dict], batch: int, context: int) -> dict:
        return next(row for row in rows if (row["batch"], row["context"], row["budget"]) == (batch, context, 1024))

    for batch, context, target in TARGETS:
        row = at(kernels, batch, context)
        tell(
            f"kernel over dense, batch {batch}, {context}",
            row["dense_over_sparse"],
            target,
            row["dense_over_must_bytes"],
        )
    tell("must-read bytes, of copy bandwidth, batch 16, 131072", at(kernels, 16, 131072)["must_share_of_copy"], 0.6)
    for batch, context, target in MODEL_TARGETS:
        tell(f"end to end, batch {batch}, {context}", at(models, batch, context)["dense_over_sparse"], target)
    slower = [row for row in kernels if row["dense_over_sparse"] < 1]
    tell("never slower than dense, the slowest cell", min(row["dense_over_sparse"] for row in kernels), 1)
    where = ", ".join(f"{row['batch']} x {row['context']} at {row['budget']}" for row in slower) or "nowhere"
    return [*lines, "", f"Predicted slower than dense: {where}."]


def write() -> None:
    """Predict every cell; write the rows and the tables."""
    kernels, models = [], []
    for batch in BATCHES:
        for context in CONTEXTS:
            cell = Cell(*SHAPES["8b"], batch, context)
            # one layer, with room to work in
            if cell.rows * cell.context * (cell.kv_bytes + cell.code_bytes) > 0.9 * MEMORY:
                continue
            kernels += [predicted(cell, budget) for budget in sorted(BUDGETS)]
            whole = model(kernels[-2], cell) if batch in (1, 4) else None
            models += [] if whole is None else [whole]
    lines = [
        "# PREDICTED, not measured: GPU kernels, and a model of Llama-3.1-8B's shape, on an H200", "",
        "Made by `python benchmarks/gpu_resources.py --predict` without a GPU; `scripts/bench gpu` measures. Shape 32 "
        "query and 8 KV heads of 128, bfloat16, window 512, 4 sinks, random keys.", "", ASSUMED, "",
        "## PREDICTED, not measured: the targets", "", *verdicts(kernels, models), "",
        "A sketch of every token is 34 bytes where keys and values are 512: alone it allows 15x. Chosen tokens, and "
        "logits in float16, written and read, leave less.", "", "## PREDICTED, not measured: one layer's step", "",
    ]  # fmt: skip
    names = ("score", "weigh", "select", "attend", "sparse", "append", "dense")
    lines += header(
        "batch", "context", "budget", *(f"{name} us" for name in names), "dense / sparse", "must-read MB", "moved MB",
        "must-read, of copy", "candidates a row", "dense / must-read bytes",
    )  # fmt: skip
    for row in kernels:
        lines.append(
            line(
                row["batch"], row["context"], row["budget"], *(row["microseconds"][name] for name in names),
                row["dense_over_sparse"], round(row["must_bytes"] / 1e6), round(row["moved_bytes"] / 1e6),
                f"{row['must_share_of_copy']:.0%}", row["candidates"], row["dense_over_must_bytes"],
            )
        )  # fmt: skip
    lines += ["", "## PREDICTED, not measured: end to end, budget 1024", ""]
    lines += header("batch", "context", "dense ms", "sparse ms", "dense / sparse")
    for row in models:
        lines.append(line(row["batch"], row["context"], *row["milliseconds"].values(), row["dense_over_sparse"]))
    fit = [loop(resources(1, 131072)["append"], function) for function in ("fit", "code_span")]
    spike = sum(131072 / each.tokens * each.cycles for each in fit) / CLOCK * 1e3
    lines += ["", "A step at which statistics are fitted anew, once whenever the context has grown by a quarter, takes"]
    lines += [f"{spike:.0f} ms a layer more at 131072 tokens: one program a row and KV head walks all of them."]
    for batch in (1, 16):
        lines += ["", f"## Compiled for sm_90, not run: batch {batch}, context 131072", ""]
        lines += [table(list(resources(batch, 131072).values()), ways_to_unpack())]
    out = Path(__file__)
    out.with_suffix(".md").write_text("\n".join(lines) + "\n")
    out.with_suffix(".jsonl").write_text("".join(json.dumps(row) + "\n" for row in (*kernels, *models)))
    print("\n".join(lines))


if __name__ == "__main__":
    write()
