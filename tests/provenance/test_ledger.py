"""The ledger: a chain of requests in which edits, moves and removals are detected."""

from __future__ import annotations

import copy
import json
import multiprocessing
import os
import random
import threading
import time
import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from filelock import FileLock
from support import QUICK, assert_forgets, deep_run, same_bits, tiny, untouched

import zsu_fast
from zsu_fast import ArgumentError, Ledger, LedgerError, OutputError
from zsu_fast.models.checkpoint import load_into
from zsu_fast.models.parameters import weights_hash
from zsu_fast.provenance import ledger
from zsu_fast.provenance.ledger import verify
from zsu_fast.provenance.record import Record

FAST: dict[str, Any] = QUICK | {"tail": "last", "steps": 20, "max_steps": 20, "restarts": 0}


def record(before: str, after: str, forget: list[int] | None = None) -> Record:
    """The record of a finished run, without the run."""
    facts = Record("Net", forget or [0], 5, {"seed": 0}, {}, {"torch": "2"}, "now", before)
    facts.weights_after = after
    facts.impressions, facts.split = {"hit_rate": 1.0}, {"trained": ["fc"]}
    facts.fit = {"best": {"leak": 0.0, "agreement": 1.0, "divergence": 0.1}, "stopped": "done"}
    facts.timings = {"total": 1.0}
    return facts


def write(path: Path, count: int) -> list[bytes]:
    """Writes a valid ledger of ``count`` entries; returns its lines."""
    for i in range(count):
        Ledger(path, f"request {i}").append(record(str(i), str(i + 1), [i]))
    return path.read_bytes().splitlines(keepends=True)


@pytest.fixture
def path(tmp_path: Path) -> Iterator[Path]:
    yield tmp_path / "ledger.jsonl"
    left = {p.name for p in tmp_path.iterdir()}
    assert left <= {"ledger.jsonl", "ledger.jsonl.lock"}, "a draft was left behind"


# --- with unlearn ----------------------------------------------------------------------------


def test_successive_requests(path: Path) -> None:
    base = tiny()
    first = zsu_fast.unlearn(base, [1], ledger=path, **FAST)
    again = zsu_fast.unlearn(first, [3], ledger=Ledger(path, request="R-2"), **FAST)
    one, two = (json.loads(line) for line in path.read_text().splitlines())
    assert verify(path, head=two["hash"], model=again) == []
    assert [one["forget"], one["forgotten"]] == [[1], []]
    assert [two["forget"], two["forgotten"]] == [[3], [1]]
    assert one["hash_before"] == weights_hash(base)
    assert one["hash_after"] == two["hash_before"] == weights_hash(first)
    assert two["hash_after"] == weights_hash(again)
    assert (two["number"], two["request"], two["previous"]) == (1, "R-2", one["hash"])
    assert one["settings"]["steps"] == 20
    assert 0 <= one["metrics"]["leak"] <= 1
    assert len(one["request"]) == 36
    assert Ledger(path).forgotten() == [1, 3]
    assert Ledger(path).head == two["hash"]
    assert len(verify(path, model=first)) == 1


def test_the_ledger_says_which_weights_were_read(
    path: Path, tmp_path_factory: pytest.TempPathFactory
) -> None:
    weights = tmp_path_factory.mktemp("weights") / "last.pt"
    torch.save({"state_dict": tiny().state_dict(), "state_dict_ema": tiny().state_dict()}, weights)
    model = tiny()
    load_into(model, f"{weights}::state_dict_ema")
    zsu_fast.unlearn(model, [1], ledger=path, **FAST)
    (entry,) = (json.loads(line) for line in path.read_text().splitlines())
    assert entry["metrics"]["weights_file"]["file"] == str(weights)
    assert entry["metrics"]["weights_file"]["entry"] == "state_dict_ema"
    assert verify(path, head=entry["hash"]) == []


