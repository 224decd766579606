"""A trained Vision Transformer: attention, splits, impressions, unlearning."""

from __future__ import annotations

import functools
from typing import Any

import pytest
import torch
from support import changed_tensors, last_layer_inputs, untouched
from torch import Tensor, nn
from torch.nn import functional as F

from zsu_fast import ClassImpressions, ZeroShotUnlearner, evaluate, mask, synthesize, unlearn
from zsu_fast.models import zoo
from zsu_fast.models.wrapper import working_copy
from zsu_fast.splitting.layers import layer_names
from zsu_fast.splitting.replay_split import ReplayTail
from zsu_fast.splitting.split import split_at

FORGET = [3, 4, 8]
LAST_BLOCK = ("blocks.3.", "norm.", "head.")
OUTPUT: dict[str, Any] = {"depth": "output", "progress": False}
QUICK: dict[str, Any] = OUTPUT | {"steps": 40, "batch": 64, "mixtures": 256}


@functools.lru_cache(maxsize=1)
def vit() -> nn.Module:
    return zoo.load("vit_cifar")


@functools.lru_cache(maxsize=2)
def impressions(per_class: int = 8) -> ClassImpressions:
    return synthesize(vit(), per_class=per_class, progress=False)


# --- the model ---------------------------------------------------------------------------------


def test_attention_equals_that_of_torch() -> None:
    attention, tokens = zoo.Attention(24, 3).eval(), torch.randn(2, 7, 24, requires_grad=True)
    reference = nn.MultiheadAttention(24, 3, batch_first=True).eval()
    with torch.no_grad():
        reference.in_proj_weight.copy_(attention.qkv.weight)
        reference.in_proj_bias.copy_(attention.qkv.bias)
        reference.out_proj.load_state_dict(attention.proj.state_dict())
    actual = attention(tokens)
    expected = reference(tokens, tokens, tokens, need_weights=False)[0]
    assert torch.allclose(actual, expected, atol=1e-6)
    weight = torch.randn_like(actual)
    gradients = [torch.autograd.grad((y * weight).sum(), tokens)[0] for y in (actual, expected)]
    assert torch.allclose(*gradients, atol=1e-6)


def test_a_block_equals_the_pre_norm_encoder_layer_of_torch() -> None:
    block = zoo.TransformerBlock(24, 3, 48).eval()
    reference = nn.TransformerEncoderLayer(
        24, 3, 48, activation=F.gelu, batch_first=True, norm_first=True
    ).eval()
    state = {
        "self_attn.in_proj_weight": block.attn.qkv.weight,
        "self_attn.in_proj_bias": block.attn.qkv.bias,
    }
    pairs = (
        ("self_attn.out_proj", block.attn.proj), ("linear1", block.mlp[0]),
        ("linear2", block.mlp[2]), ("norm1", block.norm1), ("norm2", block.norm2),
    )  # fmt: skip
    for name, module in pairs:
        nn.init.normal_(module.bias)
        state |= {f"{name}.{key}": tensor for key, tensor in module.state_dict().items()}
    reference.load_state_dict(state)
    tokens = torch.randn(2, 7, 24)
    with torch.no_grad():
        assert torch.allclose(block(tokens), reference(tokens), atol=1e-5)


def test_patches_positions_and_class_token_matter() -> None:
    model, image = vit(), torch.randn(1, 3, 32, 32, requires_grad=True)
    patches = model.patch_embed(image)
    assert patches.shape == (1, 64, 96)
    (gradient,) = torch.autograd.grad(patches[0, 63].sum(), image)  # the bottom right patch
    assert gradient[0, :, 24:, 24:].any()
    assert not gradient[0, :, :16, :16].any()  # a patch depends on its neighbourhood only
    (gradient,) = torch.autograd.grad(model(image)[0, 0], image)
    assert gradient.abs().amax((0, 1)).gt(0).all()  # a logit depends on every pixel
    with torch.no_grad():
        rolled = model(image.roll(16, 3))
        assert not torch.allclose(model(image), rolled, atol=1e-2)
        assert not torch.equal(model.cls_token, torch.zeros_like(model.cls_token))


# --- splits ------------------------------------------------------------------------------------


def test_every_split_is_exact_and_by_fx() -> None:
    model, images = vit(), torch.randn(3, 3, 32, 32)
    layers = layer_names(model, images)
    assert len(layers) == 2 + 4 * 4 + 1
    names = [*layers, "blocks", "norm"]
    names += [f"blocks.{i}{part}" for i in (0, 3) for part in ("", ".norm1", ".attn", ".mlp")]
    with untouched(model), torch.no_grad():
        expected = model(images)
        for name in names:
            split = split_at(working_copy(model, torch.device("cpu")), name, images, "a test")
            assert not isinstance(split.tail, ReplayTail), name
            assert torch.equal(split.tail(*split.backbone(images)), expected), name


