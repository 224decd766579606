"""Holds the numbering of the data's classes against the model's predictions."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Sequence

import torch
from torch import Tensor

from ..errors import ArgumentError, shorten
from .data_classes import ClassMap

# A numbering is doubted where a good model of the right one would predict like this with a
# probability of at most this; see `_Counts.mistaken`.
_CHANCE = 1e-3
# Share of its own images that are predicted as a class whose images bear another number.
_HARDLY = 0.1


def check_order(
    predictions: Tensor, labels: Tensor, classes: int, forget: Sequence[int], found: ClassMap | None
) -> str:
    """Holds the numbering of the data's classes against the model's predictions.

    In the right order, a class's images are mostly predicted as that class, unless it was to be
    forgotten.

    Args:
        predictions, labels: of the images, int64 [N] on the CPU.
        classes: the number of logits.
        forget: the classes that were to be forgotten; predictions as another of them count.
        found: the classes of the data; None if the labels are plain numbers.

    Returns:
        A warning if the labels look like those of another numbering, else "".

    Raises:
        ArgumentError: the order was assumed, and predictions do not confirm it; or the labels are
            off by one.
    """
    counts = _Counts(predictions, labels)
    if found is None or not found.assumed:
        return _numbering_problem(counts, set(forget))
    _check_assumed(counts, classes, set(forget), list(found.classes))
    return ""


class _Counts:
    """How often the images of each label are predicted as each class.

    Attributes:
        of: label -> predicted class -> number of images, for labels that occur, sorted.
        top: label -> the most frequent prediction; of equally frequent ones, the right one.
    """

    def __init__(self, predictions: Tensor, labels: Tensor) -> None:
        self.of: dict[int, dict[int, int]] = {}
        pairs, numbers = torch.stack([labels, predictions]).unique(dim=1, return_counts=True)
        for label, predicted, count in zip(*pairs.tolist(), numbers.tolist(), strict=True):
            self.of.setdefault(label, {})[predicted] = count
        self.top = {c: max(row, key=lambda p: (row[p], p == c)) for c, row in self.of.items()}

    def share(self, label: int, predicted: int) -> float:
        """The share of the images of ``label`` that are predicted as ``predicted``."""
        return self.of[label].get(predicted, 0) / sum(self.of[label].values())

    def clear(self) -> dict[int, int]:
        """Label -> the class that more than half of its images are predicted as."""
        return {c: p for c, p in self.top.items() if self.share(c, p) > 0.5}

    def mistaken(self, label: int) -> float:
        """How probable it is at most to be wrong in saying that ``label`` is not its class.

        The sign test of the most frequent prediction against the label's own, times the number of
        predictions that it was the most frequent of.
        """
        row = self.of[label]
        own = row.get(label, 0)
        return min(1.0, len(row) * _at_least(row[self.top[label]], own))

    def bound(self, labels: Sequence[int]) -> float:
        """`mistaken` of all of ``labels`` at once."""
        return math.prod(self.mistaken(label) for label in labels)


def _at_least(wins: int, losses: int) -> float:
    """The probability of that many wins, or more, in tosses of a fair coin."""
    tosses = wins + losses
    return sum(math.comb(tosses, k) for k in range(wins, tosses + 1)) / 2**tosses


def _check_assumed(
    counts: _Counts, classes: int, forgotten: set[int], names: Sequence[str]
) -> None:
    """Refuses an assumed order that the predictions do not confirm."""
    top = counts.top
    retained = [c for c in counts.of if c not in forgotten]
    lost = [c for c in counts.of if c in forgotten and top[c] != c]
    # Where all retained classes have images, those of a forgotten one can't be of another class,
    # unless they are more clearly of that class than its own.
    complete = len(retained) == classes - len(forgotten)
    wrong = [c for c in retained if top[c] != c] + [
        c for c in lost
        if not complete or top[c] in forgotten
        or counts.share(c, top[c]) > counts.share(top[c], top[c])
    ]  # fmt: skip
    if not wrong:
        return
    raise ArgumentError(
        "data",
        f"the names of the model's classes are not known, and in the order of the data's classes "
        f"the model predicts most images of {names[wrong[0]]!r} (class {wrong[0]}) as class "
        f"{top[wrong[0]]}; {len(wrong)} of {len(counts.of)} classes differ like this",
        "Pass the names of the model's classes in the order of its logits (class_names=, "
        "--class-names); if they are in this order, pass them as they are, or --class-names "
        "sorted.",
    )


def _numbering_problem(counts: _Counts, forgotten: set[int]) -> str:
    """A warning if classes are consistently predicted as another one each, else "".

    Raises:
        ArgumentError: most are, and that is the next class, or the one before, each time.
    """
    clear = counts.clear()
    claims = Counter(clear.values())
    # of classes that were confused, rather than numbered otherwise, several end in the same one
    moved = {c: p for c, p in clear.items() if p != c and claims[p] == 1}
    retained = [c for c in counts.of if c not in forgotten]
    most = {c: p for c, p in moved.items() if c not in forgotten}
    if len(most) >= 2 and 2 * len(most) >= len(retained) and counts.bound([*most]) <= _CHANCE:
        label, predicted = next(iter(most.items()))
        text = (
            f"most images of class {label} are predicted as class {predicted}, and {len(most)} of "
            f"{len(retained)} retained classes are like this"
        )
        _refuse_shift(most, text)
        return f"the labels look like those of another numbering: {text}. Pass the model's own"
    pairs = _exchanged(counts, moved, retained)
    if not pairs:
        return ""
    listed = shorten((f"{c} as {p} ({counts.share(c, p):.0%})" for c, p in pairs.items()), 6)
    return (
        f"the labels of some classes look exchanged: the model predicts most images labelled "
        f"{listed}, and hardly any of those labelled {shorten(pairs.values(), 6)} as what they are "
        f"labelled, though it is right on most images of the other classes. If the data numbers "
        f"these classes otherwise, pass the model's own numbers, or its classes by name"
    )


def _refuse_shift(moved: dict[int, int], text: str) -> None:
    if {p - c for c, p in moved.items()} in ({1}, {-1}):
        raise ArgumentError(
            "data",
            f"the labels are off by one: {text}",
            "Number the classes as the model's logits, from 0, with a background class if the "
            "model has one; or pass the names of the model's classes (class_names=, "
            "--class-names).",
        )


def _exchanged(counts: _Counts, moved: dict[int, int], retained: Sequence[int]) -> dict[int, int]:
    """Labels that seem to be exchanged, in a model that is right on most other classes.

    Where two classes are confused, one of them is still predicted for its own images. So a class
    counts if its images are predicted as another one whose own images are not. The images of a
    class that was forgotten spread over others: there, a chain of such classes ends.
    """
    links = {
        c: p for c, p in moved.items()
        if p in counts.of and (p in moved or counts.share(p, p) <= _HARDLY)
    }  # fmt: skip
    found: dict[int, int] = {}
    for group in _chains(links):
        if counts.bound([*group]) <= _CHANCE:
            found |= {c: links[c] for c in group if c in links}
    others = [c for c in retained if c not in found and c not in found.values()]
    right = sum(counts.top[c] == c for c in others)
    return found if 2 * right > len(others) else {}


def _chains(links: dict[int, int]) -> list[list[int]]:
    """The classes of each chain or cycle of ``links``, in which no two have the same target."""
    starts = [c for c in links if c not in links.values()]
    groups, seen = [], set()
    for start in [*starts, *links]:
        if start in seen:
            continue
        group = [start]
        while (following := links.get(group[-1])) is not None and following != start:
            group.append(following)
        groups.append(group)
        seen.update(group)
    return groups
