"""The paper's Table 1 on real data, against the baselines: mask, golden model, random embeddings.

    python -m benchmarks.end_to_end.table1                  # all rows, about 90 minutes on 2 cores
    python -m benchmarks.end_to_end.table1 mnist cifar10    # some settings
    python -m benchmarks.end_to_end.table1 --check          # exit 1 if a target is missed
    python -m benchmarks.end_to_end.table1 --summary        # rewrite the summary from the CSV file
    python -m benchmarks.end_to_end.table1 squeezenet --device cuda \\
        --methods "random embeddings,tail-input"

Test images are used for measuring only. Writes one line per run to ``results/table1.csv`` and the
summary to ``results/table1.md``; settings and methods that are not run keep their earlier lines.
"""

from __future__ import annotations

import argparse
import csv
import functools
import platform
import random
import statistics
import sys
import tempfile
import time
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import nn

import zsu_fast
from benchmarks.harness import RESULTS, processor
from benchmarks.real_data import Data, load_data, load_model
from zsu_fast.models import zoo


@dataclass(frozen=True)
class Setting:
    """A block of runs: a model, its data, class sets, seeds, and the targets to meet.

    ``mean_gap`` and ``worst_gap`` are how far RA may lie below that of ``against``.
    """

    key: str
    model: str
    data: str
    sets: tuple[tuple[int, ...], ...]
    seeds: tuple[int, ...]
    worst_fa: float
    mean_gap: float
    worst_gap: float | None
    seconds: float
    published: str = ""
    golden: str | None = None
    paper_per_class: int = 32
    against: str = "mask"
    methods: tuple[str, ...] = (
        "random embeddings",
        "paper_preset",
        "differential",
        "output",
        "deep",
    )
    note: str = ""


@dataclass(frozen=True)
class Run:
    """One measured model."""

    setting: str
    method: str
    forget: tuple[int, ...]
    seed: int
    fa: float
    ra: float
    overall: float
    mask_ra: float
    original_ra: float
    seconds: float | None


def random_sets(count: int, most: int, seed: int) -> tuple[tuple[int, ...], ...]:
    """``count`` sets of 1 to ``most`` of ten classes."""
    draw = random.Random(seed)
    return tuple(tuple(sorted(draw.sample(range(10), draw.randint(1, most)))) for _ in range(count))


def hundreds(count: int, seed: int) -> tuple[tuple[int, ...], ...]:
    """``count`` sets of 100 of a thousand classes."""
    draw = random.Random(seed)
    return tuple(tuple(sorted(draw.sample(range(1000), 100))) for _ in range(count))


# The paper says 100 classes, but its ImageNet figures fit these 150.
PUBLISHED_150 = (*range(50), *range(390, 440), *range(950, 1000))

IMAGENET = ("random embeddings", "tail-input", "output", "deep")

SETTINGS = [
    Setting("mnist", "lenet5", "mnist", ((1, 2, 3, 4),), (0, 1, 2, 3, 4), 0.05, 0.1, 0.2, 5,
            "99.07 / 58.08 / 0.00 / 99.44", "lenet5_golden"),
    Setting("cifar10", "karpathynet", "cifar10", ((3, 4, 8),), (0, 1, 2, 3, 4), 0.1, 0.2, 0.4, 10,
            "72.36 / 56.16 / 0.00 / 80.23", "karpathynet_golden"),
    Setting("resnet20", "resnet20_cifar", "cifar10", random_sets(3, 3, 20), (0, 1, 2), 0.5, 0.4,
            None, 60, paper_per_class=4),
    Setting("resnet56", "resnet56_cifar", "cifar10", random_sets(3, 3, 56), (0, 1, 2), 0.5, 0.4,
            None, 180, paper_per_class=4),
    Setting("vit", "vit_cifar", "cifar10", ((3, 4, 8), *random_sets(2, 3, 77)), (0, 1, 2), 0.5, 0.7,
            None, 120, paper_per_class=4),
    Setting("lite0", "tf_efficientnet_lite0", "imagenet", (*hundreds(5, 1), PUBLISHED_150), (0,),
            1.0, 0.0, 0.5, 360, "AlexNet 56.55 / 48.55 / 0.01 / 57.11, ResNet50 76.14 / 65.31 / "
            "0.01 / 76.83", against="original", methods=IMAGENET),
    Setting("squeezenet", "squeezenet1_0", "imagenet", hundreds(5, 2), (0,), 1.0, 0.0, 0.5, 1800,
            against="original", methods=IMAGENET, note="Random embeddings and tail-input were run "
            "on an H100 (86,528 values per row: many minutes per run on a CPU), hence no seconds."),
    Setting("mnist-sets", "lenet5", "mnist", random_sets(10, 5, 5), (0,), 0.5, 0.5, None, 5),
    Setting("cifar10-sets", "karpathynet", "cifar10", random_sets(10, 5, 3), (0,), 0.5, 0.5, None,
            10),
]  # fmt: skip


