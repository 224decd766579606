"""A user's model as a plain function from image tensor to logits.

No function here changes the model that it is given.
"""

from __future__ import annotations

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
    """Finds the logits in a classifier's output; also works on torch.fx proxies while tracing.

    Raises:
        ModelError: there are none.
    """
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
        "Return a tensor [N, classes], a tuple that starts with it, a dict with the key 'logits', "
        "or an object with the attribute .logits.",
    )


def working_copy(model: nn.Module, device: torch.device, hooks: bool = False) -> LogitsModel:
    """Returns a float32 copy in eval mode on ``device`` whose parameters all require gradients.

    In-place activations become out-of-place, so that they don't overwrite cached activations. With
    ``hooks``, it has the user's hooks too.

    Raises:
        ModelError: weights are not finite, or the model can't be copied.
    """
    inner = unwrap(model)
    for name, tensor in state(inner).items():
        if tensor.is_floating_point() and not bool(tensor.isfinite().all()):
            bad = int((~tensor.isfinite()).sum())
            raise ModelError(
                f"{name} holds {bad} NaN or infinite values of {tensor.numel()}",
                "Load a checkpoint whose weights are finite.",
            )
    copied = deep_copy(inner, UNCOPYABLE, hooks).to(device=device).float().eval()
    for module in copied.modules():
        if getattr(module, "inplace", False) is True:
            module.inplace = False  # type: ignore[assignment]
    for parameter in copied.parameters():
        parameter.requires_grad_(parameter.is_floating_point())
        parameter.grad = None
    return LogitsModel(copied).eval()


def count_classes(model: LogitsModel, spec: InputSpec, device: torch.device) -> int:
    """Runs two mid-grey images through the model and returns the number of logits.

    Raises:
        ArgumentError: the model raises for images of this shape.
        ModelError: it can't run a batch, or does not return finite logits [N, C >= 2].
    """
    try:
        logits = model(torch.zeros(2, *spec.shape, device=device))
    except ModelError:
        raise
    except Exception as error:
        try:
            model(torch.zeros(1, *spec.shape, device=device))
        except Exception:  # noqa: BLE001  reports any error in the user's code
            raise ArgumentError(
                "input_shape",
                f"the model raises for images of shape {spec.shape} ({spec.source}): "
                f"{type(error).__name__}: {error}",
                "Pass input_shape=(channels, height, width) as the model was trained.",
            ) from error
        raise ModelError(
            f"it runs one image but not a batch of two ({type(error).__name__}: {error})",
            "Let forward() take any batch size: impressions are synthesised in batches.",
        ) from error
    if not isinstance(logits, Tensor) or logits.ndim != 2 or logits.shape[0] != 2:
        shape = tuple(logits.shape) if isinstance(logits, Tensor) else type(logits).__name__
        raise ModelError(
            f"for two images of shape {spec.shape} its output is {shape}, not [2, classes]",
            "Pass an image classifier: one image in, one row of logits out.",
        )
    if logits.shape[1] < 2:
        raise ModelError(
            "it has a single logit",
            "Pass a model of two classes or more: one to forget, one to keep.",
        )
    if not bool(logits.isfinite().all()):
        raise ModelError(
            "its logits for a grey image are NaN or infinite",
            "Check the weights and the normalisation layers.",
        )
    return int(logits.shape[1])


def resolve_device(model: nn.Module, device: str | torch.device | None) -> torch.device:
    """Returns the device to compute on: ``device``, or that of the model's first parameter.

    Raises:
        ArgumentError: the device is not available.
        ModelError: ``model`` is not a module with parameters.
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
            "device", f"got {device!r}: {reason}", "Pass one that is available, such as 'cpu'."
        ) from error
    if chosen.type == "meta":
        raise ArgumentError("device", "got 'meta', which holds no numbers", "Pass 'cpu' or 'cuda'.")
    return chosen
