"""The ledger: which requests to forget were carried out on a model, as an append-only file.

One JSON object a line. Every entry holds the SHA-256 of itself and of the entry before it, and the
hash of the weights before and after the request, so that an entry that was edited, removed or moved
is found by `verify`. The order is the order of the lines: the time is only noted, and may jump.

What a chain of plain hashes can't show: that its last entries were cut off, or that someone wrote
the whole file anew. Against that, keep the last hash (`Ledger.head`) somewhere else, or the last
model itself, and pass it to `verify`.
"""

from __future__ import annotations

import hashlib
import json
import os
import stat
import time
import uuid
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from torch import nn

from ..errors import ArgumentError, LedgerError, OutputError
from ..models import checkpoint
from ..models.parameters import weights_hash
from .record import Record

FORMAT = "zsu_fast.ledger/1"
_START = "0" * 64  # what the first entry is chained to
_KINDS: dict[str, type | tuple[type, ...]] = {
    "format": str,
    "number": int,
    "request": str,
    "time": str,
    "model": str,
    "logits": int,
    "forget": list,
    "forgotten": list,
    "other_base": bool,
    "hash_before": str,
    "hash_after": str,
    "settings": dict,
    "metrics": dict,
    "versions": dict,
    "previous": str,
    "hash": str,
}
Entry = dict[str, Any]


@dataclass(frozen=True)
class Ledger:
    """The ledger of one model, and how the next request is to be written into it.

    Args:
        path: the file; made with the first entry. A lock file ``path`` + ".lock" lies beside it.
        request: the id of the request; None makes a UUID.
        other_base: states that the model is not the result of the last entry: the original was
            trained anew, say. Only the classes named from then on count as forgotten.
    """

    path: str | Path
    request: str | None = None
    other_base: bool = False

    def __post_init__(self) -> None:
        if not isinstance(self.path, str | Path) or not str(self.path) or "\0" in str(self.path):
            raise ArgumentError("ledger", f"got {self.path!r}", "Pass a Ledger, or a path.")
        if self.request is not None and not (isinstance(self.request, str) and self.request):
            raise ArgumentError("request", f"got {self.request!r}", "Pass a text, or None.")

    def entries(self) -> list[Entry]:
        """All entries; [] where there is no file yet.

        Raises:
            LedgerError: `verify` finds a problem.
        """
        if not Path(self.path).exists():
            return []
        entries, problems = _read(self.path)
        if problems:
            raise LedgerError(
                f"ledger: {self.path} is not what was written: {problems[0]}"
                f"{f' (and {len(problems) - 1} more)' if problems[1:] else ''}. Restore it from a "
                f"copy; nothing is appended to a broken chain."
            )
        return entries

    @property
    def head(self) -> str:
        """The hash of the last entry, 64 hex digits, to be kept elsewhere; zeros for none."""
        entries = self.entries()
        return str(entries[-1]["hash"]) if entries else _START

    def forgotten(self) -> list[int]:
        """The classes that the result of the last entry has forgotten, sorted."""
        if self.other_base:
            return []
        classes: set[int] = set()
        for entry in self.entries():
            if entry["other_base"]:
                classes.clear()
            classes |= {*entry["forget"], *entry["forgotten"]}
        return sorted(classes)

    def check(self, before: str) -> None:
        """Fails early, before the work, where `append` would refuse.

        Args:
            before: `weights_hash` of the model that is to be unlearned.

        Raises:
            LedgerError: the file is broken, or the last entry did not end with these weights.
            ArgumentError: the request is in the ledger already.
            OutputError: the file can't be written.
        """
        self._check(self.entries(), before)
        checkpoint.check_writable(self.path, force=True)

    def append(self, record: Record) -> Entry:
        """Writes a finished run as the next entry: all of it, on disk, or nothing.

        Processes and threads wait for each other. A new file with one line more takes the place
        of the old one, so that no reader ever sees half a line, whatever dies when.

        Raises:
            as `check`.
        """
        try:
            with _locked(Path(self.path)) as path:
                entries = self.entries()
                self._check(entries, record.weights_before)
                entry = _entry(record, self, entries)
                old = path.read_bytes() if entries else b""
                mode = stat.S_IMODE(path.stat().st_mode) if entries else None

                def write(file: Any) -> None:
                    if mode is not None:
                        os.fchmod(file.fileno(), mode)
                    file.write(old + _line(entry))

                checkpoint.write_atomically(path, write, force=True)
                _sync_folder(path.parent)
        except OutputError:
            raise
        except OSError as error:
            raise OutputError(
                f"ledger: {self.path} can't be written ({error}). Name a file in a folder that is "
                f"writable and has room."
            ) from error
        return entry

    def _check(self, entries: list[Entry], before: str) -> None:
        if self.request is not None and any(e["request"] == self.request for e in entries):
            raise ArgumentError(
                "request",
                f"got {self.request!r}, which is in {self.path} already",
                "Give each request an id of its own, or none.",
            )
        if entries and not self.other_base and entries[-1]["hash_after"] != before:
            raise LedgerError(
                f"ledger: the last entry of {self.path} ended with weights "
                f"{entries[-1]['hash_after'][:12]}..., this model has {before[:12]}.... Unlearn "
                f"the result of that request (it has forgotten {self.forgotten()}); for another "
                f"base pass Ledger(path, other_base=True) or --other-base, and name all classes "
                f"that it has to forget."
            )


