"""The compiled kernels among others: as torch ops, under torch.compile, on several threads, in a forked child."""

import multiprocessing
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from threading import Barrier

import pytest
import torch
from cases import FLOATS, assert_error_within, coded, fit, layer_with, left_padded, randn, skewed_keys
from test_cpu_kernels import CPU, assert_as_accurate_as_pytorch, each_dtype
from torch import Tensor

from sparse_attention_decoder.attention import decode_step
from sparse_attention_decoder.errors import ShapeError
from sparse_attention_decoder.kernels import Coded, Statistics
from sparse_attention_decoder.selection import Rows

OPS = torch.ops.sparse_attention_decoder
SCALING = 0.2
DEVICE = torch.device("cpu")

pytestmark = pytest.mark.usefixtures("isa", "poison")


# --- torch ops


class Layer:
    """Preallocated keys, values, codes and factors, the first `length` tokens filled."""

    def __init__(self, length: int, room: int, dtype: torch.dtype, dim: int = 24, value_dim: int = 16) -> None:
        keys, values = skewed_keys(0, 2, 2, length, dim, dtype=dtype), randn(1, 2, 2, length, value_dim, dtype=dtype)
        self.length, self.keys, self.values = (
            length,
            keys.new_zeros(2, 2, room, dim),
            keys.new_zeros(2, 2, room, value_dim),
        )
        self.keys[:, :, :length], self.values[:, :, :length] = keys, values
        self.statistics = fit(keys)
        self.sketch = Coded.room(room, self.statistics)
        CPU.encode(keys, self.sketch, 0)
        self.dtype = dtype

    @property
    def sketch_tensors(self) -> tuple[Tensor, ...]:
        return self.sketch.codes, self.sketch.factors, self.statistics.mean, self.statistics.deviation

    @property
    def mutated(self) -> tuple[Tensor, ...]:
        return self.keys, self.values, self.sketch.codes, self.sketch.factors

    def token(self, seed: int) -> tuple[Tensor, Tensor, Tensor]:
        """Query, key and value of a token to come."""
        sizes = ((4, 24), (2, 24), (2, 16))
        query, key, value = (randn(seed + n, 2, *size, dtype=self.dtype) for n, size in enumerate(sizes))
        return query, key, value

    def step(self, step: Callable[..., tuple[Tensor, ...]], seed: int, floor: int = 7, tau: float = 0.01):
        """Append a token by `step`, attend."""
        self.length += 1
        return step(*self.token(seed), self.keys, self.values, *self.sketch_tensors, self.length, floor, tau)


def decode(query, key, value, keys, values, codes, factors, mean, deviation, length, floor, tau):
    """A decode step as a compiled model would make it."""
    held = keys[:, :, :length], values[:, :, :length]
    output, lse, counts, missing = OPS.step(
        query, key, value, *held, codes, factors, mean, deviation, 2, 5, floor, tau, SCALING
    )
    return output * 2, lse, counts, missing


def calls() -> dict[str, tuple[object, ...]]:
    layer, (query, key, value) = Layer(40, 60, torch.float32), Layer(1, 1, torch.float32).token(5)
    keys, values, sketch = layer.keys[:, :, :40].clone(), layer.values[:, :, :40].clone(), layer.sketch_tensors
    tokens, valid = torch.arange(9).expand(2, 2, -1).contiguous(), torch.ones(2, 2, 9, dtype=torch.bool)
    mask = torch.arange(40) >= torch.tensor([[0], [9]])
    return {
        "encode": (keys, *sketch, 3),
        "score": (query, *sketch, 2, 35, SCALING),
        "select": (randn(0, 2, 2, 3, 40), torch.zeros(2, 2, 3), 4, mask, 5, 0.01, None),
        "select with a cap": (randn(0, 2, 2, 3, 40), torch.zeros(2, 2, 3), 4, None, 5, 0.0, 3),
        "attend": (query, keys, values, tokens, valid, SCALING),
        "attend without marks": (query, keys, values, tokens, None, SCALING),
        "attend_all": (query, keys, values, mask, SCALING),
        "attend_all without a mask": (query, keys, values, None, SCALING),
        "step": (query, key, value, keys, values, *sketch, 2, 5, 7, 0.01, SCALING),
        "step without a middle": (query, key, value, keys, values, *sketch, 2, 50, 7, 0.01, SCALING),
        "multiply": (randn(0, 2, 1, 24), randn(1, 70, 24), randn(2, 70)),
        "multiply without a bias": (randn(0, 2, 1, 24), randn(1, 70, 24), None),
    }


@pytest.mark.parametrize(
    "name",
    [
        "encode",
        "score",
        "select",
        "select with a cap",
        "attend",
        "attend without marks",
        "attend_all",
        "attend_all without a mask",
        "step",
        "step without a middle",
        "multiply",
        "multiply without a bias",
    ],
)
def test_every_torch_op_keeps_the_contract_of_its_schema(name):
    torch.library.opcheck(getattr(OPS, name.split()[0]), calls()[name])


