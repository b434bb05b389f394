"""read, ask and chat as a user types them."""

import io
import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest
from test_cli import SPARSE, run
from test_decoder import TEXT, tokenizer
from test_session import CHAT
from tiny import build

from sparse_attention_decoder import Session, SparseAttention

LONG = ["-m", "sparse_attention_decoder.cli"]


@pytest.fixture(scope="module")
def directory(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("tiny")
    build("llama").save_pretrained(folder)
    # a streamer holds text back until a space follows
    tokenizer(CHAT, spaced=True).save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def kept(directory: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("kept")
    (folder / "document.txt").write_text(TEXT)
    assert run("read", folder / "document.txt", "--out", folder / "x.session", "-m", directory, *SPARSE) == 0
    return folder / "x.session"


def test_read_says_what_it_read_and_keeps_it_with_its_settings(
    directory: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "document.txt").write_text(TEXT)
    assert run("read", tmp_path / "document.txt", "-o", tmp_path / "x", "-m", directory, *SPARSE) == 0
    printed = capsys.readouterr().out
    session = Session.load(tmp_path / "x", SparseAttention.from_pretrained(directory))
    assert printed.startswith(f"{tmp_path / 'x'}: {session.ids.shape[1]} tokens, read in ")
    assert session._cache.config.top_k == 5


def test_ask_prints_the_answer_and_nothing_else(
    directory: Path, kept: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    before = kept.read_bytes()
    for _ in range(2):
        assert run("ask", kept, "Why?", "-m", directory, "-n", 9) == 0
        session = Session.load(kept, SparseAttention.from_pretrained(directory))
        assert capsys.readouterr().out == f"{session.ask('Why?', 9, do_sample=False)}\n"
    assert kept.read_bytes() == before


@pytest.mark.parametrize("with_document", [True, False])
def test_chat_remembers_its_turns_and_ends_with_quit_or_the_end(
    directory: Path,
    kept: Path,
    with_document: bool,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    model = SparseAttention.from_pretrained(directory)
    session = Session.load(kept, model) if with_document else model.read(None)
    lines = ["Hello!", "And you?", "Why?"]
    expected = "".join(f"{session.ask(line, 6, remember=True, do_sample=False)}\n" for line in lines)
    before = kept.read_bytes()
    for end in ("", "/quit\nnever read\n", " /quit "):
        monkeypatch.setattr("sys.stdin", io.StringIO("Hello!\n\n  \nAnd you?\nWhy?\n" + end))
        capsys.readouterr()
        assert run("chat", *([kept] if with_document else []), "-m", directory, "-n", 6) == 0
        assert capsys.readouterr().out == expected
    assert kept.read_bytes() == before


def test_a_message_too_long_does_not_end_the_chat(
    directory: Path, kept: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    answers = []
    for first in ("", "x" * 2000 + "\n"):
        monkeypatch.setattr("sys.stdin", io.StringIO(first + "Why?\n"))
        assert run("chat", kept, "-m", directory, "-n", 6) == 0
        answers.append(capsys.readouterr())
    assert answers[0].out == answers[1].out
    assert "exceed the model's context of 1024" in " ".join(answers[1].err.split())


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        (["read", "/no/such/file", "-o", "x"], "cannot read /no/such/file"),
        (["read", "{text}", "-o", "/no/such/folder/x"], "cannot write /no/such/folder/x"),
        (["read", "{text}", "-o", "{folder}"], "give the name of a file"),
        (["read", "{empty}", "-o", "{folder}/x"], "document is empty"),
        (["read", "{long}", "-o", "{folder}/x"], "exceed the model's context of 1024"),
        (["read", "{text}", "-o", "{folder}/x", "--policy", "snapkv"], "cannot be saved under policy snapkv"),
        (["read", "{text}", "-o", "{folder}/x", "--top-k", "0"], "top_k is 0"),
        (["ask", "{folder}/nothing", "Why?"], "cannot read"),
        (["ask", "{text}", "Why?"], "no session file"),
        (["ask", "{kept}", " "], "question is empty"),
        (["ask", "{kept}", "Why?", "-n", "1000"], "exceed the model's context of 1024"),
        (["chat", "{text}"], "no session file"),
    ],
)
def test_wrong_input_ends_with_one_line_and_status_one(
    directory: Path, kept: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], arguments: list[str], says: str
) -> None:
    for name, text in (("text", TEXT), ("empty", "\n"), ("long", "x" * 2000)):
        (tmp_path / name).write_text(text)
    places = {name: tmp_path / name for name in ("text", "empty", "long")}
    capsys.readouterr()
    assert run(*(part.format(folder=tmp_path, kept=kept, **places) for part in arguments), "-m", directory) == 1
    captured = capsys.readouterr()
    assert says in " ".join(captured.err.split())
    assert "Traceback" not in captured.err
    assert captured.out == ""
    assert {path.name for path in tmp_path.iterdir()} == {"text", "empty", "long"}


@pytest.mark.parametrize("command", ["read", "ask", "chat"])
def test_every_command_and_option_has_help(command: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert run("--help") == 0
    assert command in capsys.readouterr().out
    assert run(command, "--help") == 0
    lines = capsys.readouterr().out.splitlines()
    for line in (line for line in lines if line.strip().startswith(("│ --", "│    --", "│ *"))):
        assert len(line.split("  ")) > 1, line


def test_ctrl_c_ends_an_answer_and_not_the_chat(directory: Path, kept: Path) -> None:
    command = [sys.executable, *LONG, "chat", kept, "-m", directory, "-n", "800"]
    environment = {**os.environ, "PYTHONUNBUFFERED": "1", "OMP_NUM_THREADS": "1"}

    def heed() -> None:
        signal.signal(signal.SIGINT, signal.SIG_DFL)

    process = subprocess.Popen(
        command,
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        env=environment,
        preexec_fn=heed,
    )
    assert process.stdin is not None and process.stdout is not None
    process.stdin.write("Why?\n")
    process.stdin.flush()
    # the first character says that tokens are coming
    process.stdout.read(1)
    process.send_signal(signal.SIGINT)
    output, errors = process.communicate("/quit\n", timeout=60)
    assert process.returncode == 0, errors
    assert "this turn is forgotten" in errors
    assert "Traceback" not in errors
