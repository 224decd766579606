"""Five requests to forget one class each, against one request for all five classes.

    python -m benchmarks.end_to_end.request_series            # all rows, 10 minutes on 2 cores
    python -m benchmarks.end_to_end.request_series --check    # exit 1 if a target is missed

Each request starts from the result of the one before and passes the classes forgotten so far as
``forgotten=``. Test images are used for measuring only. Writes ``results/request_series.md``.
"""

from __future__ import annotations

import argparse
import copy
import random
import sys
import time
import warnings

import torch
from torch import nn

import zsu_fast
from benchmarks.harness import RESULTS
from benchmarks.real_data import Data, load_data, load_model
from zsu_fast.evaluation.accuracy import Evaluation
from zsu_fast.splitting.layers import layer_names

MODELS = ("karpathynet", "resnet20_cifar")
ORDERS = 3
WORST_FA, WORST_UNMASK, WORST_GAP = 0.5, 3.0, 3.0


def orders() -> list[list[int]]:
    """Three sets of five of ten classes, each in random order."""
    draw = random.Random(8)
    return [draw.sample(range(10), 5) for _ in range(ORDERS)]


def worst_class(result: Evaluation, classes: list[int]) -> float:
    """The highest accuracy on any of ``classes``, %."""
    return max(result.per_class[c] for c in classes)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--check", action="store_true")
    parser.add_argument("models", nargs="*", default=MODELS)
    arguments = parser.parse_args()
    warnings.simplefilter("ignore")
    lines, missed = [], 0
    for name in arguments.models:
        model = load_model(name)
        data = load_data(model, "cifar10")
        for order in orders():
            line, good = compare(name, model, data, order)
            lines.append(line)
            missed += not good
            print(line, flush=True)
    if tuple(arguments.models) == MODELS:
        write(lines)
    if missed:
        print(f"{missed} rows miss a target")
    sys.exit(1 if missed and arguments.check else 0)


def compare(name: str, model: nn.Module, data: Data, order: list[int]) -> tuple[str, bool]:
    """A row of the table, and whether it meets the targets."""
    images, labels = data
    started = time.perf_counter()
    current, worst = model, 0.0
    for i, label in enumerate(order):
        current = zsu_fast.unlearn(current, [label], forgotten=order[:i], progress=False)
        forgotten = torch.isin(labels, torch.tensor(order[: i + 1]))
        part = images[forgotten], labels[forgotten]
        result = zsu_fast.evaluate(current, part, order[: i + 1])
        worst = max(worst, worst_class(result, order[: i + 1]))
    seconds = time.perf_counter() - started
    result = zsu_fast.evaluate(current, data, order)
    unmasked = copy.deepcopy(current)
    last = layer_names(model, images[:2])[-1]
    unmasked.set_submodule(last, model.get_submodule(last))
    back = worst_class(zsu_fast.evaluate(unmasked, data, order), order)
    once = zsu_fast.evaluate(zsu_fast.unlearn(model, order, progress=False), data, order)
    mask = zsu_fast.evaluate(zsu_fast.mask(model, order), data, order)
    gap = mask.retain_accuracy - result.retain_accuracy
    good = worst <= WORST_FA and gap <= WORST_GAP and back <= WORST_UNMASK
    return (
        f"| {name} | {', '.join(map(str, order))} | {worst:.2f} | {back:.2f} | "
        f"{result.retain_accuracy:.2f} | {once.forget_accuracy:.2f} | "
        f"{once.retain_accuracy:.2f} | {mask.retain_accuracy:.2f} | {gap:+.2f} | "
        f"{seconds:.0f} | {'met' if good else 'missed'} |",
        good,
    )


def write(lines: list[str]) -> None:
    text = f"""# Five requests in a row

Written by `python -m benchmarks.end_to_end.request_series`: CIFAR-10, 10,000 test images
(JPEG-coded, see the README), one class per request, `unlearn(model, [c], forgotten=earlier)`,
seed 0.

*Worst class FA* is the highest accuracy on any class forgotten so far, after any of the five
requests; *un-mask* is the same with the first model's last layer put back after the fifth. Targets:
at most {WORST_FA} % and {WORST_UNMASK} %, and RA after the fifth request at most {WORST_GAP} points
below the mask's.

"""
    columns = ("model", "order", "worst class FA %", "un-mask %", "RA %", "FA %, one request")
    columns += ("RA %, one request", "RA %, mask", "RA below the mask", "seconds", "targets")
    text += f"| {' | '.join(columns)} |\n|---|---|{'---:|' * 8}---|\n"
    (RESULTS / "request_series.md").write_text(text + "\n".join(lines) + "\n")


if __name__ == "__main__":
    main()
