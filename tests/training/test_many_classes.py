"""Many classes: nothing grows with rows times classes."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
from support import SPEC
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode

from zsu_fast import ZeroShotUnlearner
from zsu_fast.synthesis.ascent_settings import BatchLimits
from zsu_fast.training.features import MemoryLimits


class Many(nn.Module):
    """float [N, 3, 8, 8] -> [N, classes]."""

    def __init__(self, classes: int) -> None:
        super().__init__()
        self.trunk = nn.Sequential(nn.Flatten(), nn.Linear(192, 16), nn.ReLU())
        self.fc = nn.Linear(16, classes)
        self.input_spec = SPEC
        nn.init.normal_(self.trunk[1].weight, std=0.1)
        nn.init.normal_(self.fc.weight, std=2.0)

    def forward(self, x: Tensor) -> Tensor:
        return self.fc(self.trunk(x))


class Largest(TorchDispatchMode):
    """Notes the largest tensor that an operation returns, weights aside, in elements."""

    def __init__(self, weights: set[tuple[int, ...]]) -> None:
        super().__init__()
        self.weights, self.most = weights, 0

    def __torch_dispatch__(self, func: Any, _types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        for item in out if isinstance(out, tuple | list) else (out,):
            if isinstance(item, Tensor) and tuple(item.shape) not in self.weights:
                self.most = max(self.most, item.numel())
        return out


@pytest.mark.parametrize("subset", [True, False])
def test_no_tensor_has_rows_times_classes(subset: bool) -> None:
    classes = 3000
    model = Many(classes).eval()
    run = ZeroShotUnlearner(
        model, [7, 8], retain_sample=30, impressions_per_class=4, mixtures=1000, steps=5, batch=16,
        max_steps=30, restarts=0, precision="float32", progress=False, tail="last",
        space="input",
    )  # fmt: skip
    limits = MemoryLimits(
        tile_logits=32 * classes, tile_classes=1000, teacher_bytes=0,
        subset_above=256 if subset else 10**9,
    )  # fmt: skip
    run.options.features = replace(run.options.features, limits=limits)
    run.options.ascent = replace(run.options.ascent, limits=BatchLimits(logits=16 * classes))
    weights = {tuple(p.shape) for p in model.parameters()} | {(16, classes)}
    with Largest(weights) as seen:
        run.synthesise()
        run.split()
        run.fit()
    assert len(run.active_classes) == 32
    assert seen.most <= 32 * classes  # a tile; 128 impressions alone would take four times that
    assert run.result is not None
    assert run.result.history[-1].step == 5
