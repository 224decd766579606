"""Max pooling and relu become one op, and the function stays the same."""

from __future__ import annotations

import copy
from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from zsu_fast.models import zoo
from zsu_fast.models.wrapper import working_copy
from zsu_fast.ops import library
from zsu_fast.synthesis.fuse_pools import MaxPool, fuse_pools
from zsu_fast.synthesis.inference_copy import inference_copy

pytestmark = pytest.mark.skipif(not library.CPU.loaded, reason=str(library.CPU.reason))


class Net(nn.Module):
    """A convolution, and ``pool``."""

    def __init__(self, pool: Callable[[Tensor], Tensor]) -> None:
        super().__init__()
        self.conv, self.pool = nn.Conv2d(3, 8, 3), pool

    def forward(self, x: Tensor) -> Tensor:
        return self.pool(self.conv(x)).flatten(1)


def twice(x: Tensor) -> Tensor:
    """Relu's output is used beside the pooling's."""
    y = x.relu()
    return F.max_pool2d(y, 2) + y[:, :, :16:2, ::2]


POOLS: list[tuple[Callable[[Tensor], Tensor], list[bool]]] = [
    (lambda x: F.max_pool2d(F.relu(x), 2), [True]),
    (lambda x: F.relu(F.max_pool2d(x, 2)), [True]),
    (lambda x: torch.max_pool2d(x, (2, 2), [2, 2]).relu(), [True]),
    (lambda x: F.max_pool2d(F.max_pool2d(x.relu(), 2), 3, 1, padding=1), [True, False]),
    (lambda x: F.max_pool2d(x.relu(), kernel_size=3, stride=2, ceil_mode=True).relu(), [True]),
    (nn.Sequential(nn.ReLU(), nn.MaxPool2d(3, 2, 1)), [True]),
    (nn.Sequential(nn.MaxPool2d(2), nn.ReLU(inplace=True), nn.ReLU()), [True]),
    (twice, [False]),
    (lambda x: F.max_pool2d(x, 2).sigmoid(), [False]),
]
LEFT_ALONE: list[Callable[[Tensor], Tensor]] = [
    lambda x: F.max_pool2d(x, (2, 3)),
    lambda x: F.max_pool2d(x, 2, dilation=2),
    lambda x: F.max_pool2d(x, 16),
    lambda x: F.max_pool2d(x, 2, return_indices=True)[0],
    lambda x: F.avg_pool2d(x, 2),
    nn.AdaptiveMaxPool2d(2),
]


def outputs(model: nn.Module, images: Tensor) -> tuple[Tensor, Tensor]:
    x = images.clone().requires_grad_()
    out = model(x)
    return out, torch.autograd.grad(out.square().sum(), x)[0]


@pytest.mark.parametrize(("pool", "relus"), POOLS)
def test_the_function_stays_the_same(pool: Callable[[Tensor], Tensor], relus: list[bool]) -> None:
    torch.manual_seed(0)
    model, images = Net(pool).eval(), torch.randn(3, 3, 19, 18)
    fused = fuse_pools(copy.deepcopy(model))
    assert fused is not None
    found = [m for m in fused.modules() if isinstance(m, MaxPool)]
    assert [m.relu for m in found] == relus
    for got, want in zip(outputs(fused, images), outputs(model, images), strict=True):
        torch.testing.assert_close(got, want)


@pytest.mark.parametrize("pool", LEFT_ALONE)
def test_other_pooling_is_left_alone(pool: Callable[[Tensor], Tensor]) -> None:
    assert fuse_pools(Net(pool)) is None


def test_untraceable_models_are_left_alone() -> None:
    assert fuse_pools(Net(lambda x: F.max_pool2d(x, 2) if len(x) > 1 else x)) is None


@pytest.mark.parametrize(("name", "pools"), [("lenet5", 2), ("karpathynet", 3)])
def test_the_ascent_takes_it(name: str, pools: int) -> None:
    model = zoo.build(name)
    shape = {"lenet5": (1, 28, 28), "karpathynet": (3, 32, 32)}[name]
    made = inference_copy(working_copy(model, torch.device("cpu")), torch.randn(2, *shape))
    assert sum(isinstance(m, MaxPool) and m.relu for m in made.module.modules()) == pools
