"""Session files: what was saved is what is loaded, and anything else is refused with its reason."""

import json
import os
import pickle
import shutil
import zlib
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import save_file
from test_session import DOCUMENT, GREEDY, chatty, lengths
from tiny import BITING, FORCED, build, prompt

from sparse_attention_decoder import AttentionConfig, Session, SparseAttention
from sparse_attention_decoder.cache import KVBuffer, Sketch
from sparse_attention_decoder.errors import SessionFileError, ShapeError, UnsupportedError
from sparse_attention_decoder.models import identity, session_file

QUESTIONS = ["Why?", "What?", "And since when has it been like that?"]


def answers(session: Session) -> list[tuple[int, ...]]:
    return [session.ask(question, **GREEDY).tokens for question in QUESTIONS]


@pytest.fixture
def saved(tmp_path: Path) -> Path:
    chatty().read(DOCUMENT).save(tmp_path / "document")
    return tmp_path / "document"


@pytest.mark.parametrize("policy", ["sketch", "dense", "window", "oracle", "quest", "streaming"])
@pytest.mark.parametrize(
    ("dtype", "kv_dtype"),
    [(torch.float32, None), (torch.bfloat16, None), (torch.float32, "int8"), (torch.bfloat16, "int4")],
)
def test_a_loaded_session_answers_as_the_saved_one(
    tmp_path: Path, policy: str, dtype: torch.dtype, kv_dtype: str | None
) -> None:
    config = AttentionConfig(**{**vars(BITING), "policy": policy, "kv_dtype": kv_dtype})
    session = (model := SparseAttention(config, build("llama", dtype))).read(prompt(1, 150))
    questions = [prompt(1, tokens, seed=tokens) for tokens in (1, 5, 40)]
    expected = [session.ask(question, **GREEDY).tokens for question in questions]
    session.save(tmp_path / "x")
    assert [session.ask(question, **GREEDY).tokens for question in questions] == expected
    # what the model would read a new document with does not matter
    for other in (model, SparseAttention(FORCED, build("llama", dtype))):
        loaded = Session.load(tmp_path / "x", other)
        assert torch.equal(loaded.ids, session.ids)
        assert [loaded.ask(question, **GREEDY) for question in reversed(questions)] == [
            session.ask(question, **GREEDY) for question in reversed(questions)
        ]
        assert [loaded.ask(question, **GREEDY).tokens for question in questions] == expected


@pytest.mark.parametrize("family", ["gemma3_text", "llama4_text", "gpt2", "qwen3_moe"])
def test_sliding_windows_are_saved_too(tmp_path: Path, family: str) -> None:
    session = (model := chatty(family=family)).read(DOCUMENT)
    expected = answers(session)
    session.save(tmp_path / "x")
    assert answers(Session.load(tmp_path / "x", model)) == expected


def test_what_a_file_does_not_hold_is_refused_when_saving(tmp_path: Path) -> None:
    for policy in ("snapkv", "h2o"):
        session = chatty(AttentionConfig(**{**vars(BITING), "policy": policy})).read(DOCUMENT)
        with pytest.raises(UnsupportedError, match=f"under policy {policy}"):
            session.save(tmp_path / "x")
    with pytest.raises(UnsupportedError, match="LinearAttention"):
        chatty(family="qwen3_next").read(DOCUMENT).save(tmp_path / "x")
    assert list(tmp_path.iterdir()) == []


def test_turns_are_saved_and_go_on(tmp_path: Path) -> None:
    for document in (DOCUMENT, None):
        session = (model := chatty()).read(document)
        session.ask("Hello!", 5, remember=True, do_sample=False)
        session.save(tmp_path / "x")
        loaded = Session.load(tmp_path / "x", model)
        assert torch.equal(loaded.ids, session.ids)
        for one in (session, loaded):
            one.ask("And?", 5, remember=True, do_sample=False)
        assert torch.equal(loaded.ids, session.ids)
        assert answers(loaded) == answers(session)


@pytest.mark.parametrize("tokens", [1, 2, 7, 15, 16, 17, 18])
@pytest.mark.parametrize("kv_dtype", [None, "int4"])
def test_short_documents_are_saved_too(tmp_path: Path, tokens: int, kv_dtype: str | None) -> None:
    config = AttentionConfig(**{**vars(BITING), "kv_dtype": kv_dtype})
    session = (model := SparseAttention(config, build("llama"))).read(prompt(1, tokens))
    for _ in range(2):
        session.save(tmp_path / "x")
        loaded = Session.load(tmp_path / "x", model)
        question = prompt(1, 30, seed=1)
        assert loaded.ask(question, **GREEDY) == session.ask(question, **GREEDY)


