from collections.abc import Iterator

import pytest
import torch
from hypothesis import settings

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
