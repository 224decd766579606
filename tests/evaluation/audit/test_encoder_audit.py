"""The audit of an encoder: what deep forgetting changes, and what removing a template does not."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from encoder_case import TinyEncoder, blinded, labelled, tiny_classifier, tiny_encoder
from torch import nn

from zsu_fast import ArgumentError, Audit, EmbeddingClassifier, audit
from zsu_fast.evaluation.audit.result import CheckName, EncoderCheckName, FindingName

QUICK: dict[str, Any] = {"relearn_steps": 5, "shots": 20, "progress": False}


def passed(result: Audit) -> dict[str, bool | None]:
    return {check.name: check.passed for check in result.checks}


@pytest.fixture(scope="module")
def golden() -> nn.Module:
    """An encoder that never learned anything of bob: random weights do."""
    with torch.random.fork_rng():
        torch.manual_seed(5)
        return TinyEncoder().eval()


@pytest.fixture(scope="module")
def of_blinded(golden: nn.Module) -> Audit:
    original = tiny_classifier()
    return audit(original, blinded(original, 1), "bob", labelled(400), golden, **QUICK)


def test_a_blinded_encoder_passes_what_it_should(of_blinded: Audit) -> None:
    before, after = of_blinded.row("original"), of_blinded.row("unlearned")
    assert before.values["identified_forget_1e2"] > 80
    assert after.values["identified_forget_1e2"] < 20
    assert after.values["identified_forget_original"] < 20
    assert after.values["rank1_retain"] > 90
    assert after.values["reenrolled_rank1_forget"] > after.values["rank1_forget"]
    assert 0 < after.values["drift_backbone"] < 1
    assert before.values["relearn_full_steps"] >= 1
    assert before.values["probe_forget"] > 90
    assert of_blinded.counts == {"forget_images": 80, "retain_images": 320}
    assert of_blinded.settings["labels"] == {"1": "bob"}


def test_every_metric_has_a_value_or_a_reason(of_blinded: Audit) -> None:
    for row in of_blinded.rows:
        for key in of_blinded.definitions:
            assert (key in row.values) != (key in row.missing), (row.name, key)


def test_a_golden_encoder_alone_is_measured_re_enrolled_only(of_blinded: Audit) -> None:
    row = of_blinded.row("golden")
    assert "without templates" in row.missing["rank1_forget"]
    assert row.values["reenrolled_rank1_forget"] > 0
    assert set(row.distributions) == {"re-enrolled"}
    assert set(of_blinded.row("unlearned").distributions) == {"original's templates", "re-enrolled"}


def test_the_original_itself_fails_whatever_its_gallery_holds() -> None:
    original = tiny_classifier()
    emptied = copy.deepcopy(original)
    emptied.gallery.templates[1] = 0.0  # bob's template is removed
    result = audit(original, emptied, "bob", labelled(400), **QUICK)
    assert result.found(FindingName.UNTOUCHED)
    assert passed(result)[EncoderCheckName.IDENTIFICATION] is False
    assert passed(result)[CheckName.PROBE] is False
    assert result.row("unlearned").values["rank1_forget"] > 90


def test_an_encoder_that_takes_bob_for_another_is_found() -> None:
    original = tiny_classifier()
    accusing = copy.deepcopy(original)
    bob, cleo = original.templates[1], original.templates[2]
    layer = accusing.encoder.get_submodule("fc1")
    assert isinstance(layer, nn.Linear)
    axis = bob / bob.norm()
    move = torch.eye(len(bob)) + torch.outer(cleo / cleo.norm() - axis, axis)
    layer.weight.data, layer.bias.data = move @ layer.weight.data, move @ layer.bias.data
    result = audit(original, accusing, "bob", labelled(400), **QUICK)
    assert passed(result)[EncoderCheckName.STRANGERS] is False
    assert result.found(FindingName.ACCUSES)


def test_a_damaged_encoder_is_found() -> None:
    original = tiny_classifier()
    broken = copy.deepcopy(original)
    with torch.random.fork_rng():
        torch.manual_seed(0)
        for parameter in broken.encoder.parameters():
            parameter.data += torch.randn_like(parameter)
    result = audit(original, broken, "bob", labelled(400), **QUICK)
    assert result.found(FindingName.DAMAGED)
    assert passed(result)[EncoderCheckName.RETAINED_IDENTITIES] is False


def test_train_data_enrols_and_relearns_and_data_measures() -> None:
    original = tiny_classifier()
    result = audit(
        original, blinded(original, 1), ["bob"], labelled(100), train_data=labelled(200, seed=9),
        **QUICK,
    )  # fmt: skip
    assert result.counts["train_images"] == 200
    assert result.counts["forget_images"] == 20
    assert result.settings["reenrolled_images"] == 5
    assert result.row("original").values["reenrolled_rank1_retain"] > 80


def test_without_images_impressions_are_identified() -> None:
    original = tiny_classifier()
    result = audit(original, blinded(original, 1).encoder, "bob", progress=False)
    before, after = (
        result.row(name).values["impressions_fa"] for name in ("original", "unlearned")
    )
    assert before > 90
    assert after < before
    assert result.row("unlearned").missing["rank1_forget"] == "no images were given (data)"


def test_models_that_do_not_fit_are_refused() -> None:
    original, other = tiny_classifier(), tiny_classifier()
    other.encoder = nn.Sequential(tiny_encoder(), nn.Linear(32, 7))
    with pytest.raises(ArgumentError, match="vectors of 7 values, the templates have 32"):
        audit(original, other, "bob", labelled(), **QUICK)
    pair = EmbeddingClassifier(tiny_encoder(), original.templates[:2])
    with pytest.raises(ArgumentError, match="its gallery has 2 identities"):
        audit(original, original, "bob", labelled(), pair, **QUICK)
    with pytest.raises(ArgumentError, match="output"):
        audit(original, original, "bob", output=0)
