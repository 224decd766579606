"""What both models of a `check` answer for its rows, and which rows count."""

from __future__ import annotations

import copy
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from ..models.embedding_classifier import EmbeddingClassifier
from ..models.input_spec import noise_images
from ..models.multi_label import predicted, same_decisions
from ..models.wrapper import LogitsModel
from ..splitting.layers import in_chunks, layer_names
from ..training.deep.losses import masked_confidence
from ..training.deep.open_set import ACCEPTED_AT, acceptance_threshold
from .audit.audited_model import AuditedModel

FEWEST_KEPT = 0.5  # of the rows of retained classes, or rows of the original tell nothing
_FEW = 4  # rows of a retained class that are enough to say that it is lost


@dataclass(frozen=True)
class CheckRows:
    """Rows that both models answer: points of a layer inside, or images.

    Attributes:
        points: [N, D] or images [N, ...]: scenes, then rows of classes.
        label: int64 [N - scenes], the class that each row of a class was made for.
        scenes: how many scenes there are.
        tails: what makes logits of points: of the original, of the unlearned model.
        words: what they are.
    """

    points: Tensor
    label: Tensor
    scenes: int
    tails: tuple[nn.Module, nn.Module]
    words: str


@dataclass(frozen=True)
class Answers:
    """Logits of all rows: [N, C] each, and which rows count.

    Attributes:
        original, unlearned, unmasked: of the original, of the unlearned model, and of that one with
            the original last layer.
        forget: bool [C].
        belongs: bool [N]: the original gives the row to a forgotten class; of rows that were made
            for a class, those of that class.
        retained: bool [N]: scenes that it gives to another class.
        control: bool [N]: rows that were made for another class, and that it gives to that one.
        rows: the rows.
        threshold: the logit above which an identity is accepted; -inf for classes.
    """

    original: Tensor
    unlearned: Tensor
    unmasked: Tensor
    forget: Tensor
    belongs: Tensor
    retained: Tensor
    control: Tensor
    rows: CheckRows
    threshold: float = -torch.inf

    @classmethod
    def of(
        cls, rows: CheckRows, original: LogitsModel, other: AuditedModel, forget: list[int]
    ) -> Answers:
        before = _logits(rows.tails[0], rows.points)
        after = _logits(rows.tails[1], rows.points)
        if other.hidden:
            after[:, other.hidden] = -torch.inf
        threshold = -torch.inf
        if isinstance(original.module, EmbeddingClassifier):  # the templates are in place
            unmasked = after
        else:
            last = layer_names(original.module, noise_images(other.spec, 2).to(before.device))[-1]
            layer = original.module.get_submodule(last)
            tail = other.model.module.get_submodule(last)
            tail.load_state_dict(copy.deepcopy(layer.state_dict()))
            unmasked = _logits(rows.tails[1], rows.points)
        mask = torch.zeros(before.shape[1], dtype=torch.bool, device=before.device)
        mask[forget] = True
        belongs, retained, control = cls._select(before, mask, rows)
        answer = before.argmax(1)
        if unmasked is after and bool(control.any()):
            threshold = acceptance_threshold(before[control], answer[control], mask, ACCEPTED_AT)
        return cls(before, after, unmasked, mask, belongs, retained, control, rows, threshold)

    @classmethod
    def _select(
        cls, before: Tensor, mask: Tensor, rows: CheckRows
    ) -> tuple[Tensor, Tensor, Tensor]:
        """``belongs``, ``retained`` and ``control``."""
        answer = before.argmax(1)
        made_for = torch.cat([answer[: rows.scenes], rows.label.to(answer.device)])
        right, scene = answer == made_for, torch.arange(len(answer)) < rows.scenes
        scene = scene.to(answer.device)
        forgotten = mask[answer]
        return right & forgotten, scene & ~forgotten, ~scene & right & ~forgotten

    def leak(self, logits: Tensor) -> float:
        """Share of the rows of forgotten classes that are assigned to one, and accepted."""
        most, answer = logits[self.belongs].max(1)
        return float((self.forget[answer] & (most > self.threshold)).float().mean())

    def agreement(self, logits: Tensor, masked: bool) -> float:
        """Share of scenes whose answer is the original's without the forgotten classes, weighted by
        the original's confidence. Of an encoder `kept`: a scene resembles nobody.
        """
        if self.threshold > -torch.inf or not bool(self.retained.any()):
            return self.kept()
        if masked:
            logits = logits.masked_fill(self.forget, -torch.inf)
        want = self.original.masked_fill(self.forget, -torch.inf).argmax(1)
        weight = masked_confidence(self.original, self.forget)[self.retained]
        return float((weight * (logits.argmax(1) == want)[self.retained]).sum() / weight.sum())

    def kept(self) -> float:
        """Share of the rows made for other classes that the unlearned model still recognises."""
        _, same = self._recognised()
        return float(same[self.control].float().mean()) if bool(self.control.any()) else 1.0

    def seen(self) -> list[int]:
        """The places of the forgotten classes that have rows."""
        found: list[int] = self.original.argmax(1)[self.belongs].unique().tolist()
        return found

    def _recognised(self) -> tuple[Tensor, Tensor]:
        """The class of each row, int64 [N], and whether the unlearned model recognises it."""
        answer = self.original.argmax(1)
        return answer, self.unlearned.argmax(1) == answer

    @property
    def features_unchanged(self) -> bool:
        scale = float(self.original.abs().max())
        return float((self.unmasked - self.original).abs().max()) <= 1e-5 * max(1.0, scale)

    def lost(self) -> list[int]:
        """Other classes most of whose rows are no longer recognised."""
        label, same = self._recognised()
        found = []
        for c in label[self.control].unique().tolist():
            which = self.control & (label == c)
            if int(which.sum()) >= _FEW and float(same[which].float().mean()) < FEWEST_KEPT:
                found.append(c)
        return found


