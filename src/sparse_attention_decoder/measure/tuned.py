"""Tuning from text to file: what is tuned on, what is held out, and the evidence that goes into the file."""

import json
from collections.abc import Callable
from dataclasses import asdict, dataclass, replace
from datetime import date
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from sparse_attention_decoder import __version__
from sparse_attention_decoder.config import AttentionConfig
from sparse_attention_decoder.decoder import SparseAttention
from sparse_attention_decoder.errors import InputError
from sparse_attention_decoder.measure.quality import Outcome, compare
from sparse_attention_decoder.measure.rehearsal import Rehearsal
from sparse_attention_decoder.measure.texts import about
from sparse_attention_decoder.measure.tune import Search, Target, Tried
from sparse_attention_decoder.models import identity

# long texts are cut to this many characters: a tokenizer takes a second for a million
_CHARACTERS = 4_000_000


@dataclass(frozen=True)
class Plan:
    """What is decoded.

    context: tokens read before; tokens: decoded behind them; samples: passages of each text to tune on, and as many to
        hold out, from the other half of it.
    """

    context: int = 4096
    tokens: int = 96
    samples: int = 2

    @property
    def length(self) -> int:
        """Tokens of a passage."""
        return self.context + self.tokens + 1


@dataclass(frozen=True)
class Listener:
    """Told what is done, in words, and steps done of all."""

    stage: Callable[[str], None]
    progress: Callable[[int, int], None]


@dataclass(frozen=True)
class Tuned:
    """A config and what it did on text it was not tuned on.

    evidence: what the file has beside the config. holds: whether the target held there.
    """

    config: AttentionConfig
    evidence: dict[str, Any]
    holds: bool

    def write(self, path: Path) -> None:
        """Write what `AttentionConfig.load` takes, and the evidence."""
        path.parent.mkdir(parents=True, exist_ok=True)
        text = json.dumps({"config": asdict(self.config), **self.evidence}, indent=1, allow_nan=False)
        path.write_text(text + "\n", encoding="utf-8")


def tune(
    decoder: SparseAttention, name: str, texts: dict[str, str], target: Target, plan: Plan, listener: Listener
) -> Tuned:
    """Find the cheapest config that holds a target, and measure it on the half of the texts it was not tuned on.

    Args:
        decoder: the model; its own config says nothing but that keys and values are not packed.
        name: the model's, for the file.
        texts: by name; each must have room for all passages.
    Raises:
        TargetError: nothing holds the target on the text to tune on. InputError: a text or context too short, or
            packed keys. UnsupportedError: layers without full attention.
        ContextLengthError: more context than the model has.
    """
    if decoder.config.kv_dtype is not None or decoder.config.is_capped:
        raise InputError("tune rehearses on keys and values as the model makes them; use no kv_dtype and no cap")
    least = AttentionConfig().budget_tokens
    if plan.context <= least:
        raise InputError(f"a context of {plan.context} tokens is read whole; give --context more than {least}")
    ours, held_out = halves(texts, decoder, plan)
    decoder.check_ids(ours)
    listener.stage(f"reading {len(ours)} passages of {plan.context} tokens to tune on")
    rehearsal = Rehearsal(decoder, ours, plan.context, listener.progress)
    search = Search(rehearsal, target, listener.stage, lambda passes: listener.progress(passes, search.most_passes))
    best = search.run(AttentionConfig(dense_below=0))
    plain = search.tried[0]
    configs = {"tuned": best.config, "default": AttentionConfig(dense_below=0), "plain": plain.config}
    listener.stage(f"decoding {len(held_out)} passages that were held out, one token at a time")
    outcomes = measure(decoder, held_out, plan, configs, listener)
    config = replace(best.config, dense_below=None, tuned_for=identity.of(decoder.model))
    kl, _, _, change = outcomes["tuned"].mean()
    evidence = {
        "tuned_for": name,
        "target": {key: value for key, value in asdict(target).items() if value is not None},
        "held_out": {key: told(outcome) for key, outcome in outcomes.items()},
        "saved": saved(outcomes),
        "search": [_summary(tried) for tried in search.tried],
        "texts": about(texts),
        "plan": {**asdict(plan), "held_out_tokens": held_out.shape[0] * plan.tokens},
        "dtype": str(decoder.model.dtype).removeprefix("torch."),
        "date": date.today().isoformat(),
        "versions": {"sparse_attention_decoder": __version__, "torch": torch.__version__,
                     "transformers": version("transformers")},
    }  # fmt: skip
    return Tuned(config, evidence, target.is_met(kl, change))


