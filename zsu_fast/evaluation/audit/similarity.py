"""How alike two models' features are (linear CKA), and how separable a class is in them (k-NN)."""

from __future__ import annotations

import torch
from torch import Tensor

# Rows that a comparison is made on at most: CKA of 2,000 rows is exact to about 0.01.
_MOST = 2000


def linear_cka(x: Tensor, y: Tensor) -> float | None:
    """Linear centred kernel alignment of features [N, D] and [N, E], 0..1; None if undefined.

    ``||Y'X||_F^2 / (||X'X||_F ||Y'Y||_F)`` with centred columns (Kornblith et al. 2019,
    1905.00414). It does not change under rotation, permutation or scaling of features.
    """
    if len(x) < 3 or len(x) != len(y):
        return None
    x, y = x[:_MOST].double(), y[:_MOST].double()
    x, y = x - x.mean(0), y - y.mean(0)
    if len(x) < x.shape[1] + y.shape[1]:  # the same by N x N Gram matrices, which are smaller
        a, b = x @ x.T, y @ y.T
        cross, own = (a * b).sum(), a.norm() * b.norm()
    else:
        cross, own = (y.T @ x).square().sum(), (x.T @ x).norm() * (y.T @ y).norm()
    return float(cross / own) if float(own) > 0 else None


def knn_answers(train: Tensor, labels: Tensor, test: Tensor, classes: int, k: int = 10) -> Tensor:
    """int64 [M]: the class that most of the ``k`` nearest training rows have, by cosine.

    Args:
        train, labels: features [N, D] and their classes [N].
        test: features [M, D].
        classes: number of classes.
        k: neighbours, fewer if there are not so many rows; ties go to the nearer ones.
    """
    k = min(k, len(train))
    train = torch.nn.functional.normalize(train, dim=1)
    answers = []
    for part in torch.nn.functional.normalize(test, dim=1).split(1000):
        near, at = (part @ train.T).topk(k, dim=1)
        votes = torch.zeros(len(part), classes)
        votes.scatter_add_(1, labels[at], 1 + 1e-3 * near.float())
        answers.append(votes.argmax(1))
    return torch.cat(answers)
