"""Deep forgetting against other ways to change the features without data, on the same rows.

    python -m benchmarks.end_to_end.rivals                        # all models, hours on one core
    python -m benchmarks.end_to_end.rivals karpathynet --sets 1 --seeds 1
    python -m benchmarks.end_to_end.rivals resnet20_cifar --methods "LEACE,SVD projection"
    python -m benchmarks.end_to_end.rivals --summary              # from the CSV file, run nothing

Each rival gets the rows that deep forgetting draws for itself (scenes and inverted rows, with the
original's logits), may change the layers that deep forgetting trains, and takes the same tests.
Where it has a free constant that was published as a search, the value is searched here too, on the
rows (`Case.score`). Rivals change features, not outputs, so RA is measured with the forgotten
logits masked, for every method. Test images are used for measuring only. Writes
``results/rivals.csv``, a line per result, and ``rivals.md``; models and methods that are not run
keep their earlier lines.
"""

from __future__ import annotations

import copy
import csv
import itertools
import statistics
import time
import warnings
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

import zsu_fast
from benchmarks.end_to_end.deep import (
    MODELS,
    Forget,
    add_runs,
    machine,
    machines,
    numbers,
    parser,
)
from benchmarks.harness import RESULTS
from benchmarks.measures import TestImages
from benchmarks.real_data import load_data, load_model
from zsu_fast.models.prepare import prepare_model
from zsu_fast.models.wrapper import LogitsModel
from zsu_fast.runtime.hooks import forward_pre_hooks
from zsu_fast.runtime.progress import Reporter
from zsu_fast.training.deep.deep import DeepRows
from zsu_fast.training.deep.rows import RowSource
from zsu_fast.training.deep.settings import DeepSettings
from zsu_fast.training.deep.split import DeepSplit, find_deep_split
from zsu_fast.training.deep.tail import FrozenClassifierTail
from zsu_fast.training.features import FeatureSet

NAMES = ("resnet20_cifar", "karpathynet", "vit_cifar", "tf_efficientnet_lite0")
_RELEARN = {"resnet20_cifar": 200, "karpathynet": 200, "vit_cifar": 200}  # most steps
_CHUNK = 256
_FISHER_BATCH = 64


@dataclass
class Case:
    """A model, classes to forget, and the rows that rivals may use.

    Attributes:
        original: the model; it is not changed.
        forget: the classes.
        seed: of everything random.
        work: a copy of the original.
        deep: the layers of ``work`` that deep forgetting trains.
        tail: those layers, with the original last layer.
        rows: scenes and inverted rows at the split, with the original's logits.
        hidden: bool [C], the classes to forget.
        seconds: what drawing the rows took.
    """

    original: nn.Module
    forget: Forget
    seed: int
    work: LogitsModel
    deep: DeepSplit
    tail: FrozenClassifierTail
    rows: FeatureSet
    hidden: Tensor
    seconds: float

    @classmethod
    def draw(cls, original: nn.Module, forget: Forget, seed: int) -> Case:
        """Draws the rows as deep forgetting does."""
        started = time.perf_counter()
        prepared = prepare_model(original)
        hidden = torch.zeros(prepared.classes, dtype=torch.bool)
        hidden[list(forget)] = True
        deep = find_deep_split(prepared.model, "auto", prepared.spec)
        source = RowSource(prepared.model, deep, prepared.spec, hidden, DeepSettings(), seed)
        scenes = source.scenes
        inverted = source.invert(range(prepared.classes), Reporter(False))
        with torch.no_grad():
            features = deep.features(inverted.images)
        tail = FrozenClassifierTail(prepared.model, deep)
        rows = DeepRows.label(tail, scenes.features, features, inverted.labels, hidden).rows
        seconds = time.perf_counter() - started
        return cls(original, forget, seed, prepared.model, deep, tail, rows, hidden, seconds)

    @property
    def layers(self) -> dict[str, nn.Conv2d | nn.Linear]:
        """Name -> each convolution and linear layer that deep forgetting trains."""
        owners = dict.fromkeys(name.rpartition(".")[0] for name in self.deep.parameters)
        modules = {name: self.work.module.get_submodule(name) for name in owners}
        return {n: m for n, m in modules.items() if isinstance(m, nn.Conv2d | nn.Linear)}

    def features(self) -> Tensor:
        """The input of the last layer for all rows, [N, D]."""
        return torch.cat([part.features for part in self.tail.chunks(self.rows)])

    def logits(self) -> Tensor:
        """Logits of all rows, [N, C], with the original last layer."""
        return torch.cat([part.logits for part in self.tail.chunks(self.rows)])

    def score(self, logits: Tensor) -> float:
        """How well the rows forget: share of the retained rows whose masked answer stays, times
        share of the others that are not answered with a forgotten class.
        """
        forgotten = self.rows.forgotten
        leak = self.hidden[logits.argmax(1)][forgotten].float().mean()
        before, after = (
            z.masked_fill(self.hidden, -torch.inf).argmax(1) for z in (self.rows.teacher, logits)
        )
        return float((before == after)[~forgotten].float().mean() * (1 - leak))

    @contextmanager
    def loaded(self, values: dict[str, Tensor]) -> Iterator[None]:
        """Gives the working copy other weights in the block."""
        named = dict(self.work.module.named_parameters())
        saved = {name: named[name].detach().clone() for name in values}
        try:
            _load(named, values)
            yield
        finally:
            _load(named, saved)

    def changed(self, values: dict[str, Tensor]) -> nn.Module:
        """A copy of the original with these weights."""
        result = copy.deepcopy(self.original)
        _load(dict(result.named_parameters()), values)
        return result

    def mapped(self, feature_map: nn.Module) -> nn.Module:
        """A copy of the original with a map of the features ahead of the last layer."""
        result = copy.deepcopy(self.original)
        last = self.deep.last.name
        result.set_submodule(last, nn.Sequential(feature_map, result.get_submodule(last)))
        return result

    def last_layer(self, features: Tensor) -> Tensor:
        """The original last layer's logits of features [N, D]."""
        logits: Tensor = self.deep.last.tail(features)
        return logits


