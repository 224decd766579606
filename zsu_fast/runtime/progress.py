"""What a long run tells while it runs: a callback for programs, a progress bar for people."""

from __future__ import annotations

import sys
import time
from types import TracebackType

from rich.console import Console
from rich.progress import BarColumn, Progress, TaskID, TextColumn, TimeElapsedColumn

from ..errors import ArgumentError, check_flag
from .distributed import Ranks
from .events import Callback, Event, Stopped


class Reporter:
    """Passes events to a callback and, after the first second, to a progress bar.

    Args:
        progress: True or False; None shows the bar only where stderr is a terminal.
        callback: called with each `Event`; returning True ends the stage early.
        ranks: ranks that end it early together; rank 0 alone shows a bar.

    Raises:
        ArgumentError: neither of these.
    """

    def __init__(
        self,
        progress: bool | None = None,
        callback: Callback | None = None,
        ranks: Ranks | None = None,
    ) -> None:
        if progress is not None:
            check_flag("progress", progress)
        if callback is not None and not callable(callback):
            raise ArgumentError("callback", f"got {callback!r}", "Pass a function, or None.")
        self.show = sys.stderr.isatty() if progress is None else progress
        self.show = self.show and (ranks is None or ranks.is_main)
        self.callback, self.ranks = callback, ranks
        self._bar: Progress | None = None
        self._tasks: dict[str, TaskID] = {}
        self._started = time.monotonic()

    def __enter__(self) -> Reporter:
        self._started = time.monotonic()
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        if self._bar is not None:
            self._bar.stop()
            self._bar, self._tasks = None, {}

    def __call__(self, stage: str, done: int, total: int, **metrics: float) -> None:
        """Reports progress.

        Raises:
            Stopped: the callback returned True, here or on another rank.
        """
        if self.ranks is not None:
            self.ranks.poll()
        if self.show and time.monotonic() - self._started > 1:
            self._draw(stage, done, total)
        if self.callback is not None and self.callback(Event(stage, done, total, metrics)) is True:
            if self.ranks is not None:
                self.ranks.request_stop()
            raise Stopped(f"the callback asked to stop in {stage} at {done} of {total}")

    def _draw(self, stage: str, done: int, total: int) -> None:
        if self._bar is None:
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
