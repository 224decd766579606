"""Kinds of models that can't be changed, each refused in one sentence before any work."""

from __future__ import annotations

import inspect
from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.parameter import is_lazy

from ..errors import ModelError

# How to adapt a model to one image tensor, channels first.
_WRAP = (
    "class Wrapped(torch.nn.Module): def __init__(self, model): super().__init__(); "
    "self.model = model; def forward(self, x): return {}."
)
CHANNELS_LAST = (
    f"Images are passed as [N, channels, height, width]. Wrap it: "
    f"{_WRAP.format('self.model(x.permute(0, 2, 3, 1))')}"
)


def check_kind(model: Any) -> None:
    """Checks that ``model`` is a module whose weights can be trained.

    Raises:
        ModelError: it is no module, or a TorchScript, exported, quantised, sharded, meta or lazy
            one; the message says what to pass instead.
    """
    if isinstance(model, torch.export.ExportedProgram) or _is_exported(model):
        raise ModelError(
            "it is an exported program (torch.export), whose graph is fixed",
            "Unlearn the torch.nn.Module that it was exported from, and export the result.",
        )
    if not isinstance(model, nn.Module):
        return  # `resolve_device` says what it is
    for name, module in model.named_modules():
        where = f"its module {name!r}" if name else "it"
        if isinstance(module, torch.jit.ScriptModule):
            raise ModelError(
                f"{where} is TorchScript, which holds compiled code",
                "Unlearn the torch.nn.Module that it was made from, and script or trace the "
                "result.",
            )
        if (library := _quantised_by(module)) is not None:
            raise _quantised(f"{where} is a quantised {type(module).__name__} of {library}")
        if any(c.__name__ == "FullyShardedDataParallel" for c in type(module).__mro__):
            raise _sharded(f"{where} is wrapped in FullyShardedDataParallel")
    for name, tensor in _own_tensors(model):
        _check_tensor(name, tensor)


def check_forward(model: nn.Module) -> None:
    """Checks that ``model.forward`` can be called with one image tensor.

    Raises:
        ModelError: it takes its images by keyword only, or needs other inputs besides.
    """
    try:
        parameters = inspect.signature(model.forward).parameters.values()
    except (TypeError, ValueError):  # compiled code without a signature
        return
    free = (inspect.Parameter.POSITIONAL_ONLY, inspect.Parameter.POSITIONAL_OR_KEYWORD)
    positional = [p for p in parameters if p.kind in free]
    needed = [p.name for p in positional if p.default is p.empty]
    keywords = [p for p in parameters if p.kind is p.KEYWORD_ONLY]
    needed_keywords = [p.name for p in keywords if p.default is p.empty]
    if any(p.kind is p.VAR_POSITIONAL for p in parameters) and not needed_keywords:
        return
    if len(needed) + len(needed_keywords) > 1:
        names = ", ".join([*needed, *needed_keywords])
        raise ModelError(
            f"its forward() needs {len(needed) + len(needed_keywords)} inputs ({names}), and is "
            f"called with images alone",
            f"Pass a module that fills in the others: {_WRAP.format('self.model(x, ...)')}",
        )
    if not positional and keywords:
        name = (needed_keywords or [keywords[0].name])[0]
        raise ModelError(
            f"its forward() takes its input by keyword only ({name}=)",
            f"Wrap it: {_WRAP.format(f'self.model({name}=x)')}",
        )


def _check_tensor(name: str, tensor: Tensor) -> None:
    if is_lazy(tensor):
        raise ModelError(
            f"{name} is not initialised yet: its layer is lazy",
            "Run the model once on a batch of images, and load its weights, before unlearning.",
        )
    if tensor.is_meta:
        raise ModelError(
            f"{name} is on the device 'meta', which holds no numbers",
            "Build the model on 'cpu', or call to_empty(device='cpu') and load its weights.",
        )
    kind = type(tensor)
    if kind.__name__ == "DTensor":
        raise _sharded(f"{name} is a DTensor")
    if kind not in (Tensor, nn.Parameter, nn.Buffer) and "quant" in kind.__module__ + kind.__name__:
        raise _quantised(f"{name} is a {kind.__name__}")
    packed = isinstance(tensor, nn.Parameter) and tensor.ndim > 1 and tensor.itemsize == 1
    if tensor.is_quantized or (packed and tensor.dtype != torch.bool):
        raise _quantised(f"{name} is {tensor.dtype}")


def _own_tensors(model: nn.Module) -> Iterator[tuple[str, Tensor]]:
    yield from model.named_parameters()
    yield from model.named_buffers()


def _quantised_by(module: nn.Module) -> str | None:
    """The library of a quantised layer; None for any other. Those of QAT still hold floats."""
    package = type(module).__module__
    if package.startswith(("torch.ao.nn", "torch.nn")) and ".quantized" in package:
        return None if ".reference" in package else "torch"
    library = package.partition(".")[0]
    return library if library in ("bitsandbytes", "auto_gptq", "gptqmodel", "awq", "hqq") else None


def _is_exported(model: Any) -> bool:
    """Whether it was made from an exported program, by ``module()`` or by unflattening it."""
    if type(model).__name__ == "UnflattenedModule":
        return True
    if not isinstance(model, torch.fx.GraphModule):
        return False
    return "_guards_fn" in dict(model.named_children()) or (
        getattr(vars(model).get("train"), "__name__", "") == "_train"
    )


def _quantised(what: str) -> ModelError:
    return ModelError(
        f"{what}: weights of 8 bits or fewer can't be trained",
        "Unlearn the model in floating point, before quantising it, and quantise the result.",
    )


def _sharded(what: str) -> ModelError:
    return ModelError(
        f"{what}: each process holds only a part of its weights",
        "Gather the full state dict, load it into the plain module, unlearn that, and shard the "
        "result.",
    )
