import pytest
import torch
from cases import (
    SEEDS,
    assert_error_within,
    attention_over,
    chosen_sets,
    layer_with,
    left_padded,
    masks,
    near_and_middle,
    randn,
    real_tokens,
    true_shares,
)
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from sparse_attention_decoder.attention import Decoded, LayerState, decode_step
from sparse_attention_decoder.policies import Step, resolve
from sparse_attention_decoder.policies.quest import PAGE
from sparse_attention_decoder.selection import Rows
from sparse_attention_decoder.tables import POLICIES

# these read no token of the middle, whatever the budget
NOTHING_BUT_NEAR = ["window", "streaming"]
# what these read depends on when they chose: on the prompt's queries, their order, and on what is thrown away already
BY_HISTORY = [name for name in POLICIES if resolve(name).needs_witness]
BY_QUERY = [name for name in POLICIES if name not in BY_HISTORY]
CHOOSING = [name for name in POLICIES if not resolve(name).reads_everything]
ESTIMATING = ["sketch", "oracle"]
SCALING = 0.25
# what `layer_with` sets
SINKS, WINDOW, TOP_K = 2, 6, 8

pytestmark = pytest.mark.usefixtures("poison")


def tensors(seed: int, batch: int = 2, tokens: int = 100, heads: int = 2, group: int = 3, dim: int = 16):
    """Query, keys and values in float64."""
    return (
        2 * randn(seed, batch, heads * group, dim, dtype=torch.float64),
        randn(seed + 1, batch, heads, tokens, dim, dtype=torch.float64),
        randn(seed + 2, batch, heads, tokens, dim + 4, dtype=torch.float64),
    )


def decode(
    policy: str, query: Tensor, keys: Tensor, values: Tensor, rows: Rows | None = None, **settings: object
) -> tuple[Decoded, LayerState]:
    layer = layer_with(keys, values, rows, policy=policy, **settings)
    return decode_step(query, layer, rows or Rows.full(keys.shape[0], keys.shape[2]), SCALING), layer


def tokens_read(decoded: Decoded, rows: Rows, sinks: int = SINKS, window: int = WINDOW) -> list[list[set[int]]]:
    """By definition: sinks, window and what was chosen, of each row and KV head."""
    near = [set(near_and_middle(real, sinks, window)[0]) for real in real_tokens(rows)]
    return [[own | chosen for chosen in heads] for own, heads in zip(near, chosen_sets(decoded.selection), strict=True)]


# --- laws of every policy


@pytest.mark.parametrize("policy", POLICIES)
@pytest.mark.parametrize("mask", [left_padded(50, 50), left_padded(50, 31)], ids=["whole", "padded"])
def test_a_budget_of_the_whole_context_is_dense_attention_bit_for_bit(policy, mask):
    (query, keys, values), rows = tensors(0, tokens=50), Rows.from_mask(mask)
    whole = {"attention_window": 50} if policy in NOTHING_BUT_NEAR else {"top_k": 50}
    decoded, _ = decode(policy, query, keys, values, rows, **whole)
    exact, _ = attention_over(query, keys, values, [[set(real)] * 2 for real in real_tokens(rows)], SCALING)
    assert_error_within(decoded.output, exact, 1e-12)
    assert torch.equal(decoded.output, decode("dense", query, keys, values, rows)[0].output)
    assert decoded.selection is None


@pytest.mark.parametrize("policy", POLICIES)
def test_a_top_k_beyond_the_context_reads_everything(policy):
    query, keys, values = tensors(0)
    decoded, layer = decode(policy, query, keys, values, top_k=10**9)
    if policy in NOTHING_BUT_NEAR:
        assert layer.reads.tokens_read == 2 * 2 * (SINKS + WINDOW)
    else:
        assert torch.equal(decoded.output, decode("dense", query, keys, values)[0].output)
        assert layer.reads.tokens_read == layer.reads.tokens_cached


