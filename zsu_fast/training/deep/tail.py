"""The tail that ends in the frozen original classifier, and the features that it takes."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from ...models.parameters import UNCOPYABLE, deep_copy
from ...models.wrapper import LogitsModel
from ...runtime import memory
from ...runtime.fx_tracing import break_reference_cycles
from ...runtime.hooks import recorded_inputs
from ...splitting.batch_dim import BoundaryTensors
from ..features import FeatureSet
from .fast_tail import fast_tail, frozen_copy
from .split import DeepSplit


@dataclass
class TailOutputs:
    """The tail's outputs for a batch."""

    logits: Tensor  # [N, C], of the original last layer
    features: Tensor  # [N, ...], the input of the last layer


class FrozenClassifierTail(nn.Module):
    """The tail with the original last layer, whatever the model's own one becomes.

    Args:
        model: the working copy that ``deep`` shares its parameters with.
        deep: where the tail starts.
    """

    def __init__(self, model: LogitsModel, deep: DeepSplit) -> None:
        super().__init__()
        self.tail = deep.split.tail
        self.last = model.module.get_submodule(deep.last.name)
        self.fast = frozen_copy(self.tail, self.last)
        if self.fast is None:
            self.classifier = deep_copy(deep.last.tail, UNCOPYABLE).eval().requires_grad_(False)
            break_reference_cycles(self.classifier)  # a copied graph refers to its module again

    def speed_up(
        self, parameters: Sequence[nn.Parameter], features: BoundaryTensors
    ) -> BoundaryTensors:
        """Computes the same with less work from now on, where that is possible (`fast_tail`).

        Call it while the model's last layer is the original one.

        Args:
            parameters: those that are trained.
            features: the rows, each [N, ...].

        Returns:
            The rows in the layout to take them in.
        """
        self.fast = fast_tail(self.tail, self.last, parameters, features) or self.fast
        return features if self.fast is None else self.fast.layout(features)

    def forward(self, *boundary: Tensor) -> TailOutputs:
        """Runs the tail on the boundary tensors, each [N, ...]."""
        if self.fast is not None:
            return TailOutputs(*self.fast(*boundary))
        with recorded_inputs(self.last) as inputs:
            self.tail(*boundary)
        return TailOutputs(self.classifier(inputs[0]), inputs[0])

    @torch.no_grad()
    def chunks(self, rows: FeatureSet) -> Iterator[TailOutputs]:
        """Yields the outputs of all rows, without gradients."""
        size = memory.chunk_of(*rows.features)
        for chunk in zip(*[f.split(size) for f in rows.features], strict=True):
            yield self(*chunk)
