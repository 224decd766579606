"""What a run will cost before it is made: seconds, peak memory, and how many GPUs.

On the device here by measurement: a few impressions are made (how many steps the ascent takes is
the model's own), one step is timed at two widths of the batch, so is a step of the tail; the rest
is arithmetic. On cards that are not here on paper: counted multiply-adds and bytes over published
rates times a stated utilisation.
"""

from __future__ import annotations

import copy
import math
import time
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any

import torch
from torch import nn

from .errors import ArgumentError, is_number
from .models.parameters import computed_tensors, weights_hash
from .models.wrapper import resolve_device
from .runtime import accelerators as cards, memory
from .runtime.accelerators import Accelerator
from .runtime.flops import multiply_adds
from .runtime.progress import Reporter
from .runtime.threads import threads_for
from .splitting.separability import MOST_IMAGES
from .synthesis.ascent import Ascent
from .synthesis.space import SearchSpace, input_space, tail_input_space
from .synthesis.synthesize import ascend, batch_rows
from .training.class_subset import ClassSubsetTail
from .training.fit_task import FitTask, make_fit_task
from .training.train_step import make_train_step
from .training.trainer import Schedule
from .unlearner import ZeroShotUnlearner

# Impressions made to see how many steps the ascent takes and where the model is cut.
_PILOT = 32
_PILOT_CLASSES = 16
# An ascent step is a forward pass and a backward pass to the input: this many forward passes.
_PASSES = 2
# Steps of the tail that are timed.
_TAIL_STEPS = 10
# Seconds that a GPU needs to get a step going, on paper.
_LAUNCH = 2e-4
# Copies of the weights that are there at once: the model, the working one, and those tried.
_COPIES = 5


@dataclass
class Plan:
    """What a run is expected to cost.

    Attributes:
        device: where, in words.
        basis: "measured": from steps timed here; "on paper": from published rates.
        classes: logits of the model.
        impression_classes: of how many of them impressions are made.
        impressions: how many in all.
        ascent_steps: of an impression, on average, as the pilot took.
        tail: at which module the pilot cut the model.
        seconds: by stage, and "total".
        memory: peak bytes: of the process on a CPU, of one card's memory on a GPU.
        gpus: cards that the run needs: for ``within``, else one; 0 on a CPU; None where it
            can't be: too large for a card, or the part that is not divided alone takes longer.
        within: seconds that were asked for, or None.
        notes: what was assumed, in words.
    """

    device: str
    basis: str
    classes: int
    impression_classes: int
    impressions: int
    ascent_steps: float
    tail: str
    seconds: dict[str, float]
    memory: int
    gpus: int | None
    within: float | None = None
    notes: list[str] = field(default_factory=list)

    @property
    def total(self) -> float:
        return self.seconds["total"]

    def to_dict(self) -> dict[str, Any]:
        """As plain values, for JSON."""
        return asdict(self)

    def render(self) -> str:
        """As text, for people."""
        stages = ", ".join(f"{k} {v:.1f}" for k, v in self.seconds.items() if k != "total")
        where = "peak memory of the process" if self.gpus == 0 else "memory of a card"
        wanted = "" if self.within is None else f" within {self.within:g} s"
        cards = "can't be done" if self.gpus is None else str(self.gpus)
        return "\n".join(
            [
                f"{self.device} ({self.basis}): {self.total:.1f} s ({stages})",
                f"{where}: {self.memory / 1e9:.2f} GB; GPUs{wanted}: {cards}",
                f"{self.impressions:,} impressions of {self.impression_classes:,} of "
                f"{self.classes:,} classes; tail: {self.tail}",
                *self.notes,
            ]
        )


@dataclass
class _Work:
    """What the pilot found: of one impression, one row at the cut, and the whole."""

    run: ZeroShotUnlearner
    space: SearchSpace
    count: int
    width: int
    shard: int
    steps: float
    most_steps: int
    row_bytes: int
    rows: int
    validation: int
    tail_steps: int
    batch: int
    tail_work: int
    seconds: dict[str, float]


