"""What a run will cost: on the device at hand from a pilot's times, on paper for other GPUs.

For a GPU you don't have, the estimate counts multiply-adds and bytes and divides them by published
peak rates times a stated utilisation.
"""

from __future__ import annotations

import math
from dataclasses import asdict, dataclass, field
from typing import Any

import torch
from torch import nn

from ..errors import ArgumentError, is_number
from ..models.embedding_classifier import as_embedding_classifier
from ..models.wrapper import resolve_device
from ..runtime.accelerators import UTILISATION, Accelerator, accelerator
from ..runtime.measuring import PeakMemory, multiply_adds
from ..splitting.layers import MOST_IMAGES
from ..training.trainer import Schedule
from .encoder import pilot_encoder
from .pilot import Pilot, PilotResult

# An ascent step is a forward pass and a backward pass to the input: this many forward passes.
_PASSES = 2
# Seconds to launch a step on a GPU, on paper.
_LAUNCH = 2e-4
# Copies of the weights in memory at once: the model, the working copy, and the inference copies.
_COPIES = 5


@dataclass
class Plan:
    """What a run is expected to cost.

    Attributes:
        device: where, in words.
        basis: "measured": from steps timed here; "on paper": from published rates.
        depth: the level that is planned: "output", or "deep" for an `EmbeddingClassifier`.
        classes: logits of the model.
        impression_classes: classes to synthesise.
        impressions: impressions of all of them together.
        ascent_steps: per impression, the mean over the pilot's.
        tail: the module at which the pilot split the model.
        seconds: by stage, and "total".
        memory: peak bytes: of the process on a CPU, of one GPU's memory on a GPU.
        gpus: GPUs that the run needs: to finish ``within`` a time, else one; 0 on a CPU; None
            where it is impossible: the model is too large for one, or the stages that are not
            divided take longer than that.
        within: the time asked for, in seconds, or None.
        notes: what was assumed, in words.
    """

    device: str
    basis: str
    depth: str
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
        """Plain values, for JSON."""
        return asdict(self)

    def render(self) -> str:
        """Text for people."""
        stages = ", ".join(f"{k} {v:.1f}" for k, v in self.seconds.items() if k != "total")
        where = "peak memory of the process" if self.gpus == 0 else "memory per GPU"
        wanted = "" if self.within is None else f" within {self.within:g} s"
        gpus = "impossible" if self.gpus is None else str(self.gpus)
        basis = f"depth='{self.depth}', {self.basis}"
        return "\n".join(
            [
                f"{self.device} ({basis}): {self.total:.1f} s ({stages})",
                f"{where}: {self.memory / 1e9:.2f} GB; GPUs{wanted}: {gpus}",
                f"{self.impressions:,} impressions of {self.impression_classes:,} of "
                f"{self.classes:,} classes; tail: {self.tail}",
                *self.notes,
            ]
        )


