"""The linear probe: what a new last layer, trained on true labels, reads from frozen features.

It is the standard question after "did the outputs forget?": if a probe recovers a class, the
features still hold it. A model that never saw a class separates it too, so the level to compare
with is the golden model's, not 0 ("An Illusion of Unlearning?", 2604.08271).
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional as F

# Weight decay of the probe, for standardised features. Chosen on training images of CIFAR-10
# (1e-4 overfits 10,000 rows of 320 features, 1e-2 underfits).
_WEIGHT_DECAY = 1e-3
# Iterations of L-BFGS, and multiply-adds in all: expensive iterations are fewer, but at least 8.
_MAX_ITERATIONS, _MAX_MULTIPLY_ADDS = 30, 1e12


def probe_predictions(train: Tensor, labels: Tensor, test: Tensor, classes: int) -> Tensor:
    """Fits a linear classifier of all classes on ``train`` and returns its predictions on ``test``.

    Multinomial logistic regression on standardised features with weight decay 1e-3, at most 30
    iterations of L-BFGS from zero. Deterministic, and the same for every model.

    Args:
        train, labels: features [N, D] and true classes [N].
        test: features [M, D].
        classes: the number of classes.

    Returns:
        int64 [M].
    """
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
        value = F.cross_entropy(train @ weight + bias, labels)
        value = value + _WEIGHT_DECAY * weight.square().sum()
        value.backward()
        return value

    with torch.enable_grad():
        optimiser.step(loss)
    return (test @ weight + bias).detach().argmax(1)


def split_in_half(labels: Tensor) -> tuple[Tensor, Tensor]:
    """Returns two bool [N] masks: every second image of each class, and the others.

    Divides one set of images where a test needs rows to learn from and rows to measure on.
    """
    order = labels.argsort(stable=True)
    number = torch.empty_like(labels)
    start = 0
    for count in torch.bincount(labels).tolist():
        number[order[start : start + count]] = torch.arange(count)
        start += count
    return number % 2 == 0, number % 2 == 1
