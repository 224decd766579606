"""Forget classes without data: the whole algorithm in plain PyTorch, in little over 100 lines.

``unlearn`` below does what ``zsu_fast.unlearn(..., depth="output", space="input")`` does where the
last layer alone is trained, with nothing but torch. The package adds other splits, deep forgetting
(its default), faster kernels, and retries for impressions and learning rates that fail. Runs on a
CPU.

Run as a script, it takes about 5 seconds and prints the accuracy of LeNet5 on 2,000 MNIST test
images, before and after it forgets the digits 1 to 4::

    original: FA 99.88 % of 800 images of the forgotten classes, RA 98.67 % of 1200 others, ...
    unlearned: FA 0.00 % of 800 images of the forgotten classes, RA 99.58 % of 1200 others, ...
"""

from __future__ import annotations

import copy
import math
from collections.abc import Sequence

import torch
from torch import Tensor, nn
from torch.nn import functional as F


def unlearn(
    model: nn.Module,
    forget: Sequence[int],
    *,
    mean: Sequence[float],
    std: Sequence[float],
    shape: Sequence[int],
    seed: int = 0,
    per_class: int = 32,
) -> nn.Module:
    """Returns a copy of ``model`` that no longer predicts the classes ``forget``.

    Args:
        model: image classifier; its last ``nn.Linear`` returns the logits.
        forget: class indices.
        mean, std: normalisation of each channel, for pixels in 0..1.
        shape: of one image, (channels, height, width).
        seed: of everything random.
        per_class: impressions per class, at least 4.
    """
    generator = torch.Generator().manual_seed(seed)
    frozen = copy.deepcopy(model).eval().requires_grad_(False)
    last = [name for name, module in model.named_modules() if isinstance(module, nn.Linear)][-1]
    classifier = frozen.get_submodule(last)
    assert isinstance(classifier, nn.Linear)

    # 1. Synthesise impressions: images that the model assigns to a class, all in one batch.
    labels = torch.arange(classifier.out_features).repeat_interleave(per_class)
    black, white = (
        ((pixel - torch.tensor(mean)) / torch.tensor(std)).view(-1, 1, 1) for pixel in (0.0, 1.0)
    )
    noise = torch.randn(len(labels), *shape, generator=generator)
    images = ((black + white) / 2 + 0.1 * (white - black) * noise).clamp(black, white)
    target = torch.empty(len(labels)).uniform_(0.55, 0.99, generator=generator)
    images = ascend(frozen, images, labels, target, black, white)

    # 2. Split the model at its last layer. The backbone is frozen: evaluate it once.
    backbone = copy.deepcopy(frozen)
    backbone.set_submodule(last, nn.Identity())
    features = torch.cat([backbone(batch) for batch in images.split(256)])

    # 3. Fit the forgotten rows of the last layer; one impression in four decides when to stop.
    rows = torch.tensor(sorted(set(forget)))
    weight, bias = fit(classifier, features, labels, rows, generator)
    result = copy.deepcopy(model)
    with torch.no_grad():
        result.get_submodule(last).weight[rows] = weight
        result.get_submodule(last).bias[rows] = bias
    return result


def ascend(
    model: nn.Module, x: Tensor, label: Tensor, target: Tensor, black: Tensor, white: Tensor
) -> Tensor:
    """Adam ascent on ``logit_label(x) - beta * ||x||^2`` over valid images.

    Each row stops at its own ``target`` confidence and leaves the batch: at a confidence of 1 the
    gradient of the cross-entropy vanishes, and the impression would teach nothing.
    """
    beta, rate, steps = 1e-4, 0.01 * (white - black).mean(), 100
    images, row = x.clone(), torch.arange(len(x))
    exp_avg, exp_avg_sq = torch.zeros_like(x), torch.zeros_like(x)
    for step in range(1, steps + 1):
        logits = model(x.requires_grad_())
        goal = logits.gather(1, label[:, None]).sum() - beta * x.square().sum()
        (grad,) = torch.autograd.grad(goal, x)
        x = x.detach()

        confidence, prediction = logits.detach().softmax(1).max(1)
        going = (prediction != label) | (confidence < target)
        if not bool(going.all()):
            images[row[~going]] = x[~going]
            x, grad, exp_avg, exp_avg_sq = x[going], grad[going], exp_avg[going], exp_avg_sq[going]
            row, label, target = row[going], label[going], target[going]
        if not len(row):
            break

        exp_avg.lerp_(grad, 0.1)
        exp_avg_sq.lerp_(grad.square(), 0.001)
        denominator = (exp_avg_sq / (1 - 0.999**step)).sqrt() + 1e-8
        x = (x + rate * exp_avg / (1 - 0.9**step) / denominator).clamp(black, white)
    images[row] = x  # rows that missed their target in time
    return images


