"""The cache whose length the device counts: the same tokens as the cache that grows, eager, compiled and padded.

In Triton's interpreter a step of a layer takes a quarter of a second, so models here are small and contexts short, and
the cache that grows has the reference kernels.
"""

from dataclasses import replace

import pytest
import tiny
import torch
from torch import Tensor
from transformers import PreTrainedModel

from sparse_attention_decoder import AttentionConfig, SparseAttention, SparseCache, StaticSparseCache, enable
from sparse_attention_decoder.cache.static import StaticTokens
from sparse_attention_decoder.errors import (
    BackendError,
    ConfigError,
    NonFiniteError,
    ShapeError,
    UnsupportedError,
)
from sparse_attention_decoder.models import reading

pytest.importorskip("triton", reason="needs triton, which there is on Linux alone")

BITING = AttentionConfig(dense_below=0, sink_tokens=2, attention_window=4, top_k=5, threshold=None, backend="triton")
# dense for some steps, sparse from then on
TURNING = AttentionConfig(dense_below=28, sink_tokens=2, attention_window=4, top_k=3, threshold=1e-2, backend="triton")
DENSE = AttentionConfig(policy="dense", backend="triton")
CAPACITY = 64


@pytest.fixture(autouse=True)
def _fresh_compiler():
    yield
    torch._dynamo.reset()


def assert_same_generation(model: PreTrainedModel, config: AttentionConfig, ids: Tensor, **options: object) -> None:
    """Tokens, logits and what was read are those of the cache that grows."""
    enable(model, config)
    cache = StaticSparseCache(model.config, config, CAPACITY)
    grown = SparseCache(model.config, replace(config, backend="reference"))
    expected = tiny.greedy(model, ids, 5, past_key_values=grown, **options)
    found = tiny.greedy(model, ids, 5, past_key_values=cache, **options)
    assert torch.equal(found.sequences, expected.sequences)
    for ours, theirs in zip(found.logits, expected.logits, strict=True):
        torch.testing.assert_close(ours, theirs, rtol=0, atol=2e-6)
    ours, theirs = vars(cache.reads), vars(grown.reads)
    assert ours.pop("missing_mass") == pytest.approx(theirs.pop("missing_mass"), rel=1e-3, abs=1e-3)
    if "attention_mask" in options:
        # the cache that grows scores every row of a batch of which one is read sparsely
        del ours["sparse_steps"], theirs["sparse_steps"], ours["index_bytes"], theirs["index_bytes"]
    assert ours == theirs


@pytest.mark.parametrize("config", [BITING, TURNING, DENSE], ids=["biting", "turning", "dense"])
def test_the_tokens_are_those_of_the_cache_that_grows(config):
    assert_same_generation(tiny.build("llama"), config, tiny.prompt(1, 25))


@pytest.mark.parametrize("family", ["qwen3", "gemma3_text"])
def test_other_families_too_and_layers_of_their_own_keep_their_own_cache(family):
    assert_same_generation(tiny.build(family), BITING, tiny.prompt(1, 25))


def test_rows_padded_on_the_left_are_decoded_as_they_are_alone():
    ids, mask = tiny.left_pad([tiny.prompt(1, 25)[0], tiny.prompt(1, 18, 1)[0]])
    assert_same_generation(tiny.build("llama", num_hidden_layers=1), TURNING, ids, attention_mask=mask)


def compiled_and_eager(backend: str, steps: int) -> tuple[list[Tensor], list[Tensor], StaticSparseCache]:
    """Logits of decode steps, compiled whole and not, each on a cache of its own; and the compiled one's."""
    model = enable(tiny.build("llama"), TURNING)
    eager, whole = (StaticSparseCache(model.config, TURNING, CAPACITY) for _ in range(2))
    ids, results = tiny.prompt(1, 26), ([], [])
    with torch.no_grad():
        token = model(ids, past_key_values=eager).logits[:, -1:].argmax(-1)
        model(ids, past_key_values=whole)
        compiled = torch.compile(model.__call__, backend=backend, fullgraph=True)
        for _ in range(steps):
            results[0].append(compiled(token, past_key_values=whole).logits)
            results[1].append(model(token, past_key_values=eager).logits)
            token = results[1][-1].argmax(-1)
    return *results, whole


