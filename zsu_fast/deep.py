"""Deep forgetting: the classes leave the features, not only the outputs.

The last layer *and* the layers ahead of it are trained, on four terms:

1. the logits match the masked original, as in output-level forgetting;
2. so do those that the frozen *original* last layer gives on the new features: whoever puts it
   back (the un-mask test) still gets no forgotten class;
3. the features shrink: what the retained classes do not need fades;
4. a ridge regression, fitted anew on each batch, must not find the original's forgotten logits in
   the features: a linear probe then has little to go by (its explained variance is what
   Belrose et al., "LEACE", 2023, bring to 0 in closed form; here the layers learn to). Nor in
   what the trained layers ahead of the last take: what is left inside is quickly relearned.

Features are only kept where they are seen, and impressions lie far from any real image: so the
rows are mostly *scenes* (`draw_scenes`), as drawn and pushed to each class by a few ascent steps,
beside the impressions and mixtures of them.
"""

from __future__ import annotations

import copy
import math
from collections import Counter
from collections.abc import Iterator
from dataclasses import asdict, dataclass, replace
from typing import Any, Literal, get_args

import torch
from torch import Tensor, nn

from . import tail as tails
from .ascent import AscentSettings
from .classifier import InputSpec, LogitsModel
from .errors import ArgumentError, ModelError
from .impressions import ClassImpressions, ascend
from .loop import Check, Fit, LoopSettings, natural_rate
from .objective import Masked, Rows, RowSettings, make_rows
from .progress import Reporter, Stopped
from .responsive import layer_names
from .scenes import scene_chunks
from .spaces import input_space
from .tail import Split
from .threads import multiply_adds

Depth = Literal["output", "deep"]
DEPTHS: tuple[str, ...] = get_args(Depth)

_SCENE_VALUES = 256 * 1024 * 1024  # of features at the cut that are kept: 1 GB
_SCENE_LOGITS = 128 * 1024 * 1024  # of them that are kept: 1,342 scenes for 100,000 classes
_SCENE_WORK = 1e12  # multiply-adds on all scenes on a CPU: 2,500 of 224 pixels for a small network
_WORK = 5e12  # multiply-adds of all steps' forward passes on a CPU: minutes on one thread
_FEWEST_STEPS = 100  # however much work a step is
_INNER = 3  # inner layers that have the full weight
_OF_ROOM = 0.5  # of the room above a floor: to get to the floor itself costs retained classes much
_FAR = 1e4  # below all logits
_PRUNED = 0.1  # share of zeros from which on a layer's zeros are not chance
# Share of the layers with weights that is trained beside the last one, at least one: the features
# of small images are kept on many scenes, those of large ones on few.
_SHARE, _SHARE_OF_LARGE = 0.3, 0.1
_LARGE = 3 * 64 * 64  # values of an image that is not small any more


