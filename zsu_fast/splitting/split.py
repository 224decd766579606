"""Where a model is cut: a frozen head, evaluated once, and a trainable tail.

The cut is a point in the data flow, not in a list of layers: everything that runs before the
named module is the head, everything from it on is the tail, and whatever values cross the cut
(one feature vector, or a feature map and the skip connection beside it) are the tail's inputs.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from ..errors import ArgumentError, ModelError
from ..models.wrapper import LogitsModel
from .batch_dim import Features
from .fx_split import split_by_fx
from .layers import in_chunks, layer_names
from .replay_split import ReplayBackbone, split_by_replay
from .separability import fisher_ratios


class _Tied(ArgumentError):
    """The tail would train weights that the head uses too."""


@dataclass
class Split:
    """A model cut in two: ``tail(*backbone(x)) == model(x)``.

    Attributes:
        backbone: images [N, ...] -> the tuple of tensors that cross the cut, each [N, ...].
        tail: those tensors -> logits [N, C].
        name: the module at which the tail starts.
        reason: why there, in words.
        parameters: names (in the user's model) of what the tail trains.
        output_level: True if the tail is the last layer alone: the features stay as they are, so
            only the outputs forget.
    """

    backbone: nn.Module
    tail: nn.Module
    name: str
    reason: str
    parameters: list[str]
    output_level: bool

    def features(self, images: Tensor, batch: int | None = None) -> Features:
        """The head's output for all images, without gradients.

        Args:
            images: [N, ...].
            batch: images at a time; None for as many as keep the head's feature maps small.
        """
        chunks = in_chunks(self.backbone, images) if batch is None else images.split(batch)
        with torch.no_grad():
            parts = [self.backbone(chunk) for chunk in chunks]
        return tuple(torch.cat(column) for column in zip(*parts, strict=True))


def find_split(model: LogitsModel, at: str | int, images: Tensor, labels: Tensor) -> Split:
    """Cuts ``model`` at ``at``: "auto", "last", a module's name, or a number of layers.

    "auto" takes the *first responsive layer*: the first one whose input tells the classes apart
    at least 0.9 times as well as the best layer's does, by the ratio of the variance between
    classes to that within them (`fisher_ratios`). A number k takes the last k layers with
    weights, in the order in which they run, and what follows them; "last" is 1. Where such a tail
    shares weights with the head, or leaves out a layer that gives logits too, the cut moves to an
    earlier layer.

    Args:
        model: from `working_copy`.
        at: as above.
        images, labels: impressions of every class, [N, ...] and int64 [N].

    Raises:
        ArgumentError: no such module, or a tail that can't be trained.
    """
    probe = images[:2]
    if isinstance(at, str) and at not in ("auto", "last"):
        return split_at(model, at, probe, "named by the caller")
    if at == "auto":
        layers = fisher_ratios(model, images, labels)
        best = max(ratio for _, ratio in layers)
        if best > 0:
            chosen = next(i for i, (_, ratio) in enumerate(layers) if ratio >= 0.9 * best)
            reason = (
                f"first responsive layer: variance between classes over that within them is "
                f"{layers[chosen][1]:.3g} at its input, {best:.3g} at the best of {len(layers)} "
                f"layers"
            )
        else:
            chosen = len(layers) - 1
            reason = (
                "the last layer with weights: with one impression a class there is no variance "
                "within classes to search the responsive layer by"
            )
    else:
        layers = [(name, 1.0) for name in layer_names(model.module, probe)]
        depth = 1 if at == "last" else at
        if isinstance(depth, bool) or not isinstance(depth, int) or not 1 <= depth <= len(layers):
            raise ArgumentError(
                "tail",
                f"got {at!r}",
                f"Pass 'auto', 'last', a module's name, or a number of layers from 1 to "
                f"{len(layers)}.",
            )
        chosen = len(layers) - depth
        reason = f"the last {depth} layers" if depth > 1 else "the last layer with weights"
    for i in range(chosen, -1, -1):
        name = layers[i][0]
        try:
            cut = split_at(model, name, probe, reason)
        except _Tied:
            reason = f"{reason}; moved ahead of {name!r}, whose weights are tied to the head"
            continue
        if i and _head_gives_logits(cut, probe):
            reason = f"{reason}; moved ahead of {name!r}, before which other logits are made"
            continue
        return cut
    raise ModelError(
        "each layer shares its weights with an earlier one",
        "Name the module at which the tail is to start, by tail=.",
    )


def _layer_of(parameter: str) -> str:
    """The module that holds a parameter, be it behind a parametrization or not."""
    layer, behind, _ = parameter.partition(".parametrizations.")
    return layer if behind else parameter.rpartition(".")[0]


@torch.no_grad()
def _head_gives_logits(cut: Split, probe: Tensor) -> bool:
    """Whether a second classifier, beside the layer at the cut, is in the frozen head."""
    crossing = cut.backbone(probe)
    return len(crossing) > 1 and any(f.shape == cut.tail(*crossing).shape for f in crossing)


def split_at(model: LogitsModel, name: str, images: Tensor, reason: str) -> Split:
    """Cuts ``model`` before its module ``name``.

    Args:
        model: from `working_copy`; the tail shares its parameters.
        name: as in ``model.module.named_modules()``.
        images: two or more valid images, to check the cut with.
        reason: recorded in the split.

    Raises:
        ArgumentError: no such module, it is never called, or the tail has nothing to train.
    """
    names = dict(model.module.named_modules())
    if name not in names or not name:
        known = [n for n in names if n]
        raise ArgumentError(
            "tail",
            f"got {name!r}, and the model has no module of that name",
            f"Pass 'auto' or one of {_some(known)}.",
        )
    head, tail, crossing = _checked_cut(model, name, images)
    parameters = _trained_by(model, tail, crossing)
    if not parameters:
        raise ArgumentError(
            "tail",
            f"{name!r} is followed by no layer with parameters",
            f"Name an earlier module, such as {layer_names(model.module, images)[-1]!r}.",
        )
    tied = _tied_to_head(model, head, parameters, images)
    if tied and isinstance(head, ReplayBackbone):
        # a replay runs the code around the cut anew: parameters used there (a class token, a
        # position embedding) are the head's, and stay as they are
        around = {name[:at] for at, letter in enumerate(name) if letter == "."} | {""}
        ours = [p for p in tied if _layer_of(p) in around]
        parameters = [p for p in parameters if p not in ours]
        tied = [p for p in tied if p not in ours]
    if tied:
        raise _Tied(
            "tail",
            f"{name!r} would train {tied[0]}, which the frozen head uses too (tied weights)",
            "Name the module at which the shared weights are used first, or leave tail='auto'.",
        )
    layers = {_layer_of(p) for p in parameters}
    return Split(head, tail, name, reason, parameters, output_level=len(layers) == 1)


def _checked_cut(
    model: LogitsModel, name: str, images: Tensor
) -> tuple[nn.Module, nn.Module, Features]:
    """Head, tail, and what crosses for ``images``; from the first way of cutting that is right."""
    wrong = 0.0
    with torch.no_grad():
        want = model(images)
    for way in (split_by_fx, split_by_replay):
        halves = way(model, name, images)
        if halves is None:
            continue
        head, tail = halves
        with torch.no_grad():
            crossing = head(images)
            versions = [t._version for t in crossing]
            got = tail(*crossing)
            if [t._version for t in crossing] != versions:
                tail = _Cloning(tail)
                crossing = head(images)
            # row i of what crosses has to be of image i: loop and mixtures pick rows
            turned = tail(*[t.flip(0) for t in crossing]).flip(0)
        wrong = max(float((g - want).abs().max()) for g in (got, turned))
        if wrong <= 1e-4 + 1e-3 * float(want.abs().max()):
            return head, tail, crossing
    raise ModelError(
        f"cut at {name!r} it gives other logits than whole (by {wrong:.3g})",
        "Its forward pass depends on state or chance; name another tail=.",
    )


def _trained_by(model: LogitsModel, tail: nn.Module, crossing: Features) -> list[str]:
    """Names of the parameters on which the tail's logits depend."""
    named = {n: p for n, p in model.module.named_parameters() if p.requires_grad}
    with torch.enable_grad():
        logits = tail(*crossing)
        if not logits.requires_grad:
            return []
        grads = torch.autograd.grad(logits.sum(), list(named.values()), allow_unused=True)
    return [n for n, g in zip(named, grads, strict=True) if g is not None]


def _tied_to_head(
    model: LogitsModel, head: nn.Module, parameters: Sequence[str], images: Tensor
) -> list[str]:
    """Those of ``parameters`` that the head's output depends on as well."""
    named = dict(model.module.named_parameters())
    chosen = [named[n] for n in parameters]
    with torch.enable_grad():
        roots = [t.sum() for t in head(images[:1]) if t.requires_grad]
        if not roots:
            return []
        grads = torch.autograd.grad(torch.stack(roots).sum(), chosen, allow_unused=True)
    return [n for n, g in zip(parameters, grads, strict=True) if g is not None]


class _Cloning(nn.Module):
    """A tail that writes into its inputs gets copies of them."""

    def __init__(self, tail: nn.Module) -> None:
        super().__init__()
        self.tail = tail

    def forward(self, *features: Tensor) -> Tensor:
        return self.tail(*[f.clone() for f in features])


def _some(names: Sequence[str], most: int = 12) -> str:
    shown = ", ".join(repr(n) for n in names[:most])
    return shown + (f" and {len(names) - most} more" if len(names) > most else "")
