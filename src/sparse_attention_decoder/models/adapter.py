"""enable(model) and disable(model): our attention in, and out again without a trace."""

import inspect
import logging
from dataclasses import dataclass
from functools import cache
from itertools import chain
from typing import Any, TypeVar, cast

import torch
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle
from transformers import AttentionInterface, AttentionMaskInterface, PreTrainedModel
from transformers.cache_utils import DynamicCache
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.masking_utils import sdpa_mask

from sparse_attention_decoder.config import AttentionConfig
from sparse_attention_decoder.errors import NonFiniteError, UnsupportedError
from sparse_attention_decoder.models import compiled, families, identity, linears, tuned
from sparse_attention_decoder.models.cache import LAYER_TAG, STOCK_TAG, SparseCache, SparseLayer
from sparse_attention_decoder.models.packed import named_scales
from sparse_attention_decoder.models.static import StaticSparseCache, StaticSparseLayer
from sparse_attention_decoder.models.step import STEP_TAG, TracedCache, attend_traced
from sparse_attention_decoder.models.verifying import attend_causally, takes_steps
from sparse_attention_decoder.prefill import attend_chunk, takes_chunk
from sparse_attention_decoder.selection import Rows

logger = logging.getLogger(__name__)

NAME = "sparse_attention_decoder"
ROWS_TAG = "_sparse_rows"
CAUSAL_TAG = "_sparse_causal"
_STATE = "_sparse_attention_decoder"
_PREPARE = "_prepare_cache_for_generation"
# keyword arguments that change the scores: dropping one in silence would give wrong output
_MODIFIERS = ("softcap", "s_aux", "position_bias", "block_indices", "indices", "sinks")

Model = TypeVar("Model", bound=PreTrainedModel)


@dataclass(frozen=True)
class _Enabled:
    config: AttentionConfig
    previous: str
    hook: RemovableHandle
    own_preparation: Any


def enable(model: Model, config: AttentionConfig | None = None) -> Model:
    """Decode this model sparsely from now on; returns the model.

    `model(...)` and `model.generate(...)` then build a SparseCache where they would have built a
    dynamic one. Prefill and steps of more than one token stay dense, on the same cache.

    Args:
        model: a transformers causal LM, already loaded.
        config: what a decode step reads; the model's own default if left out, see `models.tuned.default_for`.
    Raises:
        UnsupportedError: a family that cannot be hooked, by name.
        NonFiniteError: a weight holds NaN or infinity.
        ConfigError: a config tuned for another architecture, or of another number of layers.
    Calling it again replaces the config. `disable` takes it off.
    """
    config = config or tuned.default_for(model)
    families.check(model, config.kv_dtype)
    _require_finite_weights(model)
    identity.check(model, config)
    is_sparse = bool(SparseCache(model.config, config).sparse_layers)
    take_off(model)
    previous = model.config._attn_implementation
    AttentionInterface.register(NAME, sparse_attention_forward)
    # without a mask function of the same name transformers builds no mask, and padding is read as text
    AttentionMaskInterface.register(NAME, sdpa_mask)
    model.set_attn_implementation(NAME)
    if model.config._attn_implementation != NAME:
        name = model.config.model_type
        raise UnsupportedError(f"{name} does not let its attention be replaced, so it cannot be decoded sparsely")
    if not is_sparse:
        logger.warning(
            "%s has no full-attention layer: nothing to read sparsely, it runs as before", model.config.model_type
        )
    linears.install(model, config.backend)
    hook = model.register_forward_pre_hook(_give_cache, with_kwargs=True)
    original = getattr(model, _PREPARE)
    setattr(model, _STATE, _Enabled(config, previous, hook, vars(model).get(_PREPARE)))

    def prepare(generation_config: Any, model_kwargs: dict[str, Any], *args: Any, **kwargs: Any) -> Any:
        wants_default = generation_config.cache_implementation in (None, "dynamic") and generation_config.use_cache
        if wants_default and model_kwargs.get("past_key_values") is None:
            model_kwargs["past_key_values"] = SparseCache(model.config, config)
            if generation_config.is_assistant:
                model_kwargs["past_key_values"].activate_past_recording()
            return None
        return original(generation_config, model_kwargs, *args, **kwargs)

    setattr(model, _PREPARE, prepare)
    return model


def disable(model: Model) -> Model:
    """Undo `enable`: the model is as it was before. Does nothing to a model that is not enabled."""
    compiled.remove(model)
    take_off(model)
    return model


