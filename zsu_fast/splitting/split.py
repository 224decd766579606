"""Splits a model into a frozen backbone, which runs once, and a trainable tail.

The split is a point in the data flow, not in a list of layers: what runs before the named module
is the backbone, everything from it on is the tail. The values that pass between them (one feature
vector, or a feature map and the skip connection beside it) are the boundary tensors.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable

import torch
from torch import Tensor, nn

from ..errors import ArgumentError, ModelError, shorten
from ..models.embedding_classifier import EmbeddingClassifier
from ..models.wrapper import LogitsModel
from .batch_dim import BoundaryTensors
from .class_rows import expose_class_buffers, layer_of, requiring_gradients
from .classifier import classifier_split, frozen_classifier
from .fx_split import split_by_fx
from .layers import fisher_ratios, layer_names
from .parts import Split as Split
from .replay_split import ReplayBackbone, split_by_replay


class _TiedWeightsError(ArgumentError):
    """The tail would train weights that the backbone uses too."""


def find_split(model: LogitsModel, at: str | int, images: Tensor, labels: Tensor) -> Split:
    """Splits ``model`` at ``at``: "auto", "last", a module's name, or a number of layers.

    "auto" takes the *first responsive layer*: the first one whose input separates the classes
    at least 0.9 times as well as the best layer's does, by Fisher's ratio (`fisher_ratios`).
    A number k takes the last k layers with weights, in the order in which they run, and what
    follows them; "last" is 1. If such a tail shares weights with the backbone, or if the backbone
    computes other logits besides, the split moves to an earlier layer. Of the last layer, only what
    holds one row per class is trained (`class_split`), whatever module it belongs to.

    Args:
        model: from `working_copy`.
        at: as above.
        images, labels: impressions of every class, [N, ...] and int64 [N].

    Raises:
        ArgumentError: no such module, or a tail that can't be trained.
        ModelError: no split reproduces the model's logits, every layer has tied weights, or the
            classifier is frozen, or no part of the model.
    """
    probe = images[:2]
    expose_class_buffers(model, probe)
    if isinstance(at, str) and at not in ("auto", "last"):
        found = split_at(model, at, probe, "named by the caller")
        return (
            classifier_split(model, found, images) if _starts_at_last(model, at, probe) else found
        )
    if at == "auto":
        layers, chosen, reason = _first_responsive_layer(model, images, labels)
    else:
        layers, chosen, reason = _last_layers(model, at, probe)
    for name in reversed(layers[: chosen + 1]):
        try:
            found = split_at(model, name, probe, reason)
        except _TiedWeightsError:
            reason = f"{reason}; moved ahead of {name!r}, whose weights are tied to the backbone"
            continue
        if name != layers[0] and _backbone_gives_logits(found, probe):
            reason = f"{reason}; moved ahead of {name!r}, before which other logits are computed"
            continue
        return classifier_split(model, found, images) if chosen == len(layers) - 1 else found
    raise ModelError(
        "each layer shares its weights with an earlier one",
        "Name the module at which the tail is to start, by tail=.",
    )


def _first_responsive_layer(
    model: LogitsModel, images: Tensor, labels: Tensor
) -> tuple[list[str], int, str]:
    """The layers with weights, the index of the first responsive one, and why it was chosen."""
    ratios = fisher_ratios(model, images, labels)
    layers = [name for name, _ in ratios]
    best = max(ratio for _, ratio in ratios)
    if not best > 0:  # NaN too
        reason = (
            "the last layer with weights: with one impression per class there is no variance "
            "within classes, which the search for the responsive layer needs"
        )
        return layers, len(layers) - 1, reason
    chosen = next(i for i, (_, ratio) in enumerate(ratios) if ratio >= 0.9 * best)
    reason = (
        f"first responsive layer: variance between classes over that within them is "
        f"{ratios[chosen][1]:.3g} at its input, {best:.3g} at the best of {len(layers)} layers"
    )
    return layers, chosen, reason


def _last_layers(model: LogitsModel, at: str | int, probe: Tensor) -> tuple[list[str], int, str]:
    """The layers with weights, the index of the first of the last ``at``, and the reason."""
    layers = layer_names(model.module, probe)
    depth = 1 if at == "last" else at
    if isinstance(depth, bool) or not isinstance(depth, int) or not 1 <= depth <= len(layers):
        raise ArgumentError(
            "tail",
            f"got {at!r}",
            f"Pass 'auto', 'last', a module's name, or a number of layers from 1 to {len(layers)}.",
        )
    reason = f"the last {depth} layers" if depth > 1 else "the last layer with weights"
    return layers, len(layers) - depth, reason


def split_at(model: LogitsModel, name: str, images: Tensor, reason: str) -> Split:
    """Splits ``model`` before its module ``name``.

    Args:
        model: from `working_copy`; the tail shares its parameters.
        name: as in ``model.module.named_modules()``.
        images: two or more valid images, to check the split with.
        reason: recorded in the split.

    Raises:
        ArgumentError: no such module, it is never called, or the tail has nothing to train.
        ModelError: backbone and tail together give other logits than the model.
    """
    names = dict(model.module.named_modules())
    if name not in names or not name:
        known = [repr(n) for n in names if n]
        raise ArgumentError(
            "tail",
            f"got {name!r}, and the model has no module of that name",
            f"Pass 'auto' or one of {shorten(known, 12)}.",
        )
    backbone, tail, boundary = _checked_split(model, name, images)
    named = dict(model.module.named_parameters())
    trainable = {n: p for n, p in named.items() if p.requires_grad}
    used = _parameters_behind(lambda: [tail(*boundary)], named)
    parameters = [n for n in used if n in trainable]
    if not parameters:
        raise _nothing_to_train(model, name, used, images)
    tied = _parameters_behind(lambda: backbone(images[:1]), {n: named[n] for n in parameters})
    if tied and isinstance(backbone, ReplayBackbone):
        # a replay runs the code of the enclosing modules again: parameters used there (a class
        # token, a position embedding) belong to the backbone and stay as they are
        enclosing = {name[:at] for at, letter in enumerate(name) if letter == "."} | {""}
        frozen = [p for p in tied if layer_of(p) in enclosing]
        parameters = [p for p in parameters if p not in frozen]
        tied = [p for p in tied if p not in frozen]
    if tied:
        raise _TiedWeightsError(
            "tail",
            f"{name!r} would train {tied[0]}, which the frozen backbone uses too (tied weights)",
            "Name the module at which the shared weights are used first, or leave tail='auto'.",
        )
    layers, fixed = {layer_of(p) for p in parameters}, [n for n in used if n not in parameters]
    return Split(backbone, tail, name, reason, parameters, len(layers) == 1, fixed)


def split_before(model: LogitsModel, name: str, images: Tensor, reason: str) -> Split:
    """Splits ``model`` before its module ``name``, of which nothing is to be trained.

    Args:
        model, name, images, reason: as for `split_at`.

    Raises:
        ModelError: backbone and tail together give other logits than the model.
    """
    backbone, tail, boundary = _checked_split(model, name, images)
    used = _parameters_behind(lambda: [tail(*boundary)], dict(model.module.named_parameters()))
    return Split(backbone, tail, name, reason, [], False, used)


def check_frozen(model: LogitsModel, images: Tensor) -> str:
    """What stays as it is because part of the user's model is frozen, in words; "" if nothing is.

    Args:
        model: from `prepare_model`, where such parameters don't require gradients.
        images: two or more.

    Raises:
        ModelError: the classifier is frozen.
    """
    named = dict(model.module.named_parameters())
    frozen = [n for n, p in named.items() if p.is_floating_point() and not p.requires_grad]
    if not frozen:
        return ""
    if not isinstance(model.module, EmbeddingClassifier):  # its templates are never trained
        find_split(model, "last", images, torch.arange(len(images), device=images.device))
    return (
        f"frozen parameters (requires_grad=False) stay as they are, {len(frozen)} of "
        f"{len(named)}: {shorten(frozen, 4)}. What they know of the classes stays too."
    )


def _starts_at_last(model: LogitsModel, name: str, images: Tensor) -> bool:
    """Whether the last layer with weights, or a module around it alone, is named ``name``."""
    layers = layer_names(model.module, images)
    inside = [layer for layer in layers if f"{layer}.".startswith(f"{name}.")]
    return inside == layers[-1:] or name == layers[-1]


def _nothing_to_train(
    model: LogitsModel, name: str, used: list[str], images: Tensor
) -> ArgumentError:
    if used:
        return frozen_classifier(used[0])
    return ArgumentError(
        "tail",
        f"{name!r} is followed by no layer with parameters",
        f"Name an earlier module, such as {layer_names(model.module, images)[-1]!r}.",
    )


def resplit(
    model: LogitsModel, tail: nn.Module, name: str, points: Tensor
) -> tuple[nn.Module, nn.Module]:
    """Splits a tail once more, at the module ``name`` of the same model.

    Args:
        model: the model that ``tail`` is a part of.
        tail: points [N, D] -> logits.
        name: as for `split_at`.
        points: two or more, to check the split with.

    Returns:
        The part up to ``name``, points -> the tuple of boundary tensors; and the rest.

    Raises:
        ArgumentError, ModelError: as for `split_at`.
    """
    backbone, rest, _ = _checked_split(_TailAsModel(model, tail), name, points)
    return backbone, rest


class _TailAsModel(LogitsModel):
    """A tail with the names of the whole model's modules."""

    def __init__(self, model: LogitsModel, tail: nn.Module) -> None:
        super().__init__(model.module)
        self.tail = tail

    def forward(self, x: Tensor) -> Tensor:
        logits: Tensor = self.tail(x)
        return logits


