"""Loads exactly a model's weights from a file, or refuses; says what it had to choose."""

from __future__ import annotations

import re
import warnings
from collections import OrderedDict
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any
from weakref import WeakKeyDictionary

import torch
from torch import Tensor, nn
from torch.nn.parameter import is_lazy

from ...errors import CheckpointError, ModelError, UnlearningWarning, shorten
from ..parameters import saved_tensors, unwrap
from .layouts import (
    AVERAGED,
    Candidate,
    Needed,
    StateDict,
    asked_for,
    candidates,
    choose,
    half_fits,
    prefixes,
    problems,
    state_dicts,
    words,
)
from .reading import printable, read
from .renaming import renamed

_COMPILED = "_orig_mod."  # in names, by torch.compile


@dataclass(frozen=True)
class Origin:
    """Where a model's weights were read.

    Attributes:
        file: the file.
        entry: the keys and the prefix in it, joined by ``::``; "" for its top level.
        others: entries with other weights that would have fitted.
        left_out: what lies beside the weights and was not read, by the first part of its names.
        renamed: by what the names were translated, if they were.
        arch: the architecture that the file states, if any.
        notes: what the user should know, in words.
    """

    file: str
    entry: str = ""
    others: tuple[str, ...] = ()
    left_out: tuple[str, ...] = ()
    renamed: str = ""
    arch: str = ""
    notes: tuple[str, ...] = ()

    def to_dict(self) -> dict[str, Any]:
        return asdict(self)


_ORIGINS: WeakKeyDictionary[nn.Module, tuple[int, Origin]] = WeakKeyDictionary()


def origin(model: nn.Module) -> Origin | None:
    """Where `load_into` read the weights of ``model``; None if they have changed since."""
    model = unwrap(model)
    writes, found = _ORIGINS.get(model, (0, None))
    return found if found is not None and writes == _count_writes(model) else None


def _count_writes(model: nn.Module) -> int:
    """Rises whenever a tensor of ``model`` is written in place."""
    return sum(tensor._version for tensor in saved_tensors(model).values())


def load_weights(path: str | Path) -> dict[str, Tensor]:
    """Reads the state dict of a weights file, whatever model it is for.

    The prefixes of DataParallel ("module.") and torch.compile ("_orig_mod.") are removed.

    Args:
        path: a file or folder; ``path::entry`` chooses one of several state dicts in it.

    Raises:
        CheckpointError: missing, damaged, an unsafe pickle, without a state dict, or with several.
    """
    where, entry = _split(path)
    content, where = read(where)
    found = _found(content, where)
    whole = [Candidate(f.keys, "", f.tensors, ()) for f in found]
    chosen, _ = choose(asked_for(whole, entry) if entry else whole)
    if chosen is None:
        raise CheckpointError(f"weights: {_several(path, whole)}")
    tensors = chosen.tensors
    while tensors and all(name.startswith("module.") for name in tensors):
        tensors = {name.removeprefix("module."): t for name, t in tensors.items()}
    return tensors


def load_into(model: nn.Module, path: str | Path, keep_dtype: bool = False) -> Origin:
    """Loads a weights file into ``model``; all names and shapes must match.

    Prefixes that all names share, or that say no more than "model.", are removed. If the file
    stores its weights in another floating-point dtype, the float32 model takes that dtype.
    A choice among several weights, and what was left out, is reported by an `UnlearningWarning`.

    Args:
        model: the model, of which only values and dtype are changed.
        path: a safetensors or torch file, the index of a sharded one, or a folder that holds one;
            ``path::entry`` chooses among several state dicts in it ("last.pt::state_dict_ema").
        keep_dtype: the model keeps its dtype, whatever that of the file is.

    Returns:
        where the weights were, also kept for `origin`.

    Raises:
        CheckpointError: the file can't be read, the weights don't fit, or two that fit are equally
            likely; the model is unchanged.
        ModelError: the model has lazy layers, whose shapes are unknown, or quantised ones.
    """
    where, entry = _split(path)
    content, where = read(where)
    found, model = _found(content, where), unwrap(model)
    names, needed = _needed(model)
    fitting, by = _fitting(model, found, needed, entry)
    if not fitting:
        raise CheckpointError(_refusal(path, where, model, found, needed, entry))
    if not entry and not by:
        _check_rest(where, model, found, needed, fitting)
    chosen, others = choose(fitting)
    if chosen is None:
        raise CheckpointError(f"weights: {_several(path, others)}")
    notes = _notes(where, content, found, chosen, others, fitting, by)
    if not keep_dtype:
        notes += _take_dtype(model, chosen.tensors.values(), where)
    named = {names[n]: t for n, t in chosen.tensors.items()}
    try:
        model.load_state_dict(_with_versions(model, named), strict=False)
    except (RuntimeError, ValueError) as error:
        raise CheckpointError(
            f"weights: {where} can't be loaded ({printable(str(error))})."
        ) from error
    arch = content.get("arch") if isinstance(content, dict) else None
    result = Origin(
        str(where), chosen.label, tuple(c.label for c in others),
        tuple(_left_out(chosen, fitting)), by, arch if isinstance(arch, str) else "", tuple(notes),
    )  # fmt: skip
    _ORIGINS[model] = _count_writes(model), result
    for note in notes:
        warnings.warn(f"weights: {note}", UnlearningWarning, stacklevel=2)
    return result


