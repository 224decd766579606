"""Captures steps in CUDA graphs, and falls back to eager steps where that is not possible."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Sequence
from typing import Literal, get_args

import torch
from torch import Tensor

from ..errors import ArgumentError, UnlearningWarning
from .memory import is_out_of_memory

Loop = Literal["auto", "eager", "compiled", "graph"]
LOOPS: tuple[str, ...] = get_args(Loop)


def warm_up(run: Callable[[], None], device: torch.device) -> None:
    """Calls ``run`` on a side stream before capture, so that libraries and memory are set up."""
    side = torch.cuda.Stream(device)
    side.wait_stream(torch.cuda.current_stream(device))
    try:
        with torch.cuda.stream(side):
            run()
    finally:
        torch.cuda.current_stream(device).wait_stream(side)


def capture(run: Callable[[], None]) -> torch.cuda.CUDAGraph:
    """Returns a graph that replays the kernels of ``run``; call `warm_up` first.

    What other threads do on the device, such as serving a model, neither ends the capture nor is
    affected by it.
    """
    graph, stream = torch.cuda.CUDAGraph(), torch.cuda.current_stream()
    generator = torch.cuda.default_generators[stream.device.index]
    before, captured = generator.clone_state(), False
    try:
        with torch.cuda.graph(graph, capture_error_mode="thread_local"):
            run()
        captured = True
    finally:
        torch.cuda.set_stream(stream)  # a failed capture leaves its own stream as the current one
        if not captured:  # and the generator in capture mode, in which random numbers raise
            generator.graphsafe_set_state(before)
    return graph


class GraphCapturer:
    """Captures the steps of one loop until a capture fails; from then on the loop runs eagerly.

    Args:
        name: of the loop, for the message.
        required: whether a failure is an error rather than a warning.

    Attributes:
        failed: whether a capture failed; no other is tried.
    """

    def __init__(self, name: str, required: bool = False) -> None:
        self.name, self.required, self.failed = name, required, False

    def try_capture(
        self,
        first_steps: Callable[[], None],
        steps: Callable[[], None],
        state: Sequence[Tensor],
        can_shrink: bool = False,
    ) -> torch.cuda.CUDAGraph | None:
        """Returns a graph of ``steps``, after it has run ``first_steps``; None if that fails.

        Args:
            first_steps: warms up; what it changes stays changed if the capture succeeds.
            steps: what is captured.
            state: every tensor that the two change; restored if either of them fails.
            can_shrink: whether the caller goes on with smaller batches, in graphs, if memory runs
                out.

        Raises:
            ArgumentError: it fails, and the graph is required.
            RuntimeError: memory ran out, and the caller ``can_shrink``.

        Warns:
            UnlearningWarning: the first failure, with its cause.
        """
        if self.failed:
            return None
        before = [tensor.detach().clone() for tensor in state]
        try:
            warm_up(first_steps, state[0].device)
            return capture(steps)
        # Whatever a model raises while it is captured, it may well run eagerly.
        except Exception as error:
            with torch.no_grad():
                for tensor, old in zip(state, before, strict=True):
                    tensor.copy_(old)
            if can_shrink and is_out_of_memory(error):
                raise
            self.failed = True
            # an error within the block also ends the capture, which then raises another
            cause = error.__context__ or error
            text = f"{type(cause).__name__}: {cause}"
        if self.required:
            raise ArgumentError(
                "loop", f"got 'graph', and the capture of {self.name} failed: {text}",
                "Pass loop='auto'.",
            )  # fmt: skip
        warnings.warn(
            f"{self.name} runs eagerly, which is slower: its capture in a CUDA graph failed "
            f"({text}). Pass loop='eager' to run it so without this warning.",
            UnlearningWarning,
            stacklevel=2,
        )
        return None
