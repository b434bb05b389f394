"""SparseAttention: ids in, logits out; text in, text or attention scores out."""

import os
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import CancelledError
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel, PreTrainedTokenizerBase, TextIteratorStreamer

from sparse_attention_decoder.config import AttentionConfig
from sparse_attention_decoder.errors import ConfigError, InputError
from sparse_attention_decoder.models import compiled, reading, tuned
from sparse_attention_decoder.models.adapter import enable
from sparse_attention_decoder.models.cache import SparseCache
from sparse_attention_decoder.models.frame import prompt_ids
from sparse_attention_decoder.models.ids import check_ids
from sparse_attention_decoder.models.loading import load
from sparse_attention_decoder.models.lossless import Lossless, drafting
from sparse_attention_decoder.models.reading import DEFAULT_NEW_TOKENS, Progress
from sparse_attention_decoder.models.static import StaticSparseCache
from sparse_attention_decoder.models.statistics import with_statistics
from sparse_attention_decoder.models.stopping import StopWhen
from sparse_attention_decoder.models.streaming import pieces
from sparse_attention_decoder.session import Session
from sparse_attention_decoder.trace import Trace, trace_text


class SparseAttention(nn.Module):
    """A causal language model that decodes with sparse attention.

        model = SparseAttention(AttentionConfig(top_k=32, attention_window=512))    # the embedded SmolLM2
        model = SparseAttention(config, model="path/or/name/or/file.gguf")
        model = SparseAttention(config, model=hf_model, tokenizer=hf_tokenizer)

    Args:
        config: what a decode step reads; the model's own default if left out, see `models.tuned.default_for`.
        model: a transformers causal LM, or what `models.loading.load` takes: a hub name, a
            directory or a GGUF file; the embedded default if left out.
        tokenizer: for text in and out; comes along when the model is loaded by name.
        weights: "float32", "bf16", "int8" or "int4"; as they come if left out, see `models.loading.load`.
        compile: decode steps run compiled, see `generate`.
    Raises:
        ModelLoadError: no model there. UnsupportedError: a family that cannot be hooked.
        NonFiniteError: weights hold NaN or infinity. BackendError: compile, and no compiler.
    """

    model: PreTrainedModel
    tokenizer: PreTrainedTokenizerBase | None

    def __init__(
        self,
        config: AttentionConfig | None = None,
        model: PreTrainedModel | str | os.PathLike[str] | None = None,
        tokenizer: PreTrainedTokenizerBase | None = None,
        weights: str | None = None,
        compile: bool = False,
    ) -> None:
        super().__init__()
        model, found = load(model, weights=weights)
        self.config = config or tuned.default_for(model)
        self.tokenizer = tokenizer or found
        self.model = enable(model, self.config)
        if compile:
            compiled.install(self.model)

    @classmethod
    def from_pretrained(
        cls,
        name: str | os.PathLike[str] | None = None,
        config: AttentionConfig | None = None,
        *,
        weights: str | None = None,
        compile: bool = False,
        on_stage: Callable[[str], None] | None = None,
        **model_kwargs: Any,
    ) -> "SparseAttention":
        """Load a model by hub name, directory or GGUF file; None is the embedded default.

        Args:
            weights: "float32", "bf16", "int8" or "int4", see `models.loading.load`.
            compile: decode steps run compiled, see `generate`; on a CPU only.
            on_stage: told in a few words what is being done, for progress displays.
            model_kwargs: for transformers' `from_pretrained`: dtype, device_map and so on.
        Raises:
            ModelLoadError: no model there, or a damaged one.
        """
        model, tokenizer = load(name, weights=weights, on_stage=on_stage, **model_kwargs)
        decoder = cls(config, model, tokenizer)
        if compile:
            compiled.install(decoder.model, on_stage)
        return decoder

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

    def generate(
        self,
        input_ids: Tensor | None = None,
        *,
        compile: bool = False,
        lossless: bool | Lossless = False,
        return_stats: bool = False,
        **kwargs: Any,
    ) -> Any:
        """transformers' `generate`: sampling, beams, stopping criteria and streamers included.

        Args:
            compile: on a CPU, from now on decode steps run compiled, whatever the context; it takes about a minute
                once for a model, and is kept on disk. On CUDA, decode on a StaticSparseCache with room for prompt and
                max_new_tokens: transformers then compiles the step into one graph, for one answer a prompt.
            lossless: draft sparsely, verify several tokens at once densely: tokens are those of dense decoding. A
                `Lossless` says how, and afterwards what came of it. One row, by sampling or greedily.
            return_stats: return (output, `models.statistics.Statistics` of the decode steps).
        Raises:
            InputError: empty, not integer, out of vocabulary. ContextLengthError: too long with max_new_tokens.
            ConfigError: on CUDA, compile without ids or max_new_tokens or with a cache; lossless with cap or kv_dtype.
            BackendError: compile without a C++ compiler, or on CUDA without Triton. UnsupportedError: see lossless.
        """
        if return_stats:
            kwargs |= {"input_ids": input_ids, "compile": compile, "lossless": lossless}
            return with_statistics(self.generate, self._fresh, **kwargs)
        wanted = kwargs.get("max_new_tokens") or getattr(kwargs.get("generation_config"), "max_new_tokens", None) or 0
        if input_ids is not None:
            self.check_ids(input_ids, 0, wanted)
            kwargs = {**reading.chunking(self.config, input_ids.shape[1]), **kwargs}
        if compile and self._compiles_ahead:
            compiled.install(self.model)
        elif compile:
            if input_ids is None or not wanted or kwargs.get("past_key_values") is not None or lossless:
                raise ConfigError("compile=True needs ids and max_new_tokens, makes the cache itself, is not lossless")
            mask = kwargs.get("attention_mask")
            kwargs["past_key_values"] = reading.read_into_static(self.model, self.config, input_ids, mask, wanted)
        kwargs = drafting(lossless, self.tokenizer, kwargs) if lossless else kwargs
        return self.model.generate(input_ids, **kwargs)

    def _fresh(self) -> SparseCache:
        return SparseCache(self.model.config, self.config)

    @property
    def _compiles_ahead(self) -> bool:
        return self.model.device.type == "cpu" and self.config.backend != "triton"

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
        return self._stream(ids, on_prefill, {**kwargs, "attention_mask": torch.ones_like(ids), "max_new_tokens": room})

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
        cache = self._fresh()
        cache.watch(watched)
        self.read_into(input_ids, cache, on_progress)
        return cache

    def read_into(self, ids: Tensor, cache: SparseCache | StaticSparseCache, on_progress: Progress | None) -> None:
        """Read ids [B, T] behind what a cache holds, densely, a chunk at a time; `on_progress` as in `prefill`."""
        self.check_ids(ids, 0)
        reading.read_into(self.model, ids, cache, on_progress)

    def read(self, document: str | Tensor | None, on_progress: Progress | None = None) -> Session:
        """Read a document once, to ask about it many times; see `Session`.

        Args:
            document: text, which becomes the beginning of the user's message where there is a chat template; or
                ids [1, T], read as they are; or None for a conversation without one.
            on_progress: called with (tokens read, tokens to read) after each chunk.
        Raises:
            InputError: empty, several rows, or text without a tokenizer. ContextLengthError: no room for a question.
        """
        return Session.read(self, document, on_progress)

    def trace(self, text: str, chat: bool = False) -> Trace:
        """Attention scores: for the text's last position, the tokens read by every layer and KV head.

        Args:
            text: what to read; up to its last token densely, that one as a decode step.
            chat: put the text into the chat template first.
        Raises:
            InputError: empty text, or no tokenizer. ContextLengthError: too long.
        """
        return trace_text(self, text, chat)

    def prompt_ids(self, text: str, chat: bool | None = None) -> Tensor:
        """The ids [1, T] of a prompt, with the chat template where there is one (or as `chat` says).

        Raises:
            InputError: empty prompt, no tokenizer, or chat asked of a tokenizer without template.
        """
        return prompt_ids(self.require_tokenizer(), text, chat).to(self.model.device)

    def check_ids(self, ids: Tensor, past: int = 0, new_tokens: int = 0) -> None:
        """Refuse ids [B, T] that the model cannot read behind `past` tokens and before `new_tokens`.

        Raises:
            InputError: empty, not integer, out of vocabulary. ContextLengthError: too long.
        """
        check_ids(ids, self.model.get_input_embeddings().num_embeddings, self.context_length, past, new_tokens)

    def room_behind(self, ids: Tensor, past: int, wanted: int | None) -> int:
        """How many new tokens to ask for behind ids [B, T] behind `past` tokens: `wanted`, or what there is room for.

        Raises:
            InputError: empty, not integer, out of vocabulary. ContextLengthError: no room for them.
        """
        self.check_ids(ids, past, 1 if wanted is None else wanted)
        if wanted is not None or self.context_length is None:
            return DEFAULT_NEW_TOKENS if wanted is None else wanted
        return min(DEFAULT_NEW_TOKENS, self.context_length - past - ids.shape[1])

    @property
    def context_length(self) -> int | None:
        """Tokens the model was made for; None where its config does not say."""
        return getattr(self.model.config.get_text_config(decoder=True), "max_position_embeddings", None)

    def _prepare(self, text: str, max_new_tokens: int | None, chat: bool | None) -> tuple[Tensor, int]:
        ids = self.prompt_ids(text, chat)
        return ids, self.room_behind(ids, 0, max_new_tokens)

    def _stream(self, ids: Tensor, on_prefill: Progress | None, kwargs: dict[str, Any]) -> Iterator[str]:
        criteria = kwargs.pop("stopping_criteria", [])

        def generate(streamer: TextIteratorStreamer, stop: StopWhen) -> None:
            def report(done: int, total: int) -> None:
                # a reader that has left must not wait for the rest of a long prompt
                if stop.now.is_set():
                    raise CancelledError
                assert on_prefill is not None
                on_prefill(done, total)

            if kwargs.get("compile") and not self._compiles_ahead:
                del kwargs["compile"]
                progress = None if on_prefill is None else report
                kwargs["past_key_values"] = reading.read_into_static(
                    self.model, self.config, ids, None, kwargs["max_new_tokens"], progress
                )
            elif on_prefill is not None and ids.shape[1] > 2:
                # two tokens are left to generate: one alone would be a decode step, and read sparsely
                cache = kwargs.setdefault("past_key_values", self._fresh())
                if cache.get_seq_length() == 0:
                    self.read_into(ids[:, :-2], cache, report)
            self.generate(ids, streamer=streamer, stopping_criteria=[*criteria, stop], **kwargs)

        return pieces(self.require_tokenizer(), generate)

    def require_tokenizer(self) -> PreTrainedTokenizerBase:
        """The tokenizer; an InputError where there is none."""
        if self.tokenizer is None:
            raise InputError("text needs a tokenizer; pass tokenizer=... or use ids with generate()")
        return self.tokenizer
