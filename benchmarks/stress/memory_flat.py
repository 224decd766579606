"""200 calls of ``unlearn`` in one process: resident memory has to stay flat.

    python -m benchmarks.stress.memory_flat               # LeNet5, 200 calls, about a minute
    python -m benchmarks.stress.memory_flat --calls 40

Target: after the 20th call, at most 3 % above the resident memory after that call. Writes
``results/memory_flat.md``.
"""

from __future__ import annotations

import argparse
import sys
import time
import warnings
from typing import Any

import psutil

import zsu_fast
from benchmarks.harness import RESULTS
from zsu_fast.models import zoo

SETTLED, GROWTH = 20, 0.03
QUICK: dict[str, Any] = {
    "impressions_per_class": 8,
    "steps": 60,
    "depth": "output",
    "space": "input",
}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--calls", type=int, default=200)
    options = parser.parse_args()
    warnings.simplefilter("ignore")
    model, process, started = zoo.load("lenet5"), psutil.Process(), time.perf_counter()
    used = []
    for i in range(options.calls):
        zsu_fast.unlearn(model, [i % 10, (i + 3) % 10], progress=False, seed=i, **QUICK)
        used.append(process.memory_info().rss / 2**20)
    settled = used[SETTLED - 1]
    growth = max(used[SETTLED:]) / settled - 1
    rows = [i for i in (1, 2, 5, 10, 20, 50, 100, 150, 200) if i <= len(used)]
    text = f"""# Memory over many calls

Written by `python -m benchmarks.stress.memory_flat`: {options.calls} calls of `unlearn` on LeNet5,
two classes each, 8 impressions per class and 60 steps, {time.perf_counter() - started:.0f} s in
total. Largest growth after call {SETTLED}: **{100 * growth:+.2f} %** (target: at most
{100 * GROWTH:.0f} %).

| after call | resident, MiB |
|---:|---:|
"""
    text += "\n".join(f"| {i} | {used[i - 1]:.1f} |" for i in rows) + "\n"
    print(text)
    if options.calls == 200 and growth <= GROWTH:
        (RESULTS / "memory_flat.md").write_text(text)
    sys.exit(0 if growth <= GROWTH else 1)


if __name__ == "__main__":
    main()
