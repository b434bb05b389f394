"""Matrices side by side: the same products, bit for bit, of the same memory."""

import pytest
import tiny
import torch
from torch import nn

from sparse_attention_decoder import enable
from sparse_attention_decoder.models import weights
from sparse_attention_decoder.models.packed import Int4Linear, Int8Linear
from sparse_attention_decoder.models.siblings import Siblings, joined, lay_side_by_side
from sparse_attention_decoder.models.step import TracedStep
from sparse_attention_decoder.models.tensor_file import TensorFile, mapped

WIDE = {
    "hidden_size": 128,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 32,
    "intermediate_size": 192,
}


def layers(kind, rows, columns=64):
    made = []
    for number, count in enumerate(rows):
        layer = kind(count, columns, torch.randn(count) if number else None)
        layer.fill(0, torch.randn(count, columns, generator=torch.Generator().manual_seed(number)))
        made.append(layer)
    return made


@pytest.mark.parametrize("rows", [1, 2, 5])
@pytest.mark.parametrize("kind", [Int8Linear, Int4Linear])
def test_one_product_gives_the_outputs_of_all(kind, rows):
    members, x = layers(kind, [128, 64, 192]), torch.randn(rows, 1, 64).bfloat16()
    alone, matrices = [layer(x) for layer in members], [layer.dequantised() for layer in members]
    group = Siblings(members)
    with group.in_one_product():
        together = [layer(x) for layer in members]
        # whatever comes second is what the first has computed
        assert torch.equal(members[1](torch.zeros_like(x)), together[1])
    after = [layer(x) for layer in members]
    for layer, matrix, *found in zip(members, matrices, alone, together, after, strict=True):
        assert torch.equal(found[0], found[1]) and torch.equal(found[0], found[2])
        assert torch.equal(layer.dequantised(), matrix)
        # no weight is there twice
        for tensor, whole in ((layer.codes, group.whole.codes), (layer.scales, group.whole.scales)):
            assert tensor.untyped_storage().data_ptr() == whole.untyped_storage().data_ptr()


@pytest.mark.parametrize(("form", "named"), [("int8", "Int8Linear"), ("int4", "Int4Linear")])
def test_queries_keys_and_values_are_found_and_gates(form, named):
    model = enable(weights.cast(tiny.build("llama", **WIDE), form), tiny.BITING)
    groups = TracedStep(model).siblings
    assert len(groups) == 2 * len(model.model.layers)
    for number, layer in enumerate(model.model.layers):
        attention, mlp = layer.self_attn, layer.mlp
        assert type(attention.q_proj).__name__ == named
        assert groups[2 * number]._members == (attention.q_proj, attention.k_proj, attention.v_proj)
        assert groups[2 * number + 1]._members == (mlp.gate_proj, mlp.up_proj)


def test_what_shares_no_input_or_no_layout_stays_alone():
    narrow, wide, twice = layers(Int4Linear, [48, 64, 64]), layers(Int8Linear, [64, 64]), layers(Int8Linear, [64, 64])
    model = nn.ModuleList([*narrow, *wide, *twice])
    x = torch.randn(1, 64).bfloat16()

    def step():
        # a part of a block of rows, two inputs of one layer, two kinds, equal numbers in other tensors
        for layer in narrow[:2]:
            layer(x)
        wide[0](x.clone())
        wide[1](x.clone())
        for given in (x, x.clone()):
            for layer in twice:
                layer(given)

    assert lay_side_by_side(model, step) == []
    assert not any(layer._forward_pre_hooks for layer in model)


def test_tensors_are_joined_without_a_copy_where_they_lie_so():
    whole = torch.arange(24.0).view(6, 4)
    found = joined([whole[:2], whole[2:3], whole[3:]], 0)
    assert torch.equal(found, whole) and found.data_ptr() == whole.data_ptr()
    for parts, axis in (
        ([whole[2:4], whole[:2]], 0),
        ([whole[:, :2], whole[:, 2:]], 1),
        ([whole[:2], whole[2:].clone()], 0),
    ):
        found = joined(parts, axis)
        assert torch.equal(found, torch.cat(parts, axis)) and found.data_ptr() != parts[0].data_ptr()
    apart = joined([whole[:2], whole[3:]], 0)
    assert torch.equal(apart, torch.cat([whole[:2], whole[3:]]))


def test_a_file_lays_tensors_of_one_kind_side_by_side(tmp_path):
    state = {}
    for number, layer in enumerate(layers(Int8Linear, [128, 64])):
        state |= {f"{number}.codes": layer.codes, f"{number}.scales": layer.scales, f"{number}.norm": torch.ones(3)}
    with TensorFile(tmp_path / "file", state) as file:
        for name, tensor in state.items():
            file.put(name, tensor)
    read = mapped(tmp_path / "file")
    assert read.keys() == state.keys() and all(torch.equal(read[name], state[name]) for name in state)
    for kind in ("codes", "scales"):
        assert joined([read[f"0.{kind}"], read[f"1.{kind}"]], 0).data_ptr() == read[f"0.{kind}"].data_ptr()