# each reads less than its budget allows for, so none takes the dense path
@pytest.mark.parametrize(
    ("policy", "settings"),
    [("sketch", {"threshold": 1e-30}), ("oracle", {"threshold": 1e-30}), ("quest", {"top_k": 81})],
)
def test_choosing_every_token_equals_dense_attention(policy, settings):
    query, keys, values = tensors(0, tokens=102)
    decoded, _ = decode(policy, query, keys, values, **settings)
    assert chosen_sets(decoded.selection) == [[set(range(SINKS, 102 - WINDOW))] * 2] * 2
    assert_error_within(decoded.output, decode("dense", query, keys, values)[0].output, 1e-12)


@pytest.mark.parametrize("policy", CHOOSING)
@settings(max_examples=20)
@given(masks(min_tokens=17, max_tokens=60), st.integers(0, 4), st.integers(1, 9), st.integers(1, 20), SEEDS)
def test_selections_are_unique_and_of_the_middle_and_never_of_padding(policy, mask, sinks, window, top_k, seed):
    query, keys, values = tensors(seed, len(mask), mask.shape[1], dim=8)
    rows = Rows.from_mask(mask)
    budget = {"sink_tokens": sinks, "attention_window": window, "top_k": top_k}
    decoded, _ = decode(policy, query, keys, values, rows, **budget)
    if decoded.selection is None:
        return
    chosen = chosen_sets(decoded.selection)
    assert [[len(head) for head in row] for row in chosen] == decoded.selection.counts.tolist()
    for row, real in enumerate(real_tokens(rows)):
        _, middle = near_and_middle(real, sinks, window)
        for head in chosen[row]:
            assert head <= set(middle)
            if policy in NOTHING_BUT_NEAR:
                assert not head
            elif policy == "quest":
                assert min(top_k, len(middle)) <= len(head) < top_k + PAGE
            else:
                assert len(head) == min(top_k, len(middle))


@pytest.mark.parametrize("policy", CHOOSING)
@settings(max_examples=10)
@given(masks(min_tokens=30, max_tokens=60), SEEDS, st.sampled_from([None, 0.02]))
def test_the_output_is_softmax_over_exactly_the_tokens_read(policy, mask, seed, threshold):
    # every row long enough to be sparse; padding and garbage in its values weigh nothing
    mask[:, -20:] = True
    (query, keys, values), rows = tensors(seed, len(mask), mask.shape[1], dim=8), Rows.from_mask(mask)
    values.transpose(1, 2)[~mask] = 1e6
    decoded, _ = decode(policy, query, keys, values, rows, threshold=threshold)
    output, lse = attention_over(query, keys, values, tokens_read(decoded, rows), SCALING)
    assert_error_within(decoded.output, output, 1e-10)
    assert_error_within(decoded.lse, lse, 1e-10)


@pytest.mark.parametrize("policy", POLICIES)
@pytest.mark.parametrize("mask", [left_padded(90, 90), left_padded(90, 70), left_padded(70, 90)], ids=str)
def test_rows_do_not_influence_each_other(policy, mask):
    rows, first = Rows.from_mask(mask), tensors(0, tokens=90)
    other = [torch.cat([7 * new[:1], own[1:]]) for new, own in zip(tensors(9, tokens=90), first, strict=True)]
    (before, _), (after, _) = decode(policy, *first, rows), decode(policy, *other, rows)
    assert not torch.equal(before.output[0], after.output[0])
    assert torch.equal(before.output[1], after.output[1])
    # a threshold reads more of one row than of another
    (before, _), (after, _) = (decode(policy, *inputs, rows, threshold=0.01) for inputs in (first, other))
    assert_error_within(before.output[1], after.output[1], 1e-12)
    if before.selection is not None:
        assert chosen_sets(before.selection)[1] == chosen_sets(after.selection)[1]


