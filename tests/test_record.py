"""Records: resumed after a crash, compared, named; and the grid of configs that fills them."""

import json
from pathlib import Path

import pytest
import torch

from sparse_attention_decoder import AttentionConfig
from sparse_attention_decoder.errors import InputError
from sparse_attention_decoder.measure.grid import configs
from sparse_attention_decoder.measure.interval import of_samples, of_tokens
from sparse_attention_decoder.measure.machine import bandwidth, facts, forget_peak, peak_bytes
from sparse_attention_decoder.measure.record import Records, as_cell, changes, label, read

FACTS = {"cpu": "one", "threads": 2}


def cell(context: int = 100, engine: str = "ours", **config: object) -> dict[str, object]:
    own = as_cell(AttentionConfig(**config)) if engine == "ours" else config
    return {"model": "m", "dtype": "float32", "engine": engine, "config": own, "context": context}


def test_what_was_written_is_there_again(tmp_path: Path) -> None:
    path = tmp_path / "new" / "records.jsonl"
    records = Records(path, FACTS)
    assert not records.has("speed", cell())
    records.add("speed", cell(), {"step_ms": 1.5})
    records.add("speed", cell(200), {"step_ms": 2.5})
    again = Records(path, FACTS)
    assert again.has("speed", cell())
    assert not again.has("agreement", cell())
    assert not again.has("speed", cell(top_k=33))
    assert [row["result"]["step_ms"] for row in again.rows] == [1.5, 2.5]
    again.add("speed", cell(300), {"step_ms": 3.5})
    # one machine, told once
    assert [row["kind"] for row in read([path])] == ["machine", "speed", "speed", "speed"]


@pytest.mark.parametrize("left", [0, 1, 20])
def test_a_line_cut_short_by_a_crash_is_measured_again(tmp_path: Path, left: int, caplog) -> None:
    path = tmp_path / "records.jsonl"
    records = Records(path, FACTS)
    for context in (1, 2):
        records.add("speed", cell(context), {"step_ms": context})
    lines = path.read_text().splitlines(keepends=True)
    path.write_text("".join(lines[:-1]) + lines[-1][:left])
    again = Records(path, FACTS)
    assert (again.has("speed", cell(1)), again.has("speed", cell(2))) == (True, False)
    assert ("cut short" in caplog.text) == (left > 0)
    again.add("speed", cell(2), {"step_ms": 2})
    assert path.read_text().splitlines()[:2] == [line.strip() for line in lines[:2]]
    assert len(Records(path, FACTS).rows) == 2


def test_a_whole_last_line_without_its_end_is_kept(tmp_path: Path) -> None:
    path = tmp_path / "records.jsonl"
    Records(path, FACTS).add("speed", cell(), {"step_ms": 1})
    path.write_text(path.read_text().rstrip("\n"))
    Records(path, FACTS).add("speed", cell(2), {"step_ms": 2})
    assert len(Records(path).rows) == 2


@pytest.mark.parametrize("text", ["no json\n{}\n", "[]\n", '{"kind": "speed"}\n'])
def test_what_is_no_record_is_refused_by_line(tmp_path: Path, text: str) -> None:
    path = tmp_path / "records.jsonl"
    path.write_text(text)
    with pytest.raises(InputError, match=r"records.jsonl, line 1"):
        Records(path)


def test_infinity_does_not_get_into_a_record(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="not JSON compliant"):
        Records(tmp_path / "records.jsonl").add("speed", cell(), {"step_ms": float("inf")})


def test_of_a_cell_measured_twice_the_newest_counts(tmp_path: Path) -> None:
    first, second = tmp_path / "a.jsonl", tmp_path / "b.jsonl"
    Records(first, FACTS).add("speed", cell(), {"step_ms": 1})
    Records(second, FACTS).add("speed", cell(), {"step_ms": 2})
    assert [row["result"]["step_ms"] for row in read([first, second]) if row["kind"] == "speed"] == [2]


def test_changes_compare_the_cells_both_have(tmp_path: Path) -> None:
    before, after = tmp_path / "a.jsonl", tmp_path / "b.jsonl"
    for path, factor in ((before, 1), (after, 2)):
        records = Records(path, FACTS)
        records.add("speed", cell(), {"step_ms": 10 * factor, "kl": None, "ttft_s": 1.0, "peak_bytes": 5})
        records.add("speed", cell(factor), {"step_ms": 1})
        for sample, score in enumerate((0.0, 1.0 / factor)):
            own = {"model": "m", "dtype": "f", "engine": "ours", "config": as_cell(AttentionConfig())}
            records.add("retrieval", {**own, "task": "vt", "length": 9, "sample": sample}, {"score": score})
    found = {(name, measure): (old, new) for name, measure, old, new in changes(before, after)}
    assert found == {
        ("m, float32, 100, sketch, the default", "step_ms"): (10, 20),
        ("m, float32, 100, sketch, the default", "ttft_s"): (1, 1),
        ("m, float32, 100, sketch, the default", "peak_bytes"): (5, 5),
        ("m, f, vt, 9, sketch, the default", "score"): (0.5, 0.25),
    }