@torch.no_grad()
def _load(named: dict[str, nn.Parameter], values: dict[str, Tensor]) -> None:
    for name, value in values.items():
        named[name].copy_(value)


def mask(case: Case) -> nn.Module:
    """The forgotten logits set to -inf; the features are the original's."""
    return zsu_fast.mask(case.original, case.forget)


def output_level(case: Case) -> nn.Module:
    """This package's output level: only the last layer is trained."""
    return zsu_fast.unlearn(
        case.original, case.forget, depth="output", seed=case.seed, progress=False
    )


def random_embeddings(case: Case) -> nn.Module:
    """Random rows at the split of deep forgetting, instead of its own.

    After "Source-Free Class Unlearning via Synthetic Embeddings", TMLR 2026.
    """
    name = case.deep.split.name
    return zsu_fast.random_embeddings(case.original, case.forget, tail=name, seed=case.seed)


@torch.no_grad()
def svd_projection(case: Case) -> nn.Module:
    """Removes from each layer's inputs the directions that only forgotten rows have.

    Kodge, Saha and Roy, "Deep Unlearning: Fast and Efficient Gradient-free Class Forgetting", TMLR
    2024. With U the singular vectors of a layer's inputs and v their shares of the variance, a
    space is weighted as P = U diag(a v / ((a - 1) v + 1)) U^T; each weight becomes
    W (1 - P_f (1 - P_r)). For retained rows, a is searched among the published values; for
    forgotten rows too, where 3 was published, with which the layers here forget nothing.
    """
    forgotten = case.rows.forgotten
    spectra = {
        name: [_input_spectrum(case, layer, rows) for rows in (forgotten, ~forgotten)]
        for name, layer in case.layers.items()
    }
    layers, results = case.layers, []
    for of_retained, of_forgotten in itertools.product((10, 30, 100, 300, 1000), (3, 30, 300)):
        values = {}
        for name, (own, others) in spectra.items():
            weight = layers[name].weight.detach()
            identity = torch.eye(weight[0].numel(), dtype=torch.float64)
            kept = identity - _weighted(*others, of_retained)
            projection = identity - _weighted(*own, of_forgotten) @ kept
            flat = weight.flatten(1).double() @ projection
            values[f"{name}.weight"] = flat.float().view_as(weight)
        with case.loaded(values):
            results.append((case.score(case.logits()), of_retained, of_forgotten, values))
    score, *alphas, values = max(results, key=lambda result: result[0])
    print(f"    alphas {alphas}, score {score:.3f}", flush=True)
    return case.changed(values)


Spectrum = tuple[Tensor, Tensor]  # singular vectors [D, D], shares of the variance [D]


