"""Measures seconds and peak memory of the stages of a run."""

from __future__ import annotations

import time
from pathlib import Path

import torch


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
        peak = _process_status("VmHWM")
        if peak is None:  # macOS, in bytes there
            import resource

            peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
        return peak

    def _reset(self) -> None:
        if self.device.type == "cuda":
            torch.cuda.reset_peak_memory_stats(self.device)
            return
        try:
            Path("/proc/self/clear_refs").write_text("5")
        except OSError:  # not Linux, or not allowed: the peak since the start counts then
            return


def _process_status(name: str) -> int | None:
    """A line of the process's status, in bytes; None where the system has none."""
    try:
        lines = Path("/proc/self/status").read_text().splitlines()
    except OSError:
        return None
    return next((int(x.split()[1]) * 1024 for x in lines if x.startswith(f"{name}:")), None)
