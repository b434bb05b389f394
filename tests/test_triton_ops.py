"""A decode step with its length on the device, as two torch ops: what eager steps give on the same tensors."""

import pytest
import torch
from cases import assert_error_within
from test_cpu_kernels import assert_as_accurate_as_pytorch, each_dtype
from torch import Tensor
from triton_cases import TRITON, home, laws_of_kernels, on
from triton_tokens import OPS, Tokens

from sparse_attention_decoder.kernels import Coded, Statistics
from sparse_attention_decoder.kernels.triton.shapes import Scratch
from sparse_attention_decoder.selection import Rows, Selection

SCALING = 0.2

pytestmark = laws_of_kernels


def eager(layer: Tokens, row: int, tokens: int, floor: int, tau: float) -> tuple[Tensor, Selection | None]:
    """What a row of `tokens` cached positions gives by itself, over views of the layer's memory; None: read whole."""
    start, own = layer.first[row], slice(row, row + 1)
    query = layer.text_there[0][own, :, tokens - 1]
    keys, values = (x[own, :, :tokens] for x in (layer.keys, layer.values))
    valid = torch.arange(tokens).expand(1, -1) >= start
    if tokens - start <= layer.dense:
        everything = valid.expand(layer.heads, -1).unsqueeze(0)
        ids = torch.arange(tokens).expand_as(everything)
        output, _ = TRITON.attend(query, keys, values, *on(layer.device, (ids, everything)), SCALING)
        return home(output), None
    codes, factors, mean, deviation = (x[own] for x in layer.sketch)
    sketch = Coded(codes, factors, Statistics(mean, deviation))
    regions = Rows.from_mask(valid).regions(layer.sinks, layer.window, torch.device("cpu"))
    output, _, selection = TRITON.step(query, keys, values, sketch, on(layer.device, regions), floor, tau, SCALING)
    return home(output), home(selection)


def assert_read_is_eager(layer: Tokens, at: int, floor: int, tau: float) -> None:
    """Append token `at`, read, and compare with each row alone: what was chosen, what was counted, what came out."""
    before = home(layer.tally)
    layer.append(at)
    output = home(layer.read(at, floor, tau, SCALING))
    near = layer.sinks + layer.window
    scratch = home(Scratch(layer.shape, layer.room, near, layer.scratch).counts)
    counted = (home(layer.tally) - before).view(len(layer.first), layer.heads, 6)
    for row, start in enumerate(layer.first):
        expected, selection = eager(layer, row, at + 1, floor, tau)
        assert output.dtype == expected.dtype
        assert_error_within(output[row : row + 1], expected, 4 * torch.finfo(output.dtype).eps + 1e-6)
        cached, sparse = at + 1 - start, int(selection is not None)
        read, missing = torch.full((layer.heads,), cached), torch.zeros(layer.heads)
        if selection is not None:
            chosen = scratch.view(len(layer.first), layer.heads)[row]
            assert torch.equal(chosen.long(), selection.counts[0])
            read, missing = near + selection.counts[0], selection.missing_mass[0]
        for head in range(layer.heads):
            *tokens, mass = counted[row, head].tolist()
            assert tokens == [1, sparse, int(read[head]), cached, sparse * (cached - near)]
            assert mass == pytest.approx(float(missing[head]), rel=1e-5, abs=1e-6)


def test_a_loop_of_the_ops_is_a_loop_of_eager_steps_over_every_length(device):
    # from nothing, whole until there is something to choose from, and on behind a block's end
    layer = Tokens(device, torch.bfloat16, 40, heads=1, dense=11)
    for at in range(28):
        assert_read_is_eager(layer, at, 4, 0.01)


@pytest.mark.parametrize(("starts", "prompt"), [((0, 11), 20), ((17, 0, 3), 40)], ids=str)
def test_rows_of_different_lengths_read_what_they_read_alone(device, starts, prompt):
    # the short row is read whole, the long one not
    layer = Tokens(device, torch.float32, 60, starts, dense=24)
    layer.prefill(prompt)
    for at in range(prompt, prompt + 3):
        assert_read_is_eager(layer, at, 5, 0.02)