def as_ledger(value: Any) -> Ledger | None:
    """A path as a `Ledger`; None and a `Ledger` as they are.

    Raises:
        ArgumentError: anything else.
    """
    if value is None or isinstance(value, Ledger):
        return value
    return Ledger(value)


def verify(path: str | Path, head: str | None = None, model: nn.Module | None = None) -> list[str]:
    """What is wrong with a ledger, in words; [] for nothing.

    Args:
        path: of the ledger.
        head: the hash that its last entry has to have, kept elsewhere: finds entries cut off.
        model: the model in use, which has to be the result of the last entry.
    """
    entries, problems = _read(path)
    if problems:
        return problems
    if head is not None and entries[-1]["hash"] != head:
        problems.append(f"the last entry's hash is {entries[-1]['hash']}, not the {head} expected")
    if model is not None and (after := weights_hash(model)) != entries[-1]["hash_after"]:
        problems.append(
            f"the model has weights {after}, the last entry ended with {entries[-1]['hash_after']}"
        )
    return problems


def _entry(record: Record, ledger: Ledger, entries: list[Entry]) -> Entry:
    facts = record.to_dict()
    best = facts["fit"]["best"] or {}
    metrics = {
        "leak": best.get("leak"),
        "agreement": best.get("agreement"),
        "divergence": best.get("divergence"),
        "hit_rate": facts["impressions"]["hit_rate"],
        "stopped": facts["fit"]["stopped"],
        "trained": facts["split"]["trained"],
        "seconds": facts["timings"]["total"],
        "warnings": facts["warnings"],
    }
    entry: Entry = {
        "format": FORMAT,
        "number": len(entries),
        "request": ledger.request or str(uuid.uuid4()),
        "time": time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime()),
        "model": record.model,
        "logits": record.classes,
        "forget": facts["forget"],
        "forgotten": facts["forgotten"],
        "other_base": bool(entries) and entries[-1]["hash_after"] != record.weights_before,
        "hash_before": record.weights_before,
        "hash_after": record.weights_after,
        "settings": facts["settings"],
        "metrics": metrics,
        "versions": facts["versions"],
        "previous": entries[-1]["hash"] if entries else _START,
    }
    return entry | {"hash": _hash(entry)}


def _text(value: Entry) -> str:
    """The one way in which an entry is written."""
    return json.dumps(value, separators=(",", ":"), ensure_ascii=True, allow_nan=False)


def _line(entry: Entry) -> bytes:
    return _text(entry).encode() + b"\n"


def _hash(entry: Entry) -> str:
    body = {k: v for k, v in entry.items() if k != "hash"}
    return hashlib.sha256(_text(body).encode()).hexdigest()


def _read(path: str | Path) -> tuple[list[Entry], list[str]]:
    """The entries up to the first one that is wrong, and what is wrong."""
    try:
        content = Path(path).read_bytes()
    except (OSError, ValueError) as error:
        return [], [f"it can't be read ({error})"]
    if not content:
        return [], ["it is empty"]
    entries: list[Entry] = []
    seen: set[str] = set()
    lines = content.split(b"\n")
    if lines.pop():
        return [], [f"line {len(lines) + 1}, the last one, is cut off"]
    for at, line in enumerate(lines):
        problem, entry = _parse(line)
        if not problem and entry["number"] != at:
            problem = f"it is entry {entry['number']}: an entry was removed, added or moved"
        if not problem and entry["previous"] != (entries[-1]["hash"] if entries else _START):
            problem = "it does not follow the entry before it: one was changed, removed or moved"
        if not problem and entry["request"] in seen:
            problem = f"its request {entry['request']!r} is there twice"
        if not problem and entries and not entry["other_base"]:
            after = entries[-1]["hash_after"]
            if entry["hash_before"] != after:
                problem = f"it starts from other weights than {after[:12]}... and does not say so"
        if problem:
            return entries, [f"line {at + 1}: {problem}"]
        entries.append(entry)
        seen.add(entry["request"])
    return entries, []


def _parse(line: bytes) -> tuple[str, Entry]:
    """What is wrong with a line alone ("" for nothing), and its entry."""
    try:
        entry = json.loads(line)
        if not isinstance(entry, dict) or entry.get("format") != FORMAT:
            return f"it is no entry of format {FORMAT}", {}
        if list(entry) != list(_KINDS):
            return "its fields are not those of an entry", {}
        if any(type(entry[k]) is not kind for k, kind in _KINDS.items()):
            return "a field has the wrong type", {}
        classes = [*entry["forget"], *entry["forgotten"]]
        if any(type(c) is not int for c in classes):
            return "a class is no whole number", {}
        if _hash(entry) != entry["hash"] or _line(entry) != line + b"\n":
            return "it was edited: its hash does not match", {}
    except (ValueError, RecursionError) as error:
        return f"it is no JSON ({type(error).__name__})", {}
    return "", entry


@contextmanager
def _locked(path: Path) -> Iterator[Path]:
    """Holds the ledger's lock; gives the file that a link stands for."""
    try:
        import fcntl
    except ImportError as error:  # Windows
        raise OutputError("ledger: this system has no fcntl locks. Use Linux or macOS.") from error
    path = path.resolve()
    # A file of its own, since the ledger is replaced; it stays, or two could lock two of them.
    with open(path.with_name(f"{path.name}.lock"), "ab") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        yield path


def _sync_folder(folder: Path) -> None:
    """Makes sure that the new name survives a power cut."""
    handle = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)
