"""Runs a user's model on labelled images, and refuses output that can't be measured."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from ..errors import ArgumentError, ModelError, ZsuFastError
from ..models.infer_spec import resolve_spec
from ..models.input_spec import InputSpec, stated_spec
from ..models.outputs import OutputChoice, find_output, is_ambiguous, pick_logits
from ..models.parameters import unwrap
from ..models.probe import refuse_embedding
from ..models.wrapper import working_copy


def image_spec(
    model: nn.Module,
    input_shape: Sequence[int] | None = None,
    mean: float | Sequence[float] | None = None,
    std: float | Sequence[float] | None = None,
) -> InputSpec | None:
    """What images ``model`` takes: as given, or as it states; None if neither is the case.

    Raises:
        ArgumentError: see `resolve_spec`.
    """
    if input_shape is None and mean is None and std is None:
        return stated_spec(unwrap(model))
    return resolve_spec(model, input_shape, mean, std)


def choose_output(
    model: nn.Module, images: Tensor, output: OutputChoice | None
) -> OutputChoice | None:
    """Returns which item of the model's output holds the logits, found if it is not given.

    Raises:
        ArgumentError: the model raises for these images.
        ModelError: its output is an embedding, or it is not clear which item holds the logits.
    """
    images = as_model_takes(model, images[:4])
    if output is None and is_ambiguous(call_model(model, images)):
        output = find_output(working_copy(model, images.device).module, images[:2].float())
    refuse_embedding(model, images, output)
    return output


def run_model(
    model: nn.Module, images: Tensor, output: OutputChoice | None = None, argument: str = "data"
) -> Tensor:
    """Returns the logits [N, C] for a batch, which is moved to the model's device and dtype.

    Raises:
        ArgumentError: the model raises for these images.
        ModelError: its output is not one row of logits per image.
    """
    logits = pick_logits(call_model(model, as_model_takes(model, images), argument), output)
    if isinstance(logits, Tensor) and logits.ndim == 1 and len(images) == 1:
        logits = logits[None]  # a squeeze() in forward() removed the batch dimension
    if not isinstance(logits, Tensor) or logits.ndim != 2 or len(logits) != len(images):
        shape = tuple(logits.shape) if isinstance(logits, Tensor) else type(logits).__name__
        raise ModelError(
            f"for {len(images)} images its output is {shape}, not [{len(images)}, classes]",
            "Pass an image classifier: one image in, one row of logits out.",
        )
    return logits


def as_model_takes(model: nn.Module, images: Tensor) -> Tensor:
    """Moves images to the device and dtype of the model's parameters."""
    first = next(unwrap(model).parameters(), None)
    return images if first is None else images.to(first.device, first.dtype)


def call_model(model: Callable[[Tensor], Any], images: Tensor, argument: str = "data") -> Any:
    """Calls the model.

    Raises:
        ArgumentError: it raises for these images.
    """
    try:
        return model(images)
    except ZsuFastError:
        raise
    except Exception as error:
        raise ArgumentError(
            argument,
            f"the model raises for images of shape {tuple(images.shape[1:])} "
            f"({type(error).__name__}: {error})",
            "Pass images as the model takes them.",
        ) from error


def check_logits(logits: Tensor, name: str = "") -> None:
    """Checks that a batch of logits, float [N, C], can be compared.

    -inf is allowed where it masks a class: for all images of the batch.

    Args:
        logits: of a batch.
        name: of the model, for the error, if there are several.

    Raises:
        ModelError: logits are NaN or infinite.
    """
    masked = (logits == -torch.inf).all(0)
    usable = logits.isfinite().all(0) | masked
    if bool(usable.all()) and not bool(masked.all()):
        return
    bad = int((~logits.isfinite()).any(1).sum())
    raise ModelError(
        f"{name}{': ' if name else ''}its logits for {bad} of {len(logits)} images are NaN or "
        f"infinite",
        "Check the weights, the dtype and the normalisation of the images.",
    )


@contextmanager
def eval_mode(model: nn.Module) -> Iterator[None]:
    """Runs the block in eval mode, then restores each module's own mode."""
    modes = [(module, module.training) for module in model.modules()]
    model.eval()
    try:
        yield
    finally:
        for module, mode in modes:
            module.training = mode
