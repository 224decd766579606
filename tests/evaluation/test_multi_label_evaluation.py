"""FA and RA of multi-label models: denominators, average precision, forms of labels, refusals."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest
import torch
from multi_label_case import several, several_data
from support import FORGET, SPEC, Returning, tiny, tiny_data
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset

from zsu_fast import ArgumentError, ModelError, UnlearningWarning, check, evaluate, mask
from zsu_fast.evaluation.multi_label import MultiLabelEvaluation, average_precision


class Returns(nn.Module):
    """Returns its input."""

    def __init__(self) -> None:
        super().__init__()
        self.scale = nn.Parameter(torch.ones(()))

    def forward(self, x: Tensor) -> Tensor:
        return self.scale * x


SCORES = torch.tensor([[2.0, -1, 3], [1, 2, -3], [-2, 1, 1], [-1, -2, -1]])
LABELS = torch.tensor([[1, 1, 0], [1, 1, 0], [1, 0, 1], [0, 0, 0]])


def test_rates_counts_and_precision() -> None:
    result = evaluate(Returns(), (SCORES, LABELS), [1])
    assert isinstance(result, MultiLabelEvaluation)
    assert (result.forget_count, result.retain_count, result.images) == (2, 4, 4)
    assert result.forget_rate == pytest.approx(50)  # of two images with class 1, one
    assert result.retain_rate == pytest.approx(100 * (2 + 1) / 4)
    # class 0: found at ranks 1, 2 and 4; class 2: at rank 2
    assert result.per_class[0].average_precision == pytest.approx(100 * (1 + 1 + 3 / 4) / 3)
    assert result.per_class[2].average_precision == pytest.approx(50)
    assert result.retain_average_precision == pytest.approx((100 * 2.75 / 3 + 50) / 2)
    # precision 2/2 and recall 2/3; 1/2 and 1
    assert result.retain_f1 == pytest.approx(100 * (0.8 + 2 / 3) / 2)
    assert result.forget_prevalence == pytest.approx(50)
    assert result.outputs == "logits"
    assert "FA 50.00 % of 2 labels" in str(result)
    plain = result.to_dict()
    assert plain["multi_label"] is True
    assert plain["per_class"][1]["rate"] == 50


def test_equal_scores_have_no_order() -> None:
    labels = torch.tensor([True, False, False, True])
    assert average_precision(torch.zeros(4), labels) == pytest.approx(50)
    assert average_precision(torch.full((4,), -torch.inf), labels) == pytest.approx(50)
    assert average_precision(torch.tensor([1.0, 0, 0, 0]), labels) == pytest.approx(75)
    assert average_precision(torch.zeros(4), ~(labels | True)) is None


def test_the_mask_is_at_chance() -> None:
    model, data = several(), several_data()
    before, masked = (evaluate(m, data, FORGET) for m in (model, mask(model, FORGET)))
    assert before.forget_rate > 95
    assert masked.forget_rate == 0
    assert masked.forget_average_precision == pytest.approx(masked.forget_prevalence)
    assert masked.retain_average_precision == before.retain_average_precision
    assert masked.retain_f1 == before.retain_f1


def test_labels_of_all_forms_agree() -> None:
    model, (images, labels) = several(), several_data()
    want = evaluate(model, (images, labels), FORGET)
    lists = [row.nonzero()[:, 0].tolist() for row in labels]
    loader = DataLoader(TensorDataset(images, labels.float()), batch_size=64)
    batches = [(images[:150], lists[:150]), (images[150:], lists[150:])]
    for data in ((images, labels.long()), (images, lists), loader, batches):
        assert evaluate(model, data, FORGET) == want


def test_probabilities_give_the_same_as_logits() -> None:
    model, data = several(), several_data()
    logits = evaluate(model, data, FORGET)
    probabilities = evaluate(nn.Sequential(model, nn.Sigmoid()), data, FORGET)
    assert probabilities.outputs == "probabilities"
    assert probabilities.forget_rate == logits.forget_rate
    assert probabilities.retain_f1 == logits.retain_f1
    masked = evaluate(mask(nn.Sequential(model, nn.Sigmoid()), FORGET), data, FORGET)
    assert masked.outputs == "probabilities"
    assert masked.forget_rate == 0


def config(model: nn.Module) -> nn.Module:
    model.config = SimpleNamespace(problem_type="multi_label_classification")
    return model


@pytest.mark.parametrize(
    ("model", "options"), [(several, {"multi_label": True}), (lambda: config(several()), {})]
)
def test_one_class_per_image_does_not_measure_a_multi_label_model(
    model: Any, options: dict[str, Any]
) -> None:
    images, labels = several_data()
    pair = images, labels.long().argmax(1)
    with pytest.raises(ArgumentError, match="one class per image, and the model is multi-label"):
        evaluate(model(), pair, FORGET, **options)
    assert evaluate(model(), pair, FORGET, multi_label=False).overall_accuracy is not None


def test_one_hot_labels_of_a_softmax_model_are_refused() -> None:
    images, labels = tiny_data()
    one_hot = nn.functional.one_hot(labels)
    with pytest.raises(ArgumentError, match=r"one-hot.*Pass labels.argmax\(1\)"):
        evaluate(tiny(), (images, one_hot), FORGET)
    assert evaluate(tiny(), (images, one_hot), FORGET, multi_label=True).images == len(images)


@pytest.mark.parametrize(
    "labels", [LABELS * 0, LABELS * 0.5, LABELS[:, :2], [[0], [3], [], []], LABELS[:3], [[0], [1]]]
)
def test_labels_that_can_not_be_used(labels: Any) -> None:
    with pytest.raises(ArgumentError, match="data: "):
        evaluate(Returns(), (SCORES, labels), [1])


@pytest.mark.parametrize("bad", [torch.nan, torch.inf])
def test_outputs_that_are_not_finite_are_refused(bad: float) -> None:
    with pytest.raises(ModelError, match="NaN or infinite"):
        evaluate(Returns(), (SCORES * bad, LABELS), [1])


def test_no_image_of_the_forgotten_classes() -> None:
    result = evaluate(Returns(), (SCORES, LABELS * torch.tensor([1, 0, 1])), [1])
    assert result.forget_rate is None
    assert result.forget_average_precision is None
    assert "FA none of 0" in str(result)


def test_pictures_rows_dicts_and_arrays_as_for_other_models() -> None:
    model, (images, labels) = several(), several_data(40)
    want = evaluate(model, (images, labels), FORGET)
    hot = labels.long()
    rows = list(zip(images, hot, strict=True))
    dicts = [{"pixel_values": x, "labels": y.tolist()} for x, y in rows]
    batch = {"image": images.numpy(), "labels": hot.numpy()}
    for data in (rows, dicts, batch, (images, hot.tolist()), (images, list(hot))):
        assert evaluate(model, data, FORGET) == want
    bytes_ = torch.randint(256, images.shape, dtype=torch.uint8)
    given = {"input_shape": SPEC.shape, "mean": SPEC.mean, "std": SPEC.std}
    normalised = evaluate(model, (SPEC.normalise(bytes_), labels), FORGET)
    with pytest.warns(UnlearningWarning, match="images are uint8"):
        assert evaluate(model, (bytes_, labels), FORGET, **given) == normalised


def test_classes_may_be_named() -> None:
    names = [f"name{c}" for c in range(5)]
    model, (images, labels) = several(), several_data(60)
    listed = [[names[c] for c in row.nonzero()[:, 0].tolist()] for row in labels]
    found = evaluate(model, (images, listed), ["name1", "name3"], class_names=names)
    assert found.labels == {"1": "name1", "3": "name3"}
    assert found.forget_rate == evaluate(model, (images, labels), [1, 3]).forget_rate
    with pytest.raises(ArgumentError, match=r"data: .*other"):
        evaluate(model, (images, [["other"], *listed[1:]]), [1], class_names=names)


class NamedColumns(list):  # type: ignore[type-arg]
    """A data set whose columns are classes in another order than the model's."""

    classes = ("b", "a", "c")


