"""Lossless decoding: sparse attention drafts, dense attention verifies several tokens in one pass, on one cache."""

import logging
import time
from contextlib import nullcontext
from dataclasses import dataclass, field
from functools import cache
from typing import Any

import torch
from torch import Tensor
from transformers import (
    GenerationConfig,
    LogitsProcessorList,
    PreTrainedModel,
    PreTrainedTokenizerBase,
    StoppingCriteriaList,
)
from transformers.generation import BaseStreamer, GenerateDecoderOnlyOutput, StopStringCriteria

from sparse_attention_decoder.errors import ConfigError, InputError, UnsupportedError
from sparse_attention_decoder.models.cache import SparseCache
from sparse_attention_decoder.models.compiled import prepare_pass
from sparse_attention_decoder.models.drafter import drafter_of, packs
from sparse_attention_decoder.models.pace import Pace
from sparse_attention_decoder.models.text import Text
from sparse_attention_decoder.models.verifying import MOST_VERIFIED, RowsAlone, index_at, reading_all
from sparse_attention_decoder.policies import resolve
from sparse_attention_decoder.selection import Rows

logger = logging.getLogger(__name__)

# what generate prepares beside the cache, and a batch of one row without padding does not need
_IMPLIED = {"attention_mask", "position_ids", "cache_position", "use_cache", "logits_to_keep", "past_key_values"}
_OTHER_WAYS = ("custom_generate", "assistant_model", "prompt_lookup_num_tokens")
_PER_STEP = ("output_scores", "output_logits", "output_attentions", "output_hidden_states")


@dataclass
class Lossless:
    """How to decode losslessly, and afterwards what came of it: `str` says it in a line.

        lossless = Lossless()
        model.generate(ids, max_new_tokens=200, lossless=lossless)
        print(lossless)

    Args:
        drafts: tokens drafted before each dense pass, 1 to 15; None lets the number follow what is accepted and what
            steps and passes are measured to take, and drafts nothing where that would be slower.
        weights: what drafts: "own", the model itself; "int4", a packed copy of it whose steps run compiled, see
            `models.drafter`; None takes int4 for a model in 16 or 32 bits whose own steps run compiled, else its own.
    tokens: decoded, the prompt's own pass not counted, added up over calls; passes: dense passes that it took.
    drafted, accepted: tokens proposed by sparse attention, and those of them that dense attention chose too.
    reason: why nothing is drafted at the moment; None while something is.
    Raises:
        ConfigError: a number of drafts that one pass does not verify, or other weights.
    """

    drafts: int | None = None
    weights: str | None = None
    tokens: int = field(default=0, init=False)
    passes: int = field(default=0, init=False)
    drafted: int = field(default=0, init=False)
    accepted: int = field(default=0, init=False)
    reason: str | None = field(default=None, init=False)

    def __post_init__(self) -> None:
        if self.drafts is not None and not 0 < self.drafts < MOST_VERIFIED:
            raise ConfigError(f"drafts is {self.drafts!r}; expected 1 to {MOST_VERIFIED - 1}, or None to adapt")
        if self.weights not in ("own", "int4", None):
            raise ConfigError(f'weights is {self.weights!r}; expected "own" or "int4", or None to choose')

    @property
    def acceptance(self) -> float:
        """Accepted tokens over drafted ones; 0.0 where nothing was drafted."""
        return self.accepted / self.drafted if self.drafted else 0.0

    @property
    def tokens_per_pass(self) -> float:
        """Tokens that a dense pass gave in the mean; 1.0 is decoding without drafts."""
        return self.tokens / self.passes if self.passes else 0.0

    def __str__(self) -> str:
        line = f"lossless: {self.tokens} tokens in {self.passes} dense passes, {self.tokens_per_pass:.2f} a pass"
        if self.drafted:
            line += f"; {self.accepted} of {self.drafted} drafted tokens accepted ({self.acceptance:.0%})"
        return line if self.reason is None else f"{line}; {self.reason}"


