"""`check` of an encoder: the templates are in place, whatever the result's gallery holds."""

from __future__ import annotations

import copy
from dataclasses import replace

import pytest
import torch
from encoder_case import blinded, tiny_classifier, tiny_encoder

from zsu_fast import ArgumentError, EmbeddingClassifier, ModelError, check
from zsu_fast.evaluation.check_answers import Answers, CheckRows


def test_a_blinded_encoder_has_forgotten() -> None:
    original = tiny_classifier()
    for result in (blinded(original, 1), blinded(original, 1).encoder):
        verdict = check(original, result, "bob", progress=False)
        assert verdict.level == "deep"
        assert verdict.leak < 0.1
        assert verdict.encoder
        assert "identity 1 (bob)" in str(verdict)


def test_an_emptied_gallery_proves_nothing() -> None:
    original = tiny_classifier()
    emptied = copy.deepcopy(original)
    emptied.gallery.templates[1] = -emptied.gallery.templates[1]
    verdict = check(original, emptied, ["bob"], progress=False)
    assert verdict.level == "none"
    assert verdict.leak > 0.9
    assert str(verdict).startswith("FAILED: Not forgotten")


def test_in_a_large_gallery_the_numbers_are_the_users() -> None:
    original = tiny_classifier()
    generator = torch.Generator().manual_seed(0)
    strangers = torch.randn(5000, 32, generator=generator)
    many = EmbeddingClassifier(original.encoder, torch.cat([strangers, original.templates]))
    verdict = check(many, tiny_encoder(), 5001, progress=False)
    assert verdict.forgotten == [5001]
    assert verdict.level == "none"


def test_what_does_not_fit_is_refused() -> None:
    original = tiny_classifier()
    with pytest.raises(ArgumentError, match="'zoe', which is no class in the gallery"):
        check(original, original, "zoe")
    with pytest.raises(ArgumentError, match="output"):
        check(original, original, "bob", output=1)
    with pytest.raises(ModelError, match="differ in more than values"):
        check(original, torch.nn.Sequential(tiny_encoder()), "bob", progress=False)


def test_an_encoder_is_judged_by_the_rows_of_identities_not_by_scenes() -> None:
    scene, rows = torch.tensor([[3.0, 0, 0]]), 4 * torch.eye(3)
    original = torch.cat([scene.expand(4, 3), rows])
    unlearned = torch.cat([scene.flip(1).expand(4, 3), rows * torch.tensor([1.0, 0, 1])])
    forget = torch.tensor([False, True, False])
    label = torch.arange(3)
    points = CheckRows(original, label, 4, (torch.nn.Identity(), torch.nn.Identity()), "points")
    belongs, retained, control = Answers._select(original, forget, points)
    answers = Answers(
        original, unlearned, unlearned, forget, belongs, retained, control, points, threshold=1.0
    )
    assert answers.agreement(unlearned, False) == 1
    of_classes = replace(answers, threshold=-torch.inf)
    assert of_classes.agreement(unlearned, False) == 0  # each scene has another answer
