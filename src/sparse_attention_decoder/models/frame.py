"""Text as ids: a whole prompt, or what stands around the questions about a document."""

import secrets
from dataclasses import dataclass

from torch import Tensor
from transformers import PreTrainedTokenizerBase

from sparse_attention_decoder.errors import InputError, UnsupportedError


def prompt_ids(tokenizer: PreTrainedTokenizerBase, text: str, chat: bool | None) -> Tensor:
    """The ids [1, T] of a prompt, with the chat template where there is one (or as `chat` says).

    Raises:
        InputError: empty prompt, or chat asked of a tokenizer without template.
    """
    if not text.strip():
        raise InputError("the prompt is empty; give at least one word")
    has_template = tokenizer.chat_template is not None
    if chat and not has_template:
        raise InputError("chat=True, but the tokenizer has no chat template; use chat=False")
    if has_template and chat is not False:
        message = [{"role": "user", "content": text}]
        ids = tokenizer.apply_chat_template(message, add_generation_prompt=True, return_tensors="pt", return_dict=True)
    else:
        ids = tokenizer(text, return_tensors="pt")
    found: Tensor = ids["input_ids"]
    return found


@dataclass(frozen=True)
class Frame:
    """The text around every question but the first one's beginning, which is the document.

    closing: follows a question: it ends the user's message and begins the answer.
    turn: stands between an answer and the next question.
    """

    closing: str = ""
    turn: str = "\n\n"


def framed(tokenizer: PreTrainedTokenizerBase, document: str) -> tuple[list[int], Frame]:
    """Ids of all that precedes the first question, and what surrounds the others.

    With a chat template the document is the beginning of the user's message and the question its end;
    without one there are the document, a blank line and the question. An empty document leaves what a
    conversation begins with.

    Raises:
        UnsupportedError: a chat template that does not give a message back as it is.
    """
    before = f"{document}\n\n" if document else ""
    if tokenizer.chat_template is None:
        return list(tokenizer(before).input_ids), Frame()
    # nobody's text, so that it is found again; what precedes it cannot depend on the question
    question, answer, further = (secrets.token_hex(8) for _ in range(3))
    messages = [{"role": "user", "content": before + question}]
    opening, closing = _split(_rendered(tokenizer, messages), question)
    messages += [{"role": "assistant", "content": answer}, {"role": "user", "content": further}]
    turn, _ = _split(_split(_rendered(tokenizer, messages), answer)[1], further)
    return list(tokenizer(opening, add_special_tokens=False).input_ids), Frame(closing, turn)


def _rendered(tokenizer: PreTrainedTokenizerBase, messages: list[dict[str, str]]) -> str:
    return str(tokenizer.apply_chat_template(messages, add_generation_prompt=True, tokenize=False))


def _split(text: str, mark: str) -> tuple[str, str]:
    if text.count(mark) != 1:
        raise UnsupportedError(
            f"the chat template writes a message {text.count(mark)} times, a session needs it once; "
            "read and ask with ids instead of text"
        )
    before, _, behind = text.partition(mark)
    return before, behind
