"""The compiled decode step: the tokens, logits and reads of the eager one, at every length, from disk the next time."""

import logging
from dataclasses import replace

import pytest
import tiny
import torch
from test_decoder import tokenizer

from sparse_attention_decoder import AttentionConfig, SparseAttention, SparseCache, disable, enable
from sparse_attention_decoder.errors import BackendError, CacheDirectoryError, UnsupportedError
from sparse_attention_decoder.kernels.cpu import NAMESPACE
from sparse_attention_decoder.measure.compare import side_by_side
from sparse_attention_decoder.models import aot, compiled, weights
from sparse_attention_decoder.models.step import running_on

pytestmark = pytest.mark.usefixtures("kept_steps")

# dense at first, sparse from 40 tokens on
TURNING = AttentionConfig(dense_below=40, sink_tokens=2, attention_window=4, top_k=5, threshold=None)


def decoded(model, config, ids, read):
    """Logits of the tokens of ids [B, T] from `read` on, one by one, and the cache they leave."""
    cache, logits = SparseCache(model.config, config), []
    with torch.no_grad():
        model(ids[:, :read], past_key_values=cache)
        for at in range(read, ids.shape[1]):
            logits.append(model(ids[:, at : at + 1], past_key_values=cache).logits[:, -1])
    return torch.stack(logits, 1), cache


@pytest.mark.parametrize("rows", [1, 2])
@pytest.mark.parametrize("config", [tiny.FULL, tiny.FORCED, tiny.BITING, TURNING], ids=["full", "all", "some", "turn"])
def test_a_compiled_step_is_the_eager_step(config, rows):
    model, ids = enable(tiny.build("llama"), config), tiny.prompt(rows, 60)
    expected, eager = decoded(model, config, ids, 25)
    compiled.install(model)
    found, cache = decoded(model, config, ids, 25)
    torch.testing.assert_close(found, expected, rtol=0, atol=2e-5)
    ours, theirs = vars(cache.reads), vars(eager.reads)
    assert ours.pop("missing_mass") == pytest.approx(theirs.pop("missing_mass"), rel=1e-4, abs=1e-5)
    assert ours == theirs and cache.get_seq_length() == 60


@pytest.mark.parametrize("form", ["int8", "int4"])
@pytest.mark.parametrize("kv_dtype", [None, "int8"])
def test_packed_weights_and_packed_keys_are_compiled(form, kv_dtype):
    # every token is chosen: which of two close ones is better may turn on a rounding to bfloat16
    config, ids = replace(tiny.FORCED, kv_dtype=kv_dtype), tiny.prompt(1, 60)
    model = enable(weights.cast(tiny.build("llama"), form), config)
    expected, eager = decoded(model, config, ids, 25)
    compiled.install(model)
    found, cache = decoded(model, config, ids, 25)
    # fused, fewer numbers are rounded in between
    assert (found - expected).norm() < 0.05 * expected.norm()
    assert cache.reads.sparse_steps == eager.reads.sparse_steps > 0


def test_a_cap_holds_under_compiled_steps():
    config = replace(tiny.BITING, max_cache_tokens=32)
    model, ids = enable(tiny.build("llama"), config), tiny.prompt(1, 90)
    expected, eager = decoded(model, config, ids, 20)
    compiled.install(model)
    found, cache = decoded(model, config, ids, 20)
    torch.testing.assert_close(found, expected, rtol=0, atol=2e-5)
    assert cache.held == eager.held and cache.held.tokens_evicted > 0 and cache.get_seq_length() == 90


def test_the_step_runs_compiled_and_prompts_do_not(monkeypatch):
    model, calls = enable(tiny.build("llama"), tiny.BITING), []
    compiled.install(model)
    for layer in model.model.layers:
        layer.register_forward_hook(lambda *_: calls.append(1))
    decoded(model, tiny.BITING, tiny.prompt(1, 40), 30)
    assert len(calls) == 2  # of the prompt, one a layer; no module of transformers ran in the ten steps


