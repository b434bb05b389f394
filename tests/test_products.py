"""A matrix times a few rows: as accurate as PyTorch, and every row as it would be alone, to the last bit."""

from concurrent.futures import ThreadPoolExecutor

import pytest
import torch
from cases import FLOATS, SEEDS, randn
from hypothesis import example, given
from hypothesis import strategies as st
from torch import Tensor
from torch.nn import functional
from torch.testing._internal.two_tensor import TwoTensor

from sparse_attention_decoder.errors import ShapeError
from sparse_attention_decoder.kernels.cpu.library import DTYPES, PRODUCT, run
from sparse_attention_decoder.kernels.cpu.products import MOST_ROWS, is_in_memory, multiply, takes
from sparse_attention_decoder.models.verifying import MOST_VERIFIED

pytestmark = pytest.mark.usefixtures("isa", "poison")

each_dtype = pytest.mark.parametrize("dtype", FLOATS, ids=str)
# around four rows abreast and 64 in a work item; around two vectors of every width, and the pieces sums are made of
ROWS, COLUMNS = (1, 3, 4, 5, 63, 64, 65, 129), (8, 16, 24, 40, 64, 576, 1000, 2056)
# a matrix that is shared out between threads, in three items
SHARED = (136, 576)


def drawn(seed: int, rows: int, columns: int, dtype: torch.dtype, gap: int = 0) -> tuple[Tensor, Tensor]:
    """A matrix whose rows lie apart, NaN between them, and a bias every other number of which is not its own."""
    wide = torch.full((rows, columns + gap), torch.nan, dtype=dtype)
    wide[:, gap:] = randn(seed, rows, columns, dtype=dtype)
    return wide[:, gap:], torch.stack([randn(seed + 1, rows, dtype=dtype), wide.new_full((rows,), torch.nan)], 1)[:, 0]


def bits(x: Tensor) -> Tensor:
    """To compare to the last bit, NaN and signs of zeros included."""
    return x.view(torch.int32 if x.dtype == torch.float32 else torch.int16)


def errors(x: Tensor, weight: Tensor, bias: Tensor | None) -> list[float]:
    """The largest error against float64, of ours and of PyTorch's product in the same dtype."""
    exact = functional.linear(x.double(), weight.double(), None if bias is None else bias.double())
    found, plain = multiply(x, weight, bias), functional.linear(x, weight, bias)
    assert (found.shape, found.dtype) == (plain.shape, plain.dtype)
    return [(y.double() - exact).abs().max().item() for y in (found, plain)]


@each_dtype
@pytest.mark.parametrize("columns", COLUMNS)
def test_error_against_float64_is_at_most_twice_pytorchs(columns, dtype):
    found = []
    for rows in ROWS:
        for count in (1, 2, 3, 4, 5, 16):
            weight, bias = drawn(rows, rows, columns, dtype, gap=8 * (count % 3))
            x = randn(1000 + count, count, columns, dtype=dtype)
            found.append(errors(x, weight, bias if count % 2 else None))
    # of all sizes together: the largest of a few errors is a matter of luck
    ours, theirs = torch.tensor(found).amax(0)
    assert ours <= 2 * theirs


@pytest.mark.parametrize("columns", [4096, 14336])
@pytest.mark.parametrize("count", [1, 4, 5, 16])
def test_long_rows_are_as_accurate(columns, count):
    # sums of many numbers in one chain are not
    ours, theirs = errors(randn(1000, count, columns), *drawn(0, 40, columns, torch.float32))
    assert ours <= 2 * theirs


@each_dtype
@given(st.integers(1, 70), st.integers(1, 150), st.integers(1, MOST_ROWS), st.integers(0, 9), st.booleans(), SEEDS)
@example(rows=129, eighths=72, count=16, gap=0, biased=False, seed=0)
def test_every_row_is_as_it_is_alone(dtype, rows, eighths, count, gap, biased, seed):
    weight, bias = drawn(seed, rows, 8 * eighths, dtype, gap)
    x, bias = randn(seed, count, 8 * eighths, dtype=dtype), bias if biased else None
    together = multiply(x, weight, bias)
    alone = torch.cat([multiply(row, weight, bias) for row in x.split(1)])
    # nothing is left of the NaN that the output was filled with, or that lie beside matrix and bias
    assert together.isfinite().all()
    assert torch.equal(bits(together), bits(alone))