def plan(
    model: nn.Module,
    forget: Any,
    *,
    hardware: str | None = None,
    within: float | None = None,
    **options: Any,
) -> Plan:
    """Estimates what ``unlearn(model, forget, **options)`` will cost.

    Takes some seconds: it makes a few impressions and times single steps. The model is not changed.

    Args:
        model, forget: as for `unlearn`.
        hardware: a card that is not here, one of `hardware.ACCELERATORS`; None for the device
            that the run would take here.
        within: seconds that the run may take, to learn how many GPUs it needs for that: the
            impressions' classes are divided among them, the rest is not.
        **options: of `ZeroShotUnlearner`; depth="deep" can't be planned.

    Raises:
        ArgumentError: an argument can't be used.
    """
    card = None if hardware is None else cards.accelerator(hardware)
    if within is not None and (not is_number(within) or within <= 0):
        raise ArgumentError("within", f"got {within!r}", "Pass seconds above 0, or None.")
    if options.get("depth", "output") != "output":
        raise ArgumentError(
            "depth", f"got {options['depth']!r}", "Only depth='output' can be planned."
        )
    meter = _Meter(resolve_device(model, options.get("device")))
    work = _pilot(model, forget, options, meter)
    if card is None:
        kept = 2 * work.count * math.prod(work.space.shape) * 4  # the impressions, once more joined
        seconds, peak = _measured(work), max(meter.peaks.values()) + kept
    else:
        seconds, peak = _on_paper(work, card), int(_card_memory(work))
    seconds["total"] = sum(seconds.values())
    run, device = work.run, work.run.device
    notes = [
        f"the ascent took {work.steps:.1f} steps on average for the pilot's impressions, "
        f"{work.most_steps} at most",
        f"the tail is taken to need all its {work.tail_steps} steps: it may stop earlier",
    ]
    if card is not None:
        notes.append(
            f"on paper: {100 * cards.UTILISATION:.0f} % of {card.name}'s published peak rate and "
            f"bandwidth; nothing was run on one"
        )
        gpus = _cards_needed(seconds, within) if peak <= card.memory else None
    elif device.type == "cuda":
        gpus = _cards_needed(seconds, within)
    else:
        gpus = 0
        notes.append(f"threads: {torch.get_num_threads()}; no GPU is needed")
    assert run.split_point is not None
    return Plan(
        device=card.name if card else str(device),
        basis="on paper" if card else "measured",
        classes=run.classes,
        impression_classes=len(run.active_classes),
        impressions=work.count,
        ascent_steps=work.steps,
        tail=run.split_point.name,
        seconds=seconds,
        memory=peak,
        gpus=gpus,
        within=within,
        notes=notes,
    )


def _cards_needed(seconds: dict[str, float], within: float | None) -> int | None:
    """Cards for a run ``within`` so many seconds; None where no number of them does it."""
    if within is None or seconds["total"] <= within:
        return 1
    spare = within - (seconds["total"] - seconds["synthesise"])
    return math.ceil(seconds["synthesise"] / spare) if spare > 0 else None