def test_generate_goes_through_the_compiled_step():
    model, ids = enable(tiny.build("llama"), tiny.BITING), tiny.prompt(1, 30)
    expected = tiny.greedy(model, ids, 12)
    compiled.install(model)
    found = tiny.greedy(model, ids, 12)
    assert torch.equal(found.sequences, expected.sequences)
    assert found.past_key_values.reads.steps == expected.past_key_values.reads.steps


def test_the_decoder_compiles_when_told_to(monkeypatch):
    ids, options = tiny.prompt(1, 30), {"max_new_tokens": 8, "do_sample": False}
    expected = SparseAttention(tiny.BITING, tiny.build("llama")).generate(ids, **options)
    for model, asked in (
        (SparseAttention(tiny.BITING, tiny.build("llama"), compile=True), {}),
        (SparseAttention(tiny.BITING, tiny.build("llama")), {"compile": True}),
    ):
        assert torch.equal(model.generate(ids, **options, **asked), expected)
        assert hasattr(model.model, compiled._STATE)


def test_a_comparison_runs_both_of_our_sides_compiled_and_transformers_as_it_is(monkeypatch):
    ids, run = tiny.prompt(1, 30), []
    expected = side_by_side(SparseAttention(tiny.BITING, tiny.build("llama")), ids, 20)
    model = SparseAttention(tiny.BITING, tiny.build("llama"), compile=True)
    monkeypatch.setattr(compiled, "running_on", lambda cache: (run.append(cache.config.policy), running_on(cache))[1])
    layers = []
    model.model.model.layers[0].register_forward_hook(lambda *_: layers.append(1))
    found = side_by_side(model, ids, 20)
    assert [side.ids for side in found.sides] == [side.ids for side in expected.sides]
    assert [side.share_read for side in found.sides] == [side.share_read for side in expected.sides]
    assert sorted(run) == ["dense"] * 20 + ["sketch"] * 20
    # the prompt's and each of transformers' steps
    assert len(layers) == 1 + 20
    assert hasattr(model.model, compiled._STATE)


def test_another_config_needs_no_other_step(monkeypatch):
    model = enable(tiny.build("llama"), tiny.BITING)
    compiled.install(model)
    monkeypatch.setattr(aot, "_compile", None)
    enable(model, TURNING)
    assert decoded(model, TURNING, tiny.prompt(1, 50), 20)[1].reads.sparse_steps > 0


def test_the_next_start_compiles_nothing(monkeypatch):
    compiled.install(enable(tiny.build("llama"), tiny.BITING))
    monkeypatch.setattr(aot, "_compile", None)
    other = enable(tiny.build("llama", seed=1), tiny.BITING)
    expected, _ = decoded(other, tiny.BITING, tiny.prompt(1, 40), 30)
    compiled.install(other)
    # the weights are this model's, not those it was compiled beside
    torch.testing.assert_close(decoded(other, tiny.BITING, tiny.prompt(1, 40), 30)[0], expected, rtol=0, atol=2e-5)


def test_a_damaged_step_is_compiled_again(steps, caplog):
    model = enable(tiny.build("llama"), tiny.BITING)
    compiled.install(model)
    disable(model)
    for kept in (steps / "steps").glob("*.pt2"):
        kept.write_bytes(kept.read_bytes()[:-1] + b"?")
    with caplog.at_level(logging.INFO):
        compiled.install(enable(model, tiny.BITING))
    assert "compiling the decode step" in caplog.text
    decoded(model, tiny.BITING, tiny.prompt(1, 40), 30)


def test_disable_leaves_nothing():
    model = tiny.build("llama")
    before = tiny.trace(model)
    compiled.install(enable(model, tiny.BITING))
    disable(model)
    assert tiny.trace(model) == before


