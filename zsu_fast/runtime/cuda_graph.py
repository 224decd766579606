"""Captures steps in a CUDA graph."""

from __future__ import annotations

from collections.abc import Callable

import torch


def warm_up(run: Callable[[], None], device: torch.device) -> None:
    """Calls ``run`` on a side stream before capture, so that libraries and memory are set up."""
    side = torch.cuda.Stream(device)
    side.wait_stream(torch.cuda.current_stream(device))
    with torch.cuda.stream(side):
        run()
    torch.cuda.current_stream(device).wait_stream(side)


def capture(run: Callable[[], None]) -> torch.cuda.CUDAGraph:
    """Returns a graph that replays the kernels of ``run``; call `warm_up` first."""
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        run()
    return graph