@pytest.mark.parametrize(
    ("expected", "made"),
    [
        ("sketch, the default", cell()),
        ("sketch, 256", cell(top_k=256, threshold=None)),
        ("sketch, above 0.0001", cell(threshold=1e-4)),
        ("sketch, 32, window 64", cell(threshold=None, attention_window=64)),
        ("sketch, above 3e-05, far field 0.5, by layer", cell(far_field=0.5, layer_scales=(1.0, 2.0))),
        ("oracle, above 3e-05", cell(policy="oracle")),
        ("sketch, fast", cell(quality="fast")),
        ("sketch, balanced, missing 0.05", cell(quality="balanced", missing_mass=0.05)),
        ("sketch, sampled above 0.002", cell(sample_tail=True, threshold=2e-3)),
        ("quest, 32", cell(policy="quest")),
        ("window, 512", cell(policy="window", attention_window=512)),
        ("streaming, 512 (evicts)", cell(policy="streaming", attention_window=512)),
        ("h2o, 64 (evicts)", cell(policy="h2o", top_k=64)),
        ("dense, our kernel", cell(policy="dense")),
        ("dense, SDPA on our cache", cell(policy="dense", backend="reference")),
        ("transformers", cell(engine="transformers")),
        ("llama.cpp (kv f16 flash False)", cell(engine="llama.cpp", kv="f16", flash=False)),
    ],
)
def test_sides_have_names_of_their_own(expected: str, made: dict[str, object]) -> None:
    assert label(json.loads(json.dumps(made))) == expected


def test_the_grid_has_a_config_for_every_policy_and_budget_that_go_together() -> None:
    found = configs(["sketch", "quest", "window", "dense", "snapkv"], ["default", "256", "1e-4"])
    told = [(c.policy, c.top_k, c.threshold, c.attention_window) for c in found]
    assert told == [
        ("dense", 32, 3e-5, 256),
        ("sketch", 32, 3e-5, 256),
        ("sketch", 256, None, 256),
        ("sketch", 32, 1e-4, 256),
        ("quest", 256, None, 256),
        ("window", 32, None, 512),
        ("snapkv", 256, None, 256),
    ]
    dialled = configs(["sketch", "quest", "oracle"], ["firm", "5%"])
    assert [(c.policy, c.quality, c.missing_mass) for c in dialled] == [
        ("sketch", "firm", None), ("sketch", "balanced", 0.05), ("oracle", "firm", None), ("oracle", "balanced", 0.05),
    ]  # fmt: skip
    # never dense below: a figure of sparse decoding must not be one of dense decoding
    assert {c.dense_below for c in found[1:]} == {0}
    assert configs(["sketch", "sketch"], ["64", "64"], window=8) == [
        AttentionConfig(64, None, 8, dense_below=0),
    ]


@pytest.mark.parametrize(("policy", "budget", "match"), [
    ("sketchy", "default", "'sketchy' is unknown; choose from sketch"),
    ("sketch", "0", "budget '0'"), ("sketch", "-3", "budget"), ("sketch", "2.5", "budget"), ("sketch", "much", "much"),
    ("sketch", "x%", "written such as 5%"),
])  # fmt: skip
def test_a_grid_of_nonsense_is_refused(policy: str, budget: str, match: str) -> None:
    with pytest.raises(InputError, match=match):
        configs([policy], [budget])


def test_an_interval_holds_the_mean_and_narrows_with_more_values() -> None:
    values = torch.rand(64, generator=torch.Generator().manual_seed(1))
    few, many = of_samples(values[:16]), of_samples(values)
    assert few[0] < values[:16].mean() < few[1]
    assert many[0] < values.mean() < many[1]
    assert many[1] - many[0] < few[1] - few[0]
    assert of_samples(values) == many
    # 95 % of a mean of 64 uniform values: 1.96 * sqrt(1 / 12 / 64) on either side
    assert many[1] - many[0] == pytest.approx(2 * 1.96 * (1 / 12 / 64) ** 0.5, rel=0.2)


def test_tokens_that_follow_each_other_do_not_count_as_independent() -> None:
    blocks = torch.rand(16, 1, generator=torch.Generator().manual_seed(2)).repeat_interleave(16, 0)
    low, high = of_tokens(blocks)
    naive_low, naive_high = of_samples(blocks.flatten())
    assert high - low > 2 * (naive_high - naive_low)


def test_the_machine_tells_what_it_is() -> None:
    told = facts()
    assert told["torch"] == torch.__version__
    assert told["threads"] == torch.get_num_threads()
    assert all(isinstance(value, str | int | float) for value in told.values())
    assert 0.1 < bandwidth(size=1 << 22) < 1e4


def test_a_forgotten_peak_counts_from_then_on() -> None:
    # written to: memory that nobody touched is none, and its end would be no fall
    block = bytearray(b"x") * (1 << 28)
    high = peak_bytes()
    assert high >= len(block)
    del block
    if forget_peak():
        assert peak_bytes() < high


def test_cells_of_what_is_not_used_keep_the_names_they_had() -> None:
    before = {"top_k", "threshold", "attention_window", "sink_tokens", "policy", "backend"}
    assert set(as_cell(AttentionConfig())) == before
    used = as_cell(AttentionConfig(far_field=0.5, layer_scales=(1.0, None), tuned_for="a-b"))
    assert set(used) == before | {"far_field", "layer_scales", "tuned_for"}
