"""Class impressions and their file format, ``zsu_fast.impressions/1``."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ..errors import ArgumentError, CheckpointError
from ..models import checkpoint
from ..models.input_spec import InputSpec

FORMAT = "zsu_fast.impressions/1"
_TENSORS = ("images", "labels", "confidence", "target", "steps", "hit")


@dataclass
class ClassImpressions:
    """Synthesised images and how their ascent ended. Row i of every tensor is impression i.

    Attributes:
        images: float32 [N, channels, H, W], normalised as the model takes them, all valid pixels;
            with ``space`` "tail-input" boundary tensors at the split instead, flattened to [N, D].
        labels: int64 [N], the class that each stands for.
        confidence: float32 [N], the probability of that class: softmax, or for a multi-label model
            sigmoid.
        target: float32 [N], the confidence at which its ascent was to stop (1 for "never").
        steps: int32 [N], ascent steps taken, restarts included.
        hit: bool [N], whether the target was reached (without a target: whether the class is
            predicted).
        spec: the images' shape and normalisation.
        space: "input", or "tail-input".
        computed: how the ascent's steps were computed, if that was chosen by timing; not saved.
    """

    images: Tensor
    labels: Tensor
    confidence: Tensor
    target: Tensor
    steps: Tensor
    hit: Tensor
    spec: InputSpec
    space: str = "input"
    computed: str = field(default="", init=False)

    def __len__(self) -> int:
        return len(self.labels)

    @property
    def hit_rate(self) -> float:
        """The fraction of impressions that reached their target, 0..1."""
        return float(self.hit.float().mean()) if len(self) else 0.0

    def hit_rate_of(self, label: int) -> float:
        """The fraction of one class, 0 if it has none."""
        rows = self.labels == label
        return float(self.hit[rows].float().mean()) if bool(rows.any()) else 0.0

    def save(self, path: str | Path, force: bool = False) -> None:
        """Writes a safetensors file, atomically; never over an existing one without ``force``."""
        tensors = {name: getattr(self, name) for name in _TENSORS}
        spec = {
            name: getattr(self.spec, name) for name in ("shape", "mean", "std", "source", "bgr")
        }
        metadata = {"format": FORMAT, "spec": json.dumps(spec), "space": self.space}
        checkpoint.save_tensors(path, tensors, metadata=metadata, force=force)

    @classmethod
    def load(cls, path: str | Path) -> ClassImpressions:
        """Reads what `save` wrote.

        Raises:
            CheckpointError: it is missing, damaged, of another version of the format, or no file of
                impressions.
        """
        tensors, metadata = checkpoint.load_tensors(path)
        found = metadata.get("format", "")
        if found != FORMAT and found.startswith("zsu_fast.impressions/"):
            raise CheckpointError(
                f"{path} has the format {found!r}, and this version of zsu_fast reads {FORMAT!r}. "
                f"Synthesise the impressions again."
            )
        if found != FORMAT or set(tensors) != set(_TENSORS):
            raise CheckpointError(f"{path} holds no class impressions. Make them by synthesize().")
        try:
            stated = json.loads(metadata["spec"])
            shape, mean, std = (tuple(stated[name]) for name in ("shape", "mean", "std"))
            spec = InputSpec(shape, mean, std, stated["source"], bgr=stated.get("bgr", False))
            impressions = cls(**tensors, spec=spec, space=metadata.get("space", "input"))
            rows = {len(tensor) for tensor in tensors.values()}
        except (ValueError, KeyError, TypeError, RecursionError) as error:
            raise CheckpointError(f"{path} is damaged ({error}). Copy or save it anew.") from error
        labels = impressions.labels
        if len(rows) > 1 or labels.dtype != torch.int64 or labels.ndim != 1:
            raise CheckpointError(f"{path} is damaged: its columns do not fit. Save it anew.")
        return impressions


def default_per_class(classes: int) -> int:
    """Impressions per class: 32, or fewer for at most 1,024 in all, but at least 1."""
    return max(1, min(32, 1024 // classes))


def check_impressions(
    impressions: Any,
    spec: InputSpec,
    space: str,
    classes: int,
    forget: Sequence[int],
    active: Sequence[int] | None,
) -> ClassImpressions | None:
    """Returns ``impressions``, as the user passed them, if a model can be unlearned with them.

    Args:
        impressions: None if there are none.
        spec, space, classes: the model's images, the space, and the number of the model's classes.
        forget: class indices; each needs an impression.
        active: classes that need one; None if those to forget and any other class suffice.

    Raises:
        ArgumentError: they are of another model or space, or a class has none.
    """
    if impressions is None:
        return None
    if not isinstance(impressions, ClassImpressions):
        raise ArgumentError(
            "impressions", f"got {impressions!r:.80}", "Pass what synthesize() returned, or None."
        )
    counts = torch.bincount(impressions.labels, minlength=classes)
    fewest = int(counts[list(forget if active is None else active)].min())
    if active is None and len(impressions.labels.unique()) <= len(forget):
        fewest = 0
    if impressions.spec.shape != spec.shape or len(counts) > classes or fewest < 1:
        raise ArgumentError(
            "impressions",
            f"got {len(impressions)} of shape {impressions.spec.shape}, at least {fewest} per "
            f"class of {len(counts)}",
            f"Pass some of shape {spec.shape} for each of {classes} classes.",
        )
    if impressions.space != space:
        raise ArgumentError(
            "impressions",
            f"got some of space={impressions.space!r} with space={space!r}",
            "Pass the space that they were synthesised in.",
        )
    return impressions
