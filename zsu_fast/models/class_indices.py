"""Checks classes, indices or names, passed by the user."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor

from ..errors import ArgumentError
from .labels import Labels, class_indices

# The number of classes if it is not known yet.
ANY_NUMBER = 1 << 31


def check_forget(forget: Any, classes: int, labels: Labels | None = None) -> list[int]:
    """Returns ``forget`` as a sorted list of class indices, at least one class fewer than all.

    Args:
        forget, classes, labels: see `check_classes`.

    Raises:
        ArgumentError: as `check_classes`, or every class is named.
    """
    indices = check_classes("forget", forget, classes, labels)
    if len(indices) == classes:
        raise ArgumentError(
            "forget",
            f"got {_short_repr(forget)}: that is every class, so nothing is left to keep",
            f"Leave out at least one of the classes 0 to {classes - 1}.",
        )
    return indices


def check_forgotten(
    forgotten: Any, forget: Sequence[int], classes: int, labels: Labels | None = None
) -> list[int]:
    """Returns the classes forgotten before as a sorted list; None and empty collections give [].

    Raises:
        ArgumentError: as `check_classes`, ``forget`` repeats one, or no class is left to keep.
    """
    try:
        empty = forgotten is None or (not isinstance(forgotten, str | bytes) and not len(forgotten))
    except TypeError:  # an int or a generator
        empty = False
    if empty:
        return []
    before = check_classes("forgotten", forgotten, classes, labels)
    if repeated := sorted(set(before) & set(forget)):
        raise ArgumentError(
            "forget",
            f"{repeated} were forgotten before (forgotten={_short_repr(before)})",
            "Name only classes that the model still predicts.",
        )
    if len(before) + len(forget) == classes:
        raise ArgumentError(
            "forget",
            f"got {_short_repr(list(forget))}: with those forgotten before ({_short_repr(before)}) "
            f"that is every class, so nothing is left to keep",
            "Leave out at least one class.",
        )
    return before


def check_classes(
    argument: str, value: Any, classes: int, labels: Labels | None = None
) -> list[int]:
    """Returns ``value`` as a sorted list of class indices.

    Args:
        argument: its name, for the error.
        value: one int, or any collection of ints (list, tuple, set, range, numpy array, tensor);
            names of classes, too, as one text or among the ints.
        classes: number of the model's logits, or `ANY_NUMBER`.
        labels: the names of the model's classes, if they are known.

    Raises:
        ArgumentError: empty, out of range, duplicated, not whole numbers, or not the name of one
            class.
    """
    valid = f"from 0 to {classes - 1}" if classes < ANY_NUMBER else "counted from 0"
    remedy = f"Pass distinct class indices {valid}, such as {argument}=[0, 1]."

    def refuse(why: str) -> ArgumentError:
        return ArgumentError(argument, f"got {_short_repr(value)}: {why}", remedy)

    items = _as_list(value, refuse, labels is not None)
    if any(isinstance(item, str) for item in items):
        indices = class_indices(items, labels, classes, argument)
    else:
        indices = items
    if not indices:
        raise refuse("no class is named")
    if min(indices) < 0:
        raise refuse(f"{min(indices)} is negative")
    if max(indices) >= classes:
        raise refuse(f"{max(indices)} is out of range, the model has {classes} logits")
    if any(isinstance(item, str) for item in items):
        indices = [
            *dict.fromkeys(indices)
        ]  # several names of one class, as in "tench, Tinca tinca"
    if len(set(indices)) < len(indices):
        repeated = sorted({c for c in indices if indices.count(c) > 1})
        raise refuse(f"{repeated} named more than once")
    return sorted(indices)


def _as_list(value: Any, refuse: Callable[[str], ArgumentError], named: bool) -> list[Any]:
    """The ints and texts in ``value``, which is a text itself only if classes are ``named``."""
    if isinstance(value, bytes | dict) or (isinstance(value, str) and not named):
        raise refuse(f"a {type(value).__name__} is not a collection of class indices")
    if isinstance(value, str):
        items: list[Any] = [value]
    elif isinstance(value, Tensor | np.ndarray):
        if "int" not in str(value.dtype) and getattr(value.dtype, "kind", "") != "U":
            raise refuse(f"its dtype is {value.dtype}, not an integer type")
        items = value.reshape(-1).tolist()
    elif isinstance(value, Iterable):
        items = list(value)
    else:
        items = [value]
    for item in items:
        if isinstance(item, bool | np.bool_):
            raise refuse("a bool is not a class index")
        if isinstance(item, Tensor) and (
            item.numel() != 1 or item.is_floating_point() or item.dtype == torch.bool
        ):
            raise refuse("it holds a tensor that is not one whole number")
        if not isinstance(item, int | np.integer | Tensor | str):
            raise refuse(f"{item!r} is a {type(item).__name__}, not an int")
    return [item if isinstance(item, str) else int(item) for item in items]


def _short_repr(value: Any) -> str:
    text = repr(value).replace("\n", " ")
    return text if len(text) <= 80 else text[:77] + "..."
