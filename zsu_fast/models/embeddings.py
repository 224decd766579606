"""Where an encoder's output holds the embeddings."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn

from ..errors import ModelError

# Names of items that are embeddings, in transformers' outputs and elsewhere; the first one counts.
_ITEMS = (
    "image_embeds", "pooler_output", "embeddings", "embedding", "image_features", "features",
    "feature", "feats",
)  # fmt: skip
# Methods of dual encoders, of which `forward` takes texts too: transformers, open_clip.
_METHODS = ("get_image_features", "encode_image")


def embed_images(encoder: nn.Module, images: Tensor) -> Any:
    """The encoder's output for ``images``, [N, ...]: the item of it that holds the embeddings.

    Raises:
        ModelError: there is none.
    """
    method = next((m for m in _METHODS if callable(getattr(encoder, m, None))), None)
    output = encoder(images) if method is None else getattr(encoder, method)(images)
    return pick_embedding(output)


def pick_embedding(output: Any) -> Any:
    """Finds the embeddings in an encoder's output; also works on torch.fx proxies while tracing.

    Raises:
        ModelError: there are none.
    """
    if isinstance(output, Tensor | torch.fx.Proxy):
        return output
    for name in _ITEMS:
        item = output.get(name) if isinstance(output, Mapping) else getattr(output, name, None)
        if isinstance(item, Tensor | torch.fx.Proxy):
            return item
    values = list(output.values()) if isinstance(output, Mapping) else output
    if isinstance(values, tuple | list) and values:
        alone = len(values) == 1 or not isinstance(output, Mapping)
        if alone and isinstance(values[0], Tensor | torch.fx.Proxy):
            return values[0]
    keys = f" with keys {sorted(map(str, output))}" if isinstance(output, Mapping) else ""
    raise ModelError(
        f"its encoder returns a {type(output).__name__}{keys}, in which no embeddings were found",
        f"Return a tensor [N, D], a tuple that starts with it, or a dict or object with one of "
        f"{', '.join(_ITEMS)}.",
    )
