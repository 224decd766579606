"""Every op test runs on one thread with one seed; gpu tests are skipped without a GPU."""

from __future__ import annotations

import pytest
import torch


@pytest.fixture(autouse=True)
def _deterministic(request: pytest.FixtureRequest) -> None:
    if request.node.get_closest_marker("gpu") and not torch.cuda.is_available():
        pytest.skip("needs a CUDA device")
    torch.manual_seed(0)
    torch.set_num_threads(1)
