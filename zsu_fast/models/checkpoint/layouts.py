"""Finds a model's weights among what a file holds: under which keys, behind which prefix.

A file may hold several state dicts (raw and averaged weights, an optimiser's state), nested and
with prefixes. Only what has every tensor of the model, in its shape, is taken; if that leaves a
choice, it is made by the rules of `choose`, and said.
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

_COMPILED = "_orig_mod."  # in names, by torch.compile
_DEPTH = 5  # of nested dicts
# Words of which the keys and prefixes of plain weights consist ("model_state_dict", "net").
_PLAIN = {"state", "dict", "model", "net", "network", "module", "weights", "params", "parameters",
          "checkpoint", "ckpt", "classifier"}  # fmt: skip
AVERAGED = {"ema", "swa", "avg", "average", "averaged", "polyak", "shadow", "moving"}
# Words for what training scripts keep beside a model, in the state dict of both.
_BESIDE = {"criterion", "loss", "losses", "metric", "metrics", "acc", "accuracy", "auroc", "f1",
           "averaged", "ema", "rng", "step", "steps", "epoch", "iteration"}  # fmt: skip
_PROFILED = ("total_ops", "total_params")  # buffers that the profiler thop leaves behind
_NOT_WEIGHTS = re.compile(
    r"(^|_)(optim\w*|sched\w*|scaler|rng|grads?|gradients?|momentum|exp_avg|fisher|masks?)(_|$)",
    re.IGNORECASE,
)


@dataclass(frozen=True)
class StateDict:
    """Tensors by name that lie together in a file, and the keys that lead there."""

    keys: tuple[str, ...]
    tensors: dict[str, Tensor]


@dataclass(frozen=True)
class Needed:
    """What a model asks for, by its names without those of torch.compile.

    Attributes:
        tensors: those in ``state_dict()``.
        derived: non-persistent buffers, which older versions of a model may have saved.
        start: what was removed from the start of every name (`without_prefix`).
    """

    tensors: dict[str, Tensor]
    derived: dict[str, Tensor] = field(default_factory=dict)
    start: str = ""

    @property
    def required(self) -> set[str]:
        """The names that a file must have; torch itself starts missing counters at 0."""
        return {n for n in self.tensors if not n.endswith("num_batches_tracked")}

    def variants(self) -> Iterator[Needed]:
        """Itself, and what it is without prefixes that the model has and a file may lack."""
        variant: Needed | None = self
        while variant is not None:
            yield variant
            variant = variant.without_prefix()

    def without_prefix(self) -> Needed | None:
        """The same by names without the first part, if that is the same in all of them."""
        start = next(iter(self.tensors), "").partition(".")[0] + "."
        if not all(name.startswith(start) for name in self.tensors):
            return None
        tensors, derived = (
            {n.removeprefix(start): t for n, t in named.items()}
            for named in (self.tensors, self.derived)
        )
        return Needed(tensors, derived, self.start + start)


@dataclass(frozen=True)
class Candidate:
    """Tensors of a file that fit a model.

    Attributes:
        keys: of the dicts in which they lie.
        prefix: of their names in the file; "" or ends with a dot.
        tensors: by the model's names, in the order of the file.
        left_out: names in the same dict that the model has no use for.
    """

    keys: tuple[str, ...]
    prefix: str
    tensors: dict[str, Tensor]
    left_out: tuple[str, ...]

    @property
    def label(self) -> str:
        """How to ask for it after ``::``."""
        return "::".join((*self.keys, *filter(None, [self.prefix.rstrip(".")])))

    @property
    def parts(self) -> list[str]:
        return [part for key in self.keys for part in key.split(".")] + [
            part for part in self.prefix.split(".") if part
        ]

    @property
    def plain(self) -> bool:
        """Whether its keys and prefix say nothing but that these are weights."""
        return all(words(part) <= _PLAIN for part in self.parts)

    @property
    def averaged(self) -> bool:
        """Whether its keys or prefix say that these are averaged weights (EMA, SWA)."""
        return any(words(part) & AVERAGED for part in self.parts)

    def same(self, other: Candidate) -> bool:
        return self.tensors.keys() == other.tensors.keys() and all(
            t.dtype == other.tensors[n].dtype and torch.equal(t, other.tensors[n])
            for n, t in self.tensors.items()
        )


def words(name: str) -> set[str]:
    """The words of a key: "modelEma_stateDict" -> {model, ema, state, dict}."""
    return set(re.sub(r"([a-z])([A-Z])", r"\1_\2", name).lower().replace("-", "_").split("_"))


def state_dicts(content: Any, keys: tuple[str, ...] = ()) -> Iterator[StateDict]:
    """Yields every dict with tensors in ``content``, outer ones first; not those of optimisers."""
    if not isinstance(content, Mapping):
        return
    tensors = {str(k).replace(_COMPILED, ""): v.detach() for k, v in content.items()
               if isinstance(v, Tensor)}  # fmt: skip
    if tensors:
        yield StateDict(keys, tensors)
    if len(keys) < _DEPTH:
        for key, value in content.items():
            if not _NOT_WEIGHTS.search(str(key)):
                yield from state_dicts(value, (*keys, str(key)))


def candidates(found: StateDict, needed: Needed, asked: bool = False) -> list[Candidate]:
    """Returns the ways in which ``found`` fits the model, by prefix.

    If other tensors lie beside those behind a prefix, the prefix must consist of common words, as
    "model." does: behind "encoder." may lie a part of another model.

    Args:
        found: a state dict of the file.
        needed: what the model asks for.
        asked: whether the user chose this entry; then any prefix will do.
    """
    taken = []
    for prefix in complete_prefixes(found.tensors, needed):
        if problems(found, needed, prefix):
            continue
        names = {prefix + n: needed.start + n for n in needed.tensors}
        tensors = {names[n]: t for n, t in found.tensors.items() if n in names}
        left = tuple(n for n in found.tensors if n not in names)
        candidate = Candidate(found.keys, prefix, tensors, left)
        shared = not needed.start and all(n.startswith(prefix) or _is_beside(n) for n in left)
        if asked or shared or candidate.averaged or _is_plain(prefix):
            taken.append(candidate)
    return taken


def _is_beside(name: str) -> bool:
    return bool(words(name.partition(".")[0]) & _BESIDE)


def _is_plain(prefix: str) -> bool:
    return all(words(part) <= _PLAIN for part in prefix.split(".") if part)


def prefixes(names: Iterable[str], needed: Needed) -> Counter[str]:
    """Counts the model's names that lie behind each prefix."""
    counts = Counter[str]()
    for name in names:
        start = 0
        while True:
            if name[start:] in needed.tensors:
                counts[name[:start]] += 1
            start = name.find(".", start) + 1
            if not start:
                break
    return counts


