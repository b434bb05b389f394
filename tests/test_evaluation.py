"""Quality runs: every cell once, dense beside sparse, the same prompts for all, and resumed where they stopped."""

import json
from pathlib import Path

import pytest
import torch
from test_decoder import TEMPLATE, tokenizer
from tiny import build

from sparse_attention_decoder import AttentionConfig, SparseAttention
from sparse_attention_decoder.errors import ContextLengthError, InputError
from sparse_attention_decoder.measure import evaluation
from sparse_attention_decoder.measure.evaluation import Evaluation, Listener
from sparse_attention_decoder.measure.record import Records
from sparse_attention_decoder.measure.tasks import Example
from sparse_attention_decoder.measure.texts import passages, texts

DENSE = AttentionConfig(policy="dense")
FEW = [
    AttentionConfig(5, None, 4, 2, policy, dense_below=0)
    for policy in ("sketch", "quest", "snapkv", "h2o", "streaming")
]
NOVEL = {"novel": "".join(chr(33 + (5 * i * i + 3 * i) % 90) for i in range(600))}


class Heard:
    def __init__(self) -> None:
        self.stages: list[str] = []
        self.rows: list[str] = []
        self.done: list[tuple[int, int]] = []

    @property
    def listener(self) -> Listener:
        return Listener(
            self.stages.append,
            lambda done, total: self.done.append((done, total)),
            lambda cell, result: self.rows.append(cell["config"]["policy"]),
        )


def evaluation_of(path: Path, configs: list[AttentionConfig], heard: Heard | None = None) -> Evaluation:
    decoder = SparseAttention(DENSE, build("llama"), tokenizer(TEMPLATE))
    return Evaluation(decoder, "tiny", configs, Records(path), (heard or Heard()).listener)


class Count:
    """A stand-in task, for the tiny tokenizer has a token a character: which number was said?"""

    def example(self, tokens, count, rng, sample, samples) -> Example:
        number = str(rng.randrange(100, 999))
        # filled up to the length that is asked for
        filler = "." * (tokens - 4 - count(f"{number}?="))
        return Example(number + filler, "?", "=", (number,), 4, sample / samples)


