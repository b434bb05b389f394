"""An example as token ids: the context to be read at once, the question to be decoded token by token."""

from typing import TYPE_CHECKING

import torch
from torch import Tensor

from sparse_attention_decoder.errors import InputError
from sparse_attention_decoder.measure.tasks.protocol import Example

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

FORMATS = ("base", "chat")


def split_prompt(tokenizer: "PreTrainedTokenizerBase", example: Example, format: str) -> tuple[Tensor, Tensor]:
    """The ids of context [1, T] and of question and answer prefix [1, N], int64.

    Each is tokenised by itself, so no token straddles the two; together they start with one
    beginning-of-text token where the model has one.

    Args:
        format: "base" is plain text; "chat" is the tokenizer's chat template, with the answer prefix
            as the start of the assistant's turn.
    Raises:
        InputError: another format, no chat template, or one that changes what it is given.
    """
    if format == "base":
        context, question = example.context, f"{example.question} {example.prefix}"
    elif format == "chat":
        context, question = _chat(tokenizer, example)
    else:
        raise InputError(f"format is {format!r}; choose one of {', '.join(FORMATS)}")
    # a chat template writes its special tokens itself
    head = tokenizer(context, add_special_tokens=format == "base").input_ids
    tail = tokenizer(question, add_special_tokens=False).input_ids
    return torch.tensor([head], dtype=torch.int64), torch.tensor([tail], dtype=torch.int64)


def frame_tokens(tokenizer: "PreTrainedTokenizerBase", format: str) -> int:
    """Tokens that a format puts around context and question: leave them out of what a task may fill.

    Raises:
        InputError: as for `split_prompt`.
    """
    framed = split_prompt(tokenizer, Example("a", "\nb", "c", (), 0, None), format)
    plain = [tokenizer(text, add_special_tokens=False).input_ids for text in ("a", "\nb c")]
    return framed[0].shape[1] + framed[1].shape[1] - len(plain[0]) - len(plain[1])


def _chat(tokenizer: "PreTrainedTokenizerBase", example: Example) -> tuple[str, str]:
    if tokenizer.chat_template is None:
        raise InputError('the tokenizer has no chat template; use the format "base"')
    user = example.context + example.question
    message = [{"role": "user", "content": user}]
    text = str(tokenizer.apply_chat_template(message, add_generation_prompt=True, tokenize=False))
    before, found, after = text.rpartition(user)
    if not found:
        raise InputError('the chat template changes the message it is given; use the format "base"')
    return before + example.context, example.question + after + example.prefix
