"""Symbolic tracing that does not disturb other threads.

While torch.fx traces, it replaces ``nn.Module.__call__`` for the whole process. Without care, a
model that another thread runs meanwhile would be traced too, and raise.
"""

from __future__ import annotations

import logging
import threading
from collections.abc import Callable
from typing import Any

import torch
from torch import nn

_log = logging.getLogger(__name__)


class Tracer(torch.fx.Tracer):
    """A tracer that records calls of the thread that created it, and passes on all others."""

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
        """Traces once; afterwards the tracer is empty.

        torch.fx leaves functions behind that refer to the tracer, so it must not refer to a model.
        """
        try:
            return super().trace(*args, **kwargs)
        finally:
            vars(self).clear()


def trace(model: nn.Module, tracer: Tracer | None = None) -> torch.fx.GraphModule:
    """``torch.fx.symbolic_trace(model)`` with ``tracer``, without the result's reference cycles."""
    graph = (tracer or Tracer()).trace(model)
    traced = torch.fx.GraphModule(model, graph, type(model).__name__)
    break_reference_cycles(traced)
    return traced


def trace_or_none(
    model: nn.Module, otherwise: str, tracer: Tracer | None = None
) -> torch.fx.GraphModule | None:
    """A traced ``model``, which may be one already; None if torch.fx can't trace it.

    ``otherwise`` says in the log what follows from that.
    """
    if isinstance(model, torch.fx.GraphModule):
        return model
    try:
        return trace(model, tracer)
    except Exception as error:  # noqa: BLE001  a model's own code may raise anything
        _log.info("%s: %s", otherwise, error)
        return None


def break_reference_cycles(*models: nn.Module) -> None:
    """Removes the references from the graphs in ``models`` to their modules.

    These cycles keep all weights alive until Python's garbage collector runs, which may be many
    calls later.
    """
    for model in models:
        for module in model.modules():
            if isinstance(module, torch.fx.GraphModule):
                module.graph.owning_module = None
