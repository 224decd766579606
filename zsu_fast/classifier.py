"""A user's model as one plain function, image tensor -> logits: what it eats and what it returns.

Nothing in this file changes the model it is given.
"""

from __future__ import annotations

import copy
import hashlib
import math
import os
import threading
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from .errors import ArgumentError, ModelError
from .inputs import InputSpec as InputSpec, stated_shape, stated_spec

IMAGENET_MEAN = (0.485, 0.456, 0.406)
IMAGENET_STD = (0.229, 0.224, 0.225)
# No model is fed with pixels beyond this, and their squares are still finite.
_LARGEST_PIXEL = 1e6
# Stands for the number of classes where it is not known yet.
ANY_NUMBER = 1 << 31
# Sizes people train classifiers at, the most common first; see `infer_shape`.
_COMMON_SIZES = (32, 224, 28, 64, 96, 128, 160, 192, 240, 256, 288, 299, 384, 48, 16, 8)


class _Turn:
    """What threads wait for: the right to set what belongs to the whole process.

    The default dtype, the number of threads, how matrices are multiplied, and torch.fx's tracing:
    two threads that set and restored these in turn would compute in each other's modes.
    """

    def __init__(self) -> None:
        self.renew()
        os.register_at_fork(after_in_child=self.renew)

    def renew(self) -> None:
        """A forked child has only the thread that forked: nobody else gives the turn back."""
        self.lock = threading.RLock()


_turn = _Turn()


@contextmanager
def own_modes() -> Iterator[None]:
    """Gradients on, inference mode and autocast off, float32 as the default dtype, whatever the
    caller's are; put back afterwards. A decorator too. One thread at a time is inside.
    """
    with _turn.lock:
        dtype = torch.get_default_dtype()
        torch.set_default_dtype(torch.float32)
        try:
            with (
                torch.inference_mode(False),
                torch.enable_grad(),
                torch.autocast("cpu", enabled=False),
                torch.autocast("cuda", enabled=False),
            ):
                yield
        finally:
            torch.set_default_dtype(dtype)


def unwrap(model: nn.Module) -> nn.Module:
    """The module inside ``torch.compile`` and (Distributed)DataParallel, however nested."""
    while True:
        inner = getattr(model, "_orig_mod", None)
        if inner is None and isinstance(
            model, nn.DataParallel | nn.parallel.DistributedDataParallel
        ):
            inner = model.module
        if not isinstance(inner, nn.Module):
            return model
        model = inner


class LogitsModel(nn.Module):
    """Wraps a classifier so that ``forward`` returns its logits [N, C] and nothing else.

    Takes the logits from a tensor, the ``logits`` attribute of an object, the ``"logits"`` key of
    a dict, or the first item of a tuple or list (or the only tensor of a dict).
    """

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model = model

    def forward(self, x: Tensor) -> Tensor:
        return pick_logits(self.model(x))


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
    try:
        copied = copy.deepcopy(inner, computed_tensors(inner))
    except Exception as error:
        raise ModelError(
            f"{type(inner).__name__} cannot be copied by copy.deepcopy ({error})",
            "Remove what cannot be copied: open files, locks, non-leaf tensors in attributes.",
        ) from error
    copied = copied.to(device=device).float().eval()
    for module in copied.modules():
        if getattr(module, "inplace", False) is True:
            module.inplace = False  # type: ignore[assignment]
    for parameter in copied.parameters():
        parameter.requires_grad_(parameter.is_floating_point())
        parameter.grad = None
    return LogitsModel(copied).eval()


def computed_tensors(model: nn.Module) -> dict[int, Any]:
    """A memo for ``copy.deepcopy(model, memo)``: detached copies of tensors in attributes.

    Without it, tensors that autograd made can't be copied: ``nn.utils.weight_norm`` keeps such
    weights and makes them anew at each forward pass.
    """
    held = (value for module in model.modules() for value in vars(module).values())
    return {id(v): v.detach().clone() for v in held if isinstance(v, Tensor) and not v.is_leaf}


def state(model: nn.Module) -> dict[str, Tensor]:
    """Parameters and buffers by name, persistent or not; names tied to one tensor come once."""
    return dict(model.named_parameters()) | dict(model.named_buffers())


