"""Reads labelled images from an .npz file."""

from __future__ import annotations

import warnings
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from ..errors import ArgumentError, UnlearningWarning

# Pairs of (images, labels) as common files spell them; in files with several parts, the test part.
_SPELLINGS = (
    ("images", "labels"), ("images", "label"), ("image", "label"), ("image", "labels"),
    ("images", "targets"), ("images", "y"), ("data", "labels"), ("data", "targets"), ("x", "y"),
    ("pixel_values", "labels"), ("img", "label"), ("x_test", "y_test"),
    ("test_images", "test_labels"), ("images_test", "labels_test"), ("test_x", "test_y"),
    ("arr_0", "arr_1"),
)  # fmt: skip


def read_npz(path: Path) -> tuple[Tensor, Any]:
    """Returns images, uint8 or float [N, ...], and labels, int [N] or a list of names.

    Labels [N, 1] become [N].

    Raises:
        ArgumentError: the file can't be read, or holds no such pair, or several.

    Warns:
        UnlearningWarning: the arrays are not called images and labels.
    """
    try:
        with np.load(path, allow_pickle=False) as file:
            images, labels = _pair(path, list(file.files))
            arrays = file[images], file[labels]
    except ArgumentError:
        raise
    except Exception as error:  # numpy raises errors of many types for damaged files
        raise ArgumentError(
            "data", f"{path} can't be read ({error})", "Store 'images' and 'labels'."
        ) from error
    if (images, labels) != ("images", "labels"):
        warnings.warn(
            f"data: of the arrays in {path}, {images!r} are taken as images, {labels!r} as labels",
            UnlearningWarning,
            stacklevel=2,
        )
    numbers = arrays[1]
    if numbers.ndim == 2 and numbers.shape[1] == 1:
        numbers = numbers[:, 0]
    named = numbers.dtype.kind in "US"
    try:
        return torch.from_numpy(arrays[0]), (
            [str(n) for n in numbers.astype(str)] if named else torch.from_numpy(numbers)
        )
    except TypeError as error:
        raise ArgumentError(
            "data", f"{path} can't be used ({error})", "Store uint8 images and int labels."
        ) from error


def _pair(path: Path, keys: list[str]) -> tuple[str, str]:
    lowered: dict[str, str] = {}
    for key in keys:
        if key.casefold() in lowered:
            raise ArgumentError(
                "data", f"{path} holds {lowered[key.casefold()]!r} and {key!r}", "Store only one."
            )
        lowered[key.casefold()] = key
    found = [pair for pair in _SPELLINGS if pair[0] in lowered and pair[1] in lowered]
    if not found or (("images", "labels") not in found and len(found) > 1):
        held = ", ".join(map(repr, keys)) or "nothing"
        raise ArgumentError(
            "data",
            f"{path} holds {held}: {'several' if found else 'no'} pairs of images and labels",
            "Store 'images' and 'labels'.",
        )
    images, labels = ("images", "labels") if ("images", "labels") in found else found[0]
    return lowered[images], lowered[labels]
