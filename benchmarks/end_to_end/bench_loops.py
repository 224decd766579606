"""The loops: tail, deep forgetting and ascent, captured in CUDA graphs against eager.

    pytest benchmarks/end_to_end/bench_loops.py

On a GPU, the graph loop has to be 5 times as fast as the eager one on LeNet5, and two captures have
to replay the same bits. On a CPU, the compiled tail takes the place of the graph, and the ascent
runs eagerly only. The loop of deep forgetting is compared with the same in plain PyTorch: the
model's own layers, the losses as their formulas stand, autograd and `torch.optim.AdamW`. Unless it
is 1.5 times as fast, its time has to be that of the library's convolutions and matrix products.
"""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from benchmarks.harness import DEVICE, Contender, Table, compare
from benchmarks.real_data import load_model
from zsu_fast.models import zoo
from zsu_fast.models.infer_spec import resolve_spec
from zsu_fast.models.input_spec import InputSpec
from zsu_fast.models.wrapper import working_copy
from zsu_fast.runtime.cuda_graph import Loop
from zsu_fast.runtime.progress import Reporter
from zsu_fast.runtime.torch_settings import has_bfloat16
from zsu_fast.splitting.split import split_at
from zsu_fast.synthesis import synthesize
from zsu_fast.synthesis.ascent_settings import AscentSettings
from zsu_fast.synthesis.dead_leaves import sample_dead_leaves
from zsu_fast.synthesis.space import input_space
from zsu_fast.training.deep.deep import deep_task
from zsu_fast.training.deep.losses import DeepObjective
from zsu_fast.training.deep.settings import DeepSettings
from zsu_fast.training.deep.split import DeepSplit, find_deep_split
from zsu_fast.training.features import FeatureSet, FeatureSettings
from zsu_fast.training.fit_task import FitTask, trained_parameters
from zsu_fast.training.losses import MaskedKL
from zsu_fast.training.teacher import Teacher, build_feature_set
from zsu_fast.training.train_step import CompiledTrainStep, EagerTrainStep, GraphTrainStep

GRAPH_TARGET = 5.0
BLOCK, BATCH, ROWS = 10, 512, 2048
FORGET = (1, 2, 3, 4)
DEEP_TARGET = 1.5
DEEP_STEPS, SCENES, INVERTED = 3, 384, 128
# The input of the last layer, from the rows at the split, as one would write it.
BODIES: dict[str, Callable[[Any, Tensor], Tensor]] = {
    "karpathynet": lambda m, x: F.max_pool2d(F.relu(m.conv3(x)), 2).flatten(1),
    "resnet20_cifar": lambda m, x: m.layer3[2](x).mean((2, 3)),
    "tf_efficientnet_lite0": lambda m, x: m.global_pool(m.bn2(m.conv_head(x))),
}
# What libraries compute: their time is the same whoever calls them, but for layout and number.
LIBRARY = {"aten::mkldnn_convolution", "aten::convolution_backward", "aten::mm", "aten::addmm"}
LIBRARY_SHARE = 0.7


def tail_case(cut: str) -> FitTask:
    """LeNet5's tail from the module ``cut`` on, with rows and the masked objective."""
    torch.manual_seed(0)
    model = working_copy(zoo.build("lenet5"), torch.device(DEVICE))
    images = torch.rand(ROWS, 1, 28, 28, device=DEVICE)
    split = split_at(model, cut, images[:2], "chosen")
    forget = torch.zeros(10, dtype=torch.bool, device=DEVICE)
    forget[list(FORGET)] = True
    with torch.no_grad():
        features = split.backbone(images)
        label = model(images).argmax(1)
    draw, loss = torch.Generator().manual_seed(0), MaskedKL(forget, 1.0)
    rows = build_feature_set(Teacher(split.tail, forget), features, label, 0, draw)
    return FitTask(split.tail, trained_parameters(model, split), rows, rows, loss, loss, draw)


@pytest.mark.parametrize("cut", ["fc3", "fc1"])
def test_tail_loop(benchmark: Any, table: Table, cut: str) -> None:
    kinds: dict[str, type[EagerTrainStep]] = {"eager": EagerTrainStep}
    kinds |= {"graph": GraphTrainStep} if DEVICE == "cuda" else {"compiled": CompiledTrainStep}
    index = torch.stack([torch.randperm(ROWS)[:BATCH] for _ in range(BLOCK)])
    rates = [1e-3] * BLOCK

    def steps(kind: type[EagerTrainStep]) -> tuple[Callable[[], Tensor], list[Tensor]]:
        task = tail_case(cut)
        stepper = kind(task)
        return (lambda: stepper.run(index, rates)), task.parameters

    ends = {}
    for name, kind in kinds.items():
        for again in range(2):
            run, parameters = steps(kind)
            for _ in range(3):
                run()
            ends[name, again] = torch.cat([p.detach().flatten() for p in parameters])
    for name in kinds:
        assert torch.equal(ends[name, 0], ends[name, 1]), f"{name}: two runs differ"
        torch.testing.assert_close(ends[name, 0], ends["eager", 0], rtol=1e-3, atol=1e-5)

    contenders = [Contender(name, steps(kind)[0]) for name, kind in kinds.items()]
    case = f"LeNet5 from {cut}: {BLOCK} steps of {BATCH} rows"
    medians = compare(table, case, contenders, capture=False)
    if DEVICE == "cuda" and cut == "fc3":
        gain = medians["eager"] / medians["graph"]
        assert gain >= GRAPH_TARGET, f"graph loop {gain:.1f}x the eager one, target {GRAPH_TARGET}x"
    benchmark.pedantic(contenders[-1].run, rounds=3)


