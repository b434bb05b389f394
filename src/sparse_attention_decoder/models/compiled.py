"""A model's decode steps run compiled, and everything else as before."""

import functools
import logging
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedModel
from transformers.modeling_outputs import CausalLMOutputWithPast

from sparse_attention_decoder.config import AttentionConfig
from sparse_attention_decoder.errors import BackendError, UnsupportedError
from sparse_attention_decoder.models.aot import Stage, Steps
from sparse_attention_decoder.models.cache import SparseCache
from sparse_attention_decoder.models.step import running_on
from sparse_attention_decoder.models.verifying import MOST_VERIFIED, is_read_whole

logger = logging.getLogger(__name__)

# the first whose ahead-of-time compiler this was tested with
_LEAST_TORCH = (2, 13)
_STATE = "_sparse_compiled"
_PASSED_ON = {"input_ids", "past_key_values", "position_ids", "attention_mask", "use_cache", "return_dict",
              "logits_to_keep", "cache_position"}  # fmt: skip


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
    if is_installed(model):
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
    steps = Steps(model, on_stage or logger.info)
    steps.of(1)
    setattr(model, _STATE, (steps, vars(model).get("forward")))
    model.forward = _dispatch(model, steps, model.forward)


def is_installed(model: PreTrainedModel) -> bool:
    """Whether decode steps of this model run compiled."""
    return hasattr(model, _STATE)


def prepare_pass(model: PreTrainedModel) -> None:
    """Compile or load now what verifies drafts, and not in the middle of an answer; nothing without `install`."""
    if is_installed(model):
        getattr(model, _STATE)[0].verifying()


def remove(model: PreTrainedModel) -> None:
    """Undo `install`. Does nothing to a model that has no compiled step."""
    if is_installed(model):
        _, own_forward = getattr(model, _STATE)
        delattr(model, _STATE)
        # set on the instance over the class's method, so deleting uncovers that
        del model.forward
        if own_forward is not None:
            model.forward = own_forward


@contextmanager
def set_aside(model: PreTrainedModel) -> Iterator[None]:
    """While it is entered, decode steps run as before `install`: what they leave to look at is then whole."""
    compiled_forward = vars(model).get("forward") if is_installed(model) else None
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


def _dispatch(model: PreTrainedModel, steps: Steps, forward: Callable[..., Any]) -> Callable[..., Any]:
    @functools.wraps(forward)
    def compiled_or_not(*args: Any, **kwargs: Any) -> Any:
        given = {"input_ids": args[0], **kwargs} if len(args) == 1 else kwargs
        reason = _refuses(given) if len(args) < 2 else "its arguments have no names"
        if reason is not None:
            if reason:
                _say_once(reason)
            return forward(*args, **kwargs)
        ids, cache, positions = given["input_ids"], given["past_key_values"], given.get("position_ids")
        # what decides about tokens is compiled where several at once are then what each is alone
        several = steps.verifying() if is_read_whole(cache) else None
        if is_read_whole(cache) and several is None:
            return forward(*args, **kwargs)
        step = steps.of(ids.shape[0]) if several is None or ids.shape[1] == 1 else several
        if positions is None:
            past, count = cache.get_seq_length(), ids.shape[1]
            positions = torch.arange(past, past + count).expand(ids.shape)
        with running_on(cache):
            logits = step(ids, positions)
        return CausalLMOutputWithPast(logits=logits, past_key_values=cache)

    return compiled_or_not


def _refuses(given: dict[str, Any]) -> str | None:
    """None for a decode step that is compiled; "" for what never is, or why this step is not."""
    ids, cache = given.get("input_ids"), given.get("past_key_values")
    if not isinstance(ids, Tensor) or ids.ndim != 2 or not isinstance(cache, SparseCache):
        return ""
    is_pass = is_read_whole(cache) and len(ids) == 1 and ids.shape[1] <= MOST_VERIFIED
    if ids.shape[1] != 1 and not (is_pass and "logits_to_keep" not in given):
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
