"""Weights files of compact models: they say which classes their rows are."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path

from safetensors import SafetensorError, safe_open
from torch import nn

from ..errors import ArgumentError, CheckpointError
from .compact import Compaction, cut
from .parameters import saved_tensors

# Keys in the metadata of a safetensors file: what was cut, and which of the classes that are left
# are forgotten, by their numbers in the file.
COMPACT, FORGOTTEN = "zsu_fast.compact", "zsu_fast.forgotten"


def compact_metadata(
    compaction: Compaction | None, forgotten: Sequence[int] | None = None
) -> dict[str, str]:
    """The metadata of a file of weights that were cut; {} for others.

    Args:
        compaction: what was cut since the architecture was built; None for nothing.
        forgotten: the forgotten classes that still have rows, by their numbers in the file;
            None if that is not known.
    """
    if compaction is None:
        return {}
    metadata = {COMPACT: json.dumps(compaction.to_dict())}
    return metadata if forgotten is None else metadata | {FORGOTTEN: json.dumps([*forgotten])}


def file_compaction(path: str | Path | None) -> Compaction | None:
    """What was cut from the weights in ``path``; None for other files, and if there is no file.

    Raises:
        CheckpointError: the metadata is malformed.
    """
    text = _metadata(path).get(COMPACT)
    try:
        return None if text is None else Compaction.from_dict(json.loads(text))
    except (ValueError, RecursionError) as error:
        raise CheckpointError(
            f"weights: the map of classes in {path} is damaged ({error}). Save it again."
        ) from error


def is_unlearned(path: str | Path | None) -> bool:
    """Whether ``path`` is a safetensors file that states the weights before unlearning."""
    return "weights_before" in _metadata(path)


def _metadata(path: str | Path | None) -> dict[str, str]:
    if path is None or not Path(path).is_file():
        return {}
    try:
        with safe_open(str(path), framework="pt") as file:
            return dict(file.metadata() or {})
    except (SafetensorError, OSError, ValueError, RuntimeError):  # reading the weights says why
        return {}


def check_forgotten_in_file(path: str | Path | None, forgotten: Sequence[int]) -> None:
    """Raises if ``forgotten`` may be numbers from before the weights in ``path`` were cut.

    Raises:
        ArgumentError: the weights were cut, and classes of these numbers are not forgotten in them.
    """
    metadata = _metadata(path)
    if COMPACT not in metadata or FORGOTTEN not in metadata:
        return
    try:
        known = {*json.loads(metadata[FORGOTTEN])}
    except (ValueError, TypeError):
        known = set()
    if unknown := sorted(set(forgotten) - known):
        raise ArgumentError(
            "forgotten",
            f"got {unknown}, but {path} holds a compact model: classes forgotten before have no "
            f"rows in it, and the others are numbered anew",
            f"Leave it out, or pass what is forgotten by these numbers: {sorted(known)}.",
        )


def fit_to_file(model: nn.Module, path: str | Path) -> None:
    """Cuts ``model``, which was just built, as the weights in ``path`` were, for loading them.

    Nothing happens if these weights were not cut, or if ``model`` has as many classes as they.

    Raises:
        ModelError: the model does not have the tensors that were cut; it is unchanged then.
        CheckpointError: the metadata is malformed.
    """
    compaction = file_compaction(path)
    if compaction is None:
        return
    own, left = saved_tensors(model), len(compaction.kept)
    if not all(
        name in own and own[name].ndim > dim and own[name].shape[dim] == left
        for name, dim in compaction.tensors.items()
    ):
        cut(model, compaction)
