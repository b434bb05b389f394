"""Sessions: however often and in whatever order questions are asked, each is answered as if it were the only one."""

import threading
from typing import Any

import pytest
import torch
from test_decoder import tokenizer
from tiny import BITING, CONTEXT, FORCED, FULL, build, prompt
from torch import Tensor
from transformers import StoppingCriteria

from sparse_attention_decoder import AttentionConfig, Session, SparseAttention
from sparse_attention_decoder.errors import ContextLengthError, InputError, UnsupportedError
from sparse_attention_decoder.tables import POLICIES

CHAT = (
    "{% for m in messages %}<{{ m['role'] }}>{{ m['content'] | trim }}</>{% endfor %}"
    "{% if add_generation_prompt %}<assistant>{% endif %}"
)
DOCUMENT = "".join(chr(40 + (11 * i * i + i) % 60) for i in range(80))
QUESTIONS = ["What?", "Why is it so, and since when has it been like that?", "?"]
GREEDY: dict[str, Any] = {"max_new_tokens": 9, "do_sample": False}


def chatty(config: AttentionConfig = BITING, family: str = "llama", **overrides: Any) -> SparseAttention:
    return SparseAttention(config, build(family, **overrides), tokenizer(CHAT))


@pytest.fixture
def model() -> SparseAttention:
    return chatty()


def at_once(model: SparseAttention, document: Tensor, question: Tensor) -> tuple[int, ...]:
    """The answer to ids that were given to `generate` in one go, read in the chunks a session reads them in."""
    whole = torch.cat([document, question], 1)
    cache = model.prefill(document[:, :-1])
    written = model.generate(whole, past_key_values=cache, attention_mask=torch.ones_like(whole), **GREEDY)
    return tuple(written[0, whole.shape[1] :].tolist())


def lengths(session: Session) -> set[int]:
    return {layer.get_seq_length() for layer in session._cache.layers}


@pytest.mark.parametrize("policy", POLICIES)
def test_every_policy_answers_each_question_as_if_it_were_the_only_one(policy: str) -> None:
    model = chatty(
        AttentionConfig(dense_below=0, sink_tokens=2, attention_window=4, top_k=5, threshold=None, policy=policy)
    )
    document, questions = prompt(1, 70), [prompt(1, tokens, seed=tokens) for tokens in (1, 2, 12, 40)]
    session = model.read(document)
    expected = [at_once(model, document, question) for question in questions]
    assert len(set(expected)) > 1
    for number in (0, 1, 2, 3, 1, 1, 3, 2, 0):
        assert session.ask(questions[number], **GREEDY).tokens == expected[number]
        assert lengths(session) == {69}


@pytest.mark.parametrize("family", ["gemma3_text", "llama4_text", "qwen3_next", "gpt2", "deepseek_v3"])
def test_layers_that_cannot_be_cut_come_back_too(family: str) -> None:
    model = chatty(family=family)
    document, questions = prompt(1, 50), [prompt(1, 9, seed=1), prompt(1, 30, seed=2)]
    session = model.read(document)
    expected = [at_once(model, document, question) for question in questions]
    for number in (0, 1, 0, 1):
        assert session.ask(questions[number], **GREEDY).tokens == expected[number]


@pytest.mark.parametrize("tokens", range(1, 24))
def test_documents_of_any_length_even_one_token_can_be_asked(model: SparseAttention, tokens: int) -> None:
    document, question = prompt(1, tokens), prompt(1, 3, seed=1)
    session = model.read(document)
    first = session.ask(question, **GREEDY).tokens
    assert session.ask(prompt(1, 9, seed=2), **GREEDY).tokens != ()
    assert first == session.ask(question, **GREEDY).tokens
    if tokens > 1:
        assert first == at_once(model, document, question)
    assert torch.equal(session.ids, document)


@pytest.mark.parametrize("template", [None, CHAT])
def test_a_question_stands_where_it_would_in_one_prompt(template: str | None) -> None:
    model = SparseAttention(FULL, build("llama"), tokenizer(template))
    session = model.read(DOCUMENT)
    for question in QUESTIONS:
        whole, _ = session._prepare(question, 1, {})
        assert torch.equal(whole, model.prompt_ids(f"{DOCUMENT}\n\n{question}"))
        expected = model.generate(whole, **GREEDY)[0, whole.shape[1] :]
        assert session.ask(question, **GREEDY).tokens == tuple(expected.tolist())


