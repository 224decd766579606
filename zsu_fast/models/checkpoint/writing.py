"""Writes files: whole or not at all, nothing unasked is replaced, equal content is equal bytes."""

from __future__ import annotations

import json
import os
import secrets
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save as to_safetensors
from torch import Tensor, nn

from ...errors import OutputError
from ..parameters import saved_tensors

SAFETENSORS = (".safetensors",)
TORCH = (".pt", ".pth", ".bin", ".ckpt", ".pth.tar", ".pt.tar")


def save_weights(
    path: str | Path, model: nn.Module, metadata: Mapping[str, str] | None = None,
    force: bool = False,
) -> None:  # fmt: skip
    """Writes ``model.state_dict()``, in the format that the ending of ``path`` means.

    ``.safetensors``: safetensors, with ``metadata``. ``.pt``, ``.pth``, ``.bin``, ``.ckpt``,
    ``.pth.tar`` and ``.pt.tar``: ``torch.save`` of a dict of CPU tensors; tied ones stay tied.

    Raises:
        OutputError: another ending, or the path exists (without ``force``) or can't be written.
    """
    check_ending(path)
    tensors = saved_tensors(model)
    if str(path).lower().endswith(SAFETENSORS):
        save_tensors(path, tensors, metadata, force)
    else:
        alone = _on_their_own(tensors)
        write_atomically(path, lambda file: torch.save(alone, file), force)


def _on_their_own(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """CPU copies without the storage around views, which ``torch.save`` would write too."""
    copies: dict[tuple[object, ...], Tensor] = {}
    result = {}
    for name, tensor in tensors.items():
        where = (tensor.device, tensor.data_ptr(), tensor.dtype, tensor.shape, tensor.stride())
        key = where if tensor.numel() else (name,)
        if key not in copies:
            copies[key] = tensor.detach().to("cpu", copy=True).contiguous()
        result[name] = copies[key]
    return result


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
    start = 8 + int.from_bytes(content[:8], "little")
    header = json.loads(content[8:start])
    if "__metadata__" in header:  # in random order until here
        header["__metadata__"] = dict(sorted(header["__metadata__"].items()))
    text = json.dumps(header, separators=(",", ":"), ensure_ascii=False).encode()
    text += b" " * (-len(text) % 8)

    def write(file: Any) -> None:
        file.write(len(text).to_bytes(8, "little") + text)
        file.write(memoryview(content)[start:])

    write_atomically(path, write, force)


def check_ending(path: str | Path) -> None:
    """Raises unless the ending of ``path`` says in which format `save_weights` is to write.

    Raises:
        OutputError: it has another ending, or none.
    """
    known = SAFETENSORS + TORCH
    if not str(path).lower().endswith(known):
        raise OutputError(
            f"out: {path} has an ending that stands for no format of weights. Name a file that "
            f"ends in {', '.join(known)}."
        )


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
