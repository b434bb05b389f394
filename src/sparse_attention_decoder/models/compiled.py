"""A model's decode step compiled ahead of time, once for every context, and kept on disk for the next start."""

import functools
import hashlib
import json
import logging
import os
import secrets
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import transformers
from torch import Tensor, nn
from transformers import PreTrainedModel
from transformers.modeling_outputs import CausalLMOutputWithPast

from sparse_attention_decoder.config import AttentionConfig
from sparse_attention_decoder.errors import BackendError, CacheDirectoryError, UnsupportedError
from sparse_attention_decoder.models import linears
from sparse_attention_decoder.models.cache import SparseCache
from sparse_attention_decoder.models.kept import cache_directory
from sparse_attention_decoder.models.step import TracedStep, running_on
from sparse_attention_decoder.models.verifying import is_read_whole

logger = logging.getLogger(__name__)

Stage = Callable[[str], None]
Step = Callable[[Tensor, Tensor], Tensor]

# raise it when a step is traced or compiled otherwise: what older versions left is then compiled again
_FORMAT = 2
# the first whose ahead-of-time compiler this was tested with
_LEAST_TORCH = (2, 13)
_STATE = "_sparse_compiled"
_OPTIONS = {
    # the weights stay the model's own: prefill reads them too, and the file on disk is small
    "aot_inductor.package_constants_in_so": False,
    # the number of threads is asked for at every step, not compiled in
    "cpp.dynamic_threads": True,
}
_PASSED_ON = {"input_ids", "past_key_values", "position_ids", "attention_mask", "use_cache", "return_dict",
              "logits_to_keep", "cache_position"}  # fmt: skip
# largest difference of a logit from the eager step's, over the largest logit: bfloat16 keeps 8 bits
_TOLERANCE = {torch.float32: 1e-3, torch.bfloat16: 0.1, torch.float16: 0.02}


def install(model: PreTrainedModel, on_stage: Stage | None = None) -> None:
    """From now on decode steps of this model on a SparseCache run compiled; everything else runs as before.

    Args:
        model: enabled, on a CPU, every layer with full attention.
        on_stage: told in a few words when the compiler starts. The first time takes about a minute; from then on the
            step is loaded from `cache_directory()`. Rows decoded together are compiled in: another batch, another step.
    Raises:
        BackendError: no compiler, or a PyTorch or model whose step it does not take.
        UnsupportedError: layers with a sliding window or of another kind. CacheDirectoryError: no place to keep it.
    """
    if hasattr(model, _STATE):
        return
    if model.device.type != "cpu":
        raise BackendError(f"the model is on {model.device}; there a static cache is compiled, see StaticSparseCache")
    if torch.__version__ < torch.torch_version.TorchVersion(".".join(map(str, _LEAST_TORCH))):
        raise BackendError(
            f"compile=True needs PyTorch {'.'.join(map(str, _LEAST_TORCH))}; this is {torch.__version__}"
        )
    cache = SparseCache(model.config, AttentionConfig())
    if len(cache.sparse_layers) != len(cache.layers):
        raise UnsupportedError(
            f"compile=True on a CPU takes models whose layers all have full attention; of {model.config.model_type}'s "
            f"{len(cache.layers)} layers {len(cache.sparse_layers)} have; decode it without"
        )
    steps = _Steps(model, on_stage or logger.info)
    steps.of(1)
    setattr(model, _STATE, (steps, vars(model).get("forward")))
    model.forward = _dispatch(model, steps, model.forward)


def is_installed(model: PreTrainedModel) -> bool:
    """Whether decode steps of this model run compiled."""
    return hasattr(model, _STATE)


def remove(model: PreTrainedModel) -> None:
    """Undo `install`. Does nothing to a model that has no compiled step."""
    if hasattr(model, _STATE):
        _, own_forward = getattr(model, _STATE)
        delattr(model, _STATE)
        # set on the instance over the class's method, so deleting uncovers that
        del model.forward
        if own_forward is not None:
            model.forward = own_forward


@contextmanager
def set_aside(model: PreTrainedModel) -> Iterator[None]:
    """While it is entered, decode steps run as before `install`: what they leave to look at is then whole."""
    compiled_forward = vars(model).get("forward") if hasattr(model, _STATE) else None
    if compiled_forward is None:
        yield
        return
    _, own_forward = getattr(model, _STATE)
    del model.forward
    if own_forward is not None:
        model.forward = own_forward
    try:
        yield
    finally:
        model.forward = compiled_forward


def _dispatch(model: PreTrainedModel, steps: "_Steps", forward: Callable[..., Any]) -> Callable[..., Any]:
    @functools.wraps(forward)
    def compiled_or_not(*args: Any, **kwargs: Any) -> Any:
        given = {"input_ids": args[0], **kwargs} if len(args) == 1 else kwargs
        reason = _refuses(given) if len(args) < 2 else "its arguments have no names"
        if reason is not None:
            if reason:
                _say_once(reason)
            return forward(*args, **kwargs)
        ids, cache, positions = given["input_ids"], given["past_key_values"], given.get("position_ids")
        if positions is None:
            positions = torch.full(ids.shape, cache.get_seq_length())
        with running_on(cache):
            logits = steps.of(ids.shape[0])(ids, positions)
        return CausalLMOutputWithPast(logits=logits, past_key_values=cache)

    return compiled_or_not


