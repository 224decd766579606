"""LeNet5, its golden model, and the embedded MNIST images."""

from __future__ import annotations

import pytest
from torch import Tensor, nn

from zsu_fast.cli.demo import mnist_test
from zsu_fast.models import zoo


@pytest.fixture(scope="session")
def original() -> nn.Module:
    return zoo.load("lenet5")


@pytest.fixture(scope="session")
def golden() -> nn.Module:
    return zoo.load("lenet5_golden")


@pytest.fixture(scope="session")
def images() -> tuple[Tensor, Tensor]:
    return mnist_test()
