"""Measures multiply-adds of a module, and seconds and peak memory of the stages of a run."""

from __future__ import annotations

import time
from contextlib import suppress
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from .hooks import forward_hooks
from .memory import proc_bytes


def multiply_adds(module: nn.Module, *inputs: Tensor) -> int:
    """Returns the multiply-adds of the convolutions and linear layers in ``module(*inputs)``.

    ``torch.utils.flop_counter.FlopCounterMode`` gives the same counts for these layers, but takes 2
    to 4 times as long and hooks every module of the process, including those that other threads
    run.
    """
    total = 0

    def count(layer: nn.Module, _args: Any, output: Any) -> None:
        nonlocal total
        weight = layer.weight
        if isinstance(output, Tensor) and isinstance(weight, Tensor):
            total += output.numel() * weight[0].numel()

    layers = [m for m in module.modules() if isinstance(m, nn.Conv2d | nn.Linear)]
    with forward_hooks(layers, count), torch.no_grad():
        module(*inputs)
    return total


class Stopwatch:
    """Seconds between laps; on a GPU all queued work is finished first."""

    def __init__(self, device: torch.device) -> None:
        self.device = device
        self._before = self._now()

    def lap(self) -> float:
        """Seconds since the lap before, or since the stopwatch was made."""
        before, self._before = self._before, self._now()
        return self._before - before

    def _now(self) -> float:
        if self.device.type == "cuda":
            torch.cuda.synchronize(self.device)
        return time.perf_counter()


class PeakMemory:
    """Peak memory of each stage: of the process on a CPU, of the allocator on a GPU.

    Attributes:
        peaks: bytes by stage.
    """

    def __init__(self, device: torch.device) -> None:
        self.device = device
        self.peaks: dict[str, int] = {}
        self._reset()

    def end_stage(self, stage: str, more: int = 0) -> None:
        """Notes the peak of a stage that will need ``more`` bytes in the full run."""
        self.peaks[stage] = self._peak() + more
        self._reset()

    def _peak(self) -> int:
        if self.device.type == "cuda":
            return torch.cuda.max_memory_allocated(self.device)
        peak = proc_bytes("self/status", "VmHWM")
        if peak is None:  # macOS, in bytes there
            import resource

            peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
        return peak

    def _reset(self) -> None:
        if self.device.type == "cuda":
            torch.cuda.reset_peak_memory_stats(self.device)
        else:  # if it can't be reset (not Linux, or not allowed), the peak since the start counts
            with suppress(OSError):
                Path("/proc/self/clear_refs").write_text("5")
