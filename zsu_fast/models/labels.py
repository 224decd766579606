"""The names of a model's classes, and the classes that names mean.

Names come from the model itself (`known_labels`), from a file (`read_class_names`) or from the
caller (`resolve_labels`). `class_indices` turns names, WordNet ids and numbers into class indices.
It never guesses: what fits several classes, or none, is refused, and similar names are suggested.
"""

from __future__ import annotations

import difflib
import re
import warnings
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

from torch import nn

from ..errors import ArgumentError, UnlearningWarning, shorten
from .label_files import parse_class_names
from .label_set import Labels, check_number, loose_form, make_labels
from .stated_labels import known_labels

__all__ = [
    "Labels",
    "class_indices",
    "class_names",
    "known_labels",
    "read_class_names",
    "resolve_labels",
]

_NUMBER = re.compile(r"#?[0-9]+")
_NUMBERED = re.compile(r"[0-9]+[\s._:-]+(\D.*)")  # "0 - zero", "001.Black_footed_Albatross"


def class_names(model: nn.Module, classes: int | None = None) -> tuple[str, ...] | None:
    """Returns the names that the model itself states for its classes, or None; see `known_labels`.

    Args:
        model: a classifier.
        classes: the number of its logits; names of another number do not count. None: any number.
    """
    labels = known_labels(model, classes)
    return None if labels is None else labels.names


def read_class_names(path: str | Path, classes: int | None = None) -> Labels:
    """Reads the names of all classes, in the order of the logits, from a text or JSON file.

    Text has one class per line: a name, or an index and a name, or a WordNet id and a name. JSON is
    a list of names, a dict of indices and names (either way round), Keras's ``{"0": ["n01440764",
    "tench"], ...}``, or a transformers config with ``id2label``.

    Raises:
        ArgumentError: the file can't be read, or is not of one of these forms, or has another
            number of names than ``classes``.
    """
    return make_labels(parse_class_names(path), str(path), classes)


def resolve_labels(given: Any, model: nn.Module, classes: int) -> Labels | None:
    """Returns the labels to use: those ``given``, or else what the model states, or None.

    Args:
        given: None, a list or tuple of names, a dict of indices and names (either way round), the
            path of a file (see `read_class_names`), or `Labels`.
        model: a classifier.
        classes: the number of its logits.

    Raises:
        ArgumentError: ``given`` is none of these, or has another number of names than ``classes``.

    Warns:
        UnlearningWarning: the names are assumed (`Labels.assumed`), the model states another order
            of the same names, or nothing is known of 1,001 classes.
    """
    if isinstance(given, Labels):
        return check_number(given, classes)
    known = known_labels(model, classes)
    if given is None:
        if known is None and classes == 1001:
            warnings.warn(
                "the model has 1,001 logits, often ImageNet's classes behind a background class, "
                "as in TensorFlow: then class 0 is the background, and tench is 1, not 0. Class "
                "numbers count the logits; pass class_names to see what they are",
                UnlearningWarning,
                stacklevel=2,
            )
        if known is not None and known.assumed:
            warnings.warn(
                f"class_names: not given. The names {shorten(known.names, 2)} are assumed: "
                f"{known.assumed}. If it was trained on others, pass their names (class_names=, "
                f"--class-names)",
                UnlearningWarning,
                stacklevel=2,
            )
        return known
    if isinstance(given, str | Path):
        labels = read_class_names(given, classes)
    else:
        labels = make_labels(given, "class_names", classes)
    if known is not None:
        for index, name in enumerate(labels.names):
            if (elsewhere := known.find(name)) and index not in elsewhere:
                warnings.warn(
                    f"class_names: class {index} is {name!r} there, but class "
                    f"{shorten(sorted(elsewhere))} has this name in {known.source}; class_names "
                    f"counts",
                    UnlearningWarning,
                    stacklevel=2,
                )
                break
    return labels


def class_indices(
    entries: Iterable[str | int],
    names: Labels | Sequence[str] | None,
    classes: int,
    argument: str = "forget",
    *,
    names_first: bool = False,
) -> list[int]:
    """Returns the class index that each entry means, in the same order.

    Args:
        entries: ints, or texts: a name or synonym (another case, or underscores for spaces, if that
            fits one class only), a WordNet id, a number, "#" and a number, or a name in double
            quotes, which is never read as a number.
        names: of all classes, or None if they are not known.
        classes: the number of logits.
        argument: the name of the argument, for errors.
        names_first: whether a number that is also the name of another class means that class;
            otherwise it is refused.

    Raises:
        ArgumentError: an entry means no class or several ones.
    """
    labels = names
    if labels is not None and not isinstance(labels, Labels):
        labels = Labels(tuple(labels), "class_names")
    return [_class_index(entry, labels, classes, argument, names_first) for entry in entries]


def _class_index(
    entry: str | int, labels: Labels | None, classes: int, argument: str, names_first: bool
) -> int:
    text, quoted = str(entry).strip(), False
    if len(text) > 2 and text[0] == text[-1] == '"':
        text, quoted = text[1:-1].strip(), True
    found = set() if labels is None or isinstance(entry, int) else labels.find(text)
    if not found and labels is not None and (numbered := _NUMBERED.fullmatch(text)):
        found = labels.find(numbered[1])
    if isinstance(entry, int) or (_NUMBER.fullmatch(text) and not quoted):
        number = int(text.lstrip("#"))
        if not found or found == {number} or text.startswith("#"):
            if not 0 <= number < classes:
                raise ArgumentError(
                    argument,
                    f"got {text!r}: {number} is out of range, the model has {classes} logits",
                    f"Number the classes from 0 to {classes - 1}, as in the model's training.",
                )
            return number
        if not names_first:
            raise ArgumentError(
                argument,
                f"got {text!r}, which is the number of a class and the name of class "
                f"{shorten(sorted(found))} in {labels.source if labels else ''}",
                f"Write #{number} for the number, or another name of the class.",
            )
    if len(found) == 1:
        return next(iter(found))
    if labels is None:
        raise ArgumentError(
            argument,
            f"got {text!r}, and the names of the model's classes are not known",
            f"Pass class numbers from 0 to {classes - 1}, or the names of all classes "
            f"(class_names=, --class-names).",
        )
    if found:
        listed = shorten(f"{c} ({labels.names[c]})" for c in sorted(found))
        raise ArgumentError(
            argument, f"got {text!r}, which may be any of the classes {listed}", "Pass the number."
        )
    raise ArgumentError(
        argument,
        f"got {text!r}, which is no class in {labels.source}",
        f"{_suggest(text, labels)}Pass a name as it is written there, or numbers such as 1,2,3.",
    )


def _suggest(text: str, labels: Labels) -> str:
    close = difflib.get_close_matches(loose_form(text), labels.loose, 3, 0.6)
    names = {f"{labels.names[c]!r} ({c})": None for key in close for c in sorted(labels.loose[key])}
    return f"Did you mean {shorten(names, 3)}? " if names else ""