def take_off(model: PreTrainedModel) -> None:
    """Undo `enable`, but leave a compiled step: it serves no other cache than ours, and comes back with `enable`."""
    state: _Enabled | None = getattr(model, _STATE, None)
    if state is not None:
        linears.remove(model)
        state.hook.remove()
        delattr(model, _STATE)
        # set on the instance over the class's method, so deleting uncovers that
        delattr(model, _PREPARE)
        if state.own_preparation is not None:
            setattr(model, _PREPARE, state.own_preparation)
        model.set_attn_implementation(state.previous)


def sparse_attention_forward(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None = None,
    dropout: float = 0.0,
    scaling: float | None = None,
    **kwargs: Any,
) -> tuple[Tensor, Tensor | None]:
    """The attention function transformers calls: a decode step of one of our layers, or plain SDPA.

    Args:
        query: [B, Hq, N, D]; key, value [B, Hkv, T, D], not repeated.
        attention_mask: bool [B, 1, N, T], or None where nothing is masked but the future.
    Returns:
        output [B, N, Hq, Dv], and no weights (ask `SparseAttention.trace` for those).
    Raises:
        UnsupportedError: a keyword that changes the scores, or keys that were made of those of a packed cache.
    """
    _refuse_modifiers(module, kwargs)
    if hasattr(key, STEP_TAG) and getattr(value, STEP_TAG, None) == getattr(key, STEP_TAG):
        return attend_traced(query, key, value, query.shape[-1] ** -0.5 if scaling is None else scaling), None
    layer: SparseLayer | StaticSparseLayer | None = getattr(key, LAYER_TAG, None)
    # a model may change keys or values behind the cache, as MLA and differential attention do
    if getattr(value, LAYER_TAG, None) is not layer:
        layer = None
    scale = query.shape[-1] ** -0.5 if scaling is None else scaling
    if isinstance(layer, StaticSparseLayer):
        return _attend_static(module, query, layer, attention_mask, dropout, scale)
    if layer is not None and query.shape[2] > 1 and takes_steps(layer.state, query.shape[2]):
        return attend_causally(query.detach(), layer.state, scale).transpose(1, 2), None
    rows = None
    if query.shape[2] == 1 and dropout == 0.0:
        if query.requires_grad or key.requires_grad or value.requires_grad:
            _warn_once("decoding under autograd is dense, to have its gradients; decode under torch.no_grad()")
        elif layer is not None:
            rows = _rows(query.shape[0], key.shape[2], attention_mask)
        elif key.shape[2] > 1 and not hasattr(key, STOCK_TAG):
            _warn_once(f"{type(module).__name__} decodes densely: its keys and values do not come from a SparseCache")
    if rows is None or layer is None:
        output: tuple[Tensor, Tensor | None]
        if layer is not None and layer.hides:
            key, value = layer.plain()
        elif layer is None and query.shape[2] == 1 and not hasattr(key, STOCK_TAG):
            _require_numbers(module, key, value)
        if layer is not None and dropout == 0.0 and takes_chunk(query, key, value) and _is_causal(attention_mask):
            output = attend_chunk(query, key, value, scale).transpose(1, 2), None
        else:
            output = sdpa_attention_forward(
                module, query, key, value, attention_mask, dropout=dropout, scaling=scaling, **kwargs
            )
        if layer is not None and layer.state.witness is not None and query.shape[2] > 1:
            seen = _rows(query.shape[0], key.shape[2], attention_mask)
            if seen is not None:
                layer.state.see(query, seen, scale)
        if layer is not None and layer.state.cap is not None:
            layer.fit(query, _countable(query, key, attention_mask), scale)
        return output
    return layer.decode(query[:, :, 0].detach(), rows, scale).unsqueeze(1), None


def _refuse_modifiers(module: nn.Module, given: dict[str, Any]) -> None:
    for name in _MODIFIERS:
        if given.get(name) is not None:
            raise UnsupportedError(f"{type(module).__name__} passes {name}, which sparse attention does not support")


def _require_numbers(module: nn.Module, key: Tensor, value: Tensor) -> None:
    # a packed layer shows NaN for all it holds, so one token tells; while a step is traced there are no numbers
    if torch.compiler.is_compiling():
        return
    if bool(key[0, 0, 0].isnan().all()) or bool(value[0, 0, 0].isnan().all()):
        raise UnsupportedError(
            f"{type(module).__name__} changes keys or values behind the cache, which it cannot where they are packed; "
            "use kv_dtype=None"
        )


