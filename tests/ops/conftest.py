"""For every op test: one thread, one seed, and a printed reason where a GPU is missing."""

from __future__ import annotations

import pytest
import torch


@pytest.fixture(autouse=True)
def _deterministic(request: pytest.FixtureRequest) -> None:
    if request.node.get_closest_marker("gpu") and not torch.cuda.is_available():
        pytest.skip("needs a CUDA device, there is none")
    torch.manual_seed(0)
    torch.set_num_threads(1)