@pytest.mark.parametrize("policy", POLICIES)
@pytest.mark.parametrize("threshold", [None, 0.01])
@settings(max_examples=5)
@given(st.integers(20, 100), SEEDS)
def test_a_left_padded_row_equals_the_row_alone(policy, threshold, count, seed):
    query, keys, values = tensors(seed)
    padded, _ = decode(policy, query, keys, values, Rows.from_mask(left_padded(100, count)), threshold=threshold)
    own = query[1:], keys[1:, :, -count:], values[1:, :, -count:]
    alone, _ = decode(policy, *own, threshold=threshold)
    assert_error_within(padded.output[1], alone.output[0], 1e-12)
    if padded.selection is not None:
        shifted = [{token + 100 - count for token in head} for head in chosen_sets(alone.selection)[0]]
        assert chosen_sets(padded.selection)[1] == shifted


@pytest.mark.parametrize("policy", BY_QUERY)
def test_the_order_of_the_tokens_of_a_page_is_irrelevant(policy):
    # 97 tokens are all in the sketch's fit, 32 to 47 are one page of the middle
    query, keys, values = tensors(0, tokens=97)
    order = torch.arange(97)
    order[32:48] = 32 + torch.randperm(16, generator=torch.Generator().manual_seed(0))
    plain, _ = decode(policy, query, keys, values)
    shuffled, _ = decode(policy, query, keys[:, :, order], values[:, :, order])
    assert_error_within(shuffled.output, plain.output, 1e-12)


@pytest.mark.parametrize("policy", BY_QUERY)
def test_the_future_is_invisible(policy):
    query, keys, values = tensors(0)
    fresh, _ = decode(policy, query, keys, values)
    layer = layer_with(keys, values, policy=policy)
    for garbage in (40, 3, 1):
        layer.buffer.append(1e3 * keys[:, :, :garbage].flip(2), 1e3 * values[:, :, :garbage])
        decode_step(query, layer, Rows.full(2, 100 + garbage), SCALING)
        layer.truncate(100)
    again = decode_step(query, layer, Rows.full(2, 100), SCALING)
    assert torch.equal(again.output, fresh.output)


@pytest.mark.parametrize("policy", BY_QUERY)
@pytest.mark.parametrize("mask", [left_padded(40, 40), left_padded(40, 25)], ids=["whole", "padded"])
def test_decoding_token_by_token_equals_decoding_from_a_prompt(policy, mask):
    # long enough for the sketch to refit, the window to move on and pages to fill
    query, keys, values = tensors(0, tokens=75)
    mask = torch.cat([mask, torch.ones(2, 35, dtype=torch.bool)], 1)
    layer = layer_with(keys[:, :, :40], values[:, :, :40], policy=policy)
    for length in range(41, 76):
        layer.buffer.append(keys[:, :, length - 1 : length], values[:, :, length - 1 : length])
        rows = Rows.from_mask(mask[:, :length])
        stepwise = decode_step(query, layer, rows, SCALING)
        at_once, _ = decode(policy, query, keys[:, :, :length], values[:, :, :length], rows)
        assert torch.equal(stepwise.output, at_once.output)


@pytest.mark.parametrize("policy", POLICIES)
def test_a_layer_whose_rows_were_taken_equals_one_that_held_them_all_along(policy):
    query, keys, values = tensors(0, batch=3)
    rows = torch.tensor([2, 0, 0, 1])
    _, layer = decode(policy, query, keys, values, Rows.from_mask(left_padded(100, 80, 60)))
    layer.take_rows(rows)
    taken = decode_step(query[rows], layer, Rows.from_mask(left_padded(100, 80, 60)[rows]), SCALING)
    fresh, _ = decode(policy, query[rows], keys[rows], values[rows], Rows.from_mask(left_padded(100, 80, 60)[rows]))
    assert torch.equal(taken.output, fresh.output)


