"""The tail with two classifiers on the same features: its own and the frozen original."""

from __future__ import annotations

import copy
from collections import Counter
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from ...errors import ModelError
from ...models.wrapper import LogitsModel
from ...splitting import split as tails
from ...splitting.layers import layer_names
from ...splitting.split import Split


@dataclass
class TailOutputs:
    """What the tail makes of a batch.

    Attributes:
        logits: [N, C].
        features: [N, ...] at the last layer.
        unmasked: [N, C], the original last layer's logits on them.
        inside: [N, D] of each inner layer: the means over positions of what it takes.
    """

    logits: Tensor
    features: Tensor
    unmasked: Tensor
    inside: list[Tensor]


class DualClassifierTail(nn.Module):
    """The tail with its own last layer, and the frozen original one on the same features.

    Attributes:
        inner: layers ahead of the last that take what trained ones give, where nothing else reads
            it: not a residual stream, which mostly carries what frozen layers made.
        trained: the layers with weights that are trained ahead of the last.
    """

    def __init__(self, model: LogitsModel, cut: Split, images: Tensor) -> None:
        super().__init__()
        names = layer_names(model.module, images)
        last = tails.split_at(model, names[-1], images, "the last layer")
        self.tail, self.frozen = cut.tail, copy.deepcopy(last.tail).eval()
        self.frozen.requires_grad_(False)
        modules = dict(model.module.named_modules())
        self.last = modules[names[-1]]
        self.trained = [modules[n] for n in names[:-1] if f"{n}.weight" in cut.parameters]
        self.inner = self.trained
        with torch.enable_grad():
            logits, inner, _ = self._run(*[x.detach() for x in cut.backbone(images)])
            readers = _readers(logits)
        self.inner = [layer for layer, x in inner if readers[x.grad_fn] == 1]
        with torch.no_grad():
            answers = self(*cut.backbone(images))
        if len(last.backbone(images)) != 1 or not torch.allclose(
            answers.logits, answers.unmasked, 1e-3, 1e-3
        ):
            raise ModelError(
                f"its last layer {names[-1]!r} is not the only way from the features to the logits",
                "Pass depth='output'.",
            )

    def forward(self, *crossing: Tensor) -> TailOutputs:
        """What becomes of [N, ...] at the cut."""
        logits, inner, features = self._run(*crossing)
        inside = [_means(layer, x) for layer, x in inner]
        return TailOutputs(logits, features, self.frozen(features), inside)

    def _run(self, *crossing: Tensor) -> tuple[Tensor, list[tuple[nn.Module, Tensor]], Tensor]:
        """Logits; the inner layers with what they take; what the last one takes."""
        taken: list[tuple[nn.Module, Tensor]] = []

        def note(module: nn.Module, args: Any) -> None:
            taken.append((module, args[0]))

        hooks = [m.register_forward_pre_hook(note) for m in (*self.inner, self.last)]
        try:
            logits = self.tail(*crossing)
        finally:
            for hook in hooks:
                hook.remove()
        *inner, (_, features) = taken
        return logits, inner, features


def _readers(output: Tensor) -> Counter[Any]:
    """How many operations read the result of each autograd node that ``output`` was made of."""
    readers: Counter[Any] = Counter()
    todo: list[Any] = [output.grad_fn]
    while todo:
        for made_by, _ in todo.pop().next_functions:
            if made_by is not None:
                readers[made_by] += 1
                if readers[made_by] == 1:
                    todo.append(made_by)
    return readers


def _means(layer: nn.Module, x: Tensor) -> Tensor:
    """What a layer takes, [N, ...] -> its channels' means over positions or tokens, [N, D]."""
    if x.ndim > 2:
        return x.flatten(1, -2).mean(1) if isinstance(layer, nn.Linear) else x.flatten(2).mean(2)
    return x
