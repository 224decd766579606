"""The verdict of a run: what its figures say, and what is below par."""

from __future__ import annotations

import copy
import json
import warnings
from typing import Any

import pytest
from support import FORGET, QUICK, SPEC, deep_run, tiny

import zsu_fast
from zsu_fast import UnlearningWarning, Verdict, VerdictError, ZeroShotUnlearner
from zsu_fast.evaluation.verdict import shortfalls

IMAGES: dict[str, Any] = {"input_shape": SPEC.shape, "mean": SPEC.mean, "std": SPEC.std}


@pytest.fixture(scope="module")
def output_record() -> dict[str, Any]:
    run = ZeroShotUnlearner(tiny(), FORGET, **QUICK | IMAGES | {"space": None})
    run.run()
    return run.record.to_dict()


def verdict_of(record: dict[str, Any], **best: float) -> Verdict:
    """The verdict of a record whose kept validation is changed by ``best``."""
    changed = copy.deepcopy(record)
    changed["fit"]["best"].update(best)
    return Verdict.of_record(changed)


def test_a_deep_run_has_a_verdict() -> None:
    run, _ = deep_run()
    verdict, depth = run.verdict, run.record.depth
    assert verdict is not None
    assert (verdict.level, verdict.asked, verdict.forgotten) == ("deep", "deep", FORGET)
    assert verdict.unmask_leak == depth["unmask_leak"]["after"] <= 0.04
    assert verdict.unmask_agreement == depth["agreement"]["after"]
    assert verdict.agreement == min(run.result.best.agreement, depth["agreement"]["after"])
    assert verdict.leak == 0
    assert verdict.passed
    assert verdict.warnings == verdict.failures == run.record.warnings == []
    verdict.raise_for_status()
    assert str(verdict).startswith(
        "PASSED: Forgotten in the outputs and the features: classes 1, 3"
    )


def test_the_verdict_comes_with_the_result_and_from_its_record() -> None:
    run = ZeroShotUnlearner(tiny(), FORGET, **QUICK)
    assert run.verdict is None
    run.run()
    saved = json.loads(run.record.to_json())
    assert Verdict.of_record(saved) == run.verdict


def test_the_output_level_says_what_the_original_last_layer_brings_back(
    output_record: dict[str, Any],
) -> None:
    verdict = Verdict.of_record(output_record)
    assert (verdict.level, verdict.asked, verdict.passed) == ("output", "output", True)
    assert verdict.leak == 0
    assert verdict.unmask_leak == 1  # of the rows of forgotten classes, as `check` counts
    assert verdict.sentence == "Forgotten in the outputs only: classes 1, 3."
    assert any("Only the last layer" in text for text in verdict.warnings)


def test_a_fallback_is_no_pass_where_deep_was_asked_for(output_record: dict[str, Any]) -> None:
    fallen = copy.deepcopy(output_record)
    fallen["depth"] |= {"depth": "deep", "fallback": "it has one layer"}
    verdict = Verdict.of_record(fallen)
    assert not verdict.passed
    assert verdict.sentence.endswith("but deep forgetting was asked for.")
    with pytest.raises(VerdictError, match="FAILED: Forgotten in the outputs only"):
        verdict.raise_for_status()


@pytest.mark.parametrize(
    ("best", "words"),
    [({"agreement": 0.979}, "only 97.9 % of held-out rows of other classes keep their answer"),
     ({"forgotten_leak": 0.011}, "1.1 % of held-out rows of forgotten classes are still")],
    ids=["agreement", "leak"],
)  # fmt: skip
def test_what_is_below_par_is_a_failure(
    output_record: dict[str, Any], best: dict[str, float], words: str
) -> None:
    verdict = verdict_of(output_record, **best)
    assert not verdict.passed
    (failure,) = verdict.failures
    assert words in failure
    assert failure in str(verdict)
    assert "1 figure is below par" in verdict.sentence
    assert verdict_of(output_record, agreement=0.98, forgotten_leak=0.01).passed


def test_a_run_and_a_check_agree_on_the_original_last_layer() -> None:
    run = ZeroShotUnlearner(tiny(), FORGET, **QUICK | IMAGES | {"space": None})
    measured = zsu_fast.check(tiny(), run.run(), FORGET, progress=False, **IMAGES)
    assert run.verdict is not None
    assert (run.verdict.leak, run.verdict.unmask_leak) == (0, 1)
    assert (measured.leak, measured.unmask_leak) == (0, 1)


@pytest.mark.parametrize("before", [None, 0.0], ids=["no row of the classes", "none recognised"])
def test_what_was_never_recognised_can_not_be_told(
    output_record: dict[str, Any], before: float | None
) -> None:
    record = copy.deepcopy(output_record)
    record["fit"]["history"][0]["forgotten_leak"] = before
    record["fit"]["best"]["forgotten_leak"] = before
    verdict = Verdict.of_record(record)
    assert not verdict.passed
    assert verdict.leak is None
    assert str(verdict).startswith("UNKNOWN: Cannot be told whether the model forgot classes 1, 3.")
    assert any("recognises a forgotten class in none" in text for text in verdict.failures)
    with pytest.raises(VerdictError):
        verdict.raise_for_status()
    json.dumps(verdict.to_dict(), allow_nan=False)


def test_records_of_earlier_versions_have_a_verdict(output_record: dict[str, Any]) -> None:
    record = copy.deepcopy(output_record)
    for validation in (record["fit"]["best"], *record["fit"]["history"]):
        del validation["forgotten_leak"]
    assert Verdict.of_record(record).passed


def test_features_that_hold_a_part_are_a_failure_of_deep_forgetting_alone() -> None:
    assert shortfalls("deep", 0.0, 0.75, 0.7, 0.1) == []
    (text,) = shortfalls("deep", 0.0, 0.75, 0.7, 0.2)
    assert "20.0 % of held-out rows of forgotten classes are recognised again" in text
    assert shortfalls("output", 0.0, 1.0, 0.98, 1.0) == []


def test_a_run_that_is_below_par_warns() -> None:
    """Without it, poor agreement was only in the record."""
    run = ZeroShotUnlearner(tiny(), FORGET, learning_rate=1e-9, **QUICK)
    with pytest.warns(UnlearningWarning, match="of forgotten classes are still classified as one"):
        run.run()
    assert run.verdict is not None
    assert set(run.verdict.failures) <= set(run.record.warnings)
    assert not run.verdict.passed


def test_poor_agreement_warns(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("zsu_fast.evaluation.verdict.LEAST_OUTPUT_AGREEMENT", 1.1)
    with pytest.warns(UnlearningWarning, match="rows of other classes keep their answer"):
        zsu_fast.unlearn(tiny(), FORGET, **QUICK)


def test_a_good_run_warns_of_nothing() -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        deep_run()


def test_names_and_what_is_not_covered_are_in_the_verdict(output_record: dict[str, Any]) -> None:
    record = copy.deepcopy(output_record)
    record["labels"] = {"1": "goldfish"}
    record["warnings"].append("not covered: ema.fc2.weight has a row for each class")
    verdict = Verdict.of_record(record)
    assert verdict.sentence == "Forgotten in the outputs only: classes 1 (goldfish), 3."
    assert verdict.not_covered == ["ema.fc2.weight has a row for each class"]
    assert not any("ema.fc2" in text for text in verdict.warnings)
    assert "not covered: ema.fc2.weight" in str(verdict)
    plain = json.loads(json.dumps(verdict.to_dict()))
    assert plain["labels"] == {"1": "goldfish"}
    assert (plain["passed"], plain["level"]) == (True, "output")
