"""Models that only seem to forget are caught by name; the golden model passes everything."""

from __future__ import annotations

import copy

import pytest
import torch
from fakes import FAKES
from torch import Tensor, nn

import zsu_fast
from zsu_fast.cli.demo import FORGET
from zsu_fast.evaluation.audit import CheckName, FindingName, audit
from zsu_fast.evaluation.audit.result import Audit


def caught(result: Audit, name: str) -> None:
    assert result.found(name), str(result)
    assert not result.passed
    # other findings may only be its consequences
    also = {FindingName.NOT_FORGOTTEN, FindingName.OUTPUT_LEVEL, FindingName.DAMAGED}
    assert {f.name for f in result.findings} <= {name} | also, str(result)
    if name == FindingName.UNTOUCHED:
        assert result.verdict[0].startswith("Nothing was forgotten")
    elif name == FindingName.FEATURES_KEPT:
        assert result.verdict[0].startswith("The features are the original's up to rotation")
    else:
        assert name in result.verdict[0]
    if name == FindingName.MASK:
        assert result.verdict[0].startswith("Only the output was hidden"), result.verdict[0]


@pytest.mark.parametrize("fake", FAKES)
def test_each_fake_is_caught_by_name_without_data(original: nn.Module, fake: str) -> None:
    make, name = FAKES[fake]
    caught(audit(original, make(original), FORGET, progress=False), name)


@pytest.mark.parametrize("name", sorted({name for _, name in FAKES.values()}))
def test_each_kind_is_caught_by_name_on_images(
    original: nn.Module, images: tuple[Tensor, Tensor], name: str
) -> None:
    make = next(make for make, kind in FAKES.values() if kind == name)
    result = audit(original, make(original), FORGET, images, relearn_steps=0, progress=False)
    caught(result, name)


def test_unmasking_a_mask_brings_everything_back(
    original: nn.Module, images: tuple[Tensor, Tensor]
) -> None:
    fake = zsu_fast.mask(original, FORGET)
    result = audit(original, fake, FORGET, images, relearn_steps=0, progress=False)
    row, base = result.row("unlearned"), result.row("original")
    assert row.values["fa"] == 0
    assert row.values["unmask_fa"] == base.values["fa"]
    assert row.values["unmask_ra"] == base.values["ra"]
    assert row.values["probe_forget"] == base.values["probe_forget"]
    assert row.values["resynthesis_hit"] == 0
    failed = {c.name for c in result.checks if c.passed is False}
    assert {
        CheckName.UNMASK, CheckName.ADAPTED_UNMASK, CheckName.AMONG_FORGOTTEN, CheckName.FEATURES,
        CheckName.LAST_LAYER, CheckName.PROBE,
    } <= failed  # fmt: skip
    accuracy = base.values["adapted_unmask_fa"], base.values["adapted_unmask_ra"]
    assert accuracy == pytest.approx((base.values["fa"], base.values["ra"]), abs=1)
    assert row.values["adapted_unmask_fa"] == base.values["adapted_unmask_fa"]
    assert row.values["unmask_ff"] == base.values["unmask_ff"] >= base.values["fa"]


class Shift(nn.Module):
    """Adds a constant vector to the features."""

    def __init__(self, by: Tensor) -> None:
        super().__init__()
        self.register_buffer("by", by)

    def forward(self, x: Tensor) -> Tensor:
        return x + self.by


def test_a_constant_shift_of_the_features_hides_nothing(
    original: nn.Module, images: tuple[Tensor, Tensor]
) -> None:
    fake = copy.deepcopy(original)
    weight = fake.fc3.weight.detach()
    wanted = torch.zeros(10).index_fill_(0, torch.tensor(FORGET), -1e3)
    fake.fc3 = nn.Sequential(Shift(torch.linalg.pinv(weight) @ wanted), fake.fc3)
    result = audit(original, fake, FORGET, images, relearn_steps=0, progress=False)
    row, base = result.row("unlearned").values, result.row("original").values
    assert row["fa"] == row["unmask_fa"] == row["unmask_last_layer_fa"] == 0
    assert row["adapted_unmask_fa"] == pytest.approx(base["adapted_unmask_fa"], abs=1)
    assert row["unmask_ff"] == pytest.approx(base["unmask_ff"], abs=1)
    passed = {c.name: c.passed for c in result.checks}
    assert passed[CheckName.UNMASK]
    assert passed[CheckName.ADAPTED_UNMASK] is passed[CheckName.AMONG_FORGOTTEN] is False


@pytest.mark.parametrize("given", ["nothing", "images", "images and golden"])
def test_the_golden_model_passes_every_test(
    original: nn.Module, golden: nn.Module, images: tuple[Tensor, Tensor], given: str
) -> None:
    data = None if given == "nothing" else images
    beside = golden if given == "images and golden" else None
    result = audit(original, golden, FORGET, data, beside, progress=False)
    assert result.passed, [c for c in result.checks if c.passed is False]
    assert result.findings == []
    assert "forgotten" in result.verdict[0].lower()
    assert "hidden" not in " ".join(result.verdict)
    if beside is not None:  # membership needs training images
        unknown = {c.name for c in result.checks if c.passed is None}
        assert unknown == {CheckName.MEMBERSHIP}


def test_a_trained_last_layer_is_called_output_level(
    original: nn.Module, golden: nn.Module, images: tuple[Tensor, Tensor]
) -> None:
    unlearned = zsu_fast.unlearn(original, FORGET, tail="last", progress=False)
    result = audit(original, unlearned, FORGET, images, golden, relearn_steps=0, progress=False)
    assert result.found(FindingName.OUTPUT_LEVEL)
    assert result.verdict[0].startswith("Output-level forgetting: only the last layer was changed")
    assert not result.found(FindingName.MASK)
    row = result.row("unlearned")
    assert row.values["fa"] < 1
    assert row.values["unmask_last_layer_fa"] > 99
    assert f"FA is {row.values['unmask_last_layer_fa']:.1f} %" in result.verdict[0]
    assert row.values["drift_backbone"] == 0
