"""Chooses the classes to synthesise: of very many, the forgotten and a sample of the retained ones.

Impressions of 100,000 classes would take a day and help little: where only the forgotten logits
move, a retained class matters if it lies near a forgotten one, and the others only as a sample of
the space. `benchmarks/end_to_end/sample_rules.py` compares rules on ImageNet's classes.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from ..errors import check_int
from ..models.input_spec import InputSpec, noise_images
from ..models.wrapper import LogitsModel
from ..splitting.layers import layer_names

MANY = 4096
DEFAULT_SAMPLE = 1024
# Cosines that are held in memory at once.
TILE_VALUES = 4 * 1024 * 1024
# The rules in words, for the record.
ALL = "all classes"
NEAREST = (
    "the forgotten, half of the sample nearest to them by the last layer's weights, half at random"
)
RANDOM = "the forgotten, and the sample at random: the last layer has no weights per class"


def classes_to_synthesise(
    model: LogitsModel,
    spec: InputSpec,
    classes: int,
    forget: Sequence[int],
    forgotten: Sequence[int],
    retain_sample: int | None,
    seed: int,
) -> tuple[list[int], str]:
    """The classes that get impressions, sorted, and the rule that chose them, in words.

    Args:
        model, spec, classes: from `working_copy`, of its images, and how many it has.
        forget: class indices; all of them get impressions.
        forgotten: class indices that earlier calls have forgotten; none of them does.
        retain_sample: how many of the other classes get impressions; see `sample_size`.
        seed: of the random part of the sample.

    Raises:
        ArgumentError: ``retain_sample`` is not a positive integer.
    """
    check_int("retain_sample", retain_sample, optional=True)
    retained = sorted({*range(classes)} - {*forget, *forgotten})
    size = sample_size(len(retained), retain_sample)
    if size == len(retained):
        return sorted([*forget, *retained]), ALL
    device = next(model.parameters()).device
    last = layer_names(model.module, noise_images(spec, 2).to(device))[-1]
    weight = class_weights(model.module, last, classes)
    chosen = sample_classes(weight, forget, retained, size, seed)
    return chosen, RANDOM if weight is None else NEAREST


def sample_size(retained: int, requested: int | None) -> int:
    """How many of ``retained`` classes get impressions: ``requested``, or, if that is None, all of
    them, or `DEFAULT_SAMPLE` of more than `MANY`.
    """
    if requested is None:
        return retained if retained <= MANY else DEFAULT_SAMPLE
    return min(requested, retained)


def sample_classes(
    weight: Tensor | None, forget: Sequence[int], retained: Sequence[int], size: int, seed: int
) -> list[int]:
    """The forgotten classes and ``size`` of the retained ones, sorted.

    Half of them (rounded up) are those whose weights have the highest cosine with those of any
    forgotten class, after subtraction of the mean over all classes; the others are drawn uniformly.

    Args:
        weight: float [C, ...], the last layer's, a row per class; None draws all uniformly.
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
    random = others[torch.randperm(len(others), generator=generator)[: size - len(near)]]
    return sorted([*forget, *near.tolist(), *random.tolist()])


@torch.no_grad()
def nearness(
    weight: Tensor, forget: Sequence[int], others: Tensor, tile_values: int = TILE_VALUES
) -> Tensor:
    """The highest cosine of each of ``others`` with a forgotten class, float32 [len(others)].

    Args:
        weight: float [C, ...], a row per class.
        forget, others: class indices; ``others`` int64.
        tile_values: at most this many cosines, or weights, are held at once.
    """
    flat = weight.detach().flatten(1)
    mean = flat.mean(0, dtype=torch.float32)
    forgotten = F.normalize(flat[list(forget)].float() - mean).T
    tile = max(1, tile_values // max(forgotten.shape[1], len(mean)))
    cosines = [
        (F.normalize(flat[part.to(flat.device)].float() - mean) @ forgotten).amax(1).cpu()
        for part in others.split(tile)
    ]
    return torch.cat(cosines)


def class_weights(model: nn.Module, last: str, classes: int) -> Tensor | None:
    """The weights of the layer called ``last`` if it has a row per class, else None."""
    weight = getattr(dict(model.named_modules())[last], "weight", None)
    fits = isinstance(weight, Tensor) and weight.ndim > 1 and len(weight) == classes
    return weight if fits else None
