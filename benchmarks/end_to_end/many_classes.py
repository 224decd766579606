"""Last layers of 21,841 and 100,000 classes, 100 of them forgotten: time, memory, what remains.

    python -m benchmarks.end_to_end.many_classes              # both sizes, 5 minutes on 2 cores
    python -m benchmarks.end_to_end.many_classes --check      # exit 1 if a target is missed
    python -m benchmarks.end_to_end.many_classes --classes 5000 --forget 20

Each case runs in a process of its own, so that its peak resident memory covers this run only, from
the start of Python to the result, model and imports included. The model is a stand-in, as there
are no public weights with so many classes here: a small convolutional backbone of random weights
with 512 features, and class prototypes in groups of ten similar classes. Test images are
impressions of another seed (of all forgotten classes, and of retained classes with and without
impressions in the run) and dead-leaves images that no impression started from. Targets (100,000
classes): 4 GB, 3 minutes, no held-out impression assigned a forgotten class. Writes
``results/many_classes.md`` and ``.csv``.
"""

from __future__ import annotations

import argparse
import csv
import json
import resource
import sys
import time
import warnings
from typing import Any

import torch
from torch import Tensor, nn

import zsu_fast
from benchmarks.harness import RESULTS, machine, run_child
from zsu_fast.models.input_spec import InputSpec
from zsu_fast.synthesis.dead_leaves import sample_dead_leaves

FEATURES, GROUP = 512, 10
SPEC = InputSpec((3, 32, 32), (0.5, 0.5, 0.5), (0.25, 0.25, 0.25), "the benchmark")
MOST_BYTES, MOST_SECONDS = 4e9, 180.0


