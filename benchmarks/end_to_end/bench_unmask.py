"""Deep forgetting against random embeddings with a tail as deep: what the un-mask test finds.

    python -m benchmarks.end_to_end.bench_unmask              # all models, over an hour on one core
    python -m benchmarks.end_to_end.bench_unmask tf_efficientnet_lite0 --methods deep
    python -m benchmarks.end_to_end.bench_unmask --check      # exit 1 if random embeddings win

Both methods train the same layers. "random embeddings" replaces impressions and dead-leaves images
by half-normal activations at the split, scaled like those of noise images, and keeps the masked
objective, the loop and the stopping rule of the default. Un-mask puts the original's last layer
back. A broken model also has un-mask FA 0, so methods are compared by un-mask RA minus un-mask FA:
what still works minus what comes back. Test images are used for measuring only. Writes
``results/unmask.csv`` and ``unmask.md``; models and methods not run keep their earlier lines.
"""

from __future__ import annotations

import argparse
import csv
import random
import sys
import time
import warnings
from collections.abc import Iterator
from dataclasses import astuple, dataclass, fields
from pathlib import Path

import torch
from torch import Tensor, nn

import zsu_fast
from benchmarks.end_to_end.table1 import hundreds
from benchmarks.harness import RESULTS, processor
from benchmarks.real_data import load_data, load_model
from zsu_fast.models.infer_spec import resolve_spec
from zsu_fast.models.input_spec import noise_images
from zsu_fast.models.wrapper import working_copy
from zsu_fast.splitting.layers import layer_names
from zsu_fast.training.deep.deep import find_deep_split

Sets = tuple[tuple[int, ...], ...]
TENS: Sets = ((3, 4, 8), *(tuple(sorted(random.Random(s).sample(range(10), s))) for s in (2, 3)))
MODELS: dict[str, tuple[str, Sets]] = {
    "karpathynet": ("cifar10", TENS),
    "resnet20_cifar": ("cifar10", TENS),
    "tf_efficientnet_lite0": ("imagenet", hundreds(1, 1)),
    "squeezenet1_0": ("imagenet", hundreds(1, 2)),
}


METHODS = ("deep", "random embeddings")


@dataclass(frozen=True)
class Row:
    """One measured model; accuracies in per cent of the test images."""

    model: str
    classes: str
    method: str
    fa: float
    ra: float
    mask_ra: float
    unmask_fa: float
    unmask_ra: float
    seconds: float

    @property
    def unmask_gap(self) -> float:
        """What still works minus what comes back."""
        return self.unmask_ra - self.unmask_fa


def random_embeddings(model: nn.Module, forget: tuple[int, ...]) -> nn.Module:
    """Trains the same tail as deep forgetting, on noise at its split."""
    work = working_copy(model, torch.device("cpu"))
    cut = find_deep_split(work, "auto", noise_images(resolve_spec(model), 4))
    return zsu_fast.random_embeddings(model, forget, tail=cut.name)


@torch.no_grad()
def logits(model: nn.Module, images: Tensor) -> Tensor:
    """The logits of all images, 50 at a time."""
    return torch.cat([model(part) for part in images.split(50)])


def measure(name: str, methods: list[str], cache: Path | None) -> Iterator[Row]:
    """Runs the methods on all class sets of a model."""
    source, sets = MODELS[name]
    original = load_model(name)
    images, labels = load_data(original, source)
    before = logits(original, images)
    last = layer_names(original, images[:2])[-1]
    for forget in sets:
        forgotten = torch.zeros(before.shape[1], dtype=torch.bool)
        forgotten[list(forget)] = True
        of = forgotten[labels]

        def accuracy(of_logits: Tensor, rows: Tensor) -> float:
            return 100 * float((of_logits.argmax(1) == labels)[rows].float().mean())

        mask_ra = accuracy(before.masked_fill(forgotten, -torch.inf), ~of)
        for method in methods:
            started = time.perf_counter()
            if method == "deep":
                result = zsu_fast.unlearn(
                    original, forget, depth="deep", cache=cache, progress=False
                )
            else:
                result = random_embeddings(original, forget)
            seconds = time.perf_counter() - started
            own = logits(result, images)
            result.set_submodule(last, original.get_submodule(last))
            back = logits(result, images)
            row = Row(
                name, ",".join(map(str, forget)) if len(forget) < 10 else f"{len(forget)} random",
                method, accuracy(own, of), accuracy(own, ~of), mask_ra, accuracy(back, of),
                accuracy(back, ~of), seconds,
            )  # fmt: skip
            print(row, flush=True)
            yield row


