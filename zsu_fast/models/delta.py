"""Delta artefacts: only what unlearning changed, and which weights it fits.

A delta is a safetensors file of the tensors whose bits changed. Its metadata names the format and
two `weights_hash` values: of the base that it belongs to and of the result. Both are checked, so a
delta of other weights and one that was cut off or altered are refused.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path

import torch
from torch import Tensor, nn

from ..errors import CheckpointError, ModelError
from . import checkpoint
from .parameters import deep_copy, unwrap, weights_hash

FORMAT = "zsu_fast.delta/1"


def save_delta(
    base: nn.Module, unlearned: nn.Module, path: str | Path, force: bool = False
) -> None:
    """Writes what has to be put into ``base`` to get ``unlearned``, atomically.

    The file holds the changed tensors (those tied to one tensor once) and a header of at most
    512 bytes and 160 bytes and its name for each of them.

    Args:
        base: the model before; its ``state_dict()`` is meant, other attributes are not.
        unlearned: the same architecture after.
        path: of the safetensors file.
        force: replace an existing file.

    Raises:
        ModelError: the two differ in names, shapes or dtypes.
        OutputError: the path exists (without ``force``) or can't be written.
    """
    old, new = _tensors(base), _tensors(unlearned)
    misfit = sorted(old.keys() ^ new.keys()) + [
        n
        for n in sorted(old.keys() & new.keys())
        if old[n].shape != new[n].shape or old[n].dtype != new[n].dtype
    ]
    if misfit:
        raise ModelError(
            f"base and result differ in more than values: {', '.join(misfit[:3])}",
            "Pass the model that was unlearned and the result of that.",
        )
    changed: dict[str, Tensor] = {}
    tied: dict[str, str] = {}  # further names of a tensor that is stored
    seen: dict[tuple[int, int, torch.Size, tuple[int, ...]], str] = {}
    for name in sorted(new):
        if _same_bits(old[name], new[name]):
            continue
        place = (new[name].data_ptr(), new[name].numel(), new[name].shape, new[name].stride())
        first = seen.setdefault(place, name)
        if first == name:
            changed[name] = new[name]
        else:
            tied[name] = first
    metadata = {"format": FORMAT, "base": weights_hash(base), "result": weights_hash(unlearned)}
    if tied:
        metadata["tied"] = json.dumps(tied)
    checkpoint.save_tensors(path, changed, metadata, force)


def apply_delta(base: nn.Module, path: str | Path) -> nn.Module:
    """A copy of ``base`` with the delta put in: the unlearned model, bit for bit.

    Raises:
        CheckpointError: no delta, cut off, altered, or of another base.
        ModelError: ``base`` can't be copied.
    """
    changed, metadata = checkpoint.load_tensors(path)
    if metadata.get("format") != FORMAT:
        raise CheckpointError(
            f"delta: {path} is no zsu_fast delta. Pass a file that save_delta or --delta wrote."
        )
    if weights_hash(base) != metadata.get("base"):
        raise CheckpointError(
            f"delta: {path} fits weights {str(metadata.get('base'))[:12]}..., these are "
            f"{weights_hash(base)[:12]}.... Pass the model that was unlearned, in its own dtype."
        )
    result = deep_copy(base, "Pass the module inside the wrapper.")
    damaged = f"delta: {path} was altered or damaged. Copy it anew from where it was written."
    own = _tensors(result)
    for name, first in _ties(metadata, damaged).items():
        if first not in changed or name in changed:
            raise CheckpointError(damaged)
        changed[name] = changed[first]
    for name, value in changed.items():
        target = own.get(name)
        if target is None or target.shape != value.shape or target.dtype != value.dtype:
            raise CheckpointError(damaged)
        with torch.no_grad():
            target.copy_(value)
    if weights_hash(result) != metadata.get("result"):
        raise CheckpointError(damaged)
    return result


def _tensors(model: nn.Module) -> dict[str, Tensor]:
    """The tensors of ``state_dict()``; they share memory with the model."""
    return {n: t for n, t in unwrap(model).state_dict().items() if isinstance(t, Tensor)}


def _same_bits(a: Tensor, b: Tensor) -> bool:
    """Whether two tensors of one shape and dtype have the same bytes: -0 is not 0, NaN is NaN."""
    first, second = (t.detach().cpu().contiguous().flatten().view(torch.uint8) for t in (a, b))
    return torch.equal(first, second)


def _ties(metadata: Mapping[str, str], damaged: str) -> dict[str, str]:
    try:
        ties = json.loads(metadata.get("tied", "{}"))
    except (ValueError, RecursionError) as error:
        raise CheckpointError(damaged) from error
    if not isinstance(ties, dict) or not all(isinstance(v, str) for v in ties.values()):
        raise CheckpointError(damaged)
    return ties
