"""Linear layers whose matrices are too large for the processor's caches: of a few rows multiplied by our kernel."""

from functools import partial

import torch
from torch import Tensor, nn
from torch.nn import functional

from sparse_attention_decoder.kernels.cpu import NAMESPACE, library
from sparse_attention_decoder.kernels.cpu.products import MOST_ROWS, multiply, takes

# smaller matrices stay in the processor's caches from step to step, and PyTorch multiplies them as fast
LEAST_BYTES = 64 << 10


def install(model: nn.Module, backend: str) -> None:
    """From now on decode steps, of up to MOST_ROWS rows, are multiplied by `products.multiply`; all else as before.

    Does nothing for a backend that is not the CPU's, and to layers that are not plain or have a forward of their own.
    """
    if backend not in ("auto", "cpu") or isinstance(library.load(), str):
        return
    for layer in model.modules():
        if type(layer) is nn.Linear and "forward" not in vars(layer) and layer.weight.nbytes >= LEAST_BYTES:
            # a partial and no closure: models are copied and pickled
            layer.forward = partial(_forward, layer)  # type: ignore[method-assign]


def remove(model: nn.Module) -> None:
    """Undo `install`."""
    for layer in model.modules():
        own = vars(layer).get("forward")
        if isinstance(own, partial) and own.func is _forward:
            # set on the instance over the class's method, so deleting uncovers that
            del layer.forward


def _forward(layer: nn.Linear, x: Tensor) -> Tensor:
    weight, bias = layer.weight, layer.bias
    few = x.numel() <= MOST_ROWS * weight.shape[1] and x.dtype == weight.dtype and x.is_cpu and takes(weight)
    if not few or torch.is_autocast_enabled("cpu"):
        return functional.linear(x, weight, bias)
    if torch.compiler.is_compiling():
        product: Tensor = getattr(torch.ops, NAMESPACE).multiply(x, weight, bias)
        return product
    if torch.is_grad_enabled() and (x.requires_grad or weight.requires_grad):
        return functional.linear(x, weight, bias)
    return multiply(x, weight, bias)
