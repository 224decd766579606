"""Several ranks make one call: same bits on all, one process's result but for rounding."""

from __future__ import annotations

import datetime
import json
import os
import pickle
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from support import QUICK, SPEC, TinyNet, deep_run, snapshot, tiny, tiny_data
from torch import nn

import zsu_fast
from zsu_fast import RankError, ZeroShotUnlearner
from zsu_fast.models import zoo
from zsu_fast.models.parameters import weights_hash
from zsu_fast.runtime.distributed import Ranks, join, make_shards

FAST: dict[str, Any] = QUICK | {"steps": 40, "mean": SPEC.mean, "std": SPEC.std, "tail": "fc1"}
ROOT = Path(__file__).resolve().parents[2]


def on_ranks(size: int, folder: Path, action: Callable[[int], Any], patience: float = 60) -> list:
    """Runs ``action(rank)`` in each of ``size`` forked processes that form a gloo group.

    Returns what each returned or raised, None for a rank that was killed. The group's timeout is
    ``patience`` seconds.
    """
    children = []
    for rank in range(size):
        pid = os.fork()
        if pid == 0:
            try:
                torch.set_num_threads(1)
                os.environ["LOCAL_WORLD_SIZE"] = str(size)
                dist.init_process_group(
                    "gloo", f"file://{folder}/store", rank=rank, world_size=size,
                    timeout=datetime.timedelta(seconds=patience),
                )  # fmt: skip
                result = action(rank)
            except BaseException as error:  # noqa: BLE001  the parent inspects it
                result = error
            (folder / f"rank{rank}").write_bytes(pickle.dumps(result))
            os._exit(0)
        children.append(pid)
    end = time.monotonic() + 120
    while children and time.monotonic() < end:
        children = [pid for pid in children if os.waitpid(pid, os.WNOHANG)[0] == 0]
        time.sleep(0.02)
    for pid in children:
        os.kill(pid, signal.SIGKILL)
        os.waitpid(pid, 0)
    assert not children, f"{len(children)} of {size} ranks hung"
    files = [folder / f"rank{rank}" for rank in range(size)]
    results = [pickle.loads(f.read_bytes()) if f.exists() else None for f in files]
    for file in folder.glob("rank*"):
        file.unlink()
    (folder / "store").unlink(missing_ok=True)
    return results


def call(model: nn.Module, forget: Any, **options: Any) -> tuple[dict[str, Any], nn.Module]:
    """Runs unlearning; returns its record (with the impressions' labels) and the new model."""
    run = ZeroShotUnlearner(model, forget, **FAST | options)
    result = run.run()
    return run.record.to_dict() | {"labels": run.impressions.labels.tolist()}, result


def describe(error: BaseException) -> str:
    assert isinstance(error, BaseException), error
    return f"{type(error).__name__}: {error}"


def assert_same_result(results: list[Any], single: tuple[dict[str, Any], nn.Module]) -> None:
    """Every rank has the bits of rank 0, within 1e-5 of the result of a single process."""
    want = single[1].state_dict()
    for result in results:
        assert not isinstance(result, BaseException), describe(result)
        record, model = result
        assert record["weights_after"] == weights_hash(results[0][1]) == weights_hash(model)
        assert record["labels"] == single[0]["labels"]
        assert sum(record["distributed"]["rows"]) == record["impressions"]["count"]
        for name, value in model.state_dict().items():
            torch.testing.assert_close(value, want[name], rtol=0, atol=1e-5)


# --- the same result ------------------------------------------------------------------------


def test_three_ranks_with_ten_classes(tmp_path: Path) -> None:
    options = {"tail": "fc2", "mean": None, "std": None, "impressions_per_class": 5}
    model = zoo.load("lenet5")
    results = on_ranks(3, tmp_path, lambda _: call(model, [1, 2, 3], **options))
    assert_same_result(results, call(model, [1, 2, 3], **options))
    assert results[0][0]["distributed"] == {
        "ranks": 3, "backend": "gloo", "rows": results[1][0]["distributed"]["rows"],
    }  # fmt: skip
    one = on_ranks(1, tmp_path, lambda _: call(model, [1, 2, 3], **options))
    assert weights_hash(one[0][1]) == weights_hash(results[0][1])


