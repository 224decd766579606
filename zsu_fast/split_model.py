"""The public `split`: a model in two parts, without unlearning anything."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import nn

from .models.outputs import OutputChoice
from .models.prepare import prepare_model
from .runtime.torch_settings import torch_defaults
from .splitting.split import Split, find_split
from .synthesis.impressions import ClassImpressions
from .synthesis.synthesize import synthesize


@torch_defaults()
def split(
    model: nn.Module,
    at: str | int = "auto",
    *,
    impressions: ClassImpressions | None = None,
    input_shape: Sequence[int] | None = None,
    output: OutputChoice | None = None,
    seed: int = 0,
    device: str | torch.device | None = None,
) -> Split:
    """Splits a copy of ``model`` into backbone and tail: ``tail(*backbone(x)) == model(x)``.

    Args:
        model: an image classifier; it is not changed.
        at: "auto" (the first responsive layer), "last", a module's name, or a number of layers.
        impressions: used to find the responsive layer; None synthesises a few.
        input_shape: (channels, height, width); None: see `resolve_spec`.
        output: which item of the model's output holds the logits, as for `ZeroShotUnlearner`.
        seed: of the impressions.
        device: where to compute; None: where the model is.

    Raises:
        ArgumentError: there is no such module, or nothing after it can be trained.
    """
    prepared = prepare_model(model, device, input_shape, output=output)
    spec, where = prepared.spec, prepared.device
    if at == "auto" and impressions is None:
        impressions = synthesize(
            model, per_class=8, input_shape=spec.shape, output=output, seed=seed, device=where,
            progress=False,
        )  # fmt: skip
    if impressions is None:
        grey = torch.full((4, *spec.shape), 128, dtype=torch.uint8)
        images, labels = spec.normalise(grey), torch.arange(4) % prepared.classes
    else:
        images, labels = impressions.images, impressions.labels
    return find_split(prepared.model, at, images.to(where), labels.to(where))
