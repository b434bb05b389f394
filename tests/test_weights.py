"""Weights in int8 and int4: what the layers compute, how a model gets there from memory and files, and refusals."""

import copy
import logging
import os
import subprocess
import sys
from pathlib import Path

import gguf
import numpy as np
import pytest
import tiny
import torch
from gguf import GGMLQuantizationType as Kind
from hypothesis import given
from hypothesis import strategies as st
from torch import nn
from torch.nn import functional

from sparse_attention_decoder import SparseAttention, enable
from sparse_attention_decoder.errors import ConfigError, ModelLoadError, NonFiniteError, UnsupportedError
from sparse_attention_decoder.models import gguf_file, loading, packed, packing
from sparse_attention_decoder.models.packed import GROUP, MANY_ROWS, Int4Linear, Int8Embedding, Int8Linear, Packed
from sparse_attention_decoder.models.weights import cast

LAYERS = {"int8": Int8Linear, "int4": Int4Linear}
WIDTH, VOCABULARY = 64, 48
forms = pytest.mark.parametrize("form", LAYERS)


@pytest.fixture(autouse=True)
def cache(tmp_path, monkeypatch) -> Path:
    monkeypatch.setenv("SPARSE_ATTENTION_DECODER_CACHE", str(tmp_path / "cache"))
    return tmp_path / "cache"


def layer(
    form: str, rows: int, columns: int, bias: torch.Tensor | None = None, seed: int = 0
) -> tuple[Packed, torch.Tensor]:
    """A filled layer and the weight it was filled with."""
    weight = torch.randn(rows, columns, generator=torch.Generator().manual_seed(seed))
    made = LAYERS[form](rows, columns, bias)
    for start in range(0, rows, packed.ROWS_AT_ONCE):
        made.fill(start, weight[start : start + packed.ROWS_AT_ONCE])
    return made, weight


def state(model: nn.Module) -> dict[str, torch.Tensor]:
    return dict(model.state_dict())


def same(one: nn.Module, other: nn.Module) -> bool:
    first, second = state(one), state(other)
    return first.keys() == second.keys() and all(torch.equal(first[name], second[name]) for name in first)


# --- the layers


@forms
@pytest.mark.parametrize("rows", [1, 3, MANY_ROWS - 1, MANY_ROWS, 100])
@pytest.mark.parametrize(("outputs", "inputs"), [(16, 32), (80, 96), (192, 64)])
@pytest.mark.parametrize("has_bias", [False, True])
def test_a_product_is_as_exact_as_that_of_a_bfloat16_linear_with_the_same_weights(
    form, rows, outputs, inputs, has_bias
):
    bias = torch.randn(outputs).bfloat16() if has_bias else None
    made, _ = layer(form, outputs, inputs, bias)
    x = torch.randn(2, rows, inputs).bfloat16()[:1]
    weight = made.dequantised()
    exact = functional.linear(x.double(), weight.double(), None if bias is None else bias.double())
    plain = functional.linear(x, weight.bfloat16(), bias)
    ours = made(x)
    assert ours.shape == exact.shape and ours.dtype == torch.bfloat16
    assert (ours - exact).norm() <= 2 * (plain - exact).norm()


@forms
@given(seed=st.integers(0, 1000), size=st.sampled_from([1e-3, 1.0, 1e4]))
def test_no_weight_is_further_from_its_code_than_half_a_step(form, seed, size):
    made, weight = layer(form, 32, 64, seed=seed)
    made.fill(0, weight * size)
    step = made.scales[:, None] if form == "int8" else made.scales[..., 0].T.repeat_interleave(GROUP, 1)
    # scales are rounded to bfloat16, by up to a part in 256: the ends of the range are cut off by as much
    slack = 15 / 256 if form == "int4" else 127 / 256
    assert ((made.dequantised() - weight * size).abs() <= step.float() * (0.5 + slack)).all()


@forms
def test_rows_of_zeros_and_constants_are_kept(form):
    made, _ = layer(form, 16, 32)
    weight = torch.arange(16.0)[:, None].expand(16, 32)
    made.fill(0, weight)
    assert torch.allclose(made.dequantised(), weight, rtol=1 / 128, atol=0)


