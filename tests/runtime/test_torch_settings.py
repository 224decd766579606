"""Small models run on one thread, and the caller's setting is always restored."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch
from support import QUICK, tiny

import zsu_fast
from zsu_fast.models import zoo
from zsu_fast.runtime.measuring import multiply_adds
from zsu_fast.runtime.torch_settings import SMALL, threads_for

CPU = torch.device("cpu")


@pytest.fixture(autouse=True)
def _two_threads() -> Iterator[None]:
    before = torch.get_num_threads()
    torch.set_num_threads(2)
    yield
    torch.set_num_threads(before)


def test_multiply_adds_of_known_models() -> None:
    lenet = 28 * 28 * 6 * 25 + 10 * 10 * 16 * 150 + 400 * 120 + 120 * 84 + 84 * 10
    assert multiply_adds(zoo.build("lenet5"), torch.zeros(1, 1, 28, 28)) == lenet
    resnet = multiply_adds(zoo.build("resnet20_cifar"), torch.zeros(1, 3, 32, 32))
    assert 40_000_000 < resnet < 42_000_000


def test_small_work_on_a_cpu_runs_on_one_thread() -> None:
    with threads_for(SMALL, CPU):
        assert torch.get_num_threads() == 1
    assert torch.get_num_threads() == 2
    with threads_for(SMALL + 1, CPU):
        assert torch.get_num_threads() == 2
    with threads_for(1, torch.device("cuda")):
        assert torch.get_num_threads() == 2


def test_a_run_uses_one_thread_and_restores_the_setting() -> None:
    seen: set[int] = set()
    zsu_fast.unlearn(
        tiny(), [1], callback=lambda _: bool(seen.add(torch.get_num_threads())), **QUICK
    )
    assert seen == {1}
    assert torch.get_num_threads() == 2

    def interrupt(_: zsu_fast.Event) -> bool:
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        zsu_fast.unlearn(tiny(), [1], callback=interrupt, **QUICK)
    assert torch.get_num_threads() == 2
