"""Compact classifiers: a model without the rows that its classifier holds for forgotten classes.

Which tensors have one row per class is measured: rows of the removed classes are changed, and only
the logits of these classes may change then. So several heads, a cosine classifier or a matrix of
text embeddings are found too, and a head that mixes its rows is refused.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.utils.parametrize import is_parametrized

from ..errors import ArgumentError, ModelError, shorten
from ..runtime.hooks import forward_pre_hooks
from .class_indices import check_forget
from .input_spec import noise_images
from .parameters import UNCOPYABLE, deep_copy, unwrap
from .prepare import prepare_model
from .renumber import renumber
from .wrapper import LogitsModel

_REMEDY = "Leave compact out: the forgotten classes keep their logits, which are never the largest."
_TOLERANCE = 1e-4  # relative: a product with fewer columns may add up in another order


@dataclass(frozen=True)
class Compaction:
    """Which classes a compact model keeps, and which of its tensors were cut.

    Attributes:
        classes: number of classes before.
        kept: the old index of each new class, ascending.
        tensors: name of each parameter or buffer with one row per class -> the dimension of these
            rows.
    """

    classes: int
    kept: tuple[int, ...]
    tensors: dict[str, int]

    @property
    def new_index(self) -> dict[int, int]:
        """Old index -> new index of each kept class."""
        return {old: new for new, old in enumerate(self.kept)}

    def to_dict(self) -> dict[str, Any]:
        """Returns plain values: ``classes_before``, ``classes``, ``new_index``, ``tensors``."""
        return {
            "classes_before": self.classes,
            "classes": len(self.kept),
            "new_index": {str(old): new for old, new in self.new_index.items()},
            "tensors": self.tensors,
        }

    @classmethod
    def from_dict(cls, values: Any) -> Compaction:
        """Reads `to_dict`.

        Raises:
            ValueError: it is malformed.
        """
        try:
            classes, tensors = values["classes_before"], dict(values["tensors"])
            new_index = {int(old): new for old, new in values["new_index"].items()}
        except (KeyError, TypeError, AttributeError) as error:
            raise ValueError(f"{type(error).__name__}: {error}") from error
        kept = tuple(new_index)
        if (
            not all(type(n) is int for n in (classes, *new_index.values(), *tensors.values()))
            or list(new_index.values()) != list(range(len(kept)))
            or list(kept) != sorted({c for c in kept if 0 <= c < classes})
            or not (kept and tensors)
            or not all(isinstance(n, str) and dim >= 0 for n, dim in tensors.items())
        ):
            raise ValueError("its numbers are not a map of classes")
        return cls(classes, kept, tensors)

    def after(self, earlier: Compaction | None) -> Compaction:
        """Both in one: ``earlier``, then this one."""
        if earlier is None:
            return self
        kept = tuple(earlier.kept[c] for c in self.kept)
        return Compaction(earlier.classes, kept, self.tensors)


def compact(
    model: nn.Module, forget: Any, *, input_shape: Sequence[int] | None = None,
    class_names: Sequence[str] | None = None,
) -> nn.Module:  # fmt: skip
    """Returns a copy of ``model`` whose classifier has no rows for the classes ``forget``.

    The retained classes keep their order and are numbered from 0. Their logits are the same up to
    rounding: a product with fewer columns may add up in another order (bit for bit where it does
    not). Log-probabilities and probabilities, which sum to 1, do so over the retained classes.
    ``num_classes``, ``num_labels``, ``id2label``, ``label_names``, ``out_features`` and the like
    are updated where they exist. Removing rows does not unlearn: call this on an unlearned model.

    Args:
        model: as for `unlearn`; it is not changed.
        forget: as for `unlearn`.
        input_shape: (channels, height, width); None: see `resolve_spec`.
        class_names: names of all classes of ``model``, for a model that does not know them, such as
            one of torchvision: the result gets those of the retained ones as its attribute
            ``class_names``.

    Raises:
        ArgumentError: an argument can't be used, or fewer than two classes would be left.
        ModelError: no tensor has one row per class that determines this class's logit alone; a
            further copy of such rows is not part of the computation; or the model can't be copied.
    """
    prepared = prepare_model(model, None, input_shape)
    removed = check_forget(forget, prepared.classes)
    if class_names is not None and len(class_names) != prepared.classes:
        raise ArgumentError(
            "class_names", f"got {len(class_names)} names for {prepared.classes} classes",
            "Pass one name for each class.",
        )  # fmt: skip
    images = noise_images(prepared.spec, 2).to(prepared.device)
    compaction = find_compaction(prepared.model, removed, images)
    result = deep_copy(model, UNCOPYABLE)
    cut(result, compaction)
    if class_names is not None:
        names = tuple(class_names[old] for old in compaction.kept)
        unwrap(result).class_names = names  # type: ignore[assignment]
    return result


def find_compaction(model: LogitsModel, removed: Sequence[int], images: Tensor) -> Compaction:
    """Finds the tensors to cut, and tries the cut on copies, in eval and in train mode.

    Args:
        model: from `working_copy`; it is not changed.
        removed: sorted indices of the classes to remove.
        images: two valid images.

    Raises:
        ModelError: as `compact`.
    """
    with torch.no_grad():
        classes = int(model(images).shape[1])
    kept = tuple(c for c in range(classes) if c not in set(removed))
    if len(kept) < 2:
        raise ModelError(
            f"compact=True would leave it a single logit, number {kept[0]}, which says nothing",
            _REMEDY,
        )
    probes = [p for p in (_Probe(model.module, images, kept, t) for t in (False, True)) if p.before]
    tensors, mixed, unused = _search(model.module, classes, images, probes)
    if not tensors:
        why = f"; {shorten(mixed, 3)} would fit, but other classes depend on it" if mixed else ""
        raise ModelError(
            f"it can't be compact: none of its tensors has one row for each of its {classes} "
            f"classes that determines this class's logit alone{why}",
            _remedy(model),
        )
    if unused:
        raise ModelError(
            f"it can't be compact: {shorten(unused, 3)} have a row for each of its {classes} "
            f"classes too, and don't take part in the computation, so it is unknown how to cut "
            f"them",
            "Remove these modules, such as auxiliary heads or the original behind an adapter, or "
            "leave compact out.",
        )
    found = Compaction(classes, kept, tensors)
    if not all(probe.confirms(found) for probe in probes):
        raise ModelError(
            f"it can't be compact: without the rows of the removed classes in "
            f"{shorten(tensors, 3)}, it does not run, or other logits change",
            _remedy(model),
        )
    return found


def _search(
    module: nn.Module, classes: int, images: Tensor, probes: Sequence[_Probe]
) -> tuple[dict[str, int], list[str], list[str]]:
    """The tensors with one row per class; those on which other classes depend; those not used."""
    tensors: dict[str, int] = {}
    mixed: list[str] = []
    idle: list[str] = []
    unused: list[str] = []
    for name, dim, ran in _candidates(module, classes, images):
        tries = (probe.effect(name, dim, sign) for probe in probes for sign in (1, -1))
        effect = next((found for found in tries if found != "none"), "none")
        if effect == "others":
            mixed.append(name)
        elif effect == "own":
            tensors.setdefault(name, dim)
        elif dim == 0:
            (idle if ran else unused).append(name)
    # noise may not reach a weight (all its inputs are 0 after a ReLU); the bias beside it shows it
    beside = {name.rpartition(".")[0] for name in tensors} - {""}
    for name in idle:
        if name.rpartition(".")[0] in beside and name not in mixed:
            tensors.setdefault(name, 0)
    return tensors, mixed, unused


def _remedy(model: nn.Module) -> str:
    if not any(is_parametrized(module) for module in model.modules()):
        return _REMEDY
    return f"{_REMEDY} Or remove the parametrization of the last layer first."


def cut(model: nn.Module, compaction: Compaction) -> None:
    """Removes the rows from ``model``, in place; updates its attributes (`renumber`).

    The cut tensors are new ones; ``requires_grad`` stays.

    Raises:
        ModelError: the model has other tensors; it is unchanged then.
    """
    model = unwrap(model)
    places: dict[str, tuple[nn.Module, Tensor]] = {}
    for name, dim in compaction.tensors.items():
        owner, tensor = _owner(model, name)
        size = tuple(tensor.shape) if tensor is not None else "missing"
        if tensor is None or tensor.ndim <= dim or tensor.shape[dim] != compaction.classes:
            raise ModelError(
                f"{name} is {size}, not one row for each of {compaction.classes} classes",
                "Pass the architecture and the number of classes that were made compact.",
            )
        places[name] = owner, tensor
    owners = []
    for name, (owner, tensor) in places.items():
        rows = torch.tensor(compaction.kept, device=tensor.device)
        value = tensor.detach().index_select(compaction.tensors[name], rows)
        _replace(model, tensor, value)
        owners.append(owner)
    renumber(model, compaction.classes, compaction.kept, owners)


def _replace(model: nn.Module, old: Tensor, new: Tensor) -> Tensor:
    """Puts ``new`` where ``model`` holds ``old``, so that tied tensors stay tied; returns it."""
    if isinstance(old, nn.Parameter) and not isinstance(new, nn.Parameter):
        new = nn.Parameter(new, old.requires_grad)
    for module in model.modules():
        for held in (module._parameters, module._buffers):
            for key in [k for k, tensor in held.items() if tensor is old]:
                held[key] = new  # type: ignore[assignment]
    return new


def _owner(model: nn.Module, name: str) -> tuple[nn.Module, Tensor | None]:
    path, _, leaf = name.rpartition(".")
    try:
        owner = model.get_submodule(path)
    except AttributeError:
        return model, None
    found = owner._parameters.get(leaf)
    return owner, owner._buffers.get(leaf) if found is None else found


def _candidates(module: nn.Module, classes: int, images: Tensor) -> Iterator[tuple[str, int, bool]]:
    """Names of tensors with a dimension of ``classes``, these dimensions, whether they are used.

    A tensor counts as used if its module was called, or if it has no forward of its own.
    """
    called = {module}

    def note(called_now: nn.Module, _args: Any, _kwargs: Any) -> None:
        called.add(called_now)

    with forward_pre_hooks(module.modules(), note), torch.no_grad():
        module(images)
    for name, tensor in [*module.named_parameters(), *module.named_buffers()]:
        if not tensor.is_floating_point():
            continue
        owner, _ = _owner(module, name)
        for dim in (d for d, size in enumerate(tensor.shape) if size == classes):
            yield name, dim, owner in called or ".parametrizations." in name


class _Probe:
    """The outputs of a copy of a model in one mode, and what changes them."""

    def __init__(
        self, module: nn.Module, images: Tensor, kept: Sequence[int], training: bool
    ) -> None:
        self.module = deep_copy(module, UNCOPYABLE).train(training)
        self.images, self.training = images, training
        self.kept = torch.tensor(kept, device=images.device)
        self.before: list[Tensor] | None = None
        try:
            self.before = self.run(self.module)
        except Exception:
            if not training:
                raise
            # in train mode, it may need labels or larger batches: eval mode has to do

    def run(self, module: nn.Module) -> list[Tensor]:
        """All tensors in the output, with the same random numbers each time."""
        devices = [self.images.device] if self.images.device.type == "cuda" else []
        with torch.random.fork_rng(devices), torch.no_grad():
            torch.manual_seed(0)
            return list(_tensors_in(module(self.images)))

    def effect(self, name: str, dim: int, sign: int) -> str:
        """Which outputs change with the removed rows: "none", "own" (of their classes), "others".

        A run that fails counts as "others".
        """
        tensor = _owner(self.module, name)[1]
        assert tensor is not None
        kept = set(self.kept.tolist())
        rows = torch.tensor([c for c in range(tensor.shape[dim]) if c not in kept])
        noise = torch.randn(tensor.shape, generator=torch.Generator().manual_seed(0))
        scale = sign * (float(tensor.detach().std(correction=0)) or 1.0)
        step = (scale * noise.index_select(dim, rows)).to(tensor)
        changed = tensor.detach().clone().index_add_(dim, rows.to(tensor.device), step)
        changed = _replace(self.module, tensor, changed)
        try:
            after = self.run(self.module)
        except Exception:  # noqa: BLE001  any error of the user's code
            return "others"
        finally:
            _replace(self.module, changed, tensor)
        return self._compare(after)

    def _compare(self, after: list[Tensor]) -> str:
        before, own = self.before or [], False
        if len(before) != len(after):
            return "others"
        for old, new in zip(before, after, strict=True):
            if old.shape != new.shape or not _close(self._kept(old), self._kept(new)):
                return "others"
            own = own or not torch.equal(old, new)
        return "own" if own else "none"

    def _kept(self, output: Tensor) -> Tensor:
        """The retained classes of an output; of probabilities, scaled to sum to 1 over them."""
        if output.ndim < 2 or output.shape[1] <= int(self.kept[-1]):
            return output
        part = output.index_select(1, self.kept)
        return _as_log_probabilities(part, output)

    def confirms(self, compaction: Compaction) -> bool:
        """Whether a copy that is cut gives the same outputs for the retained classes."""
        part = deep_copy(self.module, UNCOPYABLE)
        cut(part, compaction)
        try:
            after = self.run(part)
        except Exception:  # noqa: BLE001  any error of the user's code
            return False
        before = self.before or []
        return len(before) == len(after) and all(
            _close(old, new)
            if old.shape == new.shape
            else _close(self._kept(old), _as_log_probabilities(new, old))
            for old, new in zip(before, after, strict=True)
        )


def _tensors_in(output: Any) -> Iterator[Tensor]:
    if isinstance(output, Tensor):
        yield output
    elif isinstance(output, Mapping):
        for value in output.values():
            yield from _tensors_in(value)
    elif isinstance(output, tuple | list):
        for value in output:
            yield from _tensors_in(value)
    elif isinstance(getattr(output, "logits", None), Tensor):
        yield output.logits


def _as_log_probabilities(part: Tensor, whole: Tensor) -> Tensor:
    """``part`` as log-probabilities that sum to 1, if ``whole``, of all classes, has (log-)
    probabilities in its rows; else ``part`` itself.
    """
    ones = torch.ones(len(whole), device=whole.device)
    if whole.ndim != 2 or not whole.is_floating_point():
        return part
    if bool((whole >= 0).all()) and torch.allclose(whole.sum(1), ones, atol=1e-4):
        return part.log().log_softmax(1)
    if torch.allclose(whole.exp().sum(1), ones, atol=1e-4):
        return part.log_softmax(1)
    return part


def _close(a: Tensor, b: Tensor) -> bool:
    if a.shape != b.shape:
        return False
    size = float(a.abs().nan_to_num(0.0, 0.0, 0.0).max()) if a.numel() else 0.0
    return torch.allclose(a, b, 0.0, _TOLERANCE * size, equal_nan=True)
