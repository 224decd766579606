"""Numbers and names of classes that a model holds besides its weights, for fewer classes.

Known are the attributes of torchvision's and timm's models, timm's ``pretrained_cfg``, the config
of transformers, and the usual names in people's own models.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, MutableMapping, Sequence
from typing import Any

from torch import nn

_COUNTS = (
    "num_classes", "num_labels", "n_classes", "nb_classes", "num_class", "n_class", "class_num",
    "classes",
)  # fmt: skip
# Of the modules that own a cut tensor only: elsewhere, they may have the same value by chance.
_SIZES = ("out_features", "out_channels", "num_features")
_NAMES = ("class_names", "label_names", "labels", "class_labels", "categories", "classes")
_INDEX_TO_NAME = ("id2label", "idx_to_class", *_NAMES)
_NAME_TO_INDEX = ("label2id", "class_to_idx")
_CONTAINERS = (
    "config", "pretrained_cfg", "default_cfg", "_model_args", "hparams", "cfg", "args",
)  # fmt: skip


def renumber(
    model: nn.Module, classes: int, kept: Sequence[int], owners: Iterable[nn.Module]
) -> None:
    """Updates the attributes of ``model`` that count or name its classes, in place.

    Args:
        model: its weights have been cut.
        classes: the number of classes before.
        kept: the old index of each class that is left.
        owners: the modules of ``model`` whose tensors were cut.
    """
    for owner in owners:
        _replace_counts(vars(owner), _SIZES, classes, len(kept))
    for values in _attributes(model):
        _replace_counts(values, _COUNTS, classes, len(kept))
        for key in (*_INDEX_TO_NAME, *_NAME_TO_INDEX):
            if key in values:
                values[key] = _renumbered(key, values[key], classes, kept)
        if isinstance(names := values.get("label_descriptions"), dict):
            _drop_descriptions(values, names)
        if "architecture" in values:  # timm's: its labels are those of the rows from here on
            values.pop("label_offset", None)


def _attributes(model: nn.Module) -> Iterator[MutableMapping[str, Any]]:
    """The attributes of each module, and those of its configurations, each once."""
    seen: set[int] = set()
    for module in model.modules():
        own = vars(module)
        yield own
        for key in _CONTAINERS:
            held = own.get(key)
            values = held if isinstance(held, dict) else getattr(held, "__dict__", None)
            if isinstance(values, dict) and id(values) not in seen:
                seen.add(id(values))
                yield values


def _replace_counts(
    values: MutableMapping[str, Any], keys: Sequence[str], classes: int, left: int
) -> None:
    for key in keys:
        if type(values.get(key)) is int and values[key] == classes:
            values[key] = left


def _renumbered(key: str, value: Any, classes: int, kept: Sequence[int]) -> Any:
    """``value`` for the kept classes, if it is one value per class; else ``value`` itself."""
    if isinstance(value, dict):
        if key in _NAME_TO_INDEX:
            new = {old: index for index, old in enumerate(kept)}
            return {name: new[i] for name, i in value.items() if i in new}
        as_text = any(isinstance(i, str) for i in value)  # as read from JSON
        found = ((index, str(old) if as_text else old) for index, old in enumerate(kept))
        return {str(i) if as_text else i: value[old] for i, old in found if old in value}
    if isinstance(value, list | tuple) and len(value) == classes:
        return type(value)([value[old] for old in kept])
    return value


def _drop_descriptions(values: MutableMapping[str, Any], descriptions: dict[Any, Any]) -> None:
    """timm describes labels by name: drops the descriptions of names that are not left."""
    names = values.get("label_names")
    if names:
        left = set(names.values() if isinstance(names, dict) else names)
        values["label_descriptions"] = {n: d for n, d in descriptions.items() if n in left}
