"""Reads files of weights by their content, whatever their ending; executes nothing."""

from __future__ import annotations

import argparse
import datetime
import functools
import json
import pathlib
import re
import threading
import types
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from ...errors import CheckpointError, shorten

FORMATS = "a safetensors file, or a checkpoint that torch.load(weights_only=True) accepts"
# What a folder of weights may hold, the first one that is there counts (transformers, timm).
_IN_FOLDERS = ("model.safetensors", "model.safetensors.index.json", "pytorch_model.bin",
               "pytorch_model.bin.index.json")  # fmt: skip
ENDINGS = (".safetensors", ".pt", ".pth", ".bin", ".ckpt", ".pth.tar", ".pt.tar")
# First bytes of files that are often taken for weights, and what to do about them.
_OTHERS = {
    b"version https://git-lfs": "a Git LFS pointer, not the file itself. Run git lfs pull",
    b"<": "a web page or XML, not weights. Download the file again",
    b"\x89HDF": "HDF5, as Keras writes it. Convert it to PyTorch first",
    b"\x1f\x8b": "compressed by gzip. Unpack it first",
    b"\xfd7zXZ": "compressed by xz. Unpack it first",
    b"BZh": "compressed by bzip2. Unpack it first",
    b"\x28\xb5\x2f\xfd": "compressed by zstd. Unpack it first",
    b"GGUF": "a GGUF file. Convert it to safetensors first",
    b"\x93NUMPY": "a NumPy array. Save a state dict of tensors instead",
}
_LOCK = threading.Lock()  # torch's list of safe globals belongs to the whole process


def read(path: Path) -> tuple[Any, Path]:
    """Returns what a weights file holds, and the file that was read.

    Args:
        path: a safetensors or torch file, the index of a sharded one (``*.index.json``), or a
            folder that holds one of these.

    Raises:
        CheckpointError: missing, damaged, of another format, or a pickle that could run code.
    """
    path = _in_folder(path)
    if not path.is_file():
        raise CheckpointError(f"weights: {path} is not a file. Pass {FORMATS}.")
    if path.suffix == ".json":
        return _read_shards(path), path
    with open(path, "rb") as file:
        head = file.read(32)
    if not head:
        raise CheckpointError(f"weights: {path} is empty. Copy or save it again.")
    if head[8:9] == b"{":
        return load_tensors(path)[0], path
    _check_kind(path, head)
    if path.suffix == ".safetensors" and not head.startswith((b"PK", b"\x80")):
        return load_tensors(path)[0], path
    return _load_pickle(path), path


def load_tensors(path: str | Path) -> tuple[dict[str, Tensor], dict[str, str]]:
    """Reads the tensors and the metadata of a safetensors file.

    Raises:
        CheckpointError: missing or damaged.
    """
    try:
        with safe_open(str(path), framework="pt") as file:
            tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
            return tensors, dict(file.metadata() or {})
    except (SafetensorError, OSError, ValueError, RuntimeError) as error:
        raise CheckpointError(
            f"weights: {path} is not an intact safetensors file ({printable(str(error))}). "
            f"Copy or save it again."
        ) from error


def _in_folder(path: Path) -> Path:
    """The weights file in a folder; a path that is no folder is returned as it is."""
    if not path.is_dir():
        return path
    for name in _IN_FOLDERS:
        if (path / name).is_file():
            return path / name
    found = sorted(p for p in path.iterdir() if p.is_file() and p.name.endswith(ENDINGS))
    if len(found) == 1:
        return found[0]
    if (path / ".metadata").is_file():
        raise CheckpointError(
            f"weights: {path} is a folder of torch.distributed.checkpoint. Convert it with "
            f"torch.distributed.checkpoint.format_utils.dcp_to_torch_save."
        )
    holds = f"{len(found)} weights files ({shorten((p.name for p in found), 4)})"
    raise CheckpointError(
        f"weights: {path} is not a file but a folder with {holds if found else 'no weights file'}. "
        f"Pass {FORMATS}."
    )


