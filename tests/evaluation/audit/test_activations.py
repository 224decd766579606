"""Layers of a deep model are sampled, and their inputs pooled."""

from __future__ import annotations

import torch

from zsu_fast.evaluation.audit.activations import pool_features, sample_layers


def test_layers_are_thinned_out_evenly() -> None:
    names = [f"layer{i}" for i in range(53)]
    chosen = sample_layers(names)
    assert len(chosen) == 8
    assert (chosen[0], chosen[-1]) == (names[0], names[-1])
    assert sample_layers(names[:5]) == names[:5]


def test_summaries_are_bounded() -> None:
    assert pool_features(torch.zeros(2, 64, 56, 56), 512).shape == (2, 256)
    assert pool_features(torch.zeros(2, 512, 13, 13), 4096).shape == (2, 2048)
    assert pool_features(torch.zeros(2, 197, 192), 512).shape == (2, 192)
    assert pool_features(torch.zeros(2, 320), 512).shape == (2, 320)
