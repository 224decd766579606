"""What a long run reports: an `Event` per step. A callback may end the stage early."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field


@dataclass(frozen=True)
class Event:
    """One step of a run.

    Attributes:
        stage: "synthesise", "fit" or "audit".
        done: impressions finished, optimiser steps taken, or audit stages finished.
        total: the largest value that ``done`` can reach.
        metrics: the latest measurements by name.
    """

    stage: str
    done: int
    total: int
    metrics: Mapping[str, float] = field(default_factory=dict)


Callback = Callable[[Event], bool | None]


class Stopped(Exception):
    """The callback asked to stop; the caller keeps the best state so far."""