@functools.cache
def cache_folder() -> str:
    """Impressions do not depend on the class set: a large model's are synthesised once per seed."""
    return tempfile.mkdtemp(prefix="zsu-fast-table1-")


def output(model: nn.Module, forget: tuple[int, ...], seed: int, setting: Setting) -> nn.Module:
    cache = cache_folder() if setting.data == "imagenet" else None
    return zsu_fast.unlearn(model, forget, seed=seed, cache=cache, depth="output", space="input")


def deep(model: nn.Module, forget: tuple[int, ...], seed: int, _setting: Setting) -> nn.Module:
    return zsu_fast.unlearn(model, forget, seed=seed)


def tail_input(
    model: nn.Module, forget: tuple[int, ...], seed: int, _setting: Setting
) -> nn.Module:
    return zsu_fast.unlearn(model, forget, seed=seed, depth="output")


def differential(
    model: nn.Module, forget: tuple[int, ...], seed: int, _setting: Setting
) -> nn.Module:
    return zsu_fast.unlearn(model, forget, seed=seed, objective="differential", space="input")


def paper(model: nn.Module, forget: tuple[int, ...], seed: int, setting: Setting) -> nn.Module:
    count = setting.paper_per_class
    preset = zsu_fast.paper_preset()
    return zsu_fast.unlearn(model, forget, seed=seed, impressions_per_class=count, **preset)


def random_embeddings(
    model: nn.Module, forget: tuple[int, ...], seed: int, _setting: Setting
) -> nn.Module:
    return zsu_fast.random_embeddings(model, forget, seed=seed)


Method = Callable[[nn.Module, tuple[int, ...], int, Setting], nn.Module]
METHODS: dict[str, Method] = {
    "random embeddings": random_embeddings,
    "paper_preset": paper,
    "differential": differential,
    "tail-input": tail_input,
    "output": output,
    "deep": deep,
}


ORDER = ("original", "mask", "golden", *METHODS)