@pytest.mark.parametrize("per_class", [1, 6])
def test_four_ranks_with_two_classes(tmp_path: Path, per_class: int) -> None:
    """With one impression per class, only one rank has work."""
    model = TinyNet(2)
    images, labels = tiny_data(seed=0)
    optimiser = torch.optim.Adam(model.parameters(), 1e-2)
    for _ in range(60):
        optimiser.zero_grad()
        nn.functional.cross_entropy(model(images), (labels > 2).long()).backward()
        optimiser.step()
    model.zero_grad()
    model.eval()
    results = on_ranks(4, tmp_path, lambda _: call(model, 1, impressions_per_class=per_class))
    assert_same_result(results, call(model, 1, impressions_per_class=per_class))
    if per_class == 1:
        assert sorted(results[0][0]["distributed"]["rows"]) == [0, 0, 0, 2]


def test_deep_and_tail_input(tmp_path: Path) -> None:
    model = tiny()
    calls: list[dict[str, Any]] = [
        {"depth": "deep", "tail": "auto"},
        {"space": "tail-input", "tail": "fc1"},
    ]
    for options in calls:
        results = on_ranks(2, tmp_path, lambda _, o=options: call(model, 1, **o))
        assert_same_result(results, call(model, 1, **options))


def test_a_cache_shared_by_ranks(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    model, cache = tiny(), tmp_path / "cache"
    first = on_ranks(2, tmp_path, lambda _: call(model, 1, cache=cache))
    assert_same_result(first, call(model, 1))
    names = sorted(p.name for p in cache.rglob("*"))
    assert len(names) == 1 + len(make_shards(40, 1000, 1, torch.device("cpu")))
    assert not [name for name in names if name.endswith(".tmp")]

    def fail(*_: Any, **__: Any) -> None:
        raise AssertionError("a cached shard was synthesised again")

    monkeypatch.setattr("zsu_fast.synthesis.ascent.Ascent.run", fail)
    again = on_ranks(3, tmp_path, lambda _: call(model, 1, cache=cache))  # another number of ranks
    assert_same_result(again, first[0])


@pytest.mark.parametrize("device", ["cpu", "cuda"])
def test_shards(device: str) -> None:
    for rows in (1, 2, 7, 8, 9, 40, 320, 1000):
        for work in (1, 4_000_000, 400_000_000, 10**12):
            shards = make_shards(rows, 108, work, torch.device(device))
            assert torch.cat(shards).sort().values.equal(torch.arange(rows))
            sizes = [len(shard) for shard in shards]
            assert max(sizes) <= 108
            assert max(sizes) - min(sizes) <= 1
    # 8 shards for a small model, shards of 4 rows for a large one
    assert len(make_shards(320, 1000, 400_000, torch.device("cpu"))) == 8
    assert len(make_shards(64, 108, 400_000_000, torch.device("cpu"))) == 16


# --- failures are shared --------------------------------------------------------------------


def test_an_error_on_one_rank_ends_all(tmp_path: Path) -> None:
    """Soon, with that error's text, with nothing changed and nothing written."""
    ledger, failed = tmp_path / "ledger.jsonl", tmp_path / "failed"

    def action(rank: int, stage: str, error: type[BaseException]) -> Any:
        def fail(event: zsu_fast.Event) -> None:
            if rank == 1 and event.stage == stage:
                failed.touch()
                raise error("the roof is on fire")
            end = time.monotonic() + 30  # the first free rank takes a shard: leave one for rank 1
            while event.stage == stage and not failed.exists() and time.monotonic() < end:
                time.sleep(0.01)

        model = tiny()
        before = snapshot(model)
        options = {"early_stop": False, "steps": 400, "inplace": True, "ledger": ledger}
        try:
            return call(model, 1, callback=fail, **options)
        except BaseException as raised:  # noqa: BLE001
            assert snapshot(model) == before
            return raised

    for stage, error, words in (
        ("synthesise", ValueError, "ValueError: the roof is on fire"),
        ("fit", KeyboardInterrupt, "interrupted"),
    ):
        started = time.monotonic()
        failed.unlink(missing_ok=True)
        results = on_ranks(3, tmp_path, lambda r, s=stage, e=error: action(r, s, e))
        errors = [describe(e) for e in results]
        assert errors[1] == f"{error.__name__}: the roof is on fire"
        assert errors[0] == errors[2] == f"RankError: rank 1: {words}"
        assert time.monotonic() - started < 50  # no rank waited for the timeout
        assert not ledger.exists()


def test_rank_0_fails_at_the_very_end(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Rank 0 can't write the ledger: the other ranks restore their models too."""

    def full(*_: Any) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("zsu_fast.provenance.ledger.Ledger.append", full)

    def action(_: int) -> Any:
        model = tiny()
        before = snapshot(model)
        try:
            return call(model, 1, inplace=True, ledger=tmp_path / "ledger.jsonl")
        except OSError as raised:
            assert snapshot(model) == before
            return RuntimeError(describe(raised))
        except RankError as raised:
            assert snapshot(model) == before
            return raised

    zero, one = on_ranks(2, tmp_path, action)
    assert "No space left" in describe(zero)
    assert describe(one) == "RankError: rank 0: OSError: [Errno 28] No space left on device"


def test_a_rank_is_killed(tmp_path: Path) -> None:
    def action(rank: int) -> Any:
        def die(_: Any) -> None:
            if rank == 1:
                os._exit(9)

        return call(tiny(), 1, callback=die)

    zero, one, two = on_ranks(3, tmp_path, action)
    assert one is None
    assert describe(zero).startswith("RankError: rank 0: another rank was killed")
    assert describe(two).startswith("RankError: rank 2: another rank was killed")


def test_a_rank_that_does_not_make_the_call(tmp_path: Path) -> None:
    def action(rank: int) -> Any:
        if rank == 1:
            time.sleep(6)
            return None
        return call(tiny(), 1)

    zero, _ = on_ranks(2, tmp_path, action, patience=4)
    assert "did not make the call, or took longer than the group's timeout" in describe(zero)


def test_ranks_with_different_arguments(tmp_path: Path) -> None:
    results = on_ranks(2, tmp_path, lambda rank: call(tiny(), rank))
    assert describe(results[0]).startswith("RankError: rank 1: its forget is [1], rank 0 has [0]")
    results = on_ranks(2, tmp_path, lambda rank: call(tiny(), [1] if rank else [99]))
    assert "rank 0: forget: " in describe(results[1])
    assert describe(results[0]).startswith("ArgumentError: forget: ")


def test_different_bits_on_a_rank(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """They are detected before the result is returned."""

    def action(rank: int) -> Any:
        def drift(_: Ranks, tensors: list[torch.Tensor]) -> None:
            with torch.no_grad():
                tensors[0].add_(1e-7 * rank)

        monkeypatch.setattr(Ranks, "copy_from_main", drift)
        return call(tiny(), 1)

    assert all("rank 1: its result is " in describe(e) for e in on_ranks(2, tmp_path, action))


@pytest.mark.parametrize("stage", ["synthesise", "fit"])
def test_a_stop_on_one_rank_stops_all(tmp_path: Path, stage: str) -> None:
    def action(rank: int) -> Any:
        def stop(event: zsu_fast.Event) -> bool:
            time.sleep(0.02)
            return rank == 1 and event.stage == stage and event.done >= 20

        options = {"steps": 2000, "early_stop": False, "impressions_per_class": 16}
        record, model = call(tiny(), 1, callback=stop, **options)
        return record, model

    zero, one = on_ranks(2, tmp_path, action)
    assert not isinstance(zero, BaseException), describe(zero)
    assert zero[0]["weights_after"] == one[0]["weights_after"] == weights_hash(one[1])
    if stage == "fit":
        assert "another rank was asked to stop" in zero[0]["fit"]["stopped"]
        assert zero[0]["fit"] == one[0]["fit"]
    else:
        assert zero[0]["impressions"]["count"] < 80
        assert zero[0]["labels"] == one[0]["labels"] == sorted(zero[0]["labels"])


def test_distributed_false(tmp_path: Path) -> None:
    """One rank of a group makes a call by itself."""
    single = call(tiny(), 1)

    def action(rank: int) -> Any:
        assert join(False).single
        return call(tiny(), 1, distributed=False) if rank else None

    _, one = on_ranks(2, tmp_path, action)
    assert weights_hash(one[1]) == weights_hash(single[1])
    assert one[0]["distributed"] == {}
    with pytest.raises(zsu_fast.ArgumentError, match="no process group is initialised"):
        call(tiny(), 1, distributed=True)
    with pytest.raises(zsu_fast.ArgumentError, match="distributed: got 3"):
        call(tiny(), 1, distributed=3)


# --- the command ----------------------------------------------------------------------------


def torchrun(ranks: int, *arguments: str, **environment: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node",
         str(ranks), "-m", "zsu_fast", "unlearn", *arguments],
        capture_output=True, text=True, check=False, timeout=240,
        env=os.environ | {"OMP_NUM_THREADS": "1"} | environment,
    )  # fmt: skip


def test_deep_forgetting_gives_every_rank_the_weights_of_one(tmp_path: Path) -> None:
    def action(_: int) -> Any:
        run, result = deep_run()
        return run.record.to_dict(), weights_hash(result)

    alone = action(0)
    for record, weights in on_ranks(2, tmp_path, action):
        assert record["depth"]["level"] == "deep"
        assert record["distributed"]["ranks"] == 2
        assert record["depth"]["unmask_leak"] == alone[0]["depth"]["unmask_leak"]
        assert weights == record["weights_after"] == alone[1]


def test_the_command_under_torchrun(tmp_path: Path) -> None:
    out, record = tmp_path / "out.safetensors", tmp_path / "record.json"
    done = torchrun(
        2, "lenet5", "--forget", "1-4", "--out", str(out), "--record", str(record),
        "--impressions-per-class", "4", "--tail", "last", "--device", "cpu",
    )  # fmt: skip
    assert done.returncode == 0, done.stdout + done.stderr
    assert done.stdout.count("Forgot 4 of 10 classes") == 1
    assert done.stderr.count("warning:") == 1
    facts = json.loads(record.read_text())
    assert facts["distributed"]["ranks"] == 2
    assert {p.name for p in tmp_path.iterdir()} == {out.name, record.name}
    model = zoo.build("lenet5")
    zsu_fast.models.checkpoint.load_into(model, out)
    assert weights_hash(model) == facts["weights_after"]
    single = zsu_fast.unlearn(
        zoo.load("lenet5"), [1, 2, 3, 4], impressions_per_class=4, tail="last"
    )
    for name, value in model.state_dict().items():
        torch.testing.assert_close(value, single.state_dict()[name], rtol=0, atol=1e-5)


def test_a_failure_under_torchrun(tmp_path: Path) -> None:
    """One rank can't load the model: rank 0 prints that once, and no file is written."""
    (tmp_path / "factory.py").write_text(
        "import os\n"
        "from zsu_fast.models import zoo\n"
        "def make():\n"
        "    if os.environ['RANK'] == '1':\n"
        "        raise ValueError('the shelf is empty')\n"
        "    return zoo.load('lenet5')\n"
    )
    path = os.pathsep.join([str(tmp_path), str(ROOT), os.environ.get("PYTHONPATH", "")])
    done = torchrun(2, "factory:make", "--forget", "1", "--out", str(tmp_path / "out.pt"),
                    "--device", "cpu", PYTHONPATH=path)  # fmt: skip
    assert done.returncode != 0
    assert done.stderr.count("error: rank 1: ") == 1
    assert "the shelf is empty" in done.stderr
    assert not list(tmp_path.glob("*out.pt*"))