def _input_spectrum(case: Case, layer: nn.Conv2d | nn.Linear, rows: Tensor) -> Spectrum:
    """Of a layer's inputs (of a convolution: patches), for the rows where bool [N] is True."""
    width = layer.weight[0].numel()
    gram = torch.zeros(width, width, dtype=torch.float64)

    def note(_module: nn.Module, args: Any, _kwargs: Any) -> None:
        x = args[0]
        if isinstance(layer, nn.Conv2d):
            assert layer.groups == 1, "patches of grouped convolutions are not implemented"
            shape: Any = (layer.kernel_size, layer.dilation, layer.padding, layer.stride)
            x = F.unfold(x, *shape).transpose(1, 2)
        x = x.reshape(-1, width)
        gram.add_((x.T @ x).double())

    with forward_pre_hooks((layer,), note):
        for index in rows.nonzero()[:, 0].split(_CHUNK):
            case.tail(*case.rows.features_at(index))
    squares, vectors = torch.linalg.eigh(gram)
    squares = squares.clamp(min=0)
    return vectors, squares / squares.sum()


def _weighted(vectors: Tensor, shares: Tensor, alpha: float) -> Tensor:
    return (vectors * (alpha * shares / ((alpha - 1) * shares + 1))) @ vectors.T


def synaptic_dampening(case: Case) -> nn.Module:
    """Shrinks the weights that matter for forgotten rows far more than for all rows.

    Foster, Schoepf and Brintrup, "Fast Machine Unlearning Without Retraining Through Selective
    Synaptic Dampening", AAAI 2024, with their alpha = 10 and lambda = 1. Importance is the Fisher
    diagonal, the mean squared gradient of the cross-entropy over batches, as in their code.
    """
    names = [*case.deep.parameters, *case.deep.last.parameters]
    everything = torch.arange(len(case.rows))
    forgotten = case.rows.forgotten.nonzero()[:, 0]
    of_all, of_forgotten = (_importance(case, names, i) for i in (everything, forgotten))
    named, values = dict(case.work.module.named_parameters()), {}
    for name, total, own in zip(names, of_all, of_forgotten, strict=True):
        factor = torch.where(own > 10 * total, (total / own).clamp(max=1), 1)
        values[name] = named[name].detach() * factor
    return case.changed(values)


def _importance(case: Case, names: Sequence[str], index: Tensor) -> list[Tensor]:
    named = dict(case.work.module.named_parameters())
    parameters = [named[name] for name in names]
    order = torch.randperm(len(index), generator=torch.Generator().manual_seed(case.seed))
    batches = index[order].split(_FISHER_BATCH)
    total = [torch.zeros_like(p) for p in parameters]
    for batch in batches:
        logits = case.deep.split.tail(*case.rows.features_at(batch))
        loss = F.cross_entropy(logits, case.rows.label[batch])
        gradients = torch.autograd.grad(loss, parameters)
        for sum_, gradient in zip(total, gradients, strict=True):
            sum_ += gradient.square() / len(batches)
    return total


@torch.no_grad()
def leace(case: Case) -> nn.Module:
    """Erases the forgotten logits from the last features by the least-squares affine map.

    Belrose et al., "LEACE: Perfect Linear Concept Erasure in Closed Form", NeurIPS 2023: no linear
    classifier finds the concept on the rows afterwards. The concept is the original's forgotten
    logits less the row's mean logit. In all models here a non-linear layer lies ahead of the last
    one, so that the map can't be folded into the layer before: it is put ahead of the last layer.
    """
    x, logits = case.features().double(), case.rows.teacher.double()
    z = logits[:, case.hidden] - logits.mean(1, keepdim=True)
    mean = x.mean(0)
    centred = x - mean
    values, vectors = torch.linalg.eigh(centred.T @ centred / len(x))
    used = values > values[-1] * len(values) * torch.finfo(torch.float32).eps
    values, vectors = values[used], vectors[:, used]
    whiten, unwhiten = (vectors * values**power @ vectors.T for power in (-0.5, 0.5))
    cross = whiten @ (centred.T @ (z - z.mean(0)) / len(x))
    directions, sizes, _ = torch.linalg.svd(cross, full_matrices=False)
    directions = directions[:, sizes > 1e-6 * sizes[0]]
    erase = unwhiten @ directions @ directions.T @ whiten
    result = nn.Linear(len(mean), len(mean))
    result.weight.copy_((torch.eye(len(mean)) - erase).float())
    result.bias.copy_((erase @ mean).float())
    return case.mapped(result)


