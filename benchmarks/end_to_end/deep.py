"""Deep forgetting by the default call, on seven models: what it costs and what it leaves.

    python -m benchmarks.end_to_end.deep                          # all models, hours on one core
    python -m benchmarks.end_to_end.deep lenet5 karpathynet --sets 2 --seeds 1
    python -m benchmarks.end_to_end.deep --check                  # exit 1 if a bar is missed
    python -m benchmarks.end_to_end.deep --summary --check        # from the CSV file, run nothing

The call is ``zsu_fast.unlearn(model, forget)``, without a cache and on one thread. Test images are
used for measuring only: all of MNIST's and CIFAR-10's, and 1,000 of ImageNet, one per class, so
that with 100 forgotten classes one image is 1 % of FA (2 % of adapted FA, as 500 of the images are
fitted on). An *image-step* is a forward and a full backward pass of one image, timed in the same
process before and after each call. Bars apply to the mean over class sets and seeds. Writes
``results/deep.csv``, a line per call, and ``deep.md``; models not run keep their earlier lines.
"""

from __future__ import annotations

import argparse
import copy
import csv
import statistics
import sys
import time
import warnings
from collections.abc import Callable, Collection, Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any

import torch
from torch import nn
from torch.nn import functional as F

import zsu_fast
from benchmarks.end_to_end.table1 import hundreds, random_sets
from benchmarks.harness import RESULTS, processor
from benchmarks.measures import TestImages
from benchmarks.real_data import load_data, load_model
from zsu_fast.models import zoo
from zsu_fast.models.infer_spec import resolve_spec

Forget = tuple[int, ...]
_WARM_UP, _STEPS = 2, 5  # passes that are not timed, and those that are, before and after each call


@dataclass(frozen=True)
class Bars:
    """What the mean over class sets and seeds may be at most.

    Attributes:
        ra_below, unmask_ra_below: points of RA, or of RA with the original's last layer put back,
            below the mask's RA.
        unmask_fa: FA with the original's last layer put back.
        image_steps: time of the call.
        probe: (the original's, the golden model's or nan) -> FA of a linear probe.
        adapted_share: adapted FA, as a share of the original's.
    """

    ra_below: float
    unmask_fa: float
    unmask_ra_below: float
    image_steps: float
    probe: Callable[[float, float], float] | None = None
    adapted_share: float | None = None


@dataclass(frozen=True)
class Setting:
    """A model, its data, and what is expected of it.

    Attributes:
        data: as in `load_data`.
        first: the first class set, for which a golden model is known; () for none.
        more: number -> further class sets.
        batch: of the image-steps.
        bars: see `Bars`.
        golden: the golden model of the first set, or its probe in per cent.
    """

    data: str
    first: Forget
    more: Callable[[int], tuple[Forget, ...]]
    batch: int
    bars: Bars
    golden: str | float | None = None

    def sets(self, count: int) -> tuple[Forget, ...]:
        """The first ``count`` class sets."""
        return (*([self.first] if self.first else []), *self.more(count))[:count]


# The golden ResNet-20 does not ship; its probe is from evidence.csv, where it was fitted on
# training images instead of half of the test images.
_RESNET20_GOLDEN = 58.7

MODELS = {
    "lenet5": Setting(
        "mnist", (1, 2, 3, 4), lambda n: random_sets(n, 5, 5), 256,
        Bars(1.0, 2, 1.5, 100_000, probe=lambda _original, golden: golden + 1), "lenet5_golden",
    ),
    "karpathynet": Setting(
        "cifar10", (3, 4, 8), lambda n: random_sets(n, 5, 3), 256,
        Bars(2.0, 1, 3, 60_000, probe=lambda original, golden: 0.4 * original + 0.6 * golden),
        "karpathynet_golden",
    ),
    "resnet20_cifar": Setting(
        "cifar10", (3, 4, 8), lambda n: random_sets(n, 3, 20), 64,
        Bars(1.0, 1, 1.5, 12_000, probe=lambda _original, golden: golden + 1), _RESNET20_GOLDEN,
    ),
    "resnet56_cifar": Setting(
        "cifar10", (3, 4, 8), lambda n: random_sets(n, 3, 56), 64,
        Bars(1.0, 1, 1.5, 12_000, probe=lambda original, _golden: original - 15),
    ),
    "vit_cifar": Setting(
        "cifar10", (3, 4, 8), lambda n: random_sets(n, 3, 77), 64, Bars(2.5, 2, 3.5, 12_000),
    ),
    "tf_efficientnet_lite0": Setting(
        "imagenet", (), lambda n: hundreds(n, 1), 8, Bars(3.0, 2, 3.5, 3_000, adapted_share=0.5),
    ),
    "squeezenet1_0": Setting(
        "imagenet", (), lambda n: hundreds(n, 2), 8, Bars(6, 10, 8, 4_000),
    ),
}  # fmt: skip