def complete_prefixes(named: Mapping[str, Tensor], needed: Needed) -> list[str]:
    """The prefixes behind which all names of the model lie, shortest first."""
    required = needed.required
    counts = prefixes(named, needed)
    return sorted(
        (p for p, n in counts.items()
         if n >= len(required) and all(p + name in named for name in required)), key=len,
    )  # fmt: skip


def problems(found: StateDict, needed: Needed, prefix: str) -> list[str]:
    """Says why the tensors behind ``prefix`` don't fit the model; [] if they do."""
    inside = {n.removeprefix(prefix): t for n, t in found.tensors.items() if n.startswith(prefix)}
    missing = sorted(needed.required - inside.keys())
    misfit = [_misfit(n, inside[n], needed.tensors[n]) for n in sorted(inside)
              if n in needed.tensors]  # fmt: skip
    unknown = _unknown(inside, needed)
    reasons = [f"missing {missing[:3]}"] if missing else []
    reasons += [f"unknown {unknown[:3]}"] if unknown else []
    return reasons + [text for text in misfit if text][:3]


def _misfit(name: str, tensor: Tensor, own: Tensor) -> str:
    if tensor.shape != own.shape:
        return f"{name} is {tuple(tensor.shape)}, the model needs {tuple(own.shape)}"
    if tensor.layout != torch.strided or tensor.is_quantized:
        return f"{name} is sparse or quantised"
    if tensor.dtype == own.dtype or (
        tensor.is_floating_point() and own.is_floating_point() and tensor.element_size() > 1
    ):
        return ""
    exact = not own.is_floating_point() and not own.is_complex() and not tensor.is_complex()
    if exact and torch.equal(tensor.to(own.dtype).to(tensor.dtype), tensor):
        return ""  # a counter or an index, saved as float
    return f"{name} is {_short(tensor.dtype)}, the model needs {_short(own.dtype)}"


def _short(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")


def _unknown(inside: Mapping[str, Tensor], needed: Needed) -> list[str]:
    """Names that a file of this model would not have.

    It may have losses, metrics, another copy of the whole model (averaged weights), what a profiler
    left, and buffers that the model computes by itself.
    """
    own = {name.partition(".")[0] for name in needed.tensors}
    others = [n for n in inside if n not in needed.tensors]
    copies = tuple(p for p in complete_prefixes(inside, needed) if p) if others else ()
    unknown = []
    for name in others:
        beside = _is_beside(name) or name.startswith(copies)
        derived = name in needed.derived and torch.equal(inside[name], needed.derived[name].cpu())
        profiled = name.rpartition(".")[2] in _PROFILED
        if not derived and not profiled and (name.partition(".")[0] in own or not beside):
            unknown.append(name)
    return sorted(unknown)


def choose(found: list[Candidate]) -> tuple[Candidate | None, list[Candidate]]:
    """Chooses among candidates, and returns it with those that hold other weights.

    Plain names come before others, and averaged weights (EMA, SWA) last. None: two are equally
    good, and hold different weights.
    """
    distinct: list[Candidate] = []
    for candidate in found:
        if not any(candidate.same(other) for other in distinct):
            distinct.append(candidate)
    raw = [c for c in distinct if not c.averaged]
    best = [c for c in raw if c.plain] or raw or distinct
    if len(best) != 1:
        return None, distinct
    return best[0], [c for c in distinct if c is not best[0]]


def half_fits(found: StateDict, needed: Needed, fitting: list[Candidate]) -> list[Candidate]:
    """What claims to be plain weights of the model in ``found``, but does not fit it."""
    read = [found.tensors.keys() - set(c.left_out) for c in fitting if c.keys == found.keys]
    half = []
    for prefix, count in prefixes(found.tensors, needed).items():
        names = {prefix + n for n in needed.tensors} & found.tensors.keys()
        if 2 * count >= len(needed.required) and not any(names <= whole for whole in read):
            half.append(Candidate(found.keys, prefix, {}, ()))
    return [c for c in half if c.plain]


def asked_for(found: list[Candidate], entry: str) -> list[Candidate]:
    """The candidates that ``entry`` (keys and a prefix, joined by ``::``) names."""

    def within(label: str) -> bool:
        return f".{entry.replace('::', '.').strip('.')}." in f".{label.replace('::', '.')}."

    return (
        [c for c in found if c.label == entry]
        or [c for c in found if c.label.startswith(f"{entry}::")]
        or [c for c in found if within("::".join(c.keys))]
        or [c for c in found if within(c.label)]
    )
