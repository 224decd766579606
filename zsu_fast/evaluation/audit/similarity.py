"""How similar two models' features are (linear CKA), and how well a class separates (k-NN)."""

from __future__ import annotations

import torch
from torch import Tensor

# CKA compares at most this many rows: 2,000 are exact to about 0.01.
_MAX_ROWS = 2000


def linear_cka(x: Tensor, y: Tensor) -> float | None:
    """Linear centred kernel alignment of features [N, D] and [N, E], 0..1; None if undefined.

    ``||Y'X||_F^2 / (||X'X||_F ||Y'Y||_F)`` with centred columns (Kornblith et al. 2019,
    1905.00414). It is invariant to rotation, permutation and scaling of the features.
    """
    if len(x) < 3 or len(x) != len(y):
        return None
    x, y = x[:_MAX_ROWS].double(), y[:_MAX_ROWS].double()
    x, y = x - x.mean(0), y - y.mean(0)
    if len(x) < x.shape[1] + y.shape[1]:  # the same from N x N Gram matrices, which are smaller
        a, b = x @ x.T, y @ y.T
        cross, own = (a * b).sum(), a.norm() * b.norm()
    else:
        cross, own = (y.T @ x).square().sum(), (x.T @ x).norm() * (y.T @ y).norm()
    return float(cross / own) if float(own) > 0 else None


def knn_predictions(
    train: Tensor, labels: Tensor, test: Tensor, classes: int, k: int = 10
) -> Tensor:
    """Returns the most frequent class among the ``k`` nearest training rows, int64 [M].

    Args:
        train, labels: features [N, D] and their classes [N].
        test: features [M, D].
        classes: the number of classes.
        k: neighbours by cosine similarity, at most N; ties go to the nearer ones.
    """
    k = min(k, len(train))
    train = torch.nn.functional.normalize(train, dim=1)
    predictions = []
    for part in torch.nn.functional.normalize(test, dim=1).split(1000):
        near, index = (part @ train.T).topk(k, dim=1)
        votes = torch.zeros(len(part), classes)
        votes.scatter_add_(1, labels[index], 1 + 1e-3 * near.float())
        predictions.append(votes.argmax(1))
    return torch.cat(predictions)
