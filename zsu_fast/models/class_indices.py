"""Validates class indices given by the user."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor

from ..errors import ArgumentError

# Stands for the number of classes where it is not known yet.
ANY_NUMBER = 1 << 31


def check_forget(forget: Any, classes: int) -> list[int]:
    """``forget`` as a sorted list of class indices that leaves at least one class to keep.

    Raises:
        ArgumentError: as `check_classes`, or every class is named.
    """
    wanted = check_classes("forget", forget, classes)
    if len(wanted) == classes:
        raise ArgumentError(
            "forget",
            f"got {_short(forget)}: that is every class, so nothing is left to keep",
            f"Leave out at least one of the classes 0 to {classes - 1}.",
        )
    return wanted


def check_forgotten(forgotten: Any, forget: Sequence[int], classes: int) -> list[int]:
    """Classes forgotten before, as a sorted list; None and an empty collection are none.

    Raises:
        ArgumentError: as `check_classes`, one is to be forgotten again, or none is left to keep.
    """
    try:
        none = forgotten is None or (not isinstance(forgotten, str | bytes) and not len(forgotten))
    except TypeError:  # a plain int, a generator
        none = False
    if none:
        return []
    before = check_classes("forgotten", forgotten, classes)
    twice = sorted(set(before) & set(forget))
    if twice:
        raise ArgumentError(
            "forget",
            f"{twice} were forgotten before (forgotten={_short(before)})",
            "Name only classes that the model still answers.",
        )
    if len(before) + len(forget) == classes:
        raise ArgumentError(
            "forget",
            f"got {_short(list(forget))}: with those forgotten before ({_short(before)}) that is "
            f"every class, so nothing is left to keep",
            "Leave out at least one class.",
        )
    return before


def check_classes(argument: str, value: Any, classes: int) -> list[int]:
    """``value`` as a sorted list of class indices.

    Args:
        argument: its name, for the error.
        value: one int, or any collection of ints (list, tuple, set, range, numpy array, tensor).
        classes: the number of the model's logits.

    Raises:
        ArgumentError: empty, out of range, duplicated, or not whole numbers.
    """
    known = f"from 0 to {classes - 1}" if classes < ANY_NUMBER else "counted from 0"
    remedy = f"Pass distinct class indices {known}, such as {argument}=[0, 1]."

    def refuse(why: str) -> ArgumentError:
        return ArgumentError(argument, f"got {_short(value)}: {why}", remedy)

    if isinstance(value, str | bytes | dict):
        raise refuse(f"a {type(value).__name__} is not a collection of class indices")
    if isinstance(value, Tensor | np.ndarray):
        kind = str(value.dtype)
        if "int" not in kind:
            raise refuse(f"its dtype is {kind}, not an integer type")
        items: list[Any] = value.reshape(-1).tolist()
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
        if not isinstance(item, int | np.integer | Tensor):
            raise refuse(f"{item!r} is a {type(item).__name__}, not an int")
    wanted = [int(item) for item in items]
    if not wanted:
        raise refuse("no class is named")
    if min(wanted) < 0:
        raise refuse(f"{min(wanted)} is negative")
    if max(wanted) >= classes:
        raise refuse(f"{max(wanted)} is out of range, the model has {classes} logits")
    if len(set(wanted)) < len(wanted):
        twice = sorted({c for c in wanted if wanted.count(c) > 1})
        raise refuse(f"{twice} named more than once")
    return sorted(wanted)


def _short(value: Any) -> str:
    text = repr(value).replace("\n", " ")
    return text if len(text) <= 80 else text[:77] + "..."