def _attend_static(
    module: nn.Module, query: Tensor, layer: StaticSparseLayer, mask: Tensor | None, dropout: float, scale: float
) -> tuple[Tensor, Tensor | None]:
    """A decode step whose length the device knows, or a prompt: no host, no mask and no allocation in the first."""
    if query.shape[2] == 1:
        assert layer.state is not None
        return layer.state.read(query[:, :, 0], scale).unsqueeze(1), None

    def attend(keys: Tensor, values: Tensor, seen: Tensor | None) -> tuple[Tensor, Tensor | None]:
        output: tuple[Tensor, Tensor | None] = sdpa_attention_forward(
            module, query, keys, values, seen, dropout=dropout, scaling=scale
        )
        return output

    output: tuple[Tensor, Tensor | None] = layer.attend_prompt(query, mask, attend)
    return output


def _rows(batch: int, length: int, mask: Tensor | None) -> Rows | None:
    """The rows that a mask's newest query sees; None for a mask only SDPA understands."""
    if mask is None:
        return Rows.full(batch, length)
    # one mask serves every layer of a step: keep what was read off it on the mask itself
    known: Rows | None = getattr(mask, ROWS_TAG, None)
    if known is not None:
        return known
    if mask.dtype != torch.bool or mask.shape[1] != 1:
        _warn_once(f"a custom {mask.dtype} mask is attended densely; pass a 2-D padding mask")
        return None
    rows = Rows.from_mask(mask[:, 0, -1].expand(batch, -1))
    setattr(mask, ROWS_TAG, rows)
    return rows


def _is_causal(mask: Tensor | None) -> bool:
    """Whether a mask [B, 1, N, T] hides the future and nothing else."""
    if mask is None or mask.dtype != torch.bool or mask.shape[1] != 1:
        return False
    known: bool | None = getattr(mask, CAUSAL_TAG, None)
    if known is None:
        count, total = mask.shape[2:]
        known = bool((mask == torch.ones(count, total, dtype=torch.bool).tril(total - count)).all())
        setattr(mask, CAUSAL_TAG, known)
    return known


def _countable(query: Tensor, key: Tensor, mask: Tensor | None) -> Rows:
    rows = _rows(query.shape[0], key.shape[2], mask)
    if rows is None:
        raise UnsupportedError("a capped cache has to know what a mask hides; pass a 2-D padding mask, or use no cap")
    return rows


def _give_cache(model: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> tuple[Any, Any]:
    """Forward pre-hook: put a SparseCache where the model would make a dynamic one."""
    if isinstance(kwargs.get("past_key_values"), (StaticSparseCache, TracedCache)):
        # a compiled step goes through here: nothing to find out, and nothing a compiler could stumble over
        return args, kwargs
    if isinstance(kwargs.get("past_key_values"), SparseCache) and not _asks_for_weights(model, kwargs):
        return args, kwargs
    bound = inspect.signature(model.forward).bind_partial(*args, **kwargs)
    # forward collects what it does not name under its own **kwargs
    given = {**bound.arguments, **bound.arguments.get("kwargs", {})}
    model_config: Any = model.config
    text_config = model_config.get_text_config(decoder=True)
    if _asks_for_weights(model, given):
        raise UnsupportedError(
            "output_attentions does not work under sparse attention; use SparseAttention.trace(text)"
        )
    use_cache = given.get("use_cache")
    use_cache = getattr(text_config, "use_cache", True) if use_cache is None else use_cache
    held: Any = given.get("past_key_values")
    if held is None and use_cache and not model.training:
        state: _Enabled = getattr(model, _STATE)
        bound.arguments["past_key_values"] = SparseCache(model_config, state.config)
        return bound.args, bound.kwargs
    if type(held) is DynamicCache and held.get_seq_length() > 0:
        _warn_once("a stock DynamicCache was passed: this model decodes densely on it; pass a SparseCache or none")
    return args, kwargs


def _asks_for_weights(model: nn.Module, given: dict[str, Any]) -> bool:
    wanted, model_config = given.get("output_attentions"), cast("Any", model.config)
    return bool(model_config.output_attentions if wanted is None else wanted)


def _require_finite_weights(model: nn.Module) -> None:
    # a packed weight that is damaged has its damage in the scales
    for name, weight in chain(model.named_parameters(), named_scales(model)):
        if not weight.is_floating_point() or weight.is_meta:
            continue
        # a sum carries any NaN or infinity out in one cheap pass; large numbers can overflow it, so ask again
        total = weight.detach().sum(dtype=torch.float32)
        if not bool(total.isfinite()) and not bool(weight.detach().isfinite().all()):
            raise NonFiniteError(f"weight {name} holds NaN or infinity; the checkpoint is damaged, load it again")


@cache
def _warn_once(message: str) -> None:
    logger.warning(message)
