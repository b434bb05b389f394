"""Linear layers whose matrices are too large for the processor's caches: of a few rows multiplied by our kernel."""

from functools import partial

import torch
from torch import Tensor, nn
from torch.nn import functional

from sparse_attention_decoder.kernels.cpu import NAMESPACE, library
from sparse_attention_decoder.kernels.cpu.products import fits, is_in_memory, multiply_fitting

# smaller matrices stay in the processor's caches from step to step, and PyTorch multiplies them as fast
LEAST_BYTES = 64 << 10


def install(model: nn.Module, backend: str) -> None:
    """From now on decode steps, of few rows, are multiplied by `products.multiply`; all else as before.

    Does nothing for a backend that is not the CPU's, and to layers that are not plain or have a forward of their own.
    """
    if backend not in ("auto", "cpu") or isinstance(library.load(), str):
        return
    for layer in model.modules():
        if type(layer) is nn.Linear and "forward" not in vars(layer) and _is_large(layer.weight):
            # a partial and no closure: models are copied and pickled
            layer.forward = partial(_forward, layer)  # type: ignore[method-assign]


def _is_large(weight: Tensor) -> bool:
    return is_in_memory(weight) and weight.nbytes >= LEAST_BYTES


def installed(model: nn.Module) -> dict[str, nn.Module]:
    """The layers that `install` took over, by name."""
    return {name: layer for name, layer in model.named_modules() if _is_ours(vars(layer).get("forward"))}


def remove(model: nn.Module) -> None:
    """Undo `install`."""
    for layer in installed(model).values():
        # set on the instance over the class's method, so deleting uncovers that
        del layer.forward


def _is_ours(forward: object) -> bool:
    return isinstance(forward, partial) and forward.func is _forward


def _forward(layer: nn.Linear, x: Tensor) -> Tensor:
    weight, bias = layer.weight, layer.bias
    is_ours = fits(x, weight, bias) and not torch.is_autocast_enabled("cpu")
    if not is_ours or (torch.is_grad_enabled() and _learns(x, weight, bias)):
        return functional.linear(x, weight, bias)
    if torch.compiler.is_compiling():
        product: Tensor = getattr(torch.ops, NAMESPACE).multiply(x, weight, bias)
        return product
    if not is_in_memory(x, weight, bias):
        return functional.linear(x, weight, bias)
    return multiply_fitting(x, weight, bias)


def _learns(*tensors: Tensor | None) -> bool:
    return any(tensor is not None and tensor.requires_grad for tensor in tensors)
