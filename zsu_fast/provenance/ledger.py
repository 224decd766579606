"""The ledger: an append-only file of the requests to forget that were carried out on a model.

Each line is a JSON object. Every entry holds the SHA-256 of itself and of the entry before it, and
the hashes of the weights before and after the request, so that `verify` finds entries that were
edited, removed or moved. The order of the lines counts; times are for information only.

A chain of hashes does not show that its last entries were cut off, or that the whole file was
written again. To detect that, keep the last hash (`Ledger.head`) or the last model elsewhere, and
pass it to `verify`.
"""

from __future__ import annotations

import errno
import hashlib
import json
import os
import re
import stat
import time
import uuid
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from torch import nn

from ..errors import ArgumentError, LedgerError, OutputError
from ..models import checkpoint
from ..models.embedding_classifier import EmbeddingClassifier, deliverable
from ..models.parameters import weights_hash
from .record import Record
from .templates import matching

FORMAT = "zsu_fast.ledger/2"
_START = "0" * 64  # hash before the first entry
_TYPES = {
    "format": str, "number": int, "request": str, "time": str, "model": str, "logits": int,
    "forget": list, "forgotten": list, "new_base": bool, "hash_before": str, "hash_after": str,
    "settings": dict, "metrics": dict, "versions": dict, "previous": str, "hash": str,
}  # fmt: skip
Entry = dict[str, Any]


