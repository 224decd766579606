"""Which retained classes need impressions? Samples of ImageNet's 1,000 classes by three rules.

    python -m benchmarks.end_to_end.sample_rules --impressions lite0.safetensors

Unlearns 100 classes of tf_efficientnet_lite0 with impressions of all of them and of a sample of the
others, drawn by three rules in two sizes; measured on the 1,000 images in ../shared (one per class,
so one image is 1 % of FA). The file of impressions, one per class, comes from
``zsu_fast.synthesize(model, per_class=1).save(path)``. Takes minutes. Writes
``results/sample_rules.md``.
"""

from __future__ import annotations

import argparse
import random
import statistics
import warnings

import torch
from torch import Tensor

from benchmarks.harness import RESULTS
from benchmarks.real_data import load_data, load_model
from zsu_fast import ClassImpressions, ZeroShotUnlearner
from zsu_fast.splitting.split import find_split
from zsu_fast.synthesis import class_sampling as sampling
from zsu_fast.training.class_subset import ClassSubsetTail
from zsu_fast.training.fit_task import make_fit_task
from zsu_fast.training.trainer import train_tail

MODEL, SETS, FORGET = "tf_efficientnet_lite0", 2, 100
SIZES = (32, 256)


def rules(
    weight: Tensor, forget: list[int], retained: list[int], size: int
) -> dict[str, list[int]]:
    """Samples of ``retained`` of the given size, one per rule."""
    others = torch.tensor(retained)
    near = others[sampling.nearness(weight, forget, others).topk(size).indices].tolist()
    return {
        "nearest": near,
        "random": random.Random(0).sample(retained, size),
        "half and half": [
            c
            for c in sampling.sample_classes(weight, forget, retained, size, 0)
            if c not in set(forget)
        ],
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--impressions", required=True)
    options = parser.parse_args()
    warnings.simplefilter("ignore")
    model = load_model(MODEL)
    images, labels = load_data(model, "imagenet")
    made = ClassImpressions.load(options.impressions)
    having = made.labels.unique().tolist()
    run = ZeroShotUnlearner(model, having[:1], impressions=None, progress=False)
    cut = find_split(run.work, "last", made.images[:4], made.labels[:4])
    features = cut.features(made.images)
    (real,) = cut.features(images)
    names = dict(run.work.module.named_parameters())
    parameters = [names[n] for n in cut.parameters]
    start = [p.detach().clone() for p in parameters]
    found: dict[tuple[str, int], list[tuple[float, float]]] = {}
    for number in range(SETS):
        forget = sorted(random.Random(number).sample(having, FORGET))
        retained = [c for c in having if c not in set(forget)]
        forgotten = torch.isin(labels, torch.tensor(forget))
        run.forget_mask.zero_()
        run.forget_mask[forget] = True
        samples = {("original", 0): None, ("none", 0): [], ("all", len(retained)): retained}
        for size in SIZES:
            chosen = rules(start[0], forget, retained, size)
            samples |= {(rule, size): some for rule, some in chosen.items()}
        for key, some in samples.items():
            if some is not None:
                rows = torch.isin(made.labels, torch.tensor([*forget, *some]))
                task = make_fit_task(
                    run.work, cut, tuple(f[rows] for f in features), made.labels[rows],
                    run.forget_mask, run.options.objective, run.options.features, run.options.seed,
                )  # fmt: skip
                train_tail(task, run.options.loop, run.report)
                assert isinstance(task.tail, ClassSubsetTail)
                task.tail.write_back()
            with torch.no_grad():
                right = cut.tail(real).argmax(1) == labels
                for parameter, old in zip(parameters, start, strict=True):
                    parameter.copy_(old)
            score = (
                100 * float(right[forgotten].float().mean()),
                100 * float(right[~forgotten].float().mean()),
            )
            found.setdefault(key, []).append(score)
            print(number, *key, *score, flush=True)
    write(found, len(having))


def write(found: dict[tuple[str, int], list[tuple[float, float]]], having: int) -> None:
    lines = [
        "# Which retained classes need impressions", "",
        f"Written by `python -m benchmarks.end_to_end.sample_rules`: {MODEL}, {FORGET} of "
        f"{having:,} classes forgotten, {SETS} random sets, the same impressions throughout. FA on "
        "100 images, RA on 900; mean and worst. *nearest*: by the cosine of the last layer's "
        "weights with those of a forgotten class; *half and half* is the package's rule "
        "(`zsu_fast.synthesis.class_sampling`).", "",
        "| retained classes with impressions | number | FA % (worst) | RA % (worst) |",
        "|---|---:|---:|---:|",
    ]  # fmt: skip
    for (rule, size), scores in found.items():
        fa, ra = zip(*scores, strict=True)
        lines.append(
            f"| {rule} | {size} | {statistics.mean(fa):.2f} ({max(fa):.0f}) | "
            f"{statistics.mean(ra):.2f} ({min(ra):.2f}) |"
        )
    (RESULTS / "sample_rules.md").write_text("\n".join(lines) + "\n")


if __name__ == "__main__":
    main()