class Drafting:
    """The decoding loop that `generate` takes as `custom_generate`.

    Every token is the one that a dense step chooses: of the same logits, with the same random numbers, drawn once for
    each place in the text, whether it is drafted or not. A draft is right where it guessed that token. So what comes
    out does not depend on how much was drafted, and with the same seed it is what sampling without drafts gives.
    """

    def __init__(self, lossless: Lossless, streamer: BaseStreamer | None = None) -> None:
        self._lossless, self._streamer = lossless, streamer
        self._pace = Pace(lossless.drafts)
        # a step that makes the index, or makes it anew, is no measure of those to come
        self._index: object = None
        self._is_settled = False
        # whether a pass over several tokens has to take layers' rows apart: the first one shows it
        self._takes_apart = True

    def __call__(
        self,
        model: PreTrainedModel,
        input_ids: Tensor,
        logits_processor: LogitsProcessorList,
        stopping_criteria: StoppingCriteriaList,
        generation_config: GenerationConfig,
        **model_kwargs: Any,
    ) -> Tensor | GenerateDecoderOnlyOutput:
        """Ids [1, T] of prompt and answer, or what `return_dict_in_generate` asks for."""
        held = _checked(input_ids, generation_config, model_kwargs)
        text = Text(input_ids, logits_processor, stopping_criteria, bool(generation_config.do_sample))
        drafter = drafter_of(model) if packs(model, self._lossless.weights) else model
        prepare_pass(model)
        held.activate_past_recording()
        try:
            self._decode(model, drafter, held, text)
        finally:
            for layer in held.layers:
                if hasattr(layer, "record_past"):
                    layer.record_past = False
        if self._streamer is not None:
            self._streamer.end()
        if generation_config.return_dict_in_generate:
            return GenerateDecoderOnlyOutput(sequences=text.ids, past_key_values=held)
        return text.ids

    def _decode(self, model: PreTrainedModel, drafter: PreTrainedModel, held: SparseCache, text: Text) -> None:
        new = text.ids[:, held.get_seq_length() :]
        # the prompt is read as always; of a single token as a dense step
        logits = self._dense(model, held, new) if new.shape[1] == 1 else _logits(model, held, new)
        held.crop(0)
        done = self._take(text, text.choose(text.ids, logits[-1:], 0)[0])
        while not done:
            begun, before = time.perf_counter(), text.ids.shape[1]
            index = index_at(held, before)
            self._is_settled = self._index == index == index_at(held, before + MOST_VERIFIED)
            most = text.room - 1 if self._may_draft(held, drafter is model) else 0
            draft, probabilities = self._draft(drafter, held, text, most)
            passed = time.perf_counter()
            logits = self._dense(model, held, torch.cat([text.ids[:, -1:], draft], 1))
            if self._is_settled or len(logits) == 1:
                self._pace.record_pass(len(logits), time.perf_counter() - passed)
            accepted, guesses = 0, [*draft[0].tolist(), None]
            for guess, row in zip(guesses, logits.split(1), strict=True):
                token, _ = text.choose(text.ids, row, 0)
                done = self._take(text, token)
                accepted += token == guess
                if done or token != guess:
                    break
            # the newest token is not in the cache yet, nor is anything behind it
            held.crop(text.ids.shape[1] - 1 - held.get_seq_length())
            self._lossless.tokens += text.ids.shape[1] - before
            self._count(probabilities, accepted, time.perf_counter() - begun)
            self._index = index if probabilities else self._index

    def _dense(self, model: PreTrainedModel, held: SparseCache, ids: Tensor) -> Tensor:
        """Logits [N, V] behind each of ids [1, N], as N dense steps give them."""
        with reading_all(held):
            if ids.shape[1] == 1:
                return _logits(model, held, ids)
            with RowsAlone() if self._takes_apart else nullcontext() as apart:
                output = model(input_ids=ids, past_key_values=held, use_cache=True)
            self._takes_apart = apart is not None and apart.count > 0
            logits: Tensor = output.logits[0].float()
            return logits

    def _draft(self, drafter: PreTrainedModel, held: SparseCache, text: Text, most: int) -> tuple[Tensor, list[float]]:
        """Tokens [1, K] that sparse steps choose, and the probability that they gave each; the cache is as before."""
        ids, probabilities, chance = text.ids, list[float](), 1.0
        while len(probabilities) < most and self._pace.goes_on(len(probabilities), chance):
            begun = time.perf_counter()
            logits = _logits(drafter, held, ids[:, -1:])
            token, probability = text.choose(ids, logits, len(probabilities))
            ids = torch.cat([ids, torch.tensor([[token]], device=ids.device)], 1)
            probabilities.append(probability)
            chance *= self._pace.chance(probability)
            if self._is_settled:
                self._pace.record_step(time.perf_counter() - begun)
        # what sparse steps wrote is not what dense ones would have: the pass over the draft writes it anew
        held.crop(-len(probabilities))
        return ids[:, text.ids.shape[1] :], probabilities

    def _may_draft(self, held: SparseCache, is_own: bool) -> bool:
        """Whether a draft, by the model's own weights or others, can be faster than what verifies it; says why not."""
        rows = Rows.full(1, held.get_seq_length() + 1)
        reason = None
        if is_own and all(layer.state.dense_rows(rows)[0] for layer in held.sparse_layers):
            reason = "a step reads them all anyway"
        elif not self._pace.pays:
            reason = "they do not pay"
        self._lossless.reason = None
        if reason is not None:
            _say_once(f"lossless=True drafts nothing for now, for {reason}; the `Lossless` says more")
            self._lossless.reason = f"no drafts at {rows.length} tokens, for {reason}; {self._pace}"
        return reason is None

    def _take(self, text: Text, token: int) -> bool:
        done = text.take(token)
        if self._streamer is not None:
            self._streamer.put(text.ids[:, -1].cpu())
        return done

    def _count(self, probabilities: list[float], accepted: int, seconds: float) -> None:
        lossless = self._lossless
        lossless.passes += 1
        lossless.drafted += len(probabilities)
        lossless.accepted += accepted
        if self._is_settled and probabilities:
            self._pace.record_round(probabilities, accepted, seconds)


