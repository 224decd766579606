"""Models as functions from images to logits, and the checks of arguments about them."""

from __future__ import annotations

import copy
from typing import Any

import numpy as np
import pytest
import torch
from support import SPEC, Answer, Returning, TinyNet, bits, tiny, untouched
from torch import Tensor, nn

import zsu_fast
from zsu_fast import ArgumentError, ModelError
from zsu_fast.models import zoo
from zsu_fast.models.class_indices import check_classes, check_forget
from zsu_fast.models.infer_spec import infer_shape, resolve_spec
from zsu_fast.models.input_spec import InputSpec
from zsu_fast.models.parameters import unwrap, weights_hash
from zsu_fast.models.wrapper import (
    LogitsModel,
    count_classes,
    pick_logits,
    resolve_device,
    working_copy,
)

CPU = torch.device("cpu")

ACCEPTED = {
    "numbers as text": ["1", "3"],
    "list": [3, 1],
    "tuple": (1, 3),
    "set": {1, 3},
    "frozenset": frozenset({3, 1}),
    "range": range(1, 4, 2),
    "generator": (i for i in (1, 3)),
    "dict keys": {1: "a", 3: "b"}.keys(),
    "numpy int64 array": np.array([1, 3]),
    "numpy uint8 array": np.array([3, 1], dtype=np.uint8),
    "list of numpy ints": [np.int64(1), np.int32(3)],
    "int64 tensor": torch.tensor([1, 3]),
    "uint8 tensor": torch.tensor([1, 3], dtype=torch.uint8),
    "list of tensors": [torch.tensor(1), torch.tensor([3])],
}
REFUSED = {
    "empty list": ([], "no class"),
    "empty set": (set(), "no class"),
    "empty tensor": (torch.tensor([], dtype=torch.int64), "no class"),
    "empty string": ("", "str"),
    "none": (None, "NoneType"),
    "negative": ([1, -1], "-1 is negative"),
    "negative int": (-1, "negative"),
    "out of range": ([5], "5 is out of range"),
    "far out of range": (10**12, "out of range"),
    "duplicate": ([1, 2, 1], "[1] named more than once"),
    "duplicate across types": ([1, np.int64(1)], "more than once"),
    "bool": (True, "bool"),
    "bool in a list": ([True, 2], "bool"),
    "numpy bool": ([np.bool_(True)], "bool"),
    "numpy mask": (np.array([True, False, True, False, False]), "bool"),
    "bool tensor": (torch.tensor([True, False]), "bool"),
    "tensor bool in a list": ([torch.tensor(True)], "tensor"),
    "float": (1.0, "float"),
    "float in a list": ([1, 2.0], "2.0 is a float"),
    "nan": ([float("nan")], "float"),
    "float tensor": (torch.tensor([1.0]), "float32"),
    "float array": (np.array([1.0]), "float64"),
    "string": ("1,2", "str"),
    "bytes": (b"\x01", "bytes"),
    "dict": ({1: 2}, "dict"),
    "nested list": ([[1, 2]], "list"),
}


@pytest.mark.parametrize("form", ACCEPTED)
def test_classes_in_any_collection_of_ints(form: str) -> None:
    wanted = check_forget(ACCEPTED[form], 5)
    assert wanted == [1, 3]
    assert all(type(c) is int for c in wanted)


@pytest.mark.parametrize("one", [2, np.int64(2), torch.tensor(2), np.array(2)])
def test_a_single_class(one: Any) -> None:
    assert check_forget(one, 5) == [2]


@pytest.mark.parametrize("form", REFUSED)
def test_refused_classes(form: str) -> None:
    value, reason = REFUSED[form]
    with pytest.raises(ArgumentError) as caught:
        check_forget(value, 5)
    message = str(caught.value)
    assert caught.value.argument == "forget"
    assert message.startswith("forget: got ")
    assert repr(value)[:40].replace("\n", " ") in message
    assert reason in message
    assert "Pass distinct class indices from 0 to 4" in message
    assert isinstance(caught.value, ValueError)


@pytest.mark.parametrize("value", [range(5), [4, 3, 2, 1, 0], torch.arange(5)])
def test_forgetting_every_class_is_refused(value: Any) -> None:
    with pytest.raises(ArgumentError, match=r"forget: .*every class.* Leave out at least one"):
        check_forget(value, 5)
    assert check_classes("classes", value, 5) == [0, 1, 2, 3, 4]


def test_a_long_value_is_shortened_in_the_error() -> None:
    with pytest.raises(ArgumentError) as caught:
        check_forget(list(range(5000)), 1000)
    assert len(str(caught.value)) < 300


# --- wrappers and outputs --------------------------------------------------------------------


def test_unwrap_nested_wrappers() -> None:
    model = TinyNet()
    compiled = torch.compile(model, backend="eager")
    assert unwrap(model) is model
    assert unwrap(nn.DataParallel(model)) is model
    assert unwrap(compiled) is model
    assert unwrap(torch.compile(nn.DataParallel(model), backend="eager")) is model
    assert unwrap(nn.DataParallel(compiled)) is model