@each_dtype
def test_the_step_op_appends_and_codes_and_attends(dtype):
    layer, apart = Layer(40, 64, dtype), Layer(40, 64, dtype)
    for seed in range(20, 30):
        output, lse, counts, missing = layer.step(decode, seed)
        (query, key, value), length = apart.token(seed), layer.length
        apart.keys[:, :, length - 1], apart.values[:, :, length - 1] = key, value
        CPU.encode(key.unsqueeze(2), apart.sketch, length - 1)
        held, regions = (
            (apart.keys[:, :, :length], apart.values[:, :, :length]),
            Rows.full(2, length).regions(2, 5, DEVICE),
        )
        expected, expected_lse, chosen = CPU.step(query, *held, apart.sketch, regions, 7, 0.01, SCALING)
        for ours, theirs in zip(
            (output, lse, counts, missing, *layer.mutated),
            (expected * 2, expected_lse, chosen.counts, chosen.missing_mass, *apart.mutated),
            strict=True,
        ):
            assert torch.equal(ours, theirs)


@each_dtype
def test_the_step_op_reads_everything_where_the_budget_covers_it(dtype):
    for before, sinks, window, floor in ((0, 2, 5, 7), (3, 2, 5, 7), (6, 2, 5, 7), (30, 0, 1, 1000), (30, 40, 1, 1)):
        layer = Layer(before, 64, dtype)
        query, key, value = layer.token(9)
        keys, values = layer.keys[:, :, : before + 1], layer.values[:, :, : before + 1]
        output, *_ = OPS.step(
            query, key, value, keys, values, *layer.sketch_tensors, sinks, window, floor, 0.0, SCALING
        )
        valid = torch.ones(2, 2, before + 1, dtype=torch.bool)
        assert torch.equal(keys[:, :, -1], key)
        assert_as_accurate_as_pytorch(output, query, keys, values, valid, SCALING)


@pytest.mark.parametrize("dtype", FLOATS[:2], ids=str)
def test_a_compiled_decode_step_is_the_eager_one(dtype):
    torch.compiler.reset()
    compiled = torch.compile(decode, fullgraph=True, backend="aot_eager")
    ours, theirs = Layer(40, 64, dtype), Layer(40, 64, dtype)
    for seed in range(50, 54):
        results = ours.step(compiled, seed), theirs.step(decode, seed)
        for found, expected in zip(*results, strict=True):
            assert torch.equal(found, expected)
        for found, expected in zip(ours.mutated, theirs.mutated, strict=True):
            assert torch.equal(found, expected)
    assert ours.keys[:, :, 40:44].ne(0).all()
    assert ours.sketch.factors[:, :, 40:44].ne(0).all()


# --- threads and processes


def everything(dim: int = 64) -> list[Tensor]:
    """What every operation gives on tensors large enough for a second thread."""
    keys, values = skewed_keys(0, 1, 2, 6000, dim), randn(1, 1, 2, 6000, dim)
    query, regions = randn(2, 1, 8, dim) * dim**-0.5, Rows.full(1, 6000).regions(4, 256, DEVICE)
    moments = [CPU.fit(row) for row in keys]
    statistics = Statistics(*(torch.stack(list(parts)) for parts in zip(*moments, strict=True)))
    sketch = coded(keys, statistics, CPU)
    scores = CPU.score(query, sketch, 3, 5990, SCALING)
    chosen = CPU.select(scores, torch.zeros(1, 2, 4), 3, None, 900, 1e-4)
    listed = CPU.attend(query, keys, values, chosen.tokens, chosen.chosen, SCALING)
    output, lse, selection = CPU.step(query, keys, values, sketch, regions, 900, 1e-4, SCALING)
    dense = CPU.attend_all(query, keys, values, None, SCALING)
    moments = [statistics.mean, statistics.deviation, sketch.codes, sketch.factors, scores]
    return [*moments, chosen.tokens, chosen.missing_mass, *listed, output, lse, selection.tokens, dense]


def test_the_number_of_threads_does_not_change_a_bit(set_threads):
    set_threads(1)
    alone = everything()
    for threads in (2, 3):
        set_threads(threads)
        for ours, theirs in zip(everything(), alone, strict=True):
            assert torch.equal(ours, theirs)


def decoded(seed: int, start: Callable[[], object] = lambda: None) -> list[Tensor]:
    """Outputs of steps of one layer, each with a token appended before it."""
    keys, values = skewed_keys(seed, 1, 2, 4000, 64), randn(seed + 1, 1, 2, 4000, 64)
    layer = layer_with(keys, values, backend="cpu", top_k=300, attention_window=100, threshold=1e-4)
    start()
    outputs = []
    for step in range(12):
        layer.buffer.append(*(randn(seed + step + n, 1, 2, 1, 64) for n in range(2)))
        query = randn(seed + step, 1, 8, 64) / 8
        outputs.append(decode_step(query, layer, Rows.full(1, 4001 + step), 0.125).output)
    return outputs