@pytest.mark.parametrize("shape", [(16, 32), (64, 32), (80, 64), (112, 32), (192, 96)])
def test_unpacked_codes_are_those_that_were_packed(shape):
    codes = torch.randint(0, 16, shape, dtype=torch.int32)
    assert torch.equal(packed._unpack(packed._pack(codes)), codes.T)


@pytest.mark.parametrize("capability", ["default", "avx2"])
def test_the_layout_is_known_on_lesser_instruction_sets(capability):
    code = "from sparse_attention_decoder.models import packed; packed._require_known_layout(); print('known')"
    environment = {**os.environ, "ATEN_CPU_CAPABILITY": capability}
    run = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, env=environment, check=False)
    assert run.stdout == "known\n", run.stderr


def test_an_unknown_layout_is_refused(monkeypatch):
    monkeypatch.setattr(packed, "_unpack", lambda codes: torch.zeros(0))
    packed._require_known_layout.cache_clear()
    with pytest.raises(UnsupportedError, match="unknown layout; use weights='int8'"):
        Int4Linear(16, 32)
    monkeypatch.undo()
    Int4Linear(16, 32)


@forms
def test_other_activations_and_gradients_are_refused(form):
    made, _ = layer(form, 16, 32)
    with pytest.raises(UnsupportedError, match=f"{form} take bfloat16 activations, got torch.float32"):
        made(torch.zeros(1, 32))
    x = torch.zeros(1, 32, dtype=torch.bfloat16, requires_grad=True)
    with pytest.raises(UnsupportedError, match="no gradients"):
        made(x)
    with torch.no_grad():
        made(x)


@forms
def test_a_compiler_sees_one_packed_product(form):
    made, _ = layer(form, 16, 32)
    graph = torch.export.export(made, (torch.zeros(1, 1, 32, dtype=torch.bfloat16),)).graph
    calls = [node.target.name() for node in graph.nodes if node.op == "call_function"]
    assert sum("pack" in name for name in calls) == 1
    assert {name for name in calls if "pack" not in name} <= {"aten::reshape", "aten::view"}


# --- groups of a GGUF


