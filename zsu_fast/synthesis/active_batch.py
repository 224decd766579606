"""The slots of the working batch and the state of the ascent in each of them."""

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

    def tensors(self) -> tuple[Tensor, ...]:
        """All tensors, in the order of the fields."""
        return (
            self.x, self.exp_avg, self.exp_avg_sq, self.step, self.label, self.target,
            self.confidence, self.active, self.reached, self.penalise_others,
        )  # fmt: skip

    def free_slots(self) -> list[int]:
        return [slot for slot, point in enumerate(self.index) if point is None]

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
        tensors = [
            torch.cat([ours[where], theirs])
            for ours, theirs in zip(self.tensors(), new.tensors(), strict=True)
        ]
        return ActiveBatch([self.index[slot] for slot in keep] + new.index, *tensors)


def bucket_size(rows: int, device: torch.device) -> int:
    """The number of slots for ``rows`` active points, from a short list: few sizes are set up.

    On a GPU, where each size is captured once and small batches take the same time, at least 8.
    """
    size = 8 if device.type == "cuda" else 1
    while size < rows:
        size = size * 3 // 2 if size > 1 and size & (size - 1) == 0 else max(2, size * 4 // 3)
    return size if rows else 0
