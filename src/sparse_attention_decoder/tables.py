"""The tables of names. A row adds a policy or a kernel backend; nothing else has to change."""

from importlib import import_module
from typing import Any

_HERE = "sparse_attention_decoder"

# name -> "module:class"; imported only when asked for, so that an absent package costs nothing
POLICIES = {
    "sketch": f"{_HERE}.policies.sketch:SketchPolicy",
    "dense": f"{_HERE}.policies.dense:DensePolicy",
    "window": f"{_HERE}.policies.window:WindowPolicy",
    "oracle": f"{_HERE}.policies.oracle:OraclePolicy",
    "quest": f"{_HERE}.policies.quest:QuestPolicy",
    "snapkv": f"{_HERE}.policies.snapkv:SnapKVPolicy",
    "h2o": f"{_HERE}.policies.h2o:H2OPolicy",
    "streaming": f"{_HERE}.policies.streaming:StreamingPolicy",
}

# in the order in which "auto" asks them
BACKENDS = {
    "cpu": f"{_HERE}.kernels.cpu:CpuKernels",
    "triton": f"{_HERE}.kernels.triton:TritonKernels",
    "reference": f"{_HERE}.kernels.reference:ReferenceKernels",
}

# kv_dtype -> bits in which a channel of keys and values is kept
KV_BITS = {"int8": 8, "int4": 4}

# quality -> the fields it sets; measured by benchmarks/dial.py
QUALITIES: dict[str, dict[str, float | bool]] = {
    "fast": {"threshold": 2e-3, "sample_tail": True, "attention_window": 64},
    "balanced": {"threshold": 5e-4, "sample_tail": True, "attention_window": 256},
    "firm": {"threshold": 1.5e-4, "sample_tail": True, "attention_window": 256},
}


def load(row: str) -> Any:
    """Import the class that a table row names."""
    module, name = row.split(":")
    return getattr(import_module(module), name)
