"""Encoders made of classifiers: the last layer's input comes out, and files load either way."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from support import Returning, same_bits, tiny
from torch import nn

from zsu_fast import CheckpointError, ModelError
from zsu_fast.models import checkpoint, zoo
from zsu_fast.models.headless import remove_classifier
from zsu_fast.models.loading import load_model


def test_the_encoder_returns_the_input_of_the_last_layer() -> None:
    model, images = zoo.load("lenet5"), torch.randn(3, 1, 28, 28)
    logits, last = model(images), model.fc3
    assert remove_classifier(model) == "fc3"
    embeddings = model(images)
    assert embeddings.shape == (3, 84)
    torch.testing.assert_close(last(embeddings), logits)


def test_a_model_whose_last_linear_layer_is_not_its_last_is_refused_unchanged() -> None:
    class Gated(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.inner, self.gate = tiny(), nn.Linear(5, 5)

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            logits = self.inner(x)
            return logits * self.gate(logits).sigmoid()

    model = Gated().eval()
    with pytest.raises(ModelError, match="'gate', does not make its output"):
        remove_classifier(model)
    assert isinstance(model.gate, nn.Linear)
    with pytest.raises(ModelError, match="no linear layer"):
        remove_classifier(nn.Sequential(nn.Conv2d(3, 2, 3)))


def test_weights_with_and_without_the_classifier_load(tmp_path: Path) -> None:
    whole, encoder = zoo.load("lenet5"), load_model("lenet5", encoder=True)
    checkpoint.save_weights(tmp_path / "whole.safetensors", whole)
    checkpoint.save_weights(tmp_path / "encoder.safetensors", encoder)
    assert "fc3.weight" not in encoder.state_dict()
    for file in ("whole", "encoder"):
        again = load_model("lenet5", str(tmp_path / f"{file}.safetensors"), encoder=True)
        assert same_bits(again, encoder)
    checkpoint.save_weights(tmp_path / "other.safetensors", tiny())
    with pytest.raises(CheckpointError, match="does not fit LeNet5"):
        load_model("lenet5", str(tmp_path / "other.safetensors"), encoder=True)


def test_an_output_object_is_looked_into() -> None:
    model = Returning(tiny(), lambda logits: (logits,))
    model.input_spec = None  # type: ignore[assignment]
    assert remove_classifier(model) == "inner.fc2"
