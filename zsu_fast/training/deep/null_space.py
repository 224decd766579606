"""What features hold beyond what the retained classes need."""

from __future__ import annotations

import torch
from torch import Tensor

# Singular values below this share of the largest are 0. Features with a smaller standard deviation
# than this share of the mean one, such as dead ones, are scaled as if they had it.
_RANK, _LEAST_SCALE = 1e-4, 0.25


class NullSpace:
    """The null space of the retained classes: directions of the last features along which no
    difference of two retained logits changes.

    Nothing in it is needed once the other classes are forgotten, and much of what a probe reads
    lies there: of CIFAR-10 features of a ResNet-20, a linear probe finds 82 % of {3, 4, 8}, and
    51 % without the null space.

    Args:
        weight: the last layer's rows of retained classes, float32 [R, D].
        features: the original's last features of scenes, float32 [N, D].

    Attributes:
        complement: what is not in it, orthonormal rows [at most R - 1, D].
        share: of the features' variance that is in it.
        scale: [D], the features' standard deviations, or more.
    """

    def __init__(self, weight: Tensor, features: Tensor) -> None:
        _, sizes, rows = torch.linalg.svd(weight - weight.mean(0), full_matrices=False)
        self.complement = rows[sizes > _RANK * sizes[0]]
        centred = features - features.mean(0)
        inside = self.project(centred).square().sum()
        self.share = float(inside / centred.square().sum().clamp(min=1e-12))
        scale = features.std(0)
        self.scale = scale.clamp(min=_LEAST_SCALE * float(scale.square().mean().sqrt()))

    def project(self, features: Tensor) -> Tensor:
        """The part of ``features``, [N, D], in the null space."""
        return features - (features @ self.complement.T) @ self.complement

    def components(self, features: Tensor, scene: Tensor, count: int) -> Tensor:
        """The first principal components of ``features`` in the null space, [N, at most count].

        Args:
            features: float32 [N, D].
            scene: bool [N], the rows that the components are computed from.
            count: how many.
        """
        inside = self.project(features - features[scene].mean(0))
        of_scenes = inside[scene]
        values, vectors = torch.linalg.eigh(of_scenes.T @ of_scenes)
        used = values > len(values) * torch.finfo(values.dtype).eps * values[-1]
        return inside @ vectors[:, used].flip(1)[:, :count]

    def variance(self, centred: Tensor, rows: Tensor) -> tuple[Tensor, Tensor]:
        """Mean variance of features in the null space, in units of the original's features, and its
        gradient.

        Args:
            centred: features less their mean, 0 where they don't count, [N, D].
            rows: the number of those that count, [].
        """
        scaled = self.project(centred) / self.scale
        share = 1 / (rows.clamp(min=1) * centred.shape[1])
        return share * scaled.square().sum(), self.project(2 * share * scaled / self.scale)