@pytest.mark.parametrize("kind", [Kind.Q4_0, Kind.Q4_1, Kind.Q4_K])
def test_groups_of_a_gguf_are_taken_over_as_they_are(kind):
    size, nbytes = gguf.GGML_QUANT_SIZES[kind]
    random = np.random.default_rng(0)
    blocks = random.integers(0, 256, (4, 2 * nbytes), dtype=np.uint8)
    # the halves that are scales and minima: finite numbers
    for start in range(0, 2 * nbytes, nbytes):
        blocks[:, start : start + 4].view(np.float16)[:] = random.uniform(0.01, 0.1, (4, 2))
        if kind == Kind.Q4_0:
            blocks[:, start + 2 : start + 4] = random.integers(0, 256, (4, 2))
    weight = gguf_file.GgufWeight(blocks, kind, lambda: None)
    codes, scale, zero = weight.groups(1, 4)
    ours = ((codes - 8) * scale[..., None] + zero[..., None]).flatten(1)
    assert codes.shape == (3, 2 * size // GROUP, GROUP) and int(codes.max()) == 15 and int(codes.min()) == 0
    torch.testing.assert_close(ours, weight.rows(1, 4), rtol=0, atol=1e-5)


# --- a model in memory

FAMILIES = {
    "llama": {},
    "tied": {"tie_word_embeddings": True},
    "qwen2": {},
    "gpt2": {},
    "gemma3_text": {},
    "qwen3_moe": {},
}


def build(name: str, **options) -> torch.nn.Module:
    return tiny.build("llama" if name == "tied" else name, **{**FAMILIES[name], **options})


@forms
@pytest.mark.parametrize("family", FAMILIES)
def test_a_packed_model_is_the_bfloat16_model_with_the_weights_it_stands_for(family, form):
    model = build(family)
    plain = cast(build(family), "bf16")
    assert cast(model, form) is model
    for name, module in model.named_modules():
        if isinstance(module, Packed):
            weight = module.dequantised().bfloat16()
            old = plain.get_submodule(name)
            old.weight = nn.Parameter(weight if isinstance(old, nn.Linear) else weight.T.contiguous())
        if isinstance(module, Int8Embedding):
            head = model.get_output_embeddings()
            plain.set_input_embeddings(nn.Embedding(*head.codes.shape, _weight=head.dequantised().bfloat16()))
    left = [name for name, module in model.named_modules() if type(module) is nn.Linear]
    assert not left and not any(parameter.requires_grad for parameter in model.parameters())
    ids = tiny.prompt(2, 20)
    with torch.no_grad():
        ours, theirs = model(ids).logits.float(), plain(ids).logits.float()
        exact = plain.float()(ids).logits
    assert (ours - exact).norm() <= 2 * (theirs - exact).norm() + 1e-6


@forms
def test_a_tied_embedding_and_its_head_are_one_copy(form):
    model = cast(build("tied"), form)
    embedding, head = model.get_input_embeddings(), model.get_output_embeddings()
    assert isinstance(embedding, Int8Embedding) and isinstance(head, Int8Linear)
    assert embedding.codes is head.codes and embedding.scales is head.scales
    ids = torch.tensor([[0, 5, tiny.VOCABULARY - 1]])
    assert torch.equal(embedding(ids), head.dequantised().bfloat16()[ids])


@forms
def test_frequencies_stay_float32_and_are_those_of_a_model_that_was_never_packed(form):
    model, before = build("llama"), dict(build("llama").named_buffers())
    cast(model, form)
    for name, buffer in before.items():
        assert torch.equal(model.get_buffer(name), buffer) and buffer.dtype == torch.float32


def test_a_shape_that_a_form_does_not_take_is_kept_finer_and_told_once(caplog):
    model = build("llama", intermediate_size=40, vocab_size=100)
    cast(model, "int4")
    kinds = {name.rsplit(".", 1)[-1]: type(module) for name, module in model.named_modules()}
    assert kinds["q_proj"] is Int4Linear
    # 40 rows are no multiple of 16, 40 columns none of 16 either
    assert kinds["up_proj"] is Int8Linear and kinds["down_proj"] is nn.Linear and kinds["lm_head"] is Int8Linear
    (record,) = caplog.records
    assert record.levelno == logging.WARNING and "down_proj [64, 40]" in record.getMessage()
    model(tiny.prompt(1, 5) % 100)


@forms
def test_a_damaged_scale_is_a_damaged_model(form):
    model = cast(build("llama"), form)
    model.get_submodule("model.layers.1.mlp.up_proj").scales[0] = torch.nan
    with pytest.raises(NonFiniteError, match=r"up_proj\.scales"):
        enable(model)


@forms
def test_a_damaged_weight_is_still_seen_when_it_is_packed(form):
    model = build("llama")
    model.get_submodule("model.layers.1.mlp.up_proj").weight.data[3, 5] = torch.inf
    with pytest.raises(NonFiniteError, match=r"up_proj\.scales"):
        SparseAttention(model=model, weights=form)


@pytest.mark.parametrize("form", ["int8", "int4", "bf16", "float32"])
def test_a_decoder_generates_with_every_form(form):
    decoder = SparseAttention(tiny.FORCED, build("tied"), weights=form)
    assert decoder.generate(tiny.prompt(1, 30), max_new_tokens=5, do_sample=False).shape == (1, 35)
    assert decoder.model.dtype == (torch.float32 if form == "float32" else torch.bfloat16)


# --- a model in files


def write_gguf(path: Path, kind: Kind, without: str = "") -> Path:
    """A llama of one layer, its matrices in blocks of this kind, q and k permuted as llama.cpp does."""
    writer = gguf.GGUFWriter(str(path), "llama")
    writer.add_name("tiny")
    writer.add_context_length(64)
    writer.add_embedding_length(WIDTH)
    writer.add_block_count(1)
    writer.add_feed_forward_length(2 * WIDTH)
    writer.add_head_count(2)
    writer.add_head_count_kv(1)
    writer.add_layer_norm_rms_eps(1e-5)
    writer.add_vocab_size(VOCABULARY)
    writer.add_tokenizer_model("gpt2")
    writer.add_token_list(["t", "1", "t1", *(f"u{number}" for number in range(3, VOCABULARY))])
    writer.add_token_types([1] * VOCABULARY)
    writer.add_token_merges(["t 1"])
    random = np.random.default_rng(0)
    shapes = {"attn_q": (64, 64), "attn_k": (32, 64), "attn_v": (32, 64), "attn_output": (64, 64)}
    shapes |= {"ffn_gate": (128, 64), "ffn_up": (128, 64), "ffn_down": (64, 128)}
    shapes = {f"blk.0.{name}.weight": shape for name, shape in shapes.items()}
    for name, shape in {"token_embd.weight": (VOCABULARY, WIDTH), **shapes}.items():
        if name != without:
            blocks = gguf.quants.quantize(random.standard_normal(shape).astype(np.float32), kind)
            writer.add_tensor(name, blocks, raw_dtype=kind)
    for name in ("output_norm", "blk.0.attn_norm", "blk.0.ffn_norm"):
        writer.add_tensor(f"{name}.weight", random.uniform(0.5, 1.5, WIDTH).astype(np.float32))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


@forms
@pytest.mark.parametrize("kind", [Kind.Q4_0, Kind.Q4_1, Kind.Q8_0, Kind.F16], ids=lambda kind: kind.name)
def test_a_gguf_packed_a_matrix_at_a_time_is_what_its_float_weights_would_give(tmp_path, form, kind):
    file = write_gguf(tmp_path / "tiny.gguf", kind)
    ours, tokenizer = loading.load(file, weights=form)
    exact, _ = loading.load(file)
    theirs = cast(copy.deepcopy(exact), form)
    assert len(tokenizer) >= VOCABULARY and not ours.training
    assert state(ours).keys() == state(theirs).keys()
    if form == "int8" or kind in (Kind.Q8_0, Kind.F16):
        assert same(ours, theirs)
        return
    for name, module in ours.named_modules():
        if isinstance(module, Int4Linear):
            # taken over, not quantised again: only scale and offset are rounded to bfloat16
            step = module.scales[..., 0].abs().T.repeat_interleave(GROUP, 1)
            assert ((module.dequantised() - exact.get_submodule(name).weight).abs() <= step / 16).all(), name


@forms
@pytest.mark.parametrize("shards", [False, True])
@pytest.mark.parametrize("family", FAMILIES)
def test_a_directory_packed_a_matrix_at_a_time_is_the_model_packed_in_memory(tmp_path, family, form, shards):
    build(family).save_pretrained(tmp_path / "model", max_shard_size="40KB" if shards else "1GB")
    stages = []
    ours, tokenizer = loading.load(tmp_path / "model", weights=form, on_stage=stages.append)
    theirs = cast(build(family), form)
    assert tokenizer is None and not ours.training
    if any("in memory" in stage for stage in stages):
        # merged while it is loaded, in bfloat16: what is packed was rounded before
        assert family == "qwen3_moe"
        theirs = cast(build(family, dtype=torch.bfloat16), form)
    assert same(ours, theirs)
    ids = tiny.prompt(1, 9)
    # not bit for bit: mapped memory is aligned otherwise, and a product may be summed in another order
    torch.testing.assert_close(ours(ids).logits, theirs(ids).logits, rtol=0.05, atol=0.02)


@forms
def test_what_is_packed_is_kept_and_other_forms_are_kept_apart(tmp_path, cache, form, monkeypatch):
    build("llama").save_pretrained(tmp_path / "model")
    first, _ = loading.load(tmp_path / "model", weights=form)
    stages = []
    monkeypatch.setattr(packing, "_write", None)
    second, _ = loading.load(tmp_path / "model", weights=form, on_stage=stages.append)
    assert same(first, second) and stages == ["loading weights"]
    monkeypatch.undo()
    monkeypatch.setenv("SPARSE_ATTENTION_DECODER_CACHE", str(cache))
    (kept,) = (cache / "models").iterdir()
    loading.load(tmp_path / "model", weights=next(iter(LAYERS.keys() - {form})))
    assert len(list((cache / "models").iterdir())) == 2
    before = copy.deepcopy(first)
    with (kept / "packed.safetensors").open("r+b") as file:
        file.seek(-1, 2)
        file.write(b"\x77")
    assert same(loading.load(tmp_path / "model", weights=form)[0], before)
    build("llama", seed=1).save_pretrained(tmp_path / "model")
    assert not same(loading.load(tmp_path / "model", weights=form)[0], before)


def test_int4_is_packed_again_for_another_instruction_set(tmp_path, cache, monkeypatch):
    build("llama").save_pretrained(tmp_path / "model")
    for form in LAYERS:
        loading.load(tmp_path / "model", weights=form)
    monkeypatch.setattr(torch.backends.cpu, "get_cpu_capability", lambda: "OTHER")
    monkeypatch.setattr(packing, "_write", lambda path, *rest: (_ for _ in ()).throw(InterruptedError))
    loading.load(tmp_path / "model", weights="int8")
    with pytest.raises(OSError, match="cannot keep"):
        loading.load(tmp_path / "model", weights="int4")


@pytest.mark.parametrize("form", ["int8", "float32"])
def test_missing_and_wrong_weights_are_named(tmp_path, form):
    file = write_gguf(tmp_path / "tiny.gguf", Kind.F16, without="blk.0.ffn_up.weight")
    with pytest.raises(ModelLoadError, match=r"lacks 1 of the model's weights, such as model.layers.0.mlp.up_proj"):
        loading.load(file, weights=form)
    model = build("llama")
    model.save_pretrained(tmp_path / "model")
    model.config.intermediate_size = 32
    model.config.save_pretrained(tmp_path / "model")
    with pytest.raises(ModelLoadError, match=r"size|shape|the checkpoint does not fit its config"):
        loading.load(tmp_path / "model", weights=form)


def test_forms_and_arguments_that_do_not_go_together_are_refused(tmp_path):
    build("llama").save_pretrained(tmp_path / "model")
    with pytest.raises(ConfigError, match="weights is 'int3'; expected one of float32, bf16, int8, int4"):
        loading.load(tmp_path / "model", weights="int3")
    with pytest.raises(ConfigError, match="contradict"):
        loading.load(tmp_path / "model", weights="bf16", dtype=torch.float32)
    with pytest.raises(ConfigError, match=r"go with dtype=torch.bfloat16, got torch.float32"):
        loading.load(tmp_path / "model", weights="int8", dtype=torch.float32)
    with pytest.raises(ConfigError, match="cannot be loaded with quantization_config"):
        loading.load(tmp_path / "model", weights="int8", quantization_config={})
    with pytest.raises(UnsupportedError, match=r"kernels for the CPU, and this model is on cuda; use weights='bf16'"):
        loading.load(tmp_path / "model", weights="int4", device_map="cuda")
    with pytest.raises(UnsupportedError, match="this model is on meta"):
        cast(build("llama").to("meta"), "int8")
    model, _ = loading.load(tmp_path / "model", weights="bf16")
    assert model.dtype == torch.bfloat16


def test_a_checkpoint_that_is_quantised_already_is_refused(tmp_path):
    model = build("llama")
    model.config.quantization_config = {"quant_method": "awq"}
    model.config.save_pretrained(tmp_path / "model")
    del model.config.quantization_config
    config = (tmp_path / "model" / "config.json").read_text()
    model.save_pretrained(tmp_path / "model")
    (tmp_path / "model" / "config.json").write_text(config)
    with pytest.raises(UnsupportedError, match="quantised already"):
        loading.load(tmp_path / "model", weights="int8")


PEAK = """
import sys
from pathlib import Path
from sparse_attention_decoder.models.loading import load
def resident(name):
    (line,) = (line for line in Path("/proc/self/status").read_text().splitlines() if line.startswith(name))
    return int(line.split()[1]) * 1024
Path("/proc/self/clear_refs").write_text("5")
before = resident("VmRSS:")
model, _ = load(weights=sys.argv[1])
size = sum({tensor.data_ptr(): tensor.nbytes for tensor in model.state_dict().values()}.values())
print((resident("VmHWM:") - before) / size)
"""


@forms
@pytest.mark.real_model
@pytest.mark.skipif(not Path("/proc/self/clear_refs").exists(), reason="needs Linux to say what is resident")
def test_packing_takes_little_more_memory_than_what_is_packed(form):
    told = subprocess.run([sys.executable, "-c", PEAK, form], stdout=subprocess.PIPE, text=True, check=True).stdout
    assert float(told) < 1.3
