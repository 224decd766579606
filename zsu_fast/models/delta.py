"""Deltas: files that hold only the tensors that unlearning changed.

A delta is a safetensors file of the tensors whose bits changed. Its metadata holds the format and
two `weights_hash` values: of the model that it applies to ("base") and of the result ("result").
Both are checked, so a delta for other weights, cut off, or altered is refused.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path

import torch
from torch import Tensor, nn

from ..errors import CheckpointError, ModelError, OutputError, shorten
from . import checkpoint
from .parameters import as_bytes, deep_copy, saved_tensors, weights_hash

FORMAT = "zsu_fast.delta/1"


def save_delta(
    base: nn.Module, unlearned: nn.Module, path: str | Path, force: bool = False
) -> None:
    """Writes the tensors by which ``unlearned`` differs from ``base``, atomically.

    Tied tensors are stored once. The header takes at most 512 bytes, plus 160 bytes and the name
    per tensor.

    Args:
        base: the model before; only its ``state_dict()`` is compared.
        unlearned: the model after, of the same architecture.
        path: the safetensors file to write.
        force: replace an existing file.

    Raises:
        ModelError: the models differ in names, shapes or dtypes.
        OutputError: the path ends as a torch file does, exists (without ``force``), or can't be
            written.
    """
    check_ending(path)
    old, new = saved_tensors(base), saved_tensors(unlearned)
    common = sorted(old.keys() & new.keys())
    misfit = sorted(old.keys() ^ new.keys()) + [n for n in common if not _alike(old[n], new[n])]
    if misfit:
        raise ModelError(
            f"base and result differ in more than values: {shorten(misfit, 3)}",
            "Pass the model that was unlearned, and the result.",
        )
    changed: dict[str, Tensor] = {}
    tied: dict[str, str] = {}  # further names of a stored tensor
    stored: dict[tuple[int, int, torch.Size, tuple[int, ...]], str] = {}
    for name in sorted(new):
        if torch.equal(as_bytes(old[name]), as_bytes(new[name])):  # -0 is not 0, NaN is NaN
            continue
        memory = (new[name].data_ptr(), new[name].numel(), new[name].shape, new[name].stride())
        first = stored.setdefault(memory, name)
        if first == name:
            changed[name] = new[name]
        else:
            tied[name] = first
    metadata = {"format": FORMAT, "base": weights_hash(base), "result": weights_hash(unlearned)}
    if tied:
        metadata["tied"] = json.dumps(tied)
    checkpoint.save_tensors(path, changed, metadata, force)


def apply_delta(base: nn.Module, path: str | Path) -> nn.Module:
    """Returns a copy of ``base`` with the delta applied: the unlearned model, bit for bit.

    Raises:
        CheckpointError: not a delta, of another format version, damaged, or for other weights.
        ModelError: ``base`` can't be copied.
    """
    changed, metadata = checkpoint.load_tensors(path)
    _check_format(path, metadata.get("format", ""))
    if weights_hash(base) != metadata.get("base"):
        raise CheckpointError(
            f"delta: {path} fits weights {str(metadata.get('base'))[:12]}..., this model has "
            f"{weights_hash(base)[:12]}.... Pass the model that was unlearned, in its own dtype."
        )
    result = deep_copy(base, "Pass the module inside the wrapper.")
    damaged = f"delta: {path} was altered or damaged. Copy it again from its source."
    own = saved_tensors(result)
    for name, first in _ties(metadata, damaged).items():
        if first not in changed or name in changed:
            raise CheckpointError(damaged)
        changed[name] = changed[first]
    for name, value in changed.items():
        if name not in own or not _alike(own[name], value):
            raise CheckpointError(damaged)
        with torch.no_grad():
            own[name].copy_(value)
    if weights_hash(result) != metadata.get("result"):
        raise CheckpointError(damaged)
    return result


def check_ending(path: str | Path) -> None:
    """Raises if the ending of ``path`` promises a file of ``torch.save``, which a delta is not.

    Raises:
        OutputError: it ends in .pt, .pth, .ckpt and so on.
    """
    if str(path).lower().endswith(checkpoint.TORCH):
        raise OutputError(
            f"delta: {path} has the ending of a torch.save file, and a delta is a safetensors "
            f"file. Let its name end in .safetensors."
        )


def _alike(a: Tensor, b: Tensor) -> bool:
    return a.shape == b.shape and a.dtype == b.dtype


def _check_format(path: str | Path, found: str) -> None:
    if found == FORMAT:
        return
    if found.startswith(FORMAT.rpartition("/")[0] + "/"):
        raise CheckpointError(
            f"delta: {path} has format {found}, this version of zsu_fast reads {FORMAT}. Write the "
            f"delta again with this version, or apply it with the version that wrote it."
        )
    raise CheckpointError(
        f"delta: {path} is not a zsu_fast delta. Pass a file written by save_delta or --delta."
    )


def _ties(metadata: Mapping[str, str], damaged: str) -> dict[str, str]:
    try:
        ties = json.loads(metadata.get("tied", "{}"))
    except (ValueError, RecursionError) as error:
        raise CheckpointError(damaged) from error
    if not isinstance(ties, dict) or not all(isinstance(v, str) for v in ties.values()):
        raise CheckpointError(damaged)
    return ties