def test_deep_requests_follow_each_other(path: Path) -> None:
    run, first = deep_run(tiny(), [1], ledger=path)
    again, second = deep_run(first, [3], ledger=path)
    assert [r.record.depth["level"] for r in (run, again)] == ["deep", "deep"]
    assert again.record.forgotten == [1]
    assert_forgets(second, [1, 3])
    assert verify(path, model=second) == []
    assert Ledger(path).forgotten() == [1, 3]
    entries = [json.loads(line) for line in path.read_text().splitlines()]
    assert [e["hash_after"] for e in entries] == [weights_hash(m) for m in (first, second)]


def test_another_base_needs_other_base(path: Path) -> None:
    base = tiny()
    zsu_fast.unlearn(base, [1], ledger=path, **FAST)
    before = path.read_bytes()
    with untouched(base), pytest.raises(LedgerError, match="other_base=True"):
        zsu_fast.unlearn(base, [2], ledger=path, **FAST)
    assert path.read_bytes() == before
    zsu_fast.unlearn(base, [1, 2], ledger=Ledger(path, other_base=True), **FAST)
    assert verify(path) == []
    last = json.loads(path.read_text().splitlines()[-1])
    assert (last["new_base"], last["forget"], last["forgotten"]) == (True, [1, 2], [])
    assert Ledger(path).forgotten() == [1, 2]


def test_a_class_is_forgotten_once(path: Path) -> None:
    first = zsu_fast.unlearn(tiny(), [1], ledger=path, **FAST)
    with pytest.raises(ArgumentError, match="forgotten before"):
        zsu_fast.unlearn(first, [1], ledger=path, **FAST)
    assert len(Ledger(path).entries()) == 1


