"""The audit of multi-label models: what it recognises, and what it does not claim to know."""

from __future__ import annotations

import warnings
from typing import Any

import pytest
from multi_label_case import IMAGES, run, several, several_data
from support import FORGET
from torch import nn

import zsu_fast
from zsu_fast import ArgumentError, UnlearningWarning
from zsu_fast.evaluation.audit.result import Audit, CheckName, FindingName
from zsu_fast.evaluation.report.page import render
from zsu_fast.training.deep.settings import DeepSettings


def audit(unlearned: nn.Module, data: Any = None, **options: Any) -> Audit:
    given = {"multi_label": True, "progress": False, "impressions_per_class": 4} | IMAGES
    return zsu_fast.audit(several(), unlearned, FORGET, data, **given | options)


def passed(result: Audit, name: str) -> bool | None:
    return {check.name: check.passed for check in result.checks}[name]


@pytest.fixture(scope="module")
def output() -> nn.Module:
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="level: output", category=UnlearningWarning)
        return run(depth="output")[1]


@pytest.mark.parametrize("data", [None, several_data()])
def test_the_original_has_forgotten_nothing(data: Any) -> None:
    result = audit(several(), data)
    assert result.found(FindingName.UNTOUCHED)
    assert passed(result, CheckName.OUTPUTS) is False
    assert result.row("unlearned").values["impressions_fa"] == 100


@pytest.mark.parametrize("data", [None, several_data()])
def test_a_mask_is_recognised(data: Any) -> None:
    result = audit(zsu_fast.mask(several(), FORGET), data)
    assert result.found(FindingName.MASK)
    assert passed(result, CheckName.OUTPUTS) is True
    assert passed(result, CheckName.UNMASK) is False
    values = result.row("unlearned").values
    assert values["unmask_impressions_fa"] == 100
    if data is not None:
        assert values["fa"] == 0
        assert values["unmask_fa"] > 95


def test_output_level(output: nn.Module) -> None:
    result = audit(output, several_data())
    assert result.found(FindingName.OUTPUT_LEVEL)
    assert passed(result, CheckName.RETAINED) is True
    assert passed(result, CheckName.ADAPTED_UNMASK) is False
    assert passed(result, CheckName.PROBE) is False


def test_deep_forgetting_passes_the_un_mask_test() -> None:
    _, unlearned = run(settings=DeepSettings(), steps=None, mixtures=None)
    result = audit(unlearned, several_data())
    assert passed(result, CheckName.OUTPUTS) is True
    assert passed(result, CheckName.RETAINED) is True
    assert passed(result, CheckName.UNMASK) is True
    assert passed(result, CheckName.FEATURES) is True
    assert passed(result, CheckName.RESYNTHESIS) is True


def test_what_a_softmax_defines_can_not_be_told(output: nn.Module) -> None:
    data = several_data()
    result = audit(output, data, train_data=data, golden=several())
    for name in (CheckName.AMONG_FORGOTTEN, CheckName.KNN, CheckName.MEMBERSHIP,
                 CheckName.DIVERGENCE):  # fmt: skip
        assert passed(result, name) is None, name
    for row in result.rows:
        for metric in result.definitions.values():
            assert (metric.key in row.values) != (metric.key in row.missing), metric.key
            if metric.key.startswith(("kl_", "js_", "mia_", "activation_", "agreement_kl")):
                assert "softmax" in row.missing[metric.key]
    assert "average precision" in result.definitions["ra"].formula
    plain = result.to_dict()
    assert plain["settings"]["multi_label"] is True
    assert next(m for m in plain["metrics"] if m["key"] == "ra")["title"] == "RA (mean AP)"
    assert "RA (mean AP)" in str(result)
    assert "RA (mean AP)" in render(result)


def test_without_data_the_retained_classes_are_not_judged(output: nn.Module) -> None:
    assert passed(audit(output), CheckName.RETAINED) is None


def test_one_class_per_image_is_refused(output: nn.Module) -> None:
    images, labels = several_data()
    with pytest.raises(ArgumentError, match="one class per image"):
        audit(output, (images, labels.long().argmax(1)))


def test_models_that_end_in_a_sigmoid(output: nn.Module) -> None:
    models = (nn.Sequential(m, nn.Sigmoid()) for m in (several(), output))
    result = zsu_fast.audit(
        *models, FORGET, several_data(), progress=False, impressions_per_class=4, **IMAGES
    )
    plain = audit(output, several_data())
    assert any("ends in a sigmoid" in note for note in result.notes)
    for key in ("fa", "ra", "unmask_fa", "impressions_fa"):
        assert result.row("unlearned").values[key] == pytest.approx(
            plain.row("unlearned").values[key], abs=1
        )


def test_relearning_takes_longer_after_deep_forgetting() -> None:
    _, unlearned = run(settings=DeepSettings(), steps=None, mixtures=None)
    result = audit(unlearned, several_data(), relearn_steps=300)
    original, row = result.row("original"), result.row("unlearned")
    for trained in ("last_layer", "full"):
        assert 1 < original.values[f"relearn_{trained}_steps"] < 300, trained
        assert original.relearning[trained][0][1] < 50  # reset rows: the classes start unknown
    steps = "relearn_last_layer_steps"
    assert row.values[steps] > original.values[steps]
    # a mask starts where the original does
    assert result.row("mask").values["relearn_full_steps"] == original.values["relearn_full_steps"]