# importing inductor warns of what it does itself
@pytest.mark.filterwarnings("ignore:.*script_method.*:DeprecationWarning")
@pytest.mark.parametrize("backend", ["eager", "inductor"])
def test_a_decode_step_is_one_graph_whatever_the_length(backend):
    before = torch._dynamo.utils.counters["stats"]["unique_graphs"]
    compiled, eager, cache = compiled_and_eager(backend, 3)
    assert torch._dynamo.utils.counters["stats"]["unique_graphs"] == before + 1
    # positions, appends and reads in the right order: a compiler that counts twice is off by far
    for ours, theirs in zip(compiled, eager, strict=True):
        torch.testing.assert_close(ours, theirs, rtol=0, atol=2e-6)
    assert 0 < cache.reads.sparse_steps < cache.reads.steps == 6


def test_a_second_turn_goes_on_where_the_first_ended():
    model = enable(tiny.build("llama", num_hidden_layers=1), BITING)
    caches = (
        SparseCache(model.config, replace(BITING, backend="reference")),
        StaticSparseCache(model.config, BITING, CAPACITY),
    )
    logits: list[list[Tensor]] = [[], []]
    with torch.no_grad():
        for cache, found in zip(caches, logits, strict=True):
            for piece in (tiny.prompt(1, 20), tiny.prompt(1, 1, 1), tiny.prompt(1, 9, 2), tiny.prompt(1, 1, 3)):
                found.append(model(piece, past_key_values=cache).logits)
    for grown, static in zip(*logits, strict=True):
        torch.testing.assert_close(static, grown, rtol=0, atol=2e-6)


def test_a_token_beyond_the_capacity_has_an_output_that_nobody_takes_for_one():
    model = enable(tiny.build("llama", num_hidden_layers=1), BITING)
    cache = StaticSparseCache(model.config, BITING, 12)
    with torch.no_grad():
        model(tiny.prompt(1, 11), past_key_values=cache)
        assert model(tiny.prompt(1, 1, 1), past_key_values=cache).logits.isfinite().all()
        held = cache.layers[0].keys.clone()
        assert model(tiny.prompt(1, 1, 2), past_key_values=cache).logits.isnan().all()
        assert torch.equal(cache.layers[0].keys, held)
        with pytest.raises(ShapeError, match="14 tokens do not fit a static cache of 12"):
            model(tiny.prompt(1, 2), past_key_values=cache)


def test_a_reset_cache_is_as_new():
    model = enable(tiny.build("llama", num_hidden_layers=1), BITING)
    cache, ids = StaticSparseCache(model.config, BITING, CAPACITY), tiny.prompt(1, 20)
    first = tiny.greedy(model, ids, 3, past_key_values=cache)
    addresses = [layer.keys.data_ptr() for layer in cache.layers]
    cache.reset()
    assert (cache.get_seq_length(), cache.reads.steps) == (0, 0)
    again = tiny.greedy(model, ids, 3, past_key_values=cache)
    assert torch.equal(first.sequences, again.sequences)
    assert [layer.keys.data_ptr() for layer in cache.layers] == addresses


# --- SparseAttention.generate(compile=True)


@pytest.mark.parametrize("tokens", [3, 4, 25, 34])
def test_generate_with_compile_says_the_same(tokens, monkeypatch):
    # 34: the chunks before the last two tokens end evenly, 25 they do not, 3 and 4: nothing is left to read before
    monkeypatch.setattr(reading, "PREFILL_CHUNK", 16)
    monkeypatch.setattr(reading, "CAPACITY_STEP", CAPACITY)
    model, ids = SparseAttention(BITING, tiny.build("llama", num_hidden_layers=1)), tiny.prompt(1, tokens)
    grown = SparseCache(model.model.config, replace(BITING, backend="reference"))
    options = {"max_new_tokens": 2, "do_sample": False, "attention_mask": torch.ones_like(ids)}
    expected = model.generate(ids, past_key_values=grown, **options)
    assert torch.equal(model.generate(ids, compile=True, **options), expected)


