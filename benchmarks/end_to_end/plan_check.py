"""How close `zsu_fast.plan` comes to the seconds and memory that the run then takes.

    python -m benchmarks.end_to_end.plan_check                # all cases, 5 minutes on 2 cores
    python -m benchmarks.end_to_end.plan_check --check        # exit 1 if a target is missed
    python -m benchmarks.end_to_end.plan_check karpathynet    # some cases

Plan and run each get a process with one thread, and its CPU time is the clock for both, as in
`harness`, so that other load on the machine does not count. Targets, for the last layer of 100,000
classes: total seconds within 30 %, peak memory within 15 %. The run's peak memory is that of its
process (`ru_maxrss`), model and imports included; the plan estimates the same. Writes
``results/plan.md``.
"""

from __future__ import annotations

import argparse
import json
import sys
import time
import warnings
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import nn

import zsu_fast
from benchmarks.end_to_end.many_classes import ManyClasses, forgotten, peak_bytes
from benchmarks.harness import RESULTS, machine, run_child
from benchmarks.real_data import load_model

MOST_TIME, MOST_MEMORY = 0.30, 0.15
CARDS = ("h100", "a100", "l4")


@dataclass
class Case:
    """A run to plan."""

    title: str
    model: Callable[[], nn.Module]
    forget: list[int]
    options: dict[str, Any] = field(default_factory=dict)


CASES = {
    "last100k": Case(
        "100,000 classes, 512 features, 100 forgotten",
        lambda: ManyClasses(100_000), forgotten(100_000, 100),
    ),
    "last21k": Case(
        "21,841 classes, 512 features, 100 forgotten",
        lambda: ManyClasses(21_841), forgotten(21_841, 100),
    ),
    "karpathynet": Case(
        "KarpathyNet, {3, 4, 8}", lambda: load_model("karpathynet"), [3, 4, 8]
    ),
    "resnet20": Case(
        "ResNet-20, {3, 4, 8}", lambda: load_model("resnet20_cifar"), [3, 4, 8]
    ),
    "lite0": Case(
        "EfficientNet-Lite0, 20 forgotten, `retain_sample=80`",
        lambda: load_model("tf_efficientnet_lite0"), list(range(0, 1000, 50)),
        {"retain_sample": 80},
    ),
}  # fmt: skip


def child(task: str, case: Case) -> dict[str, Any]:
    """Plans ``case``, plans it on paper for each card, or runs it; returns figures for JSON."""
    torch.set_num_threads(1)
    time.perf_counter = time.process_time  # for this process: the package's timings too
    model = case.model()
    started, wall_started = time.perf_counter(), time.monotonic()
    if task == "plan":
        planned = zsu_fast.plan(model, case.forget, **case.options).to_dict()
        return planned | {"took": time.perf_counter() - started}
    if task == "paper":
        return {
            card: zsu_fast.plan(model, case.forget, hardware=card, **case.options).to_dict()
            for card in CARDS
        }
    run = zsu_fast.ZeroShotUnlearner(
        model, case.forget, progress=False, depth="output", **case.options
    )
    run.run()
    seconds = time.perf_counter() - started
    assert run.result is not None
    return {
        "seconds": seconds,
        "wall": time.monotonic() - wall_started,
        "memory": peak_bytes(),
        "stages": run.record.timings,
        "steps": run.record.impressions["mean_steps"],
        "impressions": len(run.impressions or ()),
        "tail": run.record.split["at"],
        "tail_steps": run.result.history[-1].step,
    }


def in_child(task: str, name: str) -> dict[str, Any]:
    """`child` in a process of its own."""
    return run_child(__spec__.name, "--child", task, name)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--child", choices=("plan", "paper", "run"), help=argparse.SUPPRESS)
    parser.add_argument("--check", action="store_true")
    parser.add_argument("cases", nargs="*", default=list(CASES))
    options = parser.parse_args()
    warnings.simplefilter("ignore")
    if options.child:
        print(json.dumps(child(options.child, CASES[options.cases[0]])))
        return
    rows, stages, good = [], [], True
    for name in options.cases:
        expected, run = in_child("plan", name), in_child("run", name)
        time_off = expected["seconds"]["total"] / run["seconds"] - 1
        memory_off = expected["memory"] / run["memory"] - 1
        rows.append(
            f"| {CASES[name].title} | {expected['seconds']['total']:.1f} | {run['seconds']:.1f} | "
            f"{100 * time_off:+.0f} % | {expected['memory'] / 1e9:.2f} | "
            f"{run['memory'] / 1e9:.2f} | {100 * memory_off:+.0f} % | {expected['took']:.1f} |"
        )
        stages.append(
            f"| {CASES[name].title} | "
            + " | ".join(
                f"{expected['seconds'][s]:.2f} / {run['stages'][s]:.2f}"
                for s in ("synthesise", "split", "fit")
            )
            + f" | {expected['ascent_steps']:.1f} / {run['steps']:.1f} | {run['tail_steps']} | "
            f"{expected['tail']} / {run['tail']} |"
        )
        if name == "last100k":
            good = abs(time_off) <= MOST_TIME and abs(memory_off) <= MOST_MEMORY
        print(rows[-1], stages[-1], sep="\n", flush=True)
    if "last100k" in options.cases:
        write(rows, stages, in_child("paper", "last100k"), good)
    print("targets:", "met" if good else "missed")
    sys.exit(0 if good or not options.check else 1)


def write(rows: list[str], stages: list[str], paper: dict[str, Any], good: bool) -> None:
    facts = ", ".join(f"{k}: {v}" for k, v in machine().items() if k != "clock")
    lines = [
        "# Planned and measured cost of runs", "", facts, "",
        "Written by `python -m benchmarks.end_to_end.plan_check`. Plan and run each have a process "
        "with one thread; seconds are CPU seconds of that process. Targets, first row: seconds "
        f"within {100 * MOST_TIME:.0f} %, memory within {100 * MOST_MEMORY:.0f} %: "
        f"{'met' if good else 'missed'}.", "",
        "| run | planned s | measured s | off | planned GB | measured GB | off | planning took s |",
        "|---|---:|---:|---:|---:|---:|---:|---:|", *rows, "",
        "By stage, planned / measured. The planner assumes that the tail uses all its steps; *tail "
        "steps* are those it took.", "",
        "| run | synthesise s | split s | fit s | ascent steps | tail steps | tail at |",
        "|---|---:|---:|---:|---:|---:|---|", *stages, "",
        "The first run on other cards, estimated on paper: published peak rates times a "
        "utilisation of 30 %. Nothing was run on them.", "",
        "| card | s | synthesise s | memory GB |", "|---|---:|---:|---:|",
    ]  # fmt: skip
    lines += [
        f"| {p['device']} | {p['seconds']['total']:.1f} | {p['seconds']['synthesise']:.2f} | "
        f"{p['memory'] / 1e9:.2f} |"
        for p in paper.values()
    ]
    (RESULTS / "plan.md").write_text("\n".join(lines) + "\n")


if __name__ == "__main__":
    main()
