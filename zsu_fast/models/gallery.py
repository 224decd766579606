"""Galleries: the templates of enrolled identities, with their names, in one safetensors file.

The file holds ``templates`` float32 [T, D], ``identity`` int64 [T] (the index in ``names`` that
each template belongs to) and, if there is one, ``bias`` float32 [C]. Its metadata holds the
format, the names (JSON), the metric, the scale, the hash of the encoder's weights, and how they
were enrolled.
Templates of faces and voices are biometric data: the file is as sensitive as the photos.
"""

from __future__ import annotations

import json
import math
import warnings
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, cast

import torch
from torch import Tensor, nn

from ..errors import (
    ArgumentError,
    CheckpointError,
    OutputError,
    UnlearningWarning,
    check_choice,
    shorten,
)
from . import checkpoint
from .embedding_classifier import METRICS, EmbeddingClassifier, Metric
from .parameters import weights_hash

FORMAT = "zsu_fast.gallery/1"
_ENROL = "Write it again with zsu-fast enroll, or Gallery(...).save()."


@dataclass(frozen=True, eq=False)
class Gallery:
    """The templates of C identities. Everything is checked when it is made.

    Attributes:
        templates: float [T, D], finite and not zero; stored as float32.
        names: of the identities, all different.
        identity: int64 [T], the index in ``names`` of each template; None: one template each.
        metric: how embeddings and templates are compared; see `EmbeddingClassifier`.
        scale: what similarities are multiplied by to give logits; None: see `EmbeddingClassifier`.
        bias: float [C], added to the logits; None for none.
        encoder: `weights_hash` of the encoder that computed the templates, "" if that is unknown.
        enrolled: how the templates were computed, plain values.

    Raises:
        ArgumentError: shapes do not fit together; templates are NaN, infinite or zero; names are
            empty or occur twice; an identity has no template.
    """

    templates: Tensor
    names: tuple[str, ...]
    identity: Tensor | None = None
    metric: Metric = "cosine"
    scale: float | None = None
    bias: Tensor | None = None
    encoder: str = ""
    enrolled: dict[str, Any] = field(default_factory=dict)

    def __post_init__(self) -> None:
        names = _check_names(self.names)
        templates = _check_templates(self.templates)
        identity = self.identity
        if identity is None:
            identity = torch.arange(len(names))
        _check_identity(identity, len(templates), names)
        check_choice("metric", self.metric, METRICS)
        if self.scale is not None and not (math.isfinite(self.scale) and self.scale > 0):
            raise ArgumentError("scale", f"got {self.scale!r}", "Pass a number above 0, or None.")
        if self.bias is not None:
            shape, count = tuple(self.bias.shape), len(names)
            if shape != (count,) or not bool(self.bias.isfinite().all()):
                raise ArgumentError(
                    "bias", f"got shape {shape}, or values that are not finite, for {count} names",
                    "Pass one finite number per identity.",
                )  # fmt: skip
            object.__setattr__(self, "bias", self.bias.detach().float().cpu())
        object.__setattr__(self, "names", names)
        object.__setattr__(self, "templates", templates)
        object.__setattr__(self, "identity", identity.detach().cpu().long())

    @property
    def width(self) -> int:
        """D, the numbers per embedding."""
        return self.templates.shape[1]

    def of(self, name: str) -> Tensor:
        """Returns the templates of one identity, float32 [k, D].

        Raises:
            ArgumentError: there is no such name.
        """
        assert self.identity is not None
        if name not in self.names:
            raise ArgumentError(
                "name",
                f"got {name!r}, which is not enrolled",
                f"Pass one of {shorten(self.names)}.",
            )
        return self.templates[self.identity == self.names.index(name)]

    @classmethod
    def of_classifier(cls, classifier: EmbeddingClassifier) -> Gallery:
        """The gallery of a classifier; identities without names are called "0", "1", ..."""
        count = len(classifier.gallery)
        return cls(
            classifier.templates, classifier.class_names or tuple(map(str, range(count))),
            classifier.identity, classifier.metric, classifier.scale, classifier.bias,
            weights_hash(classifier.encoder),
        )  # fmt: skip

    def classifier(self, encoder: nn.Module) -> EmbeddingClassifier:
        """The encoder and this gallery as one classifier.

        Raises:
            ArgumentError: there is only one identity; see `EmbeddingClassifier`.
        """
        assert self.identity is not None
        order = self.identity.argsort(stable=True)
        counts = torch.bincount(self.identity)
        ordered = self.templates[order]
        single = int(counts.max()) == 1
        templates = ordered if single else list(ordered.split(counts.tolist()))
        return EmbeddingClassifier(
            encoder, templates, self.names, self.scale, self.metric, self.bias
        )

    def without(self, identities: Sequence[int]) -> Gallery:
        """The gallery without these identities; the others are numbered anew.

        Raises:
            ArgumentError: nobody is left.
        """
        assert self.identity is not None
        left_out = set(identities)
        kept = [c for c in range(len(self.names)) if c not in left_out]
        if not kept:
            raise ArgumentError("identities", "nobody is left", "Keep at least one.")
        number = torch.full((len(self.names),), -1)
        number[kept] = torch.arange(len(kept))
        rows = number[self.identity] >= 0
        return replace(
            self, templates=self.templates[rows], names=tuple(self.names[c] for c in kept),
            identity=number[self.identity[rows]],
            bias=None if self.bias is None else self.bias[kept], enrolled={},
        )  # fmt: skip

    def check_encoder(self, encoder: nn.Module) -> None:
        """Warns if the templates were computed by other weights than those of ``encoder``.

        Warns:
            UnlearningWarning: they were. After unlearning, that is as it should be.
        """
        if self.encoder and (found := weights_hash(encoder)) != self.encoder:
            warnings.warn(
                f"gallery: its templates were enrolled with weights {self.encoder[:12]}..., and "
                f"the encoder has {found[:12]}...: similarities are only comparable if the encoder "
                f"was derived from these weights, as by unlearning",
                UnlearningWarning,
                stacklevel=2,
            )

    def save(self, path: str | Path, force: bool = False) -> None:
        """Writes the file atomically.

        Args:
            path: a safetensors file.
            force: replace an existing file.

        Raises:
            OutputError: the path ends as a torch file does, exists (without ``force``), or can't
                be written.
        """
        check_gallery_path(path, force)
        assert self.identity is not None
        tensors = {"templates": self.templates.contiguous(), "identity": self.identity}
        if self.bias is not None:
            tensors["bias"] = self.bias
        metadata = {
            "format": FORMAT, "names": json.dumps(self.names), "metric": self.metric,
            "encoder": self.encoder, "enrolled": json.dumps(self.enrolled),
        }  # fmt: skip
        if self.scale is not None:
            metadata["scale"] = repr(float(self.scale))
        checkpoint.save_tensors(path, tensors, metadata, force)

    @classmethod
    def load(cls, path: str | Path) -> Gallery:
        """Reads a file of `save`.

        Raises:
            CheckpointError: it can't be read, is no gallery, is of another version, or its content
                does not pass the checks above.
        """
        tensors, metadata = checkpoint.load_tensors(path)
        _check_format(path, metadata.get("format", ""))
        try:
            scale = metadata.get("scale")
            return cls(
                tensors["templates"], json.loads(metadata["names"]), tensors["identity"],
                cast(Metric, metadata["metric"]), None if scale is None else float(scale),
                tensors.get("bias"), metadata.get("encoder", ""),
                json.loads(metadata.get("enrolled", "{}")),
            )  # fmt: skip
        except KeyError as error:
            raise CheckpointError(f"gallery: {path} has no {error}. {_ENROL}") from error
        except ArgumentError as error:
            raise CheckpointError(
                f"gallery: {path} can't be used: {error.argument}: {error.got}. {_ENROL}"
            ) from error
        except (ValueError, TypeError, RecursionError) as error:
            raise CheckpointError(f"gallery: {path} is damaged ({error}). {_ENROL}") from error