@pytest.mark.parametrize(
    ("options", "said"),
    [
        ({"attention_mask": torch.tensor([[0, *[1] * 20]])}, "padded"),
        ({"output_hidden_states": True}, "output_hidden_states"),
        ({"return_dict": False}, "tuple"),
    ],
)
def test_what_is_not_compiled_runs_eagerly_and_says_so(options, said, caplog):
    model, ids = enable(tiny.build("llama"), tiny.FULL), tiny.prompt(1, 21)
    outputs = []
    for compiles in (False, True):
        cache = SparseCache(model.config, tiny.FULL)
        if compiles:
            compiled.install(model)
            compiled._say_once.cache_clear()
        with torch.no_grad():
            model(ids[:, :20], past_key_values=cache)
            outputs.append(model(ids[:, 20:], past_key_values=cache, **options)[0])
    assert torch.equal(*outputs)
    assert said in caplog.text


def test_gradients_are_kept(caplog):
    model, ids = enable(tiny.build("llama"), tiny.FULL), tiny.prompt(1, 21)
    compiled.install(model)
    compiled._say_once.cache_clear()
    cache = SparseCache(model.config, tiny.FULL)
    model(ids[:, :20], past_key_values=cache)
    assert model(ids[:, 20:], past_key_values=cache).logits.requires_grad
    assert "autograd" in caplog.text


def test_models_with_other_layers_are_refused():
    with pytest.raises(UnsupportedError, match="full attention"):
        compiled.install(enable(tiny.build("gemma3_text"), tiny.BITING))


@pytest.mark.parametrize("family", ["deepseek_v3", "diffllama"])
def test_attention_that_does_not_find_the_cache_is_refused(family):
    with pytest.raises(UnsupportedError, match="0 of 2 layers"):
        compiled.install(enable(tiny.build(family), tiny.BITING))


@pytest.mark.parametrize("family", ["qwen2", "gpt2", "mixtral"])
def test_other_families_compile(family):
    model, ids = enable(tiny.build(family), tiny.BITING), tiny.prompt(1, 40)
    expected, _ = decoded(model, tiny.BITING, ids, 30)
    compiled.install(model)
    torch.testing.assert_close(decoded(model, tiny.BITING, ids, 30)[0], expected, rtol=0, atol=2e-5)


def test_without_a_compiler_the_reason_is_said(monkeypatch, tmp_path):
    monkeypatch.setenv("SPARSE_ATTENTION_DECODER_CACHE", str(tmp_path))
    monkeypatch.setattr(compiled.torch._inductor, "aoti_compile_and_package", _no_compiler)
    model = enable(tiny.build("llama"), tiny.BITING)
    with pytest.raises(BackendError, match="No working C\\+\\+ compiler"):
        compiled.install(model)
    assert not hasattr(model, compiled._STATE) and not list((tmp_path / "steps").iterdir())


def _no_compiler(*_: object, **__: object) -> str:
    raise RuntimeError("No working C++ compiler found in torch._inductor.config.cpp.cxx")


def test_a_place_that_cannot_be_written_is_named(monkeypatch, tmp_path):
    (tmp_path / "steps").write_text("a file, where the folder should be")
    monkeypatch.setenv("SPARSE_ATTENTION_DECODER_CACHE", str(tmp_path))
    with pytest.raises(CacheDirectoryError, match="compiled step"):
        compiled.install(enable(tiny.build("llama"), tiny.BITING))


def test_the_op_passes_pytorchs_checks():
    query, key = torch.randn(1, 4, 1, 16), torch.randn(1, 2, 1, 16)
    op = getattr(torch.ops, NAMESPACE).decode.default
    assert op(*(x.to("meta") for x in (query, key, key)), 0, 1.0).shape == (1, 1, 4, 16)


def test_a_trace_is_that_of_the_eager_step():
    text = "a tiny text that is longer than its budget of tokens"
    decoder = SparseAttention(tiny.BITING, tiny.build("llama"), tokenizer())
    expected = decoder.trace(text, chat=False)
    compiled.install(decoder.model)
    forward = decoder.model.forward
    found = decoder.trace(text, chat=False)
    assert found.tokens == expected.tokens and len(found.heads) == len(expected.heads) > 0
    for ours, theirs in zip(found.heads, expected.heads, strict=True):
        assert torch.equal(ours.positions, theirs.positions) and torch.equal(ours.weights, theirs.weights)
    assert decoder.model.forward is forward