@dataclass(frozen=True)
class Run:
    """One measured call; accuracies in per cent, nan where they are not defined."""

    model: str
    forget: str
    seed: int
    ra: float
    mask_ra: float
    fa: float
    unmask_fa: float
    unmask_ra: float
    original_probe: float
    probe: float
    golden_probe: float
    original_adapted_fa: float
    adapted_fa: float
    original_ff: float
    ff: float
    seconds: float
    step_seconds: float
    processor: str
    torch: str
    threads: int
    date: str

    @property
    def ra_below(self) -> float:
        """RA below the mask's, in points."""
        return self.mask_ra - self.ra

    @property
    def unmask_ra_below(self) -> float:
        """RA with the original's last layer put back below the mask's, in points."""
        return self.mask_ra - self.unmask_ra

    @property
    def image_steps(self) -> float:
        """Time of the call in forward and full backward passes of one image."""
        return self.seconds / self.step_seconds


class ImageStep:
    """Times a forward and a full backward pass of one image, in float32 and channels-last."""

    def __init__(self, model: nn.Module, batch: int) -> None:
        self.model = copy.deepcopy(model).eval().requires_grad_(True)
        self.model.to(memory_format=torch.channels_last)
        images = torch.randn(batch, *resolve_spec(model).shape)
        self.images = images.contiguous(memory_format=torch.channels_last)
        self.labels = torch.zeros(batch, dtype=torch.int64)

    def times(self) -> list[float]:
        """Seconds per image, measured several times."""
        seconds = []
        for _ in range(_WARM_UP + _STEPS):
            self.model.zero_grad()
            started = time.perf_counter()
            F.cross_entropy(self.model(self.images), self.labels).backward()
            seconds.append((time.perf_counter() - started) / len(self.images))
        return seconds[_WARM_UP:]


def timed_unlearn(model: nn.Module, forget: Forget, seed: int) -> tuple[nn.Module, float]:
    """The default call, its seconds, and its warnings on stdout."""
    with printed_warnings():
        started = time.perf_counter()
        result = zsu_fast.unlearn(model, forget, seed=seed, progress=False)
        seconds = time.perf_counter() - started
    return result, seconds


@contextmanager
def printed_warnings() -> Iterator[None]:
    """Prints the warnings of the block to stdout, after it."""
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        yield
    for warning in caught:
        print(f"    {warning.category.__name__}: {warning.message}", flush=True)


def machine() -> dict[str, Any]:
    """The machine, torch, and the date."""
    return {
        "processor": processor(), "torch": torch.__version__,
        "threads": torch.get_num_threads(), "date": time.strftime("%Y-%m-%d"),
    }  # fmt: skip


def measure(name: str, sets: int, seeds: int) -> Iterator[Run]:
    """Runs the default call on the class sets of a model, with each seed."""
    setting, original = MODELS[name], load_model(name)
    test = TestImages(original, *load_data(original, setting.data))
    step = ImageStep(original, setting.batch)
    for forget in setting.sets(sets):
        before = test.figures(test.before, forget)
        golden = golden_probe(setting, test) if forget == setting.first else None
        for seed in range(seeds):
            times = step.times()
            result, seconds = timed_unlearn(original, forget, seed)
            step_seconds = statistics.median(times + step.times())
            after = test.figures(test.outputs(test.split(result)), forget)
            run = Run(
                name, " ".join(map(str, forget)), seed, after.ra, before.masked_ra, after.fa,
                after.unmask_fa, after.unmask_ra, _number(before.probe), _number(after.probe),
                _number(golden), before.adapted_fa, after.adapted_fa, _number(before.ff),
                _number(after.ff), seconds, step_seconds, **machine(),
            )  # fmt: skip
            print(f"{name} {run.forget[:24]}: {numbers(run)}", flush=True)
            yield run


def numbers(row: Any) -> str:
    """The measured values of a dataclass object, on one line."""
    return ", ".join(f"{k} {v:.4g}" for k, v in vars(row).items() if isinstance(v, float))


def golden_probe(setting: Setting, test: TestImages) -> float | None:
    """The probe on the golden model of the first class set."""
    if isinstance(setting.golden, str):
        outputs = test.outputs(test.split(zoo.load(setting.golden)))
        return test.figures(outputs, setting.first).probe
    return setting.golden