def _checked_split(
    model: LogitsModel, name: str, images: Tensor
) -> tuple[nn.Module, nn.Module, BoundaryTensors]:
    """Backbone, tail and boundary tensors of ``images``, by the first method that is right."""
    error = 0.0
    with torch.no_grad():
        want = model(images)
    for method in (split_by_fx, split_by_replay):
        parts = method(model, name, images)
        if parts is None:
            continue
        backbone, tail = parts
        with torch.no_grad():
            boundary = backbone(images)
            versions = [t._version for t in boundary]
            got = tail(*boundary)
            if [t._version for t in boundary] != versions:
                tail = _CloningTail(tail)
                boundary = backbone(images)
            # row i of each boundary tensor has to belong to image i: training picks and mixes rows
            flipped = tail(*[t.flip(0) for t in boundary]).flip(0)
        error = max(float((g - want).abs().max()) for g in (got, flipped))
        if error <= 1e-4 + 1e-3 * float(want.abs().max()):
            return backbone, tail, boundary
    raise ModelError(
        f"split at {name!r}, it gives other logits than as a whole (by {error:.3g})",
        "Its forward pass depends on state or chance; name another tail=.",
    )


def _parameters_behind(
    run: Callable[[], Iterable[Tensor]], parameters: dict[str, nn.Parameter]
) -> list[str]:
    """Names of those of ``parameters``, frozen or not, on which any tensor that ``run`` returns
    depends.
    """
    parameters = {n: p for n, p in parameters.items() if p.is_floating_point()}
    with requiring_gradients(parameters), torch.enable_grad():
        sums = [t.sum() for t in run() if t.requires_grad]
        if not sums:
            return []
        total = torch.stack(sums).sum()
        grads = torch.autograd.grad(total, list(parameters.values()), allow_unused=True)
    return [n for n, g in zip(parameters, grads, strict=True) if g is not None]


@torch.no_grad()
def _backbone_gives_logits(split: Split, probe: Tensor) -> bool:
    """Whether a second classifier, beside the layer at the split, lies in the frozen backbone."""
    boundary = split.backbone(probe)
    return len(boundary) > 1 and any(f.shape == split.tail(*boundary).shape for f in boundary)


class _CloningTail(nn.Module):
    """Gives copies of its inputs to a tail that writes into them."""

    def __init__(self, tail: nn.Module) -> None:
        super().__init__()
        self.tail = tail

    def forward(self, *features: Tensor) -> Tensor:
        return self.tail(*[f.clone() for f in features])
