"""`audit`: its arguments, what it leaves unchanged, its result, and reasons for missing metrics."""

from __future__ import annotations

import copy
import json
import math
from pathlib import Path
from typing import Any

import pytest
import torch
from support import TinyNet, tiny, tiny_data, untouched
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset

import zsu_fast
from zsu_fast.errors import ArgumentError, ModelError, OutputError
from zsu_fast.evaluation.audit import FindingName, audit
from zsu_fast.evaluation.audit.metrics import BY_KEY, METRICS
from zsu_fast.evaluation.audit.result import Audit

NEEDED = {"", "data", "train_data", "golden"}
SHAPE = (3, 8, 8)


def quick(
    unlearned: nn.Module | None = None, original: nn.Module | None = None, **options: Any
) -> Audit:
    """An audit of the tiny model, or another original, that takes a moment."""
    original = tiny() if original is None else original
    if unlearned is None:
        unlearned = zsu_fast.mask(original, [1])
    settings = {"input_shape": SHAPE, "impressions_per_class": 4, "progress": False}
    return audit(original, unlearned, [1], **{**settings, **options})


@pytest.fixture(scope="module")
def full() -> Audit:
    """With every kind of data and the golden model."""
    return quick(
        golden=other(), data=tiny_data(), train_data=tiny_data(seed=0), shots=5, relearn_steps=5
    )


def other() -> nn.Module:
    """A model of the same architecture with other features."""
    model = tiny()
    with torch.no_grad():
        noise = torch.randn(32, 72, generator=torch.Generator().manual_seed(0))
        model.fc1.weight.add_(0.05 * noise)
        model.fc2.bias[1] = -20
    return model


def test_every_metric_is_defined_once_and_in_full() -> None:
    assert len(BY_KEY) == len(METRICS)
    for metric in METRICS:
        for text in (metric.title, metric.group, metric.formula, metric.range, metric.good,
                     metric.source):  # fmt: skip
            assert text.strip(), metric.key
        assert metric.needs in NEEDED


@pytest.mark.parametrize("data", [False, True])
def test_every_metric_has_a_value_or_a_reason(data: bool) -> None:
    result = quick(data=tiny_data() if data else None, relearn_steps=0)
    assert [r.name for r in result.rows] == ["original", "mask", "random embeddings", "unlearned"]
    for row in result.rows:
        for metric in METRICS:
            assert (metric.key in row.values) != (metric.key in row.missing), metric.key
        assert all(reason.strip() for reason in row.missing.values())
        assert all(math.isfinite(v) for v in row.values.values())
    row = result.row("unlearned")
    assert "train_data is missing" in row.missing["mia_forget_loss"] or not data
    assert ("relearn_steps=0" in row.missing["relearn_full_steps"]) == data
    if not data:
        assert row.missing["probe_forget"] == "no images were given (data)"
    assert row.missing["cka_golden_forget"] in (
        "no golden model was given", "no images were given (data)",
    )  # fmt: skip


def test_with_everything_given_nothing_is_missing(full: Audit) -> None:
    assert [r.name for r in full.rows][-1] == "golden"
    for row in full.rows:
        left = {k for k in row.missing if not k.startswith("ain_")}
        assert left == {"unmask_ff"} | ({"erasure_cost"} if row.name != "original" else set())
        assert "two forgotten classes" in row.missing["unmask_ff"]
    assert full.row("golden").values["kl_golden_forget"] == pytest.approx(0, abs=1e-6)
    assert full.row("mask").values["js_mask_retain"] == pytest.approx(0, abs=1e-6)
    assert full.row("golden").values["cka_golden_forget"] == pytest.approx(1)
    assert full.row("original").values["cka_original_retain"] == pytest.approx(1)
    assert set(full.timings) >= {"probe", "relearning", "membership", "total"}


def test_it_agrees_with_evaluate() -> None:
    data, model = tiny_data(), other()
    result = quick(model, data=data, relearn_steps=0)
    for name, judged in (("original", tiny()), ("unlearned", model)):
        expected = zsu_fast.evaluate(judged, data, [1])
        assert result.row(name).evaluation == expected
        assert result.row(name).values["fa"] == expected.forget_accuracy


def test_models_and_modes_stay_as_they_were() -> None:
    original, model, golden = tiny().train(), other(), other().train()
    with untouched(original), untouched(model), untouched(golden), torch.no_grad():
        audit(
            original, model, [1], tiny_data(), golden, input_shape=SHAPE, progress=False,
            impressions_per_class=4, relearn_steps=3, shots=5,
        )  # fmt: skip
    assert not torch.is_inference_mode_enabled()


