"""Session: a document that was read once and can be asked about many times."""

import os
import threading
from collections.abc import Callable, Iterator
from concurrent.futures import CancelledError
from contextlib import contextmanager
from dataclasses import astuple, dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from sparse_attention_decoder.errors import InputError, UnsupportedError
from sparse_attention_decoder.models import session_file
from sparse_attention_decoder.models.bookmark import Bookmark
from sparse_attention_decoder.models.cache import SparseCache
from sparse_attention_decoder.models.frame import Frame, framed
from sparse_attention_decoder.models.session_file import Content
from sparse_attention_decoder.models.streaming import pieces
from sparse_attention_decoder.selection import Reads

if TYPE_CHECKING:
    from sparse_attention_decoder.decoder import SparseAttention

# a longer question is read in chunks first
_LONG_QUESTION = 1024


@dataclass(frozen=True)
class Answer:
    """What a session answered; `str(answer)` is the text.

    text: without special tokens; empty where the model has no tokenizer.
    tokens: the ids generated, special ones included.
    reads: what the decode steps of this answer read.
    """

    text: str
    tokens: tuple[int, ...]
    reads: Reads

    def __str__(self) -> str:
        return self.text


class Session:
    """A document in the cache of a model, read once; every question starts behind it.

        session = model.read(document)
        print(session.ask("What does it conclude?", max_new_tokens=100, do_sample=False))
        session.save("document.session")
        session = Session.load("document.session", model)

    Made by `SparseAttention.read` and `Session.load`. After each answer the cache is cut back to the document, so
    an answer depends on its question alone; with `remember=True` question and answer stay and the next question
    follows them. One question at a time: a session is not to be shared by threads.
    """

    def __init__(self, model: "SparseAttention", content: Content) -> None:
        self._model = model
        self._cache, self._ids, self._frame, self._begun = content.cache, content.ids, content.frame, content.begun
        self._bookmark = Bookmark(self._cache)
        self._busy = threading.Lock()

    @classmethod
    def read(
        cls,
        model: "SparseAttention",
        document: str | Tensor | None,
        on_progress: Callable[[int, int], None] | None = None,
    ) -> "Session":
        """What `SparseAttention.read` calls; see there."""
        frame = Frame(turn="")
        if document is None or isinstance(document, str):
            if document is not None and not document.strip():
                raise InputError("the document is empty; give at least one word, or None for a conversation")
            found, frame = framed(model.require_tokenizer(), document or "")
            ids = torch.tensor([found], dtype=torch.int64)
        else:
            ids = document
        if document is not None:
            # a question and an answer of one token each
            model.check_ids(ids, 0, 2)
            _require_one_row("a document", ids)
        ids = ids.to(model.model.device)
        cache = SparseCache(model.model.config, model.config)
        # its last token is read with each question: one of a single token would else be a decode step, read sparsely
        if ids.shape[1] > 1:
            model.read_into(ids[:, :-1], cache, on_progress)
        return cls(model, Content(cache, ids, frame, False))

    @property
    def ids(self) -> Tensor:
        """[1, T] int64, the tokens that precede the next question: the document and the turns remembered."""
        return self._ids

    def ask(
        self,
        question: str | Tensor,
        max_new_tokens: int | None = None,
        *,
        remember: bool = False,
        **kwargs: Any,
    ) -> Answer:
        """Answer a question about the document.

        Args:
            question: text, or ids [1, N], which are put behind the document as they are.
            max_new_tokens: 256, or what the context has room for, if left out.
            remember: keep question and answer, as a turn that the next question follows.
            kwargs: for `generate`: do_sample, temperature and so on.
        Raises:
            InputError: an empty question. ContextLengthError: document, question and answer are too long.
            UnsupportedError: beams or several answers at once, or another question is being answered.
        All of it before any work. However it ends, the session stands behind the document again.
        """
        ids, room = self._prepare(question, max_new_tokens, kwargs)
        return self._answer(ids, room, remember, kwargs)

    def stream(
        self,
        question: str | Tensor,
        max_new_tokens: int | None = None,
        *,
        remember: bool = False,
        **kwargs: Any,
    ) -> Iterator[str]:
        """Like `ask`, piece by piece as tokens come. Leaving the loop stops the answer, and it is not remembered.

        Raises:
            InputError, ContextLengthError, UnsupportedError: at the call, before any work.
        """
        ids, room = self._prepare(question, max_new_tokens, kwargs)
        criteria = kwargs.pop("stopping_criteria", [])

        def generate(streamer: Any, stop: Any) -> None:
            settings = {**kwargs, "streamer": streamer, "stopping_criteria": [*criteria, stop]}
            self._answer(ids, room, remember, settings, stop.now)

        return pieces(self._model.require_tokenizer(), generate)

    def save(self, path: str | os.PathLike[str]) -> None:
        """Write the session to a safetensors file, in one step: a crash leaves what was there before.

        Raises:
            UnsupportedError: the policy, or a layer of the model, keeps what a file does not hold.
            SessionFileError: the file cannot be written.
        The file holds the document's tokens and the keys and values of all of them.
        """
        with self._alone():
            content = Content(self._cache, self._ids, self._frame, self._begun)
            session_file.save(path, self._model.model, content)

    @classmethod
    def load(cls, path: str | os.PathLike[str], model: "SparseAttention") -> "Session":
        """Take up a saved session, with the AttentionConfig that it was read with.

        The file is mapped into memory: replace it if you like, as `save` does, but do not change it in place.

        Args:
            model: with the same weights, in the same dtype, as the one that read the document.
        Raises:
            SessionFileError: another model's, another format's, damaged, cut short or no session at all.
        """
        return cls(model, session_file.load(path, model.model))

    def _prepare(self, question: str | Tensor, wanted: int | None, kwargs: dict[str, Any]) -> tuple[Tensor, int]:
        settings = kwargs.get("generation_config") or self._model.model.generation_config
        for name in ("num_beams", "num_return_sequences"):
            if (kwargs.get(name, getattr(settings, name, None)) or 1) > 1:
                raise UnsupportedError(
                    f"a session gives one answer to a question; leave {name} at 1, or use generate()"
                )
        if isinstance(question, str):
            if not question.strip():
                raise InputError("the question is empty; give at least one word")
            text = (self._frame.turn if self._begun else "") + question + self._frame.closing
            found = self._model.require_tokenizer()(text, add_special_tokens=False).input_ids
            # a model ends its answer with what the template puts there
            ends_already = self._begun and found[:1] == self._ids[0, -1:].tolist()
            ids = torch.tensor([found[1:] if ends_already else found], dtype=torch.int64)
        else:
            ids = question
        room = self._model.room_behind(ids, self._ids.shape[1], wanted)
        _require_one_row("a question", ids)
        return torch.cat([self._ids, ids.to(self._ids)], 1), room

    @torch.no_grad()
    def _answer(
        self, ids: Tensor, room: int, remember: bool, kwargs: dict[str, Any], left: threading.Event | None = None
    ) -> Answer:
        """Ids [1, T] of document and question in, the answer out; `left` is set if nobody waits for it any more."""
        with self._alone():
            try:
                before, held = self._cache.reads, self._cache.get_seq_length()
                if ids.shape[1] - held > _LONG_QUESTION:
                    # two tokens are left to generate, for the same reason
                    self._model.read_into(ids[:, held:-2], self._cache, None)
                kwargs = {"attention_mask": torch.ones_like(ids), **kwargs}
                output = self._model.generate(ids, max_new_tokens=room, past_key_values=self._cache, **kwargs)
                whole: Tensor = output if isinstance(output, Tensor) else output.sequences
                if left is not None and left.is_set():
                    raise CancelledError
                spent = Reads(
                    *(now - then for now, then in zip(astuple(self._cache.reads), astuple(before), strict=True))
                )
                if remember:
                    # the newest token is not in the cache yet: it is read with the next question, as a document's last
                    self._ids, self._begun, self._bookmark = whole, True, Bookmark(self._cache)
            finally:
                self._bookmark.go_back()
        tokens = whole[0, ids.shape[1] :]
        tokenizer = self._model.tokenizer
        text = "" if tokenizer is None else tokenizer.decode(tokens, skip_special_tokens=True)
        return Answer(str(text), tuple(tokens.tolist()), spent)

    @contextmanager
    def _alone(self) -> Iterator[None]:
        if not self._busy.acquire(blocking=False):
            raise UnsupportedError(
                "this session is answering another question; read that stream to its end, or close() it, first"
            )
        try:
            yield
        finally:
            self._busy.release()


def _require_one_row(what: str, ids: Tensor) -> None:
    if ids.shape[0] != 1:
        raise InputError(f"ids have {ids.shape[0]} rows; {what} is one row, [1, T]")
