"""What priors on impressions give: FA, RA and seconds of ResNet-20 on CIFAR-10.

    python benchmarks/bench_priors.py

A default run is at FA 0 with 32 impressions a class, so priors are judged where impressions are
few: one and four a class, as models of many classes have them. Judged on training images, as every
choice of the project; seconds are CPU time of the synthesis alone. Writes ``results/priors.md``.
"""

from __future__ import annotations

import argparse
import platform
import statistics
import time
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from table1 import RESULTS, SHARED, Data, load_model, processor
from torch import nn
from torch.nn import functional as F

import zsu_fast
from zsu_fast.ascent import AscentSettings
from zsu_fast.classifier import resolve_spec, working_copy
from zsu_fast.impressions import ClassImpressions, ascend
from zsu_fast.progress import Reporter
from zsu_fast.spaces import input_space

SETS = ((1, 2, 4), (2, 9), (6,))
CONFIGURATIONS: dict[str, dict[str, Any]] = {
    "none": {},
    "jitter 0.01": {"jitter": 0.01},
    "jitter 0.05": {"jitter": 0.05},
    "total_variation 0.001": {"total_variation": 0.001},
    "total_variation 0.01": {"total_variation": 0.01},
    "total_variation 0.1": {"total_variation": 0.1},
    "batch_norm 0.001": {"batch_norm": 0.001},
    "batch_norm 0.01": {"batch_norm": 0.01},
    "batch_norm 0.1": {"batch_norm": 0.1},
    "coarse to fine": {"coarse": True},
    "twice as many instead": {"times": 2},
}  # fmt: skip


def coarse_to_fine(model: nn.Module, per_class: int, seed: int) -> ClassImpressions:
    """Impressions at half the resolution, enlarged, and carried on from there at the full one."""
    device = torch.device("cpu")
    spec = resolve_spec(model)
    work = working_copy(model, device)
    small = replace(spec, shape=(spec.shape[0], *(n // 2 for n in spec.shape[1:])))
    settings = AscentSettings(per_class=per_class, seed=seed)
    classes, quiet = range(10), Reporter(False)
    first = ascend(work, input_space(work, small, "auto"), small, classes, settings, quiet)
    starts = F.interpolate(first.images, scale_factor=2, mode="bilinear")
    return ascend(
        work, input_space(work, spec, "auto"), spec, classes, settings, quiet, starts=starts
    )


def make(
    model: nn.Module, per_class: int, seed: int, options: dict[str, Any]
) -> tuple[ClassImpressions, float]:
    """The impressions of a configuration and the CPU seconds that they took."""
    options = dict(options)
    per_class *= options.pop("times", 1)
    coarse = options.pop("coarse", False)
    started = time.process_time()
    if coarse:
        made = coarse_to_fine(model, per_class, seed)
    else:
        made = zsu_fast.synthesize(model, per_class=per_class, seed=seed, progress=False, **options)
    return made, time.process_time() - started


def load_data(model: nn.Module, count: int) -> Data:
    """The first training images, normalised for ``model``."""
    import sys

    sys.path.insert(0, str(SHARED))
    import load

    images, labels = load.cifar10("train", limit=count)
    return model.input_spec.normalise(images), labels


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--per-class", type=int, nargs="*", default=[1, 4])
    parser.add_argument("--seeds", type=int, default=2)
    parser.add_argument("--images", type=int, default=2000)
    parser.add_argument("--out", type=Path, default=RESULTS)
    arguments = parser.parse_args()
    torch.set_num_threads(1)  # so that CPU seconds mean something
    model = load_model("resnet20_cifar")
    data = load_data(model, arguments.images)
    mask_ra = {
        forget: zsu_fast.evaluate(zsu_fast.mask(model, forget), data, forget).retain_accuracy
        for forget in SETS
    }
    make(model, 1, 0, {})  # warm up
    lines = []
    for per_class in arguments.per_class:
        lines += [
            "", f"## {per_class} a class", "",
            "| prior | FA mean | FA worst | RA - mask, mean | RA - mask, worst | hit, % | "
            "steps an impression | CPU s |",
            "|---|---:|---:|---:|---:|---:|---:|---:|",
        ]  # fmt: skip
        for name, options in CONFIGURATIONS.items():
            fa, gap, hit, steps, seconds = [], [], [], [], []
            for seed in range(arguments.seeds):
                made, spent = make(model, per_class, seed, options)
                hit.append(100 * made.hit_rate)
                steps.append(float(made.steps.float().mean()))
                seconds.append(spent)
                for forget in SETS:
                    changed = zsu_fast.unlearn(
                        model, forget, impressions=made, seed=seed, progress=False
                    )
                    e = zsu_fast.evaluate(changed, data, forget)
                    assert e.forget_accuracy is not None
                    assert e.retain_accuracy is not None
                    fa.append(e.forget_accuracy)
                    gap.append(e.retain_accuracy - (mask_ra[forget] or 0.0))
            mean = statistics.mean
            lines.append(
                f"| {name} | {mean(fa):.2f} | {max(fa):.2f} | {mean(gap):+.2f} | {min(gap):+.2f} | "
                f"{mean(hit):.0f} | {mean(steps):.0f} | {mean(seconds):.2f} |"
            )
            print(lines[-1], flush=True)
    sets = ", ".join("{" + ",".join(map(str, s)) + "}" for s in SETS)
    head = [
        "# Priors on impressions", "",
        "Made by `python benchmarks/bench_priors.py`: the public ResNet-20 on "
        f"{arguments.images:,} training images of CIFAR-10, class sets {sets}, "
        f"{arguments.seeds} seeds each, all else at its default. CPU seconds are of the synthesis "
        "of all classes, one thread. `coarse to fine`: all of the ascent at 16x16 first, carried "
        "on at 32x32 (steps: those at 32x32). `twice as many instead`: no prior, twice the "
        "impressions a class.", "",
        f"{processor()}, torch {torch.__version__}, Python {platform.python_version()}, "
        f"{time.strftime('%Y-%m-%d')}.",
    ]  # fmt: skip
    arguments.out.mkdir(parents=True, exist_ok=True)
    (arguments.out / "priors.md").write_text("\n".join(head + lines) + "\n")


if __name__ == "__main__":
    main()
