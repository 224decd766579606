"""Measures of outputs: how far apart two models' are, and how well they give training images away.

The right level of membership inference is the golden model's, not 0: a model that was pushed too
far gives its forgotten images away as well (U-LiRA, Hayes et al., 2403.01218).
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

# KL is infinite if one model excludes a class that the other predicts. Probabilities are clamped
# from below to this, so that a single -inf (as in a mask) does not hide everything else.
_MIN_PROBABILITY = 1e-12
MEMBERSHIP_SCORES = ("confidence", "entropy", "loss")


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


def activation_distance(reference: Tensor, logits: Tensor) -> float:
    """Mean L2 distance of the softmaxes, 0..1.414 (Golatkar et al. 2020; 2205.08096)."""
    difference = reference.float().softmax(1) - logits.float().softmax(1)
    return float(difference.norm(dim=1).mean())


def membership_scores(logits: Tensor, labels: Tensor) -> dict[str, Tensor]:
    """The attacker's scores, float32 [N] each, higher for a member (Yeom et al. 2018).

    confidence: the largest probability. entropy: minus the entropy of the softmax, in nats.
    loss: minus the cross-entropy of the true class; -1e4 if its probability is 0.
    """
    log_p = logits.float().log_softmax(1)
    p = log_p.exp()
    entropy = -(p * log_p.masked_fill(p == 0, 0.0)).sum(1)
    log_likelihood = log_p.gather(1, labels[:, None])[:, 0].clamp(min=-1e4)
    return {"confidence": p.amax(1), "entropy": -entropy, "loss": log_likelihood}


def auc(members: Tensor, others: Tensor) -> float:
    """Area under the ROC curve of a score, 0..1; 0.5 is chance. Ties count half."""
    joined = torch.cat([members, others]).double()
    _, index, count = joined.unique(return_inverse=True, return_counts=True)
    end = count.cumsum(0).double()
    rank = (end - (count.double() - 1) / 2)[index]  # mean rank of equal scores, from 1
    n, m = len(members), len(others)
    return float((rank[:n].sum() - n * (n + 1) / 2) / (n * m))


def membership_attack(
    member_logits: Tensor, member_labels: Tensor, other_logits: Tensor, other_labels: Tensor
) -> dict[str, float]:
    """AUC of each score: members (training images) against non-members (held-out images)."""
    inside = membership_scores(member_logits, member_labels)
    outside = membership_scores(other_logits, other_labels)
    return {name: auc(inside[name], outside[name]) for name in MEMBERSHIP_SCORES}