def measure(setting: Setting, device: str = "cpu") -> Iterable[Run]:
    """All runs of a setting, one after another; seconds are those on a CPU."""
    model = load_model(setting.model).to(device)
    images, labels = load_data(model, setting.data)
    data = images.to(device), labels.to(device)

    def score(
        method: str,
        candidate: nn.Module,
        forget: tuple[int, ...],
        seed: int,
        seconds: float | None,
        mask_ra: float,
        on: Data = data,
    ) -> Run:
        e = zsu_fast.evaluate(candidate, on, forget, batch=batch)
        assert e.forget_accuracy is not None
        assert e.retain_accuracy is not None
        assert e.overall_accuracy is not None
        run = Run(
            setting.key, method, forget, seed, e.forget_accuracy, e.retain_accuracy,
            e.overall_accuracy, mask_ra, original_ra or e.retain_accuracy, seconds,
        )  # fmt: skip
        print(
            f"{setting.key:13}{method:18}{named(forget):17} seed {seed}  FA {run.fa:6.2f}  "
            f"RA {run.ra:6.2f}  overall {run.overall:6.2f}"
            + ("" if seconds is None else f"  {seconds:.1f} s"),
            flush=True,
        )
        return run

    batch = 50 if setting.data == "imagenet" else 1000
    if setting.data != "imagenet":
        zsu_fast.unlearn(model, [0], impressions_per_class=4, steps=5)  # warm up
    with torch.no_grad():  # the original and its masks need one pass for all sets
        logits = torch.cat([model(part) for part in data[0].split(batch)]), data[1]
    for forget in setting.sets:
        original_ra = 0.0
        masked = zsu_fast.mask(nn.Identity(), forget)
        mask_ra = zsu_fast.evaluate(masked, logits, forget).retain_accuracy or 0.0
        original = score("original", nn.Identity(), forget, 0, None, mask_ra, logits)
        original_ra = original.ra
        yield original
        yield score("mask", masked, forget, 0, None, mask_ra, logits)
        if setting.golden:
            yield score("golden", zoo.load(setting.golden), forget, 0, None, mask_ra)
        for method, make in METHODS.items():
            if method not in setting.methods:
                continue
            seeds = setting.seeds
            if setting.model.startswith(("resnet", "vit")) and method == "paper_preset":
                seeds = seeds[:1]  # 200 steps for every impression: minutes per run
            for seed in seeds:
                started = time.perf_counter()
                unlearned = make(model, forget, seed, setting)
                seconds = time.perf_counter() - started if device == "cpu" else None
                yield score(method, unlearned, forget, seed, seconds, mask_ra)


def named(forget: tuple[int, ...]) -> str:
    """A class set as short text."""
    if len(forget) <= 10:
        return "{" + ",".join(map(str, forget)) + "}"
    return "{0-49, 390-439, 950-999}" if forget == PUBLISHED_150 else f"{len(forget)} random"


def earlier(path: Path, runs: list[Run]) -> list[Run]:
    """Reads the runs in ``path`` whose setting and method are not among ``runs``."""
    if not path.exists():
        return []
    now = {(r.setting, r.method) for r in runs}
    with open(path, newline="") as file:
        lines = [line for line in csv.DictReader(file) if "original_ra" in line]
    kept = []
    for line in lines:
        if (line["setting"], line["method"]) not in now:
            figures = [float(line[k]) for k in ("fa", "ra", "overall", "mask_ra", "original_ra")]
            seconds = float(line["seconds"]) if line["seconds"] else None
            forget = tuple(map(int, line["forget"].split()))
            kept.append(
                Run(line["setting"], line["method"], forget, int(line["seed"]), *figures, seconds)
            )
    return kept


def summarise(runs: list[Run]) -> list[str]:
    """One Markdown table per setting: mean and worst of each method."""
    lines = []
    for setting in SETTINGS:
        mine = [r for r in runs if r.setting == setting.key]
        if not mine:
            continue
        sets = ", ".join(map(named, setting.sets))
        lines += ["", f"### {setting.model} on {setting.data}: {sets}", ""]
        if setting.published:
            lines += [f"Published (overall before / after, FA, RA): {setting.published}", ""]
        lines += [
            "| method | runs | FA mean | FA worst | RA mean | RA worst | RA - mask, mean | "
            "RA - mask, worst | RA - original, mean | worst | overall | seconds |",
            "|---|---:|---:|---:|---:|---:|---:|---:|---:|---:|---:|---:|",
        ]
        for method in sorted({r.method for r in mine}, key=ORDER.index):
            of = [r for r in mine if r.method == method]
            gaps = [r.ra - r.mask_ra for r in of]
            seconds = [r.seconds for r in of if r.seconds is not None]
            mean = statistics.mean
            lines.append(
                f"| {method} | {len(of)} | {mean(r.fa for r in of):.2f} | "
                f"{max(r.fa for r in of):.2f} | {mean(r.ra for r in of):.2f} | "
                f"{min(r.ra for r in of):.2f} | {mean(gaps):+.2f} | {min(gaps):+.2f} | "
                f"{mean(r.ra - r.original_ra for r in of):+.2f} | "
                f"{min(r.ra - r.original_ra for r in of):+.2f} | "
                f"{mean(r.overall for r in of):.2f} | "
                + (f"{statistics.median(seconds):.1f} |" if seconds else "- |")
            )
        if setting.note:
            lines += ["", setting.note]
    return lines