def mixtures(x: Tensor, label: Tensor, forget: Tensor, generator: torch.Generator) -> Tensor:
    """Features between impressions and further out, where real images lie; 2,048 or more.

    Half of the pairs have a forgotten class on their first side. A pair is mixed at random and
    moved to 0.5 to 4 times its distance from the mean feature.
    """
    count = max(2048, 4 * len(x))
    forgotten = torch.isin(label, forget).nonzero()[:, 0]
    first = torch.randint(len(x), (count,), generator=generator)
    first[1::2] = forgotten[torch.randint(len(forgotten), (count // 2,), generator=generator)]
    second = torch.randint(len(x), (count,), generator=generator)
    weight = torch.rand(count, 1, generator=generator)
    scale = 0.5 * 8 ** torch.rand(count, 1, generator=generator)
    mixed = x.mean(0) + scale * (torch.lerp(x[second], x[first], weight) - x.mean(0))
    return mixed.clamp(min=0) if bool((x >= 0).all()) else mixed  # after a ReLU


def fit(
    classifier: nn.Linear, x: Tensor, label: Tensor, forget: Tensor, generator: torch.Generator
) -> tuple[Tensor, Tensor]:
    """New weights and biases of the classes ``forget``, [F, D] and [F].

    Minimises the KL divergence from the original model without the forgotten classes, whose
    logits carry a margin, so that they end up lower still. The other logits stay as they are.
    """
    weight, bias = (p[forget].clone().requires_grad_() for p in classifier.parameters())
    held_out = torch.arange(len(x)) % 4 == 3
    original = classifier(x[~held_out])
    others = original.scatter(1, label[~held_out, None], -torch.inf).amax(1)
    lead = original.gather(1, label[~held_out, None])[:, 0] - others
    margin = 4 * math.log10(max(10, original.shape[1])) * lead.mean().clamp(min=0)

    def rows(part: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Features, the original logits, and the probabilities to match."""
        features = torch.cat([x[part], mixtures(x[part], label[part], forget, generator)])
        logits = classifier(features)
        return features, logits, logits.index_fill(1, forget, -torch.inf).softmax(1)

    def divergence(features: Tensor, logits: Tensor, wanted: Tensor) -> Tensor:
        lowered = F.linear(features, weight, bias) + margin
        log_p = logits.index_copy(1, forget, lowered).log_softmax(1)
        return F.kl_div(log_p, wanted, reduction="batchmean")

    train, validation = rows(~held_out), rows(held_out)
    steps, rate = 400, 0.02 * float(classifier.weight.square().mean().sqrt())
    optimizer = torch.optim.AdamW(
        [{"params": [weight], "lr": rate}, {"params": [bias], "lr": 0.05 * float(train[1].std())}],
        weight_decay=0.0,
    )
    scheduler = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, steps)
    best, best_state, stale = math.inf, (weight.detach().clone(), bias.detach().clone()), 0
    for step in range(1, steps + 1):
        batch = torch.randint(len(train[0]), (512,), generator=generator)
        loss = divergence(*(column[batch] for column in train))
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        scheduler.step()
        if step % 10 == 0:
            stale += 1
            with torch.no_grad():
                score = float(divergence(*validation))
            if score < 0.99 * best:  # False for NaN: a fit that diverges ends at its best state
                best, best_state, stale = score, (weight.detach().clone(), bias.detach().clone()), 0
            if stale == 8:
                break
    return best_state


if __name__ == "__main__":
    import zsu_fast
    from zsu_fast.cli.demo import mnist_test
    from zsu_fast.models import zoo

    lenet, digits = zoo.load("lenet5"), mnist_test()
    spec = zoo.ZOO["lenet5"].spec
    unlearned = unlearn(lenet, [1, 2, 3, 4], mean=spec.mean, std=spec.std, shape=spec.shape)
    print("original:", zsu_fast.evaluate(lenet, digits, [1, 2, 3, 4]))
    print("unlearned:", zsu_fast.evaluate(unlearned, digits, [1, 2, 3, 4]))