def test_boundary_tensors() -> None:
    images = torch.randn(3, 3, 32, 32)
    copied = working_copy(vit(), torch.device("cpu"))
    for name, shapes in (
        ("blocks.3", [(3, 65, 96)]),  # the tokens
        ("blocks.3.attn.qkv", [(3, 65, 96)] * 2),  # and the shortcut
        ("head", [(3, 96)]),  # the class token alone
    ):
        with torch.no_grad():
            boundary = split_at(copied, name, images, "a test").backbone(images)
        assert [tuple(t.shape) for t in boundary] == shapes, name


def test_the_last_block_trains_its_norms_and_the_final_one() -> None:
    copied = working_copy(vit(), torch.device("cpu"))
    split = split_at(copied, "blocks.3", torch.randn(2, 3, 32, 32), "a test")
    assert set(split.parameters) == {n for n in vit().state_dict() if n.startswith(LAST_BLOCK)}
    assert not split.output_level


# --- impressions -------------------------------------------------------------------------------


def test_impressions_reach_their_confidence_through_the_patch_embedding() -> None:
    result = impressions()
    assert result.hit_rate == 1
    with torch.no_grad():
        exact = vit()(result.images).softmax(1)
    confidence = exact.gather(1, result.labels[:, None])[:, 0]
    assert torch.allclose(confidence, result.confidence, atol=1e-5)  # of the float32 model
    assert (exact.argmax(1) == result.labels).all()
    assert (confidence - result.target).min() > -0.1  # the ascent may run in bfloat16
    low, high = result.spec.low.view(-1, 1, 1), result.spec.high.view(-1, 1, 1)
    assert ((result.images >= low - 1e-5) & (result.images <= high + 1e-5)).all()


# --- unlearning --------------------------------------------------------------------------------


@pytest.mark.parametrize("tail", ["blocks.3", "last"])
def test_a_named_tail_is_all_that_changes(tail: str) -> None:
    model = vit()
    with untouched(model):
        result = unlearn(model, FORGET, tail=tail, impressions=impressions(), **QUICK)
    changed = changed_tensors(model, result)
    starts = LAST_BLOCK if tail == "blocks.3" else ("head.",)
    assert changed == {n for n in model.state_dict() if n.startswith(starts)}
    assert_never_predicted(result, impressions())


def test_the_tail_is_found() -> None:
    unlearner = ZeroShotUnlearner(vit(), FORGET, impressions=impressions(), **QUICK)
    result = unlearner.run()
    assert unlearner.split_point.name in layer_names(vit(), torch.zeros(1, 3, 32, 32))
    assert "first responsive layer" in unlearner.split_point.reason
    assert changed_tensors(vit(), result) == set(unlearner.split_point.parameters)
    assert_never_predicted(result, impressions())


def assert_never_predicted(model: nn.Module, data: ClassImpressions) -> None:
    """No impression of a forgotten class is classified as one; most others keep their class."""
    with torch.no_grad():
        predicted = model(data.images).argmax(1)
    forgotten = torch.isin(data.labels, torch.tensor(FORGET))
    assert not torch.isin(predicted[forgotten], torch.tensor(FORGET)).any()
    assert (predicted == data.labels)[~forgotten].float().mean() > 0.9


@pytest.fixture(scope="module")
def features_and_labels(cifar10: tuple[Tensor, Tensor]) -> tuple[Tensor, Tensor]:
    """The inputs of the last layer for 4,000 test images, float32 [4000, 96], and the labels."""
    images = vit().input_spec.normalise(cifar10[0][:4000])
    return last_layer_inputs(vit(), "head", images), cifar10[1][:4000]


@pytest.mark.shared
@pytest.mark.parametrize("forget", [[3, 4, 8], [0, 9], [5]])
def test_it_forgets_cifar10_classes(
    forget: list[int], features_and_labels: tuple[Tensor, Tensor]
) -> None:
    model = vit()
    unlearned = unlearn(model, forget, impressions=impressions(32), **OUTPUT)
    assert changed_tensors(model, unlearned) == {"head.weight", "head.bias"}  # features are equal
    baseline = evaluate(mask(model.head, forget), features_and_labels, forget)
    result = evaluate(unlearned.head, features_and_labels, forget)
    assert result.forget_accuracy <= 0.5, str(result)
    assert result.retain_accuracy >= baseline.retain_accuracy - 1, str(result)
