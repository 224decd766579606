"""Which class of the model each class of the data is.

Folders and data sets number their own classes; a model numbers its logits. The two are matched by
name or number, never by position, unless nothing is known of the model's names. Then the order is
assumed, and held against the model's predictions (`class_order`).
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from ..errors import ArgumentError, shorten
from ..models.labels import Labels, class_indices

LABEL_KEYS = ("labels", "label", "targets", "target", "fine_label", "y")


@dataclass(frozen=True)
class ClassMap:
    """The model's class for each class of the data.

    Attributes:
        classes: name in the data -> index of the model's class, in the order of the data's labels.
        assumed: whether the order is an assumption, which `check_order` must confirm.
    """

    classes: dict[str, int]
    assumed: bool = False

    def translate(self, labels: Tensor, argument: str) -> Tensor:
        """The model's classes for the data's labels, both int64 [N].

        Raises:
            ArgumentError: a label is not the number of one of the data's classes.
        """
        indices = torch.tensor(list(self.classes.values()))
        if len(labels) and not 0 <= int(labels.min()) <= int(labels.max()) < len(indices):
            raise ArgumentError(
                argument,
                f"labels run from {int(labels.min())} to {int(labels.max())}, the data lists "
                f"{len(indices)} classes",
                "Pass labels that are numbers of these classes.",
            )
        return indices[labels]


def map_classes(
    names: Sequence[str],
    classes: int,
    labels: Labels | None,
    argument: str = "data",
    *,
    ordered: bool = False,
) -> ClassMap:
    """Finds the model's class for each class of the data.

    Numbers ("7", "007") are class numbers. Names and WordNet ids are looked up in ``labels``. If
    there are none, as many names as logits are taken to be in the order of the logits, as they are
    where the model was trained on folders of these names.

    Args:
        names: of the data's classes, in the order of its labels.
        classes: number of the model's logits.
        labels: the names of the model's classes, if they are known.
        argument: its name, for errors.
        ordered: whether the data defines the order itself, so that it needs no confirmation.

    Raises:
        ArgumentError: a name means no class or several, two mean the same, or there are other
            numbers of names and logits.
    """
    numbers = [name.strip().isdecimal() for name in names]
    if labels is None and not all(numbers):
        if any(numbers) or len(names) != classes or len(set(names)) < len(names):
            raise ArgumentError(
                argument,
                f"it has {len(names)} classes ({shorten(names, 4)}), the model has {classes} "
                f"logits, and the names of the model's classes are not known",
                "Name the classes by their numbers, or pass the names of all of the model's "
                "classes (class_names=, --class-names).",
            )
        return ClassMap({name: index for index, name in enumerate(names)}, assumed=not ordered)
    try:
        given = labels is not None and labels.given
        indices = class_indices(names, labels, classes, argument, names_first=given)
    except ArgumentError as error:
        hint = ""
        if all(numbers) and min(map(int, names)) == 1:
            hint = " Or do they count from 1? Then list them with class_names= or --class-names."
        elif labels is not None and not labels.given:
            hint = " If its names are wrong, pass the right ones (class_names=, --class-names)."
        raise ArgumentError(argument, error.got, f"{error.remedy}{hint}") from error
    first: dict[int, str] = {}
    for name, index in zip(names, indices, strict=True):
        if index in first:
            raise ArgumentError(
                argument,
                f"{first[index]!r} and {name!r} are both class {index}",
                "Join them, or name each by its number.",
            )
        first[index] = name
    return ClassMap(dict(zip(names, indices, strict=True)))


def classes_of(data: Any) -> tuple[list[str], bool] | None:
    """Returns the names of the classes that a data set or loader states, by its labels.

    Looks for ``class_to_idx``, ``wnids`` and ``classes`` (torchvision), ``reader.class_to_idx``
    (timm) and the ``ClassLabel`` of a Hugging Face data set, through loaders and subsets.

    Returns:
        The names, and whether the data set defines their order rather than the names of folders;
        None if it states nothing, or changes its labels by a ``target_transform``.

    Raises:
        ArgumentError: the parts of a ``ConcatDataset`` state different classes.
    """
    while (inner := _inner(data)) is not None:
        data = inner
    parts = getattr(data, "datasets", None)
    if isinstance(parts, list | tuple):
        found = [classes_of(part) for part in parts]
        if any(part != found[0] for part in found):
            raise ArgumentError(
                "data", "its data sets number their classes differently", "Measure each alone."
            )
        return found[0] if found else None
    if getattr(data, "target_transform", None) is not None:
        return None
    ids: Any = getattr(data, "wnids", None)
    if _are_names(ids):
        return list(ids), True
    numbers = getattr(getattr(data, "reader", data), "class_to_idx", None)
    names: Any = getattr(data, "classes", None)
    folders = hasattr(data, "samples") or hasattr(data, "reader")
    if isinstance(numbers, Mapping) and sorted(numbers.values()) == list(range(len(numbers))):
        return sorted(map(str, numbers), key=lambda name: numbers[name]), not folders
    if names is None:
        names = _hugging_face_names(data)
    return (list(names), not folders) if _are_names(names) else None


def _inner(data: Any) -> Any:
    """What a loader or a subset wraps; None for a data set."""
    for name in ("dataset", "loader"):
        inner = getattr(data, name, None)
        if inner is not None and not callable(inner):
            return inner
    return None


def _are_names(value: Any) -> bool:
    return (
        isinstance(value, list | tuple)
        and len(value) > 0
        and all(isinstance(v, str) for v in value)
    )


def _hugging_face_names(data: Any) -> Any:
    features = getattr(data, "features", None)
    if not isinstance(features, Mapping):
        return None
    kinds = [features[key] for key in LABEL_KEYS if key in features]
    kinds = [getattr(kind, "feature", kind) for kind in kinds]  # of a list: several per image
    return next((getattr(kind, "names", None) for kind in kinds), None)
