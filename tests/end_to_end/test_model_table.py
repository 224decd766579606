"""A part of docs/models.md, measured again: one small model each of different families."""

from __future__ import annotations

import re
from functools import cache
from pathlib import Path

import pytest

from benchmarks.tools.model_cases import Case, cases
from benchmarks.tools.model_page import words
from benchmarks.tools.model_rows import Result, Row
from benchmarks.tools.model_runs import measure

PAGE = Path(__file__).resolve().parents[2] / "docs" / "models.md"
SOME = (
    "torchvision/shufflenet_v2_x0_5",
    "timm/deit_tiny_distilled_patch16_224",
    "timm/starnet_s1",
    "transformers/ViTForImageClassification",
    "transformers/ConvNextForImageClassification",
    "transformers/SwinForImageClassification",
    "transformers/LevitForImageClassificationWithTeacher",
)
EXPORTED = "transformers/ConvNextForImageClassification"


def case_of(name: str) -> Case:
    return next(case for case in cases() if str(case) == name)


@cache
def cells(library: str) -> dict[str, list[str]]:
    """The cells of a table of the page, by the model's name."""
    section = PAGE.read_text().partition(f"\n## {library}\n")[2].partition("\n## ")[0]
    rows = [
        line.strip("| ").split(" | ") for line in section.splitlines() if line.startswith("| `")
    ]
    return {row[0].strip("`"): row for row in rows}


@pytest.mark.parametrize("name", SOME)
def test_a_row_of_the_page(name: str) -> None:
    row = measure(case_of(name), exports=name == EXPORTED)
    assert row.faults == []
    assert row.checks["original"] == row.checks["reload"] == "ok"
    if name == EXPORTED:
        assert row.checks["export"] == "ok"
        assert row.checks["onnx"] == "ok"
    library, _, short = name.partition("/")
    listed = cells(library)[short]
    assert [words(row.output, "output"), words(row.deep, "deep")] == [listed[4], listed[6]]


def test_the_page_has_every_model_and_no_wrong_one() -> None:
    listed = {
        f"{lib}/{name}" for lib in ("torchvision", "timm", "transformers") for name in cells(lib)
    }
    assert listed == {str(case) for case in cases()}
    assert len(listed) >= 40
    assert not re.search(r"\b(WRONG|CRASH|NO)\b", PAGE.read_text())


@pytest.mark.parametrize("result", [Result(outcome="silent"), Result(outcome="crash")])
def test_a_wrong_result_is_a_fault(result: Result) -> None:
    assert Row("a/b", "", 32).faults == []
    assert Row("a/b", "", 32, deep=result).faults
    assert Row("a/b", "", 32, checks={"reload": "other logits after loading"}).faults
    assert Row("a/b", "", 32, error="not finished").faults