def plan(
    model: nn.Module,
    forget: Any,
    *,
    hardware: str | None = None,
    within: float | None = None,
    **options: Any,
) -> Plan:
    """Estimates what ``unlearn(model, forget, **options)`` will cost.

    Synthesises a few impressions and times single steps, which takes some seconds: about ten at
    most, besides preparing and splitting the model. The model is not changed.

    Args:
        model, forget: as for `unlearn`.
        hardware: one of `accelerators.ACCELERATORS`, a GPU you don't have; None for the device
            that the run would use here.
        within: the time the run may take, in seconds, to learn how many GPUs it needs: only the
            synthesis is divided among them.
        **options: of `ZeroShotUnlearner`; what is planned is depth="output", also by default, and
            depth="deep" is refused. For an `EmbeddingClassifier` the default run is planned.

    Raises:
        ArgumentError: an argument can't be used, or no GPU is planned for and the run takes longer
            than ``within``.
    """
    if as_embedding_classifier(model) is not None:
        return _plan_encoder(model, forget, hardware, within, options)
    _check(within, options.get("depth"))
    card = None if hardware is None else accelerator(hardware)
    output = options.get("tail") in ("last", 1) or options.get("objective") == "differential"
    default_depth = options.get("depth") is None and not output
    options = options | {"depth": "output"}
    memory = PeakMemory(resolve_device(model, options.get("device")))
    pilot = Pilot(model, forget, options, memory).run_stages()
    if card is None:
        seconds, peak = measured_seconds(pilot), max(memory.peaks.values())
    else:
        seconds = estimated_seconds(pilot, card)
        peak = _COPIES * _weight_bytes(pilot) + pilot.width * pilot.row_bytes
    peak += pilot.impression_bytes
    seconds["total"] = sum(seconds.values())
    run = pilot.run
    on_gpu = card is not None or run.device.type == "cuda"
    if not on_gpu and within is not None and seconds["total"] > within:
        raise ArgumentError(
            "within",
            f"got {within:g} s, and on {run.device} the run takes about {seconds['total']:.1f} s",
            "Pass hardware= to learn how many GPUs would do it.",
        )
    fits = card is None or peak <= card.memory
    return Plan(
        device=card.name if card else str(run.device),
        basis="on paper" if card else "measured",
        depth="output",
        classes=run.classes,
        impression_classes=len(run.active_classes),
        impressions=pilot.count,
        ascent_steps=pilot.mean_steps,
        tail=pilot.split.name,
        seconds=seconds,
        memory=peak,
        gpus=(gpus_needed(seconds, within) if fits else None) if on_gpu else 0,
        within=within,
        notes=_notes(pilot, card, default_depth),
    )


def _plan_encoder(
    model: nn.Module, forget: Any, hardware: str | None, within: float | None, options: Any
) -> Plan:
    """`plan` for an `EmbeddingClassifier`, which has no other level than "deep"."""
    _check(within, None)
    if hardware is not None:
        raise ArgumentError(
            "hardware", f"got {hardware!r} for an encoder",
            "Leave it out: its run is planned on the device at hand only.",
        )  # fmt: skip
    memory = PeakMemory(resolve_device(model, options.get("device")))
    pilot = pilot_encoder(model, forget, options, memory)
    total = sum(pilot.seconds.values())
    if within is not None and total > within:
        raise ArgumentError(
            "within", f"got {within:g} s, and the run takes about {total:.1f} s",
            "Lower steps, or retain_sample.",
        )  # fmt: skip
    run = pilot.run
    notes = [
        f"counted with all {pilot.ascent_steps} steps that an inverted row may take: an upper "
        f"estimate",
        f"threads: {torch.get_num_threads()}",
    ]
    return Plan(
        device=str(run.device), basis="measured", depth="deep",
        classes=run.record.gallery["identities"], impression_classes=len(run.active_classes),
        impressions=pilot.inverted, ascent_steps=pilot.ascent_steps, tail=pilot.tail,
        seconds=pilot.seconds | {"total": total},
        memory=max(memory.peaks.values()) + pilot.row_bytes,
        gpus=0 if run.device.type == "cpu" else 1, within=within, notes=notes,
    )  # fmt: skip


def _check(within: float | None, depth: str | None) -> None:
    if within is not None and (not is_number(within) or within <= 0):
        raise ArgumentError("within", f"got {within!r}", "Pass seconds above 0, or None.")
    if depth not in (None, "output"):
        raise ArgumentError(
            "depth",
            f"got {depth!r}",
            "Only depth='output' can be planned. On a CPU, deep forgetting takes minutes at most.",
        )


def _notes(pilot: PilotResult, card: Accelerator | None, default_depth: bool) -> list[str]:
    notes = []
    if default_depth:
        notes.append(
            "depth='output' is planned; without that option, unlearn() goes deep and takes longer"
        )
    reached, tried = pilot.reached
    if reached < tried:
        notes.append(
            f"the pilot was cut short: {tried - reached} of its {tried} impressions count with "
            f"all steps that they may take, so this is an upper estimate"
        )
    notes += [
        f"the pilot's impressions took {pilot.mean_steps:.1f} ascent steps on average, at most "
        f"{pilot.max_steps}",
        f"the fit is counted with all {pilot.fit_steps} steps: it may stop earlier",
    ]
    if card is not None:
        notes.append(
            f"on paper: {100 * UTILISATION:.0f} % of {card.name}'s published peak rate and "
            f"bandwidth; nothing was run on one"
        )
    elif pilot.run.device.type != "cuda":
        notes.append(f"threads: {torch.get_num_threads()}; no GPU is needed")
    return notes