@pytest.mark.parametrize("inplace", [True, False])
def test_no_result_without_its_entry(
    path: Path, inplace: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = tiny()

    def fail(*_: Any, **__: Any) -> None:
        raise OutputError("ledger: no space left")

    monkeypatch.setattr(ledger.checkpoint, "write_atomically", fail)
    monkeypatch.setattr(ledger.checkpoint, "check_writable", lambda *_, **__: None)
    with untouched(model), pytest.raises(OutputError, match="no space"):
        zsu_fast.unlearn(model, [1], ledger=path, inplace=inplace, **FAST)
    assert not path.exists()


def test_a_failed_run_is_not_recorded(path: Path) -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("error")  # the warning of the guessed normalisation, at the end
        with pytest.raises(zsu_fast.UnlearningWarning):
            zsu_fast.unlearn(tiny(), [1], ledger=path, **FAST)
    assert not path.exists()


@pytest.mark.parametrize("value", [3, "", b"x", ["a"]])
def test_bad_arguments(value: Any) -> None:
    with pytest.raises(ArgumentError, match="ledger"):
        zsu_fast.unlearn(tiny(), [1], ledger=value, **FAST)


def test_bad_request_ids(path: Path) -> None:
    for value in ("", 7):
        with pytest.raises(ArgumentError, match="request"):
            Ledger(path, request=value)  # type: ignore[arg-type]
    Ledger(path, "a").append(record("0", "1"))
    with pytest.raises(ArgumentError, match="already"):
        Ledger(path, "a").append(record("1", "2"))


# --- what verify finds -----------------------------------------------------------------------


def test_an_unchanged_ledger_is_valid(path: Path) -> None:
    write(path, 5)
    assert verify(path) == []
    assert [e["number"] for e in Ledger(path).entries()] == list(range(5))


def damages(lines: list[bytes]) -> dict[str, list[bytes]]:
    changed = [json.loads(line) for line in lines]
    changed[2]["forget"] = [4]
    edited = [json.dumps(e, separators=(",", ":")).encode() + b"\n" for e in changed]
    rehashed = copy.deepcopy(changed)
    rehashed[2]["hash"] = ledger._hash(rehashed[2])
    return {
        "edited": edited,
        "edited and hashed again": [ledger._line(e) for e in rehashed],
        "first removed": lines[1:],
        "middle removed": [*lines[:2], *lines[3:]],
        "moved": [lines[0], lines[2], lines[1], *lines[3:]],
        "twice": [*lines[:3], lines[2], *lines[3:]],
        "cut off": [*lines[:-1], lines[-1][:-1]],
        "cut in half": [*lines[:-1], lines[-1][:100]],
        "blank line": [*lines[:2], b"\n", *lines[2:]],
        "white space": [lines[0].replace(b":", b": ", 1), *lines[1:]],
        "extra line": [*lines, b"hello\n"],
        "empty": [],
        "no object": [b"[]\n"],
        "deep": [b"[" * 100_000 + b"\n"],
        "huge number": [lines[0].replace(b'"seed":0', b'"seed":1e999'), *lines[1:]],
        "long number": [lines[0].replace(b'"seed":0', b'"seed":' + b"9" * 5000), *lines[1:]],
        "not utf-8": [b"\xff\xfe\n"],
        "field removed": [lines[0].replace(b'"new_base":false,', b""), *lines[1:]],
        "field of another type": [lines[0].replace(b'"logits":5', b'"logits":"5"'), *lines[1:]],
    }


KINDS = list(damages([ledger._line({"forget": []}) for _ in range(5)]))


@pytest.mark.parametrize("kind", KINDS)
def test_damage_is_found_and_nothing_is_appended(path: Path, kind: str) -> None:
    content = b"".join(damages(write(path, 5))[kind])
    path.write_bytes(content)
    assert verify(path), kind
    with pytest.raises(LedgerError, match="is not valid"):
        Ledger(path).append(record("5", "6"))
    with pytest.raises(LedgerError):
        Ledger(path).entries()
    assert path.read_bytes() == content


@pytest.mark.parametrize("version", [1, 3])
def test_another_format_version_is_refused(path: Path, version: int) -> None:
    found = f"zsu_fast.ledger/{version}"
    content = b"".join(write(path, 2)).replace(ledger.FORMAT.encode(), found.encode())
    path.write_bytes(content)
    want = f"line 1: it has format {found}, this version of zsu_fast reads {ledger.FORMAT}"
    assert verify(path) == [want]
    with pytest.raises(LedgerError, match=f"{want}.*start a new ledger"):
        Ledger(path).append(record("2", "3"))
    assert path.read_bytes() == content


def test_entries_cut_off_at_the_end_need_the_head(path: Path) -> None:
    lines = write(path, 4)
    head = Ledger(path).head
    path.write_bytes(b"".join(lines[:3]))
    assert verify(path) == []  # a chain of hashes can't show it
    assert "expected" in verify(path, head=head)[0]


def test_another_base_without_the_mark_is_found(path: Path) -> None:
    lines = write(path, 1)
    entry = json.loads(lines[0]) | {"number": 1, "request": "x", "hash_before": "other"}
    entry["previous"] = entry["hash"]
    entry["hash"] = ledger._hash(entry)
    path.write_bytes(lines[0] + ledger._line(entry))
    assert "other weights" in verify(path)[0]


def test_mutated_ledgers_are_found(path: Path) -> None:
    """300 here; ``benchmarks/stress/fuzz.py`` runs 20,000 on all kinds of files."""
    whole, draw = b"".join(write(path, 4)), random.Random(0)
    head = Ledger(path).head
    for _ in range(300):
        mutant = bytearray(whole)
        at = draw.randrange(len(mutant))
        kind = draw.randrange(3)
        if kind == 0:
            mutant[at] = draw.randrange(256)
        elif kind == 1:
            del mutant[at : at + draw.randint(1, 2000)]
        else:
            mutant[at:at] = bytes(draw.randrange(256) for _ in range(draw.randint(1, 9)))
        path.write_bytes(mutant)
        assert bool(verify(path, head=head)) == (mutant != whole)


def test_missing_and_unreadable_files(tmp_path: Path) -> None:
    assert "can't be read" in verify(tmp_path / "none")[0]
    assert "can't be read" in verify(tmp_path)[0]
    assert Ledger(tmp_path / "none").entries() == []
    with pytest.raises(LedgerError):
        Ledger(tmp_path).entries()
    for bad in (tmp_path / "no" / "such", tmp_path):
        with pytest.raises((OutputError, LedgerError)):
            Ledger(bad).append(record("0", "1"))


# --- writing ---------------------------------------------------------------------------------


def _append_many(path: Path, name: str, count: int) -> None:
    for i in range(count):
        Ledger(path, f"{name}-{i}", other_base=True).append(record(name, name))


def test_processes_and_threads_take_turns(path: Path) -> None:
    context = multiprocessing.get_context("fork")
    workers: list[Any] = [
        context.Process(target=_append_many, args=(path, f"p{i}", 8)) for i in range(3)
    ]
    workers += [threading.Thread(target=_append_many, args=(path, f"t{i}", 8)) for i in range(3)]
    for worker in workers:
        worker.start()
    for worker in workers:
        worker.join()
    assert verify(path) == []
    assert len(Ledger(path).entries()) == 48


def test_a_second_request_on_the_same_base_is_refused(path: Path) -> None:
    Ledger(path).check("a")
    Ledger(path).append(record("a", "b"))
    with pytest.raises(LedgerError, match="ended with"):
        Ledger(path).append(record("a", "c"))
    assert len(Ledger(path).entries()) == 1


def test_a_clock_that_jumps(path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    gmtime = time.gmtime
    for i, now in enumerate((2_000_000_000, 1_000_000_000, 0, 1_500_000_000)):
        moment = gmtime(now)
        monkeypatch.setattr(time, "gmtime", lambda m=moment: m)
        Ledger(path).append(record(str(i), str(i + 1), [i]))
    assert verify(path) == []
    times = [e["time"] for e in Ledger(path).entries()]
    assert times != sorted(times)
    assert times[1] == "2001-09-09T01:46:40Z"


def test_mode_and_link_are_preserved(path: Path, tmp_path: Path) -> None:
    write(path, 1)
    path.chmod(0o640)
    (tmp_path / "sub").mkdir()
    link = tmp_path / "sub" / "link"
    link.symlink_to(path)
    Ledger(link).append(record("1", "2"))
    assert link.is_symlink()
    assert path.stat().st_mode & 0o777 == 0o640
    assert len(Ledger(path).entries()) == 2
    link.unlink()
    os.rmdir(tmp_path / "sub")


def test_waits_for_the_lock(path: Path) -> None:
    """Whoever holds the lock file next to the ledger itself blocks appending, also by a link."""
    write(path, 1)
    link = path.with_name("link")
    link.symlink_to(path)
    writer = threading.Thread(target=lambda: Ledger(link).append(record("1", "2")))
    with FileLock(path.with_name("ledger.jsonl.lock")):
        writer.start()
        time.sleep(0.3)
        assert len(Ledger(path).entries()) == 1
    writer.join()
    assert len(Ledger(path).entries()) == 2
    link.unlink()


def test_a_full_disk_leaves_the_old_ledger(path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write(path, 2)
    before = path.read_bytes()

    def full(_: int) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(OutputError, match="No space"):
        Ledger(path).append(record("2", "3"))
    monkeypatch.undo()
    assert path.read_bytes() == before
    Ledger(path).append(record("2", "3"))
    assert verify(path) == []


def test_the_ledger_does_not_change_the_result(path: Path) -> None:
    logged = zsu_fast.unlearn(tiny(), [1], ledger=path, **FAST)
    assert same_bits(logged, zsu_fast.unlearn(tiny(), [1], **FAST))
