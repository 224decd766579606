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
    graph, stream = torch.cuda.CUDAGraph(), torch.cuda.current_stream()
    try:
        with torch.cuda.graph(graph):
            run()
    finally:  # a capture that fails would leave its own stream as the current one
        torch.cuda.set_stream(stream)
    return graph