@pytest.mark.parametrize("policy", [name for name in CHOOSING if not resolve(name).evicts and name != "window"])
def test_a_token_that_outweighs_all_others_is_found(policy):
    query, keys, values = tensors(0)
    for head in range(2):
        keys[:, head, 41 + head] = 4 * query[:, 3 * head : 3 * head + 3].mean(1)
    decoded, _ = decode(policy, query, keys, values, top_k=1)
    for row in chosen_sets(decoded.selection):
        assert all(41 + head in chosen for head, chosen in enumerate(row))


# --- dense, window, oracle


def test_the_dense_policy_selects_every_token_of_the_middle():
    (query, keys, values), rows = tensors(0), Rows.from_mask(left_padded(100, 30))
    layer = layer_with(keys, values, policy="dense")
    regions = rows.regions(SINKS, WINDOW, keys.device)
    selection = layer.policy.select(
        Step(query, layer.buffer, None, rows, regions, SCALING, layer.kernels, layer.config)
    )
    assert chosen_sets(selection) == [[set(range(2, 94))] * 2, [set(range(72, 94))] * 2]
    assert_error_within(selection.missing_mass, torch.zeros(2, 2), 1e-6)


@pytest.mark.parametrize("policy", CHOOSING)
@pytest.mark.parametrize("group", [1, 3])
def test_no_policy_covers_more_attention_than_the_oracle_with_as_many_tokens(policy, group):
    query, keys, values = tensors(0, batch=3, group=group)
    rows = Rows.full(3, 100)
    other, _ = decode(policy, query, keys, values)
    as_many = max(1, int(other.selection.counts.max()))
    best, _ = decode("oracle", query, keys, values, top_k=as_many)
    shares = true_shares(query, keys, rows, SCALING)
    for row, heads in enumerate(tokens_read(other, rows)):
        for head, read in enumerate(heads):
            oracle = tokens_read(best, rows)[row][head]
            assert shares[row, head, list(read)].sum() <= shares[row, head, list(oracle)].sum() + 1e-12


@pytest.mark.parametrize("threshold", [None, 0.01])
@pytest.mark.parametrize("mask", [left_padded(100, 100), left_padded(100, 60)], ids=["whole", "padded"])
def test_the_missing_mass_of_the_oracle_is_the_true_one(threshold, mask):
    (query, keys, values), rows = tensors(0), Rows.from_mask(mask)
    decoded, _ = decode("oracle", query, keys, values, rows, threshold=threshold)
    shares = true_shares(query, keys, rows, SCALING)
    for row, heads in enumerate(tokens_read(decoded, rows)):
        for head, read in enumerate(heads):
            missing = 1 - float(shares[row, head, list(read)].sum())
            assert float(decoded.selection.missing_mass[row, head]) == pytest.approx(missing, abs=1e-9)


# --- sketch