def _pilot(model: nn.Module, forget: Any, options: dict[str, Any], meter: _Meter) -> _Work:
    """Runs the procedure on a few impressions, stage by stage, and times its parts."""
    seconds: dict[str, float] = {}
    quiet = {"progress": False, "callback": None, "inplace": False, "cache": None}
    quiet |= {"distributed": False}  # one rank may plan while the others do not
    run = ZeroShotUnlearner(model, forget, **options | quiet)
    device, clock = run.device, _Clock(run.device)
    if run.space == "tail-input":
        run.split()
        assert run.split_point is not None
        space = tail_input_space(run.split_point, run.spec, device)
    else:
        space = input_space(run.work, run.spec, run.ascent.precision)
    seconds["prepare"] = clock.lap()
    meter.mark("prepare")
    shard, width = batch_rows(space)
    count = len(run.active_classes) * run.ascent.per_class
    width = min(width, count)
    every = max(1, len(run.active_classes) // _PILOT_CLASSES)
    some = sorted({*run.active_classes[::every][:_PILOT_CLASSES], run.forget[0]})
    per_class = max(1, min(run.ascent.per_class, _PILOT // len(some)))
    few = replace(run.ascent, per_class=per_class)
    made = ascend(run.work, space, run.spec, some, few, Reporter(False))
    start = space.start(torch.zeros(1, *space.shape, device=device))
    with threads_for(multiply_adds(space.exact, start), device):
        classes = (run.active_classes * run.ascent.per_class)[:count]
        for name, rows in (("wide", width), ("narrow", max(1, width // 4))):
            climb = Ascent(
                space, torch.tensor(classes[:rows]), torch.arange(rows), run.ascent, rows
            )
            seconds[f"fill {name}"], seconds[f"step {name}"] = climb.time_steps()
        points = made.images.to(device)
        clock.lap()
        with torch.no_grad():
            space.exact(points)
        seconds["forward"] = clock.lap() / len(made)
    meter.mark("synthesise")
    run.impressions = made
    run.split()
    assert run.split_point is not None
    seconds["split"] = run.record.timings["split"]
    clock.lap()
    cut, labels = run.split_point, made.labels.to(device)
    with threads_for(run.multiply_adds, device):
        features = cut.features(points) if run.space == "input" else space.parts(points)
        seconds["feature"] = clock.lap() / len(made)
        task = make_fit_task(
            run.work, cut, features, labels, run.forget_mask, run.objective, run.rows, run.seed
        )
        pilot_rows = len(task.train) + len(task.validation)
        seconds["label"] = clock.lap() / pilot_rows
    held = count // 4 if run.ascent.per_class >= 4 else 0
    having = len(run.active_classes)
    rows = count - held + run.rows.mixtures_for(count - held, having)
    validation = held + run.rows.mixtures_for(held, 0) if held else max(1024, having)
    batch = min(run.loop.batch_for(task.row_work), rows)
    _time_tail(run, task, batch, clock, seconds)
    row = sum(f[0].numel() * f.element_size() for f in features)
    if not isinstance(task.tail, ClassSubsetTail):
        row += 4 * run.classes  # the teacher's logits
    meter.mark("fit", (rows + validation - pilot_rows) * row)
    copy.deepcopy(model, computed_tensors(model))
    weights_hash(model)
    seconds["apply"] = clock.lap()
    meter.mark("apply")
    return _Work(
        run, space, count, width, shard, float(made.steps.float().mean()), int(made.steps.max()),
        memory.bytes_per_row(space.fast_model, start), rows, validation,
        run.loop.steps_for(run.classes), batch, task.row_work, seconds,
    )  # fmt: skip


def _time_tail(
    run: ZeroShotUnlearner,
    task: FitTask,
    batch: int,
    clock: _Clock,
    seconds: dict[str, float],
) -> None:
    """Times a step of the tail and a look at a validation row; the tail is worthless afterwards."""
    stepper = make_train_step(run.loop.loop, task)
    index = torch.randint(len(task.train), (_TAIL_STEPS, batch), generator=task.generator)
    rates = [1e-6] * _TAIL_STEPS
    with threads_for(task.row_work * batch, run.device):
        stepper.run(index, rates)  # warm-up, and capture on a GPU
        clock.lap()
        stepper.run(index, rates)
        seconds["tail step"] = clock.lap() / _TAIL_STEPS
        with torch.no_grad():
            task.validation_loss.score(task.tail, task.validation)
        seconds["look"] = clock.lap() / len(task.validation)


def _measured(work: _Work) -> dict[str, float]:
    """Seconds by stage, from the times of single steps."""
    s, wide, narrow = work.seconds, work.width, max(1, work.width // 4)
    a_row = max(0.0, (s["step wide"] - s["step narrow"]) / max(1, wide - narrow))
    a_step = max(0.0, s["step wide"] - a_row * wide)
    synthesise = sum(
        a_step * _batches(rows, work) + rows * (a_row * work.steps + s["fill wide"] / wide)
        for rows in _shards(work)
    )
    more = max(0, min(work.count, MOST_IMAGES) - _PILOT)
    looks = 1 + Schedule.validations
    return {
        "prepare": s["prepare"],
        "synthesise": synthesise + work.count * s["forward"],
        "split": s["split"] + (more * s["forward"] if work.run.tail == "auto" else 0.0),
        "fit": work.count * s["feature"]
        + (work.rows + work.validation) * s["label"]
        + work.tail_steps * s["tail step"]
        + looks * work.validation * s["look"],
        "apply": s["apply"],
    }


def _shards(work: _Work) -> list[int]:
    whole, left = divmod(work.count, work.shard)
    return [work.shard] * whole + ([left] if left else [])


def _batches(rows: int, work: _Work) -> float:
    """How often a batch steps until so many impressions are done: refilled while there are more."""
    if rows <= work.width:
        return work.most_steps
    return max(work.most_steps, rows * work.steps / work.width + work.most_steps / 2)


def _on_paper(work: _Work, card: Accelerator) -> dict[str, float]:
    """Seconds by stage on ``card``; what the host does is taken from here."""
    rate, bandwidth = card.rate * cards.UTILISATION, card.bandwidth * cards.UTILISATION
    forward = work.run.multiply_adds / rate
    steps = work.count * work.steps
    batches = sum(_batches(rows, work) for rows in _shards(work))
    traffic = steps * 2 * work.row_bytes + batches * _PASSES * _weight_bytes(work)
    synthesise = max(steps * _PASSES * forward, traffic / bandwidth) + batches * _LAUNCH
    trained = 3 * work.tail_work * work.batch / rate + _LAUNCH
    label = max(work.tail_work, _last_work(work)) / rate
    return {
        "prepare": work.seconds["prepare"],
        "synthesise": synthesise + work.count * forward,
        "split": work.seconds["split"] + min(work.count, MOST_IMAGES) * forward,
        "fit": work.count * forward
        + (work.rows + work.validation) * label
        + work.tail_steps * trained
        + (1 + Schedule.validations) * work.validation * work.tail_work / rate,
        "apply": work.seconds["apply"],
    }


def _last_work(work: _Work) -> int:
    """Multiply-adds of a row through the whole tail, all classes."""
    cut = work.run.split_point
    assert cut is not None
    with torch.no_grad():
        features = cut.backbone(torch.zeros(1, *work.run.spec.shape, device=work.run.device))
    return multiply_adds(cut.tail, *features)


def _weight_bytes(work: _Work) -> int:
    return sum(p.numel() * p.element_size() for p in work.run.work.parameters())


def _card_memory(work: _Work) -> float:
    """Bytes on a card: the model, its copies, a batch of rows and what the fit keeps."""
    cut = work.run.split_point
    assert cut is not None
    values = math.prod(work.space.shape)
    return _COPIES * _weight_bytes(work) + work.width * work.row_bytes + 2 * work.count * values * 4


class _Clock:
    """Seconds between laps, with a GPU's work done."""

    def __init__(self, device: torch.device) -> None:
        self.device = device
        self.lap()

    def lap(self) -> float:
        if self.device.type == "cuda":
            torch.cuda.synchronize(self.device)
        now = time.perf_counter()
        since = now - getattr(self, "before", now)
        self.before = now
        return since


class _Meter:
    """Peak memory of each stage of the pilot: of the process, or of the GPU's allocator."""

    def __init__(self, device: torch.device) -> None:
        self.device = device
        self.peaks: dict[str, int] = {}
        self._reset()

    def mark(self, stage: str, more: int = 0) -> None:
        """The end of a stage that needs ``more`` bytes in the full run."""
        self.peaks[stage] = self._peak() + more
        self._reset()

    def _peak(self) -> int:
        if self.device.type == "cuda":
            return torch.cuda.max_memory_allocated(self.device)
        peak = _status("VmHWM")
        if peak is None:  # macOS, in bytes there
            import resource

            peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
        return peak

    def _reset(self) -> None:
        if self.device.type == "cuda":
            torch.cuda.reset_peak_memory_stats(self.device)
            return
        try:
            Path("/proc/self/clear_refs").write_text("5")
        except OSError:  # not Linux, or not allowed: the peak since the start counts then
            return


def _status(name: str) -> int | None:
    """A line of the process's status, in bytes; None where the system has none."""
    try:
        lines = Path("/proc/self/status").read_text().splitlines()
    except OSError:
        return None
    return next((int(x.split()[1]) * 1024 for x in lines if x.startswith(f"{name}:")), None)
