"""A small multi-label case: images are sums of patterns, and a TinyNet trained on them."""

from __future__ import annotations

import copy
import functools
from typing import Any

import torch
from support import FEW_ROWS, FORGET, QUICK_DEEP, SPEC, TinyNet
from torch import Tensor, nn

import zsu_fast
from zsu_fast.training.deep.settings import DeepSettings

IMAGES: dict[str, Any] = {"input_shape": SPEC.shape, "mean": SPEC.mean, "std": SPEC.std}


def several_data(count: int = 400, seed: int = 1) -> tuple[Tensor, Tensor]:
    """Noisy sums of the five patterns of `tiny_data`, normalised, and labels, bool [count, 5]."""
    patterns = torch.rand(5, 3, 8, 8, generator=torch.Generator().manual_seed(7)) - 0.5
    generator = torch.Generator().manual_seed(seed)
    labels = torch.rand(count, 5, generator=generator) < 0.35
    noise = 0.25 * torch.randn(count, 3, 8, 8, generator=generator)
    images = 0.5 + noise + torch.einsum("nc,cijk->nijk", labels.float(), patterns)
    return SPEC.normalise(images.clamp(0, 1) * 255), labels


@functools.lru_cache(maxsize=1)
def _trained() -> nn.Module:
    images, labels = several_data(2000, seed=0)
    with torch.random.fork_rng():
        torch.manual_seed(0)
        model = TinyNet()
        optimiser = torch.optim.Adam(model.parameters(), 1e-2)
        for _ in range(200):
            chosen = torch.randint(len(images), (256,))
            optimiser.zero_grad()
            loss = nn.functional.binary_cross_entropy_with_logits
            loss(model(images[chosen]), labels[chosen].float()).backward()
            optimiser.step()
    model.zero_grad()
    return model.eval()


def several() -> nn.Module:
    """A fresh copy of a TinyNet with one sigmoid per class, which are not part of it."""
    return copy.deepcopy(_trained())


def run(
    model: nn.Module | None = None,
    forget: Any = FORGET,
    settings: DeepSettings = FEW_ROWS,
    **options: Any,
) -> tuple[zsu_fast.ZeroShotUnlearner, nn.Module]:
    """A finished run on the small model, by default deep with few rows."""
    given = QUICK_DEEP | IMAGES | {"multi_label": True} | options
    unlearner = zsu_fast.ZeroShotUnlearner(several() if model is None else model, forget, **given)
    unlearner.options.deep = settings
    return unlearner, unlearner.run()


def measure(model: nn.Module, forget: Any = FORGET) -> Any:
    return zsu_fast.evaluate(model, several_data(), forget, multi_label=True)
