"""A user's model as one plain function, image tensor -> logits.

Nothing in this file changes the model it is given."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

from ..errors import ArgumentError, ModelError
from .input_spec import InputSpec
from .parameters import UNCOPYABLE, deep_copy, state, unwrap


class LogitsModel(nn.Module):
    """Wraps a classifier so that ``forward`` returns its logits [N, C] and nothing else.

    Takes the logits from a tensor, the ``logits`` attribute of an object, the ``"logits"`` key of
    a dict, or the first item of a tuple or list (or the only tensor of a dict).
    """

    def __init__(self, module: nn.Module) -> None:
        super().__init__()
        self.module = module

    def forward(self, x: Tensor) -> Tensor:
        return pick_logits(self.module(x))


def pick_logits(output: Any) -> Any:
    """The logits in whatever a classifier returns. Also runs on torch.fx proxies while tracing."""
    if isinstance(output, Tensor | torch.fx.Proxy):
        return output
    if isinstance(output, dict):
        if "logits" in output:
            return output["logits"]
        if len(output) == 1:
            return next(iter(output.values()))
    elif hasattr(output, "logits"):
        return output.logits
    elif isinstance(output, tuple | list) and output:
        return output[0]
    keys = f" with keys {sorted(map(str, output))}" if isinstance(output, dict) else ""
    raise ModelError(
        f"its output is a {type(output).__name__}{keys}, in which no logits were found",
        "Return a [N, classes] tensor, a tuple that starts with it, a dict with the key 'logits', "
        "or an object with the attribute .logits.",
    )


def working_copy(model: nn.Module, device: torch.device) -> LogitsModel:
    """A float32 copy in eval mode on ``device``, trainable everywhere, safe to change.

    In-place activations are switched off in it, so that cached activations stay what they are.
    """
    inner = unwrap(model)
    for name, tensor in state(inner).items():
        if tensor.is_floating_point() and not bool(tensor.isfinite().all()):
            bad = int((~tensor.isfinite()).sum())
            raise ModelError(
                f"{name} holds {bad} NaN or infinite values of {tensor.numel()}",
                "Load a checkpoint whose weights are finite.",
            )
    copied = deep_copy(inner, UNCOPYABLE)
    copied = copied.to(device=device).float().eval()
    for module in copied.modules():
        if getattr(module, "inplace", False) is True:
            module.inplace = False  # type: ignore[assignment]
    for parameter in copied.parameters():
        parameter.requires_grad_(parameter.is_floating_point())
        parameter.grad = None
    return LogitsModel(copied).eval()


def count_classes(model: LogitsModel, spec: InputSpec, device: torch.device) -> int:
    """Runs two mid-grey images through the model and returns the number of its logits.

    Raises:
        ModelError: the model can't run a batch, or does not return logits [N, C >= 2].
    """
    try:
        logits = model(grey_images(spec.shape, 2, device))
    except ModelError:
        raise
    except Exception as error:
        try:
            model(grey_images(spec.shape, 1, device))
        except Exception:  # noqa: BLE001  any error of the user's code is reported by the raise
            raise ArgumentError(
                "input_shape",
                f"the model raises for images of shape {spec.shape} ({spec.source}): "
                f"{type(error).__name__}: {error}",
                "Pass input_shape=(channels, height, width) as the model was trained.",
            ) from error
        raise ModelError(
            f"it runs one image but not a batch of two ({type(error).__name__}: {error})",
            "Let forward() take any batch size: impressions are made in batches.",
        ) from error
    if not isinstance(logits, Tensor) or logits.ndim != 2 or logits.shape[0] != 2:
        shape = tuple(logits.shape) if isinstance(logits, Tensor) else type(logits).__name__
        raise ModelError(
            f"for two images of shape {spec.shape} its output is {shape}, not [2, classes]",
            "zsu_fast unlearns image classifiers: one image in, one row of logits out.",
        )
    if logits.shape[1] < 2:
        raise ModelError(
            "it has a single logit", "At least two classes are needed: one to forget, one to keep."
        )
    if not bool(logits.isfinite().all()):
        raise ModelError(
            "its logits for a grey image are NaN or infinite",
            "Check the weights and the normalisation layers.",
        )
    return int(logits.shape[1])


def resolve_device(model: nn.Module, device: str | torch.device | None) -> torch.device:
    """The device to compute on: ``device``, or where the model's first parameter is.

    Raises:
        ArgumentError: no such device here.
        ModelError: the model has no parameters.
    """
    first = next(unwrap(model).parameters(), None) if isinstance(model, nn.Module) else None
    if first is None:
        raise ModelError(
            f"got a {type(model).__name__} without parameters",
            "Pass a trained torch.nn.Module.",
        )
    if device is None:
        return first.device
    try:
        chosen = torch.device(device)
        torch.empty(1, device=chosen)
    except (RuntimeError, AssertionError, NotImplementedError, TypeError, ValueError) as error:
        reason = str(error).strip().splitlines()[0]
        raise ArgumentError(
            "device", f"got {device!r}: {reason}", "Pass one that torch has here, such as 'cpu'."
        ) from error
    if chosen.type == "meta":
        raise ArgumentError("device", "got 'meta', which holds no numbers", "Pass 'cpu' or 'cuda'.")
    return chosen


def grey_images(shape: Sequence[int], batch: int, device: torch.device) -> Tensor:
    return torch.zeros(batch, *shape, device=device)
