"""The synthesis on two gloo ranks of one thread each, against one rank with one thread.

    python -m benchmarks.end_to_end.bench_distributed            # 5 minutes on 2 idle cores
    python -m benchmarks.end_to_end.bench_distributed --check    # exit 1 if a target is missed

Timed in turn, round after round: one process without a group, one rank in a group, and two ranks.
Seconds are wall-clock and include gathering, since waiting counts: run it on an idle machine. The
target compares two ranks with the faster of the other two. Writes ``results/distributed.md`` and
``.csv``.
"""

from __future__ import annotations

import argparse
import csv
import multiprocessing
import statistics
import sys
import tempfile
import time
import warnings
from dataclasses import dataclass
from multiprocessing.connection import Connection
from typing import Any

import torch
import torch.distributed as dist

from benchmarks.harness import RESULTS, machine
from benchmarks.real_data import load_model
from zsu_fast.unlearner import ZeroShotUnlearner

TARGET, SAME = 1.8, 1e-5
ALONE, ONE, TWO = "one process", "one rank", "two ranks"


@dataclass(frozen=True)
class Job:
    """What to unlearn; only each ``every``-th class gets impressions, to save time."""

    model: str
    forget: tuple[int, ...]
    every: int = 1
    per_class: int | None = None

    @property
    def name(self) -> str:
        return self.model if self.per_class is None else f"{self.model}, {self.per_class} per class"


JOBS = (
    Job("karpathynet", (3, 4, 8)),
    Job("karpathynet", (3, 4, 8), per_class=256),
    Job("tf_efficientnet_lite0", (0, 160, 320, 480, 640, 800), every=16),
)


def serve(rank: int, size: int, store: str, pipe: Connection) -> None:
    """A rank: works on jobs from the pipe until None arrives, and sends back the results."""
    torch.set_num_threads(1)
    warnings.simplefilter("ignore")
    dist.init_process_group("gloo", f"file://{store}", rank=rank, world_size=size)
    models: dict[str, Any] = {}
    while (job := pipe.recv()) is not None:
        job, grouped = job
        model = models.setdefault(job.model, load_model(job.model))
        pipe.send(work(model, job, grouped))
    dist.destroy_process_group()


def work(model: torch.nn.Module, job: Job, grouped: bool) -> dict[str, Any]:
    """Measures the synthesis; returns seconds, impressions, and the weights that changed."""
    run = ZeroShotUnlearner(
        model, job.forget, distributed=grouped, progress=False, tail="last", seed=0, space="input",
        impressions_per_class=job.per_class,
    )  # fmt: skip
    run.active_classes = run.active_classes[:: job.every]
    began = time.process_time()
    impressions = run.synthesise()
    cpu = time.process_time() - began
    run.split()
    run.fit()
    result = dict(run.apply().named_parameters())
    facts = run.record.to_dict()
    assert run.split_point is not None
    return {
        "seconds": facts["timings"]["synthesise"],
        "cpu": cpu,
        "rows": facts["distributed"].get("rows", [len(impressions)]),
        "steps": int(impressions.steps.sum()),
        "hash": facts["weights_after"],
        "weights": {n: result[n].detach().numpy() for n in run.split_point.parameters},
    }


class Ranks:
    """A group of ``size`` processes that make every call together."""

    def __init__(self, size: int) -> None:
        self.folder = tempfile.TemporaryDirectory()
        context = multiprocessing.get_context("spawn")
        self.pipes, self.processes = [], []
        for rank in range(size):
            ours, theirs = context.Pipe()
            store = f"{self.folder.name}/store"
            process = context.Process(target=serve, args=(rank, size, store, theirs), daemon=True)
            process.start()
            theirs.close()  # so that a dead rank is an end of file here
            self.pipes.append(ours)
            self.processes.append(process)

    def do(self, job: Job, grouped: bool) -> dict[str, Any]:
        """The slowest rank's figures for ``job``."""
        for pipe in self.pipes:
            pipe.send((job, grouped))
        results = [pipe.recv() for pipe in self.pipes]
        hashes = {r["hash"] for r in results}
        if len(hashes) > 1:
            raise SystemExit(f"{job.name}: the ranks have different weights: {hashes}")
        # all ranks enter and leave the synthesis together
        return results[0] | {key: max(r[key] for r in results) for key in ("seconds", "cpu")}

    def end(self) -> None:
        for pipe, process in zip(self.pipes, self.processes, strict=True):
            pipe.send(None)
            process.join()


