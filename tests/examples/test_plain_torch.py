"""The algorithm in plain torch forgets what the package forgets and keeps what it keeps."""

from __future__ import annotations

import pytest
import torch
from support import changed_tensors, untouched
from torch import Tensor, nn

import zsu_fast
from examples.unlearn_in_plain_torch import unlearn
from zsu_fast.cli.demo import mnist_test
from zsu_fast.models import zoo

pytestmark = pytest.mark.filterwarnings("ignore:only the last layer:UserWarning")
DIGITS = [1, 2, 3, 4]
Models = tuple[nn.Module, nn.Module, nn.Module]


def unlearn_zoo_model(name: str, forget: list[int]) -> Models:
    """The model, and what the example and the package return for it."""
    model, spec = zoo.load(name), zoo.ZOO[name].spec
    with untouched(model):
        plain = unlearn(model, forget, mean=spec.mean, std=spec.std, shape=spec.shape)
    return (
        model,
        plain,
        zsu_fast.unlearn(model, forget, depth="output", space="input", progress=False),
    )


@pytest.fixture(scope="module")
def lenet5() -> Models:
    return unlearn_zoo_model("lenet5", DIGITS)


def fa_and_ra(
    model: nn.Module, data: tuple[Tensor, Tensor], forget: list[int]
) -> tuple[float, float]:
    result = zsu_fast.evaluate(model, data, forget)
    assert result.forget_accuracy is not None
    assert result.retain_accuracy is not None
    return result.forget_accuracy, result.retain_accuracy


def test_lenet5_reaches_the_same_fa_and_ra(lenet5: Models) -> None:
    model, plain, ours = lenet5
    data = mnist_test()
    (plain_fa, plain_ra), (our_fa, our_ra) = (fa_and_ra(m, data, DIGITS) for m in (plain, ours))
    mask_ra = fa_and_ra(zsu_fast.mask(model, DIGITS), data, DIGITS)[1]
    assert plain_fa == our_fa == 0
    assert plain_ra == pytest.approx(our_ra, abs=0.1)
    assert plain_ra == pytest.approx(mask_ra, abs=0.1)
    assert our_ra == pytest.approx(mask_ra, abs=0.1)


def test_both_change_the_last_layer_alone(lenet5: Models) -> None:
    model, plain, ours = lenet5
    assert changed_tensors(model, plain) == changed_tensors(model, ours)
    assert changed_tensors(model, plain) == {"fc3.weight", "fc3.bias"}
    others = [0, 5, 6, 7, 8, 9]
    assert torch.equal(plain.fc3.weight[others], model.fc3.weight[others])


def test_the_seed_decides() -> None:
    model, spec = zoo.load("lenet5"), zoo.ZOO["lenet5"].spec
    first, again, other = (
        unlearn(model, [7], mean=spec.mean, std=spec.std, shape=spec.shape, seed=s, per_class=4)
        for s in (0, 0, 1)
    )
    assert not changed_tensors(first, again)
    assert changed_tensors(first, other)


@pytest.mark.shared
def test_karpathynet_reaches_the_same_fa_and_ra(cifar10: tuple[Tensor, Tensor]) -> None:
    forget = [3, 4, 8]
    images, labels = cifar10
    data = (zoo.ZOO["karpathynet"].spec.normalise(images), labels)
    model, plain, ours = unlearn_zoo_model("karpathynet", forget)
    (plain_fa, plain_ra), (our_fa, our_ra) = (fa_and_ra(m, data, forget) for m in (plain, ours))
    mask_ra = fa_and_ra(zsu_fast.mask(model, forget), data, forget)[1]
    assert plain_fa <= 0.5
    assert our_fa <= 0.5
    assert plain_ra == pytest.approx(our_ra, abs=0.3)
    assert plain_ra == pytest.approx(mask_ra, abs=0.3)
