"""Runs encoders on images: embeddings, or an error that says what is wrong with them."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial

import torch
from torch import Tensor, nn

from ..errors import ModelError
from ..models.embedding_classifier import EmbeddingClassifier, as_embedding_classifier
from ..models.embeddings import embed_images
from .run_model import as_model_takes, call_model


@torch.no_grad()
def embed(encoder: nn.Module, images: Tensor, argument: str = "data") -> Tensor:
    """Returns the embeddings of a batch, float32 [N, D] on the CPU.

    Args:
        encoder: see `EmbeddingClassifier`, which may be passed too: its encoder counts then.
        images: float [N, ...]; moved to the encoder's device and dtype.
        argument: what the images are, for errors.

    Raises:
        ArgumentError: the encoder raises for these images.
        ModelError: it does not return one vector per image, or vectors that are NaN or infinite, or
            not as wide as the templates, if there are any.
    """
    classifier = as_embedding_classifier(encoder)
    encoder = encoder if classifier is None else classifier.encoder
    run = partial(embed_images, encoder)
    found = call_model(run, as_model_takes(encoder, images), argument)
    shape = tuple(found.shape) if isinstance(found, Tensor) else type(found).__name__
    if (
        not isinstance(found, Tensor)
        or found.ndim < 2
        or len(found) != len(images)
        or found[0].numel() != found.shape[1]
    ):
        raise ModelError(
            f"for {len(images)} images its encoder returns {shape}, not one vector each",
            "Pass an encoder that returns [N, D], such as with its pooling.",
        )
    if classifier is not None and found.shape[1] != (width := classifier.templates.shape[1]):
        raise ModelError(
            f"its encoder returns vectors of {found.shape[1]} values, and the templates have "
            f"{width}",
            "Pass templates that were enrolled with this encoder.",
        )
    vectors = found.float().flatten(1).cpu()
    bad = (~vectors.isfinite()).any(1)
    if bool(bad.any()):
        raise ModelError(
            f"its embeddings of {int(bad.sum())} of {len(images)} images are NaN or infinite",
            "Check the weights, the dtype and the normalisation of the images.",
        )
    return vectors


def scores_of(classifier: EmbeddingClassifier) -> Callable[[Tensor], Tensor]:
    """Returns what compares embeddings [n, D] with a gallery: similarities [n, C] on the CPU.

    A bias counts as far as it does in the logits: the score is the logit over the scale.
    """

    @torch.no_grad()
    def scores(embeddings: Tensor) -> Tensor:
        templates = classifier.templates
        found = classifier.similarities(embeddings.to(templates.device, templates.dtype))
        if classifier.bias is not None:
            found = found + classifier.bias / classifier.scale
        return found.float().cpu()

    return scores
