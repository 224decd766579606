"""What forgetting identities costs: memory against classes, and a gallery of 100,000 templates.

    python -m benchmarks.end_to_end.encoder_costs            # ten minutes on one core
    python -m benchmarks.end_to_end.encoder_costs --check    # exit 1 if a bar is missed

Each call runs in a process of its own, on one thread and without a cache. Memory is the process's
peak in the call (Linux's high-water mark) over its size before, of small models the median of
three. The large gallery has random templates of 512 values, and the encoder is a ResNet-18 with
random weights for images of 64 pixels. Writes ``results/encoder_costs.md``.
"""

from __future__ import annotations

import argparse
import statistics
import sys
import time
import warnings
from collections.abc import Callable
from typing import Any

import torch
from torch import nn
from torchvision import models

import zsu_fast
from benchmarks.end_to_end.deep import machine
from benchmarks.end_to_end.deep_untrained import apart
from benchmarks.end_to_end.encoders import pairs, rows, small
from benchmarks.end_to_end.table1 import hundreds
from benchmarks.harness import RESULTS
from zsu_fast.runtime.measuring import PeakMemory
from zsu_fast.runtime.memory import proc_bytes

_CPU, _MEGABYTE = torch.device("cpu"), 1e6
_TEMPLATES, _WIDTH, _SIDE = 100_000, 512, 64
_CALLS = 3  # of small models, of which the median counts: their memory differs by a quarter
_MOST_RATIO, _MOST_SECONDS = 1.2, 180.0
_SETS: dict[str, Callable[[], tuple[int, ...]]] = {
    "lenet5": lambda: pairs(1, 5)[0],
    "resnet20_cifar": lambda: pairs(1, 20)[0],
    "resnet56_cifar": lambda: pairs(1, 56)[0],
    "classifier rows": lambda: hundreds(1, 1)[0],
}


class _Growth:
    """How much larger than now this process becomes, in MB."""

    def __init__(self) -> None:
        self.start, self.peak = proc_bytes("self/status", "VmRSS") or 0, PeakMemory(_CPU)

    def megabytes(self) -> float:
        self.peak.end_stage("call")
        return (self.peak.peaks["call"] - self.start) / _MEGABYTE


def _memory(name: str, encoder: bool) -> float:
    """Growth in MB by a call, of the encoder or of the whole classifier."""
    torch.set_num_threads(1)
    warnings.simplefilter("ignore")
    case = rows() if name == "classifier rows" else small(name, _data(name))
    case.queries.resize_(0)  # not part of the call
    growth = _Growth()
    zsu_fast.unlearn(case.classifier if encoder else case.whole, _SETS[name](), progress=False)
    return growth.megabytes()


def _data(name: str) -> str:
    return "mnist" if name == "lenet5" else "cifar10"


def _large_gallery() -> dict[str, float]:
    """Seconds of planning and of the call with a large gallery, and MB."""
    torch.set_num_threads(1)
    torch.manual_seed(0)
    warnings.simplefilter("ignore")
    encoder = models.resnet18()
    encoder.fc = nn.Identity()  # type: ignore[assignment]
    templates = torch.randn(_TEMPLATES, _WIDTH)
    classifier = zsu_fast.EmbeddingClassifier(encoder.eval(), templates)
    options: dict[str, Any] = {"input_shape": (3, _SIDE, _SIDE), "mean": 0.5, "std": 0.25}
    forget, growth, started = list(range(10)), _Growth(), time.perf_counter()
    plan = zsu_fast.plan(classifier, forget, **options)
    planned = time.perf_counter() - started
    error = ""
    try:
        zsu_fast.unlearn(classifier, forget, progress=False, **options)
    except zsu_fast.ModelError as given_up:  # random weights: the checks may say so, at the end
        error = str(given_up)
    if error:
        print(f"    {error}", flush=True)
    seconds = time.perf_counter() - started - planned
    return {
        "planned": planned, "estimate": float(plan.seconds["total"]), "seconds": seconds,
        "memory": growth.megabytes(), "gave up": float(bool(error)),
    }  # fmt: skip


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--check", action="store_true", help="exit 1 if a bar is missed")
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    facts = machine()
    lines = [
        "# What forgetting identities costs", "",
        "Written by `python -m benchmarks.end_to_end.encoder_costs`: each call in a process of its "
        "own, without a cache; memory is the process's peak over its size before the call, of the "
        "small models the median of three.", "",
        f"{facts['processor']}, 1 thread, torch {facts['torch']}, {facts['date']}.", "",
        "| model | MB as an encoder | MB as a classifier, `depth='deep'` | ratio, at most 1.2 |",
        "|---|---:|---:|---:|",
    ]  # fmt: skip
    missed = []
    for name in _SETS:
        calls = 1 if name == "classifier rows" else _CALLS
        taken = [[apart(_memory, name, e) for e in (True, False)] for _ in range(calls)]
        ours, deep = (statistics.median(column) for column in zip(*taken, strict=True))
        lines.append(f"| {name} | {ours:,.0f} | {deep:,.0f} | {ours / deep:.2f} |")
        print(lines[-1], flush=True)
        if ours / deep > _MOST_RATIO:
            missed.append(f"{name}: memory is {ours / deep:.2f} times that of a classifier")
    large = apart(_large_gallery)
    if (total := large["planned"] + large["seconds"]) > _MOST_SECONDS:
        missed.append(f"large gallery: {total:.0f} s, at most {_MOST_SECONDS:.0f} allowed")
    ended = "the checks gave it up, at its end" if large["gave up"] else "it passed its checks"
    lines += [
        "", f"{_TEMPLATES:,} random templates of {_WIDTH} values, ResNet-18 with random weights, "
        f"{_SIDE} pixels, ten forgotten: planned in {large['planned']:.1f} s (estimate: "
        f"{large['estimate']:.0f} s), run in {large['seconds']:.0f} s, {large['memory']:,.0f} MB; "
        f"{ended}. At most {_MOST_SECONDS:.0f} s are allowed.", "", "## Bars", "",
    ]  # fmt: skip
    lines += [f"- missed: {miss}" for miss in missed] or ["All are met."]
    (RESULTS / "encoder_costs.md").write_text("\n".join(lines) + "\n")
    print("\n".join(lines))
    if arguments.check and missed:
        sys.exit(1)


if __name__ == "__main__":
    main()
