"""The bench: what it counts is what happened, sides cannot be unequal, and finished cells are not run again."""

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from test_cli import run as call
from test_decoder import tokenizer
from tiny import build, prompt

from sparse_attention_decoder import AttentionConfig, SparseAttention
from sparse_attention_decoder.errors import InputError, WorkerError
from sparse_attention_decoder.measure.compare import TURN
from sparse_attention_decoder.measure.machine import forget_peak, peak_bytes, resident_bytes
from sparse_attention_decoder.measure.record import Records, as_cell, label
from sparse_attention_decoder.measure.speed.bench import Listener, Setting, Side, baselines, measure, missing
from sparse_attention_decoder.measure.speed.worker import Ours, Stock

CONTEXT, ROUNDS = 60, 2
BITING = AttentionConfig(5, None, 8, 2, dense_below=0)
FORCED = AttentionConfig(5, 1e-30, 8, 2, dense_below=0)
QUEST = AttentionConfig(16, None, 8, 2, "quest", dense_below=0)
H2O = AttentionConfig(5, None, 8, 2, "h2o", dense_below=0)


class Here:
    """A worker asked in this process; `lies` replaces parts of its answers."""

    def __init__(self, worker: Any, **lies: Any) -> None:
        self.worker, self.lies, self.asked = worker, lies, []

    def ask(self, do: str, **arguments: Any) -> dict[str, Any]:
        # what a pipe would do to it
        arguments = json.loads(json.dumps(arguments))
        self.asked.append((do, arguments))
        answer = json.loads(json.dumps(getattr(self.worker, do)(**arguments)))
        return {name: self.lies.get(name, value) for name, value in answer.items()}


@pytest.fixture(scope="module")
def directory(tmp_path_factory: pytest.TempPathFactory) -> str:
    folder = tmp_path_factory.mktemp("tiny")
    build("llama").save_pretrained(folder)
    tokenizer(spaced=True).save_pretrained(folder)
    return str(folder)


def setting(directory: str, batch: int = 2) -> Setting:
    ids = prompt(batch, CONTEXT + (ROUNDS + 1) * TURN).tolist()
    return Setting("tiny", directory, "float32", "cpu", torch.get_num_threads(), CONTEXT, ROUNDS, ids, 10.0)


def measured(directory: str, configs: list[AttentionConfig], stages: list[str] | None = None, **lies: Any) -> Any:
    ours, stock = Here(Ours()), Here(Stock(), **lies)
    told: list[Any] = [] if stages is None else stages
    listener = Listener(told.append, lambda setting, ceiling: told.append(ceiling), lambda done, total: None)
    rows = list(measure(setting(directory), configs, ours, stock, [], listener))
    return {label(cell): result for cell, result in rows}, ours, stock


def test_every_side_is_there_with_what_it_read_and_how_far_it_strayed(directory: str) -> None:
    rows, ours, stock = measured(directory, [BITING, QUEST, H2O, FORCED])
    names = ["transformers", "dense, our kernel", "dense, SDPA on our cache", "sketch, 5, window 8",
             "quest, 16, window 8", "h2o, 5, window 8 (evicts)", "sketch, above 1e-30, window 8"]  # fmt: skip
    assert list(rows) == names
    for result in rows.values():
        assert result["steps"] == ROUNDS * TURN
        assert result["step_ms_low"] <= result["step_ms"] <= result["step_ms_high"]
        assert result["ttft_s"] > 0
        assert result["over"]["transformers"] == pytest.approx(result["step_ms"] / rows["transformers"]["step_ms"])
    sparse = rows["sketch, 5, window 8"]
    # 2 layers, 2 rows, 2 KV heads of 16 float32 channels: 15 tokens, keys and values, and 6 bytes of sketch a token
    assert sparse["bytes_per_token"] - sparse["index_bytes"] == 2 * 2 * 2 * 15 * 2 * 16 * 4
    assert sparse["share_read"] < 0.4
    assert sparse["retrieved"] == pytest.approx(5)
    assert sparse["sparse_share"] == 1.0
    assert rows["transformers"]["kv_bytes"] == 2 * 2 * 2 * CONTEXT * 2 * 16 * 4
    assert sparse["ceiling_ms"] < rows["dense, our kernel"]["ceiling_ms"]
    # near: everything was read; far: it was not
    assert abs(rows["sketch, above 1e-30, window 8"]["kl"]) < 1e-6 < 1e-3 < sparse["kl"]
    assert rows["dense, SDPA on our cache"]["top1"] == 1.0
    assert "kl" not in rows["dense, our kernel"]


