"""Steps in a row: bit for bit those that are taken one by one, and whatever happens in between."""

import copy
import pickle

import pytest
import torch

from sparse_attention_decoder import AttentionConfig
from sparse_attention_decoder.attention import LayerState, decode_step
from sparse_attention_decoder.ready import Ready
from sparse_attention_decoder.selection import Rows

HEADS, KV_HEADS, DIM, SCALING = 6, 2, 16, 0.25
SPARSE = AttentionConfig(sink_tokens=2, attention_window=8, top_k=5, threshold=0.01, dense_below=0)
CONFIGS = {
    "sparse": SPARSE,
    "far field": AttentionConfig(**{**vars(SPARSE), "far_field": 0.5}),
    "turning": AttentionConfig(sink_tokens=2, attention_window=8, top_k=5, threshold=0.01, dense_below=60),
    "dense": AttentionConfig(policy="dense", sink_tokens=1, attention_window=4, top_k=2),
}
EVENTS = {
    "nothing": lambda state: None,
    "truncated": lambda state: state.truncate(state.buffer.length - 3),
    "far back": lambda state: state.truncate(20),
    "rows": lambda state: state.take_rows(torch.arange(state.buffer.shape[0]).flip(0)),
    "fewer rows": lambda state: state.take_rows(torch.tensor([0])),
    "reserved": lambda state: state.buffer.reserve(500),
    "index dropped": lambda state: setattr(state, "index", None),
    "reads all": lambda state: setattr(state, "reads_all", not state.reads_all),
}


class Both:
    """The same tokens in two layers: one takes each step alone, the other in a row where it can."""

    def __init__(self, config, rows, dtype, past):
        self.generator = torch.Generator().manual_seed(past)
        self.dtype, self.rows = dtype, rows
        self.alone, self.row, self.ready, self.served = LayerState(config), LayerState(config), None, 0
        keys, values = self.tokens(KV_HEADS, past), self.tokens(KV_HEADS, past)
        for state in (self.alone, self.row):
            state.append(keys, values)

    def tokens(self, heads, count):
        return torch.randn(self.rows, heads, count, DIM, generator=self.generator).to(self.dtype)

    def step(self):
        query, key, value = self.tokens(HEADS, 1), self.tokens(KV_HEADS, 1), self.tokens(KV_HEADS, 1)
        self.alone.append(key, value)
        rows = Rows.full(self.rows, self.alone.buffer.length)
        expected = decode_step(query[:, :, 0], self.alone, rows, SCALING).output.unsqueeze(1)
        found = None if self.ready is None else self.ready.step(query, key, value)
        if found is None:
            self.row.append(key, value)
            found = decode_step(query[:, :, 0], self.row, rows, SCALING).output.unsqueeze(1)
            self.ready = Ready.after(self.row, query, SCALING)
        else:
            self.served += 1
        assert torch.equal(found, expected)
        assert torch.equal(self.row.buffer.plain_keys, self.alone.buffer.plain_keys)
        assert torch.equal(self.row.buffer.plain_values, self.alone.buffer.plain_values)

    def happens(self, event):
        for state in (self.alone, self.row):
            event(state)
        self.rows = self.alone.buffer.shape[0]


@pytest.mark.parametrize("event", EVENTS)
@pytest.mark.parametrize("kv_dtype", [None, "int8"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("name", CONFIGS)
def test_a_step_in_a_row_is_the_step_alone(name, dtype, kv_dtype, event):
    vars_of = {**vars(CONFIGS[name]), "kv_dtype": kv_dtype}
    both = Both(AttentionConfig(**vars_of), 2, dtype, 30)
    for _ in range(3):
        for _ in range(15):
            both.step()
        both.happens(EVENTS[event])
    for _ in range(5):
        both.step()
    assert vars(both.row.reads) == vars(both.alone.reads)
    assert both.served >= 25


def test_a_draft_that_is_taken_back_does_not_end_the_row():
    both = Both(SPARSE, 2, torch.float32, 90)
    both.step()
    for _ in range(5):
        both.happens(EVENTS["truncated"])
        both.step()
    assert both.served == 5


def test_other_queries_are_not_taken():
    both = Both(SPARSE, 2, torch.float32, 30)
    for _ in range(3):
        both.step()
    query, token = both.tokens(HEADS, 1), both.tokens(KV_HEADS, 1)
    length = both.row.buffer.length
    strided = torch.empty(2, HEADS, 1, 2 * DIM)[..., :DIM].copy_(query)
    assert both.ready.step(strided, token, token) is None
    assert both.ready.step(query.bfloat16(), token, token) is None
    assert both.row.buffer.length == length and both.ready.step(query, token, token) is not None


@pytest.mark.parametrize(
    "changed", [{"policy": "oracle"}, {"policy": "quest"}, {"max_cache_tokens": 60}, {"backend": "reference"}]
)
def test_what_takes_more_than_a_call_is_left_to_the_step_alone(changed):
    both = Both(AttentionConfig(**{**vars(SPARSE), **changed}), 1, torch.float32, 30)
    both.step()
    assert both.ready is None


def test_within_the_budget_attention_stays_pytorchs():
    both = Both(CONFIGS["dense"], 1, torch.float32, 2)
    both.step()
    assert both.ready is None


@pytest.mark.parametrize(
    "copied", [copy.deepcopy, lambda thing: pickle.loads(pickle.dumps(thing))], ids=["deep", "file"]
)
def test_a_copy_of_a_layer_has_nothing_ready_for_its_call_holds_addresses(copied):
    both = Both(SPARSE, 2, torch.float32, 30)
    for _ in range(5):
        both.step()
    assert both.ready is not None and copied([both.ready]) == [None]
