"""The record of a run: plain JSON, correct hashes, and warnings."""

from __future__ import annotations

import copy
import json
import math
import warnings
from typing import Any

import pytest
import torch
from support import QUICK, SPEC, tiny
from torch import nn

import zsu_fast
from zsu_fast import ZeroShotUnlearner
from zsu_fast.models.parameters import weights_hash
from zsu_fast.provenance.record import Record


def stating() -> nn.Module:
    """A model that states its images."""
    model = tiny()
    model.input_spec = SPEC
    return model


def run(model: nn.Module | None = None, **options: Any) -> tuple[ZeroShotUnlearner, nn.Module]:
    runner = ZeroShotUnlearner(model or tiny(), [1, 3], **(QUICK | options))
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return runner, runner.run()


def test_json_round_trip() -> None:
    runner, _ = run()
    loaded = json.loads(runner.record.to_json())
    assert loaded == runner.record.to_dict()
    rebuilt = Record(**loaded)
    assert rebuilt.to_dict() == loaded
    json.dumps(loaded, allow_nan=False)  # strict JSON: no NaN or Infinity in it
    assert not any(k.startswith("_") for k in loaded)


def test_hashes_are_those_of_the_models() -> None:
    model = tiny()
    runner, result = run(model)
    record = runner.record
    assert record.weights_before == weights_hash(model)
    assert record.weights_after == weights_hash(result)
    assert record.weights_before != record.weights_after
    again, _ = run(model)
    assert again.record.weights_after == record.weights_after


def test_hashes_of_a_run_in_place() -> None:
    model = tiny()
    before = weights_hash(model)
    runner, result = run(model, inplace=True)
    assert result is model
    assert runner.record.weights_before == before
    assert runner.record.weights_after == weights_hash(model) != before


@pytest.mark.parametrize("wrap", [nn.DataParallel, copy.deepcopy])
def test_wrappers_do_not_change_the_record(wrap: Any) -> None:
    plain, wrapped = run()[0].record, run(wrap(tiny()))[0].record
    assert wrapped.model == "TinyNet"
    assert wrapped.weights_before == plain.weights_before
    assert wrapped.weights_after == plain.weights_after


def test_settings_and_results() -> None:
    runner, _ = run(seed=9, tail="fc1", mean=(0.1, 0.2, 0.3), std=(0.5, 0.5, 0.5))
    record, impressions = runner.record, runner.impressions
    assert record.forget == [1, 3]
    assert record.classes == 5
    settings = record.settings
    assert (settings["seed"], settings["tail"], settings["inplace"]) == (9, "fc1", False)
    assert settings["confidence"] == [0.55, 0.99]
    assert set(settings).isdisjoint({"self", "model", "forget", "callback", "progress"})
    assert record.input["shape"] == (3, 8, 8)
    assert record.input["mean"] == (0.1, 0.2, 0.3)
    assert "mean and std given" in record.input["source"]
    assert record.versions["torch"] == torch.__version__
    assert set(record.versions) == {"zsu_fast", "torch", "python", "platform", "threads", "device"}
    assert record.impressions["count"] == len(impressions) == 40
    assert record.impressions["hit_rate"] == impressions.hit_rate
    assert record.impressions["most_steps"] == int(impressions.steps.max())
    mean = float(impressions.confidence.mean())
    assert record.impressions["mean_confidence"] == pytest.approx(mean)
    assert record.split["at"] == "fc1"
    assert record.split["trained"] == runner.split_point.parameters
    assert record.split["output_level"] is False
    assert len(record.fit["history"]) == len(runner.history)
    assert record.fit["best"]["step"] == runner.result.best.step
    assert record.fit["learning_rate"] == runner.result.learning_rate
    stages = [record.timings[k] for k in ("synthesise", "split", "fit")]
    assert all(t > 0 for t in stages)
    assert record.timings["total"] >= sum(stages)


def test_numbers_that_are_not_finite_become_null() -> None:
    runner, _ = run()
    assert math.isnan(runner.history[0].loss)
    loaded = json.loads(runner.record.to_json())
    assert loaded["fit"]["history"][0]["loss"] is None
    runner.record.timings["odd"] = math.inf
    assert json.loads(runner.record.to_json())["timings"]["odd"] is None


def test_a_good_run_has_no_warnings() -> None:
    assert run(stating(), tail="fc1", impressions_per_class=16)[0].record.warnings == []


def test_output_level_forgetting_warns() -> None:
    with pytest.warns(zsu_fast.UnlearningWarning, match="level: output. Only the last layer"):
        zsu_fast.unlearn(stating(), [1, 3], tail="last", **QUICK)
    (note,) = run(stating(), tail="last")[0].record.warnings
    assert "(fc2.weight, fc2.bias) was trained" in note
    assert "features of the forgotten classes are still inside" in note


def test_guessed_normalisation_warns() -> None:
    (note,) = run(tiny(), tail="fc1", impressions_per_class=16)[0].record.warnings
    assert "ImageNet mean and std assumed" in note
    given = run(tiny(), tail="fc1", impressions_per_class=16, mean=SPEC.mean, std=SPEC.std)[0]
    assert given.record.warnings == []


def test_a_class_without_impressions_warns() -> None:
    model = stating()
    with torch.no_grad():
        model.fc2.weight[4] = 0
        model.fc2.bias[4] = -1e4
    runner, _ = run(model, tail="fc1", impressions_per_class=16, max_steps=15, restarts=0)
    (note,) = runner.record.warnings
    assert "for class 4:" in note
    assert "Raise max_steps" in note
    assert runner.record.impressions["worst_class_hit_rate"] == 0
    assert json.loads(runner.record.to_json())["warnings"] == [note]


def test_a_run_that_does_not_forget_warns() -> None:
    model = tiny()
    runner = ZeroShotUnlearner(model, [1, 3], learning_rate=1e-9, **QUICK)
    leaks = r"of held-out rows of forgotten classes are still classified as one"
    with pytest.warns(zsu_fast.UnlearningWarning, match=leaks):
        runner.run()
    assert runner.record.fit["best"]["leak"] > 0.1


def test_a_good_run_warns_of_nothing() -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        zsu_fast.unlearn(stating(), [1, 3], tail="fc1", **QUICK | {"impressions_per_class": 16})
