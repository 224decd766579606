"""Forward hooks that are removed at the end of a block."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from contextlib import ExitStack, contextmanager
from typing import Any

from torch import Tensor, nn


@contextmanager
def forward_hooks(modules: Iterable[nn.Module], hook: Callable[..., Any]) -> Iterator[None]:
    """Calls ``hook(module, args, output)`` after each forward pass of ``modules`` in the block."""
    with ExitStack() as handles:
        for module in modules:
            handles.enter_context(module.register_forward_hook(hook))
        yield


@contextmanager
def forward_pre_hooks(modules: Iterable[nn.Module], hook: Callable[..., Any]) -> Iterator[None]:
    """Calls ``hook(module, args, kwargs)`` before each forward pass of ``modules`` in the block."""
    with ExitStack() as handles:
        for module in modules:
            handles.enter_context(module.register_forward_pre_hook(hook, with_kwargs=True))
        yield


@contextmanager
def recorded_inputs(module: nn.Module) -> Iterator[list[Tensor]]:
    """Yields a list that gets the first argument of each call of ``module`` in the block."""
    inputs: list[Tensor] = []

    def record(_module: nn.Module, args: Any, _kwargs: Any) -> None:
        inputs.append(args[0])

    with forward_pre_hooks((module,), record):
        yield inputs
