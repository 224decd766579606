"""Faults in production: threads, full disks, read-only homes, kills, many calls."""

from __future__ import annotations

import errno
import os
import random
import signal
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import psutil
import pytest
import torch
from support import QUICK, SPEC, bits, in_child, same_bits, tiny, tiny_data, untouched
from torch import nn

import zsu_fast
from zsu_fast import OutputError
from zsu_fast.models import checkpoint
from zsu_fast.runtime.fx_tracing import Tracer, trace

ROOT = Path(__file__).resolve().parents[2]
FAST: dict[str, Any] = QUICK | {"steps": 40, "mean": SPEC.mean, "std": SPEC.std}


def in_threads(*actions: Callable[[], Any]) -> list[Any]:
    """Runs all actions at the same time; returns their results, or raises the error of one."""
    results: list[Any] = [None] * len(actions)
    start = threading.Barrier(len(actions))

    def run(at: int) -> None:
        try:
            start.wait()
            results[at] = actions[at]()
        except BaseException as error:  # noqa: BLE001  raised below
            results[at] = error

    threads = [threading.Thread(target=run, args=(i,)) for i in range(len(actions))]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    for result in results:
        if isinstance(result, BaseException):
            raise result
    return results


# --- threads ---------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_two_calls_in_two_threads_give_the_same_bits(dtype: torch.dtype) -> None:
    """The default dtype, the number of threads and the tracer are global to the process."""
    calls = [lambda c=c: zsu_fast.unlearn(tiny(), c, tail="fc1", **FAST) for c in (1, 3)]
    expected = [call() for call in calls]
    threads = torch.get_num_threads()
    torch.set_default_dtype(dtype)
    try:
        for _ in range(3):
            together = in_threads(*calls)
            assert all(same_bits(a, b) for a, b in zip(together, expected, strict=True))
            assert torch.get_default_dtype() == dtype
            assert torch.get_num_threads() == threads
    finally:
        torch.set_default_dtype(torch.float32)
    assert "module_call_wrapper" not in nn.Module.__call__.__qualname__


def test_a_model_is_served_in_another_thread() -> None:
    """Its forward passes neither fail nor appear in the trace of the working copy."""
    model, images = tiny(), tiny_data(8)[0]
    with torch.no_grad():
        expected = model(images)
    done = threading.Event()

    def serve() -> int:
        served = 0
        while not done.is_set():
            with torch.no_grad():
                assert bits(model(images)) == bits(expected)
            served += 1
        return served

    def unlearn() -> nn.Module:
        try:
            return zsu_fast.unlearn(model, 1, tail="fc1", **FAST)
        finally:
            done.set()

    with untouched(model):
        served, result = in_threads(serve, unlearn)
    assert served > 0
    assert same_bits(result, zsu_fast.unlearn(tiny(), 1, tail="fc1", **FAST))


class _Slow(nn.Module):
    """Waits in its forward pass, which keeps a trace open."""

    def __init__(self) -> None:
        super().__init__()
        self.inner, self.entered, self.go = nn.Linear(2, 2), threading.Event(), threading.Event()

    def forward(self, x: Any) -> Any:
        self.entered.set()
        assert self.go.wait(60)
        return self.inner(x)


def test_a_trace_leaves_other_threads_alone() -> None:
    slow, other = _Slow(), tiny()
    images = tiny_data(4)[0]

    def call() -> Any:
        assert slow.entered.wait(60)
        try:
            return other(images)
        finally:
            slow.go.set()

    traced, logits = in_threads(lambda: Tracer().trace(slow), call)
    assert bits(logits) == bits(other(images))
    assert [n.op for n in traced.nodes] == ["placeholder", "call_module", "output"]


def test_a_trace_is_the_model() -> None:
    images = tiny_data(4)[0]
    assert bits(trace(tiny())(images)) == bits(tiny()(images))


def test_a_fork_while_another_thread_runs() -> None:
    started, done = threading.Event(), threading.Event()

    def hold(_: Any) -> bool:
        started.set()
        done.wait(60)
        return True

    def run() -> None:
        with pytest.raises(zsu_fast.ArgumentError):
            zsu_fast.unlearn(tiny(), 1, callback=hold, **FAST)

    thread = threading.Thread(target=run)
    thread.start()
    assert started.wait(60)

    def child() -> None:
        signal.alarm(60)
        zsu_fast.mask(tiny(), 1)
        with zsu_fast.runtime.torch_settings.torch_defaults():
            pass

    try:
        assert in_child(child) == 0
    finally:
        done.set()
        thread.join()


# --- disks -----------------------------------------------------------------------------------

FinishedRun = tuple[zsu_fast.ZeroShotUnlearner, nn.Module]


@pytest.fixture(scope="module")
def finished_run() -> FinishedRun:
    run = zsu_fast.ZeroShotUnlearner(tiny(), 1, **FAST, tail="last")
    result = run.run()
    assert run.impressions is not None
    return run, result


