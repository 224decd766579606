"""Unlearned models can be deployed: loaded, exported, compiled, quantised; they still forget."""

from __future__ import annotations

import copy
import functools
import warnings
from pathlib import Path
from typing import Any

import pytest
import torch
from support import QUICK, SPEC, TinyNet, assert_forgets, same_bits, tiny, tiny_data
from torch import Tensor, nn

import zsu_fast
from zsu_fast.cli.demo import mnist_test
from zsu_fast.models import checkpoint, zoo

FORGET = [1, 2, 3, 4]


@functools.lru_cache(maxsize=1)
def _unlearned() -> nn.Module:
    return zsu_fast.unlearn(tiny(), [1], tail="last", **QUICK)


@functools.lru_cache(maxsize=1)
def _lenet() -> nn.Module:
    return zsu_fast.unlearn(zoo.load("lenet5"), FORGET, depth="output", progress=False)


@pytest.fixture
def model() -> nn.Module:
    return copy.deepcopy(_unlearned())


@pytest.fixture
def lenet() -> nn.Module:
    return copy.deepcopy(_lenet())


@pytest.fixture
def images() -> Tensor:
    return tiny_data(16)[0]


@pytest.mark.parametrize("ending", ["safetensors", "pt"])
def test_loads_into_the_users_own_class(tmp_path: Path, model: nn.Module, ending: str) -> None:
    path = tmp_path / f"m.{ending}"
    checkpoint.save_weights(path, model)
    if ending == "pt":
        state = torch.load(path, weights_only=True)
    else:
        from safetensors.torch import load_file

        state = load_file(path)
    fresh = TinyNet()
    keys = fresh.load_state_dict(state, strict=True)
    assert not keys.missing_keys
    assert not keys.unexpected_keys
    assert same_bits(fresh, model)
    assert {n: p.requires_grad for n, p in model.named_parameters()} == {
        n: p.requires_grad for n, p in fresh.named_parameters()
    }


def test_export(model: nn.Module, images: Tensor) -> None:
    batch = torch.export.Dim("batch", min=2, max=64)
    program = torch.export.export(model, (images[:4],), dynamic_shapes=({0: batch},))
    again = program.module()
    torch.testing.assert_close(again(images), model(images))
    assert (again(images).argmax(1) != 1).all()


def test_onnx_in_onnxruntime(tmp_path: Path, model: nn.Module, images: Tensor) -> None:
    logits = _run_onnx(tmp_path / "m.onnx", model, images)
    torch.testing.assert_close(logits, model(images), atol=1e-4, rtol=1e-4)
    assert (logits.argmax(1) != 1).all()


def _run_onnx(path: Path, model: nn.Module, images: Tensor) -> Tensor:
    """The logits of the model exported to ``path``, run by onnxruntime."""
    for name in ("onnx", "onnxscript"):
        pytest.importorskip(name)
    runtime = pytest.importorskip("onnxruntime")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # from the exporter
        program = torch.onnx.export(
            model, (images[:4],), dynamo=True, dynamic_shapes=({0: torch.export.Dim("batch")},),
            verbose=False,
        )  # fmt: skip
    assert program is not None
    program.save(path)
    session = runtime.InferenceSession(path, providers=["CPUExecutionProvider"])
    (logits,) = session.run(None, {session.get_inputs()[0].name: images.numpy()})
    return torch.from_numpy(logits)


@pytest.fixture
def small() -> nn.Module:
    return zsu_fast.compact(_unlearned(), [1], input_shape=SPEC.shape)


def test_a_compact_model_can_be_exported(small: nn.Module, images: Tensor) -> None:
    batch = torch.export.Dim("batch", min=2, max=64)
    program = torch.export.export(small, (images[:4],), dynamic_shapes=({0: batch},))
    exported = program.module()(images)
    torch.testing.assert_close(exported, _unlearned()(images)[:, [0, 2, 3, 4]])
    compiled = torch.compile(small)
    with torch.no_grad():
        torch.testing.assert_close(compiled(images), exported, atol=1e-5, rtol=1e-4)


