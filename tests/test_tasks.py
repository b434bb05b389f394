"""Tasks over long texts: examples as claimed, of the length asked for, the same everywhere; scores as defined."""

import hashlib
import json
import re
from collections import Counter
from pathlib import Path

import pytest
import torch
from test_decoder import TEMPLATE, tokenizer

from sparse_attention_decoder.errors import InputError, UnsupportedError
from sparse_attention_decoder.measure.tasks import TASKS, Example, prose, resolve, seeded, words
from sparse_attention_decoder.measure.tasks.documents import cut_middle, load, scores
from sparse_attention_decoder.measure.tasks.extra import extra
from sparse_attention_decoder.measure.tasks.fit import fit
from sparse_attention_decoder.measure.tasks.format import frame_tokens, split_prompt
from sparse_attention_decoder.measure.tasks.matching import score

# the package wonderwords is optional and Python's reference is another in each version: these stand in for both
LISTS = {
    "ADJECTIVES": tuple(f"adj{letter}" for letter in "abcdefghijklmnopqrstuvwxyz"),
    "NOUNS": tuple(f"noun{number:04}" for number in range(3000)),
    "VERBS": tuple(f"verb{number:04}" for number in range(3000)),
}
CHAPTERS = tuple(
    tuple(f"Chapter {chapter} says in sentence {number} nothing new." for number in range(60)) for chapter in range(30)
)


