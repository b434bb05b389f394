"""What verifies a draft, compiled: several tokens at once get the bits that compiled steps give each of them."""

import logging
from dataclasses import replace

import pytest
import tiny
import torch

from sparse_attention_decoder import AttentionConfig, Lossless, SparseAttention, SparseCache, enable
from sparse_attention_decoder.kernels.cpu import NAMESPACE
from sparse_attention_decoder.models import aot, compiled, weights
from sparse_attention_decoder.models.step import running_on
from sparse_attention_decoder.models.verifying import MOST_VERIFIED, reading_all

pytestmark = pytest.mark.usefixtures("kept_steps", "compiled_library")

GREEDY = {"do_sample": False, "max_new_tokens": 40, "min_new_tokens": 40}
SAMPLED = {**GREEDY, "do_sample": True, "temperature": 0.7}
# every matrix 64 KiB and more, in 16 bits too
LARGE = {"hidden_size": 256, "intermediate_size": 512, "num_attention_heads": 8, "num_key_value_heads": 4}
DENSE = replace(tiny.BITING, policy="dense")
FORMS = ("float32", "bf16", "int8", "int4")


def large(form="float32", family="llama"):
    dtype = torch.float32 if form == "float32" else torch.bfloat16
    model = tiny.build(family, dtype, vocab_size=512, **LARGE)
    return model if form in ("float32", "bf16") else weights.cast(model, form)


def generated(decoder, ids, **options):
    torch.manual_seed(3)
    return decoder.generate(ids, attention_mask=torch.ones_like(ids), **options)


@pytest.mark.parametrize(("family", "form"), [*(("llama", form) for form in FORMS), ("qwen2", "float32")])
def test_several_tokens_get_the_bits_that_each_gets_alone(family, form):
    model = enable(large(form, family), tiny.BITING)
    steps, ids = aot.Steps(model, print), tiny.prompt(1, 60 + MOST_VERIFIED)
    several = steps.verifying()
    assert several is not None
    # within the budget, across its end, and far beyond
    for past in (0, 5, 60):
        for count in (2, 3, 7, MOST_VERIFIED):
            results = []
            for sizes, run in ((1, steps.of(1)), (count, several)):
                cache = SparseCache(model.config, tiny.BITING)
                with torch.no_grad():
                    if past:
                        model(ids[:, :past], past_key_values=cache)
                    new, at = ids[:, past : past + count].split(sizes, 1), torch.arange(past, past + count)[None]
                    with reading_all(cache), running_on(cache):
                        logits = [run(*pair) for pair in zip(new, at.split(sizes, 1), strict=True)]
                results.append([torch.cat(logits, 1), *(x for layer in cache.sparse_layers for x in layer.plain())])
            assert all(torch.equal(*pair) for pair in zip(*results, strict=True))


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("options", [GREEDY, SAMPLED], ids=["greedy", "sampled"])
def test_lossless_ids_are_those_of_compiled_dense_decoding(form, options):
    drafting, plain = (SparseAttention(config, large(form), compile=True) for config in (tiny.BITING, DENSE))
    ids, caches, outputs, lossless = tiny.prompt(1, 50), [], [], Lossless(4)
    for decoder, way in ((drafting, lossless), (plain, False)):
        caches.append(SparseCache(decoder.model.config, decoder.config))
        outputs.append(generated(decoder, ids, past_key_values=caches[-1], lossless=way, **options))
    assert torch.equal(*outputs) and lossless.accepted > 0 and lossless.passes < lossless.tokens
    for ours, theirs in zip(*(cache.sparse_layers for cache in caches), strict=True):
        assert torch.equal(ours.state.buffer.keys, theirs.state.buffer.keys)
        assert torch.equal(ours.state.buffer.values, theirs.state.buffer.values)


def test_passes_run_compiled():
    decoder, layers = SparseAttention(tiny.BITING, large(), compile=True), []
    decoder.model.model.layers[0].register_forward_hook(lambda *_: layers.append(1))
    generated(decoder, tiny.prompt(1, 50), lossless=Lossless(4, "own"), **GREEDY)
    # the prompt's
    assert len(layers) == 1


def test_where_bits_differ_dense_steps_and_passes_run_eager_and_it_is_said(monkeypatch, caplog):
    ids = tiny.prompt(1, 50)
    expected = generated(SparseAttention(DENSE, large()), ids, **GREEDY)
    monkeypatch.setattr(aot, "_agree", lambda *_: False)
    decoder, layers, lossless = SparseAttention(tiny.BITING, large(), compile=True), [], Lossless(4, "own")
    decoder.model.model.layers[0].register_forward_hook(lambda *_: layers.append(1))
    with caplog.at_level(logging.WARNING):
        found = generated(decoder, ids, lossless=lossless, **GREEDY)
    assert torch.equal(found, expected) and "not what each is alone" in caplog.text
    assert len(layers) == 1 + lossless.passes


def test_what_does_not_compile_runs_eager_and_the_reason_is_said(monkeypatch, caplog):
    decoder, ids = SparseAttention(tiny.BITING, large(), compile=True), tiny.prompt(1, 50)

    def no_compiler(*_, **__):
        raise RuntimeError("No working C++ compiler found")

    monkeypatch.setattr(aot, "_is_whole", lambda place: False)
    monkeypatch.setattr(torch._inductor, "aoti_compile_and_package", no_compiler)
    with caplog.at_level(logging.WARNING):
        found = generated(decoder, ids, lossless=Lossless(4, "own"), **GREEDY)
    assert "No working C++ compiler" in caplog.text
    assert torch.equal(found, generated(SparseAttention(DENSE, large()), ids, **GREEDY))


def test_a_difference_is_found(monkeypatch):
    """The trial that decides: one bit of one logit, or of one key, is enough."""
    model = enable(large(), tiny.BITING)
    steps = aot.Steps(model, print)
    step, several = steps.of(1), steps.verifying()
    assert aot._agree(model, step, several)

    def off(ids, positions):
        logits = several(ids, positions)
        logits[0, -1, 7] += 1e-5
        return logits

    assert not aot._agree(model, step, off)
    assert not aot._agree(model, step, lambda ids, positions: several(ids, positions + 1))
    # in passes of one length alone
    assert not aot._agree(model, step, lambda *pass_: (off if pass_[0].shape[1] == 3 else several)(*pass_))


def test_a_prompt_and_a_batch_are_no_pass():
    model = enable(large(), AttentionConfig())
    compiled.install(model)
    layers = []
    model.model.layers[0].register_forward_hook(lambda *_: layers.append(1))
    for rows, count, whole in ((1, MOST_VERIFIED + 1, True), (1, 5, False), (2, 5, True)):
        cache = SparseCache(model.config, AttentionConfig())
        with torch.no_grad():
            model(tiny.prompt(rows, 20), past_key_values=cache)
            if whole:
                with reading_all(cache):
                    model(tiny.prompt(rows, count), past_key_values=cache)
            else:
                model(tiny.prompt(rows, count), past_key_values=cache)
    assert len(layers) == 6


def test_the_op_passes_pytorchs_checks():
    query, key = torch.randn(1, 4, 3, 16), torch.randn(1, 2, 3, 16)
    op = getattr(torch.ops, NAMESPACE).verify.default
    assert op(*(x.to("meta") for x in (query, key, key)), 0, 1.0).shape == (1, 3, 4, 16)