def check_gallery_path(path: str | Path, force: bool) -> None:
    """Raises before the work if `Gallery.save` would refuse this path.

    Raises:
        OutputError: it ends as a torch file does, exists (without ``force``), or can't be written.
    """
    if str(path).lower().endswith(checkpoint.TORCH):
        raise OutputError(
            f"gallery: {path} has the ending of a torch.save file, and a gallery is a safetensors "
            f"file. Let its name end in .safetensors."
        )
    checkpoint.check_writable(Path(path), force)


def _check_names(names: Any) -> tuple[str, ...]:
    remedy = "Pass one name per identity, each of them once."
    if isinstance(names, str) or not isinstance(names, list | tuple) or not names:
        raise ArgumentError("names", f"got {names!r:.60}", remedy)
    odd = [n for n in names if not isinstance(n, str) or not n.strip()]
    if odd:
        raise ArgumentError("names", f"got {odd[0]!r}, which is no name", remedy)
    if twice := [name for name, n in Counter(map(str.strip, names)).items() if n > 1]:
        raise ArgumentError("names", f"{shorten(map(repr, twice))} occurs twice", remedy)
    return tuple(name.strip() for name in names)


def _check_templates(templates: Any) -> Tensor:
    remedy = "Pass one float vector per template, [T, D], as the encoder returns them."
    if not isinstance(templates, Tensor) or not templates.is_floating_point():
        kind = templates.dtype if isinstance(templates, Tensor) else type(templates).__name__
        raise ArgumentError("templates", f"got {kind}", remedy)
    if templates.ndim != 2 or not templates.numel():
        raise ArgumentError("templates", f"got shape {tuple(templates.shape)}", remedy)
    templates = templates.detach().float().cpu()
    bad = (~templates.isfinite()).any(1).nonzero()[:, 0].tolist()
    if bad:
        raise ArgumentError("templates", f"row {shorten(bad)} has NaN or infinite values", remedy)
    if zero := (templates == 0).all(1).nonzero()[:, 0].tolist():
        raise ArgumentError("templates", f"row {shorten(zero)} is zero", remedy)
    return templates