@pytest.fixture
def fixed(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(words, "words", LISTS.__getitem__)
    monkeypatch.setattr(prose, "_chapters", lambda: CHAPTERS)


class Counting:
    """Words of a text, and how often that was asked."""

    def __init__(self) -> None:
        self.calls = 0

    def __call__(self, text: str) -> int:
        self.calls += 1
        return len(re.findall(r"\w+|[^\w\s]", text))


def example(name: str, tokens: int = 1024, sample: int = 1, samples: int = 5, seed: int = 0) -> Example:
    return resolve(name).example(tokens, Counting(), seeded(seed, name, tokens, sample), sample, samples)


# sha256 of one example each: records of another day are comparable as long as these stay
FROZEN = {
    "niah_single": "6e15c0352e0b1ca8",
    "niah_multikey_1": "61cc36194879b846",
    "niah_multikey_2": "79bc4f7b3f404912",
    "niah_multikey_3": "a3f6c27775029f06",
    "niah_multivalue": "1e2c53bcbad7f990",
    "niah_multiquery": "744aa3d4f9907aae",
    "vt": "dec663a4f319c46c",
    "cwe": "021ed2b720daa9a8",
    "fwe": "98b4eb377fcda995",
}


@pytest.mark.usefixtures("fixed")
@pytest.mark.parametrize("name", TASKS)
def test_an_example_is_the_same_everywhere_and_for_ever(name: str) -> None:
    assert example(name) == example(name)
    assert hashlib.sha256(repr(example(name)).encode()).hexdigest()[:16] == FROZEN[name]
    assert len({example(name), example(name, seed=1), example(name, sample=2), example(name, 1100)}) == 4


@pytest.mark.usefixtures("fixed")
@pytest.mark.parametrize("tokens", [1024, 4096, 32768])
@pytest.mark.parametrize("name", TASKS)
def test_prompt_and_answer_fill_the_length_asked_for(name: str, tokens: int) -> None:
    count = Counting()
    made = resolve(name).example(tokens, count, seeded(0, name, tokens, 1), 1, 5)
    assert count.calls <= 12
    used = count(made.context) + count(f"{made.question} {made.prefix}") + made.new_tokens
    assert 0.9 * tokens <= used <= tokens
    assert count(", and ".join(made.answers)) <= made.new_tokens


@pytest.mark.usefixtures("fixed")
@pytest.mark.parametrize("name", TASKS)
def test_a_length_too_short_for_the_task_is_refused(name: str) -> None:
    with pytest.raises(InputError, match=r"ask for .* more"):
        example(name, 60)


@pytest.mark.usefixtures("fixed")
@pytest.mark.parametrize("name", [name for name in TASKS if name.startswith("niah")])
def test_every_needle_asked_for_is_hidden_once(name: str) -> None:
    made = example(name, 2048)
    assert len(made.answers) == len(set(made.answers)) == (4 if name in ("niah_multivalue", "niah_multiquery") else 1)
    for answer in made.answers:
        assert made.context.count(answer) == 1
        assert answer not in made.question + made.prefix
        key = re.search(rf"for (\S+) is: {answer}\.", made.context).group(1)
        assert key in made.question and key in made.prefix


@pytest.mark.usefixtures("fixed")
def test_multikey_hides_other_keys_too() -> None:
    found = re.findall(r"One of the special magic numbers for (\S+) is: (\d{7})\.", example("niah_multikey_1").context)
    assert len(found) == len(dict(found)) == 4
    for name in ("niah_multikey_2", "niah_multikey_3"):
        _, *lines = example(name).context.split("\n")
        found = [re.fullmatch(r"One of the special magic \w+ for (\S+) is: (\S+)\.", line).groups() for line in lines]
        assert len(found) == len(dict(found)) == len({value for _, value in found}) > 10
    assert re.fullmatch(r"[0-9a-f-]{36}", found[0][0])


@pytest.mark.usefixtures("fixed")
@pytest.mark.parametrize("name", ["niah_single", "niah_multikey_1", "niah_multikey_2", "niah_multikey_3"])
def test_a_needle_is_as_deep_as_claimed(name: str) -> None:
    for sample in range(5):
        made = example(name, 4096, sample)
        start = made.context.index("\n") + 1
        at = made.context.index(made.answers[0]) - start
        assert at / (len(made.context) - start) == pytest.approx(made.depth, abs=0.04)


@pytest.mark.usefixtures("fixed")
def test_samples_of_a_single_needle_go_through_all_depths() -> None:
    assert [example("niah_single", sample=sample).depth for sample in range(5)] == [0, 0.25, 0.5, 0.75, 1]
    assert example("niah_single", sample=0, samples=1).depth == 0.5


def test_variables_hand_on_the_value_in_their_order() -> None:
    made = example("vt", 2048)
    solved, task = made.context.rsplit("Memorize and track", 1)
    given = re.findall(r"^VAR (\w+) = (?:VAR )?(\w+)$", task, re.MULTILINE)
    value = re.search(r"the value (\d{5})", made.question).group(1)
    assert [source for _, source in given] == [value, *made.answers[:-1]]
    assert tuple(name for name, _ in given) == made.answers
    assert all(len(answer) == 5 for answer in made.answers)
    # one solved example stands before, of another value
    assert re.findall(r"are assigned the value (\d{5}), they are: ((?:[A-Z]{3} ?){5})", solved)
    assert value not in solved


@pytest.mark.usefixtures("fixed")
@pytest.mark.parametrize(("tokens", "common", "other"), [(2048, 6, 1), (8192, 30, 3)])
def test_common_words_are_common(tokens: int, common: int, other: int) -> None:
    made = example("cwe", tokens)
    listed = Counter(re.findall(r"\d+\. (\w+)", made.context.rsplit("\n", 1)[1]))
    assert {word for word, times in listed.items() if times == common} == set(made.answers)
    assert set(listed.values()) == {common, other}


@pytest.mark.parametrize("tokens", [1024, 32768])
def test_frequent_words_are_frequent(tokens: int) -> None:
    made = example("fwe", tokens)
    coded = Counter(made.context.split("coded words. ")[1].split(" "))
    (dots, most), (first, one), (second, two), (third, three), (_, four), *_ = coded.most_common()
    assert dots == "..." and (first, second, third) == made.answers
    assert most > one > two > three > four
    # the numbers fall with the square of the rank
    assert most / one == pytest.approx(4, abs=0.2)


def test_the_haystack_is_prose_with_nothing_twice() -> None:
    taken = prose.sentences(seeded(0, "any", 1, 0), 20_000)
    assert sum(len(sentence.split()) for sentence in taken) >= 20_000
    assert len(set(taken)) == len(taken)
    assert all(sentence[0].isupper() and sentence.endswith(".") for sentence in taken)
    assert taken[:5] != prose.sentences(seeded(0, "any", 1, 1), 20_000)[:5]
    again = prose.sentences(seeded(0, "any", 1, 0), 100_000)
    assert again[: len(taken)] == taken and len(set(again)) < len(again)


def test_words_are_wonderwords() -> None:
    pytest.importorskip("wonderwords", reason="needs the extra measure")
    assert all(kind == tuple(sorted(set(kind))) and len(kind) > 500 for kind in map(words.words, LISTS))
    drawn = words.pairs(seeded(0, "any", 1, 0), 50)
    assert len(set(drawn)) == 50 and all("-" in pair for pair in drawn)


def test_a_missing_package_says_how_to_install_it() -> None:
    with pytest.raises(UnsupportedError, match=r"pip install 'sparse-attention-decoder\[measure\]'"):
        extra("no_such_package.inside")


def test_an_unknown_task_lists_those_there_are() -> None:
    with pytest.raises(InputError, match=r"there is no task 'niah'; choose one of niah_single, .*fwe"):
        resolve("niah")


@pytest.mark.parametrize("growth", [lambda n: n, lambda n: int(n**1.2), lambda n: 300 * (n // 100) + n // 9])
def test_a_fit_is_close_and_never_too_long(growth) -> None:
    for room in (700, 5000, 31_000):
        count = Counting()
        text = fit(lambda n: "a " * growth(n), count, room, 2, 40_000)
        assert 0.9 * room <= len(text) // 2 <= room
        assert count.calls <= 20


def test_a_fit_that_stays_short_is_refused() -> None:
    with pytest.raises(InputError, match="ask for fewer"):
        fit(lambda n: "a " * n, Counting(), 1000, 2, 500)


@pytest.mark.usefixtures("fixed")
@pytest.mark.parametrize("name", TASKS)
def test_a_perfect_answer_scores_one_and_none_scores_nothing(name: str) -> None:
    answers = example(name).answers
    assert score(f"They are {', '.join(answers)}.".upper(), answers) == 1
    assert score("I do not know.", answers) == 0
    assert score(answers[0], answers) == 1 / len(answers)


# --- as token ids


ASKED = Example("Long text.", "\nWhat is it?", "It is", ("x",), 4, None)


def test_context_and_question_are_parted_where_the_question_starts() -> None:
    one = tokenizer()
    context, question = split_prompt(one, ASKED, "base")
    assert context.dtype == question.dtype == torch.int64
    assert one.decode(context[0]) == "Long text."
    assert one.decode(question[0]) == "\nWhat is it? It is"
    assert frame_tokens(one, "base") == 0


def test_in_a_chat_the_prefix_begins_the_assistants_turn() -> None:
    one = tokenizer(TEMPLATE)
    context, question = split_prompt(one, ASKED, "chat")
    assert one.decode(context[0]) == "<user>Long text."
    assert one.decode(question[0]) == "\nWhat is it?>It is"
    # the space before the prefix of "base" is none of the frame
    assert frame_tokens(one, "chat") == len("<user>>") - 1


def test_a_beginning_of_text_is_put_once() -> None:
    from tokenizers.processors import TemplateProcessing

    one = tokenizer("~" + TEMPLATE)
    one.backend_tokenizer.post_processor = TemplateProcessing(single="~ $A", special_tokens=[("~", ord("~"))])
    for format in ("base", "chat"):
        context, question = split_prompt(one, ASKED, format)
        assert context[0].tolist().count(ord("~")) == 1 == (context[0, 0] == ord("~"))
        assert ord("~") not in question


def test_formats_that_cannot_be_are_refused() -> None:
    with pytest.raises(InputError, match="no chat template"):
        split_prompt(tokenizer(), ASKED, "chat")
    with pytest.raises(InputError, match="changes the message"):
        split_prompt(tokenizer("{{ messages[0]['content'] | upper }}"), ASKED, "chat")
    with pytest.raises(InputError, match="choose one of base, chat"):
        split_prompt(tokenizer(), ASKED, "instruct")


# --- documents


LONGBENCH = {"context": "Ann has a cat.", "input": "What has Ann?", "answers": ["a cat", "one cat"], "length": 4}
LEVAL = {"input": "Ann has a cat.", "instructions": ["Who?", "What?"], "outputs": ["Ann", "a cat"], "source": "x"}


def written(path: Path, *rows: object) -> Path:
    path.write_text("\n".join(row if isinstance(row, str) else json.dumps(row) for row in rows), "utf-8")
    return path


def test_both_forms_give_an_example_a_question(tmp_path: Path) -> None:
    asked = {**{key: LONGBENCH[key] for key in ("context", "answers")}, "question": "And?"}
    made = load(written(tmp_path / "qa.jsonl", LONGBENCH, "", LEVAL, asked))
    assert [one.answers for one in made] == [("a cat", "one cat"), ("Ann",), ("a cat",), ("a cat", "one cat")]
    assert all(one.context.endswith("\n\nAnn has a cat.") and one.prefix == "Answer:" for one in made)
    questions = ["What has Ann?", "Who?", "What?", "And?"]
    assert all(one.question.endswith(f"\nQuestion: {asked}\n") for one, asked in zip(made, questions, strict=True))


@pytest.mark.parametrize(
    ("row", "message"),
    [
        ("{", "line 2 is not JSON"),
        ("[]", "line 2 holds a list"),
        ({"text": "x"}, "line 2 has the keys text; expected context, input and answers"),
        ({**LONGBENCH, "answers": "a cat"}, 'line 2: answers is "a cat"; expected a list of texts'),
        ({**LONGBENCH, "answers": []}, "line 2: answers is"),
        ({**LONGBENCH, "input": " "}, "line 2: input is"),
        ({**LONGBENCH, "context": None}, "line 2: context is null; expected a text"),
        ({**LEVAL, "outputs": ["Ann"]}, "line 2 has 2 instructions and 1 outputs"),
    ],
)
def test_a_wrong_line_is_named(tmp_path: Path, row: object, message: str) -> None:
    with pytest.raises(InputError, match=re.escape(message)):
        load(written(tmp_path / "qa.jsonl", LONGBENCH, row))


def test_a_file_without_questions_is_refused(tmp_path: Path) -> None:
    with pytest.raises(InputError, match="holds no question"):
        load(written(tmp_path / "empty.jsonl", ""))
    with pytest.raises(InputError, match="cannot read"):
        load(tmp_path / "none.jsonl")


@pytest.mark.parametrize(
    ("prediction", "answers", "f1", "exact", "rouge_l"),
    [
        ("The cat!", ("a cat", "dog"), 1, 1, 0.5),
        # 2 of 4 words, 2 of 2: precision 1/2, recall 1
        ("it was black cat", ("black cat",), 2 / 3, 0, 2 / 3),
        # the words in another order: F1 does not mind, the longest common subsequence has 1 of 2
        ("cat black", ("black cat",), 1, 0, 0.5),
        ("", ("black cat",), 0, 0, 0),
        ("the", ("a",), 1, 1, 0),
    ],
)
def test_scores_of_hand_examples(
    prediction: str, answers: tuple[str, ...], f1: float, exact: float, rouge_l: float
) -> None:
    pytest.importorskip("rouge_score", reason="needs the extra measure")
    assert scores(prediction, answers) == pytest.approx({"f1": f1, "exact": exact, "rouge_l": rouge_l})


def test_a_long_document_loses_its_middle() -> None:
    ids = torch.arange(11)[None]
    for most, expected in [(11, list(range(11))), (20, list(range(11))), (5, [0, 1, 8, 9, 10]), (4, [0, 1, 9, 10])]:
        cut, lost = cut_middle(ids, most)
        assert cut.tolist() == [expected] and lost == 11 - len(expected)