class KeptChannels(nn.Module):
    """Multiplies features [N, D] by 1 or 0."""

    def __init__(self, kept: Tensor) -> None:
        super().__init__()
        self.kept = nn.Buffer(kept)

    def forward(self, x: Tensor) -> Tensor:
        return x * self.kept


@torch.no_grad()
def channel_pruning(case: Case) -> nn.Module:
    """Prunes the inputs of the last layer that forgotten rows need most and retained ones least.

    The idea of ModHiFi-U (Kashyap et al., "ModHiFi: Identifying High Fidelity Predictive Components
    for Model Modification", NeurIPS 2025): without gradients, a component counts by the error that
    its removal leaves in the outputs. Channels are ordered by that error in the forgotten logits on
    forgotten rows over that in the retained logits on retained rows; the number is searched.
    """
    x, forgotten = case.features(), case.rows.forgotten
    weight: Any = case.tail.last.weight
    weight = weight.detach() - weight.detach().mean(0)
    gain, cost = (
        x[rows].square().mean(0) * weight[classes].square().sum(0)
        for rows, classes in ((forgotten, case.hidden), (~forgotten, ~case.hidden))
    )
    order = (gain / cost.clamp(min=1e-12)).argsort(descending=True)
    results = []
    for share in (0.02, 0.05, 0.1, 0.15, 0.2, 0.3, 0.4, 0.5, 0.6, 0.7):
        kept = torch.ones(len(order))
        kept[order[: round(share * len(order))]] = 0
        results.append((case.score(case.last_layer(x * kept)), share, kept))
    score, share, kept = max(results, key=lambda result: result[0])
    print(f"    channels pruned: {share:.0%}, score {score:.3f}", flush=True)
    return case.mapped(KeptChannels(kept))


def deep(case: Case) -> nn.Module:
    """This package's deep forgetting, by the default call; it draws the rows itself."""
    return zsu_fast.unlearn(case.original, case.forget, seed=case.seed, progress=False)


METHODS: dict[str, Callable[[Case], nn.Module]] = {
    "mask": mask,
    "output level": output_level,
    "random embeddings": random_embeddings,
    "SVD projection": svd_projection,
    "synaptic dampening": synaptic_dampening,
    "LEACE": leace,
    "channel pruning": channel_pruning,
    "deep": deep,
}
_GIVEN_ROWS = ("SVD projection", "synaptic dampening", "LEACE", "channel pruning")
_EARLIER = "deep, previous version"


@dataclass(frozen=True)
class Result:
    """One measured model; accuracies in per cent, nan where they were not measured."""

    model: str
    forget: str
    seed: int
    method: str
    unmask_fa: float
    unmask_ra: float
    ra: float
    probe: float
    adapted_fa: float
    ff: float
    relearn_steps: float
    seconds: float
    processor: str
    torch: str
    threads: int
    date: str


def measure(name: str, sets: int, seeds: int, methods: Sequence[str]) -> Iterator[Result]:
    """Runs the methods on the class sets of a model, with each seed."""
    original = load_model(name)
    test = TestImages(original, *load_data(original, MODELS[name].data))
    for forget in MODELS[name].sets(sets):
        for seed in range(seeds):
            case = Case.draw(original, forget, seed)
            print(f"{name} {forget[:5]} seed {seed}: {len(case.rows)} rows", flush=True)
            for method in methods:
                result = measure_method(name, case, test, method)
                print(f"{method}: {numbers(result)}", flush=True)
                yield result


def measure_method(name: str, case: Case, test: TestImages, method: str) -> Result:
    """Runs one method and all tests."""
    started = time.perf_counter()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        model = METHODS[method](case)
    seconds = time.perf_counter() - started + (case.seconds if method in _GIVEN_ROWS else 0)
    audited = test.split(model)
    of = test.figures(test.outputs(audited), case.forget)
    most = _RELEARN.get(name)
    steps = test.relearn_steps(audited, case.forget, most) if most else None
    optional = [float("nan") if v is None else float(v) for v in (of.probe, of.ff, steps)]
    probe, ff, relearning = optional
    return Result(
        name, " ".join(map(str, case.forget)), case.seed, method, of.unmask_fa, of.unmask_ra,
        of.masked_ra, probe, of.adapted_fa, ff, relearning, seconds, **machine(),
    )  # fmt: skip


