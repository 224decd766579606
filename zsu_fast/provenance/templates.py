"""Hashes of templates: a ledger shows who was forgotten to those who hold a template, to no others.

A template is biometric data, and so is its plain hash wherever templates can be tried out. Each
entry has a random salt of its own, stored beside the hashes: two entries about one person do not
look alike, and lists of hashes computed beforehand are of no use. Whoever holds the template can
still find the person's entry, as `matching` does: that is the purpose.
"""

from __future__ import annotations

import hashlib
import hmac
import secrets
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from ..models.embedding_classifier import EmbeddingClassifier
from ..models.gallery import Gallery

_BYTES = 16  # of a salt


def hash_templates(groups: Sequence[Tensor], salt: str | None = None) -> dict[str, Any]:
    """HMAC-SHA256 of templates: ``{"salt": hex, "templates": [[hex, ...], ...]}``.

    Args:
        groups: of each identity, its templates, float [k, D]; hashed as little-endian float32.
        salt: hex digits; None draws 16 random bytes.
    """
    salt = secrets.token_hex(_BYTES) if salt is None else salt
    return {"salt": salt, "templates": [[_digest(row, salt) for row in g] for g in groups]}


def matching(metrics: Mapping[str, Any], gallery: EmbeddingClassifier | Gallery) -> list[int]:
    """The identities of a gallery that have a template among the hashed ones, sorted.

    Args:
        metrics: of a ledger's entry; its ``identities``, if there are any, are from
            `hash_templates`.
        gallery: its templates are hashed with the same salt.
    """
    hashed = metrics.get("identities") or {"templates": []}
    known = {digest for group in hashed["templates"] for digest in group}
    if not known:
        return []
    assert gallery.identity is not None
    rows, salt = gallery.templates.detach().cpu(), hashed["salt"]
    pairs = zip(rows, gallery.identity.tolist(), strict=True)
    return sorted({identity for row, identity in pairs if _digest(row, salt) in known})


def _digest(template: Tensor, salt: str) -> str:
    values = template.detach().to("cpu", torch.float32).contiguous().numpy().astype("<f4")
    return hmac.new(bytes.fromhex(salt), values.tobytes(), hashlib.sha256).hexdigest()