def _with_versions(model: nn.Module, tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    """``tensors`` with the versions of the model's modules, without which MNASNet loads nothing."""
    state = OrderedDict(tensors)
    state._metadata = model.state_dict()._metadata  # type: ignore[attr-defined]
    return state


def _split(path: str | Path) -> tuple[Path, str]:
    """Splits "file::entry"; a file whose name holds "::" is no such thing."""
    if Path(path).exists():
        return Path(path), ""
    file, _, entry = str(path).partition("::")
    return Path(file), entry


def _found(content: Any, where: Path) -> list[StateDict]:
    if not isinstance(content, dict):
        raise CheckpointError(
            f"weights: {where} holds a {type(content).__name__}, not a dict of tensors. "
            f"Save model.state_dict()."
        )
    found = list(state_dicts(content))
    if not found:
        raise CheckpointError(
            f"weights: {where} holds no tensors by name, but entries that are not tensors "
            f"({printable(shorten(content, 3))}). Save model.state_dict()."
        )
    return found


def _needed(model: nn.Module) -> tuple[dict[str, str], Needed]:
    """The model's names by their short forms, without torch.compile's part, and its tensors."""
    own = saved_tensors(model)
    lazy = [name for name, tensor in own.items() if is_lazy(tensor)]
    if lazy:
        raise ModelError(
            f"{shorten(lazy, 3)} belong to lazy layers, whose shapes are unknown",
            "Run one batch through the model before its weights are loaded.",
        )
    if others := model.state_dict().keys() - own.keys():
        raise ModelError(
            f"its state_dict() holds more than tensors ({shorten(sorted(others), 3)}), as that of "
            f"quantised layers does",
            "Build the float model, or load the weights in the factory.",
        )
    names = {name.replace(_COMPILED, ""): name for name in own}
    derived = {n: t for n, t in model.named_buffers() if n not in own}
    return names, Needed({short: own[name] for short, name in names.items()}, derived)


def _fitting(
    model: nn.Module, found: Sequence[StateDict], needed: Needed, entry: str
) -> tuple[list[Candidate], str]:
    """What fits, and by what its names were translated ("" for nothing)."""
    for by, dicts in _as_found_or_renamed(model, found, needed):
        fitting = [c for f in dicts for variant in needed.variants()
                   for c in candidates(f, variant, asked=bool(entry))]  # fmt: skip
        if entry:
            fitting = asked_for(fitting, entry)
        if fitting:
            return fitting, by
    return [], ""


def _as_found_or_renamed(
    model: nn.Module, found: Sequence[StateDict], needed: Needed
) -> Iterator[tuple[str, Sequence[StateDict]]]:
    yield "", found
    by_what: dict[str, list[StateDict]] = {}
    for one in found:
        for by, other in renamed(one, model, needed):
            by_what.setdefault(by, []).append(other)
    yield from by_what.items()


def _check_rest(
    where: Path, model: nn.Module, found: Sequence[StateDict], needed: Needed,
    fitting: list[Candidate],
) -> None:  # fmt: skip
    """Raises if other plain weights of the model are there, but are damaged or of a variant of it.

    What fits, such as averaged weights, is then not taken in their place unless it is asked for.
    """
    for one in found:
        for variant in needed.variants():
            for doubt in half_fits(one, variant, fitting):
                raise CheckpointError(
                    f"{_does_not_fit(where, model, found, needed, doubt)} What fits is under "
                    f"{_labels(fitting)}: choose it with FILE::ENTRY."
                )


def _refusal(
    path: str | Path, where: Path, model: nn.Module, found: Sequence[StateDict], needed: Needed,
    entry: str,
) -> str:  # fmt: skip
    """Says why nothing fits: of what comes closest, what is missing and what is unknown."""
    kind = type(model).__name__
    if entry:
        whole = [Candidate(f.keys, "", f.tensors, ()) for f in found]
        keys = [c.keys for c in asked_for(whole, entry)]
        if not keys:
            return (
                f"weights: {where} has nothing that fits {kind} under {entry!r}. It holds tensors "
                f"under {_labels(whole)}."
            )
        found = [f for f in found if f.keys in keys]
    hidden = [c for f in found for c in candidates(f, needed, asked=True)]
    if hidden:
        return (
            f"weights: {where} is not of {kind} alone, which fits under {_labels(hidden)}, beside "
            f"other tensors ({printable(shorten(hidden[0].left_out, 3))}). If that is what you "
            f"mean, pass {path}::{hidden[0].label}."
        )
    counts = [(n, Candidate(f.keys, p, {}, ())) for f in found
              for p, n in prefixes(f.tensors, needed).items()]  # fmt: skip
    none = (0, Candidate(found[0].keys, "", {}, ()))
    closest = max(counts, key=lambda item: item[0], default=none)[1]
    return _does_not_fit(where, model, found, needed, closest)


def _does_not_fit(
    where: Path, model: nn.Module, found: Sequence[StateDict], needed: Needed, closest: Candidate
) -> str:
    """Says what is missing, unknown or of another shape under ``closest``."""
    best = next(f for f in found if f.keys == closest.keys)
    variants = list(needed.variants())
    counts = [prefixes(best.tensors, v)[closest.prefix] for v in variants]
    variant = variants[counts.index(max(counts))]
    reasons = "; ".join(problems(best, variant, closest.prefix))
    at = f" (under {closest.label!r})" if closest.label else ""
    shard = "; this is one of several shards: pass their index or folder"
    part = shard if re.search(r"-\d{5}-of-\d{5}\.", where.name) else ""
    return (
        f"weights: {where} does not fit {type(model).__name__}{at}: {printable(reasons)}{part}. "
        f"Pass a checkpoint of this architecture with this number of classes."
    )


def _labels(found: Sequence[Candidate]) -> str:
    return printable(shorten((repr(c.label) if c.label else "the top level" for c in found), 6))


def _several(path: str | Path, found: Sequence[Candidate]) -> str:
    if not found:
        return f"{path} has no such entry."
    named = next((c.label for c in found if c.label), "")
    return (
        f"{path} holds different weights under {_labels(found)}, and nothing says which are meant. "
        f"Choose, as in {str(path).partition('::')[0]}::{printable(named)}."
    )


def _notes(
    where: Path, content: dict[Any, Any], found: Sequence[StateDict], chosen: Candidate,
    others: Sequence[Candidate], fitting: Sequence[Candidate], by: str,
) -> list[str]:  # fmt: skip
    """What the user should know about the choice, in words."""
    notes = []
    taken = {c.keys for c in fitting}
    if others:
        notes.append(
            f"{where} holds several weights. Those under {_labels([chosen])} were taken, not "
            f"those under {_labels(others)}; choose with FILE::ENTRY."
        )
    elif not chosen.plain and not chosen.averaged:
        notes.append(f"those under {_labels([chosen])} in {where} were taken.")
    elif not chosen.plain:
        rest = (Candidate(f.keys, "", {}, ()) for f in found if f.keys not in taken)
        if unfit := [c for c in rest if c.plain and len(c.keys) >= len(chosen.keys)]:
            notes.append(
                f"those under {_labels([chosen])} in {where} were taken; those under "
                f"{_labels(unfit)} are of another model."
            )
    averaged = [c for c in (Candidate(f.keys, "", {}, ()) for f in found) if c.averaged]
    unread = [c.label for c in averaged if c.keys not in taken]
    lists = {str(k) for k, v in content.items() if words(str(k)) & AVERAGED and _holds_tensors(v)}
    unread += sorted(lists - {c.keys[0] for c in averaged})
    if unread:
        notes.append(f"{printable(shorten(unread))} in {where} holds no weights that fit by name.")
    if left := _left_out(chosen, fitting):
        notes.append(f"left out of {where}: {printable(shorten(left))}.")
    if by:
        notes.append(f"the names in {where} were translated ({by}).")
    return notes


def _left_out(chosen: Candidate, fitting: Sequence[Candidate]) -> list[str]:
    """What lies beside the chosen weights and is no copy of them, by the first part of its name."""
    own = {name.partition(".")[0] for name in chosen.tensors}  # profilers add to these
    copies = tuple(c.prefix for c in fitting if c.keys == chosen.keys and c.prefix)
    left = set()
    for name in chosen.left_out:
        inside = name.startswith(chosen.prefix)
        group = (name.removeprefix(chosen.prefix) if inside else name).partition(".")[0]
        if not (group in own if inside else name.startswith(copies)):
            left.add(group)
    return sorted(left)


def _holds_tensors(value: Any, depth: int = 3) -> bool:
    if isinstance(value, dict):
        value = list(value.values())
    if isinstance(value, list | tuple) and depth:
        return any(_holds_tensors(v, depth - 1) for v in value)
    return isinstance(value, Tensor)


def _take_dtype(model: nn.Module, tensors: Any, where: Path) -> list[str]:
    """Turns a float32 model into the one floating-point dtype of the file, if it has one."""
    of_file = {t.dtype for t in tensors if t.is_floating_point()}
    own = {t.dtype for t in saved_tensors(model).values() if t.is_floating_point()}
    if of_file == own or not of_file:
        return []
    if own == {torch.float32} and len(of_file) == 1:
        model.to(*of_file)
        return []
    stored = shorten(sorted(str(d).removeprefix("torch.") for d in of_file))
    kept = shorten(sorted(str(d).removeprefix("torch.") for d in own))
    return [f"{where} stores {stored}; the model stays {kept}, and so will what is written."]
