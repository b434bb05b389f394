"""What Triton's kernels become on an H200: compiled for it here, where no GPU is needed, and held to budgets."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

pytest.importorskip("triton")

ROOT = Path(__file__).parent.parent
KERNELS = ("score_kernel", "weigh_kernel", "select_kernel", "attend_kernel", "append_kernel")
CASES = ((64, "float16"), (128, "bfloat16"), (128, "float32"), (256, "bfloat16"), (256, "float32"))
# bytes that a thread may spill: float32 has no tensor cores, and rows of 256 channels are long
SPILLS = {(128, "float32", "attend_kernel"): 320, (256, "bfloat16", "attend_kernel"): 32}
# of a multiprocessor, and what the driver takes of it for each program
SHARED, RESERVED = 227 << 10, 1 << 10

SCRIPT = """if True:
    import json, re, sys
    from dataclasses import asdict
    from unittest.mock import patch

    import torch

    sys.path.insert(0, "benchmarks")
    import gpu_resources

    plain = gpu_resources.analysed

    def analysed(name, kernel, tokens):
        products = re.findall(r"(?:mma\\.sync|wgmma\\.mma_async)\\S*", kernel.asm["ptx"])
        whole = sum(".s32.s8.s8" in each for each in products)
        found = plain(name, kernel, tokens)
        return asdict(found) | {"resident": found.resident, "integer": whole, "floating": len(products) - whole}

    with patch.object(gpu_resources, "analysed", analysed):
        for dim, dtype in json.loads(sys.argv[1]):
            found = gpu_resources.compiled(dim=dim, dtype=getattr(torch, dtype))
            print(json.dumps([gpu_resources.MULTIPROCESSORS, found]))
"""


@pytest.fixture(scope="module")
def compiled(tmp_path_factory: pytest.TempPathFactory) -> dict[tuple[int, str], dict[str, dict[str, int]]]:
    """Resources of each kernel, by head size and dtype."""
    # the interpreter, which the other tests may run in, leaves nothing to compile
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    # what another checkout compiled names source files that may be gone
    environment["TRITON_CACHE_DIR"] = str(tmp_path_factory.mktemp("triton"))
    done = subprocess.run(
        [sys.executable, "-c", SCRIPT, json.dumps(CASES)],
        cwd=ROOT, env=environment, capture_output=True, text=True,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    lines = [json.loads(line) for line in done.stdout.splitlines()]
    return {
        case: {each["name"]: each | {"programs": each["resident"] // processors} for each in found}
        for case, (processors, found) in zip(CASES, lines, strict=True)
    }


each_case = pytest.mark.parametrize("case", CASES, ids=lambda case: f"{case[1]}-{case[0]}")


@each_case
def test_no_kernel_spills_registers_beyond_its_budget(compiled, case):
    assert compiled[case].keys() == set(KERNELS)
    for name, kernel in compiled[case].items():
        assert kernel["registers"] <= 255
        assert kernel["spill_bytes"] <= SPILLS.get((*case, name), 0), name


@each_case
def test_every_kernel_fits_the_shared_memory_of_a_multiprocessor(compiled, case):
    for name, kernel in compiled[case].items():
        assert kernel["shared_bytes"] + RESERVED <= SHARED, name
        # one program waits while another computes
        if case[0] <= 128 and case[1] != "float32":
            assert kernel["programs"] >= 2, name


@each_case
def test_products_are_made_by_tensor_cores(compiled, case):
    # what is in float32 stays in float32
    halves = case[1] != "float32"
    score, attend = compiled[case]["score_kernel"], compiled[case]["attend_kernel"]
    assert score["integer"] > 0
    assert (score["floating"] > 0, attend["floating"] > 0) == (halves, halves)
