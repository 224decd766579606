"""A multi-label classifier forgets two of ten classes: CIFAR-10 images, two side by side.

    python -m benchmarks.end_to_end.multi_label            # 2 minutes on one thread

Each image is two CIFAR-10 images side by side, 3 x 32 x 64, with the classes of both as labels. The
model is the public ResNet-20 with a new last layer, ten sigmoids, which is trained here on features
of training images; the backbone stays as it is. Test images are used for measuring only. Writes
``results/multi_label.md``.
"""

from __future__ import annotations

import argparse
import copy
import time
import warnings

import torch
from torch import Tensor, nn
from torch.nn import functional as F

import zsu_fast
from benchmarks.harness import RESULTS, machine
from benchmarks.real_data import Data, load_model, load_split
from zsu_fast.evaluation.multi_label import MultiLabelEvaluation
from zsu_fast.models.infer_spec import resolve_spec

FORGET = [3, 8]  # cat, ship
SHAPE = (3, 32, 64)
LAST = "linear"
TRAIN, TEST = 8000, 2000


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--share", type=float, default=1.0, help="of the images; 1 writes results")
    share = parser.parse_args().share
    warnings.simplefilter("ignore")
    torch.set_num_threads(1)
    torch.manual_seed(0)
    model = load_model("resnet20_cifar")
    spec = resolve_spec(model)
    train = pairs(load_split("cifar10", "train"), int(share * TRAIN))
    test = pairs(load_split("cifar10", "test"), int(share * TEST))
    model.set_submodule(LAST, nn.Identity())
    features = [in_batches(model, spec.normalise(images)) for images, _ in (train, test)]
    without = ~train[1][:, FORGET].any(1)
    heads = [fit(features[0], train[1]), fit(features[0][without], train[1][without])]
    model.set_submodule(LAST, heads[0])

    rows = [("original", measure(heads[0], features[1], test[1]), None)]
    masked = zsu_fast.mask(heads[0], FORGET)
    rows.append(("mask", measure(masked, features[1], test[1]), None))
    for depth in ("output", "deep"):
        run = zsu_fast.ZeroShotUnlearner(
            model, FORGET, depth=depth, multi_label=True, input_shape=SHAPE, mean=spec.mean,
            std=spec.std, progress=False,
        )  # fmt: skip
        started = time.process_time()
        result = run.run()
        seconds = time.process_time() - started
        print(f"{depth}: level {run.record.depth['level']}, {seconds:.0f} s", flush=True)
        last, new = result.get_submodule(LAST), features[1]
        if depth == "deep":
            headless = copy.deepcopy(result)
            headless.set_submodule(LAST, nn.Identity())
            new = in_batches(headless, spec.normalise(test[0]))
        rows.append((depth, measure(last, new, test[1]), seconds))
        back = f"{depth}, original last layer back"
        rows.append((back, measure(heads[0], new, test[1]), None))
    name = "last layer trained without the classes"
    rows.append((name, measure(heads[1], features[1], test[1]), None))
    lines = table(rows)
    print("\n".join(lines))
    if share == 1:
        write(lines, len(train[0]), len(test[0]))


def pairs(data: Data, count: int) -> Data:
    """Images of two side by side, uint8 [count, *SHAPE], and labels, bool [count, 10]."""
    images, labels = data
    draw = torch.Generator().manual_seed(len(images))
    left, right = (torch.randint(len(images), (count,), generator=draw) for _ in range(2))
    joined = torch.cat([images[left], images[right]], 3)
    both = [F.one_hot(labels[side], 10) for side in (left, right)]
    return joined, (both[0] + both[1]).bool()


@torch.no_grad()
def in_batches(model: nn.Module, images: Tensor) -> Tensor:
    return torch.cat([model(part) for part in images.split(250)])


def fit(features: Tensor, labels: Tensor) -> nn.Linear:
    """Trains a last layer on features, float [N, D], by the cross-entropy of each sigmoid."""
    head = nn.Linear(features.shape[1], labels.shape[1])
    optimiser = torch.optim.Adam(head.parameters(), 1e-2)
    for _ in range(3000):
        chosen = torch.randint(len(features), (256,))
        optimiser.zero_grad()
        F.binary_cross_entropy_with_logits(
            head(features[chosen]), labels[chosen].float()
        ).backward()
        optimiser.step()
    return head.requires_grad_(True).eval()


def measure(head: nn.Module, features: Tensor, labels: Tensor) -> MultiLabelEvaluation:
    result = zsu_fast.evaluate(head, (features, labels), FORGET, multi_label=True)
    assert isinstance(result, MultiLabelEvaluation)
    return result


def table(rows: list[tuple[str, MultiLabelEvaluation, float | None]]) -> list[str]:
    lines = [
        "| model | FA | forgotten AP | RA | retained rate | retained F1 | seconds |",
        "|---|---:|---:|---:|---:|---:|---:|",
    ]
    for name, r, seconds in rows:
        figures = (
            r.forget_rate, r.forget_average_precision, r.retain_average_precision, r.retain_rate,
            r.retain_f1,
        )  # fmt: skip
        cells = " | ".join(f"{figure:.1f}" for figure in figures)
        lines.append(f"| {name} | {cells} | {'' if seconds is None else f'{seconds:.1f}'} |")
    prevalence = rows[0][1].forget_prevalence
    return [*lines, "", f"Chance level of the forgotten AP: {prevalence:.1f} %."]


def write(lines: list[str], train: int, test: int) -> None:
    RESULTS.mkdir(parents=True, exist_ok=True)
    head = [
        "# A multi-label classifier forgets two of ten classes",
        "",
        f"By `benchmarks/end_to_end/multi_label.py`: pairs of CIFAR-10 images side by side, "
        f"{train} to train the last layer, {test} to measure; ResNet-20; forgotten: classes 3 "
        f"(cat) and 8 (ship). In per cent. FA: labels of forgotten classes still predicted; RA: "
        f"mean average precision (AP) of the retained classes; rate: their labels that are "
        f"predicted. One thread.",
        "",
        ", ".join(f"{k}: {v}" for k, v in machine().items()),
        "",
    ]
    (RESULTS / "multi_label.md").write_text("\n".join([*head, *lines, ""]))


if __name__ == "__main__":
    main()
