"""Reads what a user types or points to: classes, numbers, labelled images."""

from __future__ import annotations

import re
import warnings
from pathlib import Path
from typing import Any

from torch import nn

from ..errors import ArgumentError, UnlearningWarning, shorten
from ..evaluation.data_classes import classes_of
from ..evaluation.image_format import ImageFormat
from ..models.input_spec import InputSpec
from ..models.labels import Labels, known_labels, read_class_names
from .demo import mnist_test
from .image_folder import image_folder
from .npz import read_npz

_CLASSES = "Pass 1,2,3 or 0-99, names where the model knows them, or a file that holds such text."


def parse_classes(text: str, labels: Labels | None = None) -> list[int | str]:
    """Reads classes from "1,2,3", "0-99", "tench, goldfish", a mix, or a file that holds such text.

    Numbers become ints, and everything else stays a name, for `check_forget`. In double quotes,
    anything is a name: ``"7"``, ``"maillot, tank suit"``. "#7" is a number in any case. In a file,
    lines separate as commas do.

    Args:
        text: what was typed.
        labels: the names of the model's classes: a number or range that is also one is refused.

    Raises:
        ArgumentError: no class is named, a range runs backwards, a number is also the name of
            another class, or the file can't be read.
    """
    path = Path(text)
    try:
        is_file = path.is_file()
    except (OSError, ValueError):  # longer than a file's name may be
        is_file = False
    try:
        content = path.read_text(encoding="utf-8-sig") if is_file else text
    except (OSError, ValueError) as error:
        raise ArgumentError("forget", f"{text} can't be read ({error})", _CLASSES) from error
    if re.fullmatch(r"[\d\s,-]*", content):
        content = ",".join(content.split())  # numbers may also be separated by spaces
    chosen: list[int | str] = []
    for part in re.findall(r'\s*("[^"]*"|[^,\n]+)', content):
        chosen.extend(_parse_class(part.strip(), labels, text))
    if not chosen:
        raise ArgumentError("forget", f"got {text!r}: no class is named", _CLASSES)
    return chosen


def _parse_class(part: str, labels: Labels | None, text: str) -> list[int | str]:
    found = re.fullmatch(r"(#?)(\d+)(?:-(\d+))?", part, re.ASCII)
    if found is None:
        return [part] if part else []
    low, high = int(found[2]), int(found[3] or found[2])
    if high < low:
        raise ArgumentError("forget", f"got {text!r}, in which {part!r} runs backwards", _CLASSES)
    named = set() if labels is None or found[1] else labels.find(part)
    if named - {low}:
        raise ArgumentError(
            "forget",
            f"got {part!r}, which is also the name of class {shorten(sorted(named))}",
            f'Write #{part} for the number, or "{part}" in double quotes for the name.',
        )
    return [*range(low, high + 1)]


def parse_numbers(name: str, text: str | None, kind: type[int] | type[float]) -> list[Any] | None:
    """Reads numbers separated by commas or "x"; None stays None.

    Raises:
        ArgumentError: the text of the argument ``name`` is anything else.
    """
    if text is None:
        return None
    try:
        return [kind(part) for part in text.replace("x", ",").split(",")]
    except ValueError as error:
        raise ArgumentError(
            name, f"got {text!r} ({error})", "Pass numbers separated by commas."
        ) from error


def parse_tail(text: str) -> str | int:
    return int(text) if text.isdigit() else text


def read_images(source: str, spec: InputSpec) -> Any:
    """Reads labelled images as a (images, labels) pair, or as a data loader of such pairs.

    Args:
        source: "demo" (2,000 MNIST images), an .npz file as for `read_npz`, or a folder as for
            `image_folder`.
        spec: describes the images that the model expects.

    Raises:
        ArgumentError: ``source`` is none of these, or can't be read.

    Warns:
        UnlearningWarning: what is assumed of the images.
    """
    if source == "demo":
        return mnist_test()
    path = Path(source)
    if path.suffix.casefold() == ".npz" and path.is_file():
        images, labels = read_npz(path)
        form = ImageFormat(spec)
        images = form(images)
        facts, doubts = form.assumptions()
        for note in facts + doubts:
            warnings.warn(note, UnlearningWarning, stacklevel=2)
        return images, labels
    if path.is_dir():
        if spec.assumed:
            warnings.warn(
                f"data: mean and std are a guess ({spec.source}): pass --mean and --std",
                UnlearningWarning,
                stacklevel=2,
            )
        return image_folder(path, spec)
    raise ArgumentError(
        "data", f"got {source!r}, neither a folder nor an .npz file", "Pass one, or 'demo'."
    )


def labels_of(class_names: Any, model: nn.Module) -> Labels | None:
    """The names of the model's classes: those of --class-names, or what the model states.

    Raises:
        ArgumentError: the file can't be read.
    """
    if isinstance(class_names, str):
        return read_class_names(class_names)
    return known_labels(model) if class_names is None else class_names


def folder_order(class_names: str | None, data: Any) -> Any:
    """The option --class-names: a file, or "sorted" for the names of the data's folders, in order.

    Raises:
        ArgumentError: "sorted", and the data has no folders.
    """
    if class_names != "sorted":
        return class_names
    found = None if data is None else classes_of(data)
    if found is None:
        raise ArgumentError(
            "class_names", "got 'sorted', and the data has no folders to sort", "Pass a file."
        )
    return Labels(tuple(found[0]), "the folders in sorted order", given=True)
