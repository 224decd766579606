"""Audited models and their variants: what they share with the original."""

from __future__ import annotations

import torch
from support import SPEC, tiny

from zsu_fast.evaluation.audit.audited_model import audited_copy, variant


def test_variants_share_the_weights_before_the_last_layer() -> None:
    original = audited_copy("original", tiny(), SPEC, torch.device("cpu"))
    shared = variant(original, "shared")
    assert shared.model.module.fc1.weight is original.model.module.fc1.weight
    assert shared.last_layer.weight is not original.last_layer.weight
    own = variant(original, "own", copy_backbone=True)
    assert own.model.module.fc1.weight is not original.model.module.fc1.weight
    assert own.backbone_hash == shared.backbone_hash == original.backbone_hash
    with torch.no_grad():
        own.model.module.fc1.weight.add_(1)
    changed = audited_copy("own", own.model.module, SPEC, torch.device("cpu"))
    assert changed.backbone_hash != own.backbone_hash
