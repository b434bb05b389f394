"""sparse-decoder as a user types it, on a tiny model saved to a directory."""

import json
import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest
from test_decoder import TEXT, tokenizer
from tiny import build

from sparse_attention_decoder import SparseAttention
from sparse_attention_decoder.cli import main
from sparse_attention_decoder.measure.record import Records
from sparse_attention_decoder.tables import POLICIES

SPARSE = ["--top-k", "5", "--threshold", "0", "--window", "4", "--sinks", "2", "--dense-below", "0"]


@pytest.fixture(scope="module")
def directory(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("tiny")
    build("llama").save_pretrained(folder)
    # a streamer holds text back until a space follows
    tokenizer(spaced=True).save_pretrained(folder)
    return folder


def run(*arguments: object) -> int:
    """Call the entry point in this process; its exit status."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(sys, "argv", ["sparse-decoder", *map(str, arguments)])
        try:
            main()
        except SystemExit as stop:
            return int(stop.code or 0)
    return 0


def test_generate_prints_the_text_and_nothing_else(directory: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert run("generate", TEXT, "-m", directory, "-n", 12, *SPARSE) == 0
    printed = capsys.readouterr().out
    model = SparseAttention.from_pretrained(directory)
    expected = model.complete(TEXT, max_new_tokens=12, do_sample=False)
    # the config differs from the default, so only the shape of the output is the same
    assert len(printed) == len(expected) + 1
    assert run("generate", TEXT, "-m", directory, "-n", 12, "--dense") == 0
    assert capsys.readouterr().out == expected + "\n"


def test_lossless_prints_the_text_of_dense_decoding_and_what_it_took(
    directory: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert run("generate", TEXT, "-m", directory, "-n", 12, "--dense") == 0
    dense = capsys.readouterr().out
    assert run("generate", TEXT, "-m", directory, "-n", 12, "--lossless", *SPARSE) == 0
    printed = capsys.readouterr()
    assert printed.out == dense
    assert "lossless: 11 tokens in" in printed.err
    for other in ("--dense", "--compare"):
        assert run("generate", TEXT, "-m", directory, "--lossless", other) == 1
        assert f"{other} and --lossless" in capsys.readouterr().err


def test_generate_writes_what_each_step_and_layer_read(
    directory: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    file = tmp_path / "steps.jsonl"
    dial = ["--window", "4", "--sinks", "2", "--dense-below", "0", "--missing-mass", "0.3", "--threshold", "0.02"]
    assert run("generate", TEXT, "-m", directory, "-n", 6, *dial, "--stats", file) == 0
    rows = [json.loads(line) for line in file.read_text("utf-8").splitlines()]
    assert [(row["step"], row["layer"]) for row in rows] == [(step, layer) for step in range(5) for layer in range(2)]
    assert "5 decode steps, 2 layers" in capsys.readouterr().err
    assert run("generate", TEXT, "-m", directory, "-n", 2, "--stats", tmp_path) == 1
    assert "cannot write" in capsys.readouterr().err


def test_a_preset_and_a_value_that_it_sets_exclude_each_other(
    directory: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert run("generate", TEXT, "-m", directory, "-n", 2, "--quality", "firm") == 0
    assert run("generate", TEXT, "-m", directory, "-n", 2, "--quality", "firm", "--threshold", "0.5") == 1
    assert "sets threshold" in capsys.readouterr().err


def test_the_prompt_may_come_from_a_file_or_standard_input(
    directory: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    file = tmp_path / "prompt.txt"
    file.write_text(TEXT)
    assert run("generate", "--file", file, "-m", directory, "-n", 8) == 0
    from_file = capsys.readouterr().out
    piped = subprocess.run(
        [sys.executable, "-m", "sparse_attention_decoder.cli", "generate", "-m", directory, "-n", "8"],
        input=TEXT,
        capture_output=True,
        text=True,
        check=True,
    )
    assert piped.stdout == from_file


def test_compare_shows_speed_bytes_and_agreement(directory: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert run("generate", TEXT, "-m", directory, "-n", 10, "--compare", *SPARSE) == 0
    printed = capsys.readouterr().out
    for expected in ("prompt: 90 tokens", "transformers, dense", "ours, dense", "ours, sparse", "agreement: the first"):
        assert expected in printed
    avoided = float(printed.split("sparse avoided ")[1].split("%")[0])
    assert 60 < avoided < 95


def test_compare_says_which_sides_are_compiled(
    directory: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    asked: list[object] = []
    monkeypatch.setattr("sparse_attention_decoder.models.compiled.install", lambda *given: asked.append(given))
    assert run("generate", TEXT, "-m", directory, "-n", 4, "--compare", "--compile", *SPARSE) == 0
    printed = capsys.readouterr().out
    assert len(asked) == 1
    for expected in ("transformers, dense  ", "ours, dense, compiled", "ours, sparse, compiled"):
        assert expected in printed


def test_eval_records_how_weights_keys_and_values_are_packed(
    directory: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    text, out = tmp_path / "text.txt", tmp_path / "quality.jsonl"
    text.write_text(TEXT * 3)
    asked = ["eval", "agreement", "-m", directory, "-c", 64, "--steps", 16, "--text", text, "-o", out]
    asked += ["--policy", "sketch", "--budget", 8, "--window", 4]
    forms = [[], ["--weights", "int8"], ["--kv-dtype", "int8"], ["--weights", "int4", "--kv-dtype", "int4"]]
    for form in forms:
        assert run(*asked, *form) == 0
    cells = [row["cell"] for row in Records(out).rows]
    assert [(cell.get("weights"), cell["config"].get("kv_dtype"), cell["dtype"]) for cell in cells] == [
        (None, None, "float32"), ("int8", None, "bfloat16"), (None, "int8", "float32"), ("int4", "int4", "bfloat16"),
    ]  # fmt: skip
    assert "sketch, 8, window 4 (int4 weights, int4 KV)" in capsys.readouterr().out
    # nothing is measured twice, and nothing taken for another
    assert run(*asked, *forms[3]) == 0 and len(Records(out).rows) == 4
    assert run(*asked, "--weights", "int8", "--dtype", "float32") == 1
    assert "go with dtype=torch.bfloat16" in capsys.readouterr().err


def test_demo_runs_on_any_model(directory: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert run("demo", "--tokens", 300, "-n", 4, "-m", directory) == 0
    assert "KV bytes read" in capsys.readouterr().out


def test_doctor_prints_the_facts(capsys: pytest.CaptureFixture[str]) -> None:
    assert run("doctor") == 0
    printed = capsys.readouterr().out
    assert "backend reference" in printed
    assert "torch" in printed


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        (["generate", ""], "prompt is empty"),
        (["generate", "x" * 2000], "exceed the model's context of 1024"),
        (["generate", "x", "--top-k", "0"], "top_k is 0"),
        (["generate", "x", "--window", "0"], "attention_window is 0"),
        (["generate", "x", "--threshold", "2"], "threshold is 2.0"),
        (["generate", "x", "--dense-below", "some"], "expected a number of tokens, or auto"),
        (["generate", "x", "--policy", "none"], "policy is 'none'"),
        (["generate", "x", "--dense", "--compare"], "exclude each other"),
        (["generate", "--file", "/no/such/file"], "cannot read /no/such/file"),
        (["demo", "--tokens", "100000000"], "ask for at most"),
    ],
)
def test_wrong_input_ends_with_one_line_and_status_one(
    directory: Path, capsys: pytest.CaptureFixture[str], arguments: list[str], says: str
) -> None:
    assert run(*arguments, "-m", directory) == 1
    captured = capsys.readouterr()
    assert says in " ".join(captured.err.split())
    assert "Traceback" not in captured.err
    assert captured.out == ""


def test_a_model_that_is_not_there_ends_with_one_line(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert run("generate", "hello", "-m", tmp_path) == 1
    assert str(tmp_path) in capsys.readouterr().err.replace("\n", "")


def test_wrong_options_are_refused_by_name(capsys: pytest.CaptureFixture[str]) -> None:
    assert run("generate", "x", "--no-such-option") == 2
    assert "--no-such-option" in capsys.readouterr().err


@pytest.mark.parametrize("command", ["generate", "demo", "doctor"])
def test_every_command_and_option_has_help(command: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert run("--help") == 0
    assert command in capsys.readouterr().out
    assert run(command, "--help") == 0
    lines = capsys.readouterr().out.splitlines()
    for line in (line for line in lines if line.strip().startswith(("│ --", "│    --"))):
        assert len(line.split("  ")) > 1, line


def test_help_names_every_policy(capsys: pytest.CaptureFixture[str]) -> None:
    assert run("generate", "--help") == 0
    printed = capsys.readouterr().out
    assert [name for name in POLICIES if name not in printed] == []


def test_ctrl_c_ends_cleanly(directory: Path) -> None:
    command = [sys.executable, "-m", "sparse_attention_decoder.cli", "generate", TEXT, "-m", directory, "-n", "900"]
    environment = {**os.environ, "PYTHONUNBUFFERED": "1", "OMP_NUM_THREADS": "1"}

    def heed() -> None:
        # a shell's background jobs are born deaf to it
        signal.signal(signal.SIGINT, signal.SIG_DFL)

    process = subprocess.Popen(
        command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, env=environment, preexec_fn=heed
    )
    assert process.stdout is not None
    # the first character says that tokens are coming
    process.stdout.read(1)
    process.send_signal(signal.SIGINT)
    _, errors = process.communicate(timeout=60)
    assert process.returncode == 130, errors
    assert "stopped" in errors
    assert "Traceback" not in errors
