"""What only a GPU can show of Triton's kernels: captured graphs, races, accesses out of bounds."""

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from cases import coded, fit, randn, skewed_keys
from triton_cases import TRITON, on, on_a_gpu
from triton_tokens import Tokens

from sparse_attention_decoder.selection import Rows

GPU = torch.device("cuda")
SCALING = 0.2
# of the CUDA toolkit, which PyTorch does not bring along
SANITIZER = shutil.which("compute-sanitizer")

pytestmark = on_a_gpu


def test_a_captured_step_replayed_over_growing_lengths_is_the_eager_one():
    # statistics are fitted anew at 121 and 151 tokens, the other row's at 63, 78 and 97; it is read whole up to 80
    captured, eager = (
        Tokens(GPU, torch.bfloat16, 180, (0, 40), group=4, dim=64, sinks=4, window=20, dense=80) for _ in range(2)
    )
    for layer in (captured, eager):
        layer.prefill(100)
    text, slots = captured.text_there, tuple(x[:, :, :1].clone() for x in captured.text_there)
    captured.text_there = slots
    # compiles, and leaves a token that the first replay overwrites
    captured.append(0)
    captured.read(0, 8, 1e-3, SCALING)
    captured.length.fill_(100)
    captured.tally.zero_()
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        captured.append(0)
        output = captured.read(0, 8, 1e-3, SCALING)
    for at in range(100, 180):
        for slot, words in zip(slots, text, strict=True):
            slot.copy_(words[:, :, at : at + 1])
        graph.replay()
        eager.append(at)
        assert torch.equal(output, eager.read(at, 8, 1e-3, SCALING)), f"{at + 1} tokens"
    assert captured.length.item() == 180
    assert torch.equal(captured.tally[:, :5], eager.tally[:, :5])
    # and one for which there is no room
    graph.replay()
    assert output.isnan().all()
    assert captured.length.item() == 180


@pytest.mark.parametrize(("rows", "tokens"), [(1, 20000), (2, 3000)])
def test_a_thousand_steps_of_the_same_tensors_give_the_same_bits(rows, tokens):
    keys, values = skewed_keys(0, rows, 1, tokens, 64, dtype=torch.bfloat16), randn(1, rows, 1, tokens, 64).bfloat16()
    query = (randn(2, rows, 4, 64) / 8).bfloat16()
    regions = Rows.full(rows, tokens).regions(4, 256, torch.device("cpu"))
    case = on(GPU, (query, keys, values, coded(keys, fit(keys)), regions, 700, 3e-5))
    first = TRITON.step(*case, SCALING)
    for _ in range(1000):
        output, lse, selection = TRITON.step(*case, SCALING)
        assert torch.equal(output, first[0])
        assert torch.equal(lse, first[1])
        assert torch.equal(selection.counts, first[2].counts)
        assert torch.equal(selection.tokens, first[2].tokens)


SMALL_STEP = """if True:
    import torch
    from triton_tokens import Tokens

    layer = Tokens(torch.device("cuda"), torch.float16, 140, (0, 60), group=3, dim=80, value_dim=24, dense=40)
    layer.prefill(96)
    for at in range(96, 98):
        layer.append(at)
        assert layer.read(at, 8, 1e-3, 0.2).isfinite().all()
    torch.cuda.synchronize()"""


@pytest.mark.skipif(SANITIZER is None, reason="compute-sanitizer is not on PATH")
@pytest.mark.parametrize("tool", ["memcheck", "racecheck"])
def test_a_small_step_is_clean_under_the_sanitizer(tool):
    # PyTorch keeps freed memory, which would hide what is read of it
    environment = os.environ | {"PYTHONPATH": str(Path(__file__).parent), "PYTORCH_NO_CUDA_MEMORY_CACHING": "1"}
    command = [SANITIZER, "--tool", tool, "--error-exitcode", "9", sys.executable, "-c", SMALL_STEP]
    done = subprocess.run(command, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout[-4000:] + done.stderr[-4000:]