@pytest.mark.parametrize("threads", [1, 2])
def test_two_layers_decoded_at_the_same_time_give_what_they_give_one_after_the_other(set_threads, threads):
    set_threads(threads)
    expected, together = [decoded(seed) for seed in (0, 1000)], Barrier(2)

    def run(seed: int) -> list[Tensor]:
        torch.set_num_threads(threads)
        return decoded(seed, together.wait)

    with ThreadPoolExecutor(2) as pool:
        found = list(pool.map(run, (0, 1000)))
    for ours, theirs in zip(found, expected, strict=True):
        for one, other in zip(ours, theirs, strict=True):
            assert torch.equal(one, other)


def exit_status_of_a_child(work: Callable[[], None]) -> int | None:
    """Fork, run, and say how it ended: 0, 1 for an exception, below 0 for a signal, None where it hung."""
    child = multiprocessing.get_context("fork").Process(target=work)
    child.start()
    child.join(30)
    status = child.exitcode
    if status is None:
        child.kill()
        child.join()
    return status


# later Pythons warn of a fork beside threads, which is what is tested
@pytest.mark.filterwarnings("ignore:.*fork:DeprecationWarning")
def test_a_forked_child_decodes_as_its_parent_does(set_threads):
    set_threads(2)
    keys, values, query = skewed_keys(0, 1, 2, 6000, 64), randn(1, 1, 2, 6000, 64), randn(2, 1, 8, 64) / 8
    sketch, regions = coded(keys, fit(keys), CPU), Rows.full(1, 6000).regions(4, 256, DEVICE)

    def step() -> list[Tensor]:
        output, lse, chosen = CPU.step(query, keys, values, sketch, regions, 900, 1e-4, SCALING)
        return [output, lse, chosen.counts, CPU.attend_all(query, keys, values, None, SCALING)]

    # the parent's threads are running by now
    expected = step()

    def compare() -> None:
        assert all(torch.equal(ours, theirs) for ours, theirs in zip(step(), expected, strict=True))

    assert exit_status_of_a_child(compare) == 0
    # and the parent goes on as before
    compare()


@pytest.mark.filterwarnings("ignore:.*fork:DeprecationWarning")
def test_regions_of_another_batch_are_refused():
    layer, (query, *_) = Layer(40, 48, torch.float32), Layer(1, 1, torch.float32).token(0)
    keys, values = layer.keys[:, :, :40], layer.values[:, :, :40]
    mask = left_padded(40, 30, 35)
    others = [Rows.from_mask(mask[:1] & mask[1:2]), Rows.full(1, 40), Rows.from_mask(mask)]

    def refuse() -> None:
        for rows in others:
            with pytest.raises(ShapeError):
                CPU.step(query, keys, values, layer.sketch, rows.regions(2, 5, DEVICE), 7, 0.0, SCALING)

    # in a child: what is not refused reads memory that is not its own
    assert exit_status_of_a_child(refuse) == 0


# --- the decode step


@each_dtype
@pytest.mark.parametrize("policy", ["sketch", "oracle", "quest", "window", "dense"])
def test_a_padded_batch_decodes_as_with_the_reference(dtype, policy):
    mask = left_padded(150, 90, 12)
    keys, values = skewed_keys(0, 3, 2, 150, 24, dtype=dtype), randn(1, 3, 2, 150, 24, dtype=dtype)
    layers = [
        layer_with(keys, values, backend=backend, policy=policy, threshold=1e-3, top_k=9)
        for backend in ("cpu", "reference")
    ]
    for step in range(6):
        mask = torch.cat([mask, torch.ones(3, 1, dtype=torch.bool)], 1)
        query, *new = (randn(10 * step + n, 3, heads, 24, dtype=dtype) for n, heads in enumerate((8, 2, 2)))
        for layer in layers:
            layer.buffer.append(*(x.unsqueeze(2) for x in new))
        ours, theirs = (decode_step(query, layer, Rows.from_mask(mask), 24**-0.5) for layer in layers)
        # what rounds is the output, and before it the logits
        largest = 24**-0.5 * float(query.float().norm(dim=-1).max() * layers[0].buffer.keys.float().norm(dim=-1).max())
        assert_error_within(ours.output, theirs.output, 4 * torch.finfo(dtype).eps + 2.0**-22 * largest)
        if ours.selection is not None:
            assert torch.equal(ours.selection.counts, theirs.selection.counts)
    assert layers[0].reads.tokens_read == layers[1].reads.tokens_read
