"""Deep forgetting of small models with few rows, for the tests of training/deep."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import torch
from support import FEW_ROWS, FORGET, SPEC, TinyNet, tiny
from torch import Tensor, nn

from zsu_fast import InputSpec
from zsu_fast.models.wrapper import LogitsModel, working_copy
from zsu_fast.training.deep.rows import RowSource
from zsu_fast.training.deep.split import DeepSplit, find_deep_split

CPU = torch.device("cpu")


class TwoClassifiers(TinyNet):
    """A second layer adds to the logits beside the last one."""

    def __init__(self) -> None:
        super().__init__()
        self.beside = nn.Linear(72, 5)

    def forward(self, x: Tensor) -> Tensor:
        x = self.act(self.bn(self.conv(x))).flatten(1)
        return self.beside(x) + self.fc2(self.act(self.fc1(x)))


def deep_split(
    model: nn.Module, at: str | int = "auto", spec: InputSpec = SPEC
) -> tuple[LogitsModel, DeepSplit]:
    """A working copy of ``model``, and its split."""
    work = working_copy(model, CPU)
    return work, find_deep_split(work, at, spec)


def row_source(
    model: nn.Module | None = None, forget: Any = FORGET, seed: int = 0, **settings: Any
) -> RowSource:
    """The rows of a model of images like the tiny one's."""
    work, deep = deep_split(tiny() if model is None else model)
    classes = work(torch.zeros(1, *SPEC.shape)).shape[1]
    mask = torch.zeros(classes, dtype=torch.bool)
    mask[forget] = True
    return RowSource(work, deep, SPEC, mask, replace(FEW_ROWS, **settings), seed)


def last_layer_swapped(model: nn.Module, original: nn.Module, name: str, images: Tensor) -> Tensor:
    """The answers of ``model`` with the last layer, ``name``, of ``original``."""
    trained = model.get_submodule(name)
    model.set_submodule(name, original.get_submodule(name))
    try:
        with torch.no_grad():
            answers: Tensor = model(images).argmax(1)
    finally:
        model.set_submodule(name, trained)
    return answers
