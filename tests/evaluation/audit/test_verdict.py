"""Checks and the first sentence of the verdict, from given numbers."""

from __future__ import annotations

import pytest

from zsu_fast.evaluation.audit.checks import CHECKS, Evidence, checks
from zsu_fast.evaluation.audit.result import CheckName, Row
from zsu_fast.evaluation.audit.verdict import sentences
from zsu_fast.evaluation.audit.weights import LastLayer


@pytest.mark.parametrize(
    ("probe_forget", "words"),
    [
        (56.0, "Forgotten in outputs and features"),
        (62.0, "Outputs forgotten, features in part"),
        (67.0, "Outputs forgotten; features still separable"),
    ],
)
def test_the_headline_does_not_flatter(probe_forget: float, words: str) -> None:
    rows = [Row(n) for n in ("original", "mask", "unlearned", "golden")]
    levels = (68.0, 68.0, probe_forget, 56.0)
    for row, level in zip(rows, levels, strict=True):
        row.put("probe_forget", level)
        row.put("fa", 71.0 if row.name == "original" else 0.0)
        row.put("drift_features_forget", 0.0 if row.name in ("original", "mask") else 2.0)
        row.put("drift_backbone", 0.0 if row.name in ("original", "mask") else 1.0)
    evidence = Evidence(rows, LastLayer("trained", ""), 0, 9)
    assert sentences(evidence, [], checks(evidence))[0].startswith(words)


@pytest.mark.parametrize(
    ("original", "mine", "golden", "passed"),
    [(28, 90, 100, True), (28, 30, 100, False), (100, 100, 100, None), (60, 90, 55, None)],
)
def test_relearning_tells_nothing_if_the_original_needs_as_long(
    original: int, mine: int, golden: int, passed: bool | None
) -> None:
    steps, index = "relearn_full_steps", "ain_full"
    rows = [
        Row("original", {steps: original}),
        Row("unlearned", {steps: mine, index: mine / golden}),
        Row("golden", {steps: golden}),
    ]
    evidence = Evidence(rows, LastLayer("trained", "it was trained"), 5, 9)
    (check,) = (c for c in checks(evidence) if c.name == CheckName.RELEARN_FULL)
    assert check.passed is passed
    assert ("tells nothing" in check.says) == (passed is None)


def test_each_check_has_a_name_and_runs_without_any_number() -> None:
    evidence = Evidence([], LastLayer("unknown", "there is no last layer"), -1, 9)
    found = checks(evidence)
    names = {value for key, value in vars(CheckName).items() if key.isupper()}
    assert len(found) == len(CHECKS) == len(names)
    assert {check.name for check in found} == names
    assert all(check.says for check in found)
