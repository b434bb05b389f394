"""Forms of weights: float32, bf16, int8 and int4, and how a model gets from one to another in place."""

import logging
from collections.abc import Callable

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel
from transformers.pytorch_utils import Conv1D

from sparse_attention_decoder.errors import ConfigError, UnsupportedError
from sparse_attention_decoder.models.packed import ROWS_AT_ONCE, Int4Linear, Int8Embedding, Int8Linear, Packed

logger = logging.getLogger(__name__)

DTYPES = {"float32": torch.float32, "bf16": torch.bfloat16}
FORMS = (*DTYPES, "int8", "int4")


def check(weights: str) -> None:
    """Refuse a form of weights that there is not."""
    if weights not in FORMS:
        raise ConfigError(f"weights is {weights!r}; expected one of {', '.join(FORMS)}")


def replace(
    model: PreTrainedModel, weights: str, fill: Callable[[Packed, nn.Module], None] | None = None
) -> PreTrainedModel:
    """Put packed layers in the place of a model's linear ones, the head included; freeze what is left.

    Args:
        weights: "int8" or "int4". A shape that the form does not take becomes the next finer one, down to bfloat16.
        fill: given the new layer and the old, fills the new; without it the new ones stay empty, as on the meta device.
    """
    head, embedding = model.get_output_embeddings(), model.get_input_embeddings()
    is_tied = type(head) is nn.Linear and type(embedding) is nn.Embedding and head.weight is embedding.weight
    finer: list[str] = []
    for name, old in list(model.named_modules()):
        if type(old) not in (nn.Linear, Conv1D):
            continue
        rows, columns = shape(old)
        forms = [Int4Linear, Int8Linear] if weights == "int4" and not (is_tied and old is head) else [Int8Linear]
        kind = next((form for form in forms if form.takes(rows, columns)), None)
        if kind is not forms[0]:
            finer.append(f"{name} [{rows}, {columns}]")
        if kind is None:
            continue
        with torch.device(old.weight.device):
            new = kind(rows, columns, old.bias)
        if fill is not None:
            fill(new, old)
        model.set_submodule(name, new)
        if is_tied and old is head and isinstance(new, Int8Linear):
            model.set_input_embeddings(Int8Embedding(new))
    if finer:
        logger.warning(
            "%d matrices have a shape that %s does not take and are kept finer: %s", len(finer), weights, finer
        )
    return model.requires_grad_(False)


def shape(layer: nn.Module) -> tuple[int, int]:
    """Rows and columns, N and K, of a linear layer; a Conv1D keeps its matrix transposed."""
    weight = layer.weight
    assert isinstance(weight, Tensor)
    return (weight.shape[1], weight.shape[0]) if isinstance(layer, Conv1D) else (weight.shape[0], weight.shape[1])


def cast(model: PreTrainedModel, weights: str) -> PreTrainedModel:
    """Bring a model that is loaded into this form, in place and matrix by matrix: the old ones are freed as it goes.

    Raises:
        ConfigError: no such form. UnsupportedError: int8 or int4 of a model that is not on the CPU.
    """
    check(weights)
    if weights in ("int8", "int4"):
        require_cpu(weights, {str(parameter.device) for parameter in model.parameters()})
        replace(model, weights, fill)
    dtype = DTYPES.get(weights, torch.bfloat16)
    kept = set(getattr(model, "_keep_in_fp32_modules_strict", None) or ())
    # not model.to: buffers, such as rotary frequencies, are float32 in every form, as transformers has them
    for name, parameter in model.named_parameters():
        if parameter.is_floating_point() and not kept & set(name.split(".")):
            parameter.data = parameter.data.to(dtype)
    model.config.dtype = dtype
    return model


@torch.no_grad()
def fill(new: Packed, old: nn.Module) -> None:
    """Quantise the matrix of a linear layer into a packed one of its shape, some rows at a time."""
    weight = old.weight.T if isinstance(old, Conv1D) else old.weight
    assert isinstance(weight, Tensor)
    for start in range(0, new.out_features, ROWS_AT_ONCE):
        new.fill(start, weight[start : start + ROWS_AT_ONCE])


def require_cpu(weights: str, devices: set[str]) -> None:
    """Refuse devices that the packed matmuls do not run on."""
    if other := sorted(device for device in devices if not device.startswith("cpu")):
        raise UnsupportedError(
            f"weights={weights!r} are multiplied by kernels for the CPU, and this model is on {', '.join(other)}; "
            "use weights='bf16' there"
        )
