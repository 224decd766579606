"""Forgetting identities of encoders by the default call: who is recognised afterwards.

    python -m benchmarks.end_to_end.encoders                        # all models, hours on one core
    python -m benchmarks.end_to_end.encoders lenet5 --sets 2
    python -m benchmarks.end_to_end.encoders --check                # exit 1 if a bar is missed
    python -m benchmarks.end_to_end.encoders --summary              # from the CSV file, run nothing

The call is ``zsu_fast.unlearn(EmbeddingClassifier(encoder, templates), forget)``, without a cache
and on one thread. The encoder is a public classifier without its last layer. Galleries: five
training images per class (MNIST, CIFAR-10); the rows of the classifier (``classifier rows``); one
image of each of 1,000 classes (``one shot``), where the queries are the same images mirrored and
cropped. Other queries are test images, which measure only. The threshold is that of the encoder
that is measured: 1 % of the similarities between images of retained classes and templates of other
retained classes exceed it. Writes ``results/encoders.csv``, a line per call, and ``encoders.md``.
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from itertools import combinations
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

import zsu_fast
from benchmarks.end_to_end.deep import (
    machine,
    machines,
    numbers,
    parser,
    printed_warnings,
    run_benchmark,
)
from benchmarks.end_to_end.table1 import hundreds
from benchmarks.real_data import load_data, load_model, load_split
from zsu_fast import EmbeddingClassifier
from zsu_fast.models import zoo
from zsu_fast.models.infer_spec import resolve_spec

Forget = tuple[int, ...]
_ENROLLED = 5  # images per class
_TRAINING = 2000  # training images that these are the first of
_BORDER = 12  # pixels that a cropped query lacks on each side
_NAN = float("nan")


@dataclass(frozen=True)
class Run:
    """One measured call; in per cent of images, nan where it is not defined.

    Attributes:
        rank1, rank1_original: retained images whose best template is their own, among all.
        tar, tar_original: retained images as similar to their own template as the threshold.
        found, found_original: forgotten images of which that is so and whose best template it is.
        found_anyhow: forgotten images whose best template is their own, whatever the threshold.
        accepted: forgotten images that anyone accepts.
        most: forgotten images that the retained identity accepts that accepts most of them.
        most_of_accepted: the same in per cent of ``accepted``.
        enrolled, enrolled_original, enrolled_golden: forgotten images whose best template is their
            own in a gallery enrolled anew with the encoder.
        mask: top-1 on retained images of the original with the forgotten templates left out.
        seconds, cpu_seconds: of the call.
        deep_cpu_seconds: of `unlearn` of the whole classifier.
    """

    model: str
    forget: str
    rank1_original: float
    rank1: float
    tar_original: float
    tar: float
    found_original: float
    found: float
    found_anyhow: float
    accepted: float
    most: float
    most_of_accepted: float
    enrolled_original: float
    enrolled: float
    enrolled_golden: float
    mask: float
    seconds: float
    cpu_seconds: float
    deep_cpu_seconds: float
    processor: str
    torch: str
    threads: int
    date: str


@dataclass(frozen=True)
class Case:
    """An encoder, its gallery, and queries.

    Attributes:
        encoder: as it is.
        classifier: with its gallery.
        queries, labels: images and whom they show.
        gallery: images that the gallery is enrolled from, and whom they show; None for rows.
        whole: the classifier that the encoder is a part of.
        golden: the encoder trained without the classes of the first set, or None.
    """

    encoder: nn.Module
    classifier: EmbeddingClassifier
    queries: Tensor
    labels: Tensor
    gallery: tuple[Tensor, Tensor] | None
    whole: nn.Module
    golden: nn.Module | None = None


def as_encoder(model: nn.Module) -> tuple[nn.Module, nn.Linear]:
    """The model without its last layer, and that layer."""
    spec = resolve_spec(model)
    name = next(n for n in ("fc3", "linear", "classifier") if hasattr(model, n))
    last = getattr(model, name)
    setattr(model, name, nn.Identity())
    model.input_spec = spec  # type: ignore[assignment]
    return model, last


@torch.no_grad()
def embed(encoder: nn.Module, images: Tensor) -> Tensor:
    return torch.cat([encoder(batch).flatten(1) for batch in images.split(250)])


def enrol(encoder: nn.Module, gallery: tuple[Tensor, Tensor]) -> list[Tensor]:
    """The templates of each class, [k, D]."""
    embeddings, labels = embed(encoder, gallery[0]), gallery[1]
    return [embeddings[labels == c] for c in range(int(labels.max()) + 1)]


def small(name: str, data: str) -> Case:
    """Five training images per class as the gallery, all test images as queries."""
    encoder, _ = as_encoder(load_model(name))
    spec = resolve_spec(encoder)
    images, labels = load_split(data, "train", _TRAINING)
    first = torch.cat([(labels == c).nonzero()[:_ENROLLED, 0] for c in range(10)])
    gallery = spec.normalise(images[first]), labels[first]
    golden = None
    if f"{name}_golden" in zoo.ZOO:
        golden, _ = as_encoder(zoo.load(f"{name}_golden"))
    queries, truth = load_data(encoder, data)
    classifier = EmbeddingClassifier(encoder, enrol(encoder, gallery))
    return Case(encoder, classifier, queries, truth, gallery, load_model(name), golden)


def rows() -> Case:
    """EfficientNet-lite0 with the rows of its classifier as templates."""
    whole = load_model("tf_efficientnet_lite0")
    encoder, last = as_encoder(load_model("tf_efficientnet_lite0"))
    classifier = EmbeddingClassifier(encoder, last.weight, metric="dot", bias=last.bias)
    return Case(encoder, classifier, *load_data(whole, "imagenet"), None, whole)


def one_shot() -> Case:
    """EfficientNet-lite0 with one image per class as the gallery."""
    whole = load_model("tf_efficientnet_lite0")
    encoder, _ = as_encoder(load_model("tf_efficientnet_lite0"))
    images, labels = load_data(whole, "imagenet")
    inner = images[:, :, _BORDER:-_BORDER, _BORDER:-_BORDER]
    cropped = F.interpolate(inner, images.shape[2:], mode="bilinear", antialias=True)
    queries = torch.cat([images.flip(3), cropped])
    classifier = EmbeddingClassifier(encoder, enrol(encoder, (images, labels)))
    return Case(encoder, classifier, queries, labels.repeat(2), (images, labels), whole)


def pairs(count: int, seed: int) -> tuple[Forget, ...]:
    """``count`` different pairs of ten classes."""
    every = list(combinations(range(10), 2))
    order = torch.randperm(len(every), generator=torch.Generator().manual_seed(seed))
    return tuple(every[i] for i in order[:count].tolist())


@dataclass(frozen=True)
class Setting:
    """A case, its class sets, and what is expected of the mean over these.

    Attributes:
        found: share of forgotten images that are recognised, at most; whatever the threshold with
            ``anyhow``.
        below: points of rank-1 below the original's, or of top-1 below the mask's, at most.
    """

    case: Callable[[], Case]
    sets: Callable[[int], tuple[Forget, ...]]
    count: int
    found: float
    below: float
    anyhow: bool = False


MODELS = {
    "lenet5": Setting(
        lambda: small("lenet5", "mnist"), lambda n: ((1, 2, 3, 4), *pairs(n, 5)), 5, 3, 2
    ),
    "resnet20_cifar": Setting(
        lambda: small("resnet20_cifar", "cifar10"), lambda n: pairs(n, 20), 5, 3, 2
    ),
    "resnet56_cifar": Setting(
        lambda: small("resnet56_cifar", "cifar10"), lambda n: pairs(n, 56), 5, 3, 2
    ),
    "classifier rows": Setting(rows, lambda n: hundreds(n, 1), 3, 3, 3, anyhow=True),
    "one shot": Setting(one_shot, lambda n: hundreds(n, 3), 1, 5, 2, anyhow=True),
}


def figures(case: Case, encoder: nn.Module, forget: Forget) -> dict[str, float]:
    """What an encoder does with the queries, and the templates of the original one."""
    gallery, labels = case.classifier.gallery, case.labels
    scores = torch.cat([gallery(z) for z in embed(encoder, case.queries).split(1000)])
    forgotten_mask = torch.zeros(scores.shape[1], dtype=torch.bool)
    forgotten_mask[list(forget)] = True
    of_forgotten = forgotten_mask[labels]
    own = F.one_hot(labels, scores.shape[1]).bool()
    impostors = scores[~of_forgotten][~own[~of_forgotten] & ~forgotten_mask]
    threshold = impostors.topk(max(1, len(impostors) // 100)).values[-1]
    top, best = scores.max(1)
    right, accepted = best == labels, top >= threshold
    masked = scores.masked_fill(forgotten_mask, -torch.inf).argmax(1)
    whom = (
        torch.bincount(best[of_forgotten & accepted], minlength=len(forgotten_mask))
        * ~forgotten_mask
    )

    def share(which: Tensor, of: Tensor) -> float:
        return 100 * float(which[of].float().mean())

    total, count = int((of_forgotten & accepted).sum()), int(of_forgotten.sum())
    return {
        "rank1": share(right, ~of_forgotten),
        "tar": share(scores[own] >= threshold, ~of_forgotten),
        "found": share(right & accepted, of_forgotten),
        "found_anyhow": share(right, of_forgotten),
        "accepted": share(accepted, of_forgotten),
        "most": 100 * int(whom.max()) / count,
        "most_of_accepted": 100 * int(whom.max()) / total if total else 0.0,
        "mask": share(masked == labels, ~of_forgotten),
    }  # fmt: skip


def enrolled(case: Case, encoder: nn.Module, forget: Forget) -> float:
    """Rank-1 of forgotten images in a gallery that is enrolled with ``encoder``."""
    if case.gallery is None:
        return _NAN
    new = EmbeddingClassifier(encoder, enrol(encoder, case.gallery))
    shown = torch.isin(case.labels, torch.tensor(forget))
    best = new.similarities(embed(encoder, case.queries[shown])).argmax(1)
    return 100 * float((best == case.labels[shown]).float().mean())


def timed(model: nn.Module, forget: Forget) -> tuple[Any, float, float]:
    """The default call, its seconds and those of the processor; its warnings go to stdout."""
    with printed_warnings():
        started, cpu = time.perf_counter(), time.process_time()
        result = zsu_fast.unlearn(model, forget, progress=False)
        seconds, cpu = time.perf_counter() - started, time.process_time() - cpu
    return result, seconds, cpu


def measure(name: str, sets: int) -> Iterator[Run]:
    """Runs the default call on the class sets of a model."""
    setting = MODELS[name]
    case = setting.case()
    for number, forget in enumerate(setting.sets(min(sets, setting.count))):
        before = figures(case, case.encoder, forget)
        result, seconds, cpu = timed(case.classifier, forget)
        after = figures(case, result.encoder, forget)
        deep_cpu = timed(case.whole, forget)[2] if number == 0 else _NAN
        golden = _NAN
        if case.golden is not None and number == 0:
            golden = enrolled(case, case.golden, forget)
        run = Run(
            name, " ".join(map(str, forget)), before["rank1"], after["rank1"], before["tar"],
            after["tar"], before["found"], after["found"], after["found_anyhow"],
            after["accepted"], after["most"], after["most_of_accepted"],
            enrolled(case, case.encoder, forget), enrolled(case, result.encoder, forget), golden,
            before["mask"], seconds, cpu, deep_cpu, **machine(),
        )  # fmt: skip
        print(f"{name} {run.forget[:24]}: {numbers(run)}", flush=True)
        yield run


def checks(name: str, runs: Sequence[Run]) -> list[tuple[str, float, float]]:
    """The bars of a model: what, its value, and the most that is allowed."""
    setting = MODELS[name]
    found = "found_anyhow" if setting.anyhow else "found"
    against = "mask" if name == "classifier rows" else "rank1_original"
    result = [
        ("forgotten images recognised", _mean(runs, found), setting.found),
        (
            "retained rank-1 below the original's",
            _mean(runs, against) - _mean(runs, "rank1"), setting.below,
        ),
    ]  # fmt: skip
    if not setting.anyhow:  # two of ten: each of the others has a share of one in eight
        shares = [2 * 100 / (10 - len(r.forget.split())) for r in runs]
        worst = max(r.most - share for r, share in zip(runs, shares, strict=True))
        result.append(("most accepted by one identity, above twice its share", worst, 0.0))
    ratio = [r.cpu_seconds / r.deep_cpu_seconds for r in runs if r.deep_cpu_seconds > 0]
    if ratio:
        result.append(("time, as a multiple of depth='deep'", statistics.mean(ratio), 1.2))
    return result


def missed(runs: Sequence[Run]) -> list[str]:
    """The bars that are missed, in words."""
    return [
        f"{name}: {what} is {value:,.2f}, at most {most:,.2f} allowed"
        for name in MODELS
        if (own := [r for r in runs if r.model == name])
        for what, value, most in checks(name, own)
        if not value <= most
    ]


def _mean(runs: Sequence[Run], name: str) -> float:
    values = [value for run in runs if (value := getattr(run, name)) == value]
    return statistics.mean(values) if values else _NAN


_COLUMNS = [
    ("retained rank-1: original", "rank1_original"), ("result", "rank1"), ("mask", "mask"),
    ("retained TAR: original", "tar_original"), ("result", "tar"),
    ("forgotten recognised: original", "found_original"), ("result", "found"),
    ("whatever the threshold", "found_anyhow"), ("forgotten accepted by anyone", "accepted"),
    ("by one retained identity", "most"), ("of the accepted", "most_of_accepted"),
    ("enrolled anew: original", "enrolled_original"), ("result", "enrolled"),
    ("golden", "enrolled_golden"), ("seconds", "seconds"), ("CPU seconds", "cpu_seconds"),
    ("of depth='deep'", "deep_cpu_seconds"),
]  # fmt: skip
_HEAD = """# Forgetting identities of encoders by the default call

