"""Decode steps compiled ahead of time, once for every context, and kept on disk for the next start."""

import hashlib
import json
import logging
import os
import secrets
import warnings
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import transformers
from torch import Tensor, nn
from transformers import PreTrainedModel

from sparse_attention_decoder.config import AttentionConfig
from sparse_attention_decoder.errors import BackendError, CacheDirectoryError, UnsupportedError
from sparse_attention_decoder.models import linears
from sparse_attention_decoder.models.cache import SparseCache
from sparse_attention_decoder.models.kept import cache_directory
from sparse_attention_decoder.models.step import TracedStep, running_on
from sparse_attention_decoder.models.verifying import MOST_VERIFIED, reading_all

logger = logging.getLogger(__name__)

Stage = Callable[[str], None]
Step = Callable[[Tensor, Tensor], Tensor]

# raise it when a step is traced or compiled otherwise: what older versions left is then compiled again
_FORMAT = 3
_OPTIONS = {
    # the weights stay the model's own: prefill reads them too, and the file on disk is small
    "aot_inductor.package_constants_in_so": False,
    # what is fused is small, and our ops have threads of their own; a sum over several threads would add up one row
    # otherwise than each of many
    "cpp.threads": 1,
    # 16-bit numbers are rounded where the model rounds them, whatever is fused
    "emulate_precision_casts": True,
}


class Steps:
    """The compiled steps of a model, by rows decoded together, and the pass that verifies several tokens of one row.

    stage: told in a few words when the compiler starts.
    """

    def __init__(self, model: PreTrainedModel, stage: Stage) -> None:
        self._traced, self._stage = TracedStep(model), stage
        self._steps: dict[int, Step] = {}
        self._pass: Step | None = None
        self._has_tried = False
        self._weights = {name: tensor.detach() for name, tensor in _tensors(self._traced)}

    def of(self, rows: int) -> Step:
        """(ids, positions) [rows, 1] int64 -> logits [rows, 1, V]."""
        if rows not in self._steps:
            self._steps[rows] = self._kept(_Form(rows))
        return self._steps[rows]

    def verifying(self) -> Step | None:
        """(ids, positions) [1, N] int64 of 2 to MOST_VERIFIED tokens -> logits [1, N, V], the bits of N steps of one.

        None where they are not: it is tried once, when it is first asked for.
        """
        if not self._has_tried:
            self._has_tried, reason = True, "several tokens are then not what each is alone"
            try:
                found = self._kept(_Form(1, MOST_VERIFIED))
                self._pass = found if _agree(self._traced.model, self.of(1), found) else None
            except (BackendError, UnsupportedError) as error:
                reason = str(error)
            if self._pass is None:
                logger.warning("what verifies drafts is not compiled: %s", reason)
        return self._pass

    def _kept(self, form: "_Form") -> Step:
        place = cache_directory() / "steps" / f"{_identity(self._traced, self._weights, form)}.pt2"
        if not _is_whole(place):
            self._stage(f"compiling the {form}, once: about a minute")
            _compile(self._traced, form, place)
        self._stage(f"loading the compiled {form}")
        return self._load(place)

    def _load(self, place: Path) -> Step:
        facts = json.loads(_facts_of(place).read_text(encoding="utf-8"))
        runner = torch._inductor.aoti_load_package(str(place))
        # the compiler passes a matrix's group size as a tensor of its own
        group_size = torch.tensor(facts["group_size"])
        # the code holds addresses: these tensors must live as long as it does
        held = {name: self._weights.get(name, group_size) for name in runner.get_constant_fqns()}
        runner.load_constants(held, check_full_update=True, user_managed=True)
        return _Loaded(runner, held)


@dataclass(frozen=True)
class _Form:
    """Rows of one token each; or, where `most` is more than one, one row of two to so many."""

    rows: int
    most: int = 1

    def __str__(self) -> str:
        if self.most > 1:
            return f"pass over up to {self.most} tokens"
        return f"decode step of {self.rows} row{'s' * (self.rows > 1)}"


