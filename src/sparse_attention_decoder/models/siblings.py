"""Packed matrices that read the same input, side by side: a decode step multiplies them all in one call."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial

import torch
from torch import Tensor, nn

from sparse_attention_decoder.models.packed import Packed


def lay_side_by_side(model: nn.Module, step: Callable[[], object]) -> "list[Siblings]":
    """Find the packed layers that get the same input in a step, such as queries, keys and values, and join each group.

    Args:
        step: runs one decode step of the model.
    """
    layers = [layer for layer in model.modules() if isinstance(layer, Packed)]
    # inputs are held meanwhile: another tensor must not take the identity of one that is gone
    calls: list[tuple[Tensor, Packed]] = []
    hooks = [layer.register_forward_pre_hook(lambda layer, given: calls.append((given[0], layer))) for layer in layers]
    try:
        step()
    finally:
        for hook in hooks:
            hook.remove()
    groups: dict[tuple[int, type[Packed]], list[Packed]] = {}
    for given, layer in calls:
        # one that runs twice is no sibling: its inputs differ
        if sum(other is layer for _, other in calls) == 1 and layer.is_whole_blocks:
            groups.setdefault((id(given), type(layer)), []).append(layer)
    return [Siblings(members) for members in groups.values() if len(members) > 1]


class Siblings(nn.Module):
    """Layers of one kind and input as one matrix; theirs become views of it, so that no weight is there twice.

    Only the scales of int4 are copied: rows are not their first axis.
    """

    whole: Packed

    def __init__(self, members: list[Packed]) -> None:
        super().__init__()
        kind, sizes = type(members[0]), [member.out_features for member in members]
        # a tuple is no submodule: the members are the model's
        self._members = tuple(members)
        with torch.device("meta"):
            self.whole = kind(sum(sizes), members[0].in_features)
        for name, axis in (("codes", 0), ("scales", kind.scales_axis)):
            tensor = joined([getattr(member, name) for member in members], axis)
            setattr(self.whole, name, tensor)
            for member, part in zip(members, tensor.split(sizes, axis), strict=True):
                setattr(member, name, part)

    @contextmanager
    def in_one_product(self) -> Iterator[None]:
        """While it is entered, the first member to run multiplies for all; each must run once, in order, every step."""
        product: list[Tensor] = []

        def part(number: int, flat: Tensor) -> Tensor:
            if number == 0:
                sizes = [member.out_features for member in self._members]
                product[:] = self.whole.product(flat).split(sizes, -1)
            return product[number]

        for number, member in enumerate(self._members):
            member.product = partial(part, number)
        try:
            yield
        finally:
            for member in self._members:
                # set on the instance over the class's method, so deleting uncovers that
                del member.product


def joined(tensors: list[Tensor], axis: int) -> Tensor:
    """Tensors one behind the other along an axis: a view where they lie so in memory already, else a copy."""
    first = tensors[0]
    size = sum(tensor.shape[axis] for tensor in tensors)
    shape = (*first.shape[:axis], size, *first.shape[axis + 1 :])
    at, is_one_piece = first.storage_offset(), axis == 0
    for tensor in tensors:
        same = tensor.untyped_storage().data_ptr() == first.untyped_storage().data_ptr()
        is_one_piece = is_one_piece and same and tensor.is_contiguous() and tensor.storage_offset() == at
        at += tensor.numel()
    return first.as_strided(shape, first.stride()) if is_one_piece else torch.cat(tensors, axis)
