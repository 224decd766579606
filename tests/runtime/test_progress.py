"""Progress: a bar on a terminal, nothing elsewhere, events for a callback."""

from __future__ import annotations

import sys

import pytest
from support import QUICK, tiny

from zsu_fast import Event, unlearn
from zsu_fast.runtime import progress
from zsu_fast.runtime.progress import Reporter, Stopped


class Clock:
    """A clock that tests set."""

    now = 0.0

    def monotonic(self) -> float:
        return self.now


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> Clock:
    fake = Clock()
    monkeypatch.setattr(progress.time, "monotonic", fake.monotonic)
    return fake


def report_slowly(report: Reporter, clock: Clock) -> None:
    """Reports one step per second."""
    with report:
        for at in range(5):
            clock.now += 1.0
            report("fit", at, 5)


def test_quiet_if_stderr_is_no_terminal(clock: Clock, capfd: pytest.CaptureFixture[str]) -> None:
    report = Reporter()
    assert not report.show
    report_slowly(report, clock)
    assert capfd.readouterr() == ("", "")


def test_a_whole_run_is_quiet(capfd: pytest.CaptureFixture[str]) -> None:
    unlearn(tiny(), [1], **{k: v for k, v in QUICK.items() if k != "progress"})
    assert capfd.readouterr() == ("", "")


def test_a_bar_on_a_terminal(
    clock: Clock, capfd: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(sys.stderr, "isatty", lambda: True)
    monkeypatch.setenv("TERM", "xterm")
    monkeypatch.setenv("FORCE_COLOR", "1")
    report = Reporter()
    assert report.show
    report_slowly(report, clock)
    printed = capfd.readouterr()
    assert printed.out == ""
    assert "fit" in printed.err
    assert "4/5" in printed.err
    assert report._bar is None  # stopped, which restores the terminal


@pytest.mark.parametrize("terminal", [False, True])
def test_false_is_quiet_even_on_a_terminal(
    clock: Clock,
    capfd: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
    terminal: bool,
) -> None:
    monkeypatch.setattr(sys.stderr, "isatty", lambda: terminal)
    report_slowly(Reporter(False), clock)
    assert capfd.readouterr() == ("", "")


def test_nothing_in_the_first_second(clock: Clock, capfd: pytest.CaptureFixture[str]) -> None:
    with Reporter(True) as report:
        for at in range(5):
            clock.now += 0.2
            report("fit", at, 5)
        assert report._bar is None
        clock.now += 0.2
        report("fit", 5, 5)
        assert report._bar is not None
    capfd.readouterr()


def test_the_bar_is_stopped_on_an_error(clock: Clock, capfd: pytest.CaptureFixture[str]) -> None:
    report = Reporter(True)

    def run() -> None:
        with report:
            clock.now += 2
            report("fit", 1, 5)
            assert report._bar is not None
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        run()
    assert report._bar is None
    capfd.readouterr()


def test_events_for_a_callback() -> None:
    seen: list[Event] = []
    report = Reporter(False, seen.append)
    report("fit", 3, 9, leak=0.5)
    assert seen == [Event("fit", 3, 9, {"leak": 0.5})]


@pytest.mark.parametrize("answer", [None, False, 0, 1, "yes"])
def test_only_true_stops(answer: object) -> None:
    Reporter(False, lambda _: answer)("fit", 1, 2)  # type: ignore[arg-type, return-value]


def test_true_stops_and_the_message_says_where() -> None:
    with pytest.raises(Stopped, match="callback asked to stop in fit at 1 of 2"):
        Reporter(False, lambda _: True)("fit", 1, 2)


def test_events_of_a_run_are_in_order() -> None:
    seen: list[Event] = []
    unlearn(tiny(), [1], callback=lambda e: seen.append(e), **QUICK)
    stages = [e.stage for e in seen]
    assert stages == sorted(stages, reverse=True)  # synthesise, then fit
    assert set(stages) == {"synthesise", "fit"}
    synthesis = [e for e in seen if e.stage == "synthesise"]
    assert synthesis[-1].done == synthesis[-1].total == 40
    assert all(0 <= e.done <= e.total for e in seen)
    assert {"divergence", "leak", "agreement"} <= set(seen[-1].metrics)


class FakePeers:
    """Another process that stops once it was asked to."""

    stopped = False

    def request_stop(self) -> None:
        self.stopped = True

    def poll(self) -> None:
        if self.stopped:
            raise Stopped("another process was asked to stop")


def test_peers_stop_together() -> None:
    peers = FakePeers()
    with pytest.raises(Stopped, match="in fit at 1 of 2"):
        Reporter(False, lambda _: True, peers)("fit", 1, 2)
    with pytest.raises(Stopped, match="another process"):
        Reporter(False, None, peers)("fit", 1, 2)


def test_quiet_hides_the_bar() -> None:
    assert Reporter(True).show
    assert not Reporter(True, quiet=True).show
