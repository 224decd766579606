"""How far apart two models' outputs are on the same images."""

from __future__ import annotations

import math

import torch
from torch import Tensor

# KL is infinite if one model excludes a class that the other predicts. Probabilities are clamped
# from below to this, so that a single -inf (as in a mask) does not hide everything else.
_MIN_PROBABILITY = 1e-12


def kl(reference: Tensor, logits: Tensor) -> float:
    """Mean KL(reference || model) of softmaxes, in nats, 0..27.6; both logits [N, C]."""
    p = reference.float().softmax(1)
    log_q = logits.float().log_softmax(1).clamp(min=math.log(_MIN_PROBABILITY))
    log_p = p.clamp(min=_MIN_PROBABILITY).log()
    return float((p * (log_p - log_q)).sum(1).clamp(min=0).mean())


def js(reference: Tensor, logits: Tensor) -> float:
    """Mean Jensen-Shannon divergence, in nats, 0..0.693; symmetric (Lin 1991)."""
    p, q = reference.float().softmax(1), logits.float().softmax(1)
    m = (p + q) / 2

    def half(a: Tensor) -> Tensor:
        return torch.where(a > 0, a * (a.clamp(min=1e-38) / m.clamp(min=1e-38)).log(), 0.0).sum(1)

    return float(((half(p) + half(q)) / 2).clamp(0, math.log(2)).mean())


def activation(reference: Tensor, logits: Tensor) -> float:
    """Mean L2 distance of the softmaxes, 0..1.414 (Golatkar et al. 2020; 2205.08096)."""
    difference = reference.float().softmax(1) - logits.float().softmax(1)
    return float(difference.norm(dim=1).mean())
