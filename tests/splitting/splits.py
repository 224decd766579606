"""Helpers for the tests of splits."""

from __future__ import annotations

import torch
from support import TinyNet
from torch import Tensor, nn

from zsu_fast.models.wrapper import working_copy
from zsu_fast.splitting.split import Split, split_at

CPU = torch.device("cpu")


def split_before(model: nn.Module, name: str, images: Tensor) -> Split:
    return split_at(working_copy(model, CPU), name, images, "a test")


def assert_splits_right(model: nn.Module, name: str, images: Tensor) -> Split:
    """Backbone and tail equal the model: on these images, on one alone, and on others."""
    found = split_before(model, name, images)
    with torch.no_grad():
        for batch in (images, images[:1], torch.rand_like(images)):
            want = model(batch)
            got = found.tail(*found.backbone(batch))
            scale = 1 + float(want.abs().max())
            assert torch.allclose(got, want, rtol=1e-4, atol=1e-5 * scale), name
    return found


class Branching(TinyNet):
    """Control flow on values: torch.fx does not get through."""

    def forward(self, x: Tensor) -> Tensor:
        x = self.act(self.bn(self.conv(x))).flatten(1)
        if float(x.detach().sum()) > -1e9:
            x = self.act(self.fc1(x))
        return self.fc2(self.drop(x))
