"""Multi-label models: what is forgotten, what stays, what the original last layer restores."""

from __future__ import annotations

import copy
import warnings
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from multi_label_case import IMAGES, measure, run, several, several_data
from support import FORGET, changed_tensors, untouched
from torch import nn

import zsu_fast
from zsu_fast import ArgumentError, UnlearningWarning
from zsu_fast.training.deep.settings import DeepSettings

RETAINED = [c for c in range(5) if c not in FORGET]


@pytest.fixture(autouse=True)
def _expected_warnings() -> Any:
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="level: output", category=UnlearningWarning)
        yield


def test_output_level_changes_the_forgotten_logits_alone() -> None:
    model, (images, _) = several(), several_data()
    with untouched(model):
        _, result = run(model, depth="output")
    found = measure(result)
    assert measure(model).forget_rate > 95
    assert found.forget_rate <= 1, str(found)
    assert changed_tensors(model, result) <= {"fc2.weight", "fc2.bias"}
    with torch.no_grad():
        assert torch.equal(result(images)[:, RETAINED], model(images)[:, RETAINED])


def test_images_as_impressions_forget_as_well() -> None:
    runner, result = run(depth="output", space="input")
    assert measure(result).forget_rate <= 1
    confidence = runner.impressions.confidence
    with torch.no_grad():
        own = several()(runner.impressions.images).sigmoid()
    own = own.gather(1, runner.impressions.labels[:, None])[:, 0]
    assert torch.allclose(confidence, own, atol=1e-4)  # a sigmoid's, not a softmax's
    assert bool((confidence[runner.impressions.hit] >= 0.5).all())


def test_with_two_layers_trained_retained_logits_keep_their_values() -> None:
    model, (images, _) = several(), several_data()
    runner, result = run(model, depth="output", tail=2)
    found, before = measure(result), measure(model)
    assert found.forget_rate <= 1
    assert found.retain_f1 >= before.retain_f1 - 2
    with torch.no_grad():
        moved = (result(images) - model(images))[:, RETAINED]
        size = model(images)[:, RETAINED].abs().mean()
    assert abs(float(moved.mean())) < 0.1 * float(size)  # they don't move together
    assert runner.record.fit["best"]["agreement"] > 0.9


@pytest.mark.filterwarnings("ignore:.*")
@pytest.mark.parametrize("depth", ["output", "deep"])
def test_a_class_that_is_never_predicted_can_not_be_told(depth: Any) -> None:
    """Its leak was 0 of 0, and the verdict passed."""
    model = several()
    model.fc2.weight.data[FORGET] *= 1e-3
    model.fc2.bias.data[FORGET] = -3
    runner, _ = run(model, depth=depth)
    assert runner.verdict is not None
    assert runner.verdict.leak is None
    assert not runner.verdict.passed
    assert "Cannot be told" in str(runner.verdict)


def test_the_leak_of_a_deep_run_is_of_rows_that_the_original_recognises() -> None:
    """After it, the last layer's fit has no row in which a forgotten class is seen."""
    runner, _ = run()
    assert runner.verdict is not None
    assert runner.record.depth["level"] == "deep"
    assert runner.verdict.leak is not None
    assert runner.verdict.leak <= 0.01
    assert runner.verdict.passed


def test_deep_forgetting_survives_the_original_last_layer() -> None:
    model = several()
    with untouched(model):
        runner, result = run(model, settings=DeepSettings(), steps=None, mixtures=None)
    assert runner.record.depth["level"] == "deep"
    assert runner.record.multi_label
    found, before = measure(result), measure(model)
    assert found.forget_rate <= 1
    assert found.retain_average_precision >= before.retain_average_precision - 2
    assert found.retain_f1 >= before.retain_f1 - 3
    # a lower threshold does not bring the classes back either (chance is 35 %)
    assert before.forget_average_precision > 99
    assert found.forget_average_precision < 75
    back = copy.deepcopy(result)
    back.set_submodule("fc2", model.get_submodule("fc2"))
    assert measure(back).forget_rate <= 10


def test_a_config_is_enough() -> None:
    model = several()
    model.config = SimpleNamespace(problem_type="multi_label_classification", image_size=8)
    runner, result = run(model, depth="output", multi_label=None)
    assert runner.multi_label
    assert runner.record.to_dict()["multi_label"]
    assert measure(result).forget_rate <= 1


def test_a_model_that_ends_in_a_sigmoid() -> None:
    model = nn.Sequential(several(), nn.Sigmoid())
    with pytest.warns(UnlearningWarning, match="ends in a sigmoid"):
        _, result = run(model, depth="output", multi_label=None)
    found = measure(result)
    assert found.outputs == "probabilities"
    assert found.forget_rate <= 1
    assert found.retain_f1 >= measure(model).retain_f1 - 1


def test_a_softmax_model_is_what_it_was() -> None:
    runner, _ = run(depth="output", multi_label=False)
    assert not runner.multi_label
    assert "multi_label" not in runner.options.ascent.facts()


def test_the_differential_objective_is_refused_before_the_work() -> None:
    with pytest.raises(ArgumentError, match="objective: got 'differential' for a multi-label"):
        zsu_fast.ZeroShotUnlearner(
            several(), FORGET, objective="differential", multi_label=True, **IMAGES
        )


def test_synthesize_reads_the_kind_too() -> None:
    found = zsu_fast.synthesize(
        several(), [0], per_class=8, multi_label=True, progress=False, **IMAGES
    )
    with torch.no_grad():
        own = several()(found.images)[:, 0].sigmoid()
    assert torch.allclose(found.confidence, own, atol=1e-4)


def test_compact_leaves_the_retained_logits() -> None:
    model, (images, _) = several(), several_data(20)
    runner, result = run(model, depth="output", compact=True)
    with torch.no_grad():
        assert torch.allclose(result(images), runner.full_size(images)[:, RETAINED], atol=1e-4)
    assert runner.verdict.passed


def test_the_verdict_of_a_run() -> None:
    runner, _ = run(depth="output")
    assert runner.verdict.level == "output"
    assert runner.verdict.passed
    assert runner.verdict.unmask_leak == 1  # of the rows in which the original sees a class