OUTPUTS = {
    "tuple": lambda y: (y, y + 1),
    "list": lambda y: [y],
    "dict": lambda y: {"loss": y + 1, "logits": y},
    "dict of one": lambda y: {"out": y},
    "object": Answer,
}


@pytest.mark.parametrize("form", OUTPUTS)
def test_logits_are_found(form: str) -> None:
    logits = torch.randn(2, 5)
    assert pick_logits(OUTPUTS[form](logits)) is logits
    assert pick_logits(logits) is logits


@pytest.mark.parametrize("output", [{"a": 1, "b": 2}, {}, (), 3, "logits", None])
def test_no_logits_in_it(output: Any) -> None:
    with pytest.raises(ModelError, match=r"model: .*no logits.* Return a"):
        pick_logits(output)


@pytest.mark.parametrize(
    ("wrap", "reason"),
    [
        (lambda y: y[:, :1], "single logit"),
        (lambda y: y[0], "not \\[2, classes\\]"),
        (lambda y: y[:, :, None], "not \\[2, classes\\]"),
        (lambda y: y * float("nan"), "NaN or infinite"),
        (lambda y: {"a": y, "b": y}, "keys \\['a', 'b'\\]"),
        (lambda _: (3,), "int, not"),
    ],
)
def test_outputs_that_are_not_rows_of_logits(wrap: Any, reason: str) -> None:
    model = LogitsModel(Returning(tiny(), wrap))
    with pytest.raises(ModelError, match=reason):
        count_classes(model, SPEC, CPU)


def test_count_classes() -> None:
    assert count_classes(LogitsModel(tiny()), SPEC, CPU) == 5


def test_a_model_that_takes_only_one_image() -> None:
    class One(TinyNet):
        def forward(self, x: Tensor) -> Tensor:
            return super().forward(x.view(1, 3, 8, 8))

    with pytest.raises(ModelError, match=r"one image but not a batch of two.*any batch size"):
        count_classes(LogitsModel(One().eval()), SPEC, CPU)


def test_a_shape_at_which_the_model_raises() -> None:
    wrong = InputSpec((3, 9, 32), SPEC.mean, SPEC.std)
    with pytest.raises(ArgumentError, match=r"input_shape: .*\(3, 9, 32\).*Pass input_shape="):
        count_classes(LogitsModel(tiny()), wrong, CPU)


# --- working copy and hash -------------------------------------------------------------------


def test_working_copy_is_independent_float32_and_trainable() -> None:
    model = tiny().half().train()
    model.fc2.weight.requires_grad_(False)
    with untouched(model):
        work = working_copy(model, CPU)
        assert all(p.dtype == torch.float32 and p.requires_grad for p in work.parameters())
        assert not any(m.training for m in work.modules())
        assert not any(getattr(m, "inplace", False) for m in work.modules())
        with torch.no_grad():
            for tensor in work.state_dict().values():
                tensor.add_(1)
    assert model.act.inplace


@pytest.mark.parametrize("where", ["fc2.weight", "bn.running_var"])
@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_weights_that_are_not_finite(where: str, value: float) -> None:
    model = tiny()
    with torch.no_grad():
        model.state_dict()[where].view(-1)[1] = value
    with untouched(model), pytest.raises(ModelError, match=f"model: {where} holds 1 NaN or inf"):
        working_copy(model, CPU)


def test_a_model_that_cannot_be_copied() -> None:
    model = tiny()
    model.file = open(__file__)  # noqa: SIM115
    try:
        with pytest.raises(ModelError, match=r"cannot be copied.*Remove"):
            working_copy(model, CPU)
    finally:
        model.file.close()


def test_hash_depends_on_every_bit() -> None:
    model = tiny()
    digest = weights_hash(model)
    assert len(digest) == 64
    assert weights_hash(copy.deepcopy(model)) == digest
    assert weights_hash(nn.DataParallel(model)) == digest
    assert weights_hash(torch.compile(model, backend="eager")) == digest
    assert weights_hash(copy.deepcopy(model).double()) != digest
    for name in model.state_dict():
        other = copy.deepcopy(model)
        flat = other.state_dict()[name].view(-1)
        with torch.no_grad():
            flat[-1:].view(torch.uint8)[0] ^= 1
        assert weights_hash(other) != digest, name


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64])
def test_hash_of_other_dtypes(dtype: torch.dtype) -> None:
    model = tiny().to(dtype)
    assert weights_hash(model) == weights_hash(copy.deepcopy(model)) != weights_hash(tiny())


def test_hash_distinguishes_minus_zero_from_zero() -> None:
    model = nn.Linear(2, 2, bias=False)
    with torch.no_grad():
        model.weight.zero_()
        before = weights_hash(model)
        model.weight.neg_()
    assert weights_hash(model) != before


# --- images ----------------------------------------------------------------------------------


@pytest.mark.parametrize("name", zoo.ZOO)
def test_shapes_of_the_zoo_are_inferred(name: str) -> None:
    model = zoo.build(name)
    with untouched(model):
        assert infer_shape(model)[0] == zoo.ZOO[name].spec.shape