def test_what_compile_cannot_do_is_said():
    model, ids = SparseAttention(BITING, tiny.build("llama")), tiny.prompt(1, 9)
    with pytest.raises(ConfigError, match="max_new_tokens"):
        model.generate(ids, compile=True)
    cache = StaticSparseCache(model.model.config, BITING, CAPACITY)
    with pytest.raises(ConfigError, match="makes the cache itself"):
        model.generate(ids, compile=True, max_new_tokens=2, past_key_values=cache)
    with pytest.raises(ShapeError, match="beams and several answers"):
        model.generate(ids, compile=True, max_new_tokens=2, num_beams=2)
    on_cpu = SparseAttention(AttentionConfig(), tiny.build("llama"))
    static = StaticSparseCache(on_cpu.model.config, AttentionConfig(), CAPACITY)
    with pytest.raises(BackendError, match="a static cache needs triton and a CUDA device"):
        on_cpu.generate(ids, max_new_tokens=2, past_key_values=static)


# --- what it refuses


def test_policies_that_need_the_host_are_refused():
    keys = torch.zeros(1, 2, 1, 16)
    with pytest.raises(ConfigError, match="asks the host at every step"):
        StaticTokens(AttentionConfig(policy="quest", backend="triton"), keys, keys, CAPACITY)


def test_a_mask_with_holes_is_refused():
    model = enable(tiny.build("llama"), BITING)
    mask = torch.ones(1, 9, dtype=torch.long)
    mask[0, 4] = 0
    with pytest.raises(UnsupportedError, match="this mask has holes"):
        model(tiny.prompt(1, 9), attention_mask=mask, past_key_values=StaticSparseCache(model.config, BITING, CAPACITY))


def test_a_mask_of_ones_own_is_kept_to_while_a_prompt_is_read():
    model = enable(tiny.build("llama", num_hidden_layers=1), BITING)
    mask = torch.ones(1, 1, 9, 9, dtype=torch.bool).tril()
    # only the newest token sees the fourth
    mask[..., 4:-1, 3] = False
    caches = SparseCache(model.config, BITING), StaticSparseCache(model.config, BITING, CAPACITY)
    with torch.no_grad():
        grown, static = (model(tiny.prompt(1, 9), attention_mask=mask, past_key_values=c).logits for c in caches)
        causal = model(tiny.prompt(1, 9)).logits
    torch.testing.assert_close(static, grown, rtol=0, atol=2e-6)
    assert not torch.allclose(static[:, 5], causal[:, 5], atol=1e-3)
    with pytest.raises(UnsupportedError, match="takes bool masks"):
        model(
            tiny.prompt(1, 9), attention_mask=mask.float(), past_key_values=StaticSparseCache(model.config, BITING, 16)
        )


def test_keys_that_are_not_finite_are_refused():
    keys = torch.zeros(1, 2, 9, 16)
    tokens = StaticTokens(BITING, keys, keys, CAPACITY)
    keys[0, 1, 3, 5] = torch.nan
    tokens.write(keys, keys)
    with pytest.raises(NonFiniteError, match="NaN or infinity"):
        tokens.code()


def test_a_prompt_in_pieces_is_coded_as_it_is_at_once_and_no_token_twice_between_fits():
    keys = torch.randn(2, 2, 40, 16, generator=torch.Generator().manual_seed(0))
    whole, pieces = (StaticTokens(BITING, keys, keys, CAPACITY) for _ in range(2))
    for tokens in (whole, pieces):
        # the other row begins in the second piece
        tokens.starts.copy_(torch.tensor([0, 35]))
    whole.write(keys, keys)
    whole.code()
    encoded = []
    kernels = pieces._kernels
    plain = kernels.encode
    kernels.encode = lambda new, coded, start: (encoded.append((start, new.shape[2])), plain(new, coded, start))
    # statistics are of the first 33 tokens from 33 to 40, and of none below 8
    for piece in keys.split([33, 5, 2], dim=2):
        pieces.write(piece, piece)
        pieces.code()
    assert encoded == [(0, 33), (33, 5), (38, 2)]
    for ours, theirs in (
        (pieces.coded.codes, whole.coded.codes),
        (pieces.coded.factors, whole.coded.factors),
        (pieces.coded.statistics.mean, whole.coded.statistics.mean),
    ):
        assert torch.equal(ours, theirs)


@pytest.mark.parametrize("what", ["reorder_cache", "offload", "prefetch"])
def test_what_would_move_its_memory_is_refused(what):
    layer = StaticSparseCache(tiny.build("llama").config, BITING, CAPACITY).layers[0]
    with pytest.raises(UnsupportedError, match="the cache that grows"):
        getattr(layer, what)(*([torch.zeros(1)] if what == "reorder_cache" else []))
