"""SparseAttention: ids in, logits out; text in, text or attention scores out."""

import os
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import CancelledError, ThreadPoolExecutor
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel, PreTrainedTokenizerBase, TextIteratorStreamer

from sparse_attention_decoder.config import AttentionConfig
from sparse_attention_decoder.errors import ConfigError, InputError
from sparse_attention_decoder.models.adapter import PREFILL_CHUNK, chunking, enable
from sparse_attention_decoder.models.cache import SparseCache
from sparse_attention_decoder.models.ids import check_ids
from sparse_attention_decoder.models.loading import load
from sparse_attention_decoder.models.static import StaticSparseCache
from sparse_attention_decoder.models.stopping import StopWhen
from sparse_attention_decoder.trace import Trace, trace_layer

DEFAULT_NEW_TOKENS = 256
CAPACITY_STEP = 4096

Progress = Callable[[int, int], None]


class SparseAttention(nn.Module):
    """A causal language model that decodes with sparse attention.

        model = SparseAttention(AttentionConfig(top_k=32, attention_window=512))    # the embedded SmolLM2
        model = SparseAttention(config, model="path/or/name/or/file.gguf")
        model = SparseAttention(config, model=hf_model, tokenizer=hf_tokenizer)

    Args:
        config: what a decode step reads; the measured default if left out.
        model: a transformers causal LM, or what `models.loading.load` takes: a hub name, a
            directory or a GGUF file; the embedded default if left out.
        tokenizer: for text in and out; comes along when the model is loaded by name.
    Raises:
        ModelLoadError: no model there. UnsupportedError: a family that cannot be hooked.
        NonFiniteError: weights hold NaN or infinity.
    """

    model: PreTrainedModel
    tokenizer: PreTrainedTokenizerBase | None

    def __init__(
        self,
        config: AttentionConfig | None = None,
        model: PreTrainedModel | str | os.PathLike[str] | None = None,
        tokenizer: PreTrainedTokenizerBase | None = None,
    ) -> None:
        super().__init__()
        if not isinstance(model, PreTrainedModel):
            model, found = load(model)
            tokenizer = tokenizer or found
        self.config = config or AttentionConfig()
        self.tokenizer = tokenizer
        self.model = enable(model, self.config)

    @classmethod
    def from_pretrained(
        cls,
        name: str | os.PathLike[str] | None = None,
        config: AttentionConfig | None = None,
        *,
        on_stage: Callable[[str], None] | None = None,
        **model_kwargs: Any,
    ) -> "SparseAttention":
        """Load a model by hub name, directory or GGUF file; None is the embedded default.

        Args:
            on_stage: told in a few words what is being done, for progress displays.
            model_kwargs: for transformers' `from_pretrained`: dtype, device_map and so on.
        Raises:
            ModelLoadError: no model there, or a damaged one.
        """
        model, tokenizer = load(name, on_stage=on_stage, **model_kwargs)
        return cls(config, model, tokenizer)

    def forward(self, input_ids: Tensor | None = None, **kwargs: Any) -> Any:
        """What the transformers model returns for these ids: logits, loss, past_key_values.

        Args:
            input_ids: [B, T] integers below the vocabulary size.
            kwargs: everything the model's own forward takes.
        Raises:
            InputError: empty, not integer, out of vocabulary. ContextLengthError: too long.
        """
        if input_ids is not None:
            cache = kwargs.get("past_key_values")
            self.check_ids(input_ids, cache.get_seq_length() if cache is not None else 0)
        return self.model(input_ids, **kwargs)

    def generate(self, input_ids: Tensor | None = None, *, compile: bool = False, **kwargs: Any) -> Any:
        """transformers' `generate`: sampling, beams, stopping criteria and streamers included.

        Args:
            compile: decode on a StaticSparseCache with room for prompt and max_new_tokens: on CUDA transformers then
                compiles the whole step into one graph. One answer a prompt; the first tokens wait for the compiler.
        Raises:
            InputError: empty, not integer, out of vocabulary. ContextLengthError: too long with max_new_tokens.
            ConfigError: compile without ids or max_new_tokens, or with a cache. BackendError: compile without Triton.
        """
        settings = kwargs.get("generation_config")
        wanted = kwargs.get("max_new_tokens") or getattr(settings, "max_new_tokens", None) or 0
        if input_ids is not None:
            self.check_ids(input_ids, 0, wanted)
            kwargs = {**chunking(self.config, input_ids.shape[1]), **kwargs}
        if compile:
            if input_ids is None or not wanted or kwargs.get("past_key_values") is not None:
                raise ConfigError("compile=True needs input_ids and max_new_tokens, and makes the cache itself")
            kwargs["past_key_values"] = self._read_into_static(input_ids, kwargs.get("attention_mask"), wanted)
        return self.model.generate(input_ids, **kwargs)

    def _read_into_static(
        self, ids: Tensor, mask: Tensor | None, new_tokens: int, on_progress: Progress | None = None
    ) -> StaticSparseCache:
        total = ids.shape[1] + new_tokens
        # a compiled step is of one capacity: in coarse steps, so that another prompt seldom needs another
        cache = StaticSparseCache(self.model.config, self.config, -(-total // CAPACITY_STEP) * CAPACITY_STEP)
        if ids.shape[1] > 3 and (mask is None or bool(mask.all())):
            # two tokens are left to generate: one alone would be a decode step
            self._read(ids[:, :-2], cache, on_progress)
        return cache

    def complete(self, text: str, max_new_tokens: int | None = None, chat: bool | None = None, **kwargs: Any) -> str:
        """Answer or continue a text.

        Args:
            text: the prompt.
            max_new_tokens: 256, or what the context has room for, if left out.
            chat: put the text into the chat template as the user's message; None does where there is one.
            kwargs: for `generate`.
        Raises:
            InputError: empty prompt, or no tokenizer. ContextLengthError: too long.
        """
        ids, room = self._prepare(text, max_new_tokens, chat)
        output = self.generate(ids, attention_mask=torch.ones_like(ids), max_new_tokens=room, **kwargs)
        sequences: Tensor = output if isinstance(output, Tensor) else output.sequences
        return str(self.require_tokenizer().decode(sequences[0, ids.shape[1] :], skip_special_tokens=True))

    def stream(
        self,
        text: str,
        max_new_tokens: int | None = None,
        chat: bool | None = None,
        on_prefill: Progress | None = None,
        **kwargs: Any,
    ) -> Iterator[str]:
        """Like `complete`, piece by piece as tokens come. Leaving the loop stops the generation.

        Args:
            on_prefill: called with (tokens read, tokens in the prompt) while the prompt is read.
        Raises:
            InputError, ContextLengthError: at the call, before any work.
        """
        ids, room = self._prepare(text, max_new_tokens, chat)
        kwargs = {**kwargs, "attention_mask": torch.ones_like(ids), "max_new_tokens": room}
        return self._stream(ids, on_prefill, kwargs)

    def prefill(
        self, input_ids: Tensor, on_progress: Progress | None = None, watched: Iterable[str] = ()
    ) -> SparseCache:
        """Read ids [B, T] into a fresh cache, densely, a chunk at a time; memory stays bounded.

        Args:
            on_progress: called with (tokens read, T) after each chunk.
            watched: policies that will read this cache too, see `SparseCache.watch`.
        Raises:
            InputError: empty, not integer, out of vocabulary. ContextLengthError: too long.
        """
        cache = SparseCache(self.model.config, self.config)
        cache.watch(watched)
        # and for an answer of the usual length
        cache.reserve(input_ids.shape[1] + DEFAULT_NEW_TOKENS)
        self._read(input_ids, cache, on_progress)
        return cache

    @torch.no_grad()
    def _read(self, ids: Tensor, cache: SparseCache | StaticSparseCache, on_progress: Progress | None) -> None:
        self.check_ids(ids, 0)
        total = ids.shape[1]
        done = 0
        while done < total:
            # a last chunk of one token would be a decode step, and read sparsely: it joins the one before
            size = total - done if total - done == PREFILL_CHUNK + 1 else PREFILL_CHUNK
            chunk = ids[:, done : done + size]
            # the backbone alone: logits of a prompt are large and nobody reads them
            self.model.base_model(chunk.to(self.model.device), past_key_values=cache, use_cache=True)
            done += chunk.shape[1]
            if on_progress is not None:
                on_progress(done, total)

    def trace(self, text: str, chat: bool = False) -> Trace:
        """Attention scores: for the text's last position, the tokens read by every layer and KV head.

        Args:
            text: what to read; up to its last token densely, that one as a decode step.
            chat: put the text into the chat template first.
        Raises:
            InputError: empty text, or no tokenizer. ContextLengthError: too long.
        """
        ids = self.prompt_ids(text, chat)
        self.check_ids(ids, 0)
        cache = self.prefill(ids[:, :-1]) if ids.shape[1] > 1 else SparseCache(self.model.config, self.config)
        with torch.no_grad():
            self.model(ids[:, -1:], past_key_values=cache, use_cache=True)
        tokens = tuple(self.require_tokenizer().decode([token]) for token in ids[0].tolist())
        heads = []
        for number, layer in enumerate(cache.layers):
            if layer in cache.sparse_layers and layer.last is not None:
                heads += trace_layer(number, layer.state, layer.last, tokens)
        return Trace(tokens, tuple(heads))

    def prompt_ids(self, text: str, chat: bool | None = None) -> Tensor:
        """The ids [1, T] of a prompt, with the chat template where there is one (or as `chat` says).

        Raises:
            InputError: empty prompt, no tokenizer, or chat asked of a tokenizer without template.
        """
        tokenizer = self.require_tokenizer()
        if not text.strip():
            raise InputError("the prompt is empty; give at least one word")
        has_template = tokenizer.chat_template is not None
        if chat and not has_template:
            raise InputError("chat=True, but the tokenizer has no chat template; use chat=False")
        if has_template and chat is not False:
            message = [{"role": "user", "content": text}]
            ids = tokenizer.apply_chat_template(
                message, add_generation_prompt=True, return_tensors="pt", return_dict=True
            )
        else:
            ids = tokenizer(text, return_tensors="pt")
        found: Tensor = ids["input_ids"].to(self.model.device)
        return found

    def check_ids(self, ids: Tensor, past: int = 0, new_tokens: int = 0) -> None:
        """Refuse ids [B, T] that the model cannot read behind `past` tokens and before `new_tokens`.

        Raises:
            InputError: empty, not integer, out of vocabulary. ContextLengthError: too long.
        """
        check_ids(ids, self.model.get_input_embeddings().num_embeddings, self.context_length, past, new_tokens)

    @property
    def context_length(self) -> int | None:
        """Tokens the model was made for; None where its config does not say."""
        return getattr(self.model.config.get_text_config(decoder=True), "max_position_embeddings", None)

    def _prepare(self, text: str, max_new_tokens: int | None, chat: bool | None) -> tuple[Tensor, int]:
        ids = self.prompt_ids(text, chat)
        self.check_ids(ids, 0, 1 if max_new_tokens is None else max_new_tokens)
        if max_new_tokens is not None:
            return ids, max_new_tokens
        room = DEFAULT_NEW_TOKENS if self.context_length is None else self.context_length - ids.shape[1]
        return ids, min(DEFAULT_NEW_TOKENS, room)

    def _stream(self, ids: Tensor, on_prefill: Progress | None, kwargs: dict[str, Any]) -> Iterator[str]:
        streamer = TextIteratorStreamer(self.require_tokenizer(), skip_prompt=True, skip_special_tokens=True)
        stop = StopWhen()
        criteria = [*kwargs.pop("stopping_criteria", []), stop]

        def report(done: int, total: int) -> None:
            # a reader that has left must not wait for the rest of a long prompt
            if stop.now.is_set():
                raise CancelledError
            assert on_prefill is not None
            on_prefill(done, total)

        def work() -> None:
            try:
                if kwargs.pop("compile", False):
                    progress = None if on_prefill is None else report
                    kwargs["past_key_values"] = self._read_into_static(ids, None, kwargs["max_new_tokens"], progress)
                elif on_prefill is not None and ids.shape[1] > 2:
                    # two tokens are left to generate: one alone would be a decode step, and read sparsely
                    cache = kwargs.setdefault("past_key_values", SparseCache(self.model.config, self.config))
                    if cache.get_seq_length() == 0:
                        cache.reserve(ids.shape[1] + kwargs["max_new_tokens"])
                        self._read(ids[:, :-2], cache, report)
                self.generate(ids, streamer=streamer, stopping_criteria=criteria, **kwargs)
            finally:
                # without this a failed generate would leave the reader waiting for ever
                streamer.end()

        with ThreadPoolExecutor(1) as executor:
            done = executor.submit(work)
            try:
                yield from streamer
                done.result()
            finally:
                stop.now.set()

    def require_tokenizer(self) -> PreTrainedTokenizerBase:
        """The tokenizer; an InputError where there is none."""
        if self.tokenizer is None:
            raise InputError("text needs a tokenizer; pass tokenizer=... or use ids with generate()")
        return self.tokenizer