def weights_hash(model: nn.Module) -> str:
    """SHA-256 over names, dtypes, shapes and bytes of ``model.state_dict()``, as 64 hex digits."""
    digest = hashlib.sha256()
    for name, tensor in sorted(unwrap(model).state_dict().items()):
        if not isinstance(tensor, Tensor):
            continue
        digest.update(f"{name}|{tensor.dtype}|{tuple(tensor.shape)}|".encode())
        digest.update(
            tensor.detach().cpu().contiguous().flatten().view(torch.uint8).numpy().tobytes()
        )
    return digest.hexdigest()


def count_classes(model: LogitsModel, spec: InputSpec, device: torch.device) -> int:
    """Runs two mid-grey images through the model and returns the number of its logits.

    Raises:
        ModelError: the model can't run a batch, or does not return logits [N, C >= 2].
    """
    try:
        logits = model(_probe(spec.shape, 2, device))
    except ModelError:
        raise
    except Exception as error:
        try:
            model(_probe(spec.shape, 1, device))
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


def resolve_spec(
    model: nn.Module,
    input_shape: Sequence[int] | None = None,
    mean: float | Sequence[float] | None = None,
    std: float | Sequence[float] | None = None,
) -> InputSpec:
    """What images the model expects: given, stated by the model, or inferred without data.

    `inputs.stated_spec` says which models state it. Otherwise the shape is inferred from the
    layers (`infer_shape`), and pixels are taken to be normalised by ImageNet's mean and std (three
    channels), MNIST's (one), or 0.5 (others); ``assumed`` is set then.

    Raises:
        ArgumentError: a given value is malformed, or nothing tells the shape.
    """
    inner = unwrap(model)
    everything = input_shape is not None and mean is not None and std is not None
    stated = None if everything else stated_spec(inner)
    if input_shape is not None:
        shape, source = _check_shape(input_shape), "shape given"
    elif stated is not None:
        shape, source = stated.shape, stated.source
    else:
        shape, source = stated_shape(inner) or infer_shape(inner)
    channels = shape[0]
    if mean is None and std is None and stated is not None and len(stated.mean) == channels:
        return replace(
            stated,
            shape=shape,
            source=source,
            resize=stated.resize if shape == stated.shape else None,
        )
    guess_mean, guess_std, guess = _guess_normalisation(channels)
    if mean is None and std is None:
        return InputSpec(shape, guess_mean, guess_std, f"{source}; {guess}", assumed=True)
    means = _check_channels("mean", 0.0 if mean is None else mean, channels)
    stds = _check_channels("std", 1.0 if std is None else std, channels)
    if any(s <= 0 for s in stds):
        raise ArgumentError("std", f"got {std!r}", "Every value must be above 0.")
    spec = InputSpec(shape, means, stds, f"{source}; mean and std given")
    if float(torch.cat([spec.low, spec.high]).abs().max()) > _LARGEST_PIXEL:
        raise ArgumentError(
            "std" if max(map(abs, means)) <= _LARGEST_PIXEL else "mean",
            f"pixels would be beyond {_LARGEST_PIXEL:.0e} with mean {mean!r} and std {std!r}",
            "Pass what pixels of 0..1 are normalised by.",
        )
    return spec


