"""The two loops, tail and ascent: captured in CUDA graphs against eager.

    pytest benchmarks/end_to_end/bench_loops.py

On a GPU, the graph loop has to be 5 times as fast as the eager one on LeNet5, and two captures have
to replay the same bits. On a CPU, the compiled tail takes the place of the graph, and the ascent
runs eagerly only.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

from benchmarks.harness import DEVICE, Contender, Table, compare
from zsu_fast.models import zoo
from zsu_fast.models.input_spec import InputSpec
from zsu_fast.models.wrapper import working_copy
from zsu_fast.runtime.cuda_graph import Loop
from zsu_fast.runtime.progress import Reporter
from zsu_fast.splitting.split import split_at
from zsu_fast.synthesis import synthesize
from zsu_fast.synthesis.ascent_settings import AscentSettings
from zsu_fast.synthesis.space import input_space
from zsu_fast.training.fit_task import FitTask, trained_parameters
from zsu_fast.training.losses import MaskedKL
from zsu_fast.training.teacher import Teacher, build_feature_set
from zsu_fast.training.train_step import CompiledTrainStep, EagerTrainStep, GraphTrainStep

GRAPH_TARGET = 5.0
BLOCK, BATCH, ROWS = 10, 512, 2048
FORGET = (1, 2, 3, 4)


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
    if not table.notes:
        table.notes = ["Seconds from call to result, including the capture of the ascent's graph."]
    benchmark.pedantic(contenders[-1].run, rounds=1)