def _check_identity(identity: Any, count: int, names: tuple[str, ...]) -> None:
    remedy = "Pass the index in names for each template, and at least one template for each name."
    integers = (torch.int64, torch.int32, torch.int16, torch.uint8)
    if not isinstance(identity, Tensor) or identity.dtype not in integers:
        kind = identity.dtype if isinstance(identity, Tensor) else type(identity).__name__
        raise ArgumentError("identity", f"got {kind}", remedy)
    if identity.shape != (count,):
        raise ArgumentError(
            "identity",
            f"{count} templates come with identities of shape {tuple(identity.shape)}",
            remedy,
        )
    if not 0 <= int(identity.min()) <= int(identity.max()) < len(names):
        low, high = int(identity.min()), int(identity.max())
        raise ArgumentError(
            "identity", f"runs from {low} to {high}, with {len(names)} names", remedy
        )
    present = set(identity.tolist())
    if without := [name for index, name in enumerate(names) if index not in present]:
        raise ArgumentError("identity", f"{shorten(map(repr, without))} has no template", remedy)


def _check_format(path: str | Path, found: str) -> None:
    if found == FORMAT:
        return
    if found.startswith(FORMAT.rpartition("/")[0] + "/"):
        raise CheckpointError(
            f"gallery: {path} has format {found}, this version of zsu_fast reads {FORMAT}. {_ENROL}"
        )
    raise CheckpointError(
        f"gallery: {path} is not a zsu_fast gallery. Pass a file written by zsu-fast enroll."
    )