def deep_case(name: str) -> tuple[FitTask, DeepSplit, int]:
    """What deep forgetting trains, on few rows, and the batch."""
    original = load_model(name)
    model, spec = working_copy(original, torch.device(DEVICE)), resolve_spec(original)
    deep = find_deep_split(model, "auto", spec)
    low, high = (x.view(1, -1, 1, 1) for x in (spec.low, spec.high))
    images = low + sample_dead_leaves(SCENES + INVERTED, deep.shape, 0) * (high - low)
    features = deep.image_features(images.to(DEVICE))
    with torch.no_grad():
        classes = model(images[:1].to(DEVICE)).shape[1]
    forget = torch.zeros(classes, dtype=torch.bool, device=DEVICE)
    forget[[3, 4, 8] if classes == 10 else list(range(0, classes, 10))] = True
    labels = torch.arange(INVERTED, device=DEVICE) % classes
    settings = DeepSettings().for_model(original, classes, int(forget.sum()), False, False)
    scenes, inverted = (tuple(f.split(SCENES)[i] for f in features) for i in range(2))
    task, _ = deep_task(
        model, deep, scenes, inverted, labels, forget, FeatureSettings(), settings, 0
    )
    return task, deep, settings.schedule_for(task.row_work, task.device)[1]


class PlainDeepLoop:
    """The steps of deep forgetting as one would write them in PyTorch."""

    def __init__(self, name: str, task: FitTask, deep: DeepSplit) -> None:
        self.model = copy.deepcopy(load_model(name)).to(DEVICE).eval().requires_grad_(False)
        self.last = self.model.get_submodule(deep.last.name)
        self.parameters = [self.model.get_parameter(name) for name in deep.parameters]
        for parameter in self.parameters:
            parameter.requires_grad_(True)
        assert isinstance(task.objective, DeepObjective)
        self.body, self.objective, self.rows = BODIES[name], task.objective, task.train
        self.features = task.train.features[0].contiguous()
        self.optimiser = torch.optim.AdamW(self.parameters, betas=task.betas, weight_decay=0.0)

    def run(self, index: Tensor, rates: list[float]) -> Tensor:
        for batch, rate in zip(index, rates, strict=True):
            self.optimiser.param_groups[0]["lr"] = rate
            features = self.body(self.model, self.features[batch])
            loss = plain_deep_loss(
                self.objective, self.last(features), features, self.rows.select(batch)
            )
            self.optimiser.zero_grad()
            loss.backward()  # type: ignore[no-untyped-call]
            self.optimiser.step()
        return loss.detach()


def plain_deep_loss(
    objective: DeepObjective, new: Tensor, features: Tensor, rows: FeatureSet
) -> Tensor:
    """The loss of `DeepObjective` from logits [N, C] and features [N, D], by its formula."""
    s, old, forget = objective.settings, rows.teacher, objective.forget
    assert rows.scene is not None
    scene = rows.scene[:, None]

    def centred(x: Tensor) -> Tensor:
        return scene * (x - (scene * x).sum(0) / scene.sum())

    masked = old.masked_fill(forget, -torch.inf).log_softmax(1)
    log_q = (new + objective.margin * forget).log_softmax(1)
    loss = (masked.exp() * (masked - log_q))[:, ~forget].sum(1).mean()
    z, z_new = (x[:, ~forget] - x[:, ~forget].mean(1, keepdim=True) for x in (old, new))
    weight = 1 - old.softmax(1)[:, forget].sum(1)
    loss = loss + s.keep * (weight * (z_new - z).square().mean(1)).mean() / objective.size
    if s.constant:
        f, f_new = (centred(x[:, forget] - x[:, ~forget].mean(1, keepdim=True)) for x in (old, new))
        loss = loss + s.constant * f_new.square().sum() / f.square().sum()
    if s.erase:
        target = old[:, forget] - old.mean(1, keepdim=True)
        if rows.components is not None:
            target = torch.cat([target, rows.components], 1)
        target = centred(target)
        target = target / (target.square().sum(0) / scene.sum()).sqrt()
        x = centred(features)
        gram = x @ x.T
        ridge = s.ridge * gram.trace() / x.shape[1]
        fitted = gram @ torch.linalg.solve(
            gram + ridge * torch.eye(len(x), device=x.device), target
        )
        loss = loss + s.erase * (target * fitted).sum() / target.square().sum()
    if objective.null_space is not None:
        inside = objective.null_space.project(centred(features)) / objective.null_space.scale
        loss = loss + s.null_space * inside.square().sum() / (scene.sum() * features.shape[1])
    return loss