Written by `python -m benchmarks.end_to_end.encoders`, one thread, a line per call, in per cent. \
Rank-1: images of retained classes whose best template, among all, is their own (for classifier \
rows, top-1; mask: without the forgotten templates). TAR: the share of them at least as similar to \
their own template as the threshold, which 1 % of the similarities between retained images and \
other retained templates exceed. Recognised: forgotten images whose best template is their own, at \
that threshold. Accepted: forgotten images whose best template, whoever's it is, reaches the \
threshold. Enrolled anew: forgotten images whose best template is their own in a gallery of the \
same images made with the encoder that is measured. Of ImageNet there is one image per class: with \
100 forgotten classes, one image is 1 %, one query of `one shot` half of that.
"""


def summarise(runs: Sequence[Run]) -> str:
    """The table as Markdown, and the bars that are missed."""
    titles = ["model", "forgotten", *(title for title, _ in _COLUMNS)]
    lines = [_HEAD, *machines(runs), "", "| " + " | ".join(titles) + " |"]
    lines.append("|---|---|" + "---:|" * len(_COLUMNS))
    for run in sorted(runs, key=lambda r: list(MODELS).index(r.model)):
        values = [getattr(run, name) for _, name in _COLUMNS]
        cells = ["-" if v != v else f"{v:,.1f}" for v in values]
        count = len(run.forget.split())
        label = run.forget if count < 10 else f"{count} classes"
        lines.append(f"| {run.model} | {label} | {' | '.join(cells)} |")
    lines += ["", "## Bars", ""]
    lines += [f"- missed: {miss}" for miss in missed(runs)] or ["The means meet all of them."]
    return "\n".join(lines) + "\n"


def main() -> None:
    def warm_up() -> None:  # what a first call imports and compiles counts for none
        zsu_fast.unlearn(zoo.load("lenet5"), [0], steps=10, progress=False)

    options = parser(__doc__.splitlines()[0], list(MODELS))
    options.add_argument("--check", action="store_true", help="exit 1 if a bar is missed")
    options.set_defaults(sets=5)
    run_benchmark(
        options, "encoders.csv", MODELS, Run,
        lambda name, given: measure(name, given.sets), summarise, missed, warm_up,
    )  # fmt: skip


if __name__ == "__main__":
    main()