def _read_shards(index: Path) -> dict[str, Tensor]:
    """Reads the files of a sharded checkpoint, which lie beside its index."""
    try:
        where = json.loads(index.read_text())["weight_map"]
        if not all(isinstance(file, str) and file == Path(file).name for file in where.values()):
            raise ValueError("a shard lies outside of the folder")
        files = sorted(set(where.values()))
    except (OSError, ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
        raise CheckpointError(
            f"weights: {index} is not the index of a sharded checkpoint ({type(error).__name__}: "
            f"{printable(str(error))}). Pass {FORMATS}."
        ) from error
    tensors: dict[str, Tensor] = {}
    for file in files:
        content, _ = read(index.parent / file)
        names = {name for name, shard in where.items() if shard == file}
        if not isinstance(content, dict) or names != content.keys():
            raise CheckpointError(
                f"weights: {index.parent / file} does not hold the tensors that {index.name} "
                f"states. Copy all shards and their index again."
            )
        tensors |= content
    return tensors


def _check_kind(path: Path, head: bytes) -> None:
    """Raises if the file is clearly something else than one of ``torch.save``.

    Args:
        path: the file.
        head: its first bytes.
    """
    kinds = [kind for start, kind in _OTHERS.items() if head.startswith(start)]
    if head.startswith(b"PK"):
        kinds = _archive_kinds(path)
    if kinds:
        raise CheckpointError(f"weights: {path} was refused: it is {kinds[0]}, or pass {FORMATS}.")


def _archive_kinds(path: Path) -> list[str]:
    try:
        with zipfile.ZipFile(path) as archive:
            names = archive.namelist()
    except (zipfile.BadZipFile, OSError, ValueError, NotImplementedError):
        return []  # torch's own reader decides
    last = {name.rpartition("/")[2] for name in names}
    if "constants.pkl" in last:
        return ["a TorchScript archive. Save torch.jit.load(FILE).state_dict() by torch.save"]
    if "archive_format" in last:
        return ["a program written by torch.export. Save the module's state_dict()"]
    if any(name.endswith(".npy") for name in names):
        return ["a NumPy archive. Convert its arrays to a state dict of tensors"]
    return [] if "data.pkl" in last else ["a zip archive without a checkpoint. Unpack it"]


def _load_pickle(path: Path) -> Any:
    try:
        # an open file: of a path, torch would take the ending for the format
        with open(path, "rb") as file, _LOCK, torch.serialization.safe_globals(_not_yet_allowed()):
            return torch.load(file, map_location="cpu", weights_only=True)
    except Exception as error:
        names = _refused_globals(path, str(error))
        if names:
            raise CheckpointError(
                f"weights: {path} was refused: it holds {shorten(names, 4)}, a pickle that could "
                f"run code. Pass {FORMATS}. If you trust the file, write its state dict alone to "
                f"another one with torch.save, or allow these names before with "
                f"torch.serialization.add_safe_globals."
            ) from error
        text = printable(str(error)).rpartition("WeightsUnpickler error:")[2]
        reason = (text.strip().splitlines() or ["unreadable"])[0]
        if "Unsupported operand" in reason:
            raise CheckpointError(
                f"weights: {path} was refused: it is pickled with a protocol that torch does not "
                f"read safely. Save it again by torch.save with its default, or pass {FORMATS}."
            ) from error
        raise CheckpointError(
            f"weights: {path} was refused ({type(error).__name__}: {reason[:200]}): it is damaged, "
            f"or a pickle that could run code. Pass {FORMATS}."
        ) from error


def _refused_globals(path: Path, message: str) -> list[str]:
    """The names in a pickle that are not allowed, from the file or from torch's message."""
    names = re.findall(r"GLOBAL (\S+) (?:was|whose)", printable(message))
    if names:
        try:
            with _LOCK, torch.serialization.safe_globals(_not_yet_allowed()):
                found = torch.serialization.get_unsafe_globals_in_checkpoint(str(path))
        except Exception:  # noqa: BLE001  of an old or damaged file, the message has one name
            found = []
        names = sorted(map(printable, found)) or names
    return names


def printable(text: str) -> str:
    """``text`` without terminal codes and other characters that are not printable."""
    text = re.sub(r"\x1b\[[0-9;]*[A-Za-z]", "", text)
    return "".join(c if c.isprintable() or c == "\n" else "?" for c in text)


def _not_yet_allowed() -> list[Callable[..., Any] | tuple[Callable[..., Any], str]]:
    """What to allow for one read; without the user's own, which would be removed at its end."""
    known = torch.serialization.get_safe_globals()
    return [item for item in _without_code() if item not in known]


def _plain_dict(*_: Any) -> dict[Any, Any]:
    """Stands for ``collections.defaultdict``, whose items torch refuses to set."""
    return {}


@functools.lru_cache(maxsize=1)
def _without_code() -> tuple[Callable[..., Any] | tuple[Callable[..., Any], str], ...]:
    """Classes that training scripts store beside the weights, and that can't run code.

    Of numpy: scalars and arrays of numbers, as torch's documentation allows them; not of objects.
    """
    scalar, rebuild = np.float64(0).__reduce__()[0], np.zeros(1).__reduce__()[0]
    numbers = {type(np.dtype(code)) for code in np.typecodes["AllInteger"] + "efdgFD?"}
    dates = (datetime.date, datetime.time, datetime.datetime, datetime.timedelta, datetime.timezone)
    plain: list[Any] = [argparse.Namespace, types.SimpleNamespace,
                        np.dtype, np.ndarray, *numbers, *dates]  # fmt: skip
    plain += [(kind, f"builtins.{kind.__name__}")
              for kind in (int, float, bool, str, bytes, list, dict, tuple, frozenset, slice,
                           range)]  # fmt: skip
    plain.append((_plain_dict, "collections.defaultdict"))
    for module in ("numpy.core.multiarray", "numpy._core.multiarray"):  # numpy 1 and 2
        plain += [(scalar, f"{module}.scalar"), (rebuild, f"{module}._reconstruct")]
    for module in ("pathlib", "pathlib._local"):  # the latter: Python 3.13
        for name in ("PosixPath", "PurePosixPath"):
            plain.append((pathlib.PurePosixPath, f"{module}.{name}"))
        for name in ("WindowsPath", "PureWindowsPath"):
            plain.append((pathlib.PureWindowsPath, f"{module}.{name}"))
    return tuple(plain)
