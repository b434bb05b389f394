"""Linear layers of an enabled model: of a few rows multiplied by our kernel, of all else by PyTorch, as before."""

import copy
import io

import pytest
import tiny
import torch
from cases import FLOATS, randn
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.nn import functional
from torch.testing._internal.two_tensor import TwoTensor

from sparse_attention_decoder import AttentionConfig, disable, enable
from sparse_attention_decoder.kernels.cpu import library
from sparse_attention_decoder.models import aot, compiled, linears
from sparse_attention_decoder.models.step import TracedStep
from sparse_attention_decoder.models.verifying import RowsAlone

pytestmark = pytest.mark.usefixtures("compiled_library")

each_dtype = pytest.mark.parametrize("dtype", FLOATS, ids=str)
# q_proj, o_proj, three of the MLP: of each of two layers; k_proj and v_proj are too small
LARGE = {"hidden_size": 128, "intermediate_size": 160}
LARGE_LAYERS = 2 * 5


@pytest.fixture
def products(monkeypatch) -> list[tuple[int, ...]]:
    """Shapes of the inputs that our kernel multiplies from now on."""
    found: list[tuple[int, ...]] = []

    def multiply(x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        found.append(tuple(x.shape))
        return kernel(x, weight, bias)

    kernel = linears.multiply_fitting
    monkeypatch.setattr(linears, "multiply_fitting", multiply)
    return found


def layer(seed: int = 0, rows: int = 300, columns: int = 136, dtype: torch.dtype = torch.float32) -> nn.Linear:
    """A layer that is taken over, without gradients."""
    made = nn.Linear(columns, rows, dtype=dtype).requires_grad_(False)
    made.weight.copy_(randn(seed, rows, columns))
    made.bias.copy_(randn(seed + 1, rows))
    linears.install(made, "cpu")
    return made


def plain(made: nn.Linear, x: Tensor) -> Tensor:
    return functional.linear(x, made.weight, made.bias)


# --- a model


def test_decoding_is_as_exact_as_with_the_plain_layers(products):
    ids = tiny.prompt(1, 40)[0]
    turns = [(ids[:20], ids[20:])]
    exact, _ = tiny.replay(enable(tiny.build("llama", torch.float64, **LARGE), tiny.FULL), tiny.FULL, turns)
    assert not products
    model = enable(tiny.build("llama", **LARGE), tiny.FULL)
    found, _ = tiny.replay(model, tiny.FULL, turns)
    # each of the twenty steps, and nothing of the prompt
    assert len(products) == 20 * (LARGE_LAYERS + 1) and {shape[:2] for shape in products} == {(1, 1)}
    linears.remove(model)
    expected, _ = tiny.replay(model, tiny.FULL, turns)
    assert len(products) == 20 * (LARGE_LAYERS + 1)
    assert not torch.equal(found, expected)
    assert (found - exact).norm() <= 2 * (expected - exact).norm()


def test_disable_leaves_no_trace():
    model = tiny.build("llama", **LARGE)
    before = [{key: id(value) for key, value in vars(part).items()} for part in model.modules()]
    enable(model, tiny.BITING)
    assert len(linears.installed(model)) == LARGE_LAYERS + 1
    disable(model)
    assert [{key: id(value) for key, value in vars(part).items()} for part in model.modules()] == before
    assert model.lm_head.forward.__func__ is nn.Linear.forward


def test_another_backend_is_another_product():
    model = tiny.build("llama", **LARGE)
    for backend, count in (("reference", 0), ("auto", LARGE_LAYERS + 1), ("reference", 0), ("cpu", LARGE_LAYERS + 1)):
        enable(model, AttentionConfig(backend=backend))
        assert len(linears.installed(model)) == count


def test_without_the_library_nothing_is_taken_over(monkeypatch):
    monkeypatch.setattr(library, "load", lambda: "not compiled")
    assert not linears.installed(enable(tiny.build("llama", **LARGE), tiny.BITING))


def test_a_copy_of_an_enabled_model_multiplies_with_its_own_weights(products):
    model, ids = enable(tiny.build("llama", **LARGE), tiny.FULL), tiny.prompt(1, 1)
    with torch.no_grad():
        expected = model(ids).logits
        copied = copy.deepcopy(model)
        for part in copied.parameters():
            part.zero_()
        assert copied(ids).logits.eq(0).all()
        assert torch.equal(model(ids).logits, expected)
    assert len(products) == 3 * (LARGE_LAYERS + 1)
    linears.remove(copied)
    assert len(linears.installed(model)) == LARGE_LAYERS + 1


# --- a layer


def saved_and_loaded(made: nn.Module) -> nn.Module:
    file = io.BytesIO()
    torch.save(made, file)
    file.seek(0)
    loaded: nn.Module = torch.load(file, weights_only=False)
    return loaded


@pytest.mark.parametrize("copied", [copy.deepcopy, saved_and_loaded], ids=["deep", "file"])
def test_a_copy_of_a_layer_multiplies_with_its_own_weights(products, copied):
    made, x = nn.Sequential(layer()), randn(5, 1, 136)
    expected, other = made(x), copied(made)
    other[0].weight.neg_()
    other[0].bias.neg_()
    assert torch.equal(other(x), -expected)
    assert torch.equal(made(x), expected)
    assert len(products) == 3
    linears.remove(other)
    assert not linears.installed(other) and linears.installed(made)


class Doubled(nn.Linear):
    def forward(self, x: Tensor) -> Tensor:
        return 2 * super().forward(x)


def test_other_layers_are_left_alone():
    own = nn.Linear(256, 256)
    own.forward = lambda x: x
    kept = own.forward
    unlike = nn.Linear(256, 256)
    unlike.weight = nn.Parameter(TwoTensor(unlike.weight.data, unlike.weight.data))
    model = nn.ModuleDict(
        {
            "own": own,
            "unlike": unlike,
            "subclass": Doubled(256, 256),
            "small": nn.Linear(128, 127),
            "small16": nn.Linear(128, 128, dtype=torch.bfloat16),
            "norm": nn.LayerNorm(20000),
            "taken": nn.Linear(128, 128),
            "taken16": nn.Linear(256, 128, dtype=torch.bfloat16),
        }
    )
    for _ in range(2):
        linears.install(model, "auto")
        assert [*linears.installed(model)] == ["taken", "taken16"]
    linears.remove(model)
    assert not linears.installed(model) and own.forward is kept


@each_dtype
def test_rows_from_one_to_sixteen_are_ours_and_each_as_it_is_alone(dtype, products):
    made, x = layer(dtype=dtype), randn(3, 17, 136, dtype=dtype)
    alone = torch.cat([made(row) for row in x.split(1)])
    assert products == [(1, 136)] * 17
    for count in range(1, 17):
        for shape in ((count, 136), (1, count, 136), (count, 1, 136)):
            assert torch.equal(made(x[:count].view(shape)).view(count, -1), alone[:count])
            assert products.pop() == shape
    assert made(x[0]).shape == (300,) and products.pop() == (136,)
    assert made(x[:0]).shape == (0, 300) and products.pop() == (0, 136)
    # a draft and the token before it, verified in one pass
    with RowsAlone():
        assert torch.equal(made(x[None, :16])[0], alone[:16])
    assert len(products) == 18


@each_dtype
def test_more_rows_are_pytorchs(dtype, products):
    made = layer(dtype=dtype)
    for shape in ((17, 136), (3, 6, 136), (1, 500, 136)):
        x = randn(3, *shape, dtype=dtype)
        assert torch.equal(made(x), plain(made, x))
    assert not products


@pytest.mark.parametrize(
    "made",
    [lambda: layer(dtype=torch.float64), lambda: layer(columns=140)],
    ids=["another dtype", "columns no multiple of 8"],
)
def test_matrices_that_the_kernel_does_not_take_are_pytorchs(made, products):
    taken = made()
    x = randn(3, 2, taken.in_features, dtype=taken.weight.dtype)
    assert linears.installed(taken) and torch.equal(taken(x), plain(taken, x)) and not products


def test_weights_are_those_of_the_moment(products):
    made, x = layer(), randn(3, 1, 136)
    before = made(x)
    made.weight.mul_(2)
    made.bias.mul_(2)
    assert torch.equal(made(x), 2 * before)
    made.weight.data = made.weight.data / 4
    made.bias = nn.Parameter(made.bias / 4, requires_grad=False)
    assert torch.equal(made(x), before / 2)
    made.load_state_dict({"weight": torch.zeros(300, 136), "bias": torch.ones(300)})
    assert made(x).eq(1).all()
    made.bias = None
    assert made(x).eq(0).all()
    made.weight = nn.Parameter(torch.ones(1000, 136, dtype=torch.bfloat16), requires_grad=False)
    assert made(torch.ones(2, 136, dtype=torch.bfloat16)).eq(136).all()
    assert len(products) == 6
    assert made.half()(x.half()).dtype == torch.float16 and len(products) == 7
    assert made.double()(x.double()).dtype == torch.float64 and len(products) == 7
    made.weight = nn.Parameter(torch.ones(136, 300).T, requires_grad=False)
    assert torch.equal(made(x), plain(made, x)) and len(products) == 7


@pytest.mark.parametrize("learns", ["x", "weight", "bias"])
def test_gradients_are_pytorchs(learns, products):
    made, x = layer(), randn(3, 2, 136)
    leaf = x if learns == "x" else getattr(made, learns)
    leaf.requires_grad_(True)
    (ours,) = torch.autograd.grad(made(x).square().sum(), leaf)
    (theirs,) = torch.autograd.grad(plain(made, x).square().sum(), leaf)
    assert torch.equal(ours, theirs) and not products
    with torch.no_grad():
        made(x)
    with torch.inference_mode():
        made(x)
    assert len(products) == 2
    leaf.requires_grad_(False)
    assert not made(x).requires_grad and len(products) == 3


@pytest.mark.parametrize("lower", FLOATS[1:], ids=str)
def test_autocast_is_pytorchs(lower, products):
    made, x = layer(), randn(3, 2, 136)
    with torch.autocast("cpu", lower):
        found = made(x)
        assert found.dtype == lower and torch.equal(found, plain(made, x))
        with torch.autocast("cpu", enabled=False):
            assert not products and made(x).dtype == torch.float32 and len(products) == 1


def test_tensors_without_memory_are_pytorchs(products):
    made, x = layer(), randn(3, 2, 136)
    # what these hold is nowhere: a kernel would read address 0
    assert torch.equal(made(TwoTensor(x, -x)).b, plain(made, -x))
    with FakeTensorMode(allow_non_fake_inputs=True) as fake:
        assert made(fake.from_tensor(x)).shape == (2, 300)
    assert made.to("meta")(x.to("meta")).shape == (2, 300)
    made = layer()
    made.weight = nn.Parameter(TwoTensor(made.weight.data, -made.weight.data), requires_grad=False)
    assert torch.equal(made(x).b, functional.linear(x, -layer().weight, made.bias))
    assert not products


def test_inputs_that_do_not_fit_are_an_error():
    for x in (torch.ones(1, 128), torch.ones(17, 128), torch.tensor(1.0), torch.ones(1, 136, dtype=torch.bfloat16)):
        with pytest.raises((RuntimeError, ValueError)):
            layer()(x)


# --- compiled


def test_a_traced_step_multiplies_by_the_op():
    model = enable(tiny.build("llama", **LARGE), tiny.BITING)
    step, ids = TracedStep(model), torch.zeros(1, 1, dtype=torch.int64)
    with torch.no_grad():
        targets = [str(node.target) for node in torch.export.export(step, (ids, ids), strict=False).graph.nodes]
    assert sum("sparse_attention_decoder.multiply" in target for target in targets) == LARGE_LAYERS + 1
    # k_proj and v_proj
    assert sum("aten.linear" in target for target in targets) == 2 * 2


def test_a_compiled_step_is_the_eager_one_and_another_without_our_layers(monkeypatch, tmp_path):
    monkeypatch.setenv("SPARSE_ATTENTION_DECODER_CACHE", str(tmp_path))
    model, ids = enable(tiny.build("llama", **LARGE), tiny.BITING), tiny.prompt(1, 40)[0]
    turns = [(ids[:20], ids[20:])]
    expected, _ = tiny.replay(model, tiny.BITING, turns)
    compiled.install(model)
    found, _ = tiny.replay(model, tiny.BITING, turns)
    torch.testing.assert_close(found, expected, rtol=0, atol=2e-5)
    # where the kernels are gone the op has none
    step, names = TracedStep(model), []
    for backend in ("auto", "reference"):
        enable(model, AttentionConfig(backend=backend))
        names.append(aot._identity(step, {}, aot._Form(1)))
    assert names[0] != names[1]


@pytest.mark.parametrize("learns", [False, True])
def test_under_torch_compile_gradients_are_kept_and_the_op_is_used_without(learns):
    torch.compiler.reset()
    made, x, targets = layer(), randn(3, 2, 136), []
    made.bias.requires_grad_(learns)

    def backend(graph: torch.fx.GraphModule, _: list[Tensor]) -> torch.fx.GraphModule:
        targets.extend(str(node.target) for node in graph.graph.nodes if node.op == "call_function")
        return graph

    found = torch.compile(made, fullgraph=True, backend=backend)(x)
    assert torch.equal(found, made(x)) and found.requires_grad == learns
    assert any("multiply" in target for target in targets) != learns
