"""`evaluate` of an encoder with its gallery."""

from __future__ import annotations

import pytest
import torch
from encoder_case import NAMES, blinded, labelled, tiny_classifier, tiny_encoder

from zsu_fast import ArgumentError, EmbeddingClassifier, ModelError, evaluate
from zsu_fast.evaluation.encoder_evaluation import EncoderEvaluation


def test_a_trained_encoder_recognises_everyone() -> None:
    result = evaluate(tiny_classifier(), labelled(400), ["bob"])
    assert isinstance(result, EncoderEvaluation)
    assert result.forget == [1]
    assert result.labels == {"1": "bob"}
    assert (result.forget_count, result.retain_count) == (80, 320)
    assert result.rates["rank1_forget"] > 90
    assert result.rates["rank1_retain"] > 90
    assert result.rates["identified_forget_1e2"] > 80
    assert result.rates["tar_retain_1e2"] > 80
    assert result.forget_accuracy == result.rates["rank1_forget"]


def test_a_blinded_encoder_does_not_recognise_the_person() -> None:
    classifier = tiny_classifier()
    before = evaluate(classifier, labelled(400), "bob")
    after = evaluate(blinded(classifier, 1), labelled(400), "bob")
    assert after.rates["identified_forget_1e2"] < 20 < before.rates["identified_forget_1e2"]
    assert after.rates["rank1_retain"] > 90


def test_too_few_images_give_no_rate_but_the_reason() -> None:
    result = evaluate(tiny_classifier(), labelled(20), "bob")
    assert "tar_retain_1e2" not in result.rates
    assert result.missing["tar_retain_1e2"] == (
        "the data gives 48 impostor pairs, and a false-accept rate of 1e-02 needs 100"
    )
    assert "threshold_1e2" in result.missing


def test_the_bias_of_a_linear_gallery_counts() -> None:
    classifier, data = tiny_classifier(), labelled()
    assert evaluate(classifier, data, "bob").rates["rank1_retain"] > 90
    classifier.gallery.bias = torch.tensor([0.0, 0.0, 0.0, 0.0, 1e6])
    assert evaluate(classifier, data, "bob").per_identity == {0: 0, 1: 0, 2: 0, 3: 0, 4: 100}


def test_options_of_classifiers_are_refused() -> None:
    for option in ({"output": 0}, {"multi_label": True}):
        with pytest.raises(ArgumentError, match="Leave it out"):
            evaluate(tiny_classifier(), labelled(), "bob", **option)
    with pytest.raises(ArgumentError, match=r"'zoe', which is no class in the gallery"):
        evaluate(tiny_classifier(), labelled(), "zoe")


def test_a_gallery_of_another_width_is_refused() -> None:
    classifier = EmbeddingClassifier(tiny_encoder(), torch.randn(5, 7), NAMES)
    with pytest.raises(ModelError, match="vectors of 32 values, and the templates have 7"):
        evaluate(classifier, labelled(), "bob")
