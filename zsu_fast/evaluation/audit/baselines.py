"""The models that every audit puts beside the unlearned one: the mask and random embeddings."""

from __future__ import annotations

from torch import Tensor

from ...models.input_spec import InputSpec
from ..baselines import train_on_noise
from .audited_model import AuditedModel, variant


def masked(original: AuditedModel, forget: list[int], spec: InputSpec) -> AuditedModel:
    """The original with the forgotten logits at -inf: hides, does not forget."""
    made = variant(original, "mask", spec)
    made.hidden = forget
    return made


def random_embeddings(
    original: AuditedModel, gone: Tensor, spec: InputSpec, seed: int
) -> AuditedModel:
    """The last layer trained on noise instead of impressions, see `zsu_fast.random_embeddings`.

    Args:
        original, spec, seed: as in `AuditContext`.
        gone: bool [C], the forgotten classes.
    """
    made = variant(original, "random embeddings", spec)
    device = next(made.model.parameters()).device
    train_on_noise(made.model, made.cut, spec, gone.to(device), seed)
    return made