def structured(seed: int, tokens: int = 400, heads: int = 2, group: int = 3, dim: int = 64):
    """Keys as models make them: topics that drift, a common offset, channels of unlike spread; peaked attention."""
    topics = randn(seed, heads, 8, dim)
    topic_of = (torch.arange(tokens) // 20 + torch.arange(tokens) // 7) % 8
    spread = randn(seed + 1, heads, 1, dim).mul(0.5).exp()
    keys = (topics[:, topic_of] + 0.7 * randn(seed + 2, heads, tokens, dim)) * spread
    keys = keys + 2 * randn(seed + 3, heads, 1, dim)
    wanted = topics[:, seed % 8].repeat_interleave(group, 0) + randn(seed + 4, heads * group, dim)
    # so that SCALING acts as the usual dim ** -0.5
    query = wanted * dim**-0.5 / SCALING
    return query[None], keys[None], randn(seed + 5, 1, heads, tokens, dim)


@pytest.mark.parametrize("top_k", [4, 16, 64])
def test_the_estimated_missing_mass_is_near_the_true_one(top_k):
    # the tolerance of this law: 0.05 and 40 % of the true mass, for every head
    for seed in range(10):
        query, keys, values = structured(seed)
        decoded, _ = decode("sketch", query, keys, values, top_k=top_k)
        shares = true_shares(query, keys, Rows.full(1, 400), SCALING)[0]
        for head, read in enumerate(tokens_read(decoded, Rows.full(1, 400))[0]):
            missing = 1 - float(shares[head, list(read)].sum())
            estimate = float(decoded.selection.missing_mass[0, head])
            assert abs(estimate - missing) <= 0.05 + 0.4 * missing


def test_the_sketch_covers_nearly_what_the_oracle_covers():
    for seed in range(10):
        query, keys, values = structured(seed)
        shares = true_shares(query, keys, Rows.full(1, 400), SCALING)[0]
        covered = {}
        for policy in ESTIMATING:
            read = tokens_read(decode(policy, query, keys, values, top_k=32)[0], Rows.full(1, 400))[0]
            covered[policy] = [float(shares[head, list(tokens)].sum()) for head, tokens in enumerate(read)]
        for sketch, oracle in zip(covered["sketch"], covered["oracle"], strict=True):
            assert sketch > 0.9 * oracle


@pytest.mark.parametrize("tau", [0.1, 1e-2, 1e-3, 1e-4])
def test_the_sketch_leaves_unread_only_tokens_whose_estimated_share_is_within_the_threshold(tau):
    query, keys, values = structured(3)
    decoded, layer = decode("sketch", query, keys, values, top_k=1, threshold=tau)
    sketch, kernels = layer.index, layer.kernels
    logits = kernels.score(query, sketch.coded, 0, 400, SCALING)[0]
    near, middle = near_and_middle(list(range(400)), SINKS, WINDOW)
    exact = kernels.exact_logits(query, keys, torch.tensor(near).expand(1, 2, -1), SCALING)[0]
    shares = torch.cat([exact, logits[..., middle]], -1).softmax(-1)[..., len(near) :].mean(1)
    for head, chosen in enumerate(chosen_sets(decoded.selection)[0]):
        for token, share in zip(middle, shares[head].tolist(), strict=True):
            assert share <= tau * 1.0001 or token in chosen
            assert share >= tau * 0.9999 or token not in chosen or len(chosen) == 1


# --- quest


@settings(max_examples=15)
@given(masks(min_tokens=40, max_tokens=100), st.integers(1, 40), SEEDS)
def test_quest_reads_whole_pages_by_their_bounds_until_they_hold_top_k_tokens(mask, top_k, seed):
    mask[:, -25:] = True
    (query, keys, values), rows = tensors(seed, len(mask), mask.shape[1], dim=4), Rows.from_mask(mask)
    decoded, _ = decode("quest", query, keys, values, rows, top_k=top_k)
    if decoded.selection is None:
        return
    for row, real in enumerate(real_tokens(rows)):
        _, middle = near_and_middle(real, SINKS, WINDOW)
        pages = [real[start : start + PAGE] for start in range(0, len(real), PAGE)]
        pages = [page for page in pages if set(page) & set(middle)]
        for head, chosen in enumerate(chosen_sets(decoded.selection)[row]):
            own = keys[row, head]
            extremes = [(own[page].amin(0), own[page].amax(0)) for page in pages]
            q = query[row, 3 * head : 3 * head + 3]
            bounds = torch.stack([torch.maximum(q * low, q * high).sum(-1) for low, high in extremes], -1)
            share = (SCALING * bounds.float()).softmax(-1).mean(0)
            expected: set[int] = set()
            for page in share.argsort(descending=True).tolist():
                if len(expected) < top_k:
                    expected |= set(pages[page]) & set(middle)
            assert chosen == expected


def test_quest_ignores_the_threshold():
    query, keys, values = tensors(0)
    plain, tuned = (decode("quest", query, keys, values, threshold=tau)[0] for tau in (None, 1e-9))
    assert torch.equal(plain.output, tuned.output)