class MultiLabelAnswers(Answers):
    """`Answers` of models with one sigmoid per class: a row may have any number of them.

    ``belongs``: the original sees a forgotten class in the row; ``retained``: scenes in which it
    sees none; ``control``: rows in which it sees the class that they were made for, and none of the
    forgotten ones.
    """

    @classmethod
    def _select(
        cls, before: Tensor, mask: Tensor, rows: CheckRows
    ) -> tuple[Tensor, Tensor, Tensor]:
        told = predicted(before)
        scene = torch.arange(len(before), device=before.device) < rows.scenes
        forgotten = (told & mask).any(1)
        right = torch.ones_like(scene)
        made_for = rows.label.to(before.device)
        right[rows.scenes :] = told[rows.scenes :].gather(1, made_for[:, None])[:, 0]
        return forgotten, scene & ~forgotten, ~scene & right & ~forgotten

    def leak(self, logits: Tensor) -> float:
        return float((predicted(logits) & self.forget).any(1)[self.belongs].float().mean())

    def agreement(self, logits: Tensor, masked: bool) -> float:
        """Share of the decisions on retained classes that are the original's, over the scenes."""
        del masked  # each class is decided by itself
        if not bool(self.retained.any()):
            return self.kept()
        same = same_decisions(logits, self.original, ~self.forget)
        return float(same[self.retained].mean())

    def seen(self) -> list[int]:
        told = (predicted(self.original) & self.forget)[self.belongs]
        found: list[int] = told.any(0).nonzero()[:, 0].tolist()
        return found

    def _recognised(self) -> tuple[Tensor, Tensor]:
        label = self.rows.label.to(self.original.device)
        label = torch.cat([label.new_zeros(self.rows.scenes), label])
        return label, predicted(self.unlearned).gather(1, label[:, None])[:, 0]


@torch.no_grad()
def _logits(model: nn.Module, points: Tensor) -> Tensor:
    return torch.cat([model(part) for part in in_chunks(model, points)])
