"""200 calls of ``unlearn`` in one process: resident memory has to stay flat.

    python -m benchmarks.stress.memory_flat               # LeNet5, 200 calls
    python -m benchmarks.stress.memory_flat --calls 40

Bar: after the 20th call, never more than 3 % above what was resident after that call. Writes
``results/memory_flat.md``.
"""

from __future__ import annotations

import argparse
import sys
import time
import warnings
from pathlib import Path
from typing import Any

import psutil

import zsu_fast
from zsu_fast.models import zoo

RESULTS = Path(__file__).resolve().parents[1] / "results"
SETTLED, GROWTH = 20, 0.03
QUICK: dict[str, Any] = {"impressions_per_class": 8, "steps": 60}


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

`python -m benchmarks.stress.memory_flat`: {options.calls} calls of `unlearn` on LeNet5, two classes each,
8 impressions a class and 60 steps, {time.perf_counter() - started:.0f} s in all. Most after call
{SETTLED}, against call {SETTLED}: **{100 * growth:+.2f} %** (bar: {100 * GROWTH:.0f} %).

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