@pytest.mark.parametrize("kind", ["weights", "pt", "delta", "impressions", "ledger"])
@pytest.mark.parametrize("call", ["write", "fsync", "replace"])
def test_a_full_disk_leaves_no_file(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, finished_run: FinishedRun, kind: str, call: str
) -> None:
    result, unlearned = finished_run
    path = tmp_path / f"x.{'pt' if kind == 'pt' else 'safetensors'}"
    write: dict[str, Callable[[], Any]] = {
        "weights": lambda: checkpoint.save_weights(path, unlearned),
        "pt": lambda: checkpoint.save_weights(path, unlearned),
        "delta": lambda: zsu_fast.save_delta(tiny(), unlearned, path),
        "impressions": lambda: result.impressions.save(path),  # type: ignore[union-attr]
        "ledger": lambda: zsu_fast.Ledger(path).append(result.record),
    }

    def full(*_: Any, **__: Any) -> Any:
        raise OSError(errno.ENOSPC, "No space left on device")

    if call == "write":
        real = open

        def short(file: Any, mode: str = "r", *a: Any, **k: Any) -> Any:
            handle = real(file, mode, *a, **k)
            return _Full(handle) if "x" in mode else handle

        monkeypatch.setattr("builtins.open", short)
    elif call == "fsync":
        monkeypatch.setattr(os, "fsync", full)
    else:
        monkeypatch.setattr(os, "replace", full)
        monkeypatch.setattr(os, "link", full)
    with pytest.raises(OutputError, match=r"can't be written"):
        write[kind]()
    monkeypatch.undo()
    assert {p.name for p in tmp_path.iterdir()} <= {f"{path.name}.lock"}
    write[kind]()
    assert path.is_file()


class _Full:
    """A file on a disk with 100 free bytes."""

    def __init__(self, handle: Any) -> None:
        self.handle, self.room = handle, 100

    def write(self, data: Any) -> int:
        self.handle.write(bytes(data)[: self.room])
        self.room -= len(data)
        if self.room < 0:
            raise OSError(errno.ENOSPC, "No space left on device")
        return len(data)

    def __getattr__(self, name: str) -> Any:
        return getattr(self.handle, name)

    def __enter__(self) -> _Full:
        return self

    def __exit__(self, *_: Any) -> None:
        self.handle.close()


def test_a_read_only_home(tmp_path: Path) -> None:
    """Nothing is written outside the folders that are passed."""
    home = tmp_path / "home"
    home.mkdir()
    out = tmp_path / "out.safetensors"
    home.chmod(0o555)
    tmp_path.chmod(0o777)

    def work() -> None:
        if os.getuid() == 0:
            os.setgroups([])
            os.setgid(65534)
            os.setuid(65534)
        os.environ.update(HOME=str(home), XDG_CACHE_HOME=str(home / "cache"))
        os.chdir(home)
        with pytest.warns(UserWarning, match=r"cache: .* can't be written"):
            result = zsu_fast.unlearn(tiny(), 1, cache=home / "cache", **FAST)
        checkpoint.save_weights(out, result)

    tiny()  # train it here, not in the child
    temporary = Path(tempfile.gettempdir())
    for folder in tmp_path.parents:
        if folder != temporary and folder.is_relative_to(temporary) and folder.owner() == "root":
            folder.chmod(0o755)
    assert in_child(work) == 0
    assert list(home.iterdir()) == []
    assert out.is_file()


def test_a_clock_that_jumps(monkeypatch: pytest.MonkeyPatch) -> None:
    expected = zsu_fast.unlearn(tiny(), 1, **FAST)
    draw = random.Random(0)
    monkeypatch.setattr(time, "time", lambda: draw.uniform(-1e9, 4e9))
    run = zsu_fast.ZeroShotUnlearner(tiny(), 1, **FAST | {"progress": True})
    assert same_bits(run.run(), expected)
    assert run.record.timings["total"] > 0


# --- kills -----------------------------------------------------------------------------------


def test_killed_at_random_moments(tmp_path: Path) -> None:
    """Three kills here; the script kills 50 times by default."""
    done = subprocess.run(
        [sys.executable, "-m", "benchmarks.stress.kill_and_resume", "--kills", "3", "--folder",
         str(tmp_path)],
        cwd=ROOT, capture_output=True, text=True, check=False, timeout=600,
    )  # fmt: skip
    assert done.returncode == 0, done.stdout + done.stderr
    assert "3 kills" in done.stdout


# --- many calls ------------------------------------------------------------------------------


def test_memory_stays_flat() -> None:
    """32 calls here, 200 in ``benchmarks/stress/memory_flat.py``."""
    model = tiny()
    options = FAST | {"tail": "last", "steps": 5, "max_steps": 5, "restarts": 0}
    process = psutil.Process()
    used = []
    for _ in range(32):
        zsu_fast.unlearn(model, 1, **options)
        used.append(process.memory_info().rss)
    assert max(used[20:]) <= 1.03 * used[20]
