"""Fixtures with real data; tests that need it are skipped if it is absent."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

if "PYTEST_XDIST_WORKER" in os.environ:  # as many workers as cores: one thread in each
    os.environ["OMP_NUM_THREADS"] = "1"

import pytest
import torch
from support import FEW_ROWS, SHARED, shared_loader
from torch import Tensor

from zsu_fast.models import zoo
from zsu_fast.options import Options
from zsu_fast.training.deep import settings


def pytest_configure(config: pytest.Config) -> None:
    if torch.cuda.device_count() == 0:
        # Autograd starts here without GPU threads, so that tests can fork; it would start with them
        # after a fake tensor on a GPU (`opcheck`, the fake GPU) has set a device guard.
        torch.ones(1, requires_grad=True).sum().backward()
    torch.set_warn_always(True)  # else a warning is an error in the first test that meets it only
    # What a run tells its user is no error; in pyproject.toml this would import torch before the
    # number of threads is set.
    config.addinivalue_line("filterwarnings", "ignore::zsu_fast.UnlearningWarning")
    if os.environ.get("TRITON_INTERPRET") == "1":  # numpy computes there, and warns of inf - inf
        config.addinivalue_line("filterwarnings", "ignore::RuntimeWarning")


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    if (SHARED / "load.py").is_file():
        return
    skip = pytest.mark.skip(reason=f"no real data at {SHARED}")
    for item in items:
        if "shared" in item.keywords:
            item.add_marker(skip)


@pytest.hookimpl(optionalhook=True)
def pytest_xdist_make_scheduler(config: pytest.Config, log: Any) -> Any:
    """With ``pytest -n``: workers take neighbouring tests, which share their fixtures."""
    if config.option.dist != "load":  # the user chose another mode
        return None
    from xdist.scheduler import WorkStealingScheduling

    return WorkStealingScheduling(config, log)


@pytest.fixture(autouse=True)
def _seed_the_global_generator() -> None:
    torch.manual_seed(0)


@pytest.fixture
def few_rows(monkeypatch: pytest.MonkeyPatch) -> None:
    """Deep forgetting by `unlearn` and by commands has the fewest rows that there are."""
    monkeypatch.setattr(Options, "deep_settings", lambda *_: FEW_ROWS)


@pytest.fixture
def hardly_any_rows(monkeypatch: pytest.MonkeyPatch) -> None:
    """... and fewer still, for the mechanics on large models, whose features are then useless."""
    for name in ("_FEWEST_SCENES", "_FEWEST_INVERTED", "_SMALLEST_BATCH"):
        monkeypatch.setattr(settings, name, 16)
    rows = settings.DeepSettings(
        scenes=16, inverted=16, ascent_steps=1, steps=2, batch=8, rate=1e-6, leak=1.0
    )
    monkeypatch.setattr(Options, "deep_settings", lambda *_: rows)


@pytest.fixture(scope="session")
def mnist() -> tuple[Tensor, Tensor]:
    """MNIST's test images, normalised, and labels."""
    images, labels = shared_loader().mnist("test")
    return zoo.ZOO["lenet5"].spec.normalise(images), labels


@pytest.fixture(scope="session")
def cifar10() -> tuple[Tensor, Tensor]:
    """CIFAR-10's test images, uint8, and labels."""
    return shared_loader().cifar10("test")


@pytest.fixture(scope="session")
def resnet20_weights() -> Path:
    return SHARED / "models" / "cifar10_resnet20.safetensors"
