"""Which classes get impressions where there are very many: the forgotten, and a sample of the rest.

Impressions of 100,000 classes would take a day and teach little: where only the forgotten logits
move, a retained class matters by how near it lies to a forgotten one, and the rest only as a
picture of the space. `benchmarks/end_to_end/sample_rules.py` measures samples of ImageNet's classes.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from ..errors import ArgumentError

# Of more retained classes than this, a sample is made by default, of so many.
MANY = 4096
DEFAULT_SAMPLE = 1024
# Similarities of classes to the forgotten ones that are held at once.
_TILE = 4 * 1024 * 1024
# The rule in words, for the record.
ALL = "all classes"
RULE = "the forgotten, half of the sample nearest to them by the last layer's weights, half by lot"
RANDOM = "the forgotten, and the sample by lot: the last layer has no weights a class"


def check_retain_sample(value: int | None) -> None:
    """Raises where ``value`` is no sample size.

    Raises:
        ArgumentError: as said.
    """
    if value is not None and (isinstance(value, bool) or not isinstance(value, int) or value < 1):
        raise ArgumentError(
            "retain_sample", f"got {value!r}", "Pass a whole number, 1 or more, or None."
        )


def sample_size(retained: int, asked: int | None) -> int:
    """How many of so many retained classes get impressions; ``asked`` by the user, or None."""
    if asked is None:
        return retained if retained <= MANY else DEFAULT_SAMPLE
    return min(asked, retained)


def sample_classes(
    weight: Tensor | None, forget: Sequence[int], retained: Sequence[int], size: int, seed: int
) -> list[int]:
    """The forgotten classes and ``size`` of the retained ones, sorted.

    Half of them (rounded up) are those whose weights have the highest cosine with those of any
    forgotten class, less the mean of all classes; the others are drawn uniformly.

    Args:
        weight: float [C, ...], the last layer's, a row a class; None draws all uniformly.
        forget, retained: class indices.
        size: at most ``len(retained)``.
        seed: of the uniform draw.
    """
    if size >= len(retained):
        return sorted([*forget, *retained])
    others = torch.tensor(list(retained))
    near = torch.empty(0, dtype=torch.int64)
    if weight is not None:
        count = (size + 1) // 2
        near = others[nearness(weight, forget, others).topk(count).indices]
        others = others[~torch.isin(others, near)]
    generator = torch.Generator().manual_seed(seed)
    lot = others[torch.randperm(len(others), generator=generator)[: size - len(near)]]
    return sorted([*forget, *near.tolist(), *lot.tolist()])


@torch.no_grad()
def nearness(weight: Tensor, forget: Sequence[int], others: Tensor) -> Tensor:
    """The highest cosine of each of ``others`` with a forgotten class, float32 [len(others)].

    Args:
        weight: float [C, ...], a row a class.
        forget: class indices.
        others: int64, class indices.
    """
    flat = weight.detach().flatten(1)
    mean = flat.mean(0, dtype=torch.float32)
    gone = F.normalize(flat[list(forget)].float() - mean).T
    tile = max(1, _TILE // max(gone.shape[1], len(mean)))
    cosines = [
        (F.normalize(flat[part.to(flat.device)].float() - mean) @ gone).amax(1).cpu()
        for part in others.split(tile)
    ]
    return torch.cat(cosines)


def class_weights(model: nn.Module, last: str, classes: int) -> Tensor | None:
    """The weights of the layer called ``last`` if it has a row a class, else None."""
    weight = getattr(dict(model.named_modules())[last], "weight", None)
    fits = isinstance(weight, Tensor) and weight.ndim > 1 and len(weight) == classes
    return weight if fits else None
