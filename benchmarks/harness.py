"""Timing for the op benchmarks, and what all benchmarks share: results folder, machine, children.

The contenders of a row are timed in turn, round after round, so that a busy machine slows all of
them alike; the median over rounds is reported. On a CPU, everything runs on one thread and the
clock is that thread's CPU time: other processes count only through what they do to the caches. On
a GPU, calls are captured in a CUDA graph whose replays are timed by events, so that kernels are
measured and Python is not; "(called)" marks what can't be captured. Warm-up and compilation are
excluded. A contender may check its output: `verify` receives that of the last call.
"""

from __future__ import annotations

import csv
import json
import os
import platform
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from zsu_fast.runtime.nvml import GpuState, gpu_state

RESULTS = Path(os.environ.get("OUT", Path(__file__).parent / "results"))
GRAPH_CALLS = 6  # inputs rotate among 2 or 3
DEVICE = "cuda" if torch.cuda.is_available() else "cpu"


@dataclass
class Contender:
    """One way to do the work."""

    name: str
    run: Callable[[], Any]
    verify: Callable[[Any], None] | None = None


@dataclass
class Row:
    """A row of a table; times are in seconds per call."""

    case: str
    contender: str
    median: float
    low: float
    high: float
    speedup: float  # over the first contender
    floor: float  # multiple of the floor's time; nan without a floor
    gigabytes: float  # per second, counting only unavoidable traffic
    # of the GPU while the row was measured, see GpuLog.facts
    sm_clock: str = ""
    power: str = ""
    temperature: str = ""
    throttled: str = ""


@dataclass
class Table:
    """All rows of one benchmark file, written to the results folder at its end.

    If the GPU was throttled during any of them, `write` writes ``throttled_...`` instead and raises
    `Throttled`: such figures must not be taken for results.
    """

    name: str
    title: str
    rows: list[Row] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)

    def write(self) -> None:
        RESULTS.mkdir(parents=True, exist_ok=True)
        slow = [row for row in self.rows if row.throttled]
        target = RESULTS / f"{'throttled_' if slow else ''}{DEVICE}_{self.name}"
        with target.with_suffix(".csv").open("w", newline="") as file:
            writer = csv.writer(file)
            writer.writerow([*Row.__dataclass_fields__, *machine()])
            for row in self.rows:
                writer.writerow([*vars(row).values(), *machine().values()])
        lines = [f"# {self.title}", "", ", ".join(f"{k}: {v}" for k, v in machine().items()), ""]
        lines += [
            "| case | contender | median | 10 % to 90 % | speed-up | x floor | GB/s |",
            "|---|---|---:|---:|---:|---:|---:|",
        ]
        for row in self.rows:
            floor = f"{row.floor:.2f}" if row.floor == row.floor else ""
            rate = f"{row.gigabytes:.1f}" if row.gigabytes == row.gigabytes else ""
            lines.append(
                f"| {row.case} | {row.contender} | {duration(row.median)}"
                f" | {duration(row.low)} to {duration(row.high)}"
                f" | {row.speedup:.2f} | {floor} | {rate} |"
            )
        notes = [*self.notes, *self._gpu_notes()]
        lines += ["", *(f"- {note}" for note in notes), ""]
        target.with_suffix(".md").write_text("\n".join(lines))
        if slow:
            causes = sorted({row.throttled for row in slow})
            raise Throttled(f"{target.name}: no result, the GPU was throttled: {'; '.join(causes)}")

    def _gpu_notes(self) -> list[str]:
        """Clocks, power and temperature of each case, once each."""
        known = [row for row in self.rows if row.sm_clock]
        return list(dict.fromkeys(
            f"{row.case}: {row.sm_clock} at least, {row.power} and {row.temperature} at most"
            + (f", throttled: {row.throttled}" if row.throttled else "")
            for row in known
        ))  # fmt: skip


def duration(seconds: float) -> str:
    """Seconds as text, in ms or us."""
    return f"{seconds * 1e3:.2f} ms" if seconds >= 1e-3 else f"{seconds * 1e6:.1f} us"


def machine() -> dict[str, str]:
    """The machine, torch and the load at the time of measuring."""
    facts = {
        "processor": processor(),
        "device": torch.cuda.get_device_name() if DEVICE == "cuda" else "cpu",
        "torch": torch.__version__,
        "threads": str(torch.get_num_threads()),
        "clock": "CUDA events" if DEVICE == "cuda" else "CPU time of the thread",
        "load": f"{os.getloadavg()[0]:.1f} on {os.cpu_count()} cores",
    }
    if DEVICE == "cuda":
        facts |= gpu_facts()
    return facts


def processor() -> str:
    """The CPU's name."""
    info = Path("/proc/cpuinfo")
    if info.exists():
        for line in info.read_text().splitlines():
            if line.startswith("model name"):
                return line.partition(":")[2].strip()
    return platform.processor() or platform.machine()


def run_child(module: str, *arguments: str) -> dict[str, Any]:
    """Runs ``python -m module arguments`` and returns the JSON object on its last line."""
    command = [sys.executable, "-m", module, *arguments]
    done = subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True)
    result: dict[str, Any] = json.loads(done.stdout.splitlines()[-1])
    return result


def gpu_facts() -> dict[str, str]:
    """The GPU's state by NVML, or the reason why it is unknown."""
    return {"gpu": str(gpu_state())}


class Throttled(RuntimeError):
    """The card ran below its clocks while it was measured: the figures are no results."""