def test_sides_get_the_same_tokens_in_turns_and_dense_is_what_the_next_turn_stands_on(directory: str) -> None:
    _, ours, stock = measured(directory, [BITING])
    own = [(arguments["side"], arguments["at"], arguments["ids"]) for do, arguments in ours.asked if do == "turn"]
    others = [arguments["ids"] for do, arguments in stock.asked if do == "turn"]
    whole = setting(directory).ids
    for number in range(ROUNDS + 1):
        at = CONTEXT + number * TURN
        turn = own[3 * number : 3 * number + 3]
        piece = [row[at : at + TURN] for row in whole]
        assert [(start, ids) for _, start, ids in turn] == [(at, piece)] * 3
        assert others[number] == piece
        assert turn[-1][0] == 0, "dense has the last turn"
    # another side begins every time
    assert [own[0][0], own[3][0], own[6][0]] == [1, 1, 2]


def test_kl_is_that_of_the_fed_tokens_behind_a_dense_past(directory: str) -> None:
    rows, _, _ = measured(directory, [BITING])
    ids = torch.tensor(setting(directory).ids)
    dense = build("llama")(ids).logits.log_softmax(-1)
    total = []
    # not to the last digit: a side's index keeps the newest tokens as that side computed them
    for number in range(1, ROUNDS + 1):
        at = CONTEXT + number * TURN
        model = SparseAttention(BITING, build("llama"))
        with torch.no_grad():
            cache = model.prefill(ids[:, :at])
            for step in range(at, at + TURN):
                logp = model(ids[:, step : step + 1], past_key_values=cache).logits[:, -1].log_softmax(-1)
                total.append((dense[:, step].exp() * (dense[:, step] - logp)).sum(-1))
    assert rows["sketch, 5, window 8"]["kl"] == pytest.approx(float(torch.stack(total).mean()), rel=0.02)


def test_the_meters_are_no_part_of_a_sides_memory(directory: str) -> None:
    if not forget_peak():
        pytest.skip("this system cannot forget a peak")
    before = resident_bytes()
    Ours().load(directory, "float32", "cpu", torch.get_num_threads())
    # a tiny model: measuring the bandwidth in this process would take 256 MB
    assert peak_bytes() - before < 1 << 27


def test_the_ceiling_is_told_before_anything_is_timed(directory: str) -> None:
    told: list[Any] = []
    measured(directory, [BITING], told)
    at = next(number for number, what in enumerate(told) if not isinstance(what, str))
    ceiling = told[at]
    assert not [what for what in told[:at] if "first step" in str(what) or "turns" in str(what)]
    # a token's weights: all but the input embedding, which is not the output's in this model
    model = build("llama")
    tied = model.get_input_embeddings().weight is model.get_output_embeddings().weight
    weights = sum(weight.nbytes for weight in model.parameters())
    assert ceiling.weight_bytes == (weights if tied else weights - model.get_input_embeddings().weight.nbytes)
    assert ceiling.ms(0) == pytest.approx(ceiling.weight_bytes / ceiling.bandwidth_gb_s / 1e6)
    assert ceiling.near_bytes <= ceiling.dense_bytes