@pytest.mark.parametrize(
    ("dim", "value_dim", "group", "dtype"),
    [
        (64, 64, 4, torch.bfloat16),
        (80, 24, 1, torch.float32),
        (128, 128, 7, torch.float16),
        (128, 128, 4, torch.float32),
        (256, 16, 16, torch.bfloat16),
    ],
    ids=str,
)
def test_a_long_context_is_read_as_in_an_eager_step(device, dim, value_dim, group, dtype):
    layer = Tokens(
        device, dtype, 620, heads=1, group=group, dim=dim, value_dim=value_dim, sinks=4, window=150, dense=200
    )
    layer.prefill(600)
    for at, floor, tau in ((600, 32, 1e-4), (601, 300, 0.0)):
        assert_read_is_eager(layer, at, floor, tau)


@each_dtype
def test_a_floor_of_everything_is_dense_attention(device, dtype):
    layer = Tokens(device, dtype, 60, (0, 9))
    layer.prefill(40)
    layer.append(40)
    output = home(layer.read(40, 1000, 0.0, SCALING))
    query, keys, values = layer.text[0][:, :, 40], layer.text[1][:, :, :41], layer.text[2][:, :, :41]
    valid = layer.rows(41).valid[:, None].expand(-1, 2, -1)
    assert_as_accurate_as_pytorch(output, query, keys, values, valid, SCALING)


def test_layers_that_share_plan_and_scratch_do_not_influence_each_other(device):
    one, alone = (Tokens(device, torch.float32, 40, (0, 9), heads=1) for _ in range(2))
    for layer in (one, alone):
        layer.prefill(30)
    other = Tokens(device, torch.float32, 40, (5, 2), heads=1)
    other.text_there = tuple(2 * x.flip(0) + 1 for x in other.text_there)
    other.prefill(25)
    other.plan, other.scratch = one.plan, one.scratch
    for step in range(2):
        one.append(30 + step)
        found = one.read(30 + step, 4, 0.01, SCALING)
        other.append(25 + step)
        assert other.read(25 + step, 9, 0.0, SCALING).isfinite().all()
        alone.append(30 + step)
        assert torch.equal(found, alone.read(30 + step, 4, 0.01, SCALING))


def test_the_same_tokens_again_after_the_length_went_back_give_the_same(device):
    layer = Tokens(device, torch.float32, 60, heads=1, window=2, dense=5)
    layer.prefill(42)
    outputs = []
    for _ in range(2):
        # no statistics are fitted anew between 42 and 50 tokens; the first of the new ones leave the window
        layer.length.fill_(42)
        for at in range(42, 46):
            layer.append(at)
            outputs.append(layer.read(at, 4, 0.01, SCALING))
    for first, again in zip(outputs[:4], outputs[4:], strict=True):
        assert torch.equal(first, again)


# --- as ops


def test_both_ops_keep_the_contract_of_their_schemas(device):
    layer = Tokens(device, torch.float32, 40, (0, 3), heads=1)
    layer.prefill(30)
    # damaged memory is not equal to itself
    layer.keys.nan_to_num_()
    layer.values.nan_to_num_()
    layer.coded.factors.nan_to_num_()
    torch.library.opcheck(OPS.append_token, layer.append_arguments(30))
    layer.length.fill_(30)
    layer.append(30)
    layer.scratch.zero_()
    torch.library.opcheck(OPS.read_tokens, layer.read_arguments(30, 4, 0.01, SCALING))


def test_a_compiled_decode_step_is_the_eager_one(device):
    def decode(new: tuple[object, ...], look: tuple[object, ...]) -> Tensor:
        OPS.append_token(*new)
        return 2 * OPS.read_tokens(*look)

    torch.compiler.reset()
    compiled = torch.compile(decode, fullgraph=True, backend="aot_eager")
    ours, theirs = (Tokens(device, torch.float32, 40, (0, 3), heads=1) for _ in range(2))
    for layer in (ours, theirs):
        layer.prefill(30)
    for at in range(30, 33):
        found, expected = (
            step(layer.append_arguments(at), layer.read_arguments(at, 4, 0.01, SCALING))
            for step, layer in ((compiled, ours), (decode, theirs))
        )
        assert torch.equal(found, expected)
        for one, other in zip(home(ours.written), home(theirs.written), strict=True):
            assert torch.equal(one.nan_to_num(), other.nan_to_num())
    assert ours.length.item() == 33
