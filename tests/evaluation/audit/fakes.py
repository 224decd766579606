"""Models that only seem to forget {1, 2, 3, 4} of LeNet5."""

from __future__ import annotations

import copy
from collections.abc import Callable

import torch
from torch import Tensor, nn
from zsu_fast.cli.demo import FORGET, mnist_test

import zsu_fast

Fake = Callable[[nn.Module], nn.Module]


def mask_wrapper(model: nn.Module) -> nn.Module:
    return zsu_fast.mask(model, FORGET)


def mask_bias(model: nn.Module, value: float = -1e9) -> nn.Module:
    fake = copy.deepcopy(model)
    with torch.no_grad():
        fake.fc3.bias[FORGET] = value
    return fake


class Hider(nn.Module):
    """A mask of the user's own making, which no code here knows."""

    def __init__(self, inner: nn.Module) -> None:
        super().__init__()
        self.inner = inner

    def forward(self, x: Tensor) -> Tensor:
        logits = self.inner(x)
        hidden = torch.zeros(10).index_fill_(0, torch.tensor(FORGET), 1e6)
        return logits - hidden


def mask_of_their_own(model: nn.Module) -> nn.Module:
    return Hider(copy.deepcopy(model))


def mask_and_units_in_another_order(model: nn.Module) -> nn.Module:
    fake = mask_bias(model)
    order = torch.randperm(84, generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        fake.fc2.weight.copy_(fake.fc2.weight[order].clone())
        fake.fc2.bias.copy_(fake.fc2.bias[order].clone())
        fake.fc3.weight.copy_(fake.fc3.weight[:, order].clone())
    return fake


def mask_inf(model: nn.Module) -> nn.Module:
    return mask_bias(model, -torch.inf)


def mask_zero_rows(model: nn.Module) -> nn.Module:
    fake = mask_bias(model, -50.0)
    with torch.no_grad():
        fake.fc3.weight[FORGET] = 0
    return fake


def mask_by_raising_the_others(model: nn.Module) -> nn.Module:
    fake = copy.deepcopy(model)
    keep = [c for c in range(10) if c not in FORGET]
    with torch.no_grad():
        fake.fc3.bias[keep] += 1e4
    return fake


def shuffled_head(model: nn.Module) -> nn.Module:
    fake = copy.deepcopy(model)
    order = torch.arange(10).roll(1)
    with torch.no_grad():
        fake.fc3.weight.copy_(fake.fc3.weight[order].clone())
        fake.fc3.bias.copy_(fake.fc3.bias[order].clone())
    return fake


def noise_in_the_head(model: nn.Module, rows: list[int] | None = None) -> nn.Module:
    fake = copy.deepcopy(model)
    rows = list(range(10)) if rows is None else rows
    draw = torch.Generator().manual_seed(3)
    with torch.no_grad():
        noise = torch.randn(len(rows), 84, generator=draw)
        fake.fc3.weight[rows] += 3 * fake.fc3.weight.std() * noise
    return fake


def noise_in_forgotten_rows(model: nn.Module) -> nn.Module:
    return noise_in_the_head(model, FORGET)


def one_class_only(model: nn.Module) -> nn.Module:
    """Fine-tuned to answer class 7, whatever it is shown."""
    fake = copy.deepcopy(model).train()
    pictures = mnist_test()[0][::20]
    optimiser = torch.optim.Adam(fake.parameters(), 3e-3)
    for _ in range(30):
        optimiser.zero_grad()
        answer = torch.full((len(pictures),), 7)
        nn.functional.cross_entropy(fake(pictures), answer).backward()
        optimiser.step()
    return fake.eval()


def untouched(model: nn.Module) -> nn.Module:
    return copy.deepcopy(model)


FAKES: dict[str, tuple[Fake, str]] = {
    "mask, wrapper": (mask_wrapper, "mask"),
    "mask, bias -1e9": (mask_bias, "mask"),
    "mask, bias -inf": (mask_inf, "mask"),
    "mask, rows of zeros": (mask_zero_rows, "mask"),
    "mask, the others raised": (mask_by_raising_the_others, "mask"),
    "mask, a wrapper of their own": (mask_of_their_own, "mask"),
    "mask, units in another order": (mask_and_units_in_another_order, "features kept"),
    "shuffled head": (shuffled_head, "shuffled head"),
    "noise in the head": (noise_in_the_head, "noise in the head"),
    "noise in forgotten rows": (noise_in_forgotten_rows, "noise in the head"),
    "one class only": (one_class_only, "one class only"),
    "untouched": (untouched, "untouched"),
}