@pytest.mark.parametrize("lie", [{"threads": 7}, {"fingerprint": "other weights"}])
def test_sides_with_other_threads_or_weights_are_not_compared(directory: str, lie: dict[str, Any]) -> None:
    with pytest.raises(InputError, match=f"differ in {next(iter(lie))}"):
        measured(directory, [BITING], **lie)


def test_a_peer_that_fails_is_left_out_and_the_others_are_measured(directory: str) -> None:
    own, told = setting(directory), []

    def turn(at: int, ids: list[list[int]]) -> dict[str, Any]:
        if len(turns) == 2:
            raise WorkerError("it gave up")
        turns.append(at)
        return {"ms": [1.0] * TURN, "tokens": ids}

    turns: list[int] = []
    peers = [
        Side(own.cell("llama.cpp", {}), turn, facts={"ttft_s": 1.0}),
        Side(own.cell("openvino", {}), lambda at, ids: {"ms": [2.0] * TURN, "tokens": ids}, facts={"ttft_s": 1.0}),
    ]
    listener = Listener(told.append, lambda setting, ceiling: None, lambda done, total: None)
    rows = list(measure(own, [BITING], Here(Ours()), Here(Stock()), peers, listener))
    names = [label(cell) for cell, _ in rows]
    assert names == ["transformers", "openvino", "dense, our kernel", "dense, SDPA on our cache", "sketch, 5, window 8"]
    assert "left out: it gave up" in told
    assert dict(zip(names, (result["step_ms"] for _, result in rows), strict=True))["openvino"] == 2.0


def test_a_sparse_side_that_read_everything_is_refused(directory: str) -> None:
    with pytest.raises(InputError, match="dense would be compared with dense"):
        measured(directory, [AttentionConfig(5, None, 4, 2, dense_below=1000)])


def test_only_what_is_missing_and_can_be_sparse_is_measured(directory: str, tmp_path: Path) -> None:
    records, own = Records(tmp_path / "r.jsonl"), setting(directory)
    too_large = AttentionConfig(100, None, 4, 2, dense_below=0)
    assert missing(own, [*baselines(None), BITING, QUEST, too_large], records) == [BITING, QUEST]
    records.add("speed", own.cell("ours", as_cell(BITING)), {"step_ms": 1})
    assert missing(own, [BITING, QUEST], records) == [QUEST]


def test_the_command_measures_prints_records_and_does_not_measure_again(
    directory: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    text, out = tmp_path / "text.txt", tmp_path / "records" / "speed.jsonl"
    text.write_text("".join(chr(33 + (5 * i * i + 3 * i) % 90) for i in range(2000)))
    command = ["bench", "-m", directory, "-c", "400", "-p", "sketch", "-b", "16", "--rounds", "1", "--text", text]
    command += ["-o", out, "--threads", "1"]
    assert call(*command) == 0
    printed = capsys.readouterr().out
    assert printed.index("the ceiling") < printed.index("top1")
    for name in ("transformers", "dense, our kernel", "sketch, 16"):
        assert name in printed
    rows = Records(out).rows
    assert len(rows) == 4
    assert rows[0]["result"]["peak_bytes"] > 10**7
    assert call(*command) == 0
    captured = capsys.readouterr()
    assert "top1" not in captured.out
    assert "all in" in captured.err
    assert call("bench", "compare", out, out) == 0
    assert "sketch, 16" in capsys.readouterr().out
    assert call("bench", "-m", directory, "-c", 1020, "--text", text, "-o", out) == 1
    assert "--context 9" in capsys.readouterr().err


def test_a_worker_says_what_went_wrong() -> None:
    command = [sys.executable, "-m", "sparse_attention_decoder.measure.speed.worker", "ours"]
    request = {"do": "load", "model": "/nowhere", "dtype": "float32", "device": "cpu", "threads": 1}
    done = subprocess.run(command, input=json.dumps(request), capture_output=True, text=True, check=True)
    assert "ModelLoadError" in json.loads(done.stdout)["error"]
