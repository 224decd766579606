"""Models with unusual features forget, and keep those features."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from support import (
    FORGET,
    QUICK,
    SPEC,
    TinyNet,
    assert_forgets,
    changed_tensors,
    tiny,
    train,
    untouched,
)
from torch import Tensor, nn
from torch.nn.utils import parametrizations

from zsu_fast import ZeroShotUnlearner


def run(model: nn.Module, **options: Any) -> tuple[ZeroShotUnlearner, nn.Module]:
    given = QUICK | {"input_shape": SPEC.shape, "mean": SPEC.mean, "std": SPEC.std} | options
    runner = ZeroShotUnlearner(model, FORGET, **given)
    with untouched(model):
        return runner, runner.run()


@pytest.mark.parametrize("tail", ["last", 2])
def test_weight_norm(tail: str | int) -> None:
    model = tiny()
    for layer in (model.fc1, model.fc2):
        parametrizations.weight_norm(layer)
    runner, result = run(model, tail=tail)
    trained = runner.split_point.parameters
    assert "fc2.parametrizations.weight.original1" in trained
    assert runner.split_point.output_level == (tail == "last")
    assert runner.split_point.name == ("fc2" if tail == "last" else "fc1")
    assert changed_tensors(model, result) <= set(trained)
    assert_forgets(result, FORGET)


@pytest.mark.filterwarnings("ignore::FutureWarning")
def test_deprecated_weight_norm() -> None:
    model = tiny()
    nn.utils.weight_norm(model.fc2)
    assert not model.fc2.weight.is_leaf  # copy.deepcopy refuses that
    runner, result = run(model, tail="last")
    assert {"fc2.weight_g", "fc2.weight_v"} <= set(runner.split_point.parameters)
    assert_forgets(result, FORGET)


def test_spectral_norm() -> None:
    model = tiny()
    parametrizations.spectral_norm(model.fc1)
    runner, result = run(train(model, 60), tail=2)
    assert "fc1.parametrizations.weight.original" in runner.split_point.parameters
    assert_forgets(result, FORGET)


def test_channels_last_is_kept() -> None:
    model = tiny().to(memory_format=torch.channels_last)
    _, result = run(model, tail="conv")
    assert "conv.weight" in changed_tensors(model, result)
    assert result.conv.weight.is_contiguous(memory_format=torch.channels_last)
    assert not result.conv.weight.is_contiguous()


class AuxiliaryClassifier(TinyNet):
    """In train mode, an auxiliary classifier besides the real one."""

    def __init__(self) -> None:
        super().__init__()
        self.aux = nn.Linear(72, 5)

    def forward(self, x: Tensor) -> Any:
        x = self.act(self.bn(self.conv(x))).flatten(1)
        logits = self.fc2(self.drop(self.act(self.fc1(x))))
        return {"aux": self.aux(x), "logits": logits} if self.training else logits


def test_auxiliary_outputs_of_train_mode() -> None:
    model = AuxiliaryClassifier()
    model.load_state_dict(tiny().state_dict(), strict=False)
    runner, result = run(model.train(), tail="last")
    assert runner.split_point.parameters == ["fc2.weight", "fc2.bias"]
    assert_forgets(result, FORGET)
    assert set(result.train()(torch.zeros(2, 3, 8, 8))) == {"aux", "logits"}


class Averaging(TinyNet):
    """The mean of two classifiers, as in a distilled DeiT."""

    def __init__(self) -> None:
        super().__init__()
        self.other = nn.Linear(32, 5)

    def forward(self, x: Tensor) -> Tensor:
        x = self.act(self.bn(self.conv(x))).flatten(1)
        x = self.act(self.fc1(x))
        return (self.fc2(x) + self.other(x)) / 2


def test_the_last_layer_includes_a_parallel_classifier() -> None:
    torch.manual_seed(0)
    runner, result = run(train(Averaging()), tail="last")
    assert runner.split_point.name == "fc2"
    assert runner.split_point.parameters == ["fc2.weight", "fc2.bias", "other.weight", "other.bias"]
    assert (
        "moved ahead of 'other', before which other logits are computed"
        in runner.split_point.reason
    )
    assert_forgets(result, FORGET)


def test_a_compiled_part() -> None:
    model = tiny()
    model.fc1 = torch.compile(model.fc1, backend="eager")
    _, result = run(model, tail="last")
    assert list(result.state_dict()) == list(model.state_dict())
    assert_forgets(result, FORGET)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_precision_in_a_deeper_tail(dtype: torch.dtype) -> None:
    model = copy.deepcopy(tiny()).to(dtype)
    _, result = run(model, tail=2)
    assert {p.dtype for p in result.parameters()} == {dtype}
    assert_forgets(result.float(), FORGET)
