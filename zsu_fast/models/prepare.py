"""What every call starts from: a float32 working copy of the user's model, and what it expects."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

import torch
from torch import nn

from ..runtime.measuring import multiply_adds
from .infer_spec import resolve_spec
from .input_spec import InputSpec, noise_images
from .multi_label import find_multi_label
from .observers import has_hooks, remove_observers
from .outputs import OutputChoice, check_output
from .parameters import unwrap
from .probe import probe
from .wrapper import LogitsModel, resolve_device, working_copy


@dataclass(frozen=True)
class PreparedModel:
    """A working copy that is safe to change, and what is known of it.

    Attributes:
        model: a float32 copy in eval mode: images [N, ...] -> logits [N, classes]. All parameters
            require gradients except those that only part of a model has frozen (`freeze_as`).
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


def _copy_with_hooks(
    model: nn.Module, device: torch.device, spec: InputSpec, output: OutputChoice | None
) -> LogitsModel | None:
    """The working copy with those of the user's hooks that change the output; None without any."""
    if not has_hooks(unwrap(model)):
        return None
    try:
        work = working_copy(model, device, output, hooks=True)
        kept = remove_observers(work.module, noise_images(spec, 2).to(device))
    except Exception:  # noqa: BLE001  what is wrong shows without hooks too, or the hooks are
        return None
    return work if kept else None


def freeze_as(copied: nn.Module, model: nn.Module) -> list[str]:
    """Freezes those parameters of ``copied`` that ``model`` has frozen; returns their names.

    A model that is frozen as a whole is one for inference, and nothing is frozen then.
    """
    parameters = {n: p for n, p in unwrap(model).named_parameters() if p.is_floating_point()}
    frozen = [n for n, p in parameters.items() if not p.requires_grad]
    if len(frozen) == len(parameters):
        return []
    for name in frozen:
        copied.get_parameter(name).requires_grad_(False)
    return frozen


def prepare_model(
    model: nn.Module,
    device: str | torch.device | None = None,
    input_shape: Sequence[int] | None = None,
    mean: float | Sequence[float] | None = None,
    std: float | Sequence[float] | None = None,
    output: OutputChoice | None = None,
    multi_label: bool | None = None,
) -> PreparedModel:
    """Copies ``model`` and finds out what images it takes and what it returns (`probe`).

    Args:
        model: any image classifier; it is not changed.
        device: where to compute; None for the model's own.
        input_shape, mean, std: see `resolve_spec`; inferred where None.
        output: which item of the model's output holds the logits: an index, a key or attribute, or
            a callable; None: see `find_output`.
        multi_label: see `find_multi_label`.

    Raises:
        ArgumentError: an argument can't be used, or the model can't (a `ModelError`).
    """
    check_output(output)
    where = resolve_device(model, device)
    spec = resolve_spec(model, input_shape, mean, std)
    work = _copy_with_hooks(model, where, spec, output) or working_copy(model, where, output)
    images = noise_images(spec, 2).to(where)
    several, found = find_multi_label(model, work, images, multi_label)
    classes, notes = probe(work, spec, where, several)
    freeze_as(work.module, model)  # the probe needs gradients of all
    return PreparedModel(work, spec, where, classes, found + notes, several)
