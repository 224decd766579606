"""The linear probe: what a fresh last layer, trained on true labels, gets out of frozen features.

The standard question after "are the outputs gone?": a model whose probe recovers a class still
holds it. A model that never saw a class separates it too, so the level to compare with is the
golden model's, not 0 ("An Illusion of Unlearning?", 2604.08271).
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional as F

# Weight decay of the probe, for standardised features. Chosen on training images of CIFAR-10
# (1e-4 overfits 10,000 rows of 320 features, 1e-2 underfits).
_DECAY = 1e-3
# L-BFGS iterations, fewer where one iteration is expensive: so many multiply-adds in all.
_ITERATIONS, _WORK = 30, 1e12


def probe_answers(train: Tensor, labels: Tensor, test: Tensor, classes: int) -> Tensor:
    """int64 [M]: what a linear classifier of all classes, fitted on ``train``, says of ``test``.

    Multinomial logistic regression on standardised features with weight decay 1e-3, at most 30
    iterations of L-BFGS from zero; the same for every subject, and deterministic.

    Args:
        train, labels: features [N, D] and true classes [N].
        test: features [M, D].
        classes: number of classes.
    """
    mean, std = train.mean(0), train.std(0).clamp(min=1e-6)
    train, test = (train - mean) / std, (test - mean) / std
    weight = torch.zeros(train.shape[1], classes, requires_grad=True)
    bias = torch.zeros(classes, requires_grad=True)
    work = 3 * train.numel() * classes
    iterations = int(min(_ITERATIONS, max(8, _WORK / work)))
    optimiser = torch.optim.LBFGS(
        [weight, bias], max_iter=iterations, history_size=10, line_search_fn="strong_wolfe"
    )

    def loss() -> Tensor:
        optimiser.zero_grad()
        value = F.cross_entropy(train @ weight + bias, labels)
        value = value + _DECAY * weight.square().sum()
        value.backward()
        return value

    with torch.enable_grad():
        optimiser.step(loss)
    return (test @ weight + bias).detach().argmax(1)


def halves(labels: Tensor) -> tuple[Tensor, Tensor]:
    """bool [N] twice: every second image of each class, and the others.

    How one set of images is divided where a test needs rows to learn from and rows to measure on.
    """
    order = labels.argsort(stable=True)
    number = torch.empty_like(labels)
    start = 0
    for count in torch.bincount(labels).tolist():
        number[order[start : start + count]] = torch.arange(count)
        start += count
    return number % 2 == 0, number % 2 == 1