def test_onnx_of_a_compact_model(tmp_path: Path, small: nn.Module, images: Tensor) -> None:
    logits = _run_onnx(tmp_path / "m.onnx", small, images)
    expected = _unlearned()(images)[:, [0, 2, 3, 4]]
    torch.testing.assert_close(logits, expected, atol=1e-4, rtol=1e-4)


def test_compile(model: nn.Module, images: Tensor) -> None:
    compiled = torch.compile(model)
    with torch.no_grad():
        torch.testing.assert_close(compiled(images), model(images), atol=1e-5, rtol=1e-4)


def _check_lenet(deployed: nn.Module, dtype: torch.dtype = torch.float32) -> None:
    """Compares FA and RA on the 2,000 embedded MNIST images with those of the float32 model."""
    images, labels = mnist_test()
    expected = zsu_fast.evaluate(_lenet(), (images, labels), FORGET)
    actual = zsu_fast.evaluate(deployed, (images.to(dtype), labels), FORGET)
    assert expected.forget_accuracy is not None
    assert expected.retain_accuracy is not None
    assert actual.forget_accuracy is not None
    assert actual.retain_accuracy is not None
    assert expected.forget_accuracy <= 0.2
    assert actual.forget_accuracy <= 0.5, str(actual)
    assert actual.retain_accuracy >= expected.retain_accuracy - 0.3, str(actual)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision(lenet: nn.Module, dtype: torch.dtype) -> None:
    _check_lenet(lenet.to(dtype), dtype)


def _quantise(model: nn.Module, static: bool) -> nn.Module:
    """int8 weights; activations too, by their range on images (static) or at each call."""
    from torch.ao import quantization as q

    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # torch.ao is deprecated in favour of torchao
        if not static:
            return q.quantize_dynamic(model, {nn.Linear}, torch.qint8)
        from torch.ao.quantization.quantize_fx import convert_fx, prepare_fx

        torch.backends.quantized.engine = "x86"
        images = mnist_test()[0]
        prepared = prepare_fx(model, q.get_default_qconfig_mapping("x86"), (images[:1],))
        with torch.no_grad():
            prepared(images[:256])
        return convert_fx(prepared)


# torch is going to remove this way to quantise; people still have such models.
@pytest.mark.filterwarnings("ignore:torch.quantize_per_tensor:UserWarning")
@pytest.mark.parametrize("static", [False, True])
def test_int8(lenet: nn.Module, static: bool) -> None:
    if "x86" not in torch.backends.quantized.supported_engines:
        pytest.skip("torch has no int8 kernels for this processor")
    before = torch.backends.quantized.engine
    try:
        _check_lenet(_quantise(lenet, static))
    finally:
        torch.backends.quantized.engine = before


def test_save_pretrained(tmp_path: Path) -> None:
    transformers = pytest.importorskip("transformers")
    torch.manual_seed(0)
    config = transformers.ViTConfig(
        hidden_size=32, num_hidden_layers=2, num_attention_heads=2, intermediate_size=64,
        image_size=8, patch_size=4, num_channels=3, num_labels=5,
        hidden_dropout_prob=0.0, attention_probs_dropout_prob=0.0,
    )  # fmt: skip
    vit = transformers.ViTForImageClassification(config)
    images, labels = tiny_data(seed=0)
    optimiser = torch.optim.Adam(vit.parameters(), 3e-3)
    for _ in range(60):
        optimiser.zero_grad()
        nn.functional.cross_entropy(vit(images).logits, labels).backward()
        optimiser.step()
    vit.eval().zero_grad()
    options: dict[str, Any] = QUICK | {"mean": SPEC.mean, "std": SPEC.std, "tail": "last"}
    unlearned = zsu_fast.unlearn(vit, [1], **options)
    unlearned.save_pretrained(tmp_path)
    again = transformers.ViTForImageClassification.from_pretrained(tmp_path).eval()
    assert same_bits(again, unlearned)
    assert_forgets(again, [1])


def test_unlearned_is_a_plain_model(model: nn.Module) -> None:
    """The result has no hooks, wrappers or attributes of this package."""
    assert type(model) is TinyNet
    assert vars(model).keys() == vars(TinyNet()).keys()
    for module in model.modules():
        assert not module._forward_hooks
        assert not module._forward_pre_hooks
