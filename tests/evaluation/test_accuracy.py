"""FA, RA and overall accuracy: their denominators, their errors, and the mask baseline."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from support import Answer, Returning, tiny, tiny_data, untouched
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset

from zsu_fast import ArgumentError, evaluate, mask


class Fixed(nn.Module):
    """Predicts the class, out of four, whose number is the first pixel."""

    def __init__(self) -> None:
        super().__init__()
        self.scale = nn.Parameter(torch.ones(()))

    def forward(self, x: Tensor) -> Tensor:
        return self.scale * nn.functional.one_hot(x[:, 0].long(), 4).to(x.dtype)


PREDICTIONS = [0, 0, 1, 1, 1, 2, 2, 0, 2, 3]
LABELS = [0, 0, 0, 1, 1, 1, 2, 2, 2, 2]


def fixed_data() -> tuple[Tensor, Tensor]:
    return torch.tensor(PREDICTIONS).float()[:, None], torch.tensor(LABELS)


def test_denominators() -> None:
    result = evaluate(Fixed(), fixed_data(), [1, 0])
    assert result.forget == [0, 1]
    assert result.forget_count == 6
    assert result.retain_count == 4
    assert result.forget_accuracy == pytest.approx(100 * 4 / 6)
    assert result.retain_accuracy == pytest.approx(100 * 2 / 4)
    assert result.overall_accuracy == pytest.approx(100 * 6 / 10)
    assert result.per_class == pytest.approx({0: 200 / 3, 1: 200 / 3, 2: 50})
    assert str(result) == (
        "FA 66.67 % of 6 images of the forgotten classes, RA 50.00 % of 4 others, overall 60.00 % "
        "of all 10"
    )
    assert result.to_dict()["forget_count"] == 6


def test_no_image_of_the_forgotten_classes() -> None:
    result = evaluate(Fixed(), fixed_data(), [3])
    assert result.forget_accuracy is None
    assert result.retain_accuracy == result.overall_accuracy == 60
    assert "FA none of 0" in str(result)


@pytest.mark.parametrize("batch", [1, 3, 400, 1000])
def test_loaders_tensors_and_lists_agree(batch: int) -> None:
    images, labels = tiny_data()
    model = tiny()
    expected = evaluate(model, (images, labels), [1])
    assert evaluate(model, (images, labels), [1], batch=batch) == expected
    loader = DataLoader(TensorDataset(images, labels), batch_size=batch)
    assert evaluate(model, loader, [1]) == expected
    assert evaluate(model, list(loader), [1]) == expected
    assert evaluate(model, iter(loader), [1]) == expected


def test_two_batches_are_not_a_pair_of_tensors() -> None:
    images, labels = fixed_data()
    batches = [(images[:5], labels[:5]), (images[5:], labels[5:])]
    expected = evaluate(Fixed(), (images, labels), [1])
    assert evaluate(Fixed(), batches, [1]) == expected
    assert evaluate(Fixed(), tuple(batches), [1]) == expected


@pytest.mark.parametrize("labels", [[4], [0, 1, 7], [-1, 0]])
@pytest.mark.parametrize("loader", [True, False])
def test_labels_beyond_the_logits(labels: list[int], loader: bool) -> None:
    data: Any = (torch.zeros(len(labels), 1), torch.tensor(labels))
    model = Fixed().train()
    match = rf"data: labels run from {min(labels)} to {max(labels)}.* 4 logits.* from 0 to 3"
    with untouched(model), pytest.raises(ArgumentError, match=match):
        evaluate(model, [data] if loader else data, [1])


@pytest.mark.parametrize(
    "labels", [torch.zeros(10, 4), torch.zeros(10), torch.zeros(10, 1, dtype=torch.int64)]
)
def test_labels_that_are_not_class_indices(labels: Tensor) -> None:
    for data in ((fixed_data()[0], labels), [(fixed_data()[0], labels)]):
        with pytest.raises(ArgumentError, match=r"data: .*labels.*Pass"):
            evaluate(Fixed(), data, [1])


def test_images_and_labels_that_do_not_pair() -> None:
    images, labels = fixed_data()
    with pytest.raises(ArgumentError, match=r"data: .*10 images.*9 labels"):
        evaluate(Fixed(), (images, labels[:9]), [1])


def test_a_batch_whose_images_and_labels_do_not_pair() -> None:
    images, labels = fixed_data()
    with pytest.raises(ArgumentError, match=r"data: .*10 images.*9 labels"):
        evaluate(Fixed(), [(images, labels[:9])], [1])


@pytest.mark.parametrize("data", [3, None, "images", {}])
def test_data_of_another_type(data: Any) -> None:
    with pytest.raises(ArgumentError, match=r"data: got a .*Pass \(images, labels\)"):
        evaluate(Fixed(), data, [1])


@pytest.mark.parametrize("data", [(torch.zeros(0, 1), torch.zeros(0).long()), []])
def test_no_image_at_all(data: Any) -> None:
    with pytest.raises(ArgumentError, match="data: there is no image"):
        evaluate(Fixed(), data, [1])


@pytest.mark.parametrize("forget", [[], [4], [-1], [True], [1.0], range(4), [1, 1]])
def test_a_bad_forget(forget: Any) -> None:
    with pytest.raises(ArgumentError, match=r"^forget: got"):
        evaluate(Fixed(), fixed_data(), forget)


def test_forget_in_other_forms() -> None:
    expected = evaluate(Fixed(), fixed_data(), [0, 1])
    for forget in (np.array([0, 1]), torch.tensor([1, 0]), {0, 1}, range(2)):
        assert evaluate(Fixed(), fixed_data(), forget) == expected


@pytest.mark.parametrize("fails", [False, True])
def test_modes_are_restored_and_statistics_unchanged(fails: bool) -> None:
    model = tiny().train()
    model.drop.eval()
    images, labels = tiny_data(20)
    with untouched(model):
        if fails:
            with pytest.raises(ArgumentError):
                evaluate(model, (images, labels + 1), [1])
        else:
            evaluate(model, (images, labels), [1])


def test_it_measures_in_eval_mode() -> None:
    data = tiny_data()
    assert evaluate(tiny().train(), data, [1]) == evaluate(tiny(), data, [1])


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64])
def test_images_take_the_dtype_of_the_model(dtype: torch.dtype) -> None:
    assert evaluate(tiny().to(dtype), tiny_data(), [1]).overall_accuracy > 95


@pytest.mark.parametrize("wrap", [Answer, lambda y: (y, 1), lambda y: {"logits": y}])
def test_outputs_in_a_container(wrap: Any) -> None:
    model = Returning(tiny(), wrap)
    assert evaluate(model, tiny_data(), [1]) == evaluate(tiny(), tiny_data(), [1])
    assert evaluate(mask(model, [1]), tiny_data(), [1]).forget_accuracy == 0


# --- the mask --------------------------------------------------------------------------------


def test_the_mask_forgets_all_and_never_lowers_retain_accuracy() -> None:
    model = tiny()
    with torch.no_grad():
        model.fc2.weight.add_(torch.randn(5, 32) * 2)  # so that it makes errors
    data = tiny_data()
    before = evaluate(model, data, [1, 3])
    with untouched(model):
        after = evaluate(mask(model, [1, 3]), data, [1, 3])
    assert before.forget_accuracy > 0
    assert before.retain_accuracy < 100
    assert after.forget_accuracy == 0
    assert after.retain_accuracy >= before.retain_accuracy


def test_the_mask_sets_only_the_forgotten_logits() -> None:
    model = tiny()
    images = tiny_data(10)[0]
    masked, plain = mask(model, {1})(images), model(images)
    assert (masked[:, 1] == -torch.inf).all()
    retained = [0, 2, 3, 4]
    assert torch.equal(masked[:, retained], plain[:, retained])
    assert plain.isfinite().all()


@pytest.mark.parametrize("forget", [[], [-1], [1.5], True, "1", [2, 2]])
def test_the_mask_of_a_bad_forget(forget: Any) -> None:
    with pytest.raises(ArgumentError, match=r"^forget: got"):
        mask(tiny(), forget)


def test_the_mask_beyond_the_logits() -> None:
    with pytest.raises(ArgumentError, match=r"forget: .*7.*5 logits.* from 0 to 4"):
        mask(tiny(), [7])(tiny_data(5)[0])


def test_the_mask_of_every_class() -> None:
    with pytest.raises(ArgumentError, match=r"forget: .*every class"):
        mask(tiny(), range(5))(tiny_data(5)[0])
