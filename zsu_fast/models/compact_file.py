"""Weights files of compact models: they say which classes their rows are."""

from __future__ import annotations

import json
from pathlib import Path

from safetensors import SafetensorError, safe_open
from torch import nn

from ..errors import CheckpointError
from .compact import Compaction, cut
from .parameters import saved_tensors

COMPACT = "zsu_fast.compact"  # the key in the metadata of a safetensors file


def compact_metadata(compaction: Compaction | None) -> dict[str, str]:
    """The metadata of a file of weights that were cut; {} for others."""
    return {} if compaction is None else {COMPACT: json.dumps(compaction.to_dict())}


def file_compaction(path: str | Path | None) -> Compaction | None:
    """What was cut from the weights in ``path``; None for other files, and if there is no file.

    Raises:
        CheckpointError: the metadata is malformed.
    """
    if path is None or not Path(path).is_file():
        return None
    try:
        with safe_open(str(path), framework="pt") as file:
            text = (file.metadata() or {}).get(COMPACT)
    except (SafetensorError, OSError, ValueError, RuntimeError):  # reading the weights says why
        return None
    try:
        return None if text is None else Compaction.from_dict(json.loads(text))
    except (ValueError, RecursionError) as error:
        raise CheckpointError(
            f"weights: the map of classes in {path} is damaged ({error}). Save it again."
        ) from error


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