def earlier(results: Sequence[Result]) -> list[Result]:
    """The previous version's figures for the same class sets, from ``unmask.csv``."""
    known = {(r.model, r.forget): r.forget for r in results}
    nan, found = float("nan"), []
    with (RESULTS / "unmask.csv").open(newline="") as file:
        for line in csv.DictReader(file):
            name, classes = line["model"], line["classes"].replace(",", " ")
            if classes == "100 random" and name in MODELS:
                classes = " ".join(map(str, MODELS[name].sets(1)[0]))
            if line["method"] == "deep" and (name, classes) in known:
                fa, back, ra = (float(line[key]) for key in ("unmask_fa", "unmask_ra", "ra"))
                seconds = float(line["seconds"])
                found.append(
                    Result(name, classes, 0, _EARLIER, fa, back, ra, nan, nan, nan, nan, seconds,
                           "", "", 1, "")
                )  # fmt: skip
    return found


_COLUMNS = (
    ("un-mask FA", "unmask_fa", 2),
    ("un-mask RA", "unmask_ra", 2),
    ("RA", "ra", 2),
    ("probe", "probe", 1),
    ("adapted FA", "adapted_fa", 1),
    ("FF", "ff", 1),
    ("steps to relearn", "relearn_steps", 0),
    ("seconds", "seconds", 1),
)
_HEAD = """# Deep forgetting and its rivals

Written by `python -m benchmarks.end_to_end.rivals`: mean over class sets and seeds. SVD \
projection, synaptic dampening, LEACE and channel pruning get the rows that deep forgetting \
draws, may change the layers that it trains, and their seconds include the drawing. LEACE and \
channel pruning are a map ahead of the last layer, which stays in all tests; in the file it is a \
module of its own, and whoever deletes it has the original's features back. Accuracies in per \
cent of all CIFAR-10 test images, or of 1,000 ImageNet images, one per class: with 100 forgotten \
classes one image is 1 % of un-mask FA, 2 % of adapted FA. Un-mask: the original's last layer put \
back. RA: accuracy on the retained classes with the forgotten logits masked, for every method. \
Probe: FA of a linear classifier fitted on the features of one half of the images, measured on \
the other. Adapted FA: the original's last layer fitted to the new features on 500 images, \
measured on the others. FF: accuracy among the forgotten classes alone, with the original's last \
layer. Steps to relearn: of Adam on all weights, until FA is 80 % of the original's. The previous \
version's deep forgetting was measured earlier (`unmask.md`), with its own RA and on another day.
"""


def summarise(results: Sequence[Result]) -> str:
    """One Markdown table per model: the mean of each method over class sets and seeds."""
    lines = [_HEAD, *machines(results)]
    everything = [*results, *earlier(results)]
    for name in NAMES:
        own = [r for r in everything if r.model == name]
        if not own:
            continue
        sets = dict.fromkeys(r.forget for r in own)
        described = [
            "{" + s.replace(" ", ",") + "}" if len(s) < 30 else "100 classes" for s in sets
        ]
        lines += ["", f"## {name}: {', '.join(described)}", ""]
        lines += ["| method | runs | " + " | ".join(title for title, *_ in _COLUMNS) + " |"]
        lines += ["|---|" + "---:|" * (len(_COLUMNS) + 1)]
        for method in (*METHODS, _EARLIER):
            of = [r for r in own if r.method == method]
            if of:
                cells = [_cell(of, key, decimals) for _, key, decimals in _COLUMNS]
                lines.append(f"| {method} | {len(of)} | {' | '.join(cells)} |")
    return "\n".join(lines) + "\n"


def _cell(results: Sequence[Result], key: str, decimals: int) -> str:
    values = [value for r in results if (value := getattr(r, key)) == value]
    text = f"{statistics.mean(values):.{decimals}f}" if values else "-"
    most = _RELEARN.get(results[0].model)
    return f"{text} or more" if key == "relearn_steps" and most in values else text


def main() -> None:
    options = parser(__doc__.splitlines()[0], NAMES)
    options.add_argument("--methods", default=",".join(METHODS), help="separated by commas")
    arguments = options.parse_args()
    methods = arguments.methods.split(",")
    for given, known in ((arguments.models, NAMES), (methods, METHODS)):
        if wrong := set(given) - set(known):
            options.error(f"{sorted(wrong)} unknown; there are {list(known)}")
    torch.set_num_threads(1)
    file = arguments.out / "rivals.csv"
    results = add_runs(
        file, Result, [] if arguments.summary else arguments.models or NAMES,
        lambda name: measure(name, arguments.sets, arguments.seeds, methods),
        lambda result: result.method in methods,
    )  # fmt: skip
    text = summarise(results)
    file.with_suffix(".md").write_text(text)
    print(text)


if __name__ == "__main__":
    main()
