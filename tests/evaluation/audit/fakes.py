"""Models that only seem to forget {1, 2, 3, 4} of LeNet5."""

from __future__ import annotations

import copy
from collections.abc import Callable

import torch
from torch import Tensor, nn

import zsu_fast
from zsu_fast.cli.demo import FORGET, mnist_test
from zsu_fast.evaluation.audit import FindingName

Fake = Callable[[nn.Module], nn.Module]


def mask_wrapper(model: nn.Module) -> nn.Module:
    return zsu_fast.mask(model, FORGET)


def mask_bias(model: nn.Module, value: float = -1e9) -> nn.Module:
    fake = copy.deepcopy(model)
    with torch.no_grad():
        fake.fc3.bias[FORGET] = value
    return fake


class Hider(nn.Module):
    """A user's own mask, which the package does not know."""

    def __init__(self, inner: nn.Module) -> None:
        super().__init__()
        self.inner = inner

    def forward(self, x: Tensor) -> Tensor:
        logits = self.inner(x)
        hidden = torch.zeros(10).index_fill_(0, torch.tensor(FORGET), 1e6)
        return logits - hidden


def users_own_mask(model: nn.Module) -> nn.Module:
    return Hider(copy.deepcopy(model))


def mask_and_permuted_units(model: nn.Module) -> nn.Module:
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


def mask_by_raising_other_classes(model: nn.Module) -> nn.Module:
    fake = copy.deepcopy(model)
    keep = [c for c in range(10) if c not in FORGET]
    with torch.no_grad():
        fake.fc3.bias[keep] += 1e4
    return fake


def shuffled_last_layer(model: nn.Module) -> nn.Module:
    fake = copy.deepcopy(model)
    order = torch.arange(10).roll(1)
    with torch.no_grad():
        fake.fc3.weight.copy_(fake.fc3.weight[order].clone())
        fake.fc3.bias.copy_(fake.fc3.bias[order].clone())
    return fake


def noise_in_the_last_layer(model: nn.Module, rows: list[int] | None = None) -> nn.Module:
    fake = copy.deepcopy(model)
    rows = list(range(10)) if rows is None else rows
    draw = torch.Generator().manual_seed(3)
    with torch.no_grad():
        noise = torch.randn(len(rows), 84, generator=draw)
        fake.fc3.weight[rows] += 3 * fake.fc3.weight.std() * noise
    return fake


def noise_in_forgotten_rows(model: nn.Module) -> nn.Module:
    return noise_in_the_last_layer(model, FORGET)


def one_class_only(model: nn.Module) -> nn.Module:
    """Fine-tuned to predict class 7 for every image."""
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
    "mask, wrapper": (mask_wrapper, FindingName.MASK),
    "mask, bias -1e9": (mask_bias, FindingName.MASK),
    "mask, bias -inf": (mask_inf, FindingName.MASK),
    "mask, rows of zeros": (mask_zero_rows, FindingName.MASK),
    "mask, other classes raised": (mask_by_raising_other_classes, FindingName.MASK),
    "mask, the user's own": (users_own_mask, FindingName.MASK),
    "mask, permuted units": (mask_and_permuted_units, FindingName.FEATURES_KEPT),
    "shuffled last layer": (shuffled_last_layer, FindingName.SHUFFLED),
    "noise in the last layer": (noise_in_the_last_layer, FindingName.NOISE),
    "noise in forgotten rows": (noise_in_forgotten_rows, FindingName.NOISE),
    "one class only": (one_class_only, FindingName.ONE_CLASS),
    "untouched": (untouched, FindingName.UNTOUCHED),
}
