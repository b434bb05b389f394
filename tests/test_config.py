import dataclasses
import json

import pytest
from hypothesis import example, given
from hypothesis import strategies as st

from sparse_attention_decoder.config import AttentionConfig
from sparse_attention_decoder.errors import ConfigError
from sparse_attention_decoder.tables import BACKENDS, KV_BITS, POLICIES

FIELDS = [field.name for field in dataclasses.fields(AttentionConfig)]
CONFIGS = st.builds(
    AttentionConfig,
    top_k=st.integers(1),
    threshold=st.none() | st.floats(0, 1, exclude_max=True) | st.just(0),
    attention_window=st.integers(1),
    sink_tokens=st.integers(0),
    policy=st.sampled_from(list(POLICIES)),
    backend=st.sampled_from(["auto", *BACKENDS]),
    dense_below=st.none() | st.integers(0),
    kv_dtype=st.none() | st.sampled_from(list(KV_BITS)),
)
JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=5),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=3), inner, max_size=3),
    max_leaves=5,
)


def test_the_defaults_are_the_documented_ones():
    assert AttentionConfig() == AttentionConfig(
        top_k=32,
        threshold=3e-5,
        attention_window=256,
        sink_tokens=4,
        policy="sketch",
        backend="auto",
        dense_below=None,
        kv_dtype=None,
    )


def test_a_config_cannot_be_changed():
    with pytest.raises(dataclasses.FrozenInstanceError):
        AttentionConfig().top_k = 64


@given(CONFIGS)
def test_json_brings_back_the_same_config(config):
    assert AttentionConfig.from_json(config.to_json()) == config


@given(CONFIGS)
def test_json_is_an_object_with_one_key_a_field(config):
    assert list(json.loads(config.to_json())) == FIELDS


def test_keys_left_out_of_the_json_take_their_default():
    assert AttentionConfig.from_json('{"sink_tokens": 7}') == AttentionConfig(sink_tokens=7)


def test_an_unknown_key_is_refused_and_the_known_ones_are_listed():
    with pytest.raises(ConfigError, match=r"'topk'.*known are top_k, threshold"):
        AttentionConfig.from_json('{"topk": 7}')


@pytest.mark.parametrize("text", ["", "{", "top_k: 3", "{'top_k': 3}", '{"top_k": ' + "9" * 5000 + "}"])
def test_text_that_is_not_json_is_refused(text):
    with pytest.raises(ConfigError, match="not JSON"):
        AttentionConfig.from_json(text)


@pytest.mark.parametrize(("text", "kind"), [("[]", "list"), ("3", "int"), ("null", "NoneType"), ('"top_k"', "str")])
def test_json_that_is_not_an_object_is_refused(text, kind):
    with pytest.raises(ConfigError, match=f"holds a {kind}; expected an object"):
        AttentionConfig.from_json(text)


@given(st.dictionaries(st.sampled_from(FIELDS), JSON, max_size=3))
@example({"policy": ["sketch"]})
@example({"backend": {}})
@example({"threshold": 10**400})
def test_whatever_the_json_holds_it_gives_a_config_or_a_config_error(values):
    try:
        config = AttentionConfig.from_json(json.dumps(values))
    except ConfigError:
        return
    found = {name: getattr(config, name) for name in values}
    # JSON has no tuples
    assert json.loads(json.dumps(found)) == values


BAD = [
    ("top_k", 0, 'use 1 or more (to retrieve nothing use policy="window")'),
    ("top_k", -1, "use 1 or more"),
    ("top_k", True, "expected a whole number of tokens, 1 or more"),
    ("top_k", 1.5, "expected a whole number of tokens, 1 or more"),
    ("top_k", "32", "expected a whole number of tokens, 1 or more"),
    ("attention_window", 0, "use 1 or more"),
    ("attention_window", False, "expected a whole number of tokens, 1 or more"),
    ("sink_tokens", -1, "use 0 or more"),
    ("sink_tokens", None, "expected a whole number of tokens, 0 or more"),
    ("threshold", float("nan"), "0 (off) up to below 1, such as 3e-5"),
    ("threshold", float("inf"), "0 (off) up to below 1, such as 3e-5"),
    ("threshold", 1, "0 (off) up to below 1, such as 3e-5"),
    ("threshold", -0.1, "0 (off) up to below 1, such as 3e-5"),
    ("threshold", "x", "expected a number from 0 to below 1, or None for off"),
    ("threshold", True, "expected a number from 0 to below 1, or None for off"),
    ("dense_below", -1, "use 0 or more (0 never forces dense, None waits until sparse is faster)"),
    ("dense_below", 0.5, "expected a whole number of tokens, 0 or more"),
    ("policy", "flash", "choose one of " + ", ".join(POLICIES)),
    ("policy", None, "choose one of " + ", ".join(POLICIES)),
    ("policy", ["sketch"], "choose one of " + ", ".join(POLICIES)),
    ("backend", "cuda", "choose auto or one of " + ", ".join(BACKENDS)),
    ("kv_dtype", "int2", "choose one of int8, int4, or None"),
    ("kv_dtype", 8, "choose one of int8, int4, or None"),
    ("backend", {}, "choose auto or one of " + ", ".join(BACKENDS)),
]


@pytest.mark.parametrize(("field", "value", "way_out"), BAD, ids=lambda part: str(part)[:20])
def test_a_value_that_cannot_work_is_refused_with_a_way_out(field, value, way_out):
    with pytest.raises(ConfigError) as caught:
        AttentionConfig(**{field: value})
    message = str(caught.value)
    assert isinstance(caught.value, ValueError)
    assert message.startswith(f"{field} is {value!r}")
    assert way_out in message


OFFERED = [("top_k", 1), ("attention_window", 1), ("sink_tokens", 0), ("threshold", 0), ("threshold", None)]


@pytest.mark.parametrize(("field", "value"), [*OFFERED, ("dense_below", 0), ("dense_below", None)])
def test_the_values_that_the_messages_offer_work(field, value):
    assert getattr(AttentionConfig(**{field: value}), field) == value


def test_a_replaced_value_is_checked_too():
    with pytest.raises(ConfigError, match="top_k is 0"):
        dataclasses.replace(AttentionConfig(), top_k=0)


@given(CONFIGS)
def test_the_budget_is_sinks_and_window_and_what_the_policy_retrieves(config):
    retrieved = 0 if config.policy in ("window", "streaming") else config.top_k
    assert config.budget_tokens == config.sink_tokens + config.attention_window + retrieved
