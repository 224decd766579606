"""Further copies of the classes in a model's file."""

from __future__ import annotations

import pytest
import torch
from splits import CPU
from support import FORGET, TinyNet, tiny, tiny_data
from torch import Tensor, nn

from zsu_fast.models.wrapper import working_copy
from zsu_fast.splitting.copies import class_copies, erase_rows

LAST = ["fc2.weight", "fc2.bias"]


def copies_in(model: nn.Module, trained: list[str] = LAST) -> dict[str, int]:
    return class_copies(working_copy(model.eval(), CPU), tiny_data(4)[0], trained)


class Averaged(nn.Module):
    """A network and its EMA copy, with a hidden layer as wide as there are classes."""

    def __init__(self) -> None:
        super().__init__()
        self.net, self.ema = TinyNet(), TinyNet()
        for net in (self.net, self.ema):
            net.conv, net.bn, net.fc1 = nn.Conv2d(3, 5, 3, 2), nn.BatchNorm2d(5), nn.Linear(45, 32)

    def forward(self, x: Tensor) -> Tensor:
        return self.net(x)


class WithAuxiliary(TinyNet):
    def __init__(self) -> None:
        super().__init__()
        self.aux = nn.Linear(72, 5)

    def forward(self, x: Tensor) -> Tensor:
        x = self.act(self.bn(self.conv(x))).flatten(1)
        self.beside = self.aux(x)
        return self.fc2(self.drop(self.act(self.fc1(x))))


def test_a_plain_model_has_none() -> None:
    assert copies_in(tiny()) == {}


def test_a_layer_that_is_kept_beside_the_trained_one() -> None:
    model = tiny()
    model.original_module = nn.Linear(32, 5)
    model.register_buffer("class_weight", torch.ones(5))  # of a loss: no row
    assert copies_in(model) == {"original_module.weight": 0, "original_module.bias": 0}


def test_an_average_of_the_weights() -> None:
    found = copies_in(Averaged(), ["net.fc2.weight", "net.fc2.bias"])
    assert found == {"ema.fc2.weight": 0, "ema.fc2.bias": 0}


def test_an_auxiliary_head_that_runs_beside_the_logits() -> None:
    assert copies_in(WithAuxiliary()) == {"aux.weight": 0, "aux.bias": 0}


def test_a_head_of_an_ensemble_that_is_not_trained() -> None:
    class Two(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.a, self.b = TinyNet(), TinyNet()

        def forward(self, x: Tensor) -> Tensor:
            return self.a(x) + self.b(x)

    both = ["a.fc2.weight", "a.fc2.bias", "b.fc2.weight", "b.fc2.bias"]
    assert copies_in(Two(), both[2:]) == {"a.fc2.weight": 0, "a.fc2.bias": 0}
    assert copies_in(Two(), both) == {}


def test_what_shares_memory_with_a_trained_tensor_is_no_copy() -> None:
    model = tiny()
    model.again = model.fc2
    assert copies_in(model) == {}


def test_a_backbone_without_gradients_is_not_taken_for_copies() -> None:
    class NoGrad(TinyNet):
        def __init__(self) -> None:
            super().__init__()
            self.conv, self.bn, self.fc1 = (
                nn.Conv2d(3, 5, 3, 2),
                nn.BatchNorm2d(5),
                nn.Linear(45, 32),
            )

        def forward(self, x: Tensor) -> Tensor:
            with torch.no_grad():
                x = self.act(self.bn(self.conv(x))).flatten(1)
                x = self.act(self.fc1(x))
            return self.fc2(x)

    assert copies_in(NoGrad()) == {}


@pytest.mark.parametrize("dim", [0, 1])
def test_erased_rows_are_never_the_top_class(dim: int) -> None:
    model = nn.Module()
    model.weight = nn.Parameter(torch.randn(5, 8) if dim == 0 else torch.randn(8, 5))
    before = model.weight.detach().clone()
    forget = torch.zeros(5, dtype=torch.bool)
    forget[FORGET] = True
    erase_rows(model, {"weight": dim}, forget)
    rows, old = (w.detach().movedim(dim, 0) for w in (model.weight, before))
    assert torch.equal(rows[~forget], old[~forget])
    answers = (torch.randn(500, 8) @ rows.T).argmax(1)
    assert not forget[answers].any()