def _refuses(given: dict[str, Any]) -> str | None:
    """None for a decode step that is compiled; "" for what never is, or why this step is not."""
    ids, cache = given.get("input_ids"), given.get("past_key_values")
    if not isinstance(ids, Tensor) or ids.ndim != 2 or ids.shape[1] != 1 or not isinstance(cache, SparseCache):
        return ""
    if is_read_whole(cache):
        # what decides about tokens runs as without compilation
        return ""
    if torch.is_grad_enabled():
        return "a decode step under autograd is not compiled; decode under torch.no_grad()"
    if given.keys() - _PASSED_ON:
        return f"a decode step with {', '.join(sorted(given.keys() - _PASSED_ON))} is not compiled"
    mask = given.get("attention_mask")
    if mask is not None and (mask.ndim != 2 or not bool(mask.all())):
        return "a decode step of a padded batch is not compiled"
    if given.get("use_cache") is False or given.get("return_dict") is False:
        return "a decode step without its cache, or returning a tuple, is not compiled"
    return None


@functools.cache
def _say_once(message: str) -> None:
    logger.warning(message)


class _Steps:
    """The compiled steps of a model, by rows decoded together."""

    def __init__(self, model: PreTrainedModel, stage: Stage) -> None:
        self._traced, self._stage = TracedStep(model), stage
        self._steps: dict[int, Step] = {}
        self._weights = {name: tensor.detach() for name, tensor in _tensors(self._traced)}

    def of(self, rows: int) -> Step:
        """(ids, positions) [rows, 1] int64 -> logits [rows, 1, V]."""
        if rows not in self._steps:
            place = cache_directory() / "steps" / f"{_identity(self._traced, self._weights, rows)}.pt2"
            if not _is_whole(place):
                self._stage(f"compiling the decode step of {rows} row{'s' * (rows > 1)}, once: about a minute")
                _compile(self._traced, rows, place)
            self._stage("loading the compiled decode step")
            self._steps[rows] = self._load(place)
        return self._steps[rows]

    def _load(self, place: Path) -> Step:
        facts = json.loads(_facts_of(place).read_text(encoding="utf-8"))
        runner = torch._inductor.aoti_load_package(str(place))
        # the compiler passes a matrix's group size as a tensor of its own
        group_size = torch.tensor(facts["group_size"])
        # the code holds addresses: these tensors must live as long as it does
        held = {name: self._weights.get(name, group_size) for name in runner.get_constant_fqns()}
        runner.load_constants(held, check_full_update=True, user_managed=True)
        return _Loaded(runner, held)


def _tensors(model: nn.Module) -> list[tuple[str, Tensor]]:
    return [*model.named_parameters(remove_duplicate=False), *model.named_buffers(remove_duplicate=False)]


def _identity(step: TracedStep, weights: dict[str, Tensor], rows: int) -> str:
    """16 hex digits that change with all that is compiled in: the model's make-up, but not its weights."""
    # compiled for this very processor: a home directory may be shared by others
    processor = {name: value for name, value in torch.cpu.get_capabilities().items() if value is True}
    made_of: list[Any] = [_FORMAT, torch.__version__, transformers.__version__, processor, rows]
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
def _compile(step: TracedStep, rows: int, place: Path) -> None:
    draft = place.with_name(f"{place.stem}.{secrets.token_hex(4)}.pt2")
    try:
        place.parent.mkdir(parents=True, exist_ok=True)
        with warnings.catch_warnings():
            # of PyTorch's own compiler, about itself
            warnings.simplefilter("ignore")
            group_size = _compile_to(step, rows, draft)
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


def _compile_to(step: TracedStep, rows: int, draft: Path) -> int:
    """Write the compiled step; the group size of its quantised matrices, 0 for none."""
    ids = torch.zeros(rows, 1, dtype=torch.int64)
    try:
        traced = torch.export.export(step, (ids, ids.clone()), strict=False)
        _require_all_layers(step.model, traced)
        sizes = {int(str(node.args[2])) for node in traced.graph.nodes if "int4pack_mm" in str(node.target)}
        torch._inductor.aoti_compile_and_package(traced, package_path=str(draft), inductor_configs=_OPTIONS)
    except UnsupportedError:
        raise
    # no C++ compiler, or a model whose forward depends on numbers in tensors
    except RuntimeError as error:
        reason = next(iter(str(error).strip().splitlines()), type(error).__name__)
        raise BackendError(f"the decode step cannot be compiled: {reason}; decode without compile") from error
    if len(sizes) > 1:
        raise BackendError(f"matrices in groups of {sorted(sizes)} cannot be compiled together; expected one size")
    return max(sizes, default=0)


def _require_all_layers(model: PreTrainedModel, traced: torch.export.ExportedProgram) -> None:
    """Attention that did not find the cache would read the new token alone."""
    found = sum("sparse_attention_decoder.decode" in str(node.target) for node in traced.graph.nodes)
    expected = len(SparseCache(model.config, AttentionConfig()).layers)
    if found != expected:
        raise UnsupportedError(
            f"compile=True needs attention that takes its keys and values from the cache as they are; in "
            f"{model.config.model_type} {found} of {expected} layers do; decode it without"
        )