def infer_shape(model: nn.Module) -> tuple[tuple[int, ...], str]:
    """The shape of the images, from the layers alone.

    Channels come from the first convolution (or the width of the first linear layer). Of the
    common sizes, those are kept at which the model runs. If several are left, as with global
    pooling, the first of 28 pixels or more is taken at which the last feature map is 4 to 16
    wide: that is how wide it is in practice, 8 for a ResNet made for 32, 7 for one made for 224.

    Raises:
        ArgumentError: the model runs at none of them, or at several with no such map.
    """
    try:
        probe = copy.deepcopy(model, computed_tensors(model)).float().eval()
    except Exception as error:
        raise ModelError(
            f"{type(model).__name__} cannot be copied by copy.deepcopy ({error})",
            "Remove what cannot be copied: open files, locks, non-leaf tensors in attributes.",
        ) from error
    layers = [m for m in probe.modules() if isinstance(m, nn.Conv2d | nn.Linear)]
    device = next((p.device for p in probe.parameters()), torch.device("cpu"))
    if not layers:
        raise ArgumentError(
            "input_shape",
            "not given, and the model has no convolution or linear layer to infer it from",
            "Pass input_shape=(channels, height, width).",
        )
    first = layers[0]
    if isinstance(first, nn.Conv2d):
        candidates = [(first.in_channels, s, s) for s in _COMMON_SIZES]
    else:
        candidates = []
        for channels in (1, 3):
            side = math.isqrt(first.in_features // channels)
            if channels * side * side == first.in_features:
                candidates.append((channels, side, side))
        candidates.append((first.in_features,))  # type: ignore[arg-type]
    running: list[tuple[int, ...]] = []
    last_error: Exception | None = None
    # one image alone where two do not run: `count_classes` then says what is wrong
    for batch, shape in ((batch, shape) for batch in (2, 1) for shape in candidates):
        if batch == 1 and running:
            break
        try:
            width = _last_map_width(probe, shape, batch, device)
        except Exception as error:  # noqa: BLE001  this size does not fit: the next may
            last_error = error
            continue
        if (4 <= width <= 16 and shape[-1] >= 28) or not isinstance(first, nn.Conv2d):
            return shape, f"shape inferred: the last feature map is {width} wide"
        running.append(shape)
    if len(running) == 1:
        return running[0], "shape inferred: the only common one at which the model runs"
    if running:
        sides = ", ".join(str(shape[-1]) for shape in running)
        raise ArgumentError(
            "input_shape",
            f"not given; the model runs on images of {sides} pixels and nothing tells which it "
            f"was trained on",
            "Pass input_shape=(channels, height, width), and mean and std.",
        )
    raise ArgumentError(
        "input_shape",
        f"not given, and the model raises at each of {len(candidates)} common shapes, "
        f"at the last with {type(last_error).__name__}: {last_error}",
        "Pass input_shape=(channels, height, width).",
    ) from last_error


def check_forget(forget: Any, classes: int) -> list[int]:
    """``forget`` as a sorted list of class indices that leaves at least one class to keep.

    Raises:
        ArgumentError: as `check_classes`, or every class is named.
    """
    wanted = check_classes("forget", forget, classes)
    if len(wanted) == classes:
        raise ArgumentError(
            "forget",
            f"got {_short(forget)}: that is every class, so nothing is left to keep",
            f"Leave out at least one of the classes 0 to {classes - 1}.",
        )
    return wanted


def check_forgotten(forgotten: Any, forget: Sequence[int], classes: int) -> list[int]:
    """Classes forgotten before, as a sorted list; None and an empty collection are none.

    Raises:
        ArgumentError: as `check_classes`, one is to be forgotten again, or none is left to keep.
    """
    try:
        none = forgotten is None or (not isinstance(forgotten, str | bytes) and not len(forgotten))
    except TypeError:  # a plain int, a generator
        none = False
    if none:
        return []
    before = check_classes("forgotten", forgotten, classes)
    twice = sorted(set(before) & set(forget))
    if twice:
        raise ArgumentError(
            "forget",
            f"{twice} were forgotten before (forgotten={_short(before)})",
            "Name only classes that the model still answers.",
        )
    if len(before) + len(forget) == classes:
        raise ArgumentError(
            "forget",
            f"got {_short(list(forget))}: with those forgotten before ({_short(before)}) that is "
            f"every class, so nothing is left to keep",
            "Leave out at least one class.",
        )
    return before


def check_classes(argument: str, value: Any, classes: int) -> list[int]:
    """``value`` as a sorted list of class indices.

    Args:
        argument: its name, for the error.
        value: one int, or any collection of ints (list, tuple, set, range, numpy array, tensor).
        classes: the number of the model's logits.

    Raises:
        ArgumentError: empty, out of range, duplicated, or not whole numbers.
    """
    known = f"from 0 to {classes - 1}" if classes < ANY_NUMBER else "counted from 0"
    remedy = f"Pass distinct class indices {known}, such as {argument}=[0, 1]."

    def refuse(why: str) -> ArgumentError:
        return ArgumentError(argument, f"got {_short(value)}: {why}", remedy)

    if isinstance(value, str | bytes | dict):
        raise refuse(f"a {type(value).__name__} is not a collection of class indices")
    if isinstance(value, Tensor | np.ndarray):
        kind = str(value.dtype)
        if "int" not in kind:
            raise refuse(f"its dtype is {kind}, not an integer type")
        items: list[Any] = value.reshape(-1).tolist()
    elif isinstance(value, Iterable):
        items = list(value)
    else:
        items = [value]
    for item in items:
        if isinstance(item, bool | np.bool_):
            raise refuse("a bool is not a class index")
        if isinstance(item, Tensor) and (
            item.numel() != 1 or item.is_floating_point() or item.dtype == torch.bool
        ):
            raise refuse("it holds a tensor that is not one whole number")
        if not isinstance(item, int | np.integer | Tensor):
            raise refuse(f"{item!r} is a {type(item).__name__}, not an int")
    wanted = [int(item) for item in items]
    if not wanted:
        raise refuse("no class is named")
    if min(wanted) < 0:
        raise refuse(f"{min(wanted)} is negative")
    if max(wanted) >= classes:
        raise refuse(f"{max(wanted)} is out of range, the model has {classes} logits")
    if len(set(wanted)) < len(wanted):
        twice = sorted({c for c in wanted if wanted.count(c) > 1})
        raise refuse(f"{twice} named more than once")
    return sorted(wanted)


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


def _short(value: Any) -> str:
    text = repr(value).replace("\n", " ")
    return text if len(text) <= 80 else text[:77] + "..."


def _probe(shape: Sequence[int], batch: int, device: torch.device) -> Tensor:
    return torch.zeros(batch, *shape, device=device)


@torch.no_grad()
def _last_map_width(
    model: nn.Module, shape: Sequence[int], batch: int, device: torch.device
) -> int:
    """Width of the last feature map; 0 if there is none.

    A feature map is the output [N, C, W, W] of a convolution or [N, W, W, C] of a linear layer.
    """
    width = 0

    def note(module: nn.Module, _args: Any, output: Any) -> None:
        nonlocal width
        if not isinstance(output, Tensor) or output.ndim != 4:
            return
        if isinstance(module, nn.Conv2d):
            width = int(output.shape[-1])
        elif output.shape[1] == output.shape[2]:
            width = int(output.shape[1])

    layers = [m for m in model.modules() if isinstance(m, nn.Conv2d | nn.Linear)]
    hooks = [m.register_forward_hook(note) for m in layers]
    try:
        rows = len(pick_logits(model(_probe(shape, batch, device))))
        if rows != batch:  # as after x.view(-1, 400) of a map that is larger than that
            raise ValueError(f"{rows} rows of output for {batch} images")
    finally:
        for hook in hooks:
            hook.remove()
    return width


def _guess_normalisation(channels: int) -> tuple[tuple[float, ...], tuple[float, ...], str]:
    if channels == 3:
        return IMAGENET_MEAN, IMAGENET_STD, "ImageNet mean and std assumed"
    if channels == 1:
        return (0.1307,), (0.3081,), "MNIST mean and std assumed"
    return (0.5,) * channels, (0.5,) * channels, "mean and std of 0.5 assumed"


def _check_shape(shape: Sequence[int]) -> tuple[int, ...]:
    try:
        result = tuple(int(n) for n in shape)
        whole = all(int(n) == n and not isinstance(n, bool) for n in shape)
    except (TypeError, ValueError):
        result, whole = (), False
    if not whole or len(result) not in (1, 3) or min(result, default=0) < 1:
        raise ArgumentError(
            "input_shape", f"got {shape!r}", "Pass (channels, height, width), each at least 1."
        )
    return result


def _check_channels(name: str, value: float | Sequence[float], channels: int) -> tuple[float, ...]:
    try:
        values = (
            (float(value),) * channels
            if isinstance(value, int | float)
            else tuple(float(v) for v in value)
        )
    except (TypeError, ValueError):
        values = ()
    if len(values) != channels or not all(math.isfinite(v) for v in values):
        raise ArgumentError(
            name,
            f"got {value!r} for images of {channels} channels",
            f"Pass one number, or {channels} of them.",
        )
    return values