def test_the_same_seed_gives_the_same_audit() -> None:
    def numbers(seed: int) -> dict[str, float]:
        result = quick(other(), data=tiny_data(), relearn_steps=5, shots=5, seed=seed)
        return result.row("random embeddings").values | result.row("unlearned").values

    torch.manual_seed(1)
    first = numbers(3)
    torch.manual_seed(2)
    assert numbers(3) == first
    assert numbers(4) != first


def test_forms_of_data_agree() -> None:
    images = torch.randint(0, 256, (60, *SHAPE), dtype=torch.uint8)
    labels = torch.arange(60) % 5
    spec = zsu_fast.models.infer_spec.resolve_spec(tiny(), SHAPE)
    floats = spec.normalise(images)
    loader = DataLoader(TensorDataset(floats, labels), batch_size=7)
    results = [
        quick(data=d, relearn_steps=0).row("unlearned").values
        for d in ((images, labels), (floats, labels), loader, iter(list(loader)))
    ]
    for other_result in results[1:]:
        assert other_result == pytest.approx(results[0], abs=1e-4)


def test_one_set_is_divided_and_two_sets_are_not() -> None:
    one = quick(data=tiny_data(400), relearn_steps=0)
    assert one.counts["probe_test_images"] == 200
    two = quick(data=tiny_data(400), train_data=tiny_data(100, seed=5), relearn_steps=0)
    assert (two.counts["probe_train_images"], two.counts["probe_test_images"]) == (100, 400)


def test_data_without_forgotten_classes_says_so() -> None:
    images, labels = tiny_data()
    keep = labels != 1
    result = quick(data=(images[keep], labels[keep]))
    row = result.row("unlearned")
    assert "no image of the forgotten classes" in row.missing["fa"]
    assert "no image of the forgotten classes" in row.missing["probe_forget"]
    assert "too few images" in row.missing["relearn_last_layer_steps"]
    assert row.values["ra"] > 90
    assert result.found(FindingName.MASK)


def test_one_image_of_a_forgotten_class_says_so() -> None:
    images, labels = tiny_data()
    keep = (labels != 1) | (torch.arange(len(labels)) == 1)
    row = quick(data=(images[keep], labels[keep])).row("unlearned")
    assert "left to measure on" in row.missing["probe_forget"]
    assert row.missing["relearn_full_steps"]


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"data": 3}, "data: got a int"),
        ({"data": (torch.zeros(3, *SHAPE), torch.tensor([0, 1]))}, "3 images and 2 labels"),
        ({"data": (torch.zeros(1, *SHAPE), torch.tensor([9]))}, "labels run from 9 to 9"),
        ({"data": (torch.zeros(1, 3, 9, 9), torch.tensor([1]))}, r"\(3, 9, 9\)"),
        ({"data": []}, "there is no image"),
        ({"data": tiny_data(20), "train_data": []}, "train_data: there is no image"),
        ({"golden": TinyNet(7).eval()}, "golden: its logits are"),
        ({"shots": 0}, "shots: got 0"),
        ({"relearn_steps": -1}, "relearn_steps: got -1"),
        ({"impressions_per_class": True}, "impressions_per_class: got True"),
        ({"seed": 1.5}, "seed: got 1.5"),
    ],
)
def test_bad_arguments(options: dict[str, Any], words: str) -> None:
    with pytest.raises(ArgumentError, match=words):
        quick(**options)


def test_a_bad_forget_and_a_broken_model() -> None:
    with pytest.raises(ArgumentError, match="forget"):
        audit(tiny(), tiny(), [5], input_shape=SHAPE, progress=False)
    broken = tiny()
    with torch.no_grad():
        broken.fc1.weight[0, 0] = torch.nan
    with pytest.raises(ModelError, match="NaN"):
        quick(broken)


def test_another_architecture_is_measured_as_far_as_possible() -> None:
    class Wider(TinyNet):
        def __init__(self) -> None:
            super().__init__()
            self.fc1, self.fc2 = nn.Linear(72, 48), nn.Linear(48, 5)

    torch.manual_seed(0)
    row = quick(Wider().eval(), data=tiny_data(), relearn_steps=0).row("unlearned")
    for key in ("unmask_fa", "unmask_ff"):
        assert "one architecture" in row.missing[key]
    assert "differs in width" in row.missing["adapted_unmask_fa"]
    assert "differs in shape" in row.missing["drift_features_forget"]
    assert "cka_original_forget" in row.values
    assert "probe_forget" in row.values


