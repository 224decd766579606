"""Whole calls of `unlearn` on a GPU: loops captured in CUDA graphs, and eager.

    python -m benchmarks.end_to_end.bench_gpu_calls            # writes cuda_calls.md

`loops captured` is the default: ascent and tail are replayed from CUDA graphs. `loops eager` runs
the same kernels without graphs. LeNet5 is scored on the 2,000 digits that ship. ResNet50 has random
weights and 1,000 classes, of which 100 are forgotten: one impression per class at 224 pixels, with
at most 40 ascent steps since random weights reach no confidence; it is run once, captured. The
first call of each model warms up.
"""

from __future__ import annotations

import argparse
import statistics
import time
import warnings
from collections.abc import Iterator
from typing import Any

import torch
from torch import nn

import zsu_fast
from benchmarks.harness import GPU_LOG, RESULTS, Throttled, machine
from zsu_fast.cli import demo
from zsu_fast.models import zoo
from zsu_fast.unlearner import ZeroShotUnlearner


def call(model: nn.Module, forget: Any, captured: bool, **options: Any) -> tuple[nn.Module, dict]:
    """Unlearns; returns the model, and seconds per stage and in total."""
    torch.cuda.synchronize()
    started = time.perf_counter()
    run = ZeroShotUnlearner(
        model,
        forget,
        progress=False,
        loop="auto" if captured else "eager",
        depth="output",
        space="input",
        **options,
    )
    result = run.run()
    GPU_LOG.note()
    torch.cuda.synchronize()
    return result, run.record.timings | {"total": time.perf_counter() - started}


def measure(name: str, runs: int) -> Iterator[str]:
    """Runs a model with loops captured and eager; one row of the table each."""
    options: dict[str, Any] = {}
    if name == "resnet50":
        import torchvision

        torch.manual_seed(0)
        model = torchvision.models.resnet50().cuda().eval()
        forget: Any = range(100)
        options = {"max_steps": 40, "restarts": 0, "input_shape": (3, 224, 224)}
        runs = 1
    else:
        model, forget = zoo.load(name).cuda(), {"lenet5": [1, 2, 3, 4]}.get(name, [3, 4, 8])
    for captured in (True,) if name == "resnet50" else (True, False):
        call(model, forget, captured, seed=99, **options)
        torch.cuda.reset_peak_memory_stats()
        taken = []
        for seed in range(runs):
            result, seconds = call(model, forget, captured, seed=seed, **options)
            taken.append(seconds)
        quality = "-"
        if name == "lenet5":
            images, labels = demo.mnist_test()
            got = zsu_fast.evaluate(result, (images.cuda(), labels.cuda()), forget)
            quality = f"{got.forget_accuracy:.2f} / {got.retain_accuracy:.2f}"
        median = {k: statistics.median(t[k] for t in taken) for k in taken[0]}
        gpu = GPU_LOG.facts()
        if gpu["throttled"]:
            raise Throttled(f"{name}: no result, the GPU was throttled: {gpu['throttled']}")
        low, high = min(t["total"] for t in taken), max(t["total"] for t in taken)
        row = (
            f"| {name} | {'loops captured' if captured else 'loops eager'} | "
            f"{median['synthesise']:.3f} | {median['fit']:.3f} | {median['total']:.3f} | "
            f"{low:.3f} to {high:.3f} | {torch.cuda.max_memory_allocated() / 1e9:.2f} | "
            f"{quality} | {gpu['sm_clock']}, {gpu['power']}, {gpu['temperature']} |"
        )
        print(row, flush=True)
        yield row


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("models", nargs="*", default=["lenet5", "karpathynet", "resnet50"])
    parser.add_argument("--runs", type=int, default=5)
    arguments = parser.parse_args()
    warnings.simplefilter("ignore")
    rows = [row for name in arguments.models for row in measure(name, arguments.runs)]
    text = "\n".join(
        [
            "# Whole calls on a GPU", "",
            "Written by `python -m benchmarks.end_to_end.bench_gpu_calls`; its docstring says what "
            "is run. Median seconds; GB is peak memory allocated for tensors.", "",
            ", ".join(f"{k}: {v}" for k, v in (machine() | {"clock": "wall"}).items()), "",
            "| model | loops | synthesise | fit | total, s | lowest to highest | GB | FA / RA % "
            "| GPU |",
            "|---|---|---:|---:|---:|---:|---:|---:|---|", *rows,
        ]
    ) + "\n"  # fmt: skip
    RESULTS.mkdir(parents=True, exist_ok=True)
    (RESULTS / "cuda_calls.md").write_text(text)
    print(text)


if __name__ == "__main__":
    main()
