"""Policies that throw tokens away: against slow definitions, head by head, and through the tiny model."""

import copy
from dataclasses import replace

import pytest
import tiny
import torch
from cases import attention_over, chosen_sets, layer_with, left_padded, near_and_middle, randn, real_tokens
from tiny import BITING, greedy
from torch import Tensor

from sparse_attention_decoder import AttentionConfig, SparseAttention, SparseCache, enable
from sparse_attention_decoder.attention import Decoded, LayerState, decode_step
from sparse_attention_decoder.cache import Witness, witness
from sparse_attention_decoder.cache.witness import OBSERVED
from sparse_attention_decoder.errors import ConfigError, UnsupportedError
from sparse_attention_decoder.policies import resolve
from sparse_attention_decoder.policies.snapkv import POOL
from sparse_attention_decoder.selection import Rows
from sparse_attention_decoder.tables import POLICIES

EVICTING = [name for name in POLICIES if resolve(name).evicts]
WITNESSED = ["snapkv", "h2o"]
SCALING, SINKS, WINDOW, TOP_K = 0.25, 2, 6, 8
DENSE = AttentionConfig(policy="dense")
# 60 tokens of a prompt and 20 that follow: whole, or padded on the left, between turns, or behind a row that is done
BETWEEN = torch.cat([left_padded(30, 20, 30), left_padded(50, 45, 41)], 1)
BEHIND = torch.ones(3, 80, dtype=torch.bool)
BEHIND[1, 60:70], BEHIND[2, 12:68] = False, False
MASKS = {"whole": left_padded(80, 80), "left": left_padded(80, 61, 33), "between": BETWEEN, "behind": BEHIND}

pytestmark = pytest.mark.usefixtures("poison")


def states(batch: int, tokens: int = 80, seed: int = 0) -> tuple[Tensor, Tensor, Tensor]:
    """Queries of 4 heads, keys and values of 2, in float64."""
    return (
        2 * randn(seed, batch, 4, tokens, 8, dtype=torch.float64),
        randn(seed + 1, batch, 2, tokens, 8, dtype=torch.float64),
        randn(seed + 2, batch, 2, tokens, 8, dtype=torch.float64),
    )


class Run:
    """A layer under a policy, fed from given queries, keys and values as a model would feed it."""

    def __init__(self, policy: str, mask: Tensor, seed: int = 0, **settings: object) -> None:
        self.inputs, self.mask = states(len(mask), mask.shape[1], seed), mask
        config = {"top_k": TOP_K, "attention_window": WINDOW, "sink_tokens": SINKS, "dense_below": 0}
        self.layer = LayerState(AttentionConfig(policy=policy, **{**config, **settings}))

    def rows(self) -> Rows:
        return Rows.from_mask(self.mask[:, : self.layer.buffer.length])

    def read(self, *chunks: int) -> "Run":
        """Densely, so many tokens at once."""
        for size in chunks:
            now = slice(self.layer.buffer.length, self.layer.buffer.length + size)
            self.layer.buffer.append(*(states[:, :, now] for states in self.inputs[1:]))
            self.layer.see(self.inputs[0][:, :, now], self.rows(), SCALING)
        return self

    def decode(self) -> Decoded:
        at = self.layer.buffer.length
        self.layer.buffer.append(*(states[:, :, at : at + 1] for states in self.inputs[1:]))
        return decode_step(self.inputs[0][:, :, at], self.layer, self.rows(), SCALING)


def weights(run: Run, row: int, real: list[int]) -> Tensor:
    """[Hkv, G, n, n] by definition: what each real token's query pays to each real token up to itself."""
    queries, keys = (states[row][:, real] for states in run.inputs[:2])
    logits = SCALING * queries.unflatten(0, (2, 2)) @ keys.transpose(-1, -2).unsqueeze(1)
    future = torch.ones(len(real), len(real), dtype=torch.bool).triu(1)
    return logits.masked_fill(future, -torch.inf).softmax(-1)


