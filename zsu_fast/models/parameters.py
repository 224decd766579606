"""A model's parameters and buffers: hash them, replace some of them safely, copy the model."""

from __future__ import annotations

import copy
import hashlib
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from ..errors import ModelError
from .caches import clear_caches
from .observers import without_hooks
from .rebinding import rebind_functions

# The remedy for a model that can't be copied.
UNCOPYABLE = "Remove attributes that cannot be copied, such as open files and locks."


def unwrap(model: nn.Module) -> nn.Module:
    """Removes the wrappers of ``torch.compile`` and (Distributed)DataParallel, however nested."""
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
    """Returns a memo for ``copy.deepcopy(model, memo)`` with detached copies of computed tensors.

    ``copy.deepcopy`` refuses tensors that autograd computed. ``nn.utils.weight_norm`` stores such
    tensors in attributes and computes them anew in each forward pass; some of timm's models keep
    them in a dict.
    """
    held = (value for module in model.modules() for value in _flat(vars(module).values()))
    return {id(v): v.detach().clone() for v in held if isinstance(v, Tensor) and not v.is_leaf}


def _flat(values: Iterable[Any], depth: int = 3) -> Iterator[Any]:
    """``values``, and what the dicts, lists and tuples among them hold."""
    for value in values:
        if isinstance(value, dict | list | tuple) and depth:
            yield from _flat(value.values() if isinstance(value, dict) else value, depth - 1)
        else:
            yield value


def state(model: nn.Module) -> dict[str, Tensor]:
    """Parameters and buffers by name, also non-persistent ones; tied tensors appear once."""
    return dict(model.named_parameters()) | dict(model.named_buffers())


def saved_tensors(model: nn.Module) -> dict[str, Tensor]:
    """The tensors in ``state_dict()``; they share memory with the model."""
    return {n: t for n, t in unwrap(model).state_dict().items() if isinstance(t, Tensor)}


def as_bytes(tensor: Tensor) -> Tensor:
    """The bytes of ``tensor`` as uint8 [n] on the CPU."""
    return tensor.detach().cpu().contiguous().flatten().view(torch.uint8)


def weights_hash(model: nn.Module) -> str:
    """SHA-256 of the names, dtypes, shapes and bytes in ``model.state_dict()``, 64 hex digits."""
    digest = hashlib.sha256()
    for name, tensor in sorted(saved_tensors(model).items()):
        digest.update(f"{name}|{tensor.dtype}|{tuple(tensor.shape)}|".encode())
        digest.update(as_bytes(tensor).numpy().tobytes())
    return digest.hexdigest()


def replace_parameters(model: nn.Module, values: dict[str, Tensor]) -> None:
    """Copies ``values`` into the parameters and buffers of the same names: all of them, or none.

    They keep their device, dtype, identity and ``requires_grad``.
    """
    named = state(unwrap(model))
    with restored_on_failure(model, values), torch.no_grad():
        for name, value in values.items():
            named[name].copy_(value)
        clear_caches(unwrap(model))


@contextmanager
def restored_on_failure(model: nn.Module, names: Iterable[str]) -> Iterator[None]:
    """If the block raises, by Ctrl-C too, restores the bits of these parameters and buffers."""
    named = state(unwrap(model))
    before = {name: named[name].detach().clone() for name in names}
    try:
        yield
    except BaseException:
        with torch.no_grad():
            for name, value in before.items():
                named[name].copy_(value)
        raise


def deep_copy(
    model: nn.Module, remedy: str, shared: Mapping[int, Tensor] | None = None, hooks: bool = True
) -> nn.Module:
    """``copy.deepcopy(model)``, also with what it can't copy, or copies by reference.

    That is: computed tensors in attributes (`computed_tensors`), and functions that refer to the
    model's layers (`rebind_functions`).

    Args:
        model: the model; it is not changed.
        remedy: completes the message of the error.
        shared: tensors that the copy shares with the model, by id.
        hooks: False leaves out hooks other than those of torch.nn.utils (`without_hooks`).

    Raises:
        ModelError: the model can't be copied.
    """
    memo: dict[int, Any] = computed_tensors(model) | dict(shared or {})
    try:
        if not hooks:
            memo |= without_hooks(model)
        copied = copy.deepcopy(model, memo)
        rebind_functions(model, memo)
        return copied
    except Exception as error:
        raise ModelError(
            f"{type(model).__name__} cannot be copied by copy.deepcopy ({error})", remedy
        ) from error
