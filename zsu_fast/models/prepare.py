"""What every call starts from: a float32 working copy of the user's model, and what it expects."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

import torch
from torch import nn

from ..runtime.measuring import multiply_adds
from .infer_spec import resolve_spec
from .input_spec import InputSpec, noise_images
from .multi_label import ahead_of_sigmoid, find_multi_label
from .wrapper import LogitsModel, count_classes, resolve_device, working_copy


@dataclass(frozen=True)
class PreparedModel:
    """A working copy that is safe to change, and what is known of it.

    Attributes:
        model: a float32 copy in eval mode: images [N, ...] -> logits [N, classes].
        spec: the images it expects.
        device: where it computes.
        classes: the number of its logits.
        notes: what was found while probing the model that its user should know, in sentences.
        multi_label: whether each class has a sigmoid of its own.
    """

    model: LogitsModel
    spec: InputSpec
    device: torch.device
    classes: int
    notes: list[str] = field(default_factory=list)
    multi_label: bool = False

    def multiply_adds(self) -> int:
        """Multiply-adds of a forward pass of one image."""
        return multiply_adds(self.model, torch.zeros(1, *self.spec.shape, device=self.device))


def prepare_model(
    model: nn.Module,
    device: str | torch.device | None = None,
    input_shape: Sequence[int] | None = None,
    mean: float | Sequence[float] | None = None,
    std: float | Sequence[float] | None = None,
    multi_label: bool | None = None,
) -> PreparedModel:
    """Copies ``model`` and finds out what images it takes and how many classes it has.

    Args:
        model: any image classifier; it is not changed.
        device: where to compute; None for the model's own.
        input_shape, mean, std: see `resolve_spec`; inferred where None.
        multi_label: see `find_multi_label`.

    Raises:
        ArgumentError: an argument can't be used, or the model can't (a `ModelError`).
    """
    where = resolve_device(model, device)
    spec = resolve_spec(model, input_shape, mean, std)
    work = working_copy(model, where)
    classes = count_classes(work, spec, where)
    images = noise_images(spec, 2).to(where)
    is_multi_label, notes = find_multi_label(model, work, images, multi_label)
    if is_multi_label:
        work = ahead_of_sigmoid(work, images)
    return PreparedModel(work, spec, where, classes, notes, is_multi_label)
