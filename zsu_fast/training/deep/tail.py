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
from ...runtime.hooks import forward_pre_hooks
from ...splitting.layers import layer_names
from ...splitting.split import Split, split_at


@dataclass
class TailOutputs:
    """The tail's outputs for a batch."""

    logits: Tensor  # [N, C]
    features: Tensor  # [N, ...], the input of the last layer
    unmasked: Tensor  # [N, C], the original last layer's logits on `features`
    inside: list[Tensor]  # [N, D] for each inner layer: its input, averaged over positions


class DualClassifierTail(nn.Module):
    """The tail with its own last layer, and the frozen original one on the same features.

    Args:
        model: the working copy that ``split`` shares its parameters with.
        split: where the tail starts.
        images: some valid images, [N, ...].

    Attributes:
        trained: the layers with weights that are trained before the last one.
        inner: those of them whose input comes from a trained layer and is read by nothing else. A
            residual stream is read by others too, and mostly carries what frozen layers computed.

    Raises:
        ModelError: there is another way from the features to the logits than the last layer.
    """

    def __init__(self, model: LogitsModel, split: Split, images: Tensor) -> None:
        super().__init__()
        names = layer_names(model.module, images)
        last = split_at(model, names[-1], images, "the last layer")
        self.tail, self.frozen = split.tail, copy.deepcopy(last.tail).eval()
        self.frozen.requires_grad_(False)
        modules = dict(model.module.named_modules())
        self.last = modules[names[-1]]
        self.trained = [modules[n] for n in names[:-1] if f"{n}.weight" in split.parameters]
        self.inner = self.trained
        with torch.enable_grad():
            logits, inputs, _ = self._run(*[x.detach() for x in split.backbone(images)])
            readers = _reader_counts(logits)
        self.inner = [layer for layer, x in inputs if readers[x.grad_fn] == 1]
        with torch.no_grad():
            outputs = self(*split.backbone(images))
        if len(last.backbone(images)) != 1 or not torch.allclose(
            outputs.logits, outputs.unmasked, 1e-3, 1e-3
        ):
            raise ModelError(
                f"its last layer {names[-1]!r} is not the only way from the features to the logits",
                "Pass depth='output'.",
            )

    def forward(self, *boundary: Tensor) -> TailOutputs:
        """Runs the tail on the tensors at the split, each [N, ...]."""
        logits, inputs, features = self._run(*boundary)
        inside = [_channel_means(layer, x) for layer, x in inputs]
        return TailOutputs(logits, features, self.frozen(features), inside)

    def _run(self, *boundary: Tensor) -> tuple[Tensor, list[tuple[nn.Module, Tensor]], Tensor]:
        """Returns the logits, the inner layers with their inputs, and the last layer's input."""
        inputs: list[tuple[nn.Module, Tensor]] = []

        def note(module: nn.Module, args: Any, _kwargs: Any) -> None:
            inputs.append((module, args[0]))

        with forward_pre_hooks((*self.inner, self.last), note):
            logits = self.tail(*boundary)
        *inner, (_, features) = inputs
        return logits, inner, features


def _reader_counts(output: Tensor) -> Counter[Any]:
    """Counts the operations that read the result of each autograd node behind ``output``."""
    readers: Counter[Any] = Counter()
    pending: list[Any] = [output.grad_fn]
    while pending:
        for node, _ in pending.pop().next_functions:
            if node is not None:
                readers[node] += 1
                if readers[node] == 1:
                    pending.append(node)
    return readers


def _channel_means(layer: nn.Module, x: Tensor) -> Tensor:
    """Averages a layer's input, [N, ...], over positions or tokens: [N, D]."""
    if x.ndim > 2:
        return x.flatten(1, -2).mean(1) if isinstance(layer, nn.Linear) else x.flatten(2).mean(2)
    return x