@each_dtype
def test_the_number_of_threads_does_not_change_a_bit(set_threads, dtype):
    weight, bias = drawn(0, *SHARED, dtype)
    for count in range(1, MOST_ROWS + 1):
        x, found = randn(count, count, SHARED[1], dtype=dtype), []
        for threads in (1, 2, 3):
            set_threads(threads)
            found.append(multiply(x, weight, bias))
        assert found[0].isfinite().all()
        assert all(torch.equal(bits(other), bits(found[0])) for other in found[1:])


@each_dtype
@pytest.mark.parametrize("count", [3, 5, 16])
def test_what_is_no_number_stays_in_its_row(count, dtype):
    weight, bias = drawn(0, 65, 40, dtype)
    x = randn(count, count, 40, dtype=dtype)
    sound = multiply(x, weight, bias)
    for row in range(count):
        for poison in (torch.nan, torch.inf, -torch.inf):
            for place in (0, 31, 39):
                spoilt = x.clone()
                spoilt[row, place] = poison
                found, others = multiply(spoilt, weight, bias), torch.arange(count) != row
                assert torch.equal(bits(found[others]), bits(sound[others]))
                expected = functional.linear(spoilt[row].float(), weight.float(), bias.float()).to(dtype)
                assert torch.equal(found[row].nan_to_num(1e9), expected.nan_to_num(1e9))


@each_dtype
def test_what_is_no_number_in_the_matrix_stays_in_its_column_of_the_output(dtype):
    weight, bias = drawn(0, 9, 40, dtype)
    x = randn(1, 6, 40, dtype=dtype)
    sound = multiply(x, weight, bias)
    for row in range(9):
        spoilt = weight.clone()
        spoilt[row, 37] = torch.nan
        found, others = multiply(x, spoilt, bias), torch.arange(9) != row
        assert found[:, row].isnan().all()
        assert torch.equal(bits(found[:, others]), bits(sound[:, others]))


@pytest.mark.parametrize("dtype", FLOATS[1:], ids=str)
@pytest.mark.parametrize("size", [2.0**-20, 2.0**-9, 2.0**9])
def test_sums_that_float16_does_not_hold_are_rounded_as_pytorch_rounds_them(size, dtype):
    # to zero, to subnormal numbers and to infinity
    x, weight = ((size * randn(seed, 4, 64)).to(dtype) for seed in (1, 2))
    exact = functional.linear(x.double(), weight.double()).to(dtype)
    torch.testing.assert_close(multiply(x, weight), exact, rtol=torch.finfo(dtype).eps, atol=2.0**-24)