def test_nothing_is_coded_again_and_nothing_is_copied(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    # statistics are fitted anew only where the context reaches 121 tokens, from 97 on
    (model := chatty()).read(prompt(1, 101)).save(saved := tmp_path / "x")
    before, held = saved.read_bytes(), 100
    session = Session.load(saved, model)
    starts: list[int] = []
    kernels = type(session._cache.layers[0].state.kernels)
    encode = kernels.encode

    def counted(self: Any, keys: Any, coded: Any, start: int) -> None:
        starts.append(start)
        encode(self, keys, coded, start)

    monkeypatch.setattr(kernels, "encode", counted)
    buffers = [layer.state.buffer for layer in session._cache.layers]
    places = [(buffer.keys.data_ptr(), buffer.values.data_ptr()) for buffer in buffers]
    for tokens in (1, 10):
        session.ask(prompt(1, tokens), **GREEDY)
    assert starts and min(starts) >= held
    assert places == [(buffer.keys.data_ptr(), buffer.values.data_ptr()) for buffer in buffers]
    assert saved.read_bytes() == before


def test_more_than_the_room_in_a_file_is_copied_and_answers_the_same(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    expected = answers((model := chatty()).read(DOCUMENT))
    for spare in (0, 1, 16, 17):
        monkeypatch.setattr(session_file, "SPARE", spare)
        model.read(DOCUMENT).save(tmp_path / "x")
        assert answers(Session.load(tmp_path / "x", model)) == expected


def test_a_file_is_safetensors_with_a_name_for_everything(saved: Path) -> None:
    with safe_open(saved, framework="pt") as file:
        about, names = file.metadata(), set(file.keys())
        ids = file.get_tensor("ids")
        keys = file.get_tensor("1.keys")
    session = chatty().read(DOCUMENT)
    assert torch.equal(ids, session.ids)
    assert {f"1.{name}" for name in ("keys", "values", "codes", "factors", "mean", "deviation")} < names
    assert about["format"] == "2" and AttentionConfig.from_json(about["attention"]) == BITING
    held = session.ids.shape[1] - 1
    assert torch.equal(keys[:, :, :held], session._cache.layers[1].keys)
    # what earlier questions left in memory stays there
    assert not keys[:, :, held:].any()


def test_what_was_asked_before_saving_is_not_in_the_file(tmp_path: Path) -> None:
    for asked in (False, True):
        session = chatty().read(DOCUMENT)
        if asked:
            answers(session)
        session.save(tmp_path / str(asked))
    assert (tmp_path / "True").read_bytes() == (tmp_path / "False").read_bytes()


def test_every_changed_byte_and_every_cut_is_refused(saved: Path) -> None:
    model, whole = chatty(), saved.read_bytes()
    head = 8 + int.from_bytes(whole[:8], "little")
    for place in (*range(0, head, 97), *range(head, len(whole), len(whole) // 97), len(whole) - 1):
        saved.write_bytes(whole[:place] + bytes([whole[place] ^ 4]) + whole[place + 1 :])
        with pytest.raises(SessionFileError, match=r"damaged|session file|cut short|has format"):
            Session.load(saved, model)
    for size in (0, 7, 8, 100, 1000):
        saved.write_bytes(whole[:size])
        with pytest.raises(SessionFileError, match="no session file"):
            Session.load(saved, model)
    for size in (head, len(whole) // 2, len(whole) - 1):
        saved.write_bytes(whole[:size])
        with pytest.raises(SessionFileError, match=f"cut short: {size} of {len(whole)} bytes"):
            Session.load(saved, model)
    saved.write_bytes(whole + b"\0")
    with pytest.raises(SessionFileError, match="damaged"):
        Session.load(saved, model)
    saved.write_bytes(whole)
    Session.load(saved, model)


@pytest.mark.parametrize("size", [5, 1000, 4096, 5000, 100_000])
def test_the_checksum_of_a_large_file_is_of_samples_from_end_to_end(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, size: int
) -> None:
    monkeypatch.setattr(session_file, "_SAMPLES", 16)
    monkeypatch.setattr(session_file, "_SAMPLE_BYTES", 256)
    path, data = tmp_path / "x", bytearray(os.urandom(size + 4))

    def checksum() -> bytes:
        path.write_bytes(data)
        with path.open("rb") as file:
            return session_file._checksum(file)

    first = checksum()
    noticed = []
    for place in (0, size - 1, *range(1, size, max(1, size // 300))):
        data[place] ^= 1
        noticed.append(checksum() != first)
        data[place] ^= 1
    assert noticed[0] and noticed[1]
    assert all(noticed) == (size <= 4096)
    # what is not sampled is no longer than a gap between two samples
    assert sum(noticed) / len(noticed) > min(1, 0.9 * 4096 / size) - 1e-9


def rewritten(path: Path, change: Callable[[dict[str, Any]], None]) -> None:
    """Change a file's head, and make its checksum right again."""
    whole = path.read_bytes()
    end = 8 + int.from_bytes(whole[:8], "little")
    header = json.loads(whole[8:end])
    change(header)
    head = json.dumps(header).encode()
    body = len(head).to_bytes(8, "little") + head + whole[end:-4]
    path.write_bytes(body + bytes(4))
    with path.open("rb") as file:
        checksum = session_file._checksum(file)
    path.write_bytes(body + checksum)


def test_another_format_and_what_this_version_does_not_understand_are_refused(saved: Path) -> None:
    model, whole = chatty(), saved.read_bytes()

    def says(match: str, change: Callable[[dict[str, Any]], None]) -> None:
        saved.write_bytes(whole)
        rewritten(saved, change)
        with pytest.raises(SessionFileError, match=match):
            Session.load(saved, model)

    about = "__metadata__"
    says("has format 3, this version reads 1 and 2", lambda header: header[about].update(format="3"))
    says("unknown key 'new'", lambda header: header[about].update(attention='{"new": 1}'))
    says("does not understand", lambda header: header[about].update(frame='{"new": 1}'))
    says("does not understand", lambda header: header[about].update(tokens="9999"))
    says("does not understand", lambda header: header["1.codes"].update(dtype="I8"))
    says("does not understand", lambda header: header["1.keys"].update(shape=header["1.keys"]["shape"][::-1]))
    says("does not understand", lambda header: header.update({"1.kays": header.pop("1.keys")}))
    says("no session file", lambda header: header[about].pop("kind"))
    says("no session file", lambda header: header.pop(about))
    says("no session file", lambda header: header.update({"1.keys": 3}))
    for known in ("1", "2"):
        saved.write_bytes(whole)
        rewritten(saved, lambda header, known=known: header[about].update(format=known))
        Session.load(saved, model)


def test_foreign_files_are_refused_and_never_unpickled(tmp_path: Path, saved: Path) -> None:
    class Bomb:
        def __reduce__(self) -> Any:
            return os.mkdir, (str(tmp_path / "exploded"),)

    path = tmp_path / "x"
    path.write_bytes(pickle.dumps(Bomb()))
    foreign = [path, tmp_path / "torch", tmp_path / "weights", tmp_path / "text"]
    torch.save({"x": torch.zeros(3)}, foreign[1])
    save_file({"x": torch.zeros(3)}, foreign[2])
    foreign[3].write_text("[" * 200_000)
    for path in foreign:
        with pytest.raises(SessionFileError, match="no session file"):
            Session.load(path, chatty())
    assert not (tmp_path / "exploded").exists()
    for path in (tmp_path / "nothing", tmp_path):
        with pytest.raises(SessionFileError, match="cannot read"):
            Session.load(path, chatty())


def test_another_model_is_refused_a_fine_tune_too(saved: Path) -> None:
    for other in (chatty(rope_theta=5.0), chatty(family="qwen2"), chatty(num_hidden_layers=3)):
        with pytest.raises(SessionFileError, match="another architecture"):
            Session.load(saved, other)
    for number, _ in enumerate(chatty().model.named_parameters()):
        tuned = chatty()
        changed = list(tuned.model.parameters())[number].data.view(-1)
        changed[changed.numel() // 2] += 1e-3
        with pytest.raises(SessionFileError, match="other weights"):
            Session.load(saved, tuned)
    with pytest.raises(SessionFileError, match=r"another architecture|other weights"):
        Session.load(saved, SparseAttention(BITING, build("llama", torch.bfloat16)))


def test_a_fingerprint_is_of_the_weights_alone(tmp_path: Path) -> None:
    model = build("llama")
    expected = identity.weights(model), identity.architecture(model.config)
    model.save_pretrained(tmp_path)
    again = SparseAttention.from_pretrained(tmp_path).model
    again.config._name_or_path = "elsewhere"
    assert (identity.weights(again), identity.architecture(again.config)) == expected
    weight = model.model.layers[0].mlp.up_proj.weight
    # the same numbers where no word of eight bytes begins
    weight.data = torch.cat([torch.zeros(1), weight.data.flatten()])[1:].view_as(weight)
    assert identity.weights(model) == expected[0]


@pytest.mark.parametrize("moment", ["_write", "fsync", "replace"])
def test_a_failure_while_saving_leaves_the_old_file_and_no_draft(
    saved: Path, monkeypatch: pytest.MonkeyPatch, moment: str
) -> None:
    before = saved.read_bytes()
    session = chatty().read(prompt(1, 40))

    def full(*args: Any) -> None:
        if moment == "_write":
            args[0].write(b"half of it")
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(session_file if moment == "_write" else session_file.os, moment, full)
    with pytest.raises(SessionFileError, match="No space left"):
        session.save(saved)
    monkeypatch.undo()
    assert saved.read_bytes() == before
    assert list(saved.parent.iterdir()) == [saved]
    session.save(saved)
    assert torch.equal(Session.load(saved, chatty()).ids, prompt(1, 40))
    with pytest.raises(SessionFileError, match="cannot write"):
        session.save(saved.parent / "no" / "such" / "folder")


def test_a_file_may_be_replaced_while_a_session_lives_in_it(saved: Path) -> None:
    loaded = Session.load(saved, model := chatty())
    expected = answers(loaded)
    model.read(prompt(1, 30)).save(saved)
    assert answers(loaded) == expected
    loaded.save(saved)
    assert answers(Session.load(saved, model)) == expected


def test_a_copy_elsewhere_is_the_same_session(saved: Path, tmp_path: Path) -> None:
    shutil.copyfile(saved, tmp_path / "copy")
    assert zlib.crc32((tmp_path / "copy").read_bytes()) == zlib.crc32(saved.read_bytes())
    assert answers(Session.load(tmp_path / "copy", chatty())) == answers(Session.load(saved, chatty()))


def test_saving_while_an_answer_is_streamed_is_refused(saved: Path) -> None:
    session = chatty().read(DOCUMENT)
    stream = session.stream("Why?", 800, do_sample=False)
    next(stream)
    with pytest.raises(UnsupportedError, match="another question"):
        session.save(saved)
    stream.close()
    session.save(saved)
    assert lengths(session) == {session.ids.shape[1] - 1}


@pytest.mark.parametrize("tokens", [1, 8, 16, 100])
def test_buffer_and_sketch_give_and_take_what_they_hold(tokens: int) -> None:
    model = chatty()
    layer = model.prefill(prompt(1, tokens)).layers[0]
    keys, values = layer.keys, layer.values
    given = {name: torch.cat([held, held[:, :, -1:]], 2) for name, held in layer.state.buffer.tensors().items()}
    buffer = KVBuffer()
    buffer.adopt(given, tokens, torch.float32)
    assert torch.equal(buffer.keys, keys) and torch.equal(buffer.values, values)
    assert buffer.capacity == tokens + 1
    with pytest.raises(ShapeError, match="no room for"):
        buffer.adopt(given, tokens + 2, torch.float32)
    sketch = layer.state.policy.new_index(layer.state.kernels, layer.state.config)
    assert isinstance(sketch, Sketch)
    sketch.catch_up(keys, session_file.Rows.full(1, tokens), tokens)
    other = Sketch(layer.state.kernels, 2)
    stored = {name: held for name, (held, _) in sketch.tensors(0).items()}
    other.adopt(stored, keys)
    assert all(torch.equal(held, other.tensors(0)[name][0]) for name, held in stored.items())
    for name, held in stored.items():
        for wrong in (held[..., :1], held.to(torch.complex64), held[:, :1]):
            with pytest.raises(ShapeError, match="does not fit"):
                other.adopt({**stored, name: wrong}, keys)


@pytest.mark.parametrize("form", ["int8", "int4"])
def test_packed_weights_tell_models_apart(tmp_path: Path, form: str) -> None:
    own, other = build("llama"), build("llama")
    with torch.no_grad():
        # every norm, and all but one matrix, are the same
        other.model.layers[1].mlp.up_proj.weight.mul_(1.5)
    SparseAttention(BITING, own, weights=form).read(prompt(1, 40)).save(tmp_path / "x")
    with pytest.raises(SessionFileError, match="other weights"):
        Session.load(tmp_path / "x", SparseAttention(BITING, other, weights=form))
    Session.load(tmp_path / "x", SparseAttention(BITING, build("llama"), weights=form))
