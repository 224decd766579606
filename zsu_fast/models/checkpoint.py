"""Reads and writes weights: executes nothing, overwrites nothing, leaves no partial files."""

from __future__ import annotations

import os
import secrets
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save as to_safetensors
from torch import Tensor, nn

from ..errors import CheckpointError, OutputError, shorten
from .parameters import saved_tensors, unwrap

_COMPILED = "_orig_mod."  # in names, by torch.compile
_FORMATS = "a safetensors file, or a checkpoint that torch.load(weights_only=True) accepts"


def load_weights(path: str | Path) -> dict[str, Tensor]:
    """Reads a state dict from a safetensors file or a torch checkpoint.

    Checkpoints are read with ``torch.load(weights_only=True)``: a pickle that would run code is
    refused, never executed. The weights may be under "state_dict", "model_state_dict" or "model".
    The prefixes of DataParallel ("module.") and torch.compile ("_orig_mod.") are removed.

    Raises:
        CheckpointError: missing, damaged, an unsafe pickle, or not a dict of tensors.
    """
    path = Path(path)
    if not path.is_file():
        raise CheckpointError(f"weights: {path} is not a file. Pass {_FORMATS}.")
    if path.suffix == ".safetensors":
        return _without_wrappers(load_tensors(path)[0])
    try:
        content = torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:
        reason = str(error).strip().splitlines()[0] if str(error).strip() else "unreadable"
        raise CheckpointError(
            f"weights: {path} was refused ({type(error).__name__}: {reason[:200]}): it is damaged, "
            f"or a pickle that could run code. Pass {_FORMATS}."
        ) from error
    for key in ("state_dict", "model_state_dict", "model"):
        if isinstance(content, dict) and isinstance(content.get(key), dict):
            content = content[key]
    if not isinstance(content, dict):
        raise CheckpointError(
            f"weights: {path} holds a {type(content).__name__}, not a dict of tensors. "
            f"Save model.state_dict()."
        )
    tensors = {str(k): v for k, v in content.items() if isinstance(v, Tensor)}
    others = [k for k, v in content.items() if not isinstance(v, Tensor)]
    if others or not tensors:
        found = f"entries that are not tensors ({shorten(others, 3)})" if others else "no tensors"
        raise CheckpointError(f"weights: {path} holds {found}. Save model.state_dict().")
    return _without_wrappers(tensors)


def _without_wrappers(tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    """Removes the prefixes of DataParallel and torch.compile from names, however nested."""
    tensors = {name.replace(_COMPILED, ""): t for name, t in tensors.items()}
    while tensors and all(name.startswith("module.") for name in tensors):
        tensors = {name.removeprefix("module."): t for name, t in tensors.items()}
    return tensors


def load_into(model: nn.Module, path: str | Path) -> None:
    """Loads a weights file into ``model``; all names and shapes must match.

    Raises:
        CheckpointError: as `load_weights`, or the weights don't fit; the model is unchanged.
    """
    tensors = load_weights(path)
    model = unwrap(model)
    state = model.state_dict()
    names = {name.replace(_COMPILED, ""): name for name in state}
    own = {short: state[name] for short, name in names.items()}
    missing, unknown = sorted(own.keys() - tensors.keys()), sorted(tensors.keys() - own.keys())
    misfit = [
        f"{n} is {tuple(tensors[n].shape)}, the model needs {tuple(own[n].shape)}"
        for n in sorted(own.keys() & tensors.keys())
        if own[n].shape != tensors[n].shape
    ]
    if missing or unknown or misfit:
        reasons = [f"missing {missing[:3]}"] if missing else []
        reasons += [f"unknown {unknown[:3]}"] if unknown else []
        reasons += misfit[:3]
        raise CheckpointError(
            f"weights: {path} does not fit {type(model).__name__}: {'; '.join(reasons)}. "
            f"Pass a checkpoint of this architecture with this number of classes."
        )
    model.load_state_dict({names[short]: t for short, t in tensors.items()}, strict=True)


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
            f"weights: {path} is not an intact safetensors file ({error}). Copy or save it again."
        ) from error


def save_weights(
    path: str | Path, model: nn.Module, metadata: Mapping[str, str] | None = None,
    force: bool = False,
) -> None:  # fmt: skip
    """Writes ``model.state_dict()``: by ``torch.save`` for .pt, .pth and .bin, else safetensors.

    Raises:
        OutputError: the path exists (without ``force``) or can't be written.
    """
    tensors = saved_tensors(model)
    if Path(path).suffix in (".pt", ".pth", ".bin"):
        write_atomically(path, lambda file: torch.save(tensors, file), force)
    else:
        save_tensors(path, tensors, metadata, force)


def save_tensors(
    path: str | Path, tensors: Mapping[str, Tensor], metadata: Mapping[str, str] | None = None,
    force: bool = False,
) -> None:  # fmt: skip
    """Writes a safetensors file atomically; tied tensors are stored once per name.

    Raises:
        OutputError: the path exists (without ``force``) or can't be written.
    """
    plain = {n: t.detach().cpu().contiguous().clone() for n, t in tensors.items()}
    content = to_safetensors(plain, dict(metadata) if metadata else None)
    write_atomically(path, lambda file: file.write(content), force)


def check_writable(path: str | Path, force: bool = False) -> None:
    """Raises before the work starts if its result could not be written to ``path``.

    Raises:
        OutputError: it exists (without ``force``), is a folder, or its folder is not writable.
    """
    path = Path(path)
    if path.is_dir():
        raise OutputError(f"out: {path} is a folder. Name a file in it.")
    if path.exists() and not force:
        raise OutputError(f"out: {path} exists. Name another file, or pass --force (force=True).")
    write_atomically(path, lambda _: None, force=True, keep=False)


def write_atomically(
    path: str | Path, write: Callable[[Any], object], force: bool = False, keep: bool = True
) -> None:
    """Writes a draft next to ``path``, flushes it to disk, then renames it.

    If anything fails, no draft is left and an existing file is unchanged.

    Args:
        path: the file to write.
        write: called with the draft, an open binary file.
        force: replace an existing file; without it, a file that appears meanwhile is an error too.
        keep: False only tests whether the folder is writable.

    Raises:
        OutputError: the file exists, or the folder is missing, read-only or full.
    """
    path = Path(path)
    if "\0" in str(path):
        raise OutputError(f"out: {str(path)!r} is not a valid name of a file. Name another file.")
    draft = path.with_name(f".{path.name}.{secrets.token_hex(6)}.tmp")
    try:
        try:
            with open(draft, "xb") as file:
                write(file)
                file.flush()
                os.fsync(file.fileno())
            if keep:
                (os.replace if force else _rename_to_new)(draft, path)
        finally:
            draft.unlink(missing_ok=True)
    except FileExistsError as error:
        raise OutputError(
            f"out: {path} exists. Name another file, or pass --force (force=True)."
        ) from error
    except (OSError, RuntimeError) as error:  # torch.save reports a full disk as RuntimeError
        raise OutputError(
            f"out: {path} can't be written ({error}). Name a folder that exists, is writable, and "
            f"has room."
        ) from error


def _rename_to_new(draft: Path, path: Path) -> None:
    try:
        os.link(draft, path)  # unlike a rename, fails if the path exists
    except FileExistsError:
        raise
    except OSError:  # the file system has no hard links
        if path.exists():
            raise FileExistsError(path) from None
        os.replace(draft, path)
