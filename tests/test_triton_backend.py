"""Where Triton's backend serves, and why it refuses elsewhere."""

import subprocess
import sys

import pytest
import torch
from cases import FLOATS
from triton_cases import TRITON

from sparse_attention_decoder.errors import BackendError
from sparse_attention_decoder.kernels import Request, resolve
from sparse_attention_decoder.kernels import triton as backend

CPU, CUDA = torch.device("cpu"), torch.device("cuda")


@pytest.fixture
def a_gpu(monkeypatch):
    """A GPU as far as a backend asks for one, of this compute capability."""
    capability = [(9, 0)]
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: capability[0])
    return capability


@pytest.mark.usefixtures("a_gpu")
@pytest.mark.parametrize("dtype", FLOATS, ids=str)
@pytest.mark.parametrize(("dim", "value_dim"), [(16, None), (24, 256), (64, None), (80, 16), (128, 128), (256, None)])
def test_auto_takes_triton_on_a_gpu(dtype, dim, value_dim):
    assert resolve("auto", Request(CUDA, dtype, dim, value_dim)).name == "triton"


@pytest.mark.parametrize(
    ("request_", "reason"),
    [
        (Request(torch.device("meta"), torch.float32, 64), "device meta is not a CUDA GPU"),
        (Request(CUDA, torch.float64, 64), "dtype torch.float64 is none of float32, bfloat16, float16"),
        (Request(CUDA, torch.int8, 64), "dtype torch.int8 is none of"),
        (Request(CUDA, torch.float16, 20), "head_dim 20 is no multiple of 8 from 16 to 256"),
        (Request(CUDA, torch.float16, 8), "head_dim 8 is no multiple of 8 from 16 to 256"),
        (Request(CUDA, torch.float16, 264), "head_dim 264 is no multiple"),
        (Request(CUDA, torch.float16, 64, 12), "head_dim 12 is no multiple"),
        (Request(CUDA, torch.float16, 64, 512), "head_dim 512 is no multiple"),
    ],
)
@pytest.mark.usefixtures("a_gpu")
def test_what_triton_cannot_serve_is_refused_with_the_reason(request_, reason):
    assert reason in (TRITON.refuses(request_) or "")
    with pytest.raises(BackendError, match=reason):
        resolve("triton", request_)


@pytest.mark.parametrize(("capability", "refused"), [((7, 5), True), ((8, 0), False), ((12, 0), False)])
def test_gpus_without_what_the_kernels_need_are_refused(a_gpu, capability, refused):
    a_gpu[0] = capability
    reason = TRITON.refuses(Request(CUDA, torch.float16, 64)) or ""
    assert ("older than compute capability 8.0" in reason) is refused


@pytest.mark.parametrize("value", ["", "0", None], ids=str)
def test_a_cpu_is_refused_unless_the_interpreter_is_asked_for(monkeypatch, value):
    request = Request(CPU, torch.float32, 64)
    monkeypatch.setenv("TRITON_INTERPRET", "1")
    assert TRITON.refuses(request) is None
    monkeypatch.delenv("TRITON_INTERPRET") if value is None else monkeypatch.setenv("TRITON_INTERPRET", value)
    assert "device cpu is not a CUDA GPU" in (TRITON.refuses(request) or "")
    with pytest.raises(BackendError, match=r"'triton'.*not a CUDA GPU"):
        resolve("triton", request)


@pytest.mark.usefixtures("a_gpu")
def test_without_triton_the_reason_says_how_to_get_it(monkeypatch):
    monkeypatch.setattr(backend, "find_spec", lambda name: None)
    assert "pip install 'sparse-attention-decoder[gpu]'" in TRITON.refuses(Request(CUDA, torch.float16, 64))
    assert resolve("auto", Request(CUDA, torch.float16, 64)).name == "reference"


def test_asking_every_backend_imports_no_triton():
    script = """if True:
        import sys, torch
        from sparse_attention_decoder.kernels import Request, resolve
        before = {name for name in sys.modules if name.split(".")[0] == "triton"}
        resolve("auto", Request(torch.device("cpu"), torch.float64, 66))
        assert not {name for name in sys.modules if name.split(".")[0] == "triton"} - before
        assert not [name for name in sys.modules if name.startswith("sparse_attention_decoder.kernels.triton.")]"""
    subprocess.run([sys.executable, "-c", script], check=True)
