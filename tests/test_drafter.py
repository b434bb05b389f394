"""A drafter in int4: the tokens are those of dense decoding whatever it guesses, and the model stays as it was."""

import copy
import gc
import weakref
from dataclasses import replace

import pytest
import tiny
import torch
from torch.nn import functional

from sparse_attention_decoder import AttentionConfig, Lossless, SparseAttention, SparseCache
from sparse_attention_decoder.errors import ConfigError, UnsupportedError
from sparse_attention_decoder.models import compiled, linears, weights
from sparse_attention_decoder.models.drafter import _drafters, drafter_of, is_smaller
from sparse_attention_decoder.models.packing import packed_copy
from sparse_attention_decoder.models.verifying import RowsAlone

pytestmark = pytest.mark.usefixtures("kept_steps")

# with the same budget, for within it PyTorch attends
DENSE = replace(tiny.BITING, policy="dense")
GREEDY = {"do_sample": False, "max_new_tokens": 40, "min_new_tokens": 40}
SAMPLED = {**GREEDY, "do_sample": True, "temperature": 0.7}
# matrices of 64 KiB and more, in 16 bits too
LARGE = {"hidden_size": 256, "intermediate_size": 512, "num_attention_heads": 8, "num_key_value_heads": 4}


def generated(decoder, ids, **options):
    torch.manual_seed(3)
    return decoder.generate(ids, attention_mask=torch.ones_like(ids), **options)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("options", [GREEDY, SAMPLED], ids=["greedy", "sampled"])
def test_ids_are_those_of_dense_decoding_whatever_the_drafter_guesses(dtype, options):
    drafting, plain = (SparseAttention(config, tiny.build("llama", dtype)) for config in (tiny.BITING, DENSE))
    ids, lossless = tiny.prompt(1, 50), Lossless(4, "int4")
    assert torch.equal(generated(drafting, ids, lossless=lossless, **options), generated(plain, ids, **options))
    assert lossless.drafted > 0 and lossless.accepted > 0


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_products_of_our_own_are_verified_bit_for_bit(dtype):
    drafting, plain = (SparseAttention(config, tiny.build("llama", dtype, **LARGE)) for config in (tiny.BITING, DENSE))
    assert linears.installed(drafting.model)
    ids, caches = tiny.prompt(1, 50), []
    outputs = []
    for decoder, lossless in ((drafting, Lossless(5)), (plain, False)):
        caches.append(SparseCache(decoder.model.config, decoder.config))
        outputs.append(generated(decoder, ids, past_key_values=caches[-1], lossless=lossless, **GREEDY))
    assert torch.equal(*outputs)
    for ours, theirs in zip(*(cache.sparse_layers for cache in caches), strict=True):
        assert torch.equal(ours.state.buffer.keys, theirs.state.buffer.keys)
        assert torch.equal(ours.state.buffer.values, theirs.state.buffer.values)


def test_rows_are_taken_apart_where_something_needs_it_alone():
    """A function mode costs as much as a small model: it goes where nothing called what it takes over."""
    x, weight = torch.randn(3, 8), torch.randn(5, 8)
    with RowsAlone() as apart:
        torch.add(x, 1)
        assert apart.count == 0
        functional.linear(x, weight)
    assert apart.count == 1
    entered = []
    for sizes in ({}, LARGE):
        decoder = SparseAttention(tiny.BITING, tiny.build("llama", vocab_size=512, **sizes))
        original, passes = RowsAlone.__enter__, []
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(RowsAlone, "__enter__", lambda mode, own=original, seen=passes: seen.append(1) or own(mode))
            generated(decoder, tiny.prompt(1, 50) % 128, lossless=Lossless(3), **GREEDY)
        entered.append(len(passes))
    assert entered[0] > 5 and entered[1] == 1


def test_a_drafter_drafts_where_steps_are_dense_and_the_model_does_not():
    ids, counts = tiny.prompt(1, 50), {}
    for form in ("own", "int4"):
        # all of it is read anyway
        decoder = SparseAttention(AttentionConfig(dense_below=1000), tiny.build("llama"))
        counts[form] = Lossless(3, form)
        generated(decoder, ids, lossless=counts[form], **GREEDY)
    assert counts["own"].drafted == 0 < counts["int4"].drafted


def test_it_is_taken_by_itself_where_steps_run_compiled():
    decoder, ids = SparseAttention(tiny.BITING, tiny.build("llama")), tiny.prompt(1, 50)
    steps = []
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("sparse_attention_decoder.models.lossless.drafter_of", lambda model: steps.append(model) or model)
        generated(decoder, ids, lossless=Lossless(2), **GREEDY)
        assert not steps
        generated(decoder, ids, lossless=Lossless(2), compile=True, **GREEDY)
        assert steps == [decoder.model]
        generated(decoder, ids, lossless=Lossless(2, "own"), **GREEDY)
        assert len(steps) == 1


def test_a_packed_copy_is_what_casting_a_copy_gives_and_the_model_stays():
    for family in ("llama", "gpt2", "qwen3"):
        model = tiny.build(family)
        before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
        twin, other = packed_copy(model, "int4"), weights.cast(copy.deepcopy(model), "int4")
        assert all(torch.equal(tensor, before[name]) for name, tensor in model.state_dict().items())
        ids = tiny.prompt(1, 20)
        with torch.no_grad():
            assert torch.equal(twin(ids).logits, other(ids).logits)
        shared = {tensor.data_ptr() for tensor in twin.state_dict().values()}
        assert not shared & {tensor.data_ptr() for tensor in model.state_dict().values()}


def test_it_is_made_once_and_goes_with_its_model():
    decoder = SparseAttention(tiny.BITING, tiny.build("llama"))
    names, model = set(decoder.state_dict()), weakref.ref(decoder.model)
    kept = drafter_of(decoder.model)
    assert drafter_of(decoder.model) is kept and compiled.is_installed(kept)
    assert set(decoder.state_dict()) == names
    assert drafter_of(copy.deepcopy(decoder.model)) is not kept
    del decoder
    gc.collect()
    # its drafter goes with it, or it would stay: the table holds both or none
    assert model() is None and kept not in list(_drafters.values())


def test_what_cannot_be_packed_is_refused_by_name():
    with pytest.raises(ConfigError, match='weights is \'int8\'; expected "own" or "int4"'):
        Lossless(weights="int8")
    decoder = SparseAttention(tiny.BITING, tiny.build("llama"), weights="int8")
    assert not is_smaller(decoder.model)
    with pytest.raises(UnsupportedError, match='use "own"'):
        generated(decoder, tiny.prompt(1, 50), lossless=Lossless(2, "int4"), **GREEDY)
