"""Decode steps with Triton's kernels, through `attention.py`: what they are with the reference."""

import pytest
import torch
from cases import assert_error_within, layer_with, left_padded, randn, skewed_keys
from test_cpu_kernels import each_dtype
from triton_cases import home, laws_of_kernels, on

from sparse_attention_decoder.attention import decode_step
from sparse_attention_decoder.selection import Rows

CPU = torch.device("cpu")

pytestmark = laws_of_kernels


@each_dtype
@pytest.mark.parametrize("policy", ["sketch", "oracle", "quest", "window", "dense"])
def test_a_padded_batch_decodes_as_with_the_reference(device, dtype, policy):
    mask = left_padded(150, 90, 12)
    keys, values = skewed_keys(0, 3, 2, 150, 24, dtype=dtype), randn(1, 3, 2, 150, 24, dtype=dtype)
    places = {"triton": device, "reference": CPU}
    layers = {
        name: layer_with(*on(place, (keys, values)), backend=name, policy=policy, threshold=1e-3, top_k=9)
        for name, place in places.items()
    }
    for step in range(2):
        mask = torch.cat([mask, torch.ones(3, 1, dtype=torch.bool)], 1)
        query, *new = (randn(10 * step + n, 3, heads, 24, dtype=dtype) for n, heads in enumerate((8, 2, 2)))
        decoded = {}
        for name, place in places.items():
            layers[name].buffer.append(*(x.unsqueeze(2) for x in on(place, new)))
            rows = Rows.from_mask(on(place, mask))
            decoded[name] = home(decode_step(on(place, query), layers[name], rows, 24**-0.5))
        ours, theirs = decoded["triton"], decoded["reference"]
        # what rounds is the output, and before it the logits
        held = layers["reference"].buffer.keys
        largest = 24**-0.5 * float(query.float().norm(dim=-1).max() * held.float().norm(dim=-1).max())
        assert_error_within(ours.output, theirs.output, 4 * torch.finfo(dtype).eps + 2.0**-22 * largest)
        assert (ours.selection is None) == (theirs.selection is None)
        if ours.selection is not None:
            assert torch.equal(ours.selection.counts, theirs.selection.counts)
    assert layers["triton"].reads.tokens_read == layers["reference"].reads.tokens_read


@each_dtype
def test_a_threshold_that_every_token_exceeds_decodes_as_dense_attention_does(device, dtype):
    keys, values = on(device, [randn(n, 1, 2, 100, 24, dtype=dtype) for n in range(2)])
    query = on(device, randn(2, 1, 8, 24, dtype=dtype))
    sparse = decode_step(query, layer_with(keys, values, backend="triton", threshold=1e-30), Rows.full(1, 100), 0.2)
    dense = decode_step(query, layer_with(keys, values, policy="dense"), Rows.full(1, 100), 0.2)
    assert sparse.selection.counts.eq(92).all()
    assert_error_within(home(sparse.output), home(dense.output), 4 * torch.finfo(dtype).eps)
