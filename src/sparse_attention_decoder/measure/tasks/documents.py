"""Question answering over documents of a local file, in the form of LongBench or of L-Eval.

Sources: LongBench, arXiv:2308.14508 (its instruction for questions, its normalisation of answers and
its cut in the middle); L-Eval, arXiv:2307.11088 (its form).
"""

import json
import re
import string
from collections import Counter
from collections.abc import Iterator
from functools import cache
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from sparse_attention_decoder.errors import InputError
from sparse_attention_decoder.measure.tasks.extra import extra
from sparse_attention_decoder.measure.tasks.protocol import Example

_NEW_TOKENS = 64
_PUNCTUATION = str.maketrans("", "", string.punctuation)
_ARTICLES = re.compile(r"\b(a|an|the)\b")


def load(path: str | Path) -> list[Example]:
    """An example per question of a JSON-lines file, in the file's order.

    A line is an object of LongBench's form (context, input or question, and a list of answers that are
    all right) or of L-Eval's (input, the document; instructions, a list of questions; outputs, an answer
    for each). Other keys are left alone; empty lines too.

    Raises:
        InputError: no such file, or a line that is not of either form; the message names the line.
    """
    try:
        text = Path(path).read_text("utf-8-sig")
    except (OSError, UnicodeDecodeError) as error:
        raise InputError(f"cannot read {path}: {error}; expected a UTF-8 text file of JSON lines") from error
    examples: list[Example] = []
    # not splitlines: JSON may hold line separators that are not line feeds
    for number, line in enumerate(text.split("\n"), start=1):
        if line.strip():
            examples += _examples(line, f"{path}, line {number}")
    if not examples:
        raise InputError(f"{path} holds no question; expected a JSON object a line")
    return examples


def scores(prediction: str, answers: tuple[str, ...]) -> dict[str, float]:
    """f1, exact and rouge_l, each the best over the answers, 0 to 1.

    f1 and exact compare words without case, punctuation and articles (SQuAD, LongBench); rouge_l is
    the F-measure of the longest common subsequence. Both split at spaces: for English and the like.

    Raises:
        UnsupportedError: the package rouge-score is missing.
    """
    words = _normal(prediction)
    normal = [_normal(answer) for answer in answers]
    return {
        "f1": max(_f1(words, other) for other in normal),
        "exact": float(words in normal),
        "rouge_l": max(_rouge().score(answer, prediction)["rougeL"].fmeasure for answer in answers),
    }


def cut_middle(context_ids: Tensor, most: int) -> tuple[Tensor, int]:
    """A context [1, T] of at most `most` tokens, and how many were cut out of its middle.

    As LongBench does: the first half and the last half of what is allowed are kept, for a document's
    beginning and end say the most.
    """
    cut = max(0, context_ids.shape[1] - most)
    if cut == 0:
        return context_ids, 0
    head = most // 2
    return torch.cat([context_ids[:, :head], context_ids[:, head + cut :]], dim=1), cut


def _examples(line: str, place: str) -> Iterator[Example]:
    try:
        row = json.loads(line)
    except (ValueError, RecursionError) as error:
        raise InputError(f"{place} is not JSON: {error}") from error
    if not isinstance(row, dict):
        raise InputError(f"{place} holds a {type(row).__name__}; expected an object")
    if "instructions" in row:
        document = _text(row, "input", place)
        questions, outputs = _texts(row, "instructions", place), _texts(row, "outputs", place)
        if len(questions) != len(outputs):
            raise InputError(
                f"{place} has {len(questions)} instructions and {len(outputs)} outputs; expected a pair each"
            )
        yield from (_example(document, *pair) for pair in zip(questions, outputs, strict=True))
    elif "context" in row:
        question = _text(row, "question" if "question" in row else "input", place)
        yield _example(_text(row, "context", place), question, *_texts(row, "answers", place))
    else:
        raise InputError(
            f"{place} has the keys {', '.join(sorted(row)) or 'of nothing'}; expected context, input and answers "
            "(LongBench) or input, instructions and outputs (L-Eval)"
        )


def _example(document: str, question: str, *answers: str) -> Example:
    return Example(
        context=f"Read the following text and answer briefly.\n\n{document}",
        question=(
            "\n\nNow, answer the following question based on the above text, only give me the answer and do not "
            f"output any other words.\n\nQuestion: {question.strip()}\n"
        ),
        prefix="Answer:",
        answers=answers,
        new_tokens=_NEW_TOKENS,
        depth=None,
    )


def _text(row: dict[str, Any], key: str, place: str) -> str:
    value = row.get(key)
    if not isinstance(value, str) or not value.strip():
        raise InputError(f"{place}: {key} is {_shown(value)}; expected a text")
    return value


def _texts(row: dict[str, Any], key: str, place: str) -> list[str]:
    values = row.get(key)
    if not isinstance(values, list) or not values or not all(isinstance(value, str) and value for value in values):
        raise InputError(f"{place}: {key} is {_shown(values)}; expected a list of texts")
    return values


def _shown(value: object) -> str:
    shown = json.dumps(value)
    return shown if len(shown) <= 60 else f"{shown[:60]}..."


def _normal(text: str) -> list[str]:
    return _ARTICLES.sub(" ", text.lower().translate(_PUNCTUATION)).split()


def _f1(words: list[str], expected: list[str]) -> float:
    if not words and not expected:
        return 1.0
    common = sum((Counter(words) & Counter(expected)).values())
    return 2 * common / (len(words) + len(expected))


@cache
def _rouge() -> Any:
    return extra("rouge_score.rouge_scorer").RougeScorer(["rougeL"])