class GpuLog:
    """Notes the GPU's state while it works. Time spent asking for it is not measured: the host
    asks while kernels are in flight.
    """

    def __init__(self) -> None:
        self.states: list[GpuState] = []

    def note(self) -> None:
        """Notes the state now, on a GPU whose state is known."""
        state = gpu_state() if DEVICE == "cuda" else "no GPU"
        if isinstance(state, GpuState):
            self.states.append(state)

    def facts(self) -> dict[str, str]:
        """The states since the last call: lowest clock, most power, highest temperature, and
        every reason for throttling; empty strings if nothing is known.
        """
        states, self.states = self.states, []
        if not states:
            return dict.fromkeys(("sm_clock", "power", "temperature", "throttled"), "")
        reasons = {reason: None for state in states for reason in state.throttled}
        return {
            "sm_clock": f"{min(state.sm_clock for state in states)} MHz",
            "power": f"{max(state.power for state in states):.0f} W",
            "temperature": f"{max(state.temperature for state in states)} C",
            "throttled": ", ".join(reasons),
        }


GPU_LOG = GpuLog()


def race(
    contenders: Sequence[Contender], rounds: int = 41, budget: float = 0.01, capture: bool = True
) -> dict[str, list[float]]:
    """Times the contenders in turn.

    Args:
        contenders: what to time.
        rounds: measurements per contender.
        budget: seconds per measurement.
        capture: on a GPU, time graphs of ``GRAPH_CALLS`` calls where they can be captured.

    Returns:
        Seconds per call of every measurement, by contender.
    """
    if DEVICE == "cuda":
        rounds = min(rounds, 15)  # events hardly scatter
    else:
        capture = False
    calls: dict[str, int] = {}
    run: dict[str, Callable[[], Any]] = {}
    shares: dict[str, int] = {}  # calls in one run
    times: dict[str, list[float]] = {}
    for contender in contenders:
        for _ in range(3):
            contender.run()
        graph, output = captured(contender.run) if capture else (None, None)
        name = f"{contender.name} (called)" if capture and graph is None else contender.name
        run[name] = graph.replay if graph else contender.run
        shares[name] = GRAPH_CALLS if graph else 1
        if graph and contender.verify:
            graph.replay()
            torch.cuda.synchronize()
            contender.verify(output)
        once = measure(run[name], 1)
        calls[name] = max(1, min(1000, int(budget / max(once, 1e-7))))
        times[name] = []
    for _ in range(rounds):
        for name, action in run.items():
            for _ in range(3):  # bring its own code back into the caches
                action()
            times[name].append(measure(action, calls[name]) / shares[name])
    for contender in contenders:
        if contender.verify:
            contender.verify(contender.run())
    return times


def captured(run: Callable[[], Any]) -> tuple[Any, Any]:
    """Captures ``GRAPH_CALLS`` calls; the graph and the last output, or (None, None) on failure."""
    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        for _ in range(3):
            run()
    torch.cuda.current_stream().wait_stream(side)
    graph = torch.cuda.CUDAGraph()
    try:
        with torch.cuda.graph(graph):
            for _ in range(GRAPH_CALLS):
                output = run()
    except RuntimeError:
        torch.cuda.synchronize()
        return None, None
    return graph, output


def measure(run: Callable[[], Any], calls: int) -> float:
    """Seconds per call, over ``calls`` calls."""
    if DEVICE == "cuda":
        start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        torch.cuda.synchronize()
        start.record()
        for _ in range(calls):
            run()
        end.record()
        GPU_LOG.note()
        torch.cuda.synchronize()
        return float(start.elapsed_time(end)) / 1e3 / calls
    begin = time.thread_time()
    for _ in range(calls):
        run()
    return (time.thread_time() - begin) / calls


def compare(
    table: Table,
    case: str,
    contenders: Sequence[Contender],
    floor: str | None = None,
    floor_bytes: float = float("nan"),
    **options: Any,
) -> dict[str, float]:
    """Times the contenders and adds their rows to the table.

    Args:
        table: receives the rows.
        case: what all of them do, in words.
        contenders: the first is the base of the speed-ups.
        floor: name of the contender that is a lower bound of the cost.
        floor_bytes: bytes that it moves.
        **options: of `race`.

    Returns:
        Median seconds per call, by contender.
    """
    times = race(contenders, **options)
    gpu = GPU_LOG.facts()
    medians = {name: statistics.median(values) for name, values in times.items()}
    base = next(iter(medians.values()))
    if floor is not None and floor not in medians:
        floor += " (called)"
    for name, values in times.items():
        ordered = sorted(values)
        table.rows.append(
            Row(
                case=case,
                contender=name,
                median=medians[name],
                low=ordered[len(ordered) // 10],
                high=ordered[-1 - len(ordered) // 10],
                speedup=base / medians[name],
                floor=medians[name] / medians[floor] if floor else float("nan"),
                gigabytes=floor_bytes / medians[name] / 1e9,
                **gpu,
            )
        )
    return medians


def rotate(count: int) -> Callable[[], int]:
    """Counts 0, 1, ..., count - 1, 0, ...: inputs take turns, so that none is still in cache."""
    at = -1

    def following() -> int:
        nonlocal at
        at = (at + 1) % count
        return at

    return following


class RotatingLogits:
    """Copies of one batch of logits that take turns, so that none stays in the cache.

    Args:
        leaves: float [N, C] each, with gradients.
    """

    def __init__(self, leaves: list[Tensor]) -> None:
        self.leaves, self.logits = leaves, [x.detach() for x in leaves]
        self.following, self.at = rotate(len(leaves)), 0

    def next_logits(self) -> Tensor:
        self.at = self.following()
        return self.logits[self.at]

    def with_autograd(self, loss: Callable[[Tensor], Tensor]) -> Callable[[], Tensor]:
        """Returns a function that computes the gradient of ``loss`` on the next copy."""

        def run() -> Tensor:
            self.at = self.following()
            x = self.leaves[self.at]
            (grad,) = torch.autograd.grad(loss(x), x)
            return grad

        return run