def library_share(run: Callable[[], Any]) -> float:
    """Share of the time in convolutions and matrix products."""
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU]) as profile:
        for _ in range(3):
            run()
    events = profile.key_averages()
    total = sum(event.self_cpu_time_total for event in events)
    return float(sum(e.self_cpu_time_total for e in events if e.key in LIBRARY) / total)


@pytest.mark.parametrize("name", list(BODIES))
def test_deep_loop(benchmark: Any, table: Table, name: str) -> None:
    task, deep, batch = deep_case(name)
    draw = torch.Generator().manual_seed(0)
    index = torch.randint(len(task.train), (DEEP_STEPS, batch), generator=draw).to(DEVICE)
    rates = [1e-4] * DEEP_STEPS
    start = [p.detach().clone() for p in task.parameters]
    kinds = [EagerTrainStep, GraphTrainStep] if DEVICE == "cuda" else [EagerTrainStep]
    plain = PlainDeepLoop(name, task, deep)
    contenders = [Contender("plain torch", lambda: plain.run(index, rates))]
    want = _change(contenders[0].run(), plain.parameters, start)
    for kind in kinds:
        with torch.no_grad():
            for parameter, value in zip(task.parameters, start, strict=True):
                parameter.copy_(value)
        stepper = kind(task)
        label = "zsu_fast" if kind is EagerTrainStep else "zsu_fast, graph"
        contenders.append(Contender(label, lambda stepper=stepper: stepper.run(index, rates)))  # type: ignore[misc]
        for got, wanted in zip(
            _change(contenders[-1].run(), task.parameters, start), want, strict=True
        ):
            error = float((got - wanted).norm() / wanted.norm())
            most = 0.1 if has_bfloat16(task.device) else 0.02  # products may be of fewer digits
            assert error <= most, f"{label}: {error:.2%} away from plain PyTorch"
    case = f"deep {name}: {DEEP_STEPS} steps of {batch} rows"
    medians = compare(table, case, contenders, rounds=15, capture=False)
    shares = [library_share(contender.run) for contender in contenders]
    table.notes.append(
        f"deep {name}: convolutions and matrix products are {shares[0]:.0%} of the time of plain "
        f"torch (torch.profiler), {shares[-1]:.0%} of zsu_fast's"
    )
    if DEVICE == "cpu" and not any("not run" in note for note in table.notes):
        table.notes.append("deep in a captured graph against eager steps on a GPU: not run")
    gain = medians["plain torch"] / medians[contenders[-1].name]
    assert gain >= DEEP_TARGET or shares[-1] >= LIBRARY_SHARE, (
        f"{gain:.2f}x plain PyTorch, target {DEEP_TARGET}x, at {shares[-1]:.0%} of library time"
    )
    benchmark.pedantic(contenders[-1].run, rounds=3)


def _change(loss: Tensor, parameters: list[nn.Parameter], start: list[Tensor]) -> list[Tensor]:
    """The last loss, and how far the parameters have moved."""
    pairs = zip(parameters, start, strict=True)
    return [loss, torch.cat([(p.detach() - value).flatten() for p, value in pairs])]


def test_ascent_loop(benchmark: Any, table: Table) -> None:
    torch.manual_seed(0)
    model = working_copy(zoo.build("lenet5"), torch.device(DEVICE))
    spec = InputSpec((1, 28, 28), (0.0,), (1.0,), "benchmark")
    space = input_space(model, spec, "auto")

    def made(loop: Loop = "auto") -> Tensor:
        settings = AscentSettings(32, confidence=None, max_steps=40, restarts=0, loop=loop)
        with Reporter(False, None) as report:
            return synthesize.ascend(model, space, range(10), settings, report).images

    def eager() -> Tensor:
        return made("eager")

    assert torch.equal(eager(), eager())
    contenders = [Contender("eager", eager)]
    if DEVICE == "cuda":
        assert torch.equal(made(), made()), "two captures differ"
        torch.testing.assert_close(made(), eager(), rtol=1e-2, atol=1e-2)
        contenders.append(Contender("graph", made))
    compare(table, "LeNet5: 320 impressions, 40 ascent steps", contenders, rounds=7, capture=False)
    table.notes.append("The ascent: from call to result, including the capture of its graph.")
    benchmark.pedantic(contenders[-1].run, rounds=1)