@each_dtype
def test_inputs_have_any_axes_and_may_lie_anywhere(dtype):
    weight, bias = drawn(0, 65, 24, dtype)
    rows = randn(1, 6, 24, dtype=dtype)
    expected = multiply(rows, weight, bias)
    wide = rows.new_full((24, 12), torch.nan)
    wide[:, ::2] = rows.T
    for x in (rows[0], rows.view(2, 3, 24), rows.view(3, 1, 2, 24), wide[:, ::2].T, rows[:1].expand(3, 24)):
        found = multiply(x, weight, bias)
        assert found.shape == (*x.shape[:-1], 65) and found.is_contiguous()
        same = expected[:1].expand(3, 65) if x.stride(0) == 0 else expected[: x.numel() // 24]
        assert torch.equal(found.reshape(-1, 65), same)
    # one row of a matrix for all its rows
    assert torch.equal(multiply(rows, weight[:1].expand(7, 24)), multiply(rows, weight[:1]).expand(6, 7))


def test_no_rows_give_no_rows():
    for shape in ((0, 24), (2, 0, 24)):
        weight, bias = drawn(0, 5, 24, torch.float32)
        # a thread that has done nothing yet has no scratch
        with ThreadPoolExecutor(1) as thread:
            assert thread.submit(multiply, torch.empty(shape), weight, bias).result().shape == (*shape[:-1], 5)
    assert multiply(torch.ones(3, 24), torch.empty(0, 24), torch.empty(0)).shape == (3, 0)


@each_dtype
def test_nothing_is_written_beside_the_output(dtype):
    weight, x = randn(0, 65, 40, dtype=dtype), randn(1, 7, 40, dtype=dtype)
    room = torch.full((9, 65), 7.0, dtype=dtype)
    struct = PRODUCT.pack(
        7, 65, 40, 1, DTYPES[dtype], x.data_ptr(), weight.data_ptr(), 40, 0, room[1].data_ptr()
    )  # fmt: skip
    run("sad_multiply", struct)
    assert torch.equal(room[1:8], multiply(x, weight))
    assert room[::8].eq(7).all()


def wrong_products() -> dict[str, tuple[Tensor, Tensor, Tensor | None]]:
    x, weight, bias = torch.ones(3, 24), torch.ones(5, 24), torch.ones(5)
    return {
        "columns no multiple of 8": (x[:, :20], weight[:, :20], bias),
        "no columns": (x[:, :0], weight[:, :0], bias),
        "other columns": (x[:, :16], weight, bias),
        "as many numbers in other columns": (torch.ones(3, 8), weight, bias),
        "no axes": (torch.tensor(1.0), weight, bias),
        "too many rows": (torch.ones(MOST_ROWS + 1, 24), weight, bias),
        "too many rows in two axes": (torch.ones(3, 6, 24), weight, bias),
        "an input of another dtype": (x.bfloat16(), weight, bias),
        "a matrix of another dtype": (x, weight.half(), bias),
        "a bias of another dtype": (x, weight, bias.double()),
        "a short bias": (x, weight, bias[:4]),
        "a bias of one number": (x, weight, bias[:1]),
        "a bias of two axes": (x, weight, bias[None]),
        "whole numbers": (x.int(), weight.int(), None),
        "a matrix of whole numbers": (x, weight.int(), None),
        "doubles": (x.double(), weight.double(), bias.double()),
        "a transposed matrix": (x, torch.ones(24, 5).T, bias),
        "a vector": (x, weight[0], None),
        "a number": (x, torch.tensor(1.0), None),
        "a stack of matrices": (x, weight[None], bias),
        "a sparse matrix": (x, weight.to_sparse(), bias),
        "an input elsewhere": (x.to("meta"), weight, bias),
        "a matrix elsewhere": (x, weight.to("meta"), bias),
        "a bias elsewhere": (x, weight, bias.to("meta")),
        "an input of another make": (TwoTensor(x, x), weight, bias),
        "a matrix of another make": (x, TwoTensor(weight, weight), bias),
        "a bias of another make": (x, weight, TwoTensor(bias, bias)),
    }


@pytest.mark.parametrize("name", wrong_products())
def test_what_does_not_fit_is_refused(name):
    with pytest.raises(ShapeError, match=r"times .* transposed.*expected"):
        multiply(*wrong_products()[name])


def test_the_message_says_what_came_and_what_was_expected():
    with pytest.raises(ShapeError) as raised:
        multiply(torch.ones(3, 24, dtype=torch.float16), torch.ones(5, 32), torch.ones(5))
    for part in ("(3, 24) of torch.float16 on cpu", "(5, 32) of torch.float32", "(5,)", "16 rows", "multiple of 8"):
        assert part in str(raised.value)


def test_it_is_known_beforehand_which_matrices_are_taken():
    for _, weight, _ in wrong_products().values():
        if takes(weight) and is_in_memory(weight):
            multiply(torch.ones(1, weight.shape[1], dtype=weight.dtype), weight)
        else:
            with pytest.raises(ShapeError):
                multiply(torch.ones(1, weight.shape[-1] if weight.ndim else 1, dtype=weight.dtype), weight)


def test_a_draft_is_verified_in_one_product():
    # more rows are PyTorch's, whose order of additions is another than that of a step
    assert MOST_VERIFIED <= MOST_ROWS