@pytest.fixture
def counting(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(evaluation, "resolve", lambda name: Count())


def test_agreement_has_a_row_per_context_and_config_and_runs_none_twice(tmp_path: Path) -> None:
    path, heard = tmp_path / "records.jsonl", Heard()
    evaluation_of(path, [DENSE, *FEW[:2]], heard).agreement(NOVEL, [60, 100], 16)
    rows = Records(path).rows
    assert [(row["cell"]["context"], row["cell"]["config"]["policy"]) for row in rows] == [
        (60, "sketch"), (60, "quest"), (100, "sketch"), (100, "quest"),
    ]  # fmt: skip
    assert heard.done[-1] == (3 * 16, 3 * 16)
    assert all(row["result"]["sparse_share"] == 1.0 for row in rows)
    again = Heard()
    evaluation_of(path, [DENSE, *FEW], again).agreement(NOVEL, [60, 100], 16)
    assert again.rows == ["snapkv", "h2o", "streaming"] * 2


def test_a_context_within_the_budget_has_no_row_for_that_config(tmp_path: Path) -> None:
    run = evaluation_of(tmp_path / "r.jsonl", [AttentionConfig(100, None, 4, 2, dense_below=0), FEW[0]])
    run.agreement(NOVEL, [60], 16)
    assert [row["cell"]["config"]["top_k"] for row in run.records.rows] == [5]


@pytest.mark.usefixtures("counting")
@pytest.mark.parametrize("format", ["base", "chat"])
def test_retrieval_asks_all_sides_the_same_and_dense_too(tmp_path: Path, format: str) -> None:
    path, heard = tmp_path / "records.jsonl", Heard()
    run = evaluation_of(path, [DENSE, *FEW], heard)
    run.retrieval(["vt", "cwe"], [100, 140], format, 2, 0)
    rows = run.records.rows
    assert len(rows) == 2 * 2 * 2 * 6
    groups: dict[tuple[object, ...], set[str]] = {}
    for row in rows:
        cell, result = row["cell"], row["result"]
        key = cell["task"], cell["length"], cell["sample"]
        groups.setdefault(key, set()).add(json.dumps([result["expected"], result["context_sha256"]]))
        assert 0.9 * cell["length"] <= result["context_tokens"] + result["steps"] <= cell["length"] + 1
        is_dense = cell["config"]["policy"] == "dense"
        # the question and the answer were decoded as the policy says
        assert result["sparse_share"] == (0.0 if is_dense else 1.0)
        assert (result["share_read"] == 1.0) == is_dense
    assert {len(prompts) for prompts in groups.values()} == {1}
    # another sample is another prompt
    assert len(set.union(*groups.values())) == len(groups)
    before = len(rows)
    evaluation_of(path, [DENSE, *FEW], again := Heard()).retrieval(["vt", "cwe"], [100, 140], format, 2, 0)
    assert (len(Records(path).rows), again.rows) == (before, [])


@pytest.mark.usefixtures("counting")
def test_the_score_is_that_of_the_text_written(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    run = evaluation_of(tmp_path / "r.jsonl", [DENSE])
    run.retrieval(["vt"], [100], "base", 1, 0)
    (row,) = run.records.rows
    model = run.decoder
    number = row["result"]["expected"][0]
    prompt = number + "." * (99 - len(number) - 4 - 3 + 1)
    # what plain transformers writes behind the same prompt
    ids = model.tokenizer(f"{prompt}", return_tensors="pt").input_ids[:, : row["result"]["context_tokens"]]
    asked = torch.cat([ids, model.tokenizer("? =", return_tensors="pt").input_ids], 1)
    plain = build("llama").generate(asked, max_new_tokens=4, do_sample=False)[0, asked.shape[1] :]
    assert row["result"]["prediction"] == model.tokenizer.decode(plain).strip()
    assert row["result"]["score"] == float(number in row["result"]["prediction"])


def test_answers_to_a_file_are_scored_with_dense_beside(tmp_path: Path) -> None:
    pytest.importorskip("rouge_score")
    file = tmp_path / "questions.jsonl"
    rows = [{"context": "abc " * 40, "input": "Which letters?", "answers": ["abc"]},
            {"context": "xyz " * 400, "input": "Which?", "answers": ["xyz", "x"]}]  # fmt: skip
    file.write_text("".join(json.dumps(row) + "\n" for row in rows))
    run = evaluation_of(tmp_path / "r.jsonl", [DENSE, FEW[0]])
    run.answers(file, "base")
    found = run.records.rows
    assert [(row["cell"]["sample"], row["cell"]["config"]["policy"]) for row in found] == [
        (0, "dense"), (0, "sketch"), (1, "dense"), (1, "sketch"),
    ]  # fmt: skip
    # the second document does not fit the model's 1,024 tokens: its middle is cut, for all sides alike
    assert [row["result"]["cut"] > 0 for row in found] == [False, False, True, True]
    assert all(0 <= row["result"][name] <= 1 for row in found for name in ("f1", "exact", "rouge_l"))
    assert found[3]["result"]["share_read"] < 0.2


def test_a_length_the_model_was_not_made_for_is_refused(tmp_path: Path) -> None:
    run = evaluation_of(tmp_path / "r.jsonl", FEW)
    with pytest.raises(ContextLengthError):
        run.agreement({"long": NOVEL["novel"] * 9}, [1020], 16)
    with pytest.raises(InputError, match="no task"):
        run.retrieval(["nonsense"], [100], "base", 1, 0)


def test_passages_come_from_the_middle_and_have_one_length() -> None:
    ids = passages({"a": "x" * 1000 + "y" * 1000, "b": "z" * 50}, lambda text: [ord(char) for char in text], 20)
    assert ids.shape == (2, 20)
    assert chr(ids[0, 0]) == "x" and chr(ids[1, 0]) == "z"
    with pytest.raises(InputError, match="b has 50 tokens, 60 are needed"):
        passages({"b": "z" * 50}, lambda text: [ord(char) for char in text], 60)


def test_every_python_has_long_texts(tmp_path: Path) -> None:
    reference, library = texts([]).values()
    assert "while" in reference and "import" in library
    # 32k tokens of any tokenizer
    assert min(len(reference), len(library)) > 32_000 * 6
    file = tmp_path / "latin.txt"
    file.write_bytes("naïve".encode("latin-1"))
    with pytest.raises(InputError, match="UTF-8"):
        texts([file])
