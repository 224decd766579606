"""Reports the progress of a long run: an `Event` per step, to a callback and a progress bar."""

from __future__ import annotations

import sys
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Protocol

from ..errors import ArgumentError, check_flag

if TYPE_CHECKING:
    from rich.progress import Progress, TaskID


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


class Peers(Protocol):
    """Other processes that end a stage together with this one, such as `Ranks`."""

    def request_stop(self) -> None:
        """Tells the others to end the stage."""

    def poll(self) -> None:
        """Raises `Stopped` if another one has ended the stage."""


class Reporter:
    """Passes events to a callback and, after the first second, to a progress bar.

    Args:
        progress: whether to show the bar; None shows it if stderr is a terminal.
        callback: called with each `Event`; returning True ends the stage early.
        peers: processes that end the stage early together with this one.
        quiet: never show the bar, as on all ranks but one.

    Raises:
        ArgumentError: ``progress`` or ``callback`` is something else.
    """

    def __init__(
        self,
        progress: bool | None = None,
        callback: Callback | None = None,
        peers: Peers | None = None,
        quiet: bool = False,
    ) -> None:
        if progress is not None:
            check_flag("progress", progress)
        if callback is not None and not callable(callback):
            raise ArgumentError("callback", f"got {callback!r}", "Pass a function, or None.")
        self.show = (sys.stderr.isatty() if progress is None else progress) and not quiet
        self.callback, self.peers = callback, peers
        self._bar: Progress | None = None
        self._tasks: dict[str, TaskID] = {}
        self._started = time.monotonic()

    def __enter__(self) -> Reporter:
        self._started = time.monotonic()
        return self

    def __exit__(self, *_: object) -> None:
        if self._bar is not None:
            self._bar.stop()
            self._bar, self._tasks = None, {}

    def __call__(self, stage: str, done: int, total: int, **metrics: float) -> None:
        """Reports one step.

        Raises:
            Stopped: the callback returned True, here or on another rank.
        """
        if self.peers is not None:
            self.peers.poll()
        if self.show and time.monotonic() - self._started > 1:
            self._draw(stage, done, total)
        if self.callback is not None and self.callback(Event(stage, done, total, metrics)) is True:
            if self.peers is not None:
                self.peers.request_stop()
            raise Stopped(f"the callback asked to stop in {stage} at {done} of {total}")

    def _draw(self, stage: str, done: int, total: int) -> None:
        if self._bar is None:
            # not at the top: few runs draw a bar, and every import of zsu_fast would load rich
            from rich.console import Console
            from rich.progress import BarColumn, Progress, TextColumn, TimeElapsedColumn

            self._bar = Progress(
                TextColumn("{task.description:>10}"),
                BarColumn(),
                TextColumn("{task.completed:.0f}/{task.total:.0f}"),
                TimeElapsedColumn(),
                console=Console(stderr=True),
                transient=True,
            )
            self._bar.start()
        if stage not in self._tasks:
            self._tasks[stage] = self._bar.add_task(stage, total=total)
        self._bar.update(self._tasks[stage], completed=done, total=total)