def race(job: Job, groups: dict[str, Ranks], rounds: int) -> dict[str, list[dict[str, Any]]]:
    """Runs ``job`` on each group in turn; the first round warms up."""
    runs: dict[str, list[dict[str, Any]]] = {name: [] for name in groups}
    for at in range(rounds + 1):
        for name, ranks in groups.items():
            done = ranks.do(job, grouped=name != ALONE)
            if at:
                runs[name].append(done)
    return runs


def furthest(a: dict[str, Any], b: dict[str, Any]) -> float:
    """The largest difference between two runs' weights."""
    return max(float(abs(a["weights"][n] - b["weights"][n]).max()) for n in a["weights"])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--check", action="store_true")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("models", nargs="*", default=sorted({job.model for job in JOBS}))
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    one = Ranks(1)
    groups = {ALONE: one, ONE: one, TWO: Ranks(2)}
    rows, missed = [], []
    for job in JOBS:
        if job.model not in arguments.models:
            continue
        runs = race(job, groups, arguments.rounds)
        medians = {n: statistics.median(r["seconds"] for r in of) for n, of in runs.items()}
        best = min(medians[ALONE], medians[ONE])
        for name, of in runs.items():
            off = furthest(of[0], runs[ALONE][0])
            faster = best / medians[name]
            seconds, cpu = ([r[key] for r in of] for key in ("seconds", "cpu"))
            rows.append(
                (job.name, name, medians[name], min(seconds), max(seconds), faster,
                 statistics.median(cpu), off, "+".join(map(str, of[-1]["rows"])), of[-1]["steps"])
            )  # fmt: skip
            print(*rows[-1], flush=True)
            if off > SAME:
                missed.append(f"{job.name}, {name}: weights are off by {off:.2g}")
        if best / medians[TWO] < TARGET:
            missed.append(
                f"{job.name}: {best / medians[TWO]:.2f} times as fast, the target is {TARGET}"
            )
    for ranks in {one, groups[TWO]}:
        ranks.end()
    write(rows, missed)
    print(*missed or ["All targets met."], sep="\n")
    sys.exit(1 if missed and arguments.check else 0)


def write(rows: list[tuple[Any, ...]], missed: list[str]) -> None:
    RESULTS.mkdir(parents=True, exist_ok=True)
    facts = machine() | {"clock": "wall", "threads": "1 per rank"}
    columns = ("model", "group", "median", "fastest", "slowest", "speed-up", "cpu", "off", "rows",
            "steps")  # fmt: skip
    with (RESULTS / "distributed.csv").open("w", newline="") as file:
        writer = csv.writer(file)
        writer.writerow([*columns, *facts])
        writer.writerows([*row, *facts.values()] for row in rows)
    lines = [
        "# Synthesis on two ranks",
        "",
        ", ".join(f"{k}: {v}" for k, v in facts.items()),
        "",
        "Written by `python -m benchmarks.end_to_end.bench_distributed`. One process: no group, "
        "one batch if it fits. Ranks take shards in turn. Seconds: of the synthesis, gathering "
        "included. Speed-up: over the faster of one process and one rank. CPU s: of the busiest "
        "rank, inference copy included. Off: largest difference between a weight of the unlearned "
        "model and one process's. For EfficientNet-Lite0, every 16th class gets an impression.",
        "",
        "| model | group | s, median | fastest to slowest | speed-up | CPU s | off | rows by rank "
        "| steps |",
        "|---|---|---:|---:|---:|---:|---:|---:|---:|",
    ]
    lines += [
        f"| {m} | {group} | {median:.2f} | {low:.2f} to {high:.2f} | {faster:.2f} "
        f"| {cpu:.2f} | {off:.1g} | {shares} | {steps} |"
        for m, group, median, low, high, faster, cpu, off, shares, steps in rows
    ]
    lines += ["", *([f"- missed: {m}" for m in missed] or ["All targets met."]), ""]
    (RESULTS / "distributed.md").write_text("\n".join(lines))


if __name__ == "__main__":
    main()
