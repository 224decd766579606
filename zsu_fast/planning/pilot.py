"""A pilot run: the procedure on a few impressions, stage by stage, with its parts timed.

How many ascent steps an impression takes depends on the model, so it has to be tried.
"""

from __future__ import annotations

import math
import time
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import nn

from ..fit_stage import features_of, fit_task
from ..models.parameters import deep_copy, weights_hash
from ..runtime.measuring import PeakMemory, Stopwatch, multiply_adds
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

# Impressions of the pilot, at most and at least, and classes they are of.
PILOT_IMPRESSIONS, _FEWEST = 32, 4
_CLASSES = 16
# Seconds that the ascent of the pilot may take, one ascent step of it, and the steps of the fit.
_ASCENT_SECONDS, _STEP_SECONDS, _FIT_SECONDS = 4.0, 0.3, 1.0
_TYPICAL_STEPS = 30  # of an ascent, to choose how many impressions can be afforded
# Steps of the fit that are timed, at most, and rows mixed for it, at least where rows are many.
_TIMED_STEPS, _MIXTURES = 10, 64


@dataclass
class PilotResult:
    """What a pilot run measured: of one impression, of one row at the split, and of the whole.

    Attributes:
        run: the unlearner whose stages were tried.
        space: where impressions are synthesised.
        count: impressions of the full run.
        width: impressions in a working batch.
        timed: impressions in the batches whose steps were timed, wide and narrow.
        shard: impressions in a shard.
        mean_steps, max_steps: ascent steps of the pilot's impressions; those that had not reached
            their target in time count with all steps.
        reached: how many of them had, and how many there were.
        row_bytes: bytes of an impression's forward and backward pass.
        train_rows, validation_rows: of the full fit.
        fit_steps: optimiser steps of the full fit.
        batch: rows per optimiser step.
        tail_work: multiply-adds of a row in the trained part of the tail.
        seconds: measured times by name: "prepare", "fill wide", "step wide", "step narrow",
            "forward", "split", "feature" (of an impression), "features" (once), "label",
            "fit step", "validate", "apply".
    """

    run: ZeroShotUnlearner
    space: SearchSpace
    count: int
    width: int
    timed: tuple[int, int]
    shard: int
    mean_steps: float
    max_steps: int
    reached: tuple[int, int]
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
        self.seconds["prepare"] = self.watch.lap()
        self.space = run.search_space()
        drawn = self.watch.lap() - run.record.timings.get("split", 0.0)
        self.seconds["prepare"] += drawn
        # at the tail, noise images go through the backbone here, and once more for the fit
        self.seconds["features"] = drawn if self.space.name == "tail-input" else 0.0
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
            run=self.run, space=self.space, count=self.count, width=self.width, timed=self.timed,
            shard=self.shard, mean_steps=self.steps[0], max_steps=self.steps[1],
            reached=self.reached,
            row_bytes=self.space.bytes_per_row(),
            fit_steps=self.run.options.loop.steps_for(self.run.classes),
            seconds=self.seconds,
            **fit,
        )  # fmt: skip

    def _synthesise(self) -> ClassImpressions:
        """The times of single ascent steps at two widths of the batch, and a few impressions."""
        run = self.run
        with threads_for(multiply_adds(self.space.exact, self.start), run.device):
            one = self._time_step("narrow", 1, repeat=1)
            wide = max(1, min(self.width, int(_STEP_SECONDS / max(one, 1e-6))))
            self.timed = wide, max(1, wide // 4)
            for name, rows in zip(("wide", "narrow"), self.timed, strict=True):
                self._time_step(name, rows, repeat=3)
            row_step = self.seconds["step wide"] / wide
            afford = int(_ASCENT_SECONDS / (_TYPICAL_STEPS * row_step))
            impressions = self._ascend(max(_FEWEST, min(PILOT_IMPRESSIONS, afford)))
            images = impressions.images.to(run.device)
            self.watch.lap()
            with torch.no_grad():
                self.space.exact(images)
            self.seconds["forward"] = self.watch.lap() / len(impressions)
        self.memory.end_stage("synthesise")
        return impressions

    def _time_step(self, name: str, rows: int, repeat: int) -> float:
        """Times filling a batch of ``rows``, and the fastest of some steps after the first."""
        run, settings = self.run, self.run.options.ascent
        labels = torch.tensor((run.active_classes * settings.per_class)[: self.count])
        ascent = Ascent(self.space, labels[:rows], torch.arange(rows), settings, rows)
        self.watch.lap()
        batch = ascent.fill()
        self.seconds[f"fill {name}"] = self.watch.lap()
        seconds = []
        for _ in range(1 + repeat):
            ascent.step(batch)
            seconds.append(self.watch.lap())
        self.seconds[f"step {name}"] = min(seconds[1:])  # the first one warms up
        return self.seconds[f"step {name}"]

    def _ascend(self, count: int) -> ClassImpressions:
        """About ``count`` impressions of some classes; late ones are where they start."""
        run, active, settings = self.run, self.run.active_classes, self.run.options.ascent
        most = min(_CLASSES, max(2, count // 2))
        every = max(1, len(active) // most)
        classes = sorted({*active[::every][:most], run.forget[0]})
        few = replace(settings, per_class=max(1, min(settings.per_class, count // len(classes))))
        end = time.monotonic() + _ASCENT_SECONDS
        report = Reporter(False, lambda _: time.monotonic() > end)
        found = ascend(run.work, self.space, classes, few, report)
        labels = torch.tensor(classes).repeat_interleave(few.per_class)
        late = len(labels) - len(found)
        self.reached = len(found), len(labels)
        longest = settings.max_steps * (1 + settings.restarts)
        steps = torch.cat([found.steps, torch.full((late,), longest, dtype=torch.int32)])
        self.steps = float(steps.float().mean()), int(steps.max())
        if not late:
            return found
        points = self.space.start(torch.randn(len(labels), *self.space.shape)).cpu()
        points[: len(found)] = found.images
        zero = torch.zeros(len(labels))
        return ClassImpressions(
            points, labels, zero, zero, steps, zero > 0, self.space.spec, self.space.name
        )

    def _fit(self, split: Split, impressions: ClassImpressions) -> dict[str, int]:
        """Features, labels, steps and validation of the fit, timed; its size in the full run."""
        run = self.run
        impressions = _enough_to_hold_out(impressions)
        mixtures, settings = run.options.features.mixtures_for, run.options.features
        afford = max(_MIXTURES, int(_FIT_SECONDS / max(self.seconds["forward"], 1e-6)))
        usual = settings.mixtures_for(len(impressions), _CLASSES)
        run.options.features = replace(settings, mixtures=min(usual, afford))
        self.watch.lap()
        with threads_for(run.multiply_adds, run.device):
            if run.options.space == "tail-input":
                features = self.space.parts(impressions.images.to(run.device))
                self.seconds["feature"] = 0.0
            else:
                features = features_of(run, split, impressions)
                self.seconds["feature"] = self.watch.lap() / len(impressions)
            self.watch.lap()
            task = fit_task(run, split, features, impressions)
            pilot_rows = len(task.train) + len(task.validation)
            self.seconds["label"] = self.watch.lap() / pilot_rows
        run.options.features = settings
        held = self.count // 4 if run.options.ascent.per_class >= 4 else 0
        classes = len(run.active_classes)
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
        with threads_for(work * batch, self.run.device):
            self.watch.lap()
            step.run(index[:1], [1e-6])  # warm-up, and capture on a GPU
            count = max(1, min(_TIMED_STEPS, int(_FIT_SECONDS / max(self.watch.lap(), 1e-6))))
            step.run(index[:count], [1e-6] * count)
            self.seconds["fit step"] = self.watch.lap() / count
            with torch.no_grad():
                task.validation_loss.score(task.tail, task.validation)
            self.seconds["validate"] = self.watch.lap() / len(task.validation)


def _enough_to_hold_out(impressions: ClassImpressions) -> ClassImpressions:
    """Eight rows or more, four of each class at least, so that validation rows come from them."""
    labels = impressions.labels
    if int(torch.bincount(labels).max()) >= 4:
        return impressions
    index = torch.arange(len(labels)).repeat_interleave(4)
    names = ("images", "labels", "confidence", "target", "steps", "hit")
    return replace(impressions, **{n: getattr(impressions, n)[index] for n in names})
