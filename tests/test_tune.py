"""Configs by layer, files of tuned configs, the rehearsal and the search, end to end on a tiny model."""

import json
import logging
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from test_cli import run
from test_decoder import tokenizer
from tiny import build, prompt, replay

from sparse_attention_decoder import AttentionConfig, SparseAttention, SparseCache, enable
from sparse_attention_decoder.errors import ConfigError, InputError, TargetError, UnsupportedError
from sparse_attention_decoder.measure import tune
from sparse_attention_decoder.measure.doctor import facts
from sparse_attention_decoder.measure.quality import compare
from sparse_attention_decoder.measure.rehearsal import Rehearsal
from sparse_attention_decoder.measure.tune import Search, Target
from sparse_attention_decoder.measure.tuned import Plan, halves
from sparse_attention_decoder.models import identity, tuned
from sparse_attention_decoder.tables import POLICIES

SMALL = AttentionConfig(top_k=4, threshold=3e-3, attention_window=8, sink_tokens=2, dense_below=0)
DENSE = AttentionConfig(policy="dense")
TEXT = "".join(chr(33 + (5 * i * i + 3 * i + i // 7) % 90) for i in range(2000))
PLAN = ["--context", 400, "--tokens", 32, "--samples", 2]


@pytest.fixture(scope="module")
def directory(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("tiny")
    build("llama").save_pretrained(folder)
    tokenizer(spaced=True).save_pretrained(folder)
    (folder / "text.txt").write_text(TEXT)
    return folder


# --- budgets by layer


def test_layers_get_their_own_budgets() -> None:
    config = replace(SMALL, layer_scales=(0.01, 100.0))
    model = enable(build("llama"), config)
    _, cache = replay(model, config, [(prompt(1, 120)[0], prompt(1, 4, seed=1)[0])])
    first, second = (layer.state.reads.tokens_read for layer in cache.sparse_layers)
    assert first > 2 * second
    # the second has but its floor left
    assert second == 4 * 2 * (2 + 8 + 4)


def test_a_layer_of_none_is_dense_and_scales_of_one_change_nothing() -> None:
    ids = [(prompt(1, 120)[0], prompt(1, 4, seed=1)[0])]
    model = enable(build("llama"), SMALL)
    plain, before = replay(model, SMALL, ids)
    same, _ = replay(model, replace(SMALL, layer_scales=(1.0, 1.0)), ids)
    assert torch.equal(plain, same)
    _, cache = replay(model, replace(SMALL, layer_scales=(None, 1.0)), ids)
    whole, sparse = (layer.state.reads for layer in cache.sparse_layers)
    assert whole.tokens_read == whole.tokens_cached
    assert sparse.tokens_read < sparse.tokens_cached
    assert before.sparse_layers[0].state.reads.tokens_read < whole.tokens_read


def test_another_reading_of_a_cache_has_its_own_budgets() -> None:
    cache = SparseCache(build("llama").config, SMALL)
    other = cache.reconfigured(replace(SMALL, layer_scales=(0.5, 2.0)))
    assert [layer.state.config.threshold for layer in other.sparse_layers] == [1.5e-3, 6e-3]
    assert [layer.state.config.threshold for layer in cache.sparse_layers] == [3e-3, 3e-3]


def test_scales_of_another_number_of_layers_are_refused_and_leave_the_model_as_it_was() -> None:
    model = build("llama")
    with pytest.raises(ConfigError, match="of 3 layers, and this model has 2"):
        enable(model, replace(SMALL, layer_scales=(1.0, 1.0, 1.0)))
    assert model.config._attn_implementation == "sdpa"


BAD = [
    ({"layer_scales": ()}, "expected a number for each"),
    ({"layer_scales": 2.0}, "expected a number for each"),
    ({"layer_scales": [1.0, 0.0]}, "has 0.0 for layer 1"),
    ({"layer_scales": [float("inf")]}, "has inf for layer 0"),
    ({"layer_scales": [True]}, "has True for layer 0"),
    ({"layer_scales": [1.0], "threshold": None}, "multiply a threshold"),
    ({"layer_scales": [1.0], "policy": "quest"}, "multiply a threshold"),
    ({"tuned_for": 3}, "tuned_for is 3"),
]


@pytest.mark.parametrize(("settings", "message"), BAD, ids=lambda part: str(part)[:30])
def test_a_config_that_cannot_work_is_refused(settings: dict, message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        AttentionConfig(**settings)


def test_a_config_by_layer_comes_back_from_json_and_from_a_file(tmp_path: Path) -> None:
    config = AttentionConfig(far_field=0.5, layer_scales=(1.5, None, 2), tuned_for="a-b")
    assert AttentionConfig.from_json(config.to_json()) == config
    (tmp_path / "plain.json").write_text(config.to_json())
    (tmp_path / "tuned.json").write_text(json.dumps({"config": json.loads(config.to_json()), "held_out": {}}))
    assert AttentionConfig.load(tmp_path / "plain.json") == AttentionConfig.load(tmp_path / "tuned.json") == config
    with pytest.raises(ConfigError, match="cannot read a config"):
        AttentionConfig.load(tmp_path / "none.json")


# --- whose it is


def test_a_config_for_another_model_is_refused_and_other_weights_are_warned_of(
    caplog: pytest.LogCaptureFixture,
) -> None:
    model = build("llama")
    own = replace(SMALL, tuned_for=identity.of(model))
    with caplog.at_level(logging.WARNING):
        enable(model, own)
        assert not caplog.records
        enable(build("llama", seed=1), own)
    assert "tuned for other weights" in caplog.text
    for other in (build("qwen2"), build("llama", num_hidden_layers=3)):
        with pytest.raises(ConfigError, match="tuned for another model"):
            enable(other, own)
        enable(other, replace(own, tuned_for=None))


@pytest.fixture
def shipped(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> AttentionConfig:
    """A config tuned for the tiny llama, as if it came with the package."""
    config = replace(SMALL, far_field=0.5, tuned_for=identity.of(build("llama")))
    found = {"config": json.loads(config.to_json()), "tuned_for": "tiny"}
    (tmp_path / "tiny.json").write_text(json.dumps(found))
    monkeypatch.setattr(tuned, "FOLDER", tmp_path)
    return config


def test_a_model_that_a_config_is_shipped_for_is_read_with_it_unless_told_otherwise(
    shipped: AttentionConfig, caplog: pytest.LogCaptureFixture
) -> None:
    tuned._say.cache_clear()
    with caplog.at_level(logging.INFO):
        assert SparseAttention(model=build("llama")).config == shipped
        assert SparseAttention(model=build("llama")).config == shipped
    assert caplog.text.count("the default is a config tuned for it") == 1
    assert SparseAttention(AttentionConfig(), build("llama")).config == AttentionConfig()
    cache = enable(build("llama"))(prompt(1, 40)).past_key_values
    assert cache.config == shipped
    for other in (build("llama", seed=1), build("qwen2"), build("llama", dtype=torch.bfloat16)):
        assert SparseAttention(model=other).config == AttentionConfig()
    assert ("default for tiny", "tuned: threshold 0.003, window 8, floor 4, far field times 0.5") in facts()


def test_every_config_we_ship_has_its_evidence_and_beat_the_plain_default() -> None:
    for name, config in tuned.shipped().items():
        found = next(found for path in tuned.FOLDER.glob("*.json") if (found := tuned._read(path))["tuned_for"] == name)
        own, plain = found["held_out"]["tuned"], found["held_out"]["default"]
        assert config.tuned_for and config.dense_below is None
        assert own["kl"] <= found["target"]["max_kl"]
        assert own["share_read"] < plain["share_read"]


def test_a_cache_of_a_tuned_config_serves_every_policy() -> None:
    decoder = SparseAttention(replace(SMALL, far_field=0.5, layer_scales=(1.0, 2.0)), build("llama"))
    cache = decoder.prefill(prompt(1, 60), watched=POLICIES)
    for policy in POLICIES:
        other = cache.reconfigured(replace(SMALL, policy=policy))
        assert decoder.model(prompt(1, 1), past_key_values=other).logits.isfinite().all()
        cache.crop(60 - cache.get_seq_length())


# --- the rehearsal


CASES = [
    SMALL,
    replace(SMALL, threshold=None),
    replace(SMALL, far_field=0.5),
    replace(SMALL, attention_window=40, far_field=0.5),
    replace(SMALL, layer_scales=(None, 0.2)),
    replace(SMALL, top_k=1, threshold=0.2),
]


@pytest.mark.parametrize("family", ["llama", "gpt2", "qwen3"])
@pytest.mark.parametrize("config", CASES, ids=range(len(CASES)))
def test_a_rehearsal_is_what_decoding_one_token_at_a_time_gives(family: str, config: AttentionConfig) -> None:
    # 102 is a length at which a sketch is fitted anew: none lies between the context and the last token
    decoder, ids = SparseAttention(DENSE, build(family), tokenizer()), prompt(2, 121)
    decoded = next(compare(decoder, ids, 100, [config]))
    rehearsal = Rehearsal(decoder, ids, 100)
    found = rehearsal.run(config)
    torch.testing.assert_close(found.kl, decoded.tokens[0], rtol=2e-3, atol=1e-6)
    torch.testing.assert_close(found.ce_change, decoded.tokens[3], rtol=2e-3, atol=1e-5)
    # leaves the cache as it was
    assert torch.equal(rehearsal.run(config).kl, found.kl)


def test_a_cache_that_cannot_go_back_is_refused() -> None:
    with pytest.raises(UnsupportedError, match="1 layers without full attention"):
        Rehearsal(SparseAttention(DENSE, build("gemma3_text"), tokenizer()), prompt(1, 121), 100)


def test_alone_a_layer_loses_less_than_all_together() -> None:
    rehearsal = Rehearsal(SparseAttention(DENSE, build("llama"), tokenizer()), prompt(2, 121), 100)
    alone = [rehearsal.run(SMALL, number) for number in range(2)]
    assert alone[0].retrieved[1] == alone[1].retrieved[0] == 100
    assert float(rehearsal.run(replace(SMALL, layer_scales=(None, 1.0))).kl.sum()) == float(alone[1].kl.sum())
    assert all(float(one.kl.mean()) > 0 for one in alone)


def test_a_target_dials_the_threshold_to_it(monkeypatch: pytest.MonkeyPatch) -> None:
    rehearsal = Rehearsal(SparseAttention(DENSE, build("llama"), tokenizer()), prompt(4, 133), 100)
    loose, tight = (Search(rehearsal, Target(max_kl=kl)).run(SMALL) for kl in (0.5, 0.01))
    assert tight.strain <= 1
    assert loose.strain <= 1
    assert tight.found.share_read > loose.found.share_read
    monkeypatch.setattr(tune, "LEAST", 0.01)
    with pytest.raises(TargetError, match=r"even a threshold of 0\.01 loses more"):
        Search(rehearsal, Target(max_kl=1e-12)).run(SMALL)


def test_what_is_held_out_was_not_tuned_on() -> None:
    decoder = SparseAttention(DENSE, build("llama"), tokenizer())
    ours, held_out = halves({"text": TEXT}, decoder, Plan(200, 32, 2))
    ids = torch.tensor(decoder.require_tokenizer()(TEXT).input_ids)
    assert ours.shape == held_out.shape == (2, 233)
    for rows, half in ((ours, ids[:1000]), (held_out, ids[1000:])):
        windows = half.unfold(0, 233, 1)
        assert all(bool((windows == row).all(-1).any()) for row in rows)
    with pytest.raises(InputError, match=r"has 2000 tokens; 10 passages of 233 need 2330"):
        halves({"text": TEXT}, decoder, Plan(200, 32, 5))


# --- as a user types it


def test_tune_writes_a_config_with_its_evidence(directory: Path, capsys: pytest.CaptureFixture[str]) -> None:
    file = directory / "tuned.json"
    text = directory / "text.txt"
    assert run("tune", "--text", text, "--max-kl", 0.2, "-m", directory, "--out", file, *PLAN) == 0
    assert f"AttentionConfig.load('{file}')" in capsys.readouterr().out.replace("\n", "")
    config, written = AttentionConfig.load(file), json.loads(file.read_text())
    assert config.tuned_for == identity.of(SparseAttention.from_pretrained(directory).model)
    assert config.dense_below is None
    assert written["held_out"]["tuned"]["kl"] <= 0.2
    assert written["held_out"]["tuned"]["tokens"] == written["plan"]["held_out_tokens"] == 64
    assert written["target"] == {"max_kl": 0.2}
    assert set(written["held_out"]) == {"tuned", "default", "plain"}
    assert {"texts", "versions", "saved", "search", "date", "dtype"} <= set(written)
    SparseAttention(config, directory)
    with pytest.raises(ConfigError, match="tuned for another model"):
        SparseAttention(config, build("qwen2"))


def test_a_target_that_is_missed_writes_nothing(
    directory: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(tune, "LEAST", 0.01)
    file, text = directory / "missed.json", directory / "text.txt"
    assert run("tune", "--text", text, "--max-kl", 1e-9, "-m", directory, "--out", file, *PLAN) == 1
    assert not file.exists()
    assert "cannot be held on this text" in capsys.readouterr().err.replace("\n", " ")


def test_a_target_that_holds_only_where_it_was_tuned_writes_nothing(
    directory: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(Target, "is_met", lambda *_: False)
    file, text = directory / "missed.json", directory / "text.txt"
    assert run("tune", "--text", text, "--max-kl", 0.2, "-m", directory, "--out", file, *PLAN) == 1
    assert not file.exists()
    assert "did not hold on the text held out" in capsys.readouterr().err.replace("\n", " ")


@pytest.mark.parametrize("targets", [[], ["--max-kl", 0.1, "--max-perplexity-change", 1]])
def test_one_target_is_asked_for(directory: Path, targets: list, capsys: pytest.CaptureFixture[str]) -> None:
    assert run("tune", "--text", directory / "text.txt", "-m", directory, *targets) == 1
    assert "give one target" in capsys.readouterr().err.replace("\n", " ")


def test_perplexity_may_be_the_target(directory: Path) -> None:
    file, text = directory / "perplexity.json", directory / "text.txt"
    status = run("tune", "--text", text, "--max-perplexity-change", 60, "-m", directory, "--out", file, *PLAN)
    assert status == 0
    assert abs(json.loads(file.read_text())["held_out"]["tuned"]["ppl_change"]) <= 0.6