@dataclass(frozen=True)
class Ledger:
    """A model's ledger, and options for the next entry.

    Args:
        path: the file; the first entry creates it. Next to it is a lock file, ``path`` + ".lock".
        request: id of the next request; None generates a UUID.
        other_base: accept a model that is not the result of the last entry, such as one that was
            trained again. The entry is marked ``new_base``; classes forgotten before it no longer
            count.
        names: whether the entry holds the names of forgotten identities of an encoder. Entries hold
            salted hashes of their templates in any case, and never a template. Names of classes
            are always kept.
    """

    path: str | Path
    request: str | None = None
    other_base: bool = False
    names: bool = False

    def __post_init__(self) -> None:
        if not isinstance(self.path, str | Path) or not str(self.path) or "\0" in str(self.path):
            raise ArgumentError("ledger", f"got {self.path!r}", "Pass a Ledger, or a path.")
        if self.request is not None and not (isinstance(self.request, str) and self.request):
            raise ArgumentError("request", f"got {self.request!r}", "Pass a text, or None.")

    def entries(self) -> list[Entry]:
        """Returns all entries; [] if there is no file yet.

        Raises:
            LedgerError: `verify` finds a problem.
        """
        if not Path(self.path).exists():
            return []
        entries, problems = _read(self.path)
        if problems:
            raise LedgerError(
                f"ledger: {self.path} is not valid: {problems[0]}. Restore a valid copy, or start "
                f"a new ledger; nothing is appended to this one."
            )
        return entries

    @property
    def head(self) -> str:
        """Hash of the last entry, 64 hex digits, to keep elsewhere; zeros without entries."""
        return _last_hash(self.entries())

    def forgotten(self) -> list[int]:
        """Classes that the result of the last entry has forgotten, sorted, by their index in it.

        A compact model (``compact=True``) has no forgotten classes: the others are numbered anew.
        """
        return sorted(self._forgotten()[0])

    def forgotten_identities(self, classifier: EmbeddingClassifier) -> list[int]:
        """The identities of a gallery that earlier requests on its encoder forgot, sorted.

        They are found by their templates, since a gallery may be numbered anew. Those that are no
        longer enrolled can't be found.
        """
        found: set[int] = set()
        for entry in [] if self.other_base else self.entries():
            found = set() if entry["new_base"] else found
            found |= {*matching(entry["metrics"], classifier)}
        return sorted(found)

    def check_forgotten(self, forgotten: Sequence[int]) -> None:
        """Raises if ``forgotten`` may be indices from before the model was made compact.

        Raises:
            ArgumentError: an entry made the model compact, and none since forgot these classes.
        """
        known, compact = self._forgotten()
        if compact and (unknown := sorted(set(forgotten) - known)):
            raise ArgumentError(
                "forgotten",
                f"got {unknown}, but by {self.path} the model is compact: it has no logits of "
                f"classes forgotten before, and the others are numbered anew",
                f"Leave it out: by the ledger, it is {sorted(known)}.",
            )

    def _forgotten(self) -> tuple[set[int], bool]:
        """Classes that the last result still has and has forgotten; whether it was made compact."""
        classes: set[int] = set()
        compact = False
        for entry in [] if self.other_base else self.entries():
            if entry["new_base"]:
                classes, compact = set(), False
            classes |= {*entry["forget"], *entry["forgotten"]}
            if entry["settings"].get("compact"):
                classes, compact = set(), True
        return classes, compact

    def check(self, before: str) -> None:
        """Raises before the work if `append` would refuse its result.

        Args:
            before: `weights_hash` of the model to unlearn.

        Raises:
            LedgerError: the file is damaged, or the last entry has other weights after it.
            ArgumentError: the request is in the ledger already.
            OutputError: the file can't be written.
        """
        self._check(self.entries(), before)
        checkpoint.check_writable(self.path, force=True)

    def append(self, record: Record) -> Entry:
        """Writes a finished run as the next entry, and flushes it to disk.

        Other processes and threads wait. The file is replaced as a whole, so that readers never see
        half a line, even after a crash.

        Raises:
            LedgerError, ArgumentError, OutputError: as `check`.
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
                        os.chmod(file.name, mode)
                    file.write(old + _line(entry))

                checkpoint.write_atomically(path, write, force=True)
                _sync_folder(path.parent)
        except OutputError:
            raise
        except OSError as error:
            raise OutputError(
                f"ledger: {self.path} can't be written ({error}). Name a folder that exists, is "
                f"writable, and has room."
            ) from error
        return entry

    def _check(self, entries: list[Entry], before: str) -> None:
        if self.request is not None and any(e["request"] == self.request for e in entries):
            raise ArgumentError(
                "request",
                f"got {self.request!r}, which is in {self.path} already",
                "Use each id once, or pass none.",
            )
        if entries and not self.other_base and entries[-1]["hash_after"] != before:
            raise LedgerError(
                f"ledger: the last entry of {self.path} ended with weights "
                f"{entries[-1]['hash_after'][:12]}..., this model has {before[:12]}.... Pass the "
                f"result of that entry (it has forgotten {self.forgotten()}). For another base, "
                f"pass Ledger(path, other_base=True) or --other-base, and name all classes to "
                f"forget."
            )


def as_ledger(value: Any) -> Ledger | None:
    """Turns a path into a `Ledger`; returns None and a `Ledger` unchanged.

    Raises:
        ArgumentError: anything else.
    """
    if value is None or isinstance(value, Ledger):
        return value
    return Ledger(value)


def verify(path: str | Path, head: str | None = None, model: nn.Module | None = None) -> list[str]:
    """Checks a ledger; returns its problems in words, [] if it is valid.

    Args:
        path: the file.
        head: expected hash of the last entry, kept elsewhere; finds entries that were cut off.
        model: the model in use, which must be the result of the last entry.
    """
    entries, problems = _read(path)
    if problems:
        return problems
    if head is not None and entries[-1]["hash"] != head:
        problems.append(f"the last entry has hash {entries[-1]['hash']}, expected was {head}")
    if (
        model is not None
        and (after := weights_hash(deliverable(model))) != entries[-1]["hash_after"]
    ):
        problems.append(
            f"the model has weights {after}, the last entry ended with {entries[-1]['hash_after']}"
        )
    return problems


def _entry(record: Record, ledger: Ledger, entries: list[Entry]) -> Entry:
    facts = record.to_dict()
    anonymous = bool(facts["identities"]) and not ledger.names
    labels = {} if anonymous else facts["labels"]
    best = facts["fit"]["best"] or {}
    metrics = {
        "leak": best.get("forgotten_leak", best.get("leak")),
        **{name: best.get(name) for name in ("agreement", "divergence")},
        "hit_rate": facts["impressions"]["hit_rate"],
        "stopped": facts["fit"]["stopped"],
        "trained": facts["split"]["trained"],
        "seconds": facts["timings"]["total"],
        "warnings": _unnamed(facts["warnings"], facts["labels"] if anonymous else {}),
        # in here, since the entry's own fields are fixed by its format
        **({"labels": labels} if labels else {}),
        **({"identities": facts["identities"]} if facts["identities"] else {}),
        **({"weights_file": facts["weights_file"]} if facts["weights_file"] else {}),
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
        "new_base": bool(entries) and entries[-1]["hash_after"] != record.weights_before,
        "hash_before": record.weights_before,
        "hash_after": record.weights_after,
        "settings": facts["settings"],
        "metrics": metrics,
        "versions": facts["versions"],
        "previous": _last_hash(entries),
    }
    return entry | {"hash": _hash(entry)}


def _unnamed(texts: list[str], labels: dict[str, str]) -> list[str]:
    """The texts with numbers in place of these names."""
    for number, name in labels.items():
        pattern = rf"(?<!\w)['\"]?{re.escape(name)}['\"]?(?!\w)"
        texts = [re.sub(pattern, f"identity {number}", text) for text in texts]
    return texts


def _last_hash(entries: list[Entry]) -> str:
    return str(entries[-1]["hash"]) if entries else _START


def _text(value: Entry) -> str:
    """The canonical JSON of an entry, which is hashed."""
    return json.dumps(value, separators=(",", ":"), ensure_ascii=True, allow_nan=False)


def _line(entry: Entry) -> bytes:
    return _text(entry).encode() + b"\n"


def _hash(entry: Entry) -> str:
    body = {k: v for k, v in entry.items() if k != "hash"}
    return hashlib.sha256(_text(body).encode()).hexdigest()


def _read(path: str | Path) -> tuple[list[Entry], list[str]]:
    """Returns the entries before the first problem, and the problem."""
    try:
        content = Path(path).read_bytes()
    except (OSError, ValueError) as error:
        return [], [f"it can't be read ({error})"]
    if not content:
        return [], ["it is empty"]
    *lines, rest = content.split(b"\n")
    if rest:
        return [], [f"line {len(lines) + 1}, the last one, is cut off"]
    entries: list[Entry] = []
    requests: set[str] = set()
    for number, line in enumerate(lines):
        problem, entry = _parse(line)
        if problem := problem or _link_problem(entry, entries, requests):
            return entries, [f"line {number + 1}: {problem}"]
        entries.append(entry)
        requests.add(entry["request"])
    return entries, []


def _link_problem(entry: Entry, entries: list[Entry], requests: set[str]) -> str:
    """Says how an entry does not follow from ``entries``; "" if it does."""
    if entry["number"] != len(entries):
        return f"it is entry {entry['number']}: an entry was removed, added or moved"
    if entry["previous"] != _last_hash(entries):
        return "it does not follow the entry before it: one was changed, removed or moved"
    if entry["request"] in requests:
        return f"request {entry['request']!r} occurs twice"
    if entries and not entry["new_base"] and entry["hash_before"] != entries[-1]["hash_after"]:
        after = entries[-1]["hash_after"]
        return f"it starts from other weights than {after[:12]}... without being marked new_base"
    return ""


def _parse(line: bytes) -> tuple[str, Entry]:
    """Parses one line; returns its problem ("" if it is valid) and its entry."""
    try:
        entry = json.loads(line)
        if not isinstance(entry, dict) or entry.get("format") != FORMAT:
            return _format_problem(entry), {}
        if list(entry) != list(_TYPES):
            return "its fields are not those of an entry", {}
        if any(type(entry[k]) is not kind for k, kind in _TYPES.items()):
            return "a field has the wrong type", {}
        if any(type(c) is not int for c in [*entry["forget"], *entry["forgotten"]]):
            return "a class is not an int", {}
        if _hash(entry) != entry["hash"] or _line(entry) != line + b"\n":
            return "it was edited: its hash does not match", {}
    except (ValueError, RecursionError) as error:
        return f"it is not JSON ({type(error).__name__})", {}
    return "", entry


def _format_problem(entry: Any) -> str:
    found = entry.get("format") if isinstance(entry, dict) else None
    if isinstance(found, str) and found.startswith(FORMAT.rpartition("/")[0] + "/"):
        return f"it has format {found}, this version of zsu_fast reads {FORMAT}"
    return f"it is not an entry of format {FORMAT}"


@contextmanager
def _locked(path: Path) -> Iterator[Path]:
    """Holds the ledger's lock; yields the file itself if ``path`` is a link to it."""
    path = path.resolve()
    if not path.parent.is_dir():  # some versions of filelock would create it
        raise FileNotFoundError(errno.ENOENT, os.strerror(errno.ENOENT), str(path.parent))
    # The lock is a file of its own, since the ledger is replaced by each entry.
    from filelock import FileLock  # used here alone: importing zsu_fast need not load it

    with FileLock(path.with_name(f"{path.name}.lock")):
        yield path


def _sync_folder(folder: Path) -> None:
    """Makes the renaming of a file durable, where folders can be flushed (not on Windows)."""
    if os.name == "nt":
        return
    handle = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)