def missed(rows: list[Row]) -> list[str]:
    """Where random embeddings do better, in words."""
    misses = []
    for row in rows:
        if row.method != "deep":
            continue
        (other,) = [r for r in rows if r.method != "deep" and r.classes == row.classes
                    and r.model == row.model]  # fmt: skip
        where = f"{row.model} {{{row.classes}}}"
        if row.unmask_gap < other.unmask_gap:
            misses.append(
                f"{where}: un-mask RA - FA {row.unmask_gap:.2f}, random {other.unmask_gap:.2f}"
            )
        if row.fa > other.fa or row.ra < other.ra:
            misses.append(
                f"{where}: FA / RA {row.fa:.2f} / {row.ra:.2f}, random {other.fa:.2f} / "
                f"{other.ra:.2f}"
            )
    return misses


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("models", nargs="*", default=list(MODELS))
    parser.add_argument("--methods", default=",".join(METHODS))
    parser.add_argument("--check", action="store_true", help="exit 1 if random embeddings win")
    parser.add_argument("--cache", type=Path, help="folder of cached impressions")
    parser.add_argument("--out", type=Path, default=RESULTS)
    parser.add_argument("--summary", action="store_true", help="rewrite the table, run nothing")
    arguments = parser.parse_args()
    warnings.simplefilter("ignore")
    chosen = [] if arguments.summary else arguments.models
    methods = arguments.methods.split(",")
    if wrong := set(methods) - set(METHODS):
        parser.error(f"no method {sorted(wrong)}; there are {METHODS}")
    rows = [row for name in chosen for row in measure(name, methods, arguments.cache)]
    file = arguments.out / "unmask.csv"
    if file.exists():
        with file.open(newline="") as old:
            rows = (
                [
                    Row(*r[:3], *map(float, r[3:]))  # type: ignore[call-arg]
                    for r in list(csv.reader(old))[1:]
                    if r[0] not in chosen or r[2] not in methods
                ]
                + rows
            )
    sets = list(dict.fromkeys((r.model, r.classes) for r in rows))
    models = list(MODELS)
    rows = sorted(rows, key=lambda r: (models.index(r.model), sets.index((r.model, r.classes)),
                                       METHODS.index(r.method)))  # fmt: skip
    with file.open("w", newline="") as new:
        csv.writer(new).writerows([[f.name for f in fields(Row)], *map(astuple, rows)])
    failures = missed(rows)
    lines = [
        "# The un-mask test with a deeper tail", "",
        "Written by `python -m benchmarks.end_to_end.bench_unmask`: deep forgetting and random "
        "embeddings, which train the same layers. Un-mask: the original's last layer put back; per "
        "cent of the test images (ImageNet: 1,000, one per class). Un-mask RA - FA: what still "
        "works minus what comes back; a broken model has un-mask FA 0 too.", "",
        f"{processor()}, {torch.get_num_threads()} threads, torch {torch.__version__}, "
        f"{time.strftime('%Y-%m-%d')}.", "",
        "| model | forget | method | FA | RA | RA of the mask | un-mask FA | un-mask RA | "
        "un-mask RA - FA | s |",
        "|---|---|---|---:|---:|---:|---:|---:|---:|---:|",
    ]  # fmt: skip
    for r in rows:
        values = [*astuple(r)[:-1], r.unmask_gap, r.seconds]
        cells = [f"{v:.2f}" if isinstance(v, float) else str(v) for v in values]
        lines.append("| " + " | ".join(cells) + " |")
    lines += ["", *([f"- random embeddings do better: {f}" for f in failures] or ["Deep forgetting "
              "does as well or better everywhere."])]  # fmt: skip
    (arguments.out / "unmask.md").write_text("\n".join(lines) + "\n")
    print("\n".join(lines))
    if arguments.check and failures:
        sys.exit(1)


if __name__ == "__main__":
    main()
