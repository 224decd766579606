"""What a long run reports: an `Event` for each step, and how a callback ends a stage early."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field


@dataclass(frozen=True)
class Event:
    """A step of a run.

    Attributes:
        stage: "synthesise" or "fit".
        done, total: impressions finished, or optimiser steps taken; total is the most there can be.
        metrics: what was measured last, by name.
    """

    stage: str
    done: int
    total: int
    metrics: Mapping[str, float] = field(default_factory=dict)


Callback = Callable[[Event], bool | None]


class Stopped(Exception):
    """The callback asked to stop; the caller keeps the best state so far."""