def gpus_needed(seconds: dict[str, float], within: float | None) -> int | None:
    """GPUs for a run within ``within`` seconds; None where no number of them suffices."""
    if within is None or seconds["total"] <= within:
        return 1
    spare = within - (seconds["total"] - seconds["synthesise"])
    return math.ceil(seconds["synthesise"] / spare) if spare > 0 else None


def measured_seconds(pilot: PilotResult) -> dict[str, float]:
    """Seconds by stage, from the times of single steps."""
    s, (wide, narrow) = pilot.seconds, pilot.timed
    if wide == narrow:  # steps are too slow to tell what they cost with no row
        per_row = s["step wide"] / wide
    else:
        per_row = max(0.0, (s["step wide"] - s["step narrow"]) / (wide - narrow))
    per_step = max(0.0, s["step wide"] - per_row * wide)
    synthesise = sum(
        per_step * _batch_steps(rows, pilot)
        + rows * (per_row * pilot.mean_steps + s["fill wide"] / wide)
        for rows in _shards(pilot)
    )
    more = max(0, min(pilot.count, MOST_IMAGES) - pilot.reached[1])
    return {
        "prepare": s["prepare"],
        "synthesise": synthesise + pilot.count * s["forward"],
        "split": s["split"] + (more * s["forward"] if pilot.run.options.tail == "auto" else 0.0),
        "fit": pilot.count * s["feature"]
        + s["features"]
        + (pilot.train_rows + pilot.validation_rows) * s["label"]
        + pilot.fit_steps * s["fit step"]
        + (1 + Schedule.validations) * pilot.validation_rows * s["validate"],
        "apply": s["apply"],
    }


def _shards(pilot: PilotResult) -> list[int]:
    """Rows of each shard."""
    whole, left = divmod(pilot.count, pilot.shard)
    return [pilot.shard] * whole + ([left] if left else [])


def _batch_steps(rows: int, pilot: PilotResult) -> float:
    """Steps of the working batch until ``rows`` impressions are done: it is refilled meanwhile."""
    if rows <= pilot.width:
        return pilot.max_steps
    refilled = rows * pilot.mean_steps / pilot.width + pilot.max_steps / 2
    return max(pilot.max_steps, refilled)


def estimated_seconds(pilot: PilotResult, card: Accelerator) -> dict[str, float]:
    """Seconds by stage on ``card``; the host's share is the one measured here."""
    rate, bandwidth = card.rate * UTILISATION, card.bandwidth * UTILISATION
    forward = pilot.run.multiply_adds / rate
    steps = pilot.count * pilot.mean_steps
    batch_steps = sum(_batch_steps(rows, pilot) for rows in _shards(pilot))
    traffic = steps * 2 * pilot.row_bytes + batch_steps * _PASSES * _weight_bytes(pilot)
    synthesise = max(steps * _PASSES * forward, traffic / bandwidth) + batch_steps * _LAUNCH
    step = 3 * pilot.tail_work * pilot.batch / rate + _LAUNCH
    label = max(pilot.tail_work, _whole_tail_work(pilot)) / rate
    return {
        "prepare": pilot.seconds["prepare"],
        "synthesise": synthesise + pilot.count * forward,
        "split": pilot.seconds["split"] + min(pilot.count, MOST_IMAGES) * forward,
        "fit": pilot.count * forward
        + (pilot.train_rows + pilot.validation_rows) * label
        + pilot.fit_steps * step
        + (1 + Schedule.validations) * pilot.validation_rows * pilot.tail_work / rate,
        "apply": pilot.seconds["apply"],
    }


def _whole_tail_work(pilot: PilotResult) -> int:
    """Multiply-adds of a row through the whole tail, all classes."""
    image = torch.zeros(1, *pilot.run.spec.shape, device=pilot.run.device)
    with torch.no_grad():
        features = pilot.split.backbone(image)
    return multiply_adds(pilot.split.tail, *features)


def _weight_bytes(pilot: PilotResult) -> int:
    return sum(p.numel() * p.element_size() for p in pilot.run.work.parameters())
