"""A pilot run: the procedure on a few impressions, stage by stage, with its parts timed.

How many ascent steps an impression takes depends on the model, so it has to be tried.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import nn

from ..models.parameters import deep_copy, weights_hash
from ..runtime.measuring import PeakMemory, Stopwatch, multiply_adds
from ..runtime.memory import bytes_per_row
from ..runtime.progress import Reporter
from ..runtime.torch_settings import threads_for
from ..splitting.split import Split
from ..synthesis.ascent import Ascent
from ..synthesis.impressions import ClassImpressions
from ..synthesis.space import SearchSpace
from ..synthesis.synthesize import ascend, batch_rows
from ..training.class_subset import ClassSubsetTail
from ..training.fit_task import FitTask
from ..training.train_step import make_train_step
from ..unlearner import ZeroShotUnlearner

# Impressions of the pilot, and classes they are of.
PILOT_IMPRESSIONS = 32
_CLASSES = 16
# Steps of the fit that are timed.
_TIMED_STEPS = 10


@dataclass
class PilotResult:
    """What a pilot run measured: of one impression, of one row at the split, and of the whole.

    Attributes:
        run: the unlearner whose stages were tried.
        space: where impressions are synthesised.
        count: impressions of the full run.
        width: impressions in a working batch.
        shard: impressions in a shard.
        mean_steps, max_steps: ascent steps of the pilot's impressions.
        row_bytes: bytes of an impression's forward and backward pass.
        train_rows, validation_rows: of the full fit.
        fit_steps: optimiser steps of the full fit.
        batch: rows per optimiser step.
        tail_work: multiply-adds of a row in the trained part of the tail.
        seconds: measured times by name: "prepare", "fill wide", "step wide", "step narrow",
            "forward", "split", "feature", "label", "fit step", "validate", "apply".
    """

    run: ZeroShotUnlearner
    space: SearchSpace
    count: int
    width: int
    shard: int
    mean_steps: float
    max_steps: int
    row_bytes: int
    train_rows: int
    validation_rows: int
    fit_steps: int
    batch: int
    tail_work: int
    seconds: dict[str, float]

    @property
    def impression_bytes(self) -> int:
        """Of all impressions of the full run, in shards and joined."""
        return 2 * self.count * math.prod(self.space.shape) * 4

    @property
    def split(self) -> Split:
        assert self.run.split_point is not None
        return self.run.split_point


class Pilot:
    """Runs the procedure on a few impressions, stage by stage, and times its parts.

    Args:
        model, forget, options: as for `unlearn`; the model is not changed.
        memory: measures each stage's peak.

    Raises:
        ArgumentError: an argument can't be used.
    """

    def __init__(
        self, model: nn.Module, forget: Any, options: dict[str, Any], memory: PeakMemory
    ) -> None:
        quiet = {"progress": False, "callback": None, "inplace": False, "cache": None}
        quiet |= {"distributed": False}  # one rank may plan while the others do not
        self.model, self.memory = model, memory
        self.watch = Stopwatch(memory.device)
        self.seconds: dict[str, float] = {}
        self.run = run = ZeroShotUnlearner(model, forget, **options | quiet)
        self.space = run.search_space()
        self.seconds["prepare"] = self.watch.lap()
        memory.end_stage("prepare")
        self.count = len(run.active_classes) * run.options.ascent.per_class
        self.shard, width = batch_rows(self.space)
        self.width = min(width, self.count)
        self.start = self.space.one_point()

    def run_stages(self) -> PilotResult:
        impressions = self._synthesise()
        self.run.impressions = impressions
        split = self.run.split()
        self.seconds["split"] = self.run.record.timings["split"]
        fit = self._fit(split, impressions)
        self.watch.lap()
        deep_copy(self.model, "Pass the module inside the wrapper.")
        weights_hash(self.model)
        self.seconds["apply"] = self.watch.lap()
        self.memory.end_stage("apply")
        return PilotResult(
            run=self.run, space=self.space, count=self.count, width=self.width, shard=self.shard,
            mean_steps=float(impressions.steps.float().mean()),
            max_steps=int(impressions.steps.max()),
            row_bytes=bytes_per_row(self.space.fast_model, self.start),
            fit_steps=self.run.options.loop.steps_for(self.run.classes),
            seconds=self.seconds,
            **fit,
        )  # fmt: skip

    def _synthesise(self) -> ClassImpressions:
        """A few impressions, and the times of single ascent steps at two widths of the batch."""
        run, active, settings = self.run, self.run.active_classes, self.run.options.ascent
        every = max(1, len(active) // _CLASSES)
        classes = sorted({*active[::every][:_CLASSES], run.forget[0]})
        per_class = max(1, min(settings.per_class, PILOT_IMPRESSIONS // len(classes)))
        few = replace(settings, per_class=per_class)
        impressions = ascend(run.work, self.space, classes, few, Reporter(False))
        with threads_for(multiply_adds(self.space.exact, self.start), run.device):
            labels = torch.tensor((active * settings.per_class)[: self.count])
            for name, rows in (("wide", self.width), ("narrow", max(1, self.width // 4))):
                ascent = Ascent(self.space, labels[:rows], torch.arange(rows), settings, rows)
                self.watch.lap()
                batch = ascent.fill()
                self.seconds[f"fill {name}"] = self.watch.lap()
                seconds = []
                for _ in range(4):
                    ascent.step(batch)
                    seconds.append(self.watch.lap())
                self.seconds[f"step {name}"] = min(seconds[1:])  # the first one warms up
            images = impressions.images.to(run.device)
            self.watch.lap()
            with torch.no_grad():
                self.space.exact(images)
            self.seconds["forward"] = self.watch.lap() / len(impressions)
        self.memory.end_stage("synthesise")
        return impressions

    def _fit(self, split: Split, impressions: ClassImpressions) -> dict[str, int]:
        """Features, labels, steps and validation of the fit, timed; its size in the full run."""
        run = self.run
        self.watch.lap()
        with threads_for(run.multiply_adds, run.device):
            features = run.features_of(split, impressions)
            self.seconds["feature"] = self.watch.lap() / len(impressions)
            task = run.fit_task(split, features, impressions)
            pilot_rows = len(task.train) + len(task.validation)
            self.seconds["label"] = self.watch.lap() / pilot_rows
        held = self.count // 4 if run.options.ascent.per_class >= 4 else 0
        classes = len(run.active_classes)
        mixtures = run.options.features.mixtures_for
        train = self.count - held + mixtures(self.count - held, classes)
        validation = held + mixtures(held, 0) if held else max(1024, classes)
        work = task.row_work
        batch = min(run.options.loop.batch_for(work), train)
        self._time_steps(task, batch, work)
        row_bytes = sum(f[0].numel() * f.element_size() for f in features)
        if not isinstance(task.tail, ClassSubsetTail):
            row_bytes += 4 * run.classes  # the teacher's logits
        self.memory.end_stage("fit", (train + validation - pilot_rows) * row_bytes)
        return {
            "train_rows": train, "validation_rows": validation, "batch": batch, "tail_work": work,
        }  # fmt: skip

    def _time_steps(self, task: FitTask, batch: int, work: int) -> None:
        """Times an optimiser step and the validation of a row; the tail is worthless afterwards."""
        step = make_train_step(self.run.options.loop.loop, task)
        index = torch.randint(len(task.train), (_TIMED_STEPS, batch), generator=task.generator)
        rates = [1e-6] * _TIMED_STEPS
        with threads_for(work * batch, self.run.device):
            step.run(index, rates)  # warm-up, and capture on a GPU
            self.watch.lap()
            step.run(index, rates)
            self.seconds["fit step"] = self.watch.lap() / _TIMED_STEPS
            with torch.no_grad():
                task.validation_loss.score(task.tail, task.validation)
            self.seconds["validate"] = self.watch.lap() / len(task.validation)