def _number(value: float | None) -> float:
    return float("nan") if value is None else value


def missed(runs: Sequence[Run]) -> list[str]:
    """The bars that are missed, in words."""
    misses = []
    for name, setting in MODELS.items():
        own, bars = [r for r in runs if r.model == name], setting.bars
        if not own:
            continue
        checks = [
            ("RA below the mask", _mean(own, "ra_below"), bars.ra_below),
            ("un-mask FA", _mean(own, "unmask_fa"), bars.unmask_fa),
            ("un-mask RA below the mask", _mean(own, "unmask_ra_below"), bars.unmask_ra_below),
            ("image-steps", _mean(own, "image_steps"), bars.image_steps),
        ]
        if bars.adapted_share is not None:
            most = bars.adapted_share * _mean(own, "original_adapted_fa")
            checks.append(("adapted FA", _mean(own, "adapted_fa"), most))
        of = own if setting.golden is None else [r for r in own if r.golden_probe > 0]
        if bars.probe is not None and of:
            most = bars.probe(_mean(of, "original_probe"), _mean(of, "golden_probe"))
            checks.append(("probe", _mean(of, "probe"), most))
        misses += [
            f"{name}: {what} is {value:,.2f}, at most {most:,.2f} allowed"
            for what, value, most in checks
            if not value <= most
        ]
    return misses


def _values(runs: Sequence[Run], name: str) -> list[float]:
    """The values of a field, without nan."""
    return [value for run in runs if (value := getattr(run, name)) == value]


def _mean(runs: Sequence[Run], name: str) -> float:
    values = _values(runs, name)
    return statistics.mean(values) if values else float("nan")


# Title, field, decimals, and which value is the worst; None for a mean alone.
Column = tuple[str, str, int, Callable[[list[float]], float] | None]
_COLUMNS: list[Column] = [
    ("RA", "ra", 2, min),
    ("mask's RA", "mask_ra", 2, None),
    ("RA below the mask", "ra_below", 2, max),
    ("FA", "fa", 2, max),
    ("un-mask FA", "unmask_fa", 2, max),
    ("un-mask RA below the mask", "unmask_ra_below", 2, max),
    ("probe: original", "original_probe", 1, None),
    ("result", "probe", 1, max),
    ("golden", "golden_probe", 1, None),
    ("adapted FA: original", "original_adapted_fa", 1, None),
    ("result", "adapted_fa", 1, max),
    ("FF: original", "original_ff", 1, None),
    ("result", "ff", 1, max),
    ("seconds", "seconds", 1, max),
    ("image-steps", "image_steps", 0, max),
]
_HEAD = """# Deep forgetting by the default call

Written by `python -m benchmarks.end_to_end.deep`: `zsu_fast.unlearn(model, forget)` on one \
thread, mean over class sets and seeds, the worst call in brackets. Accuracies in per cent of all \
test images of MNIST or CIFAR-10, or of 1,000 ImageNet images, one per class: with 100 forgotten \
classes one image is 1 % of FA, 2 % of adapted FA. RA, FA: accuracy on the retained, and on the \
forgotten, classes. Un-mask: the original's last layer put back. Probe: FA of a linear classifier \
fitted on the features of one half of the images, measured on the other. Adapted FA: the \
original's last layer fitted to the new features on 500 images, measured on the others. FF: \
accuracy among the forgotten classes alone, with the original's last layer. Image-steps: seconds \
of the whole call over those of a forward and full backward pass of one image (float32, \
channels-last).
"""


def summarise(runs: Sequence[Run]) -> str:
    """The table as Markdown, and the bars that are missed."""
    titles = ["model", "runs", *(title for title, *_ in _COLUMNS), "date"]
    lines = [_HEAD, *machines(runs), ""]
    lines += ["| " + " | ".join(titles) + " |", "|---|" + "---:|" * (len(titles) - 1)]
    for name in MODELS:
        own = [r for r in runs if r.model == name]
        if own:
            cells = [_cell(own, column) for column in _COLUMNS]
            label = f"{_count(len({r.forget for r in own}), 'set')}, {_count(len(own), 'call')}"
            lines.append(f"| {name} | {label} | {' | '.join(cells)} | {max(r.date for r in own)} |")
    lines += [
        "", "The golden models forget only the first class set, and their probe is compared on that"
        " one (bars of the probe too); the figure of ResNet-20's is from an earlier run of"
        " `evidence`, fitted on training images.", "", "## Bars", "",
    ]  # fmt: skip
    lines += [f"- missed: {miss}" for miss in missed(runs)] or ["The means meet all of them."]
    return "\n".join(lines) + "\n"


