"""Checks and the first sentence of the verdict, from given numbers."""

from __future__ import annotations

import pytest

from zsu_fast.evaluation.audit.checks import CHECKS, Evidence, checks
from zsu_fast.evaluation.audit.result import Check, CheckName, Row
from zsu_fast.evaluation.audit.verdict import sentences
from zsu_fast.evaluation.audit.weights import LastLayer


def check_of(rows: list[Row], name: str, retained: int = 6, forgotten: int = 4) -> Check:
    """The check called ``name``, from the numbers of ``rows``."""
    evidence = Evidence(rows, LastLayer("trained", "it was trained"), 5, retained, forgotten)
    (check,) = (c for c in checks(evidence) if c.name == name)
    return check


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
    evidence = Evidence(rows, LastLayer("trained", ""), 0, 9, 1)
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
    check = check_of(rows, CheckName.RELEARN_FULL, retained=9, forgotten=1)
    assert check.passed is passed
    assert ("tells nothing" in check.says) == (passed is None)


@pytest.mark.parametrize(
    ("mine", "golden", "drift", "passed"),
    [
        (40.0, None, 1.0, True),
        (41.0, None, 1.0, None),  # a golden model may be as high
        (41.0, None, 0.0, False),
        (41.0, 30.0, 1.0, False),
        (41.0, 36.0, 1.0, True),
        (42.0, 36.0, 1.0, False),
        (80.0, 99.0, 1.0, True),
    ],
)
def test_the_adapted_unmask_fa_is_at_most_half(
    mine: float, golden: float | None, drift: float, passed: bool | None
) -> None:
    key = "adapted_unmask_fa"
    rows = [Row("original", {key: 80.0}), Row("unlearned", {key: mine, "drift_backbone": drift})]
    if golden is not None:
        rows.append(Row("golden", {key: golden}))
    check = check_of(rows, CheckName.ADAPTED_UNMASK)
    assert check.passed is passed
    assert ("no golden model" in check.says) == (passed is None)


@pytest.mark.parametrize(
    ("original", "mine", "golden", "passed"),
    [
        (95.0, 60.0, 50.0, True),  # 70 points above chance, 35 of them are half
        (95.0, 61.0, 50.0, False),
        (95.0, 61.0, 57.0, True),
        (95.0, 61.0, None, None),
        (25.0, 25.0, 25.0, None),
    ],
)
def test_half_of_the_share_above_chance_passes(
    original: float, mine: float, golden: float | None, passed: bool | None
) -> None:
    levels = {"original": original, "unlearned": mine, "golden": golden}
    rows = [Row(n, {"unmask_ff": v}) for n, v in levels.items() if v is not None]
    check = check_of(rows, CheckName.AMONG_FORGOTTEN)
    assert check.passed is passed
    assert "25.0 %" in check.says


def test_each_check_has_a_name_and_runs_without_any_number() -> None:
    evidence = Evidence([], LastLayer("unknown", "there is no last layer"), -1, 9, 1)
    found = checks(evidence)
    names = {value for key, value in vars(CheckName).items() if key.isupper()}
    assert len(found) == len(CHECKS) == len(names)
    assert {check.name for check in found} == names
    assert all(check.says for check in found)
