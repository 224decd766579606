"""A part of the table of models: one small model each of different families."""

from __future__ import annotations

import pytest

from benchmarks.tools.model_cases import Case, cases
from benchmarks.tools.model_rows import Result, Row
from benchmarks.tools.model_runs import measure

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


@pytest.mark.parametrize("name", SOME)
def test_a_row_of_the_table(name: str) -> None:
    row = measure(case_of(name), exports=name == EXPORTED)
    assert row.faults == []
    assert row.checks["original"] == row.checks["reload"] == "ok"
    if name == EXPORTED:
        assert row.checks["export"] == "ok"
        assert row.checks["onnx"] == "ok"


@pytest.mark.parametrize("result", [Result(outcome="silent"), Result(outcome="crash")])
def test_a_wrong_result_is_a_fault(result: Result) -> None:
    assert Row("a/b", "", 32).faults == []
    assert Row("a/b", "", 32, deep=result).faults
    assert Row("a/b", "", 32, checks={"reload": "other logits after loading"}).faults
    assert Row("a/b", "", 32, error="not finished").faults
