"""The zoo: its models, its weights, and their accuracy."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from support import same_bits
from torch import Tensor, nn

from zsu_fast import ArgumentError, CheckpointError, evaluate
from zsu_fast.models import zoo
from zsu_fast.models.checkpoint import load_into, load_weights, save_weights
from zsu_fast.models.parameters import weights_hash

SHIPPED = [name for name, entry in zoo.ZOO.items() if entry.weights]


@pytest.mark.parametrize("name", zoo.ZOO)
def test_shapes_of_inputs_and_outputs(name: str) -> None:
    model = zoo.build(name)
    assert model.input_spec is zoo.ZOO[name].spec
    assert not model.training
    with torch.no_grad():
        assert model(torch.zeros(3, *model.input_spec.shape)).shape == (3, 10)


@pytest.mark.parametrize(
    ("name", "count"),
    [("lenet5", 61_706), ("karpathynet", 22_466), ("resnet20_cifar", 269_722),
     ("resnet56_cifar", 853_018)],
)  # fmt: skip
def test_sizes_are_the_published_ones(name: str, count: int) -> None:
    assert sum(p.numel() for p in zoo.build(name).parameters()) == count


def test_other_numbers_of_classes() -> None:
    for model, shape in ((zoo.LeNet5(7), (1, 28, 28)), (zoo.KarpathyNet(7), (3, 32, 32)),
                         (zoo.CifarResNet(1, 7), (3, 32, 32)),
                         (zoo.CompactViT(classes=7), (3, 32, 32))):  # fmt: skip
        assert model(torch.zeros(2, *shape)).shape == (2, 7)


@pytest.mark.parametrize("name", SHIPPED)
def test_shipped_weights_load_and_are_small(name: str) -> None:
    model = zoo.load(name)
    assert not same_bits(model, zoo.build(name))
    assert weights_hash(model) == weights_hash(zoo.load(name))
    assert all(p.isfinite().all() for p in model.parameters())
    assert (zoo.ASSETS / zoo.ZOO[name].weights).stat().st_size < 1_000_000


def test_golden_models_never_predict_the_forgotten_classes() -> None:
    for name, forget in (("lenet5_golden", [1, 2, 3, 4]), ("karpathynet_golden", [3, 4, 8])):
        model = zoo.load(name)
        images = torch.randn(200, *model.input_spec.shape)
        with torch.no_grad():
            answers = model(images).argmax(1)
        assert not set(answers.tolist()) & set(forget), name


@pytest.mark.shared
@pytest.mark.parametrize(("name", "least"), [("lenet5", 99.0), ("lenet5_golden", 99.0)])
def test_mnist_accuracy(name: str, least: float, mnist: tuple[Tensor, Tensor]) -> None:
    result = evaluate(zoo.load(name), mnist, [1, 2, 3, 4])
    score = result.retain_accuracy if "golden" in name else result.overall_accuracy
    assert score >= least, str(result)
    assert "golden" not in name or result.forget_accuracy == 0


@pytest.mark.shared
@pytest.mark.parametrize(("name", "least"), [("karpathynet", 72.3), ("karpathynet_golden", 77.0)])
def test_cifar10_accuracy(name: str, least: float, cifar10: tuple[Tensor, Tensor]) -> None:
    model = zoo.load(name)
    result = evaluate(model, (model.input_spec.normalise(cifar10[0]), cifar10[1]), [3, 4, 8])
    score = result.retain_accuracy if "golden" in name else result.overall_accuracy
    assert score >= least, str(result)
    assert "golden" not in name or result.forget_accuracy == 0


@pytest.mark.shared
def test_accuracy_of_the_transformer(cifar10: tuple[Tensor, Tensor]) -> None:
    model = zoo.load("vit_cifar")
    result = evaluate(model, (model.input_spec.normalise(cifar10[0]), cifar10[1]), [3, 4, 8])
    assert result.overall_accuracy >= 70, str(result)


def test_the_transformer_uses_only_layer_norm() -> None:
    model = zoo.build("vit_cifar")
    kinds = {type(m).__name__ for m in model.modules() if "Norm" in type(m).__name__}
    assert kinds == {"LayerNorm"}
    assert not list(model.buffers())
    assert sum(p.numel() for p in model.parameters()) == 335_274


def test_weights_stored_in_half_precision_load_as_float32() -> None:
    stored = load_weights(zoo.ASSETS / "vit_cifar.safetensors")
    assert {t.dtype for t in stored.values()} == {torch.float16}
    own = zoo.load("vit_cifar").state_dict()
    assert {t.dtype for t in own.values()} == {torch.float32}
    assert all(torch.equal(own[name], tensor.float()) for name, tensor in stored.items())


@pytest.mark.shared
def test_the_public_resnet20_fits(cifar10: tuple[Tensor, Tensor], resnet20_weights: Any) -> None:
    model = zoo.build("resnet20_cifar")
    load_into(model, resnet20_weights)
    images, labels = cifar10[0][:2000], cifar10[1][:2000]
    result = evaluate(model, (model.input_spec.normalise(images), labels), [0])
    assert 80 < result.overall_accuracy < 83, str(result)  # 81.03 on all of these JPEGs


@pytest.mark.parametrize("call", [zoo.build, zoo.load])
@pytest.mark.parametrize("name", ["vgg16", "", "LeNet5"])
def test_no_such_model(call: Any, name: str) -> None:
    with pytest.raises(ArgumentError, match=rf"model: got '{name}'\. Pass one of lenet5, "):
        call(name)


def test_weights_that_the_package_lacks() -> None:
    with pytest.raises(ArgumentError, match=r"no weights of 'resnet20_cifar'.*Pass a weights file"):
        zoo.load("resnet20_cifar")


def test_weights_of_another_model_of_the_zoo(tmp_path: Any) -> None:
    save_weights(tmp_path / "a.safetensors", zoo.build("resnet56_cifar"))
    with pytest.raises(CheckpointError, match="does not fit CifarResNet"):
        load_into(zoo.build("resnet20_cifar"), tmp_path / "a.safetensors")


def test_a_block_keeps_or_halves_the_map() -> None:
    x = torch.randn(2, 4, 8, 8)
    for block, shape in ((zoo.BasicBlock(4, 4, 1), (2, 4, 8, 8)),
                         (zoo.BasicBlock(4, 8, 2), (2, 8, 4, 4))):  # fmt: skip
        nn.init.zeros_(block.bn2.weight)
        y = block.eval()(x)
        assert y.shape == shape
        skip = x if shape[1] == 4 else x[..., ::2, ::2]  # padded with 2 zero channels each side
        start = 0 if shape[1] == 4 else 2
        assert torch.equal(y[:, start : start + 4], skip.relu())
        assert not y[:, :start].any()
