"""The loss of deep forgetting for identities that are to become strangers.

A class that is forgotten makes room for the others: its images go to the classes they resemble. A
person's must not, as that would accuse someone else. So the softmax gets one more logit, that of a
stranger, at the threshold above which a similarity is accepted.
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional as F

from ..features import FeatureSet
from .losses import DeepObjective
from .settings import DeepSettings
from .tail import FrozenClassifierTail

ACCEPTED_AT = 1e-2  # the false accept rate of the threshold that results are compared with
_MOST_SCORES = 2**22  # impostor scores that a quantile is taken of


@torch.no_grad()
def acceptance_threshold(
    logits: Tensor, label: Tensor, forget: Tensor, false_accepts: float
) -> float:
    """The logit that this share of impostor scores exceeds, among retained identities.

    An impostor score is the logit of a row for an identity that is not its own.

    Args:
        logits: the original's, float32 [N, C].
        label: int64 [N], whom each row shows; rows of forgotten identities do not count.
        forget: bool [C].
        false_accepts: the rate, such as 1e-2.
    """
    rows = ~forget[label]
    own = F.one_hot(label[rows], len(forget)).bool()
    scores = logits[rows][~own & ~forget]
    scores = scores[:: max(1, len(scores) // _MOST_SCORES)]
    rank = max(1, round(false_accepts * len(scores)))
    return float(scores.topk(rank).values[-1])


class StrangerObjective(DeepObjective):
    """`DeepObjective` in which forgotten identities become strangers.

    The teacher's softmax has one more entry, the threshold t. The probability of the forgotten
    identities, p_f, moves there, instead of to the others::

        KL([p_r, 0, p_t + p_f] || softmax([z'_r + m p_f, z'_f + m p_f + margin, t]))

    With m, the logits of a stranger are to stay that far below t. Similarities are compared with a
    threshold, so that the retained logits keep their absolute values, not only their differences.

    Args:
        tail, rows, forget, margin, settings: as for `DeepObjective`; m is ``stranger_margin``.
        threshold: t, in logits.
        accept_from: the logit from which an identity is accepted. It is higher than t: in training
            a stranger is to be like any other one, not just below acceptance.
    """

    copies_teacher = True

    def __init__(
        self,
        tail: FrozenClassifierTail,
        rows: FeatureSet,
        forget: Tensor,
        margin: float,
        settings: DeepSettings,
        threshold: float,
        accept_from: float,
    ) -> None:
        super().__init__(tail, rows, forget, margin, settings)
        self.threshold, self.accept_from = threshold, accept_from

    def accepted(self, logits: Tensor) -> Tensor:
        """Whether any identity, forgotten or not, accepts a row: [N, C] -> bool [N]."""
        return logits.amax(1) >= self.accept_from

    def to_agree(self, rows: FeatureSet) -> Tensor:
        """The inverted rows of retained identities; the scenes if there are none.

        A scene resembles nobody: which of the templates is nearest to it says nothing about images
        of persons. With one photograph of each of 1,000, it changes for 3 of 10 scenes before it
        changes for any photograph.
        """
        assert rows.scene is not None
        inverted = (rows.scene == 0) & ~rows.forgotten
        return inverted if bool(inverted.any()) else super().to_agree(rows)

    def divergence(self, logits: Tensor, rows: FeatureSet) -> Tensor:
        probability = self._with_stranger(rows.teacher).softmax(1)
        forgotten = probability[:, :-1] * self.forget
        target = probability - F.pad(forgotten, (0, 1))
        target = target + F.pad(forgotten.sum(1, keepdim=True), (len(self.forget), 0))
        raised = self.settings.stranger_margin * forgotten.sum(1, keepdim=True)
        log_q = self._with_stranger(logits + self.margin * self.forget + raised).log_softmax(1)
        entropy = torch.special.entr(target).sum(1)
        return -((target * log_q).sum(1) + entropy).mean()

    def _with_stranger(self, logits: Tensor) -> Tensor:
        return F.pad(logits, (0, 1), value=self.threshold)

    def _matching(self, logits: Tensor, rows: FeatureSet) -> tuple[Tensor, Tensor]:
        leaf = logits.detach().requires_grad_()
        with torch.enable_grad():
            change = (leaf - rows.teacher).index_select(1, self.retained)
            kept = (self._of_rows(rows).weight * change.square().mean(1)).mean() / self.size
            loss = self.divergence(leaf, rows) + self.settings.keep * kept
            (dlogits,) = torch.autograd.grad(loss, leaf)
        return loss.detach(), dlogits
