"""A model's parameters and buffers by name: their hash, and replacing some of them safely."""

from __future__ import annotations

import copy
import hashlib
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from ..errors import ModelError

# What to do about a model that can't be copied.
UNCOPYABLE = "Remove what cannot be copied: open files, locks, non-leaf tensors in attributes."


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


def replace_parameters(model: nn.Module, values: dict[str, Tensor]) -> None:
    """Writes ``values`` over the parameters of those names: all of them, or none.

    They keep their device, dtype, identity and ``requires_grad``.
    """
    named = dict(unwrap(model).named_parameters())
    with restored_on_failure(model, values), torch.no_grad():
        for name, value in values.items():
            named[name].copy_(value)


@contextmanager
def restored_on_failure(model: nn.Module, names: Iterable[str]) -> Iterator[None]:
    """Where the block raises, Ctrl-C included, these parameters get their old bits again."""
    named = dict(unwrap(model).named_parameters())
    before = {name: named[name].detach().clone() for name in names}
    try:
        yield
    except BaseException:
        with torch.no_grad():
            for name, value in before.items():
                named[name].copy_(value)
        raise


def deep_copy(model: nn.Module, remedy: str) -> nn.Module:
    """``copy.deepcopy(model)``, also where autograd made tensors that are kept in attributes.

    Raises:
        ModelError: it can't be copied; ``remedy`` says what to do instead.
    """
    try:
        return copy.deepcopy(model, computed_tensors(model))
    except Exception as error:
        raise ModelError(
            f"{type(model).__name__} cannot be copied by copy.deepcopy ({error})", remedy
        ) from error
