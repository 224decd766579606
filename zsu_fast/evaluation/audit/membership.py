"""Membership inference: do the model's outputs tell training images from others?

The right level is the golden model's, not 0: a model that was pushed too far gives its forgotten
images away as well (U-LiRA, Hayes et al., 2403.01218).
"""

from __future__ import annotations

import torch
from torch import Tensor

SCORES = ("confidence", "entropy", "loss")


def scores(logits: Tensor, labels: Tensor) -> dict[str, Tensor]:
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


def attack(
    member_logits: Tensor, member_labels: Tensor, other_logits: Tensor, other_labels: Tensor
) -> dict[str, float]:
    """AUC of each score: members (training images) against non-members (held-out images)."""
    inside, outside = scores(member_logits, member_labels), scores(other_logits, other_labels)
    return {name: auc(inside[name], outside[name]) for name in SCORES}
