"""Boundary tensors whose rows are not the first dimension are brought there and back."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from splits import assert_splits_right, split_before
from torch import Tensor, nn

from zsu_fast.splitting.replay_split import ReplayTail


class SequenceFirst(nn.Module):
    """Tokens [T, N, C], as in nn.TransformerEncoder by default, and a class token."""

    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Conv2d(3, 8, 2, 2)
        self.token = nn.Parameter(torch.randn(1, 1, 8))
        self.a, self.b, self.out = nn.Linear(8, 8), nn.Linear(8, 8), nn.Linear(8, 3)

    def forward(self, x: Tensor) -> Tensor:
        x = self.embed(x).flatten(2).permute(2, 0, 1)
        x = torch.cat([self.token.expand(1, x.shape[1], 8), x])
        x = x + torch.tanh(self.a(x))
        x = x + torch.tanh(self.b(x))
        return self.out(x[0])


class Windows(nn.Module):
    """There are N * windows rows; a bias depends on parameters before the split."""

    def __init__(self) -> None:
        super().__init__()
        self.embed, self.bias = nn.Conv2d(3, 8, 2, 2), nn.Linear(4, 8)
        self.register_buffer("places", torch.rand(4, 4))
        self.a, self.out = nn.Linear(8, 8), nn.Linear(8, 3)

    def forward(self, x: Tensor) -> Tensor:
        n = x.shape[0]
        bias = self.bias(self.places)
        x = self.embed(x).unflatten(2, (2, -1)).unflatten(4, (2, -1))  # N C 2 h 2 w
        x = x.permute(0, 2, 4, 3, 5, 1).reshape(4 * n, -1, 8)
        x = torch.tanh(self.a(x + bias)).view(n, -1, 8)
        return self.out(x.mean(1))


class Strict(nn.Module):
    """Any model, with control flow on values around it, so that it does not trace."""

    def __init__(self, inner: nn.Module) -> None:
        super().__init__()
        self.inner = inner

    def forward(self, x: Tensor) -> Tensor:
        if x.shape[2] > 1000:
            raise ValueError("too large")
        return self.inner(x)


@pytest.mark.parametrize("traceable", [True, False])
@pytest.mark.parametrize("kind", [SequenceFirst, Windows])
def test_rows_that_are_not_first_are_brought_there(kind: Any, traceable: bool) -> None:
    model, images = kind().eval(), torch.rand(3, 3, 8, 8)
    prefix = "" if traceable else "inner."
    model = model if traceable else Strict(model)
    for name in ("a", "out"):
        found = assert_splits_right(model, prefix + name, images)
        assert isinstance(found.tail, ReplayTail) == (not traceable)
        crossing = found.backbone(images)
        assert all(len(f) == 3 for f in crossing)
        order = torch.tensor([2, 0, 1])
        for one, other in zip(found.backbone(images[order]), crossing, strict=True):
            assert torch.allclose(one, other[order], atol=1e-6)
    assert split_before(model, prefix + "out", images).parameters == [
        f"{prefix}out.{n}" for n in ("weight", "bias")
    ]  # no token, though a replay runs the code that uses it anew
    assert not any("bias." in p for p in split_before(model, prefix + "a", images).parameters)
