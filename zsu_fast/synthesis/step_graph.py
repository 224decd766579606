"""Takes ascent steps: one at a time on a CPU, some at a time in a CUDA graph on a GPU."""

from __future__ import annotations

from collections.abc import Callable

import torch

from ..runtime.cuda_graph import GraphCapturer, Loop
from .active_batch import ActiveBatch

# On a GPU, the host looks for finished points after this many steps.
STEPS_PER_GRAPH = 4


class StepGraph:
    """Calls a step of the ascent some times, `STEPS_PER_GRAPH` times on a GPU.

    There the steps are captured in a CUDA graph, once per batch and objective. If a capture fails,
    the batch is as it was before, and all steps to come run eagerly, those of other batches too.

    Args:
        loop: "eager" captures nothing, "graph" requires a graph; "auto" and "compiled" capture on
            a GPU if possible.
        device: where the batches are.
    """

    def __init__(self, loop: Loop, device: torch.device) -> None:
        self.count = STEPS_PER_GRAPH if device.type == "cuda" else 1
        self.capturer = None
        if device.type == "cuda" and loop != "eager":
            self.capturer = GraphCapturer("the ascent of the impressions", loop == "graph")
        self.forget()

    def forget(self) -> None:
        """Frees the graph and the memory that it holds."""
        self._graph: torch.cuda.CUDAGraph | None = None
        self._batch: ActiveBatch | None = None
        self._penalises = False

    def run(self, step: Callable[[ActiveBatch], None], batch: ActiveBatch) -> None:
        """Takes ``step`` on ``batch``, the same function for the same batch."""
        if self.capturer is not None and not self.capturer.failed:
            if self._batch is not batch or self._penalises != batch.penalises:
                self.forget()
                self._graph = self.capturer.try_capture(
                    lambda: _repeat(step, batch, 3),  # the first steps of this batch
                    lambda: _repeat(step, batch, self.count),
                    batch.tensors(),
                    can_shrink=len(batch.index) > 1,
                )
                self._batch, self._penalises = batch, batch.penalises
            if self._graph is not None:
                self._graph.replay()
                return
        _repeat(step, batch, self.count)


def _repeat(step: Callable[[ActiveBatch], None], batch: ActiveBatch, times: int) -> None:
    for _ in range(times):
        step(batch)
