"""One layer's decode step on a GPU: what is timed beside what, and the bytes it moves. gpu.py is the program."""

from collections.abc import Callable
from dataclasses import asdict, dataclass
from functools import partial
from importlib.util import find_spec
from typing import Any

import torch
from gpu_timing import DENSE, captured, dense, middle, refusal, replayed
from torch import Tensor
from torch.nn.functional import scaled_dot_product_attention

from sparse_attention_decoder.kernels import Coded, Statistics
from sparse_attention_decoder.kernels.triton.ops import append_token, read_tokens
from sparse_attention_decoder.kernels.triton.shapes import Plan, Scratch, Shape

# query heads, KV heads, channels: Llama-3.1-8B, Llama-3.1-70B, Qwen2.5-7B
SHAPES = {"8b": (32, 8, 128), "70b": (64, 8, 128), "qwen-7b": (28, 4, 128)}
BATCHES, CONTEXTS, BUDGETS = (1, 4, 16, 64), (8192, 32768, 131072, 524288, 1048576), (1024, 256, 2048)
# the cells that a target is set for
FIRST = ((1, 131072), (16, 131072), (4, 131072))
SINKS, WINDOW, PAGE = 4, 512, 16
COPIED, ENCODED, ROTATED, SPARE = 512 << 20, 1 << 18, 128 << 20, 3 << 30
Row = dict[str, Any]