def snapkv_kept(run: Run, row: int, length: int, rivals: list[set[int]], top_k: int = TOP_K) -> list[set[int]]:
    """By definition: what the end of a prompt of `length` positions leaves of each head's rivals in the middle."""
    real = [token for token in real_tokens(Rows.from_mask(run.mask))[row] if token < length]
    _, middle = near_and_middle(real, SINKS, WINDOW)
    paid = weights(run, row, real)[:, :, -OBSERVED:].sum(2)
    kept = []
    for head in range(2):
        score = {}
        for rank, token in enumerate(middle):
            neighbours = middle[max(0, rank - POOL // 2) : rank + POOL // 2 + 1]
            columns = [real.index(neighbour) for neighbour in neighbours]
            score[token] = float(paid[head][:, columns].amax(-1).mean())
        own = sorted(rivals[head] & set(middle), key=lambda token: -score[token])
        kept.append(set(own[:top_k]))
    return kept


# --- snapkv


@pytest.mark.parametrize("mask", MASKS.values(), ids=MASKS)
@pytest.mark.parametrize("chunks", [(60,), (20, 33, 7)], ids=str)
def test_snapkv_keeps_what_the_end_of_the_prompt_attended_to_and_all_that_comes_after(mask, chunks):
    run = Run("snapkv", mask).read(*chunks)
    everything = [set(range(60))] * 2
    kept = [snapkv_kept(run, row, 60, everything) for row in range(len(mask))]
    for _ in range(20):
        chosen = chosen_sets(run.decode().selection)
        for row, real in enumerate(real_tokens(run.rows())):
            middle = near_and_middle(real, SINKS, WINDOW)[1]
            at_the_end = near_and_middle([token for token in real if token < 60], SINKS, WINDOW)[1]
            for head in range(2):
                assert chosen[row][head] == kept[row][head] | set(middle) - set(at_the_end)
                assert len(kept[row][head]) == min(TOP_K, len(at_the_end))
    assert run.layer.reads.index_bytes == 0


@pytest.mark.parametrize("top_k", [51, 52, 53, 1000])
def test_snapkv_with_a_budget_at_the_length_of_the_middle_keeps_all_of_it(top_k):
    run = Run("snapkv", MASKS["whole"], top_k=top_k).read(60)
    for length in range(61, 80):
        decoded = run.decode()
        if length <= SINKS + WINDOW + top_k:
            assert decoded.selection is None
        else:
            lost = 52 - min(52, top_k)
            assert decoded.selection.counts.unique().tolist() == [length - SINKS - WINDOW - lost]


def test_snapkv_chooses_anew_after_a_second_turn_from_what_is_left():
    run = Run("snapkv", MASKS["left"]).read(40)
    first = [snapkv_kept(run, row, 40, [set(range(40))] * 2) for row in range(3)]
    run.decode()
    run.read(19)
    chosen = chosen_sets(run.decode().selection)
    for row, real in enumerate(real_tokens(Rows.from_mask(run.mask[:, :40]))):
        evicted = [set(near_and_middle(real, SINKS, WINDOW)[1]) - kept for kept in first[row]]
        rivals = [set(range(60)) - gone for gone in evicted]
        # the turn is shorter than the observation window: only its own queries choose
        queries_of_the_turn = 19
        with pytest.MonkeyPatch.context() as patch:
            patch.setitem(globals(), "OBSERVED", queries_of_the_turn)
            kept = snapkv_kept(run, row, 60, rivals)
        newest = near_and_middle(real_tokens(run.rows())[row], SINKS, WINDOW)[1][-1]
        assert chosen[row] == [own | {newest} for own in kept]


# --- h2o


@pytest.mark.parametrize("mask", MASKS.values(), ids=MASKS)
@pytest.mark.parametrize("chunks", [(60,), (20, 33, 7)], ids=str)
def test_h2o_keeps_the_tokens_that_received_most_attention_so_far(mask, chunks):
    run, kept_tokens = Run("h2o", mask).read(*chunks), 0
    prompts = real_tokens(run.rows())
    scores = [weights(run, row, real).sum(2).mean(1).tolist() for row, real in enumerate(prompts)]
    score = [[dict(zip(prompts[row], own, strict=True)) for own in heads] for row, heads in enumerate(scores)]
    gone: list[list[set[int]]] = [[set(), set()] for _ in prompts]
    for at in range(60, 80):
        decoded = run.decode()
        for row, real in enumerate(real_tokens(run.rows())):
            near, middle = near_and_middle(real, SINKS, WINDOW)
            for head in range(2):
                pool = [token for token in middle if token not in gone[row][head]]
                kept = sorted(pool, key=lambda token: -score[row][head].get(token, 0))[:TOP_K]
                gone[row][head] |= set(pool) - set(kept)
                kept_tokens += len(kept)
                assert chosen_sets(decoded.selection)[row][head] == set(kept)
                read = near + kept
                query = run.inputs[0][row, 2 * head : 2 * head + 2, at]
                paid = (SCALING * query @ run.inputs[1][row, head, read].T).softmax(-1).mean(0)
                for token, share in zip(read, paid.tolist(), strict=True):
                    score[row][head][token] = score[row][head].get(token, 0) + share
    assert run.layer.reads.index_bytes == kept_tokens * 4


def test_h2o_counts_the_steps_that_were_read_densely():
    # the budget is exceeded after ten steps
    run = Run("h2o", MASKS["whole"], top_k=42).read(40)
    dense = [run.decode().selection for _ in range(10)]
    assert dense == [None] * 10
    real = list(range(50))
    score = weights(run, 0, real).sum(2).mean(1)
    middle = near_and_middle(list(range(51)), SINKS, WINDOW)[1]
    chosen = chosen_sets(run.decode().selection)[0]
    for head in range(2):
        lost = min(middle, key=lambda token: float(score[head, token]))
        assert chosen[head] == set(middle) - {lost}


def test_what_h2o_threw_away_stays_away_though_a_second_turn_reads_it_densely():
    run = Run("h2o", MASKS["whole"]).read(40)
    first = chosen_sets(run.decode().selection)
    gone = [set(range(SINKS, 41 - WINDOW)) - kept for kept in first[0]]
    run.read(19)
    for lost, kept in zip(gone, chosen_sets(run.decode().selection)[0], strict=True):
        assert len(kept) == TOP_K
        assert not kept & lost


# --- streaming


def test_streaming_reads_what_window_reads():
    streaming, window = (Run(name, MASKS["left"]).read(60).decode() for name in ("streaming", "window"))
    assert torch.equal(streaming.output, window.output)
    assert (resolve("streaming").evicts, resolve("window").evicts) == (True, False)


@pytest.mark.parametrize("policy", EVICTING)
def test_what_is_evicted_cannot_be_read_densely_below_a_crossover(policy):
    assert Run(policy, MASKS["whole"], dense_below=1000).read(60).decode().selection is not None
    assert Run(policy, MASKS["whole"], dense_below=None).read(60).decode().selection is not None


# --- the witness


@pytest.mark.parametrize("mask", MASKS.values(), ids=MASKS)
@pytest.mark.parametrize("most_logits", [1, 700, 1 << 24])
def test_the_attention_received_is_added_up_exactly_in_blocks_of_any_size(mask, most_logits, monkeypatch):
    monkeypatch.setattr(witness, "_MOST_LOGITS", most_logits)
    run = Run("h2o", mask).read(1, 30, 49)
    received = run.layer.witness.received(80)
    for row, real in enumerate(real_tokens(run.rows())):
        exact = torch.zeros(2, 80, dtype=torch.float64)
        exact[:, real] = weights(run, row, real).sum(2).mean(1)
        assert float((received[row] - exact).abs().max()) < 1e-12


def test_half_precision_is_added_up_in_single():
    queries, keys, _ = (states.bfloat16() for states in states(2))
    seen = Witness(adds_up=True)
    seen.see(queries, keys, Rows.full(2, 80), SCALING)
    exact = Witness(adds_up=True)
    exact.see(queries.double(), keys.double(), Rows.full(2, 80), SCALING)
    assert seen.received(80).dtype == torch.float32
    assert float((seen.received(80) - exact.received(80)).abs().max()) < 1e-5


def test_the_witness_keeps_no_more_than_the_end_of_the_prompt():
    run = Run("snapkv", MASKS["between"]).read(1, 25, 44)
    seen = run.layer.witness.observation
    for row, real in enumerate(real_tokens(run.rows())):
        assert seen.positions[row][seen.real[row]].tolist() == real[-OBSERVED:]
        assert torch.equal(seen.queries[row][:, seen.real[row]], run.inputs[0][row][:, real[-OBSERVED:]])
    assert seen.queries.shape == (3, 4, OBSERVED, 8)
    with pytest.raises(UnsupportedError, match="not added up"):
        run.layer.witness.received(70)


@pytest.mark.parametrize("policy", WITNESSED)
def test_a_layer_whose_rows_were_taken_equals_one_that_held_them_all_along(policy):
    taken, rows = Run(policy, MASKS["left"]).read(60), torch.tensor([2, 0, 0, 1])
    taken.decode()
    taken.layer.take_rows(rows)
    taken.inputs, taken.mask = tuple(states[rows] for states in taken.inputs), taken.mask[rows]
    fresh = Run(policy, MASKS["left"][rows])
    fresh.inputs = taken.inputs
    fresh.read(60).decode()
    for _ in range(10):
        assert torch.equal(taken.decode().output, fresh.decode().output)


@pytest.mark.parametrize("policy", WITNESSED)
def test_a_prompt_read_under_inference_mode_is_decoded_outside_it(policy):
    with torch.inference_mode():
        run = Run(policy, MASKS["left"]).read(60)
        run.decode()
    plain = Run(policy, MASKS["left"]).read(60)
    plain.decode()
    assert torch.equal(run.decode().output, plain.decode().output)


@pytest.mark.parametrize("policy", WITNESSED)
def test_going_back_into_generated_tokens_keeps_what_the_prompt_gave_and_brings_nothing_back(policy):
    run = Run(policy, MASKS["whole"]).read(60)
    before = copy.deepcopy(run.layer.witness)
    kept = chosen_sets(run.decode().selection)[0]
    run.layer.truncate(60)
    if policy == "h2o":
        # this step's share has been added to the sums and cannot be told from the rest
        with pytest.raises(UnsupportedError, match="not added up"):
            run.decode()
    else:
        assert torch.equal(run.layer.witness.observation.queries, before.observation.queries)
        assert chosen_sets(run.decode().selection)[0] == kept


def test_going_back_into_the_prompt_leaves_the_queries_that_are_still_there():
    run = Run("snapkv", MASKS["left"]).read(60)
    run.layer.truncate(50)
    seen = run.layer.witness.observation
    assert seen.rows.counts == tuple(int(count) for count in run.mask[:, :50].sum(-1))
    assert int(seen.real[0].sum()) == OBSERVED - 10
    assert run.decode().selection is not None
    # every query that was kept is gone
    run.layer.truncate(28)
    with pytest.raises(UnsupportedError, match="were not seen"):
        run.decode()
    run.layer.truncate(0)
    again, fresh = run.read(60).decode(), Run("snapkv", MASKS["left"]).read(60).decode()
    assert torch.equal(again.output, fresh.output)


@pytest.mark.parametrize("policy", WITNESSED)
def test_a_prompt_that_nobody_saw_is_refused_with_the_way_out(policy):
    _, keys, values = states(1)
    layer = layer_with(keys, values, policy="dense")
    other = LayerState(replace(layer.config, policy=policy))
    other.buffer.append(keys, values)
    with pytest.raises(UnsupportedError, match=r"SparseCache.watch\(\[its name\]\)"):
        decode_step(keys[:, :, -1], other, Rows.full(1, 80), SCALING)


def test_h2o_refuses_a_prompt_of_which_a_part_was_missed():
    run = Run("h2o", MASKS["whole"]).read(20)
    seen, run.layer.witness = run.layer.witness, None
    run.read(20)
    run.layer.witness = seen
    run.read(20)
    with pytest.raises(UnsupportedError, match="not added up"):
        run.decode()


# --- through the model


def biting(policy: str) -> AttentionConfig:
    return replace(BITING, policy=policy)


def decode_all(model: torch.nn.Module, cache: SparseCache, ids: Tensor) -> Tensor:
    """Logits [n, V] of one row's ids [n], fed one by one."""
    with torch.no_grad():
        return torch.cat([model(token[None], past_key_values=cache).logits[0] for token in ids.split(1)])


@pytest.mark.parametrize("policy", EVICTING)
def test_one_watched_prefill_serves_every_policy(policy):
    ids, model = tiny.prompt(1, 80)[0], enable(tiny.build(), DENSE)
    with torch.no_grad():
        own = SparseCache(model.config, biting(policy))
        model(ids[None, :60], past_key_values=own)
        shared = SparseCache(model.config, DENSE)
        shared.watch(POLICIES)
        model(ids[None, :60], past_key_values=shared)
    expected = decode_all(model, own, ids[60:])
    # each leaves the cache to the next as it was
    for name in ("dense", "h2o", policy, "snapkv", policy):
        cache = shared.reconfigured(DENSE if name == "dense" else biting(name))
        found = decode_all(model, cache, ids[60:])
        shared.crop(60 - shared.get_seq_length())
        if name == policy:
            assert torch.equal(found, expected)


@pytest.mark.parametrize("policy", WITNESSED)
def test_an_unwatched_prefill_serves_no_policy_that_chooses_by_it(policy):
    ids, model = tiny.prompt(1, 60), enable(tiny.build(), DENSE)
    with torch.no_grad():
        cache = model(ids).past_key_values
        with pytest.raises(UnsupportedError, match="watch"):
            model(ids[:, :1], past_key_values=cache.reconfigured(biting(policy)))


def test_watching_costs_only_what_is_asked_for():
    model = enable(tiny.build(), DENSE)
    cache = SparseCache(model.config, DENSE)
    cache.watch(["sketch", "window"])
    assert [layer.state.witness for layer in cache.sparse_layers] == [None, None]
    cache.watch(["snapkv"])
    assert [layer.state.witness.adds_up for layer in cache.sparse_layers] == [False, False]
    cache.watch(["h2o"])
    assert [layer.state.witness.adds_up for layer in cache.sparse_layers] == [True, True]
    with pytest.raises(ConfigError, match="snap"):
        cache.watch(["snap"])


@pytest.mark.parametrize("policy", WITNESSED)
@pytest.mark.parametrize("sizes", [(59,), (30, 29), (57, 2), (28, 2, 29)], ids=str)
def test_a_prompt_read_in_chunks_is_chosen_from_as_one_read_at_once(policy, sizes):
    rows = [tiny.prompt(1, 59, seed=1)[0], tiny.prompt(1, 41, seed=2)[0]]
    model = enable(tiny.build(dtype=torch.float64), biting(policy))
    padded, mask = tiny.left_pad(rows)
    mask = torch.cat([mask, torch.ones(2, 8, dtype=mask.dtype)], 1)
    cache = SparseCache(model.config, biting(policy))
    done = 0
    with torch.no_grad():
        for size in sizes:
            chunk, done = padded[:, done : done + size], done + size
            model(chunk, attention_mask=mask[:, :done], past_key_values=cache)
        steps = [
            model(padded[:, at : at + 1], attention_mask=mask[:, : 60 + at], past_key_values=cache).logits[:, 0]
            for at in range(8)
        ]
        for row, own in enumerate(rows):
            alone = SparseCache(model.config, biting(policy))
            model(own[None], past_key_values=alone)
            logits = decode_all(model, alone, padded[row, :8])
            assert float((torch.stack(steps)[:, row] - logits).abs().max() / logits.abs().max()) < 1e-6
    assert cache.reads.sparse_steps == 2 * 8


@pytest.mark.parametrize("policy", EVICTING)
def test_beams_and_a_prompt_of_one_token_generate(policy):
    model = enable(tiny.build(), biting(policy))
    assert greedy(model, tiny.prompt(2, 40), num_beams=3).sequences.shape == (2, 48)
    reads = greedy(model, tiny.prompt(2, 1), 30).past_key_values.reads
    # of a prompt within the budget SnapKV has nothing to throw away
    assert (reads.tokens_read == reads.tokens_cached) is (policy == "snapkv")


@pytest.mark.parametrize("policy", WITNESSED)
def test_prefill_and_the_rest_of_the_prompt_equal_the_prompt(policy):
    ids = tiny.prompt(1, 70)
    model = SparseAttention(biting(policy), tiny.build())
    with torch.no_grad():
        whole, parts = model.prefill(ids), model.prefill(ids[:, :-2])
        model(ids[:, -2:], past_key_values=parts)
        found, expected = (decode_all(model, cache, ids[0, :9]) for cache in (parts, whole))
    assert float((found - expected).abs().max() / expected.abs().max()) < 1e-4


def test_a_custom_mask_is_not_taken_for_a_prompt_that_was_seen():
    model = enable(tiny.build(), biting("snapkv"))
    mask = torch.zeros(1, 1, 40, 40).masked_fill(torch.ones(40, 40, dtype=torch.bool).triu(1), -1e9)
    with torch.no_grad():
        cache = SparseCache(model.config, biting("snapkv"))
        model(tiny.prompt(1, 40), attention_mask=mask, past_key_values=cache)
        with pytest.raises(UnsupportedError, match="were not seen"):
            model(tiny.prompt(1, 1), past_key_values=cache)


def test_the_output_is_attention_over_the_tokens_left():
    run = Run("h2o", MASKS["left"]).read(60)
    for _ in range(3):
        decoded = run.decode()
    near = [set(near_and_middle(real, SINKS, WINDOW)[0]) for real in real_tokens(run.rows())]
    read = [[near[row] | kept for kept in heads] for row, heads in enumerate(chosen_sets(decoded.selection))]
    keys, values = run.layer.buffer.keys, run.layer.buffer.values
    exact, _ = attention_over(run.inputs[0][:, :, 62], keys, values, read, SCALING)
    assert float((decoded.output - exact).abs().max()) < 1e-12
