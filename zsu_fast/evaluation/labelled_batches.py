"""Batches of labelled images, checked: what `evaluate` and `audit` accept as data."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping
from typing import Any

import numpy as np
import torch
from torch import Tensor

from ..errors import ArgumentError, shorten
from ..models.multi_label import has_several
from .data_classes import LABEL_KEYS

IMAGE_KEYS = ("pixel_values", "images", "image", "img", "inputs", "x")
_REMEDY = "Pass (images, labels) or a DataLoader."


def labelled_batches(
    data: Any,
    argument: str,
    batch: int,
    read_image: Callable[[Any], Tensor] | None = None,
) -> Iterator[tuple[Tensor, Any]]:
    """Yields (images, labels) batches: images as one tensor, labels as given, for `read_labels`.

    Empty batches are left out. Arrays of text labels become lists.

    Args:
        data: a (images [N, ...], labels int [N]) pair of tensors or arrays; a DataLoader or another
            iterable of such pairs; a data set of (image, label) rows; or the same as dicts with a
            key of `IMAGE_KEYS` and one of `LABEL_KEYS`, as Hugging Face data sets have them.
        argument: the name of the argument, for error messages.
        batch: the batch size if ``data`` is a pair, or has rows.
        read_image: Pillow image -> float tensor [C, H, W]; None refuses such images.

    Raises:
        ArgumentError: ``data`` is of another type or holds no image, or there is not one label per
            image.
    """
    empty = True
    for images, labels in _batches(data, argument, batch):
        images = _as_tensor(images, argument, read_image)
        if isinstance(labels, tuple) or (
            isinstance(labels, np.ndarray) and labels.dtype.kind in "UO"
        ):
            labels = list(labels)
        if not isinstance(labels, Tensor | np.ndarray | list):
            raise ArgumentError(argument, f"its labels are a {type(labels).__name__}", _REMEDY)
        _check_count(images, labels, argument)
        if len(labels):
            empty = False
            yield images, labels
    if empty:
        raise ArgumentError(
            argument, "there is no image in it", "Pass at least one labelled image."
        )


def read_labels(labels: Any, argument: str) -> Tensor:
    """Returns the labels of a batch as int64 [n] on the CPU.

    Raises:
        ArgumentError: they are not one class index per image.
    """
    remedy = "Pass one class index, an int, for each image."
    try:
        labels = torch.as_tensor(labels).cpu()
    except (TypeError, ValueError, RuntimeError) as error:
        raise ArgumentError(argument, f"its labels can't be read ({error})", remedy) from error
    if labels.ndim != 1 or "int" not in str(labels.dtype):
        hint = (
            " One-hot labels: pass labels.argmax(1). Several classes per image: multi_label=True."
            if labels.ndim == 2
            else ""
        )
        raise ArgumentError(
            argument,
            f"its labels are {labels.dtype} of shape {tuple(labels.shape)}",
            f"{remedy}{hint}",
        )
    return labels.long()


def check_label_range(labels: Tensor, classes: int, argument: str) -> None:
    """Checks that each of ``labels``, int64 [n] with n > 0, is the index of a logit.

    Raises:
        ArgumentError: a label is below 0, or ``classes`` or more.
    """
    low, high = int(labels.min()), int(labels.max())
    if not 0 <= low <= high < classes:
        raise ArgumentError(
            argument,
            f"labels run from {low} to {high}, the model has {classes} logits",
            f"Number the classes from 0 to {classes - 1}, as in the model's training.",
        )


def _batches(data: Any, argument: str, batch: int) -> Iterator[tuple[Any, Any]]:
    """(images, labels) batches as they come; rows are collected into lists."""
    if isinstance(data, Mapping) and data:
        data = _pair(data, argument)
    if _is_pair_of_columns(data):
        images, labels = data
        _check_count(images, labels, argument)
        for start in range(0, len(labels), batch):
            yield images[start : start + batch], labels[start : start + batch]
        return
    if isinstance(data, str | bytes | Mapping) or not (
        isinstance(data, Iterable) or hasattr(data, "__getitem__")
    ):
        raise ArgumentError(argument, f"got a {type(data).__name__}", _REMEDY)
    rows: tuple[list[Any], list[Any]] = [], []
    for item in _items(data):
        images, labels = _pair(item, argument)
        if not _is_one_label(labels) and not _is_one_image(images, labels):
            yield images, labels
            continue
        rows[0].append(images)
        rows[1].append(labels)
        if len(rows[1]) == batch:
            yield rows
            rows = [], []
    if rows[1]:
        yield rows


def _items(data: Any) -> Iterable[Any]:
    """The items of a loader or a data set; data sets need not raise IndexError at their end."""
    if not isinstance(data, Iterable) and hasattr(data, "__len__"):
        return (data[index] for index in range(len(data)))
    return data


def _pair(item: Any, argument: str) -> tuple[Any, Any]:
    """(images, labels) of one item, which is a pair or a dict."""
    if isinstance(item, Mapping):
        keys = [[key for key in names if key in item] for names in (IMAGE_KEYS, LABEL_KEYS)]
        if not all(keys):
            raise ArgumentError(
                argument,
                f"got a dict with the keys {shorten(map(repr, item))}",
                f"Pass one with a key of {', '.join(IMAGE_KEYS)}, and one of "
                f"{', '.join(LABEL_KEYS)}.",
            )
        return item[keys[0][0]], item[keys[1][0]]
    if isinstance(item, tuple | list) and len(item) == 2:
        return item[0], item[1]
    size = f" of {len(item)}" if isinstance(item, tuple | list) else ""
    raise ArgumentError(argument, f"it holds a {type(item).__name__}{size}, not a pair", _REMEDY)


def _is_one_label(label: Any) -> bool:
    """Whether ``label`` belongs to a single image, rather than to a batch."""
    if isinstance(label, Tensor | np.ndarray):
        return label.ndim == 0
    return isinstance(label, int | float | np.generic | str) or label is None


def _is_one_image(images: Any, labels: Any) -> bool:
    """Whether several labels belong to a single image: a picture, or one [C, H, W]."""
    if hasattr(images, "getbands"):  # Pillow's
        return True
    channels = len(images) if getattr(images, "ndim", 0) == 3 else 0
    return channels in (1, 3) and hasattr(labels, "__len__") and len(labels) != channels


def _is_pair_of_columns(data: Any) -> bool:
    if not isinstance(data, tuple | list) or len(data) != 2:
        return False
    images, labels = data
    if isinstance(labels, Tensor | np.ndarray):
        return True
    if not isinstance(labels, list | tuple) or not len(labels) or not hasattr(images, "__len__"):
        return False
    # a list of lists: several classes per image, unless it is the second of two batches
    return all(map(_is_one_label, labels)) or (
        isinstance(images, Tensor | np.ndarray) and has_several(labels)
    )


def _as_tensor(images: Any, argument: str, read_image: Callable[[Any], Tensor] | None) -> Tensor:
    """Makes one tensor of a batch: a tensor, an array, or a list of tensors, arrays or pictures."""
    try:
        if isinstance(images, Tensor):
            return images
        if isinstance(images, np.ndarray):
            return torch.from_numpy(images)
        if isinstance(images, list | tuple):
            return torch.stack([_one_image(image, argument, read_image) for image in images])
    except (TypeError, ValueError, RuntimeError) as error:
        raise ArgumentError(
            argument,
            f"its images can't be put into one batch ({error})",
            "Pass images of one size and type.",
        ) from error
    raise ArgumentError(argument, f"its images are a {type(images).__name__}", _REMEDY)


def _one_image(image: Any, argument: str, read_image: Callable[[Any], Tensor] | None) -> Tensor:
    if isinstance(image, Tensor | np.ndarray):
        return torch.as_tensor(image)
    if hasattr(image, "convert") and hasattr(image, "getbands"):  # Pillow's
        if read_image is None:
            raise ArgumentError(
                argument,
                "its images are pictures, and the model does not state what it expects",
                "Pass input_shape, mean and std, or tensors as the model takes them.",
            )
        return read_image(image)
    return torch.as_tensor(image)  # nested lists, as Hugging Face data sets return arrays


def _check_count(images: Any, labels: Any, argument: str) -> None:
    if len(images) != len(labels):
        raise ArgumentError(
            argument,
            f"there are {len(images)} images and {len(labels)} labels",
            "Pass one label for each image.",
        )