@dataclass(frozen=True)
class Cell:
    """A layer's decode step: what is read of it, and how many bytes that is."""

    query_heads: int
    heads: int
    dim: int
    batch: int
    context: int
    window: int = WINDOW

    @property
    def near(self) -> int:
        """Tokens of a row that are always read."""
        return SINKS + self.window

    @property
    def rows(self) -> int:
        """Rows of the batch times KV heads."""
        return self.batch * self.heads

    @property
    def kv_bytes(self) -> int:
        """Bytes of one token's key and value of one KV head, in 16 bits."""
        return 4 * self.dim

    @property
    def dense_bytes(self) -> int:
        """What dense attention reads."""
        return self.rows * self.context * self.kv_bytes

    @property
    def code_bytes(self) -> int:
        """Bytes of code and factor of one token of one KV head."""
        return 4 * -(-self.dim // 16) + 2

    def bytes_of(self, scored: float, read: float) -> dict[str, float]:
        """Bytes of a step that scores and reads so many tokens: those it must read, those each kernel moves.

        Moved: codes and near keys read, float16 logits written; logits read; keys and values read. Block sums, lists of
        candidates and partial results are less than a twentieth of the logits and not counted.
        """
        stored = 1 << (self.query_heads // self.heads - 1).bit_length()
        logits = scored * 2 * stored
        return {
            "must": scored * self.code_bytes + read * self.kv_bytes,
            "score": scored * self.code_bytes + self.rows * self.near * self.kv_bytes / 2 + logits,
            "select": logits, "attend": read * self.kv_bytes,
        }  # fmt: skip


@dataclass(frozen=True)
class Layer:
    """Keys, values and codes of one layer, and its length, in memory of its own."""

    keys: Tensor
    values: Tensor
    coded: Coded
    length: Tensor

    @property
    def sketch(self) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """What the ops take of the codes."""
        return self.coded.codes, self.coded.factors, self.coded.statistics.mean, self.coded.statistics.deviation


# takes a layer, and the number of its turn
Way = Callable[[Layer, int], object]


class Layers:
    """Layers of random keys of `context` tokens, the last appended on the device; and how each way reads them."""

    def __init__(self, cell: Cell, count: int, device: torch.device, dtype: torch.dtype) -> None:
        from sparse_attention_decoder.kernels.triton.encode import encode

        self.cell, self.device, self.scale = cell, device, cell.dim**-0.5
        # room for what a graph of appends appends, and whole pages
        capacity = -(-(cell.context + 64) // 64) * 64
        self.query = torch.randn(cell.batch, cell.query_heads, cell.dim, device=device).to(dtype)
        self.new = torch.randn(cell.batch, cell.heads, cell.dim, device=device).to(dtype)
        self.shape = Shape.of(self.query, cell.heads, cell.dim)
        self.scratch = Scratch(self.shape, capacity, cell.near)
        self.plan, self.other_plan = (Plan.empty(cell.batch, cell.near, device) for _ in range(2))
        self.starts = torch.zeros(cell.batch, dtype=torch.int32, device=device)
        self.tally = torch.zeros(cell.rows, 6, dtype=torch.float64, device=device)
        self.layers = []
        for _ in range(count):
            keys, values = (
                torch.empty(cell.batch, cell.heads, capacity, cell.dim, device=device, dtype=dtype).normal_()
                for _ in range(2)
            )
            zeros = torch.zeros(cell.batch, cell.heads, cell.dim, device=device)
            coded = Coded.room(capacity, Statistics(zeros, zeros + 1))
            for at in range(0, cell.context - 1, ENCODED):
                encode(keys[:, :, at : min(at + ENCODED, cell.context - 1)], coded, at)
            self.layers.append(Layer(keys, values, coded, torch.zeros((), dtype=torch.int64, device=device)))
        self.rewind()
        for layer in self.layers:
            self.append(layer, 0, self.plan)

    def rewind(self) -> None:
        """Back to where the last token is still to come."""
        for layer in self.layers:
            layer.length.fill_(self.cell.context - 1)

    def append(self, layer: Layer, _turn: int, plan: Tensor | None = None) -> None:
        """One token with its code; a plan of its own, so that the ways that read are not led astray."""
        append_token(
            self.new, self.new, layer.keys, layer.values, *layer.sketch, layer.length, self.starts,
            self.other_plan if plan is None else plan, SINKS, self.cell.window, 0,
        )  # fmt: skip

    def sparse(self, layer: Layer, _turn: int, budget: int) -> Tensor:
        """The whole step: score, select, attend."""
        output: Tensor = read_tokens(
            self.query, layer.keys, layer.values, *layer.sketch, self.plan, self.scratch.memory, self.tally,
            self.cell.near, budget, 0.0, self.scale,
        )  # fmt: skip
        return output

    def parts(self, budget: int) -> dict[str, Way]:
        """The kernels alone. Attend gets lists of its own, scattered like chosen ones, lest two calls read the same."""
        from sparse_attention_decoder.kernels.triton.attend import launch_attend
        from sparse_attention_decoder.kernels.triton.score import launch_score
        from sparse_attention_decoder.kernels.triton.select import launch_select

        cell, scratch, whole = self.cell, self.scratch, Plan(self.plan, self.cell.batch, self.cell.near)
        counts = torch.full((cell.rows,), budget, dtype=torch.int32, device=self.device)
        lists = [
            torch.randint(SINKS, cell.context - cell.window, (cell.rows, budget), device=self.device)
            .sort()
            .values.int()
            for _ in range(8)
        ]
        moved = torch.randint(0, cell.context - cell.window, (8,)).tolist()
        windows = [
            torch.arange(at, at + cell.near, device=self.device, dtype=torch.int32) % cell.context for at in moved
        ]
        near = [each.expand(cell.batch, -1).contiguous() for each in windows]
        chosen = scratch.tokens, scratch.counts, scratch.missing
        none = torch.zeros(cell.batch, 4, dtype=torch.int32, device=self.device)
        every = none.clone()
        every[:, 3] = cell.context

        def attend(layer: Layer, turn: int, bounds: Tensor = none) -> None:
            launch_attend(
                self.shape, self.query, layer.keys, layer.values, near[turn % 8], None, lists[turn % 8], counts,
                scratch.missing, bounds, scratch.attended, self.scale,
            )  # fmt: skip

        return {
            "score": lambda layer, _: launch_score(
                self.shape, self.query, layer.coded, layer.keys, whole.near, None, None, whole.bounds, scratch,
                self.scale,
            ),
            "select": lambda _, __: launch_select(self.shape, whole.bounds, None, scratch, *chosen, budget, 0.0),
            "attend": attend, "ours, whole row": partial(attend, bounds=every),
        }  # fmt: skip

    def gathered(self, layer: Layer, _turn: int, tokens: Tensor) -> Tensor:
        """What most code does: copy the tokens out (found already), then PyTorch's attention."""
        at = tokens[..., None].expand(-1, -1, -1, self.cell.dim)
        grouped = self.query.unflatten(1, (self.cell.heads, -1))
        return scaled_dot_product_attention(
            grouped, layer.keys.gather(2, at), layer.values.gather(2, at), scale=self.scale
        )

    def dense(self, layer: Layer, _turn: int, name: str) -> Tensor:
        """PyTorch's attention to everything held."""
        held = self.cell.context
        return dense(name, self.query, layer.keys[:, :, :held], layer.values[:, :, :held], self.scale)

    def flashinfer(self) -> Way:
        """FlashInfer's paged decode: each KV head is a request of its own, so that our memory serves as its pages."""
        import flashinfer

        cell, pages = self.cell, self.layers[0].keys.shape[2] // PAGE
        used = -(-cell.context // PAGE)
        rows, ints = torch.arange(cell.rows, device=self.device), partial(torch.Tensor.to, dtype=torch.int32)
        wrapper = flashinfer.BatchDecodeWithPagedKVCacheWrapper(
            torch.empty(256 << 20, dtype=torch.uint8, device=self.device), "HND", use_tensor_cores=True
        )
        wrapper.plan(
            ints(torch.arange(cell.rows + 1, device=self.device) * used),
            ints((rows[:, None] * pages + torch.arange(used, device=self.device)).flatten()),
            ints(rows * 0 + cell.context - (used - 1) * PAGE), cell.query_heads // cell.heads, 1, cell.dim, PAGE,
            q_data_type=self.query.dtype, kv_data_type=self.query.dtype,
        )  # fmt: skip
        query = self.query.view(cell.rows, -1, cell.dim)
        return lambda layer, _: wrapper.run(
            query, tuple(each.view(-1, 1, PAGE, cell.dim) for each in (layer.keys, layer.values))
        )

    def chosen(self, budget: int) -> tuple[Tensor, Tensor]:
        """Output of the first layer's step, and the tokens [B, Hkv, N] that it says it read."""
        output = self.sparse(self.layers[0], 0, budget)
        if not bool((self.scratch.counts == budget).all()):
            raise ArithmeticError(f"chose {self.scratch.counts.tolist()} tokens instead of {budget}")
        tokens = self.scratch.tokens[:, :budget].long()
        if not bool((tokens.diff() > 0).all() and (tokens >= SINKS).all() and (tokens < self.cell.context).all()):
            raise ArithmeticError("tokens are not in order, or not of the middle")
        near = Plan(self.plan, self.cell.batch, self.cell.near).near.long().repeat_interleave(self.cell.heads, 0)
        return output, torch.cat([near, tokens], 1).view(self.cell.batch, self.cell.heads, -1)

    def check(self, output: Tensor, tokens: Tensor) -> None:
        """The step's output against float64 over its own tokens, first and last row: at most twice PyTorch's error.

        Raises:
            ArithmeticError: it is further off.
        """
        layer, plain = self.layers[0], self.gathered(self.layers[0], 0, tokens).view(output.shape)
        for b in {0, self.cell.batch - 1}:
            at = tokens[b, ..., None].expand(-1, -1, self.cell.dim)
            query, keys, values = (
                each.double()
                for each in (
                    self.query[b].unflatten(0, (self.cell.heads, -1)),
                    layer.keys[b].gather(1, at),
                    layer.values[b].gather(1, at),
                )
            )
            exact = ((query @ keys.mT * self.scale).softmax(-1) @ values).flatten(0, 1)
            off, allowed = ((each[b].double() - exact).abs().max() for each in (output, plain))
            if not off <= 2 * allowed + torch.finfo(output.dtype).eps * exact.abs().max() / 4:
                raise ArithmeticError(f"output is off by {float(off):.2g}, PyTorch's by {float(allowed):.2g}")


def ways_to_read(state: Layers, budgets: tuple[int, ...]) -> tuple[dict[str, Way], Row]:
    """What is timed, by name, and why a comparator is not; names that end in @ and a budget are for that budget alone.

    Raises:
        ArithmeticError: a wrong result: no figure on a red test.
    """
    ways: dict[str, Way] = {"append": state.append} | {name: partial(state.dense, name=name) for name in DENSE}
    left_out = {}
    if find_spec("flashinfer"):
        reason = refusal(lambda: ways.update({"flashinfer paged": state.flashinfer()}), state.device)
        left_out.update({} if reason is None else {"flashinfer paged": reason})
    else:
        left_out["flashinfer paged"] = "not installed"
    for name in (*DENSE, "flashinfer paged"):
        if name in ways and (reason := refusal(partial(ways[name], state.layers[0], 0), state.device)):
            left_out[name] = reason
            del ways[name]
    for budget in budgets:
        output, tokens = state.chosen(budget)
        state.check(output, tokens)
        parts = state.parts(budget)
        ways |= {name: parts[name] for name in ("score", "ours, whole row")}
        ways |= {f"{name}@{budget}": parts[name] for name in ("select", "attend")}
        ways[f"sparse@{budget}"] = partial(state.sparse, budget=budget)
        ways[f"gather, sdpa@{budget}"] = partial(state.gathered, tokens=tokens)
    return ways, left_out


def counted(state: Layers, budget: int) -> tuple[float, float]:
    """Tokens that a step scores and reads, of all rows and KV heads, as the device counts them."""
    state.tally.zero_()
    state.sparse(state.layers[0], 0, budget)
    steps, _, read, _, scored, _ = state.tally.sum(0).tolist()
    return scored / steps * state.cell.rows, read / steps * state.cell.rows


def fitting(cell: Cell, touched: int) -> int:
    """How many layers rotate: twice the L2 at least of what a sparse step touches, as far as there is memory.

    Raises:
        torch.OutOfMemoryError: not even one fits.
    """
    free, _ = torch.cuda.mem_get_info()
    wanted = max(ROTATED, 2 * torch.cuda.get_device_properties().L2_cache_size)
    held = cell.rows * (cell.kv_bytes + cell.code_bytes) * (cell.context + 128)
    if held + SPARE > 0.95 * free:
        raise torch.OutOfMemoryError(f"{(held + SPARE) / 1e9:.0f} GB for one layer, {free / 1e9:.0f} GB free")
    return max(1, min(-(-wanted // touched), int(0.8 * (free - SPARE) / held)))


@torch.inference_mode()
def measure(
    cell: Cell, budgets: tuple[int, ...], device: torch.device, dtype: torch.dtype, seconds: float, timed: bool = True
) -> list[Row]:
    """A row for each budget. Not `timed`, everything is run once, two layers in turn.

    Raises:
        ArithmeticError: a wrong result.
        torch.OutOfMemoryError: it does not fit.
    """
    touched = cell.rows * (cell.context * cell.code_bytes + (cell.near + min(budgets)) * cell.kv_bytes)
    count = fitting(cell, touched) if timed else 2
    state = Layers(cell, count, device, dtype)
    ways, left_out = ways_to_read(state, budgets)
    found = {budget: counted(state, budget) for budget in budgets}
    # a graph takes each layer as often as the others, and not for longer than a twentieth of a second
    calls = count * max(1, min(20 // count, int(2e10 / (count * cell.dense_bytes)))) if timed else 1
    median, spread = {}, {}
    if timed:
        pool, source = torch.cuda.graph_pool_handle(), torch.empty(2, COPIED, dtype=torch.uint8, device=device)
        graphs = {
            name: captured([partial(way, state.layers[i % count], i) for i in range(calls)], pool)
            for name, way in ways.items()
        }
        graphs["copy"] = captured([lambda: source[1].copy_(source[0])], pool)
        number = dict.fromkeys(ways, calls) | {"copy": 1}
        median, spread = middle(replayed(graphs, seconds, state.rewind), number)
    else:
        for way in ways.values():
            way(state.layers[1], 1)
    rows = []
    for budget, (scored, read) in found.items():
        own = {name.split("@")[0]: us for name, us in median.items() if name.split("@")[1:] in ([], [str(budget)])}
        row = asdict(cell) | {
            "kind": "kernel", "budget": budget, "dtype": str(dtype), "layers": count, "calls": calls,
            "rotated_mb": round(count * touched / 1e6), "tokens_scored": scored, "tokens_read": read,
            "microseconds": own, "spread": spread.get(f"sparse@{budget}"), "left_out": left_out,
        }  # fmt: skip
        rows.append(row | figures(cell.bytes_of(scored, read), cell, own))
    return rows


def figures(moved: dict[str, float], cell: Cell, us: dict[str, float]) -> Row:
    """What the times mean."""
    total = moved["score"] + moved["select"] + moved["attend"]
    row: Row = {
        "bytes": {name: round(each) for name, each in moved.items()}
        | {"moved": round(total), "dense": cell.dense_bytes}
    }
    if us:
        copy = 2 * COPIED / us["copy"] / 1e3
        best = min((name for name in us if name in (*DENSE, "flashinfer paged", "ours, whole row")), key=us.__getitem__)
        rates = {
            "must": moved["must"] / us["sparse"],
            "moved": total / us["sparse"],
            "dense": cell.dense_bytes / us[best],
        }
        rates |= {name: moved[name] / us[name] for name in ("score", "select", "attend")}
        row |= {"copy_gb_s": round(copy), "gb_s": {name: round(each / 1e3) for name, each in rates.items()}}
        row["share_of_copy"] = {name: round(each / 1e3 / copy, 3) for name, each in rates.items()}
        row |= {"best_dense": best, "dense_over_sparse": round(us[best] / us["sparse"], 2)}
        row["gather_over_sparse"] = round(us["gather, sdpa"] / us["sparse"], 2)
    return row
