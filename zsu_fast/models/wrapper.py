"""A user's model as a plain function from image tensor to logits.

No function here changes the model that it is given.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from ..errors import ArgumentError, ModelError
from .caches import clear_caches
from .input_spec import InputSpec, runs_on
from .kinds import CHANNELS_LAST, check_kind
from .outputs import OutputChoice, pick_logits as pick_logits
from .parameters import UNCOPYABLE, deep_copy, state, unwrap
from .squashing import AheadOfSquash

# What a probability is raised to before its logarithm is taken.
_LEAST_PROBABILITY = 1e-30


class LogitsModel(nn.Module):
    """Wraps a classifier so that ``forward`` returns its logits [N, C] and nothing else.

    Args:
        module: the classifier.
        output: which item of its output holds the logits, see `pick_logits`.

    Attributes:
        squash_place: where the model ends in a softmax or sigmoid of its own ``forward``, the place
            in `AheadOfSquash.ahead_of` of what that took; None otherwise.
        returns: what the module itself returns: "logits", "probabilities", "log-probabilities" or,
            each by itself, "scores" of 0 to 1 or -1 to 1 (`probe` finds out).
        log: whether the output, probabilities whose logits can't be reached, goes through a log.
        cast: whether the output has to be cast to float32.
    """

    def __init__(self, module: nn.Module, output: OutputChoice | None = None) -> None:
        super().__init__()
        self.module, self.output = module, output
        self.squash_place: int | None = None
        self.log = self.cast = False
        self.returns = "logits"

    def forward(self, x: Tensor) -> Tensor:
        logits: Tensor
        if self.squash_place is None:
            logits = pick_logits(self.module(x), self.output)
        else:
            with AheadOfSquash() as mode:
                logits = pick_logits(self.module(x), self.output)
            logits = mode.ahead_of(logits)[self.squash_place]
        if self.cast:
            logits = logits.float()
        return logits.clamp_min(_LEAST_PROBABILITY).log() if self.log else logits

    def extra_repr(self) -> str:
        names = ("output", "squash_place", "log", "cast")
        given = {name: getattr(self, name) for name in names}
        return ", ".join(f"{n}={v!r}" for n, v in given.items() if v is not None and v is not False)


def working_copy(
    model: nn.Module, device: torch.device, output: OutputChoice | None = None, hooks: bool = False
) -> LogitsModel:
    """Returns a float32 copy in eval mode on ``device`` whose parameters all require gradients.

    In-place activations become out-of-place, so that they don't overwrite cached activations.

    Args:
        model: the user's model; it is not changed.
        device: where to copy it.
        output: which item of its output holds the logits, see `pick_logits`.
        hooks: whether to copy the user's hooks too.

    Raises:
        ModelError: weights are not finite, or the model can't be copied (`check_kind`).
    """
    inner = unwrap(model)
    check_kind(inner)
    for name, tensor in state(inner).items():
        tensor = tensor.detach()
        if tensor.is_floating_point() and not bool(tensor.isfinite().all()):
            bad = int((~tensor.isfinite()).sum())
            raise ModelError(
                f"{name} holds {bad} NaN or infinite values of {tensor.numel()}",
                "Load a checkpoint whose weights are finite.",
            )
    copied = deep_copy(inner, UNCOPYABLE, hooks=hooks)
    copied.to(device=device)  # not chained: some models' methods return None
    copied.float()
    clear_caches(copied)
    copied.eval()
    for module in copied.modules():
        if getattr(module, "inplace", False) is True:
            module.inplace = False  # type: ignore[assignment]
    for parameter in copied.parameters():
        parameter.requires_grad_(parameter.is_floating_point())
        parameter.grad = None
    work = LogitsModel(copied, output)
    work.training = False
    return work


@torch.no_grad()
def count_classes(model: LogitsModel, spec: InputSpec, device: torch.device) -> int:
    """Runs two mid-grey images through the model and returns the number of logits.

    Raises:
        ArgumentError: the model raises for images of this shape.
        ModelError: it can't run a batch, or does not return finite logits [N, C >= 2].
    """
    try:
        logits = model(torch.zeros(2, *spec.shape, device=device))
    except ArgumentError:  # a ModelError too
        raise
    except Exception as error:
        try:
            model(torch.zeros(1, *spec.shape, device=device))
        except Exception:  # noqa: BLE001  reports any error in the user's code
            if len(spec.shape) == 3 and runs_on(model.module, (*spec.shape[1:], spec.shape[0])):
                raise ModelError(
                    f"it takes images of shape {(*spec.shape[1:], spec.shape[0])}, channels last",
                    CHANNELS_LAST,
                ) from error
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
    check_kind(model)
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
