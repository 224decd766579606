"""The points that ascend together."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor


@dataclass
class ActiveBatch:
    """The points that ascend together; row i of every tensor belongs to slot i.

    Attributes:
        index: the point in each slot, None for a free slot.
        x: float32 [N, *shape], where the points are.
        exp_avg, exp_avg_sq: float32 [N, *shape], Adam's moments.
        step: int32 [N], steps taken in this attempt.
        label: int64 [N], the class that each point ascends to.
        target: float32 [N], the confidence at which it stops.
        confidence: float32 [N], its class's probability at the last step.
        active: bool [N], whether it still moves.
        reached: bool [N], whether it reached its target.
        penalise_others: float32 [N], 1 where the other classes' logits are pushed down too.
        penalises: whether any entry of ``penalise_others`` is 1; the host need not ask the GPU.
    """

    index: list[int | None]
    x: Tensor
    exp_avg: Tensor
    exp_avg_sq: Tensor
    step: Tensor
    label: Tensor
    target: Tensor
    confidence: Tensor
    active: Tensor
    reached: Tensor
    penalise_others: Tensor
    penalises: bool = field(default=True, init=False)

    def tensors(self) -> list[Tensor]:
        """All tensors, in the order of the fields."""
        return [value for value in vars(self).values() if isinstance(value, Tensor)]

    def write(self, slots: Sequence[int], new: ActiveBatch) -> None:
        """Puts the points of ``new`` into ``slots``, in the same memory."""
        where = torch.tensor(slots, device=self.x.device)
        for tensor, values in zip(self.tensors(), new.tensors(), strict=True):
            tensor[where] = values
        for slot, point in zip(slots, new.index, strict=True):
            self.index[slot] = point

    def joined(self, keep: Sequence[int], new: ActiveBatch) -> ActiveBatch:
        """A new batch: the slots ``keep`` of this one, then those of ``new``."""
        where = torch.tensor(keep, dtype=torch.int64, device=self.x.device)
        pairs = zip(self.tensors(), new.tensors(), strict=True)
        tensors = [torch.cat([ours[where], theirs]) for ours, theirs in pairs]
        return ActiveBatch([self.index[slot] for slot in keep] + new.index, *tensors)