def halves(texts: dict[str, str], decoder: SparseAttention, plan: Plan) -> tuple[Tensor, Tensor]:
    """Passages to tune on, from the first half of each text, and to hold out, from the second: [B, length] each.

    Raises:
        InputError: a text is too short.
    """
    first: list[list[int]] = []
    second: list[list[int]] = []
    for name, text in texts.items():
        ids: Any = decoder.require_tokenizer()(text[:_CHARACTERS], add_special_tokens=False).input_ids
        half = len(ids) // 2
        if half < plan.samples * plan.length:
            raise InputError(
                f"{name} has {len(ids)} tokens; {2 * plan.samples} passages of {plan.length} need "
                f"{2 * plan.samples * plan.length}; give a longer text, less --context or fewer --samples"
            )
        for rows, begin in ((first, 0), (second, half)):
            stride = half // plan.samples
            rows += [ids[begin + i * stride : begin + i * stride + plan.length] for i in range(plan.samples)]
    return torch.tensor(first), torch.tensor(second)


def measure(
    decoder: SparseAttention, ids: Tensor, plan: Plan, configs: dict[str, AttentionConfig], listener: Listener
) -> dict[str, Outcome]:
    """Each config's outcome over passages, decoded one token at a time."""
    passes = (len(configs) + 1) * plan.tokens

    def on_step(number: int, step: int) -> None:
        listener.progress(number * plan.tokens + step + 1, passes)

    found = compare(decoder, ids, plan.context, list(configs.values()), on_step, listener.progress)
    return dict(zip(configs, found, strict=True))


def told(outcome: Outcome) -> dict[str, Any]:
    """An outcome, as the file has it."""
    result = outcome.result([])
    names = ("kl", "kl_ci", "ppl_change", "ppl_change_ci", "top1", "top1_ci", "share_read", "index_share", "retrieved")
    return {"tokens": outcome.tokens[0].numel(), **{name: _rounded(result[name]) for name in names}}


def saved(outcomes: dict[str, Outcome]) -> dict[str, float]:
    """Shares of what is read that the tuned config saves, over dense, the default and the plain rule at its target."""
    tuned, default, plain = (outcomes[name] for name in ("tuned", "default", "plain"))
    found = {"of_dense_bytes": 1 - tuned.share_read}
    for name, other in (("default", default), ("plain", plain)):
        found[f"of_{name}_bytes"] = 1 - tuned.share_read / other.share_read
        found[f"of_{name}_retrieved"] = 1 - tuned.retrieved / other.retrieved
    return {name: round(value, 4) for name, value in found.items()}


def _summary(tried: Tried) -> dict[str, Any]:
    config, found = tried.config, tried.found
    return {
        "threshold": float(f"{config.threshold:.3g}"), "window": config.attention_window, "top_k": config.top_k,
        "far_field": config.far_field, "by_layer": config.layer_scales is not None,
        "kl": _rounded(float(found.kl.mean())), "ce_change": _rounded(float(found.ce_change.mean())),
        "share_read": _rounded(found.share_read), "strain": _rounded(tried.strain),
    }  # fmt: skip


def _rounded(value: Any) -> Any:
    return [_rounded(one) for one in value] if isinstance(value, (list, tuple)) else float(f"{value:.4g}")