def test_shape_of_torchvision_models() -> None:
    models = pytest.importorskip("torchvision.models")
    assert infer_shape(models.squeezenet1_1())[0] == (3, 224, 224)


@pytest.mark.parametrize(
    ("features", "shape"), [(784, (1, 28, 28)), (3072, (3, 32, 32)), (17, (17,))]
)
def test_shape_of_a_perceptron(features: int, shape: tuple[int, ...]) -> None:
    layers = [nn.Linear(features, 8), nn.ReLU(), nn.Linear(8, 3)]
    flat = nn.Sequential(*([nn.Flatten()] if len(shape) > 1 else []), *layers)
    assert infer_shape(flat)[0] == shape


def test_inferring_does_not_change_batch_norm_statistics() -> None:
    model = tiny().train()
    with untouched(model):
        infer_shape(model)
        resolve_spec(model)


def test_a_size_that_moves_pixels_into_the_batch_does_not_fit() -> None:
    class View(TinyNet):
        def forward(self, x: Tensor) -> Tensor:
            x = self.act(self.bn(self.conv(x))).view(-1, 72)  # 50 rows for 2 images of 32 x 32
            return self.fc2(self.act(self.fc1(x)))

    assert infer_shape(View().eval())[0] == (3, 8, 8)


def test_no_shape_fits() -> None:
    model = nn.Sequential(nn.Conv2d(3, 4, 3), nn.Flatten(), nn.Linear(7, 2))
    with pytest.raises(ArgumentError, match=r"input_shape: not given.*Pass input_shape="):
        infer_shape(model)
    with pytest.raises(ArgumentError, match="no convolution or linear layer"):
        infer_shape(nn.Sequential(nn.BatchNorm2d(3)))


def test_spec_stated_given_or_guessed() -> None:
    model = zoo.build("lenet5")
    assert resolve_spec(model) == zoo.ZOO["lenet5"].spec
    given = resolve_spec(model, (1, 28, 28), 0.5, [0.25])
    assert (given.shape, given.mean, given.std) == ((1, 28, 28), (0.5,), (0.25,))
    assert resolve_spec(tiny()).mean == SPEC.mean
    assert "assumed" in resolve_spec(tiny()).source
    only_mean = resolve_spec(tiny(), mean=0.5)
    assert (only_mean.mean, only_mean.std) == ((0.5,) * 3, (1.0,) * 3)


def test_spec_from_pretrained_cfg() -> None:
    pytest.importorskip("timm")
    named = tiny()
    named.pretrained_cfg = {"input_size": (3, 8, 8), "mean": (0.1,) * 3, "std": (0.2,) * 3}
    assert resolve_spec(named).std == (0.2,) * 3


@pytest.mark.parametrize(
    ("options", "argument"),
    [
        ({"input_shape": (3, 0, 8)}, "input_shape"),
        ({"input_shape": (3, 8)}, "input_shape"),
        ({"input_shape": (3, 8.5, 8)}, "input_shape"),
        ({"input_shape": "3,8,8"}, "input_shape"),
        ({"input_shape": 8}, "input_shape"),
        ({"mean": (0.5, 0.5)}, "mean"),
        ({"mean": "grey"}, "mean"),
        ({"mean": float("nan")}, "mean"),
        ({"std": 0}, "std"),
        ({"std": (0.5, 0.5, -1)}, "std"),
    ],
)
def test_malformed_image_options(options: dict[str, Any], argument: str) -> None:
    with pytest.raises(ArgumentError) as caught:
        resolve_spec(tiny(), **options)
    assert caught.value.argument == argument
    assert "got" in str(caught.value)
    assert caught.value.remedy


def test_pixels_are_normalised_between_low_and_high() -> None:
    pixels = torch.tensor([0, 255], dtype=torch.uint8).view(2, 1, 1, 1).expand(2, 3, 8, 8)
    images = SPEC.normalise(pixels)
    assert torch.allclose(images[0, :, 0, 0], SPEC.low)
    assert torch.allclose(images[1, :, 0, 0], SPEC.high)
    assert bits(images[:, :, 0, 0]) == bits(images[:, :, 7, 3])


@pytest.mark.parametrize("device", ["nonsense", "cuda:99", 3.5])
def test_a_device_that_is_not_available(device: Any) -> None:
    with pytest.raises(ArgumentError, match=r"device: got .*Pass one"):
        resolve_device(tiny(), device)


@pytest.mark.parametrize("model", [nn.ReLU(), "resnet18", None, torch.zeros(3)])
def test_what_is_not_a_trained_module(model: Any) -> None:
    with pytest.raises(ModelError, match=r"without parameters.*Pass a trained torch\.nn\.Module"):
        resolve_device(model, None)


@pytest.mark.parametrize(
    ("options", "name"),
    [({"std": 1e-300}, "std"), ({"mean": 1e30}, "mean"), ({"device": "meta"}, "device")],
)
def test_options_that_would_give_infinite_values_are_refused(
    options: dict[str, Any], name: str
) -> None:
    with pytest.raises(ArgumentError, match=name):
        zsu_fast.unlearn(tiny(), 1, **options)
