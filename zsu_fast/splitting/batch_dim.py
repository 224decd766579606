"""Finds the dimension of a tensor that counts images, from two batch sizes.

The backbone's features are cached, mixed and drawn row by row, so that each tensor has to be
[N, ...] with row i of image i. Boundary tensors, which pass from the backbone to the tail, may
differ: a sequence-first transformer has [T, N, C], window attention has [N * windows, T, C].
A `BatchDim` brings such a tensor to [N, ...] and back.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

# What passes from the backbone to the tail.
BoundaryTensors = tuple[Tensor, ...]


@dataclass(frozen=True)
class BatchDim:
    """Dimension ``dim`` counts images, with ``per_image`` consecutive entries for each."""

    dim: int
    per_image: int

    @property
    def plain(self) -> bool:
        """Whether the tensor already is [N, ...]."""
        return self.dim == 0 and self.per_image == 1

    def pack(self, tensor: Tensor) -> Tensor:
        """The model's layout -> [N, ...]."""
        rows = tensor.movedim(self.dim, 0)
        return rows if self.per_image == 1 else rows.unflatten(0, (-1, self.per_image))

    def unpack(self, rows: Tensor) -> Tensor:
        """[N, ...] -> the model's layout."""
        tensor = rows if self.per_image == 1 else rows.flatten(0, 1)
        return tensor.movedim(0, self.dim)


def infer_batch_dim(two: Tensor, three: Tensor) -> BatchDim | None:
    """Compares a tensor's values for two and for three images; None if no dimension counts them."""
    sizes = list(zip(two.shape, three.shape, strict=False))
    differing = [dim for dim, (a, b) in enumerate(sizes) if a != b]
    if two.ndim != three.ndim or len(differing) != 1:
        return None
    (dim,) = differing
    per_image = three.shape[dim] - two.shape[dim]
    return BatchDim(dim, per_image) if per_image > 0 and two.shape[dim] == 2 * per_image else None


@dataclass(frozen=True)
class BatchMultiple:
    """An integer that is ``times`` the batch size."""

    times: int


class NotBatchLinear(Exception):
    """A value depends on the batch, and is no multiple of its size."""


def infer_value(two: Any, three: Any) -> Any:
    """What a tail is given for a value: it, with a `BatchMultiple` for each count of images.

    Args:
        two, three: the value for two and for three images; a tensor must be the same for both.

    Raises:
        NotBatchLinear: it depends on the batch in another way.
    """
    if isinstance(two, Tensor) and isinstance(three, Tensor) and equal_constants(two, three):
        return two.detach()
    if isinstance(two, tuple | list) and isinstance(three, tuple | list):
        if len(two) != len(three) or any(isinstance(v, Tensor) for v in (*two, *three)):
            raise NotBatchLinear
        values = [infer_value(a, b) for a, b in zip(two, three, strict=True)]
        return values if isinstance(two, list) else tuple(values)
    if isinstance(two, Tensor) or isinstance(three, Tensor):
        raise NotBatchLinear
    if two == three:
        return two
    integers = all(isinstance(v, int) and not isinstance(v, bool) for v in (two, three))
    if integers and two % 2 == 0 and two and 3 * two == 2 * three:
        return BatchMultiple(two // 2)
    raise NotBatchLinear


def equal_constants(two: Tensor, three: Tensor) -> bool:
    return two.shape == three.shape and torch.equal(two, three)


def two_batches(images: Tensor) -> tuple[Tensor, Tensor]:
    """Two images and three others, which show what depends on their number and content."""
    shape = images.shape[1:]
    return images[:1].expand(2, *shape), (0.9 * images[-1:]).expand(3, *shape)