def test_columns_are_matched_with_the_models_classes_by_name() -> None:
    data = NamedColumns([(SCORES, LABELS[:, [1, 0, 2]])])
    found = evaluate(Returns(), data, ["b"], class_names=["a", "b", "c"])
    want = evaluate(Returns(), (SCORES, LABELS), [1])
    assert found.data_classes == {"b": 1, "a": 0, "c": 2}
    assert found.per_class == want.per_class
    with pytest.warns(UnlearningWarning, match="taken to be in the order of the data's"):
        evaluate(Returns(), Folders(data), [0])


class Folders(NamedColumns):
    """The same with classes that are the names of folders, in alphabetical order."""

    samples = ()


def test_the_output_that_holds_the_logits() -> None:
    images, labels = several_data(40)
    model = Returning(several(), lambda logits: (logits, -logits))
    want = evaluate(several(), (images, labels), FORGET)
    assert evaluate(model, (images, labels), FORGET, output=0) == want
    assert evaluate(model, (images, labels), FORGET, output=1) != want


def test_check_reads_the_config_of_a_multi_label_model() -> None:
    model, forgetful = config(several()), config(several())
    for name, module in forgetful.named_modules():
        if name.endswith("fc2"):
            module.bias.data[FORGET] = -1e9
    images = {"input_shape": SPEC.shape, "mean": SPEC.mean, "std": SPEC.std, "progress": False}
    assert check(model, model, FORGET, **images).level == "none"
    verdict = check(model, forgetful, FORGET, **images)
    assert (verdict.level, verdict.leak, verdict.agreement) == ("output", 0, 1)