def test_a_convolution_as_the_last_layer() -> None:
    class Conv(nn.Module):
        """As SqueezeNet ends: a 1x1 convolution, then the mean over positions."""

        def __init__(self) -> None:
            super().__init__()
            self.body = nn.Conv2d(3, 16, 3, 2)
            self.last = nn.Conv2d(16, 5, 1)

        def forward(self, x: Tensor) -> Tensor:
            return self.last(self.body(x).relu()).mean((2, 3))

    torch.manual_seed(0)
    model = Conv()
    images, labels = tiny_data()
    optimiser = torch.optim.Adam(model.parameters(), 1e-2)
    for _ in range(300):
        optimiser.zero_grad()
        nn.functional.cross_entropy(model(images), labels).backward()
        optimiser.step()
    model.eval()
    fake = copy.deepcopy(model)
    with torch.no_grad():
        fake.last.bias[2] = -1e9
    result = audit(model, fake, [2], (images, labels), input_shape=SHAPE, progress=False,
                   relearn_steps=20)  # fmt: skip
    row = result.row("unlearned")
    assert row.values["fa"] == 0
    assert row.values["unmask_fa"] == result.row("original").values["fa"] > 50
    assert result.found(FindingName.MASK)
    assert row.values["adapted_unmask_fa"] == pytest.approx(row.values["unmask_fa"], abs=10)
    assert 0 < result.row("original").values["erasure_cost"] < 1
    # -1e9 does not pass for deep forgetting: relearning starts from other rows
    assert (
        row.values["relearn_last_layer_steps"]
        == result.row("mask").values["relearn_last_layer_steps"]
    )


def test_many_classes_are_sampled() -> None:
    torch.manual_seed(0)
    model = TinyNet(60).eval()
    images = torch.randn(120, *SHAPE)
    data = images, torch.arange(120) % 60
    forget = list(range(24))
    fake = zsu_fast.mask(model, forget)
    result = audit(model, fake, forget, data, input_shape=SHAPE, progress=False, shots=1,
                   relearn_steps=2)  # fmt: skip
    assert result.impressions is not None
    chosen = result.impressions.labels.unique().tolist()
    assert len(chosen) == 16 + 32
    assert sum(c in forget for c in chosen) == 16
    assert any("48 of 60 classes" in note for note in result.notes)
    assert len(result.pictures["original"].labels.unique()) == 8
    assert len(result.row("unlearned").layers) == 3


def test_a_last_layer_without_rows_per_class_says_so() -> None:
    class Pairs(TinyNet):
        """Its logits are the sums of two outputs each."""

        def __init__(self) -> None:
            super().__init__(10)

        def forward(self, x: Tensor) -> Tensor:
            return super().forward(x).unflatten(1, (5, 2)).sum(2)

    torch.manual_seed(0)
    model = Pairs().eval()
    row = quick(model, original=model, data=tiny_data(), relearn_steps=0).row("original")
    for key in ("adapted_unmask_fa", "adapted_unmask_ra", "erasure_cost"):
        assert "one row of weights per class" in row.missing[key]


def test_a_parametrised_last_layer_is_its_computed_weights() -> None:
    plain, normed = tiny(), tiny()
    nn.utils.parametrizations.weight_norm(normed.fc2)
    values = [
        quick(m, original=m, data=tiny_data(), relearn_steps=0).row("original").values
        for m in (plain, normed)
    ]
    for key in ("adapted_unmask_fa", "adapted_unmask_ra", "erasure_cost"):
        assert values[1][key] == pytest.approx(values[0][key], rel=1e-3)


def test_one_image_per_class_is_enough_for_the_adapted_layer_alone() -> None:
    torch.manual_seed(0)
    data = torch.randn(600, *SHAPE), torch.arange(600)
    model, forget = TinyNet(600).eval(), list(range(300))
    row = audit(model, model, forget, data, input_shape=SHAPE, progress=False, relearn_steps=0,
                impressions_per_class=2).row("unlearned")  # fmt: skip
    assert "left to measure on" in row.missing["probe_forget"]
    assert "adapted_unmask_fa" in row.values  # fitted on 500 images, measured on 100


def test_json_holds_all_of_it(full: Audit, tmp_path: Path) -> None:
    stored = json.loads(full.to_json())
    assert stored["verdict"] == full.verdict
    assert {m["key"] for m in stored["metrics"]} == set(BY_KEY)
    assert stored["rows"][3]["values"] == full.row("unlearned").values
    assert stored["hashes"]["original"] == zsu_fast.models.parameters.weights_hash(tiny())
    path = tmp_path / "audit.json"
    full.save(path)
    assert json.loads(path.read_text()) == stored
    with pytest.raises(OutputError, match="exists"):
        full.save(path)


def test_text_has_the_verdict_first(full: Audit) -> None:
    lines = str(full).splitlines()
    assert lines[0] == full.verdict[0]
    assert any(line.startswith("un-mask FA") for line in lines)


def test_it_runs_under_no_grad_and_leaves_the_generator_alone() -> None:
    state = torch.get_rng_state()
    with torch.no_grad():
        quick()
    assert torch.equal(torch.get_rng_state(), state)
