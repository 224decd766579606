"""A compact model with a logit for every class again, to be compared with its original."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn

from ..errors import ModelError
from .compact import Compaction, find_compaction
from .input_spec import noise_images
from .parameters import deep_copy, state, unwrap
from .prepare import PreparedModel


def expand_compact(
    original: PreparedModel, compact: nn.Module, removed: Sequence[int]
) -> nn.Module | None:
    """A copy of ``original`` with the values of ``compact``, which has no rows for ``removed``.

    The rows that it lacks are 0: mask their logits. None if the tensors of ``compact`` are not
    those of the original without these rows, or if it has all rows.

    Args:
        original: the model before unlearning.
        compact: the result, as of `compact` or compact=True.
        removed: sorted indices of the classes without rows.
    """
    old, new = state(original.model.module), state(unwrap(compact))
    differ = {name for name in old.keys() & new.keys() if old[name].shape != new[name].shape}
    if old.keys() != new.keys() or not differ:
        return None
    try:
        images = noise_images(original.spec, 2).to(original.device)
        compaction = find_compaction(original.model, removed, images)
    except ModelError:
        return None
    if not all(_is_cut(old[n], new[n], compaction, n) for n in differ):
        return None
    full = deep_copy(original.model.module, "Pass the result with a logit for each class.")
    kept = torch.tensor(compaction.kept, device=original.device)
    with torch.no_grad():
        for name, value in state(full).items():
            if name in differ:
                value.zero_().index_copy_(compaction.tensors[name], kept, new[name].to(value))
            else:
                value.copy_(new[name])
    return full


def _is_cut(old: Tensor, new: Tensor, compaction: Compaction, name: str) -> bool:
    """Whether ``new`` has the shape of ``old`` without the rows of the removed classes."""
    dim = compaction.tensors.get(name)
    if dim is None:
        return False
    return new.shape == (*old.shape[:dim], len(compaction.kept), *old.shape[dim + 1 :])