@dataclass(frozen=True)
class DeepSettings:
    """Constants of deep forgetting, chosen on training images (benchmarks/results).

    Attributes:
        scenes: drawn images, at most.
        scenes_a_layer: so many for each trained layer, since a deeper tail has more to keep; fewer
            where they cost much, 256 at least.
        pushed: of them, started an ascent to a class from; fewer in proportion, 256 at least.
        mixtures: of impressions at the cut (`make_rows`), which say what no scene does where
            images are no photographs.
        steps, batch: optimiser steps, and rows in each.
        steps_a_layer: so many steps are enough for each trained layer; and fewer, not below 100,
            where they would keep a CPU busy for long.
        unmask: weight of the frozen original last layer's divergence.
        shrink: weight of the features' mean square, in units of the original's.
        shrink_inside: the same where evidence is erased inside too: both cost retained classes.
        erase: weight of the explained variance of the forgotten logits.
        inside: its weight in what each inner layer takes (`_TwoHeads`), up to three; of more, all
            share that.
        ridge: of that regression, in units of the features' mean variance.
    """

    scenes: int = 12000
    scenes_a_layer: int = 2000
    pushed: int = 3000
    mixtures: int = 512
    steps: int = 1500
    steps_a_layer: int = 300
    batch: int = 256
    unmask: float = 0.3
    shrink: float = 0.15
    shrink_inside: float = 0.1
    erase: float = 0.35
    inside: float = 0.25
    ridge: float = 0.1

    def fit_to(self, layers: int) -> DeepSettings:
        """What so many trained layers need of all this."""
        scenes = min(self.scenes, self.scenes_a_layer * layers)
        return replace(
            self,
            scenes=scenes,
            pushed=self.pushed * scenes // self.scenes,
            steps=min(self.steps, self.steps_a_layer * layers),
        )

    def scenes_for(
        self, values: int, classes: int, work: int, device: torch.device
    ) -> tuple[int, int]:
        """(scenes, pushed) where each has so many feature values, logits and multiply-adds."""
        scenes = min(self.scenes, _SCENE_VALUES // values, _SCENE_LOGITS // classes)
        if device.type == "cpu":
            scenes = min(scenes, int(_SCENE_WORK / max(1, work)))
        return max(256, scenes), max(256, self.pushed * scenes // self.scenes)

    def steps_for(self, row: int, device: torch.device) -> int:
        """Steps, where a row takes so many multiply-adds in the trained layers."""
        if device.type != "cpu":
            return self.steps
        return min(self.steps, max(_FEWEST_STEPS, int(_WORK / (self.batch * max(1, row)))))


def check_depth(depth: str, objective: str, space: str) -> None:
    """Raises where there is no such depth, or the objective does not go with it.

    Raises:
        ArgumentError: as said.
    """
    if depth not in DEPTHS:
        raise ArgumentError("depth", f"got {depth!r}", f"Pass one of {', '.join(DEPTHS)}.")
    if depth == "deep" and space != "input":
        raise ArgumentError(
            "space", f"got {space!r} with depth='deep', which needs images", "Pass space='input'."
        )
    if depth == "deep" and objective != "masked":
        raise ArgumentError(
            "objective",
            f"got {objective!r} with depth='deep', which has an objective of its own",
            "Leave objective out, or pass depth='output'.",
        )


def find_deep_split(model: LogitsModel, at: str | int, images: Tensor) -> Split:
    """Cuts ``model`` ahead of its last layers: three in ten of those with weights, or of large
    images' models one in ten; one at least.

    Args:
        model: from `working_copy`.
        at: "auto", or the module at which the tail starts.
        images: some valid images.

    Raises:
        ArgumentError: nothing but the last layer would be trained.
    """
    names = layer_names(model.model, images[:4])
    if at == "auto":
        share = _SHARE if images[0].numel() <= _LARGE else _SHARE_OF_LARGE
        start = len(names) - 1 - max(1, round(share * len(names)))
        if start < 0:
            raise ArgumentError(
                "depth",
                "got 'deep', and the model has a single layer with weights: no features",
                "Pass depth='output'.",
            )
        at, reason = names[start], f"deep: {len(names) - start} of {len(names)} layers"
    else:
        reason = "named by the caller"
    cut = tails.find_split(model, at, images, torch.zeros(len(images), dtype=torch.int64))
    if cut.output_level:
        raise ArgumentError(
            "tail",
            f"got {at!r} with depth='deep', and only the last layer follows it",
            f"Name an earlier module, such as {names[max(0, len(names) - 2)]!r}, or leave it out.",
        )
    cut.reason = reason
    return cut


def forget_deeply(
    model: LogitsModel,
    spec: InputSpec,
    cut: Split,
    made: ClassImpressions,
    forget: Tensor,
    rows: RowSettings,
    loop: LoopSettings,
    seed: int,
    report: Reporter,
    settings: DeepSettings | None = None,
) -> dict[str, Any]:
    """Trains the tail of ``cut`` until the classes are gone from its features.

    The last layer is then to be fitted as in output-level forgetting, which looks farther out.

    Args:
        model: the working copy that ``cut`` shares its parameters with; changed in place.
        spec: of its images.
        cut: from `find_deep_split`.
        made: impressions of all classes; one in four is held out, as is one scene in eight.
        forget: bool [C].
        rows: for the margin.
        loop: its learning rate, where given, and whether fewer ``steps`` are wanted.
        seed: everything random.
        report: told after every check; a stop asked for keeps the state of then.
        settings: the constants.

    Returns:
        What the record is to tell: how the fit went; ``margin``, and ``margin_asked``,
        which is less where logits have a lowest value; ``unmask_leak``, the share of held-out
        rows answered with a forgotten class once the original last layer is back, and
        ``evidence``, the share of the forgotten logits' variance that a ridge regression on the
        features explains (``evidence_inside``: the most of what inner layers take, if there are
        any); each before and after.

    Raises:
        ModelError: the model's last layer takes more than one tensor from the others.
    """
    device = forget.device
    tail = _TwoHeads(model, cut, made.images[:4].to(device))
    settings = (settings or DeepSettings()).fit_to(len(tail.trained) + 1)
    train, held_out, impressions = _make_rows(model, spec, cut, made, forget, seed, settings)
    margin = rows.margin_for(train.teacher[:impressions], train.label[:impressions])
    asked = min(margin, _OF_ROOM * _room(tail, train, forget))
    objective = _Objective(tail, train, forget, asked, settings)
    named = dict(model.model.named_parameters())
    parameters = [named[name] for name in cut.parameters]
    row = multiply_adds(cut.tail, *train.features_at(train.label.new_zeros(1)))
    steps = min(settings.steps_for(row, device), loop.steps or settings.steps)
    start = [p.detach().clone() for p in parameters]
    fit = Fit(learning_rate=loop.learning_rate or natural_rate(parameters))
    before = objective.look(train, held_out)
    while not _descend(fit, steps, objective, parameters, train, held_out, seed, report):
        with torch.no_grad():  # values blew up: from the start, more slowly
            for parameter, saved in zip(parameters, start, strict=True):
                parameter.copy_(saved)
        fit.learning_rate *= 0.3
        if fit.history[-1].attempt >= 3:
            fit.stopped += "; given up"
            break
    after = objective.look(train, held_out)
    return {
        "stopped": fit.stopped,
        "learning_rate": fit.learning_rate,
        "margin": margin,
        "margin_asked": objective.margin,
        "history": [asdict(check) for check in fit.history],
        "rows": len(train),
        "held_out": len(held_out),
        **{k: {"before": before[k], "after": after[k]} for k in before},
    }


@dataclass
class _Answers:
    """What the tail makes of a batch.

    Attributes:
        logits: [N, C].
        features: [N, ...] at the last layer.
        unmasked: [N, C], the original last layer's logits on them.
        inside: [N, D] of each inner layer: the means over positions of what it takes.
    """

    logits: Tensor
    features: Tensor
    unmasked: Tensor
    inside: list[Tensor]


class _TwoHeads(nn.Module):
    """The tail with its own last layer, and the frozen original one on the same features.

    Attributes:
        inner: layers ahead of the last that take what trained ones give, where nothing else reads
            it: not a residual stream, which mostly carries what frozen layers made.
        trained: the layers with weights that are trained ahead of the last.
    """

    def __init__(self, model: LogitsModel, cut: Split, images: Tensor) -> None:
        super().__init__()
        names = layer_names(model.model, images)
        last = tails.split_at(model, names[-1], images, "the last layer")
        self.tail, self.frozen = cut.tail, copy.deepcopy(last.tail).eval()
        self.frozen.requires_grad_(False)
        modules = dict(model.model.named_modules())
        self.last = modules[names[-1]]
        self.trained = [modules[n] for n in names[:-1] if f"{n}.weight" in cut.parameters]
        self.inner = self.trained
        with torch.enable_grad():
            logits, inner, _ = self._run(*[x.detach() for x in cut.head(images)])
            readers = _readers(logits)
        self.inner = [layer for layer, x in inner if readers[x.grad_fn] == 1]
        with torch.no_grad():
            answers = self(*cut.head(images))
        if len(last.head(images)) != 1 or not torch.allclose(
            answers.logits, answers.unmasked, 1e-3, 1e-3
        ):
            raise ModelError(
                f"its last layer {names[-1]!r} is not the only way from the features to the logits",
                "Pass depth='output'.",
            )

    def forward(self, *crossing: Tensor) -> _Answers:
        """What becomes of [N, ...] at the cut."""
        logits, inner, features = self._run(*crossing)
        inside = [_means(layer, x) for layer, x in inner]
        return _Answers(logits, features, self.frozen(features), inside)

    def _run(self, *crossing: Tensor) -> tuple[Tensor, list[tuple[nn.Module, Tensor]], Tensor]:
        """Logits; the inner layers with what they take; what the last one takes."""
        taken: list[tuple[nn.Module, Tensor]] = []

        def note(module: nn.Module, args: Any) -> None:
            taken.append((module, args[0]))

        hooks = [m.register_forward_pre_hook(note) for m in (*self.inner, self.last)]
        try:
            logits = self.tail(*crossing)
        finally:
            for hook in hooks:
                hook.remove()
        *inner, (_, features) = taken
        return logits, inner, features


def _readers(output: Tensor) -> Counter[Any]:
    """How many operations read the result of each autograd node that ``output`` was made of."""
    readers: Counter[Any] = Counter()
    todo: list[Any] = [output.grad_fn]
    while todo:
        for made_by, _ in todo.pop().next_functions:
            if made_by is not None:
                readers[made_by] += 1
                if readers[made_by] == 1:
                    todo.append(made_by)
    return readers


def _means(layer: nn.Module, x: Tensor) -> Tensor:
    """What a layer takes, [N, ...] -> its channels' means over positions or tokens, [N, D]."""
    if x.ndim > 2:
        return x.flatten(1, -2).mean(1) if isinstance(layer, nn.Linear) else x.flatten(2).mean(2)
    return x


def _make_rows(
    model: LogitsModel,
    spec: InputSpec,
    cut: Split,
    made: ClassImpressions,
    forget: Tensor,
    seed: int,
    settings: DeepSettings,
) -> tuple[Rows, Rows, int]:
    """Training rows, held-out rows, and how many of the former, the first ones, are impressions."""
    device = forget.device
    labels = made.labels.to(device)
    impressions = cut.features(made.images.to(device))
    scenery = _scenery(model, spec, cut, made.labels.unique(), forget, seed, settings)
    held = torch.empty(len(labels), dtype=torch.bool, device=device)
    held[labels.argsort(stable=True)] = torch.arange(len(labels), device=device) % 4 == 3
    held_scenes = torch.arange(len(scenery[0]), device=device) % 8 == 7
    generator = torch.Generator().manual_seed(seed)
    sides = []
    for one, other, mixtures in (
        (~held, ~held_scenes, settings.mixtures),
        (held, held_scenes, settings.mixtures // 4),
    ):
        picked = tuple(f[one] for f in impressions)
        near = make_rows(cut.tail, picked, labels[one], forget, mixtures, generator)
        near = near.pick(torch.arange(len(near), device=device))
        far = tuple(f[other] for f in scenery)
        with torch.no_grad():
            chunks = zip(*[f.split(256) for f in far], strict=True)
            teacher = torch.cat([cut.tail(*chunk) for chunk in chunks])
        top = teacher.argmax(1)
        sides.append(_join([near, Rows(far, teacher, top, forget[top])]))
    return sides[0], sides[1], int((~held).sum())


def _scenery(
    model: LogitsModel,
    spec: InputSpec,
    cut: Split,
    classes: Tensor,
    forget: Tensor,
    seed: int,
    settings: DeepSettings,
) -> tuple[Tensor, ...]:
    """Scenes pushed to ``classes``, and scenes as drawn, at the cut; drawn a few at a time."""
    bounds = (1, -1, 1, 1) if len(spec.shape) == 3 else (1, -1)
    low, high = spec.low.view(bounds), spec.high.view(bounds)
    grey = torch.zeros(1, *spec.shape, device=forget.device)
    values = sum(f.numel() for f in cut.features(grey))
    work = multiply_adds(model, grey)
    scenes, pushed = settings.scenes_for(values, len(forget), work, forget.device)
    targets = _targets(classes, forget.cpu(), pushed)
    few = AscentSettings(pushed // len(targets), (0.3, 0.99), 40, 0, 0.02, 0.0, seed)
    wanted = len(targets) * few.per_class
    first, missing, seen = [], wanted, []
    for chunk in scene_chunks(scenes, spec.shape, seed):
        chunk = low + chunk * (high - low)
        if missing > 0:
            first.append(chunk[:missing])
            missing -= len(chunk)
        seen.append(cut.features(chunk.to(forget.device)))
    starts = torch.cat(first)
    starts = starts[torch.arange(wanted) % len(starts)]
    space = input_space(model, spec, few.precision)
    ascended = ascend(model, space, spec, targets, few, Reporter(False), starts=starts)
    seen.insert(0, cut.features(ascended.images.to(forget.device)))
    return tuple(torch.cat(column) for column in zip(*seen, strict=True))


def _targets(classes: Tensor, forget: Tensor, most: int) -> list[int]:
    """Classes to push scenes to: all, or as many; half of them forgotten ones, if there are."""

    def evenly(some: Tensor, count: int) -> Tensor:
        return some[torch.linspace(0, len(some) - 1, min(count, len(some))).long()]

    if len(classes) <= most:
        return sorted(classes.tolist())
    gone = evenly(classes[forget[classes]], most // 2)
    kept = evenly(classes[~forget[classes]], most - len(gone))
    return sorted([*gone.tolist(), *kept.tolist()])


def _join(parts: list[Rows]) -> Rows:
    features = zip(*[p.features for p in parts], strict=True)
    return Rows(
        tuple(torch.cat(column) for column in features),
        torch.cat([p.teacher for p in parts]),
        torch.cat([p.label for p in parts]),
        torch.cat([p.forgotten for p in parts]),
    )


@torch.no_grad()
def _room(tail: _TwoHeads, rows: Rows, forget: Tensor) -> float:
    """The margin that 19 of 20 rows can meet without any other logit rising, or infinity.

    A ReLU behind the last layer, as in SqueezeNet, leaves logits a lowest value. What a larger
    margin asks for is then that all the others rise: retained classes suffer, none is forgotten.
    """
    bias = getattr(tail.last, "bias", None)
    if not isinstance(bias, nn.Parameter) or bias.shape != forget.shape:
        return math.inf
    some = torch.arange(0, len(rows), max(1, len(rows) // 2048), device=forget.device)
    kept = bias.detach().clone()
    rooms = []
    try:
        bias[forget] = -_FAR
        for part in some.split(256):
            picked = rows.pick(part)
            lowest = tail(*picked.features).logits[:, forget].logsumexp(1)
            rooms.append(picked.teacher[:, ~forget].logsumexp(1) - lowest)
    finally:
        bias.copy_(kept)
    room = float(torch.cat(rooms).quantile(0.05))
    return max(0.0, room) if room < _FAR / 2 else math.inf


class _Objective:
    """The four terms, and how held-out rows fare."""

    def __init__(
        self, tail: _TwoHeads, rows: Rows, forget: Tensor, margin: float, settings: DeepSettings
    ) -> None:
        self.tail, self.forget, self.settings = tail, forget, settings
        self.margin, self.masked = margin, Masked(forget, margin)
        with torch.no_grad():
            energy = torch.cat(
                [part.features.square().flatten(1).mean(1) for part in self._parts(rows)]
            )
        self.energy = energy.mean().clamp(min=1e-12)

    def __call__(self, rows: Rows) -> Tensor:
        """The loss of a batch, with autograd."""
        seen, s = self.tail(*rows.features), self.settings
        inside = [self.evidence(outputs, rows.teacher) for outputs in seen.inside]
        return (
            self.masked.divergence(seen.logits, rows)
            + s.unmask * self.masked.divergence(seen.unmasked, rows)
            + (s.shrink_inside if inside else s.shrink) * self.size(seen.features)
            + s.erase * self.evidence(seen.features, rows.teacher)
            + s.inside * min(1, _INNER / max(1, len(inside))) * sum(inside)
        )

    def size(self, features: Tensor) -> Tensor:
        """The features' mean square, in units of the original's."""
        return features.square().mean() / self.energy

    def evidence(self, features: Tensor, teacher: Tensor) -> Tensor:
        """Share of the forgotten logits' variance that ridge regression on ``features`` explains.

        In its dual form, so that the system has the size of the batch however wide the features.
        """
        relative = teacher[:, self.forget] - teacher.mean(1, keepdim=True)
        target = relative - relative.mean(0)
        target = target / target.square().mean(0).sqrt().clamp(min=1e-6)
        centred = features.flatten(1)
        centred = centred - centred.mean(0)
        gram = centred @ centred.T
        count, width = centred.shape
        ridge = self.settings.ridge * gram.diagonal().mean() * count / width + 1e-12
        damped = gram + ridge * torch.eye(count, device=gram.device)
        explained: Tensor = (target * (gram @ torch.linalg.solve(damped, target))).sum()
        return explained / target.square().sum().clamp(min=1e-12)

    @torch.no_grad()
    def look(self, rows: Rows, held_out: Rows) -> dict[str, float]:
        """`forget_deeply`'s facts; the evidence needs more rows than are held out."""
        unmasked = torch.cat([part.unmasked for part in self._parts(held_out)])
        some = torch.randperm(len(rows), generator=torch.Generator().manual_seed(0))[:2048]
        some_rows = rows.pick(some.to(rows.label.device))
        parts = [(part.features, *part.inside) for part in self._parts(some_rows)]
        shares = [
            float(self.evidence(torch.cat(column), some_rows.teacher))
            for column in zip(*parts, strict=True)
        ]
        facts = {
            "unmask_leak": float(self.forget[unmasked.argmax(1)].float().mean()),
            "evidence": shares[0],
        }
        return facts | ({"evidence_inside": max(shares[1:])} if shares[1:] else {})

    @torch.no_grad()
    def check(self, rows: Rows, step: int, attempt: int, rate: float, loss: float) -> Check:
        logits = torch.cat([part.logits for part in self._parts(rows)])
        divergence = float(self.masked.divergence(logits, rows))
        answer, kept = logits.argmax(1), ~rows.forgotten
        wanted = rows.teacher.masked_fill(self.forget, -torch.inf).argmax(1)
        agreement = float((answer == wanted)[kept].float().mean()) if bool(kept.any()) else 1.0
        leak = float(self.forget[answer].float().mean())
        if not bool(logits.isfinite().all()):
            divergence = math.nan
        return Check(step, attempt, rate, loss, divergence, leak, agreement)

    def _parts(self, rows: Rows) -> Iterator[_Answers]:
        chunks = zip(*[f.split(256) for f in rows.features], strict=True)
        return (self.tail(*chunk) for chunk in chunks)


def _descend(
    fit: Fit,
    steps: int,
    objective: _Objective,
    parameters: list[nn.Parameter],
    rows: Rows,
    held_out: Rows,
    seed: int,
    report: Reporter,
) -> bool:
    """One run over all steps at ``fit.learning_rate``; False if values stopped being finite."""
    draw = torch.Generator().manual_seed(seed)
    device = rows.label.device
    attempt = fit.history[-1].attempt + 1 if fit.history else 0
    fit.history.append(objective.check(held_out, 0, attempt, fit.learning_rate, math.nan))
    optimiser = torch.optim.AdamW(parameters, weight_decay=0.0)
    masks = [_not_pruned(p) for p in parameters]
    every = max(1, steps // 10)
    batch = min(objective.settings.batch, len(rows))
    for step in range(steps):
        picked = torch.randint(len(rows), (batch,), generator=draw).to(device)
        rate = fit.learning_rate * 0.5 * (1 + math.cos(math.pi * step / steps))
        for group in optimiser.param_groups:
            group["lr"] = rate
        loss = objective(rows.pick(picked))
        grads = torch.autograd.grad(loss, parameters, allow_unused=True)
        for parameter, grad, mask in zip(parameters, grads, masks, strict=True):
            parameter.grad = grad if grad is None or mask is None else grad * mask
        optimiser.step()
        if (step + 1) % every and step + 1 < steps:
            continue
        check = objective.check(held_out, step + 1, attempt, rate, float(loss.detach()))
        fit.history.append(check)
        if not math.isfinite(check.divergence):
            fit.stopped = f"non-finite values at step {step + 1}, rolled back to the start"
            fit.best = fit.history[0]
            return False
        fit.best = check
        try:
            report(
                "fit", step + 1, steps, divergence=check.divergence, leak=check.leak,
                agreement=check.agreement,
            )  # fmt: skip
        except Stopped as stop:
            fit.stopped = str(stop)
            return True
    fit.stopped = f"all {steps} steps taken"
    return True


def _not_pruned(parameter: Tensor) -> Tensor | None:
    """Where a pruned layer's weights are not 0: a tenth of them is. They stay what they are."""
    kept = parameter.detach() != 0
    pruned = parameter.ndim > 1 and float(kept.float().mean()) < 1 - _PRUNED
    return kept.to(parameter.dtype) if pruned else None
