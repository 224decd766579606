"""A model in two parts: the frozen backbone and the trainable tail."""

from __future__ import annotations

from dataclasses import dataclass, field

import torch
from torch import Tensor, nn

from ..runtime.inference import Inference
from .batch_dim import BoundaryTensors
from .class_rows import ClassDims
from .layers import CHUNK_BYTES, in_chunks


@dataclass
class Split:
    """A model in two parts: ``tail(*backbone(x)) == model(x)``.

    Attributes:
        backbone: images [N, ...] -> the tuple of boundary tensors, each [N, ...].
        tail: the boundary tensors -> logits [N, C].
        name: the module at which the tail starts.
        reason: why there, in words.
        parameters: names (in the user's model) of what the tail trains.
        output_level: True if only the classifier is trained: the features stay as they are, so
            only the outputs forget.
        fixed: names of the parameters that the tail uses and does not train.
        class_dims: if all of ``parameters`` hold one row per class, the dimension of the rows in
            each; else {}.
        directions: True if the logits depend on the direction of the features alone, as with a
            cosine classifier: rows synthesised from any start are then unlike those of images.
        warning: what the user should know about the split, in words; "" for nothing.
    """

    backbone: nn.Module
    tail: nn.Module
    name: str
    reason: str
    parameters: list[str]
    output_level: bool
    fixed: list[str] = field(default_factory=list)
    class_dims: ClassDims = field(default_factory=dict)
    directions: bool = False
    warning: str = ""

    def features(
        self, images: Tensor, batch: int | None = None, chunk_bytes: int = CHUNK_BYTES
    ) -> BoundaryTensors:
        """The backbone's output for all images, without gradients.

        Args:
            images: [N, ...].
            batch: images at a time; None chooses by ``chunk_bytes``.
            chunk_bytes: bound for the largest feature map of the images that run at a time.
        """
        chunks = (
            in_chunks(self.backbone, images, chunk_bytes) if batch is None else images.split(batch)
        )
        backbone = Inference(self.backbone, images[:1])
        parts = [backbone(chunk) for chunk in chunks]
        return tuple(torch.cat(column).contiguous() for column in zip(*parts, strict=True))