def drafting(
    lossless: bool | Lossless, tokenizer: PreTrainedTokenizerBase | None, kwargs: dict[str, Any]
) -> dict[str, Any]:
    """Keyword arguments for transformers' `generate`, so that it decodes losslessly.

    Raises:
        ConfigError: another way to decode is asked for, too. InputError: stop strings, and no tokenizer.
    """
    kwargs = dict(kwargs)
    if also := [name for name in _OTHER_WAYS if kwargs.get(name) is not None]:
        raise ConfigError(f"lossless=True decodes by drafts of its own; leave out {', '.join(also)}")
    # to a loop of one's own transformers does not hand these on
    strings, tokenizer = kwargs.pop("stop_strings", None), kwargs.pop("tokenizer", None) or tokenizer
    if strings is not None:
        if tokenizer is None:
            raise InputError("stop_strings need a tokenizer; pass tokenizer=...")
        criteria = kwargs.get("stopping_criteria") or []
        kwargs["stopping_criteria"] = StoppingCriteriaList([*criteria, StopStringCriteria(tokenizer, strings)])
    how = lossless if isinstance(lossless, Lossless) else Lossless()
    kwargs["custom_generate"] = Drafting(how, kwargs.get("streamer"))
    return kwargs


def _logits(model: PreTrainedModel, held: SparseCache, ids: Tensor) -> Tensor:
    """Logits [1, V] behind the newest of ids [1, N], which are read into the cache."""
    logits: Tensor = model(input_ids=ids, past_key_values=held, use_cache=True, logits_to_keep=1).logits[0].float()
    return logits


def _checked(ids: Tensor, config: GenerationConfig, model_kwargs: dict[str, Any]) -> SparseCache:
    """The cache; or why this cannot be decoded losslessly."""
    held = model_kwargs.get("past_key_values")
    if not model_kwargs.get("use_cache") or not isinstance(held, SparseCache):
        raise ConfigError(
            f"lossless=True drafts and verifies on a SparseCache, got {type(held).__name__}; leave past_key_values, "
            "use_cache and cache_implementation out"
        )
    if ids.shape[0] > 1 or (config.num_beams or 1) > 1:
        raise UnsupportedError(
            f"lossless=True decodes one row, by sampling or greedily; got {ids.shape[0]} rows and "
            f"{config.num_beams or 1} beams"
        )
    if held.config.kv_dtype is not None:
        raise ConfigError(
            f"lossless=True cannot verify several tokens at once on a cache of kv_dtype {held.config.kv_dtype!r}: "
            "which of its newest tokens are rounded differs from token to token; leave kv_dtype out"
        )
    if held.config.is_capped:
        raise ConfigError(
            "lossless=True cannot take back a draft under max_cache_tokens or max_cache_bytes, which may have evicted "
            "for it; use one or the other"
        )
    if resolve(held.config.policy).evicts:
        raise ConfigError(
            f'policy {held.config.policy!r} evicts, and dense attention cannot verify what is gone; use "sketch"'
        )
    # windows go back while their past is recorded
    others = [layer for layer in held.layers if not (layer.is_croppable or getattr(layer, "is_sliding", False))]
    if stuck := sorted({type(layer).__name__ for layer in others}):
        raise UnsupportedError(f"lossless=True has to take back drafts, which {', '.join(stuck)} cannot")
    if model_kwargs.get("attention_mask") is not None:
        raise InputError("lossless=True takes one row without padding; leave out what the attention_mask hides")
    if ids.shape[1] <= held.get_seq_length():
        raise InputError(
            f"{ids.shape[1]} ids and a cache of {held.get_seq_length()} tokens; pass the whole text, cached part "
            "included"
        )
    if asked := [name for name in _PER_STEP if getattr(config, name)]:
        raise UnsupportedError(f"lossless=True does not give {', '.join(asked)}; leave it out, or decode densely")
    if unknown := sorted(name for name in model_kwargs.keys() - _IMPLIED if model_kwargs[name] is not None):
        raise UnsupportedError(f"lossless=True does not know what to do with {', '.join(unknown)}")
    return held


@cache
def _say_once(message: str) -> None:
    logger.warning(message)