def missed(runs: list[Run]) -> list[str]:
    """The targets that the output level misses, in words."""
    misses = []
    for setting in SETTINGS:
        of = [r for r in runs if r.setting == setting.key and r.method == "output"]
        if not of:
            continue
        masked = setting.against == "mask"
        gaps = [r.ra - (r.mask_ra if masked else r.original_ra) for r in of]
        slowest = max(r.seconds for r in of if r.seconds is not None)
        checks = [
            ("worst FA", max(r.fa for r in of), setting.worst_fa),
            (f"mean RA below {setting.against}", -statistics.mean(gaps), setting.mean_gap),
            ("slowest run, s", slowest, setting.seconds),
        ]
        if setting.worst_gap is not None:
            checks.append((f"worst RA below {setting.against}", -min(gaps), setting.worst_gap))
        misses += [
            f"{setting.key}: {what} is {value:.2f}, the target {target}"
            for what, value, target in checks
            if value > target + 1e-9
        ]
    return misses


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("settings", nargs="*", help=", ".join(s.key for s in SETTINGS))
    parser.add_argument("--check", action="store_true", help="exit 1 if a target is missed")
    parser.add_argument("--summary", action="store_true", help="rewrite table1.md, run nothing")
    parser.add_argument("--methods", default=",".join(METHODS))
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--out", type=Path, default=RESULTS)
    arguments = parser.parse_args()
    for name in set(METHODS) - set(arguments.methods.split(",")):
        del METHODS[name]
    known = [s.key for s in SETTINGS]
    if wrong := [k for k in arguments.settings if k not in known]:
        parser.error(f"no setting {wrong}; there are {known}")
    chosen = [s for s in SETTINGS if not arguments.settings or s.key in arguments.settings]
    runs = [
        run for setting in chosen for run in ([] if arguments.summary else
                                              measure(setting, arguments.device))
    ]  # fmt: skip
    arguments.out.mkdir(parents=True, exist_ok=True)
    runs = earlier(arguments.out / "table1.csv", runs) + runs
    with open(arguments.out / "table1.csv", "w", newline="") as file:
        writer = csv.writer(file)
        writer.writerow(Run.__dataclass_fields__)
        for run in runs:
            forget = " ".join(map(str, run.forget))
            seconds = "" if run.seconds is None else f"{run.seconds:.2f}"
            measured = (run.fa, run.ra, run.overall, run.mask_ra, run.original_ra)
            figures = [f"{v:.4f}" for v in measured]
            writer.writerow([run.setting, run.method, forget, run.seed, *figures, seconds])
    failures = missed(runs)
    head = [
        "# Table 1",
        "",
        "Written by `python -m benchmarks.end_to_end.table1`. FA: accuracy on test images of the "
        "forgotten classes; RA: on those of the others; overall: on all, forgotten ones included, "
        "in per cent. Seconds: median from call to result. The output level on ImageNet models "
        "synthesises impressions once per seed and then reads them from disk, so its slowest run "
        "is the one without a cache. `mask` sets the forgotten logits to -inf. ImageNet: 1,000 "
        "images, one per class, so 100 classes are 100 images and one image is 1 % of FA.",
        "",
        f"{processor()}, {torch.get_num_threads()} threads, torch {torch.__version__}, "
        f"Python {platform.python_version()}, {time.strftime('%Y-%m-%d')}. Settings and methods "
        "not run on that day keep their earlier lines; their seconds may be from another machine.",
    ]
    verdict = ["", "## Targets", ""]
    verdict += [f"- missed: {f}" for f in failures] or ["The output level meets all of them."]
    text = "\n".join(head + summarise(runs) + verdict) + "\n"
    (arguments.out / "table1.md").write_text(text)
    print(text)
    if arguments.check and failures:
        sys.exit(1)


if __name__ == "__main__":
    main()
