"""An encoder and the vectors it is compared with, as one classifier."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, Literal, get_args

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from ..errors import ArgumentError, ModelError, check_choice, is_number, shorten
from .embeddings import embed_images
from .parameters import unwrap

Metric = Literal["cosine", "dot", "euclidean"]
GALLERY = "gallery"  # the name of the module that holds the templates
METRICS: tuple[str, ...] = get_args(Metric)
# `fitted_scale`: this confidence is reached at a template itself, by the median identity.
_REACHED, _FITTED_ON, _LARGEST_SCALE = 0.995, 256, 1e4
_FITTED_VALUES = 4 * 1024 * 1024  # similarities that are held for it, at most
_TEMPLATES = (
    "Pass one float vector per identity, [C, D]; or several per identity: [C, k, D], a list of "
    "[k, D], or a dict of names and [k, D]."
)


class SimilarityLayer(nn.Module):
    """Embeddings [N, D] -> logits [N, C]; the last layer of an `EmbeddingClassifier`.

    Args:
        templates: float [T, D].
        identity: int64 [T], ascending: the identity of each template.
        metric: see `EmbeddingClassifier`.
        scale: factor on the similarities.
        bias: float [C] or None.
    """

    templates: Tensor
    identity: Tensor
    bias: Tensor | None
    _places: Tensor | None

    def __init__(
        self, templates: Tensor, identity: Tensor, metric: Metric, scale: float, bias: Tensor | None
    ) -> None:
        super().__init__()
        self.metric, self.scale = metric, scale
        self.register_buffer("templates", templates)
        self.register_buffer("identity", identity)
        self.register_buffer("bias", bias)
        self.register_buffer("_places", _places(identity), persistent=False)

    def __len__(self) -> int:
        return int(self.identity[-1]) + 1

    def forward(self, embeddings: Tensor) -> Tensor:
        logits = self.scale * self.similarities(embeddings)
        return logits if self.bias is None else logits + self.bias

    def similarities(self, embeddings: Tensor) -> Tensor:
        """[N, D] -> [N, C]: that of the best template of each identity."""
        templates = self.templates
        if self.metric == "cosine":
            similarity = F.normalize(embeddings, dim=1) @ F.normalize(templates, dim=1).T
        elif self.metric == "dot":
            similarity = embeddings @ templates.T
        else:  # in this form without a tensor [N, T, D]
            square = embeddings.square().sum(1, keepdim=True) + templates.square().sum(1)
            similarity = 2 * (embeddings @ templates.T) - square
        return similarity if self._places is None else similarity[:, self._places].amax(2)

    def part(self, identities: Sequence[int]) -> SimilarityLayer:
        """A gallery of some identities, numbered from 0 in the order given."""
        chosen = torch.tensor(list(identities), device=self.identity.device)
        counts = torch.bincount(self.identity)
        first, counts = (counts.cumsum(0) - counts)[chosen], counts[chosen]
        number = torch.arange(len(chosen), device=chosen.device).repeat_interleave(counts)
        place = (
            torch.arange(len(number), device=chosen.device) - (counts.cumsum(0) - counts)[number]
        )
        bias = None if self.bias is None else self.bias[chosen]
        rows = self.templates[first[number] + place]
        return SimilarityLayer(rows, number, self.metric, self.scale, bias)

    def extra_repr(self) -> str:
        size = f"{len(self)} identities, {len(self.templates)} templates"
        return f"{size}, {self.metric}, scale={self.scale:.4g}"


class EmbeddingClassifier(nn.Module):
    """An encoder and its gallery: images -> one logit per identity.

    The logit of an identity is ``scale * similarity + bias``, with the similarity of its best
    template. `unlearn` trains the encoder and leaves the templates as they are: the result's
    ``encoder`` is what to deploy.

    Args:
        encoder: images [N, ...] -> embeddings [N, D]: a tensor, or the first tensor of a tuple, or
            in a dict or object as ``image_embeds``, ``pooler_output``, ``embeddings`` and the like.
            If it has a method ``get_image_features`` (transformers) or ``encode_image``
            (open_clip), that is called instead of ``forward``.
        templates: float [C, D], one vector per identity: enrolled embeddings, text embeddings, or
            the rows of a classifier. For several templates per identity: [C, k, D], a list of
            tensors [k, D], or a dict of names and tensors [D] or [k, D].
        names: of the identities, in their order, all different; None: not known.
        scale: factor on the similarities, such as ``logit_scale.exp()`` of CLIP. None: 1 for
            metric="dot"; otherwise it is fitted to the templates, see `fitted_scale`.
        metric: "cosine"; "dot", for the rows of a linear classifier; or "euclidean", for which the
            similarity is minus the squared distance.
        bias: float [C], added to the logits; None: none.

    Attributes:
        encoder: as it was passed.
        templates: float32 [T, D], ordered by identity.
        identity: int64 [T], ascending: the identity of each template.
        class_names: the names, or None.
        scale, metric: as above.

    Raises:
        ArgumentError: an argument can't be used, such as zero or NaN templates, or duplicate names.
    """

    def __init__(
        self,
        encoder: nn.Module,
        templates: Tensor | Sequence[Tensor] | Mapping[str, Tensor],
        names: Sequence[str] | None = None,
        scale: float | None = None,
        metric: Metric = "cosine",
        bias: Tensor | None = None,
    ) -> None:
        super().__init__()
        if not isinstance(encoder, nn.Module) or isinstance(encoder, EmbeddingClassifier):
            raise ArgumentError(
                "encoder", f"got a {type(encoder).__name__}",
                "Pass the torch.nn.Module that returns embeddings.",
            )  # fmt: skip
        check_choice("metric", metric, METRICS)
        if isinstance(templates, Mapping):
            if names is not None:
                raise ArgumentError(
                    "names", "got names beside a dict of templates", "Leave names out."
                )
            names, templates = list(templates), list(templates.values())
        rows, identity = _as_templates(templates)
        count = int(identity[-1]) + 1
        self.class_names = _check_names(names, count)
        offset = _check_bias(bias, count)
        device = next((p.device for p in encoder.parameters()), rows.device)
        rows, identity = rows.to(device), identity.to(device)
        if offset is not None:
            offset = offset.to(device)
        factor = 1.0 if scale is None else _check_scale(scale)
        self.encoder = encoder
        self.gallery = SimilarityLayer(rows, identity, metric, factor, offset)
        if scale is None and metric != "dot":
            self.gallery.scale = fitted_scale(self.gallery)

    @classmethod
    def of_gallery(
        cls, model: EmbeddingClassifier, gallery: SimilarityLayer
    ) -> EmbeddingClassifier:
        """The encoder of ``model`` with another gallery, without names."""
        other = cls.__new__(cls)
        nn.Module.__init__(other)
        other.class_names, other.encoder, other.gallery = None, model.encoder, gallery
        other.training = model.training  # without train(), which would reach into the encoder
        return other

    def forward(self, x: Tensor) -> Tensor:
        """Images [N, ...] -> logits [N, C]."""
        return self.gallery(self.embed(x))

    def embed(self, x: Tensor) -> Tensor:
        """Images [N, ...] -> embeddings [N, D].

        Raises:
            ModelError: the encoder does not return one vector of D values per image.
        """
        embeddings = embed_images(self.encoder, x)
        if isinstance(embeddings, Tensor):
            self._check_embeddings(embeddings, len(x))
        return embeddings.flatten(1)

    def similarities(self, z: Tensor) -> Tensor:
        """Embeddings [N, D] -> similarities [N, C]: that of the best template per identity."""
        return self.gallery.similarities(z)

    @property
    def templates(self) -> Tensor:
        return self.gallery.templates

    @property
    def identity(self) -> Tensor:
        return self.gallery.identity

    @property
    def bias(self) -> Tensor | None:
        return self.gallery.bias

    @property
    def scale(self) -> float:
        return self.gallery.scale

    @property
    def metric(self) -> Metric:
        return self.gallery.metric

    def _check_embeddings(self, embeddings: Tensor, images: int) -> None:
        shape, width = tuple(embeddings.shape), self.templates.shape[1]
        if len(shape) < 2 or shape[0] != images or any(n != 1 for n in shape[2:]):
            raise ModelError(
                f"its encoder does not return one vector per image: for {images} images its output "
                f"is {list(shape)}",
                "Pass an encoder that returns [N, D], such as with its pooling.",
            )
        if not embeddings.is_floating_point():
            raise ModelError(
                f"its encoder returns {embeddings.dtype}", "Pass one that returns floats."
            )
        if shape[1] != width:
            raise ModelError(
                f"its encoder returns vectors of {shape[1]} values, and the templates have {width}",
                "Pass templates that were enrolled with this encoder.",
            )


def as_embedding_classifier(model: nn.Module) -> EmbeddingClassifier | None:
    """``model``, without wrappers, if it is an `EmbeddingClassifier`; else None."""
    inner = unwrap(model)
    return inner if isinstance(inner, EmbeddingClassifier) else None


def deliverable(model: nn.Module) -> nn.Module:
    """What is written and hashed: the encoder of an `EmbeddingClassifier`, else ``model``."""
    classifier = as_embedding_classifier(model)
    return model if classifier is None else classifier.encoder


@torch.no_grad()
def fitted_scale(gallery: SimilarityLayer) -> float:
    """The scale at which a template itself is recognised with a confidence of 99.5 %.

    That is, by the median of up to 256 identities, in a softmax over all of them. It needs no
    images: impressions, which lie further from a template, reach the confidences that they are
    synthesised to.
    """
    count = len(gallery)
    most = max(1, min(_FITTED_ON, _FITTED_VALUES // count))
    labels = torch.arange(0, count, max(1, count // most), device=gallery.identity.device)[:most]
    firsts = torch.searchsorted(gallery.identity, labels)
    similarity = torch.cat([gallery.similarities(t) for t in gallery.templates[firsts].split(16)])
    own = similarity.gather(1, labels[:, None])
    below = (similarity - own).scatter(1, labels[:, None], 0.0)
    low, high = 1e-6, _LARGEST_SCALE
    for _ in range(40):  # bisection of the logarithm
        middle = (low * high) ** 0.5
        confidence = (middle * below).softmax(1).gather(1, labels[:, None])
        low, high = (low, middle) if float(confidence.median()) > _REACHED else (middle, high)
    return float(high)


def _places(identity: Tensor) -> Tensor | None:
    """int64 [C, k]: the templates of each identity, one repeated where there are fewer than k; None
    if each has one.
    """
    counts = torch.bincount(identity)
    most = int(counts.max())
    if most == 1:
        return None
    first = counts.cumsum(0) - counts
    place = torch.arange(most, device=identity.device).expand(len(counts), -1)
    return first[:, None] + torch.minimum(place, counts[:, None] - 1)


def _as_templates(templates: Any) -> tuple[Tensor, Tensor]:
    """Checked templates float32 [T, D], and the identity of each, int64 [T]."""
    if isinstance(templates, Tensor) and templates.ndim in (2, 3):
        rows, each = templates, 1 if templates.ndim == 2 else templates.shape[1]
        counts = torch.full((len(templates),), each)
    elif isinstance(templates, Sequence) and not isinstance(templates, str | bytes):
        groups = [_as_rows(group, place) for place, group in enumerate(templates)]
        if len(widths := sorted({g.shape[1] for g in groups})) > 1:
            raise ArgumentError("templates", f"their widths differ: {shorten(widths)}", _TEMPLATES)
        rows = torch.cat(groups) if groups else torch.empty(0, 1)
        counts = torch.tensor([len(g) for g in groups])
    else:
        shape = f" {list(templates.shape)}" if isinstance(templates, Tensor) else ""
        raise ArgumentError("templates", f"got a {type(templates).__name__}{shape}", _TEMPLATES)
    if not rows.is_floating_point():
        raise ArgumentError("templates", f"got {rows.dtype}", _TEMPLATES)
    if len(counts) < 2 or not rows.numel():
        one = "the templates of one identity" if len(counts) == 1 else "no templates"
        raise ArgumentError(
            "templates", f"got {one}",
            "Pass at least two identities: those that stay say what an encoder has to keep.",
        )  # fmt: skip
    identity = torch.arange(len(counts)).repeat_interleave(counts)
    rows = rows.detach().float().cpu().reshape(len(identity), -1).clone()
    check_vectors("templates", rows, identity)
    return rows, identity


def _as_rows(group: Any, place: int) -> Tensor:
    """The templates of one identity, [k, D]."""
    if not isinstance(group, Tensor) or group.ndim not in (1, 2) or not group.numel():
        shape = f" {list(group.shape)}" if isinstance(group, Tensor) else ""
        raise ArgumentError(
            "templates", f"identity {place} has a {type(group).__name__}{shape}", _TEMPLATES
        )
    return group.reshape(-1, group.shape[-1])


def check_vectors(argument: str, rows: Tensor, identity: Tensor) -> None:
    """Raises if a row of float [T, D] is not finite, or 0; ``identity`` is named then.

    Raises:
        ArgumentError: there is such a row.
    """
    for wrong, what in (
        (~rows.isfinite().all(1), "NaN or infinite values"),
        (~rows.any(1), "a vector of zeros"),
    ):
        if bool(wrong.any()):
            found = shorten(identity[wrong].unique().tolist())
            raise ArgumentError(
                argument, f"got {what} for identity {found}", "Enrol it again, or leave it out."
            )


def _check_names(names: Sequence[str] | None, count: int) -> tuple[str, ...] | None:
    if names is None:
        return None
    one_per_identity = f"Pass {count} names, one per identity."
    if isinstance(names, str) or not all(isinstance(n, str) and n.strip() for n in names):
        raise ArgumentError("names", f"got {shorten(map(repr, names), 3)}", one_per_identity)
    if len(names) != count:
        raise ArgumentError("names", f"got {len(names)} for {count} identities", one_per_identity)
    found = tuple(n.strip() for n in names)
    if len({*found}) < count:
        twice = sorted({n for n in found if found.count(n) > 1}) if count <= 10_000 else ["some"]
        raise ArgumentError(
            "names", f"{shorten(twice)} is there more than once",
            "Give each identity a name of its own. For several templates of one identity, pass "
            "templates as a dict of names and [k, D].",
        )  # fmt: skip
    return found


def _check_scale(scale: Any) -> float:
    value = scale.item() if isinstance(scale, Tensor) and scale.numel() == 1 else scale
    if not is_number(value) or value <= 0:
        raise ArgumentError("scale", f"got {scale!r}", "Pass a number above 0, or None to fit it.")
    return float(value)


def _check_bias(bias: Any, count: int) -> Tensor | None:
    if bias is None:
        return None
    fits = isinstance(bias, Tensor) and bias.shape == (count,) and bias.is_floating_point()
    if not fits or not bool(bias.isfinite().all()):
        raise ArgumentError(
            "bias", f"got {list(bias.shape) if isinstance(bias, Tensor) else bias!r}",
            f"Pass {count} finite floats, one per identity.",
        )  # fmt: skip
    return bias.detach().float().clone()