@torch.no_grad()
def _agree(model: PreTrainedModel, step: Step, several: Step) -> bool:
    """Whether both give the same logits, keys and values, to the last bit, of as many tokens as there may be."""
    generator, words = torch.Generator().manual_seed(0), model.config.get_text_config().vocab_size
    ids = torch.randint(words, (1, MOST_VERIFIED), generator=generator)
    positions = torch.arange(MOST_VERIFIED)[None]

    def left_by(cut: list[int]) -> list[Tensor]:
        cache = SparseCache(model.config, AttentionConfig())
        with reading_all(cache), running_on(cache):
            logits = [
                (step if part.shape[1] == 1 else several)(part, place)
                for part, place in zip(ids.split(cut, 1), positions.split(cut, 1), strict=True)
            ]
        return [torch.cat(logits, 1), *(tensor for layer in cache.sparse_layers for tensor in layer.plain())]

    alone = left_by([1] * MOST_VERIFIED)
    # passes of every length
    cuts = [[MOST_VERIFIED], *([first, MOST_VERIFIED - first] for first in range(1, MOST_VERIFIED // 2 + 1))]
    return all(torch.equal(*pair) for cut in cuts for pair in zip(alone, left_by(cut), strict=True))


def _tensors(model: nn.Module) -> list[tuple[str, Tensor]]:
    return [*model.named_parameters(remove_duplicate=False), *model.named_buffers(remove_duplicate=False)]


def _identity(step: TracedStep, weights: dict[str, Tensor], form: _Form) -> str:
    """16 hex digits that change with all that is compiled in: the model's make-up, but not its weights."""
    # compiled for this very processor: a home directory may be shared by others
    processor = {name: value for name, value in torch.cpu.get_capabilities().items() if value is True}
    made_of: list[Any] = [_FORMAT, torch.__version__, transformers.__version__, processor, str(form)]
    made_of += [step.model.config.to_json_string(use_diff=False), _OPTIONS]
    made_of += [f"{name} {tensor.dtype} {tuple(tensor.shape)} {tensor.stride()}" for name, tensor in weights.items()]
    made_of += [str(step), list(linears.installed(step))]
    return hashlib.sha256(json.dumps(made_of).encode()).hexdigest()[:16]


@dataclass(frozen=True)
class _Loaded:
    """A compiled step and the weights that it reads."""

    runner: Any
    held: dict[str, Tensor]

    def __call__(self, ids: Tensor, positions: Tensor) -> Tensor:
        # compiled code takes the layout it was traced with for granted
        logits: Tensor = self.runner(ids.contiguous(), positions.contiguous())
        return logits


def _facts_of(place: Path) -> Path:
    return place.with_suffix(".json")


def _is_whole(place: Path) -> bool:
    """Whether a compiled step lies there as it was written: it is code, so anything else must not be run."""
    try:
        facts = json.loads(_facts_of(place).read_text(encoding="utf-8"))
        return bool(facts["sha256"] == hashlib.sha256(place.read_bytes()).hexdigest())
    except FileNotFoundError:
        return False
    except (OSError, ValueError, TypeError, LookupError) as error:
        logger.warning("the compiled step %s is damaged (%s): it is compiled again", place, error)
        return False


@torch.no_grad()
def _compile(step: TracedStep, form: _Form, place: Path) -> None:
    draft = place.with_name(f"{place.stem}.{secrets.token_hex(4)}.pt2")
    try:
        place.parent.mkdir(parents=True, exist_ok=True)
        with warnings.catch_warnings():
            # of PyTorch's own compiler, about itself
            warnings.simplefilter("ignore")
            group_size = _compile_to(step, form, draft)
        facts = {"group_size": group_size, "sha256": hashlib.sha256(draft.read_bytes()).hexdigest()}
        _facts_of(draft).write_text(json.dumps(facts), encoding="utf-8")
        # one without the other is compiled again
        os.replace(_facts_of(draft), _facts_of(place))
        os.replace(draft, place)
    except OSError as error:
        raise CacheDirectoryError(
            f"cannot keep the compiled step in {place.parent}: {error.strerror or error}"
        ) from error
    finally:
        for left in (draft, _facts_of(draft)):
            with suppress(OSError):
                left.unlink()


def _compile_to(step: TracedStep, form: _Form, draft: Path) -> int:
    """Write the compiled step; the group size of its quantised matrices, 0 for none."""
    # of a size that no other has, so that none is taken for it
    ids = torch.zeros(form.rows, min(form.most, 7), dtype=torch.int64)
    sizes = {1: torch.export.Dim("tokens", min=2, max=form.most)} if form.most > 1 else {}
    try:
        traced = torch.export.export(step, (ids, ids.clone()), dynamic_shapes=(sizes, sizes), strict=False)
        _require_all_layers(step.model, traced)
        groups = {int(str(node.args[2])) for node in traced.graph.nodes if "int4pack_mm" in str(node.target)}
        torch._inductor.aoti_compile_and_package(traced, package_path=str(draft), inductor_configs=_OPTIONS)
    except UnsupportedError:
        raise
    # no C++ compiler, or a model whose forward depends on numbers in tensors
    except RuntimeError as error:
        reason = next(iter(str(error).strip().splitlines()), type(error).__name__)
        raise BackendError(f"the decode step cannot be compiled: {reason}; decode without compile") from error
    if len(groups) > 1:
        raise BackendError(f"matrices in groups of {sorted(groups)} cannot be compiled together; expected one size")
    return max(groups, default=0)


def _require_all_layers(model: PreTrainedModel, traced: torch.export.ExportedProgram) -> None:
    """Attention that did not find the cache would read the new token alone."""
    ours = ("sparse_attention_decoder.decode", "sparse_attention_decoder.verify")
    found = sum(any(op in str(node.target) for op in ours) for node in traced.graph.nodes)
    expected = len(SparseCache(model.config, AttentionConfig()).layers)
    if found != expected:
        raise UnsupportedError(
            f"compile=True needs attention that takes its keys and values from the cache as they are; in "
            f"{model.config.model_type} {found} of {expected} layers do; decode it without"
        )
