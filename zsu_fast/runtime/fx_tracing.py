"""Symbolic tracing that leaves other threads alone.

While torch.fx traces, it replaces ``nn.Module.__call__`` for the whole process: a model that
another thread serves meanwhile would end up in the trace, and raise there.
"""

from __future__ import annotations

import threading
from collections.abc import Callable
from typing import Any

import torch
from torch import nn


class Tracer(torch.fx.Tracer):
    """A tracer that sees the calls of the thread that it was made in, and passes on all others."""

    def __init__(self) -> None:
        super().__init__()
        self._thread = threading.get_ident()

    def call_module(
        self, m: nn.Module, forward: Callable[..., Any], args: Any, kwargs: dict[str, Any]
    ) -> Any:
        if threading.get_ident() != self._thread:
            return forward(*args, **kwargs)
        return super().call_module(m, forward, args, kwargs)

    def trace(self, *args: Any, **kwargs: Any) -> torch.fx.Graph:
        """Once only: functions that it patched keep the tracer, which then keeps no model."""
        try:
            return super().trace(*args, **kwargs)
        finally:
            self.__dict__.clear()


def trace(model: nn.Module, tracer: Tracer | None = None) -> torch.fx.GraphModule:
    """``torch.fx.symbolic_trace(model)`` by ``tracer``, or one of that kind; see `break_reference_cycles`."""
    graph = (tracer or Tracer()).trace(model)
    traced = torch.fx.GraphModule(model, graph, type(model).__name__)
    break_reference_cycles(traced)
    return traced


def break_reference_cycles(*models: nn.Module) -> None:
    """Takes the graphs' references to their modules out of our own ``models``.

    They close circles that keep all weights until Python's garbage collector comes by, which
    may be many calls later.
    """
    for model in models:
        for module in model.modules():
            if isinstance(module, torch.fx.GraphModule):
                module.graph.owning_module = None
