"""The names of all classes of a model, and which classes a text may mean."""

from __future__ import annotations

import re
import unicodedata
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any

from ..errors import ArgumentError

WORDNET_ID = re.compile(r"n\d{8}")


@dataclass(frozen=True)
class Labels:
    """The names of all classes of a model.

    Attributes:
        names: of class 0, 1, ...; synonyms are separated by commas ("tench, Tinca tinca").
        source: where they come from, in words.
        ids: WordNet ids of the classes, if the source lists them.
        given: whether the caller passed them, rather than the model.
        assumed: why these names are an assumption, in words; "" if the model or the caller states
            them.
    """

    names: tuple[str, ...]
    source: str
    ids: tuple[str, ...] = ()
    given: bool = False
    assumed: str = ""

    def __len__(self) -> int:
        return len(self.names)

    @property
    def has_background(self) -> bool:
        """Whether class 0 is a background class, as in TensorFlow's 1,001 ImageNet classes."""
        return loose_form(self.names[0]).strip("_ ") == "background"

    def named(self, classes: Iterable[int]) -> dict[str, str]:
        """Class indices, as text, and their names: what records and JSON output hold."""
        return {str(c): self.names[c] for c in classes}

    @cached_property
    def exact(self) -> dict[str, set[int]]:
        """Names and synonyms as they are written, with the classes that have them."""
        return _index(self.names, _exact)

    @cached_property
    def loose(self) -> dict[str, set[int]]:
        """As `exact`, in lower case, with spaces in place of underscores, hyphens and commas."""
        return _index(self.names, loose_form)

    @cached_property
    def wordnet(self) -> dict[str, set[int]]:
        """WordNet ids and their classes; {} if they are not known."""
        found: dict[str, set[int]] = {}
        for index, wordnet_id in enumerate(self.ids or _imagenet_ids(self)):
            if wordnet_id:
                found.setdefault(wordnet_id, set()).add(index)
        return found

    def find(self, text: str) -> set[int]:
        """The classes that ``text`` may mean: one if it is a name, several if it is ambiguous."""
        if WORDNET_ID.fullmatch(text) and text in self.wordnet:
            return self.wordnet[text]
        if found := self.exact.get(_exact(text)) or self.loose.get(loose_form(text)):
            return found
        parts = [self.exact.get(p) or self.loose.get(loose_form(p), set()) for p in _parts(text)]
        return set.intersection(*parts) if len(parts) > 1 and all(parts) else set()


def make_labels(names: Any, source: str, classes: int | None) -> Labels:
    """Makes `Labels` of the names in a list, or of a dict either way round.

    Raises:
        ArgumentError: they are not one name per class.
    """
    remedy = "Pass one name per class, in the order of the logits, or a dict of indices and names."
    subject = "it" if source == "class_names" else source
    if isinstance(names, Mapping):
        names = _ordered(names)
        if names is None:
            raise ArgumentError(
                "class_names", f"the indices in {subject} are not 0, 1, ... without gaps", remedy
            )
    if isinstance(names, str | bytes) or not isinstance(names, Iterable):
        raise ArgumentError("class_names", f"got a {type(names).__name__}", remedy)
    items = [", ".join(n) if isinstance(n, tuple) else n for n in names]
    if not items or not all(isinstance(n, str) and n.strip() for n in items):
        raise ArgumentError("class_names", f"{subject} does not hold one name per class", remedy)
    texts = [n.strip() for n in items]
    ids, found = tuple(n[:9] if WORDNET_ID.match(n) else "" for n in texts), tuple(texts)
    if all(ids):
        found = tuple(n[9:].strip(" ,:\t") or n[:9] for n in texts)
    return check_number(Labels(found, source, ids if all(ids) else (), given=True), classes)


def check_number(labels: Labels, classes: int | None) -> Labels:
    if classes is not None and len(labels) != classes:
        hint, subject = "", "it" if labels.source == "class_names" else labels.source
        if len(labels) == classes - 1:
            hint = " Is one of the logits a background class? Then name it too, at its place."
        raise ArgumentError(
            "class_names",
            f"{subject} has {len(labels)} names, the model has {classes} logits",
            f"Pass one name per logit, in their order.{hint}",
        )
    return labels


def _ordered(names: Mapping[Any, Any]) -> list[Any] | None:
    """The names in a dict, of indices and names or the reverse, in order; None with gaps."""
    if names and all(isinstance(v, int) and not isinstance(v, bool) for v in names.values()):
        if len(set(names.values())) < len(names):
            return None
        names = {index: name for name, index in names.items()}
    try:
        by_index = {int(key): name for key, name in names.items()}
    except (TypeError, ValueError):
        return None
    complete = len(by_index) == len(names) and sorted(by_index) == list(range(len(by_index)))
    return [by_index[i] for i in range(len(by_index))] if complete else None


def _parts(name: str) -> list[str]:
    return [part.strip() for part in unicodedata.normalize("NFC", name).split(",") if part.strip()]


def _exact(name: str) -> str:
    return ", ".join(_parts(name))


def loose_form(name: str) -> str:
    plain = unicodedata.normalize("NFKC", name).casefold()
    return re.sub(r"[\s,_-]+", " ", plain).strip()


def _index(names: Sequence[str], normal: Callable[[str], str]) -> dict[str, set[int]]:
    found: dict[str, set[int]] = {}
    for index, name in enumerate(names):
        for key in {normal(name), *map(normal, _parts(name))}:
            found.setdefault(key, set()).add(index)
    return found


def _imagenet_ids(labels: Labels) -> tuple[str, ...]:
    """The WordNet ids of names that are ImageNet's, "" where a name is not the id's.

    ImageNet's names alone are ambiguous (two classes are cranes), so they are compared in order,
    with or without a background class ahead.
    """
    start = 1 if labels.has_background else 0
    if len(labels) - start != 1000:
        return ()
    try:
        from timm.data.imagenet_info import ImageNetInfo
    except ImportError:
        return ()
    info = ImageNetInfo()
    ids = [""] * start
    for name, wordnet_id in zip(labels.names[start:], info.label_names(), strict=True):
        description = info.label_name_to_description(wordnet_id)
        known = {loose_form(n) for n in (description, *_parts(description))}
        own = {loose_form(n) for n in (name, *_parts(name))}
        # torchvision tells equal names apart in its own words, such as "crane bird"
        same = known & own or any(o.startswith(f"{k} ") for o in own for k in known)
        ids.append(wordnet_id if same else "")
    return tuple(ids)