def machines(rows: Sequence[Any]) -> list[str]:
    """The machines that the rows were measured on, one per line."""
    facts = {(r.processor, r.threads, r.torch, r.date) for r in rows}
    return [f"- {p}, {_count(n, 'thread')}, torch {t}, {date}" for p, n, t, date in sorted(facts)]


def _count(number: int, noun: str) -> str:
    return f"{number} {noun}" if number == 1 else f"{number} {noun}s"


def _cell(runs: Sequence[Run], column: Column) -> str:
    _, name, decimals, worst = column
    values = _values(runs, name)
    if not values:
        return "-"
    text = f"{statistics.mean(values):,.{decimals}f}"
    return text if worst is None else f"{text} ({worst(values):,.{decimals}f})"


def load_rows(path: Path, kind: type[Any]) -> list[Any]:
    """Reads dataclass objects of ``kind`` that `save_rows` wrote; none if there is no file."""
    if not path.exists():
        return []
    convert = {"int": int, "float": float, "str": str}
    with path.open(newline="") as file:
        return [
            kind(**{f.name: convert[str(f.type)](line[f.name]) for f in fields(kind)})
            for line in csv.DictReader(file)
        ]


def save_rows(path: Path, rows: Sequence[Any]) -> None:
    """Writes dataclass objects, one per line."""
    path.parent.mkdir(parents=True, exist_ok=True)
    names = [f.name for f in fields(rows[0])]
    with path.open("w", newline="") as file:
        writer = csv.writer(file)
        writer.writerow(names)
        for row in rows:
            values = [getattr(row, name) for name in names]
            writer.writerow([f"{v:.6g}" if isinstance(v, float) else v for v in values])


def add_runs(
    path: Path,
    kind: type[Any],
    names: Sequence[str],
    measure: Callable[[str], Iterable[Any]],
    replaces: Callable[[Any], bool] = lambda _: True,
) -> list[Any]:
    """The lines of ``path``, with those of the models ``names`` measured anew and written.

    Of these models, lines for which ``replaces`` is False stay.
    """
    runs = load_rows(path, kind)
    for name in names:
        runs = [run for run in runs if run.model != name or not replaces(run)]
        for run in measure(name):
            runs.append(run)
            save_rows(path, runs)  # an interrupted script loses no finished call
    return runs


def parser(description: str, models: Sequence[str]) -> argparse.ArgumentParser:
    """The options that are common to this script and `rivals`."""
    result = argparse.ArgumentParser(description=description)
    result.add_argument("models", nargs="*", help=f"of {', '.join(models)}; all if left out")
    result.add_argument("--sets", type=int, default=3, help="class sets per model")
    result.add_argument("--seeds", type=int, default=2, help="seeds per class set")
    result.add_argument("--summary", action="store_true", help="rewrite the table, run nothing")
    result.add_argument("--out", type=Path, default=RESULTS)
    return result


def run_benchmark(
    options: argparse.ArgumentParser,
    file: str,
    models: Collection[str],
    kind: type[Any],
    measure: Callable[[str, argparse.Namespace], Iterable[Any]],
    summarise: Callable[[Sequence[Any]], str],
    missed: Callable[[Sequence[Any]], list[str]],
    warm_up: Callable[[], Any] = lambda: None,
) -> None:
    """The command line of a script with a line per call: measures, writes table and CSV file.

    Args:
        options: from `parser`, with ``--check``.
        file: of the CSV, in the folder of the results; the table is beside it.
        models: those that can be named.
        kind: of the rows.
        measure: model and options -> its rows.
        summarise: rows -> the table.
        missed: rows -> the bars that they miss, for ``--check``.
        warm_up: called before anything is measured.
    """
    arguments = options.parse_args()
    if wrong := set(arguments.models) - set(models):
        options.error(f"no model {sorted(wrong)}; there are {list(models)}")
    torch.set_num_threads(1)
    if not arguments.summary:
        warm_up()
    path = arguments.out / file
    names = [] if arguments.summary else arguments.models or list(models)
    runs = add_runs(path, kind, names, lambda name: measure(name, arguments))
    text = summarise(runs)
    path.with_suffix(".md").write_text(text)
    print(text)
    if arguments.check and missed(runs):
        sys.exit(1)


def main() -> None:
    options = parser(__doc__.splitlines()[0], list(MODELS))
    options.add_argument("--check", action="store_true", help="exit 1 if a bar is missed")
    run_benchmark(
        options, "deep.csv", MODELS, Run,
        lambda name, given: measure(name, given.sets, given.seeds), summarise, missed,
    )  # fmt: skip


if __name__ == "__main__":
    main()
