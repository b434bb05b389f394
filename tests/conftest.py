import ctypes
import os
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import torch
from hypothesis import settings

from sparse_attention_decoder.kernels.cpu.library import ISAS, load

# read when a kernel is defined, so it has to be set before Triton's kernels are imported
if not torch.cuda.is_available():
    os.environ["TRITON_INTERPRET"] = "1"

# set where the compiled library has to be there: its tests fail without it then, and are skipped otherwise
REQUIRE_CPU = "SPARSE_ATTENTION_DECODER_REQUIRE_CPU"

# derandomize: a red test is red for everyone; the machines that run these tests are shared, so no deadline
settings.register_profile("laws", deadline=None, derandomize=True, max_examples=30)
settings.load_profile("laws")
# the tensors are tiny: threads only wait for each other, five times as long where cores are shared
torch.set_num_threads(1)


@pytest.fixture
def poison() -> Iterator[None]:
    """Fill every torch.empty with NaN (or the largest integer), so that reading what nobody wrote shows."""
    before = torch.are_deterministic_algorithms_enabled()
    torch.use_deterministic_algorithms(True)
    assert torch.utils.deterministic.fill_uninitialized_memory
    yield
    torch.use_deterministic_algorithms(before)


@pytest.fixture
def set_threads() -> Iterator[Callable[[int], None]]:
    """torch.set_num_threads, undone after the test."""
    before = torch.get_num_threads()
    yield torch.set_num_threads
    torch.set_num_threads(before)


@pytest.fixture(scope="module")
def steps(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Where compiled steps are kept while a module's tests run: each is compiled once."""
    return tmp_path_factory.mktemp("steps")


@pytest.fixture
def kept_steps(steps: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Compiled steps are kept in `steps`."""
    monkeypatch.setenv("SPARSE_ATTENTION_DECODER_CACHE", str(steps))


@pytest.fixture(scope="session")
def compiled_library() -> ctypes.CDLL:
    """The compiled kernels; without them a test is skipped, or fails where they must be there."""
    library = load()
    if isinstance(library, str):
        (pytest.fail if os.environ.get(REQUIRE_CPU) else pytest.skip)(library)
    return library


@pytest.fixture(scope="module", params=ISAS)
def isa(request: pytest.FixtureRequest, compiled_library: ctypes.CDLL) -> Iterator[str]:
    """Run a test with each instruction set of the compiled kernels that this machine has."""
    library = compiled_library
    before = library.sad_isa()
    if not library.sad_use_isa(request.param.encode()):
        # instructions the CPU lacks cannot be run; portable is never missing, so no test is skipped altogether
        pytest.skip(f"this machine has no {request.param}")
    yield request.param
    assert library.sad_use_isa(before)
