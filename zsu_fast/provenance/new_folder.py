"""Writes a folder as a whole: it appears complete, or not at all."""

from __future__ import annotations

import errno
import os
import secrets
import shutil
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

from ..errors import OutputError, shorten

# What folders of models consist of; with ``force``, nothing else is ever replaced.
_REPLACEABLE = (
    "config.json", "generation_config.json", "preprocessor_config.json", "model.safetensors",
    "model.safetensors.index.json", "pytorch_model.bin", "README.md", "record.json",
)  # fmt: skip


def check_folder(folder: str | Path, force: bool = False) -> Path:
    """Returns the path, links resolved; raises before the work if it could not be written.

    Raises:
        OutputError: it is a file, holds anything (without ``force``) or anything that is not part
            of a model's folder, or its parent is missing or not writable.
    """
    if "\0" in str(folder):
        raise OutputError(f"folder: {str(folder)!r} is not a valid name. Name another folder.")
    path = Path(folder).resolve()
    if path.exists() and not path.is_dir():
        raise OutputError(f"folder: {path} is a file. Name a folder.")
    found = sorted(entry.name for entry in path.iterdir()) if path.exists() else []
    if found and not force:
        raise OutputError(
            f"folder: {path} is not empty. Name another folder, or pass --force (force=True)."
        )
    other = [n for n in found if not (n.startswith(".") or n in _REPLACEABLE or _is_shard(n))]
    if other:
        raise OutputError(
            f"folder: {path} holds {shorten(other, 3)}, which is not part of a model's folder and "
            f"is not replaced. Name another folder."
        )
    if not path.parent.is_dir() or not os.access(path.parent, os.W_OK):
        raise OutputError(
            f"folder: {path} can't be written. Name one in a folder that exists and is writable."
        )
    return path


def _is_shard(name: str) -> bool:
    return name.startswith("model-") and name.endswith(".safetensors")


@contextmanager
def new_folder(
    folder: str | Path, fill: Callable[[Path], None], force: bool = False
) -> Iterator[Path]:
    """Fills a draft next to ``folder``, renames it to that, and yields the path.

    If anything fails, in the block too, no draft is left and a folder that was there before is as
    it was. Entries whose name starts with a dot, such as ``.git``, are kept.

    Args:
        folder: the folder to write.
        fill: called with the draft, an empty folder.
        force: replace the files of a model that are there.

    Raises:
        OutputError: as `check_folder`, or the disk is full.
    """
    path = check_folder(folder, force)
    unique = secrets.token_hex(6)
    draft, old = (path.with_name(f".{path.name}.{unique}.{end}") for end in ("tmp", "old"))
    try:
        try:
            draft.mkdir()
            fill(draft)
        except OSError as error:
            if isinstance(error, OutputError):
                raise
            raise OutputError(
                f"folder: {path} can't be written ({error}). Name one that is writable and has "
                f"room."
            ) from error
        _swap(draft, path, old)
        try:
            yield path
        except BaseException:
            _swap_back(path, old)
            raise
    finally:
        shutil.rmtree(draft, ignore_errors=True)
        shutil.rmtree(old, ignore_errors=True)


def _swap(draft: Path, path: Path, old: Path) -> None:
    """``path`` becomes ``old``, and ``draft`` becomes ``path``."""
    try:
        if path.exists():
            os.rename(path, old)
        try:
            os.rename(draft, path)
        except OSError:
            if old.exists():
                os.rename(old, path)
            raise
        _move_hidden(old, path)
    except OSError as error:
        busy = " (it is a mount point)" if error.errno == errno.EBUSY else ""
        raise OutputError(
            f"folder: {path} can't be replaced: {error}{busy}. Name another folder."
        ) from error


def _swap_back(path: Path, old: Path) -> None:
    if old.exists():
        _move_hidden(path, old)
    shutil.rmtree(path)
    if old.exists():
        os.rename(old, path)


def _move_hidden(source: Path, target: Path) -> None:
    for entry in source.glob(".*") if source.exists() else ():
        os.rename(entry, target / entry.name)
