"""Labelled images of any form, matched with a model: its images, its classes."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor, nn

from ..models.input_spec import InputSpec
from ..models.labels import Labels, class_indices, resolve_labels
from ..models.multi_label import multi_hot
from .data_classes import ClassMap, classes_of, map_classes
from .image_format import ImageFormat
from .labelled_batches import check_label_range, labelled_batches, read_labels


class LabelledData:
    """Labelled images as the caller has them, in the form that a model takes.

    Args:
        data: see `labelled_batches`.
        argument: its name, for errors.
        spec: the images that the model takes; None if that is unknown.
        class_names: as for `resolve_labels`.
        exact_size: see `ImageFormat`.

    Attributes:
        format: the `ImageFormat`, which knows what was assumed of the images.
        labels: the names of the model's classes, or None; set by `match`.
        found: the model's class for each class of the data, or None if the data names none; set by
            `match`.
    """

    def __init__(
        self, data: Any, argument: str, spec: InputSpec | None, class_names: Any = None,
        exact_size: bool = False,
    ) -> None:  # fmt: skip
        self.data, self.argument, self.class_names = data, argument, class_names
        self.format = ImageFormat(spec, argument, exact_size)
        self.labels: Labels | None = None
        self.found: ClassMap | None = None

    def match(self, model: nn.Module, classes: int) -> Labels | None:
        """Matches the data's classes with those of ``model``; returns the names of the latter.

        Raises:
            ArgumentError: they can't be matched, or ``class_names`` can't be used.
        """
        self.labels = resolve_labels(self.class_names, model, classes)
        stated = classes_of(self.data)
        if stated is not None:
            names, ordered = stated
            self.found = map_classes(names, classes, self.labels, self.argument, ordered=ordered)
        return self.labels

    def batches(self, batch: int) -> Iterator[tuple[Tensor, Any]]:
        """Yields images as the model takes them, and labels as the data has them.

        Raises:
            ArgumentError: see `labelled_batches` and `ImageFormat`.
        """
        for images, labels in labelled_batches(
            self.data, self.argument, batch, None if self.format.spec is None else self.format.read
        ):
            yield self.format(images), labels

    def targets(self, labels: Any, classes: int) -> Tensor:
        """Turns the data's labels into the model's classes, int64 [n] on the CPU; after `match`.

        Raises:
            ArgumentError: they are not one class index, or one known name, for each image.
        """
        if isinstance(labels, list) and all(isinstance(label, str) for label in labels):
            return read_labels(self._named(labels, classes), self.argument)
        numbers = read_labels(labels, self.argument)
        if self.found is not None:
            return self.found.translate(numbers, self.argument)
        check_label_range(numbers, classes, self.argument)
        return numbers

    def multi_hot_targets(self, labels: Any, classes: int) -> Tensor:
        """The same for any number of classes per image, bool [n, C], from what `multi_hot` takes.

        Classes may be named, in a list for each image.

        Raises:
            ArgumentError: see `multi_hot`, or names that are not known.
        """
        names = [n for row in labels if isinstance(row, list | tuple) for n in row]
        if names and all(isinstance(name, str) for name in names):
            labels = [self._named(list(row), classes) for row in labels]
        elif self.found is not None:
            indices = list(self.found.classes.values())
            columns = multi_hot(labels, len(indices), self.argument)
            targets = torch.zeros(len(columns), classes, dtype=torch.bool)
            targets[:, indices] = columns
            return targets
        return multi_hot(labels, classes, self.argument)

    def unconfirmed_order(self) -> list[str]:
        """Says so if the order of the data's classes is assumed; `check_order` may confirm it."""
        if self.found is None or not self.found.assumed:
            return []
        return [
            f"{self.argument}: the names of the model's classes are not known: they are taken to "
            f"be in the order of the data's. Pass class_names"
        ]

    def _named(self, names: list[str], classes: int) -> list[int]:
        distinct = sorted(set(names))
        given = self.labels is not None and self.labels.given
        indices = class_indices(distinct, self.labels, classes, self.argument, names_first=given)
        by_name = dict(zip(distinct, indices, strict=True))
        return [by_name[name] for name in names]