class ManyClasses(nn.Module):
    """float [N, 3, 32, 32] -> [N, classes]: three convolutions, 512 features, one linear layer."""

    def __init__(self, classes: int, seed: int = 0) -> None:
        super().__init__()
        with torch.random.fork_rng():
            torch.manual_seed(seed)
            self.backbone = nn.Sequential(
                nn.Conv2d(3, 64, 3, 2, 1), nn.BatchNorm2d(64), nn.ReLU(),
                nn.Conv2d(64, 128, 3, 2, 1), nn.BatchNorm2d(128), nn.ReLU(),
                nn.Conv2d(128, FEATURES, 3, 2, 1), nn.AdaptiveAvgPool2d(2), nn.Flatten(),
                nn.Linear(4 * FEATURES, FEATURES), nn.BatchNorm1d(FEATURES), nn.ReLU(),
            )  # fmt: skip
            self.fc = nn.Linear(FEATURES, classes)
            self.input_spec = SPEC
            self._settle(classes)
        self.eval()

    @torch.no_grad()
    def _settle(self, classes: int) -> None:
        """BatchNorm statistics from dead-leaves images; prototypes near those of their group."""
        images = SPEC.low.view(-1, 1, 1) + sample_dead_leaves(256, SPEC.shape, 0) * (
            SPEC.high - SPEC.low
        ).view(-1, 1, 1)
        for module in self.backbone:
            if isinstance(module, nn.BatchNorm2d | nn.BatchNorm1d):
                module.momentum = None  # a plain mean over the batch
        self.backbone.train()
        self.backbone(images)
        self.backbone.eval()
        centres = torch.randn(-(-classes // GROUP), FEATURES)
        for start in range(0, classes, 10_000):
            rows = torch.arange(start, min(start + 10_000, classes))
            own = torch.randn(len(rows), FEATURES)
            self.fc.weight[rows] = (0.6 * centres[rows // GROUP] + 0.8 * own) * 2 / FEATURES**0.5
        self.fc.bias.zero_()

    def forward(self, x: Tensor) -> Tensor:
        logits: Tensor = self.fc(self.backbone(x))
        return logits


def forgotten(classes: int, count: int) -> list[int]:
    """``count`` classes drawn at random."""
    draw = torch.Generator().manual_seed(1)
    return sorted(torch.randperm(classes, generator=draw)[:count].tolist())


def child_run(classes: int, count: int, seed: int) -> dict[str, Any]:
    """Unlearns once, then tests the result; peak memory is read before the tests."""
    model, forget = ManyClasses(classes), forgotten(classes, count)
    before = peak_bytes()
    started, work = time.perf_counter(), time.process_time()
    run = zsu_fast.ZeroShotUnlearner(
        model, forget, seed=seed, progress=False, depth="output", space="input"
    )
    result = run.run()
    seconds, work = time.perf_counter() - started, time.process_time() - work
    peak = peak_bytes()
    record = run.record.to_dict()
    sampled = sorted(set(run.active_classes) - set(forget))
    others = sorted(set(range(classes)) - set(run.active_classes))
    some = others[:: max(1, len(others) // 200)][:200] if others else []
    tested = {
        "forgotten": held_out(model, forget, 4),
        "retained, sampled": held_out(model, sampled[:200], 1),
        "retained, not sampled": held_out(model, some, 1) if some else None,
        "dead leaves": pixels(sample_dead_leaves(1000, SPEC.shape, 9)),
    }
    weight, new = model.fc.weight, result.get_parameter("fc.weight")
    retained = torch.ones(classes, dtype=torch.bool)
    retained[forget] = False
    return {
        "classes": classes,
        "forget": count,
        "impression_classes": record["impressions"]["classes"],
        "impressions": record["impressions"]["count"],
        "steps": record["impressions"]["mean_steps"],
        "seconds": seconds,
        "cpu_seconds": work,
        "stages": record["timings"],
        "peak": peak,
        "before": before,
        "stopped": record["fit"]["stopped"],
        "tested": {k: score(model, result, forget, v) for k, v in tested.items() if v is not None},
        "retained_rows_equal": bool(torch.equal(weight[retained], new[retained])),
    }


def child_plan(classes: int, count: int, seed: int) -> dict[str, Any]:
    """Plans the same run with `zsu_fast.plan`, and times the planning."""
    model = ManyClasses(classes)
    started = time.perf_counter()
    expected = zsu_fast.plan(model, forgotten(classes, count), seed=seed).to_dict()
    return expected | {"took": time.perf_counter() - started}


def peak_bytes() -> int:
    """Peak resident memory of this process."""
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024


def pixels(images: Tensor) -> Tensor:
    """Images in 0..1, normalised for the model."""
    low, high = SPEC.low.view(-1, 1, 1), SPEC.high.view(-1, 1, 1)
    return low + images * (high - low)


def held_out(model: nn.Module, classes: list[int], per_class: int) -> Tensor:
    """Impressions of another seed than any run's."""
    return zsu_fast.synthesize(
        model, classes=classes, per_class=per_class, seed=10_000, progress=False
    ).images


@torch.no_grad()
def score(model: nn.Module, result: nn.Module, forget: list[int], images: Tensor) -> dict[str, Any]:
    """Compares predictions of the original, its mask and the result, in %."""
    leaked = agreed = before = 0
    for part in images.split(64):
        old, new = model(part), result(part).argmax(1)
        forgotten = torch.zeros(old.shape[1], dtype=torch.bool)
        forgotten[forget] = True
        before += int(forgotten[old.argmax(1)].sum())
        leaked += int(forgotten[new].sum())
        agreed += int((old.masked_fill(forgotten, -torch.inf).argmax(1) == new).sum())
    count = len(images)
    return {
        "images": count,
        "before": 100 * before / count,
        "leak": 100 * leaked / count,
        "agreement": 100 * agreed / count,
    }


def in_child(task: str, classes: int, count: int, seed: int) -> dict[str, Any]:
    """Runs a task ("run" or "plan") in a process of its own."""
    return run_child(
        __spec__.name, "--child", task, "--classes", str(classes), "--forget", str(count),
        "--seed", str(seed),
    )  # fmt: skip


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--classes", type=int, nargs="*", default=[21_841, 100_000])
    parser.add_argument("--forget", type=int, default=100)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--child", choices=("run", "plan"), help=argparse.SUPPRESS)
    parser.add_argument("--check", action="store_true")
    options = parser.parse_args()
    warnings.simplefilter("ignore")
    if options.child:
        child = child_run if options.child == "run" else child_plan
        print(json.dumps(child(options.classes[0], options.forget, options.seed)))
        return
    runs = []
    for classes in options.classes:
        runs.append(in_child("run", classes, options.forget, options.seed))
        print(json.dumps(runs[-1]), flush=True)
    missed = [run["classes"] for run in runs if not met(run)]
    if options.classes == parser.get_default("classes"):
        write(runs)
    print("targets:", f"missed at {missed}" if missed else "met")
    sys.exit(1 if missed and options.check else 0)


def met(run: dict[str, Any]) -> bool:
    """Whether memory, time, leak and agreement with the mask are as they should be."""
    return (
        run["peak"] <= MOST_BYTES
        and run["seconds"] <= MOST_SECONDS
        and run["retained_rows_equal"]
        and all(j["leak"] == 0 and j["agreement"] == 100 for j in run["tested"].values())
    )


def write(runs: list[dict[str, Any]]) -> None:
    facts = ", ".join(f"{k}: {v}" for k, v in machine().items() if k != "clock")
    lines = [
        "# Very many classes", "", facts, "",
        "Written by `python -m benchmarks.end_to_end.many_classes`: a stand-in of random weights, "
        "512 features, 100 classes forgotten, seed 0, in a process of its own. Seconds of the "
        "whole call are wall-clock, with other load on the machine (*CPU s*: used by the process); "
        "GB are peak resident memory of the process, Python, torch and the model included "
        "(*before*: before the call).", "",
        "| classes | with impressions | impressions | mean steps | synthesise s | fit s | total s "
        "| CPU s | before GB | peak GB | targets |",
        "|---:|---:|---:|---:|---:|---:|---:|---:|---:|---:|---|",
    ]  # fmt: skip
    lines += [
        f"| {r['classes']:,} | {r['impression_classes']:,} | {r['impressions']:,} | "
        f"{r['steps']:.1f} | {r['stages']['synthesise']:.1f} | {r['stages']['fit']:.1f} | "
        f"{r['seconds']:.1f} | {r['cpu_seconds']:.1f} | "
        f"{r['before'] / 1e9:.2f} | {r['peak'] / 1e9:.2f} | "
        f"{'met' if met(r) else 'missed'} |"
        for r in runs
    ]
    lines += [
        "", "Predictions of the result. *before*: share of images that the original assigns a "
        "forgotten class; *leak*: the same for the result; *agreement*: share on which the result "
        "agrees with the masked original. Impressions are of a seed that no run used.", "",
        "| classes | tested on | images | before % | leak % | agreement % |",
        "|---:|---|---:|---:|---:|---:|",
    ]  # fmt: skip
    lines += [
        f"| {r['classes']:,} | {name} | {j['images']:,} | {j['before']:.2f} | {j['leak']:.2f} | "
        f"{j['agreement']:.2f} |"
        for r in runs
        for name, j in r["tested"].items()
    ]
    lines += [
        "", f"Targets: {MOST_BYTES / 1e9:.0f} GB, {MOST_SECONDS:.0f} s, no leak, agreement 100 %, "
        "and the weights of the retained classes bit for bit the original's.",
        "",
    ]  # fmt: skip
    RESULTS.mkdir(parents=True, exist_ok=True)
    (RESULTS / "many_classes.md").write_text("\n".join(lines))
    flat = [
        {k: v for k, v in r.items() if not isinstance(v, dict)}
        | {f"seconds {k}": v for k, v in r["stages"].items()}
        | {f"{n}, {k}": v for n, j in r["tested"].items() for k, v in j.items()}
        for r in runs
    ]
    with (RESULTS / "many_classes.csv").open("w", newline="") as file:
        writer = csv.DictWriter(file, list(flat[0]))
        writer.writeheader()
        writer.writerows(flat)


if __name__ == "__main__":
    main()
