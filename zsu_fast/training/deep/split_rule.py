"""Where deep forgetting splits a model."""

from __future__ import annotations

import torch
from torch import Tensor

from ...errors import ArgumentError
from ...models.wrapper import LogitsModel
from ...splitting.layers import layer_names
from ...splitting.split import Split, find_split

# Share of the layers with weights that is trained beside the last one. Features of small images are
# preserved on many scenes, those of large images on few.
_SHARE, _SHARE_OF_LARGE = 0.3, 0.1
_LARGE = 3 * 64 * 64  # an image of more values than this is large


def find_deep_split(model: LogitsModel, at: str | int, images: Tensor) -> Split:
    """Splits ``model`` before its last layers.

    "auto" trains three in ten of the layers with weights beside the last one, or one in ten for
    large images; at least one.

    Args:
        model: from `working_copy`.
        at: "auto", or the module at which the tail starts.
        images: some valid images, [N, ...].

    Raises:
        ArgumentError: nothing but the last layer would be trained.
    """
    names = layer_names(model.module, images[:4])
    if at == "auto":
        share = _SHARE if images[0].numel() <= _LARGE else _SHARE_OF_LARGE
        start = len(names) - 1 - max(1, round(share * len(names)))
        if start < 0:
            raise ArgumentError(
                "depth",
                "got 'deep', and the model has a single layer with weights: no features",
                "Pass depth='output'.",
            )
        at, reason = names[start], f"deep: {len(names) - start} of {len(names)} layers"
    else:
        reason = "named by the caller"
    split = find_split(model, at, images, torch.zeros(len(images), dtype=torch.int64))
    if split.output_level:
        raise ArgumentError(
            "tail",
            f"got {at!r} with depth='deep', and only the last layer follows it",
            f"Name an earlier module, such as {names[max(0, len(names) - 2)]!r}, or leave it out.",
        )
    split.reason = reason
    return split
