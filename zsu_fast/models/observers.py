"""Forward hooks of the user's: which of them are part of the model, and which only look on.

A hook that collects activations must not run in our copies: it would put their tensors into the
user's own lists. One that changes what a layer computes has to.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

# Attributes of a module that hold hooks by id.
_FORWARD = ("_forward_pre_hooks", "_forward_hooks")
_BACKWARD = ("_backward_pre_hooks", "_backward_hooks")


def without_hooks(model: nn.Module) -> dict[int, Any]:
    """Returns a memo for ``copy.deepcopy(model, memo)`` whose result has no hooks of the user's.

    Those of torch.nn.utils stay (weight_norm, spectral_norm, pruning): they compute weights.
    """
    memo: dict[int, Any] = {}
    for module in model.modules():
        for name in (*_FORWARD, *_BACKWARD):
            hooks = getattr(module, name, None)
            if hooks and not all(_of_torch(hook) for hook in hooks.values()):
                kept = [(key, hook) for key, hook in hooks.items() if _of_torch(hook)]
                memo[id(hooks)] = type(hooks)(kept)
    return memo


def has_hooks(model: nn.Module) -> bool:
    """Whether a module has a forward hook that torch.nn.utils has not put there."""
    return next(_forward_hooks(model), None) is not None


def _forward_hooks(model: nn.Module) -> Iterator[tuple[Any, int]]:
    for module in model.modules():
        for name in _FORWARD:
            hooks = getattr(module, name)
            yield from ((hooks, key) for key, hook in list(hooks.items()) if not _of_torch(hook))


def _of_torch(hook: Any) -> bool:
    return type(hook).__module__.startswith("torch.nn.utils.")


@torch.no_grad()
def remove_observers(copied: nn.Module, images: Tensor) -> list[str]:
    """Removes the hooks without which a copy computes the same; returns the names of the others.

    To find out, each runs once or more on ``images``; what a hook keeps in lists, dicts, sets and
    attributes that it refers to directly is put back.

    Args:
        copied: a copy of the user's model, with its hooks.
        images: two or more.
    """
    kept = []
    with _state_put_back([hooks[key] for hooks, key in _forward_hooks(copied)]):
        want = _tensors(copied(images))
        for hooks, key in list(_forward_hooks(copied)):
            hook, hooks[key] = hooks[key], _nothing
            try:
                got = _tensors(copied(images))
            except Exception:  # noqa: BLE001  the model needs it
                got = []
            if len(got) != len(want) or any(map(_differ, got, want)):
                hooks[key] = hook
                kept.append(getattr(hook, "__qualname__", type(hook).__name__))
    for hooks, key in list(_forward_hooks(copied)):
        if hooks[key] is _nothing:
            del hooks[key]
    return kept


def _nothing(*_args: Any, **_kwargs: Any) -> None:
    """A hook in the place of another."""


def _differ(a: Tensor, b: Tensor) -> bool:
    return a.shape != b.shape or not torch.equal(a, b)


def _tensors(output: Any) -> list[Tensor]:
    leaves = torch.utils._pytree.tree_leaves(output)
    found = [leaf for leaf in leaves if isinstance(leaf, Tensor)]
    return found or [v for v in vars(output).values() if isinstance(v, Tensor)]


@contextmanager
def _state_put_back(hooks: list[Any]) -> Iterator[None]:
    """Puts back what the hooks' closures, defaults, globals and own attributes hold."""
    held: list[Any] = []
    for hook in hooks:
        hook = getattr(hook, "func", hook)
        held.append(getattr(hook, "__self__", hook))
        code = getattr(hook, "__code__", None)
        held += [cell.cell_contents for cell in getattr(hook, "__closure__", None) or ()]
        held += getattr(hook, "__defaults__", None) or ()
        if code is not None:
            named = hook.__globals__
            held += [named[name] for name in code.co_names if name in named]
    held = [vars(h) if hasattr(h, "__dict__") and not callable(h) else h for h in held]
    saved = [(h, h.copy()) for h in held if isinstance(h, list | dict | set)]
    try:
        yield
    finally:
        for container, content in saved:
            container.clear()
            container.extend(content) if isinstance(container, list) else container.update(content)