def test_the_document_is_read_once_and_reading_is_reported(
    model: SparseAttention, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("sparse_attention_decoder.models.reading.PREFILL_CHUNK", 32)
    seen: list[tuple[int, int]] = []
    session = model.read(prompt(1, 90), lambda done, total: seen.append((done, total)))
    assert seen == [(32, 89), (64, 89), (89, 89)]
    widths: list[int] = []
    model.model.model.register_forward_pre_hook(
        lambda module, args, kwargs: widths.append(kwargs["input_ids"].shape[1]), with_kwargs=True
    )
    session.ask(prompt(1, 5), max_new_tokens=4, do_sample=False)
    assert widths == [6, 1, 1, 1]


def test_a_long_question_is_read_in_chunks(model: SparseAttention, monkeypatch: pytest.MonkeyPatch) -> None:
    document, question = prompt(1, 40), prompt(1, 70, seed=1)
    plain = SparseAttention(FULL, build("llama"), tokenizer(CHAT)).read(document).ask(question, **GREEDY).tokens
    monkeypatch.setattr("sparse_attention_decoder.session._LONG_QUESTION", 16)
    monkeypatch.setattr("sparse_attention_decoder.models.reading.PREFILL_CHUNK", 16)
    session = SparseAttention(FULL, build("llama"), tokenizer(CHAT)).read(document)
    assert session.ask(question, **GREEDY).tokens == plain
    assert lengths(session) == {39}


def test_an_answer_is_its_text_and_counts_its_own_reads(model: SparseAttention) -> None:
    session = model.read(DOCUMENT)
    first, second = (session.ask(QUESTIONS[0], **GREEDY) for _ in range(2))
    assert (
        str(first)
        == first.text
        == model.tokenizer.decode(first.tokens)
        == "".join(session.stream(QUESTIONS[0], **GREEDY))
    )
    assert first == second
    # the question's last token gives the first of nine
    assert (first.reads.steps, first.reads.sparse_steps) == (16, 16)
    assert first.reads.tokens_read == 16 * 2 * (2 + 4 + 5)
    assert SparseAttention(BITING, build("llama")).read(prompt(1, 9)).ask(prompt(1, 3), **GREEDY).text == ""


def test_sampling_options_and_max_new_tokens_go_through(model: SparseAttention) -> None:
    session = model.read(DOCUMENT)
    with torch.random.fork_rng(devices=[]):
        answers = set()
        for seed in (0, 1, 0):
            torch.manual_seed(seed)
            answers.add(session.ask("Why?", 12, do_sample=True, temperature=3.0, top_k=0).tokens)
    assert len(answers) == 2
    assert len(session.ask("Why?", do_sample=False).tokens) == 256
    near = model.read(prompt(1, CONTEXT - 12))
    assert len(near.ask(prompt(1, 5), do_sample=False).tokens) == 7


def test_turns_that_are_remembered_stand_as_the_template_has_them(model: SparseAttention) -> None:
    session = model.read(DOCUMENT)
    messages = []
    for content in (f"{DOCUMENT}\n\n{QUESTIONS[0]}", QUESTIONS[1], QUESTIONS[2]):
        question = content.removeprefix(f"{DOCUMENT}\n\n")
        messages.append({"role": "user", "content": content})
        rendered = model.tokenizer.apply_chat_template(messages, add_generation_prompt=True, tokenize=False)
        assert model.tokenizer.decode(session._prepare(question, 1, {})[0][0]) == rendered
        # trimming by the template would change the text of an answer
        answer = session.ask(question, 7, remember=True, do_sample=False)
        messages.append({"role": "assistant", "content": f"{answer}"})
        assert str(answer) == str(answer).strip(), "the template changes this answer: ask something else"
        assert lengths(session) == {session.ids.shape[1] - 1}


def test_a_turn_is_not_ended_twice() -> None:
    """The model's own end of an answer is what the template writes there."""
    plain = chatty()
    first = plain.read(DOCUMENT).ask("What?", 1, do_sample=False).tokens[0]
    model = chatty(eos_token_id=first)
    # a template that ends an answer with that token
    model.tokenizer.chat_template = CHAT.replace("</>", chr(first))
    document = model.read(DOCUMENT)
    answer = model.tokenizer.chat_template and document.ask(
        "What?", 5, remember=True, min_new_tokens=1, do_sample=False
    )
    ended = bool(answer) and answer.tokens[-1] == first
    text = model.tokenizer.decode(document._prepare("And?", 1, {})[0][0])
    assert f"{chr(first)}{chr(first)}<user>And?" not in text
    assert f"{chr(first)}<user>And?" in text
    assert ended or len(answer.tokens) == 5


def test_a_remembered_conversation_answers_as_one_prompt_would(model: SparseAttention) -> None:
    session = model.read(None)
    session.ask("Hello!", 6, remember=True, do_sample=False)
    held = session.ids
    again = [session.ask("And?", **GREEDY).tokens for _ in range(2)]
    whole, _ = session._prepare("And?", 1, {})
    assert torch.equal(whole[:, : held.shape[1]], held)
    fresh = chatty(FULL)
    dense = fresh.read(None)
    dense.ask("Hello!", 6, remember=True, do_sample=False)
    whole, _ = dense._prepare("And?", 1, {})
    expected = fresh.generate(whole, **GREEDY)[0, whole.shape[1] :]
    assert dense.ask("And?", **GREEDY).tokens == tuple(expected.tolist())
    assert again[0] == again[1]


class Failing(StoppingCriteria):
    def __init__(self, error: BaseException, after: int) -> None:
        self.error, self.left = error, after

    def __call__(self, *args: object, **kwargs: object) -> Tensor:
        self.left -= 1
        if self.left < 0:
            raise self.error
        return torch.zeros(1, dtype=torch.bool)


@pytest.mark.parametrize("error", [KeyboardInterrupt(), RuntimeError("broken")])
@pytest.mark.parametrize("remember", [False, True])
def test_an_answer_that_breaks_off_leaves_the_session_as_it_was(
    model: SparseAttention, error: BaseException, remember: bool
) -> None:
    session = model.read(DOCUMENT)
    expected = session.ask("Why?", **GREEDY)
    with pytest.raises(type(error)):
        session.ask(QUESTIONS[1], 20, remember=remember, stopping_criteria=[Failing(error, 3)])
    assert lengths(session) == {session.ids.shape[1] - 1}
    assert session.ask("Why?", **GREEDY) == expected
    if isinstance(error, Exception):
        with pytest.raises(type(error)):
            list(session.stream("Why?", 20, stopping_criteria=[Failing(error, 3)]))
        assert session.ask("Why?", **GREEDY) == expected


@pytest.mark.parametrize("family", ["llama", "gemma3_text"])
def test_a_forward_that_breaks_off_between_two_layers_leaves_them_equally_long(family: str) -> None:
    session = (model := chatty(family=family)).read(DOCUMENT)
    expected = session.ask("Why?", **GREEDY)

    def interrupt(*_: object) -> None:
        raise KeyboardInterrupt

    hook = model.model.model.layers[1].register_forward_pre_hook(interrupt)
    with pytest.raises(KeyboardInterrupt):
        session.ask("What?", **GREEDY)
    hook.remove()
    assert lengths(session) == {session.ids.shape[1] - 1}
    assert session.ask("Why?", **GREEDY) == expected


def test_a_sketch_whose_fitting_breaks_off_is_made_again(monkeypatch: pytest.MonkeyPatch) -> None:
    """The longer context of one question has statistics of its own: they must not stay behind."""
    model = chatty()
    session, question, long = model.read(prompt(1, 90)), prompt(1, 4, seed=1), prompt(1, 60, seed=2)
    expected = [session.ask(ids, **GREEDY).tokens for ids in (question, long)]
    sketch = session._cache.layers[1].state.index
    fit_row = type(sketch)._fit_row

    def broken(self: Any, *args: Any) -> None:
        fit_row(self, *args)
        raise KeyboardInterrupt

    for ids in (question, long):
        monkeypatch.setattr(type(sketch), "_fit_row", broken)
        with pytest.raises(KeyboardInterrupt):
            session.ask(ids, **GREEDY)
        monkeypatch.undo()
        assert [session.ask(ids, **GREEDY).tokens for ids in (question, long)] == expected


def test_leaving_a_stream_ends_it_and_leaves_the_session_usable(model: SparseAttention) -> None:
    session = model.read(DOCUMENT)
    expected = session.ask("Why?", **GREEDY)
    stream = session.stream("What?", 800, remember=True, do_sample=False)
    next(stream)
    with pytest.raises(UnsupportedError, match="another question"):
        session.ask("Why?", **GREEDY)
    stream.close()
    assert [thread.name for thread in threading.enumerate() if "ThreadPoolExecutor" in thread.name] == []
    assert session.ask("Why?", **GREEDY) == expected
    session.stream("never begun", 800)
    assert session.ask("Why?", **GREEDY) == expected


def test_too_long_a_context_is_refused_before_any_work(model: SparseAttention, monkeypatch: pytest.MonkeyPatch) -> None:
    session = model.read(prompt(1, CONTEXT - 20))

    def work(*args: object, **kwargs: object) -> None:
        raise AssertionError("work was done")

    monkeypatch.setattr(model.model, "forward", work)
    monkeypatch.setattr(model.model.model, "forward", work)
    for call in (session.ask, session.stream):
        with pytest.raises(ContextLengthError, match="max_new_tokens=15"):
            call(prompt(1, 5), 16)
        with pytest.raises(ContextLengthError, match="exceed the model's context"):
            call(prompt(1, 20))
    for document in (prompt(1, CONTEXT - 1), "x" * CONTEXT):
        with pytest.raises(ContextLengthError, match="exceed the model's context"):
            model.read(document)


@pytest.mark.parametrize("call", ["ask", "stream"])
@pytest.mark.parametrize(
    ("question", "options", "error", "says"),
    [
        (" \n", {}, InputError, "question is empty"),
        (torch.zeros(1, 0, dtype=torch.int64), {}, InputError, "at least one token"),
        ([1, 2], {}, InputError, "expected \\[B, T\\]"),
        (torch.zeros(2, 3, dtype=torch.int64), {}, InputError, "ids have 2 rows; a question"),
        (torch.tensor([[500]]), {}, InputError, "500 is outside the vocabulary"),
        ("Why?", {"num_beams": 2}, UnsupportedError, "leave num_beams at 1"),
        ("Why?", {"num_return_sequences": 2}, UnsupportedError, "leave num_return_sequences at 1"),
    ],
)
def test_wrong_questions_are_refused_at_the_call(
    model: SparseAttention, call: str, question: Any, options: dict[str, Any], error: type[Exception], says: str
) -> None:
    with pytest.raises(error, match=says):
        getattr(model.read(DOCUMENT), call)(question, 4, **options)


@pytest.mark.parametrize(
    ("document", "says"),
    [
        (" \n", "document is empty"),
        (torch.zeros(1, 0, dtype=torch.int64), "at least one token"),
        ([1, 2], "expected \\[B, T\\]"),
        (torch.zeros(2, 3, dtype=torch.int64), "ids have 2 rows; a document"),
    ],
)
def test_wrong_documents_are_refused(model: SparseAttention, document: Any, says: str) -> None:
    with pytest.raises(InputError, match=says):
        model.read(document)
    with pytest.raises(InputError, match="needs a tokenizer"):
        SparseAttention(BITING, build("llama")).read("hello")


@pytest.mark.parametrize(
    "template", ["{% for m in messages %}{% endfor %}", CHAT.replace("}}</>", "}}{{ m['content'] }}")]
)
def test_a_template_that_changes_messages_is_refused(template: str) -> None:
    model = SparseAttention(BITING, build("llama"), tokenizer(template))
    with pytest.raises(UnsupportedError, match="with ids instead"):
        model.read(DOCUMENT)


def test_the_forced_sketch_answers_as_dense_does() -> None:
    dense, sparse = chatty(FULL), chatty(FORCED)
    for question in QUESTIONS:
        one, other = (side.read(DOCUMENT).ask(question, **GREEDY) for side in (dense, sparse))
        assert one.tokens == other.tokens
        assert other.reads.sparse_steps > 0 == one.reads.sparse_steps
