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


def trace(model: nn.Module) -> torch.fx.GraphModule:
    """``torch.fx.symbolic_trace(model)`` by that tracer."""
    return torch.fx.GraphModule(model, Tracer().trace(model), type(model).__name__)
