"""Measures of features: drift, linear CKA, k-NN, the linear probe, and the adapted last layer.

A probe that recovers a class shows that the features still hold it. A model that never saw the
class separates it too, so the level to compare with is the golden model's, not 0 ("An Illusion of
Unlearning?", 2604.08271).
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor
from torch.nn import functional as F

# CKA compares at most this many rows: 2,000 are exact to about 0.01.
_MAX_ROWS = 2000
# Weight decay of the probe, for standardised features. Chosen on training images of CIFAR-10
# (1e-4 overfits 10,000 rows of 320 features, 1e-2 underfits).
_WEIGHT_DECAY = 1e-3
# Iterations of L-BFGS, and multiply-adds in all: expensive iterations are fewer, but at least 8.
_MAX_ITERATIONS, _MAX_MULTIPLY_ADDS = 30, 1e12
# Ridge penalty of the adapted last layer, per row and relative to the features' mean variance.
_RIDGE = 0.1


def feature_drift(new: Tensor, old: Tensor) -> float | None:
    """Mean squared distance of features, both [N, D], over the original's variance.

    0: the same features. About 2: as far apart as two unrelated images. None: the shapes differ or
    there are no rows.
    """
    if new.shape != old.shape or not len(old):
        return None
    variance = (old - old.mean(0)).square().sum()
    return float((new - old).square().sum() / variance.clamp(min=1e-30))


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
    train = F.normalize(train, dim=1)
    predictions = []
    for part in F.normalize(test, dim=1).split(1000):
        near, index = (part @ train.T).topk(k, dim=1)
        votes = torch.zeros(len(part), classes)
        votes.scatter_add_(1, labels[index], 1 + 1e-3 * near.float())
        predictions.append(votes.argmax(1))
    return torch.cat(predictions)


def probe_predictions(train: Tensor, labels: Tensor, test: Tensor, classes: int) -> Tensor:
    """Fits a linear classifier of all classes on ``train``; returns its predictions, int64 [M].

    Multinomial logistic regression on standardised features with weight decay, by L-BFGS from zero.
    Deterministic, and the same for every model.

    Args:
        train, labels, test, classes: as for `knn_predictions`.
    """
    return _probe_logits(train, labels, test, classes, F.cross_entropy).argmax(1)


def multi_label_probe(train: Tensor, labels: Tensor, test: Tensor) -> Tensor:
    """The same with one sigmoid per class: labels bool [N, C] -> logits, float32 [M, C]."""
    classes, loss = labels.shape[1], F.binary_cross_entropy_with_logits
    return _probe_logits(train, labels.float(), test, classes, loss)


def _probe_logits(
    train: Tensor, labels: Tensor, test: Tensor, classes: int, criterion: Callable[..., Tensor]
) -> Tensor:
    mean, std = train.mean(0), train.std(0).clamp(min=1e-6)
    train, test = (train - mean) / std, (test - mean) / std
    weight = torch.zeros(train.shape[1], classes, requires_grad=True)
    bias = torch.zeros(classes, requires_grad=True)
    per_iteration = 3 * train.numel() * classes
    iterations = int(min(_MAX_ITERATIONS, max(8, _MAX_MULTIPLY_ADDS / per_iteration)))
    optimiser = torch.optim.LBFGS(
        [weight, bias], max_iter=iterations, history_size=10, line_search_fn="strong_wolfe"
    )

    def loss() -> Tensor:
        optimiser.zero_grad()
        value = criterion(train @ weight + bias, labels)
        value = value + _WEIGHT_DECAY * weight.square().sum()
        value.backward()
        return value

    with torch.enable_grad():
        optimiser.step(loss)
    return (test @ weight + bias).detach()


def adapted_predictions(train: Tensor, logits: Tensor, test: Tensor, weight: Tensor) -> Tensor:
    """The class with the largest of `adapted_logits`, int64 [M]."""
    return adapted_logits(train, logits, test, weight).argmax(1)


def adapted_logits(train: Tensor, logits: Tensor, test: Tensor, weight: Tensor) -> Tensor:
    """Re-fits a linear layer on other features by ridge regression; returns its outputs.

    Minimises ``||F W'^T + b' - Z||^2 + r ||W' - W||^2`` over ``W'`` and ``b'`` in closed form and
    float64. The bias is free (columns are centred), and ``r`` is 0.1 N times the mean variance of
    the features.

    Args:
        train: float [N, D], the features ``F`` to fit on.
        logits: float [N, C], the targets ``Z``: the layer's outputs before the features changed.
        test: float [M, D], the features to predict for.
        weight: float [C, D], the layer's weights ``W``.

    Returns:
        float64 [M, C], the logits ``test @ W'^T + b'``.
    """
    mean, weight = train.mean(0, dtype=torch.float64), weight.double()
    train, test, logits = train - mean, test - mean, logits.double()
    residual = logits - logits.mean(0) - train @ weight.T
    gram = train @ train.T  # N x N; the D x D form gives the same
    penalty = _RIDGE * float(gram.trace()) / train.shape[1]
    gram.diagonal().add_(max(penalty, 1e-30))
    change = residual.T @ torch.linalg.solve(gram, train)
    adapted: Tensor = test @ (weight + change).T + logits.mean(0)
    return adapted


def mean_over_positions(features: Tensor, channels: int) -> Tensor:
    """Averages flattened feature maps [N, channels * positions] to [N, channels].

    Features of another width are returned as they are.
    """
    if features.shape[1] > channels and features.shape[1] % channels == 0:
        return features.reshape(len(features), channels, -1).mean(2)
    return features


def split_in_half(labels: Tensor) -> tuple[Tensor, Tensor]:
    """Returns two bool [N] masks: every second image of each class, and the others."""
    order = labels.argsort(stable=True)
    number = torch.empty_like(labels)
    start = 0
    for count in torch.bincount(labels).tolist():
        number[order[start : start + count]] = torch.arange(count)
        start += count
    return number % 2 == 0, number % 2 == 1
