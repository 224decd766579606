"""Finds the dimension of a tensor that counts images, from two batch sizes.

The backbone's features are cached, mixed and drawn row by row, so that each tensor has to be
[N, ...] with row i of image i. Boundary tensors, which pass from the backbone to the tail, may
differ: a sequence-first transformer has [T, N, C], window attention has [N * windows, T, C].
A `BatchDim` brings such a tensor to [N, ...] and back.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

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

    def shape(self, example: Tensor, batch: int) -> tuple[int, ...]:
        """The shape of ``example``, in the model's layout, for ``batch`` images."""
        sizes = list(example.shape)
        sizes[self.dim] = batch * self.per_image
        return tuple(sizes)


def infer_batch_dim(two: Tensor, three: Tensor) -> BatchDim | None:
    """Compares a tensor's values for two and for three images; None if no dimension counts them."""
    if two.ndim != three.ndim:
        return None
    differing = [d for d in range(two.ndim) if two.shape[d] != three.shape[d]]
    if len(differing) != 1:
        return None
    dim = differing[0]
    per_image, remainder = divmod(two.shape[dim], 2)
    if remainder or per_image == 0 or three.shape[dim] != 3 * per_image:
        return None
    return BatchDim(dim, per_image)


@dataclass(frozen=True)
class BatchMultiple:
    """An integer that is ``times`` the batch size."""

    times: int


class NotBatchLinear(Exception):
    """A value depends on the batch, and is no multiple of its size."""


def infer_value(two: Any, three: Any) -> Any:
    """A value other than a tensor, with a `BatchMultiple` in place of what counts images.

    Args:
        two, three: the value for two and for three images.

    Raises:
        NotBatchLinear: it depends on the batch in another way.
    """
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


def two_batches(images: Tensor) -> tuple[Tensor, Tensor]:
    """Two images and three others, which show what depends on their number and content."""
    shape = images.shape[1:]
    return images[:1].expand(2, *shape), (0.9 * images[-1:]).expand(3, *shape)
