"""Copies of models whose attributes hold functions, caches or computed tensors."""

from __future__ import annotations

import functools
import types
from collections.abc import Callable
from typing import Any

import pytest
import torch
from support import (
    FORGET,
    QUICK,
    QUICK_DEEP,
    SPEC,
    TinyNet,
    assert_forgets,
    same_bits,
    tiny,
    tiny_data,
    unlearned_tiny,
    untouched,
)  # fmt: skip
from torch import Tensor, nn

import zsu_fast
from zsu_fast import audit, evaluate, unlearn
from zsu_fast.models.parameters import UNCOPYABLE, deep_copy


def by_closure(model: Any) -> None:
    old = model.forward
    model.forward = lambda x: 1 * old(x)


def by_default(model: Any) -> None:
    def forward(x: Tensor, own: nn.Module = model) -> Tensor:
        return TinyNet.forward(own, x)

    model.forward = forward


def by_keyword_default(model: Any) -> None:
    def forward(x: Tensor, *, own: nn.Module = model) -> Tensor:
        return TinyNet.forward(own, x)

    model.forward = forward


def by_partial(model: Any) -> None:
    model.forward = functools.partial(lambda own, x: TinyNet.forward(own, x), model)


def by_method(model: Any) -> None:
    old = model.forward
    model.forward = types.MethodType(lambda _self, x: old(x), model)


def in_a_layer(model: Any) -> None:
    old = model.fc2.forward
    model.fc2.forward = lambda x: old(x)


def by_weight(model: Any) -> None:
    weight, bias = model.fc2.weight, model.fc2.bias
    model.fc2.forward = lambda x: nn.functional.linear(x, weight, bias)


def in_attributes(model: Any) -> None:
    model.steps = [lambda x: model.act(model.bn(model.conv(x))).flatten(1)]
    model.named = {"last": lambda x: model.fc2(x)}

    def forward(self: Any, x: Tensor) -> Tensor:
        return self.named["last"](self.act(self.fc1(self.steps[0](x))))

    model.forward = types.MethodType(forward, model)


@pytest.mark.parametrize(
    "replace",
    [by_closure, by_default, by_keyword_default, by_partial, by_method, in_a_layer, by_weight,
     in_attributes],
)  # fmt: skip
def test_a_replaced_forward_runs_the_copy(replace: Callable[[Any], None]) -> None:
    model = tiny()
    replace(model)
    copied = deep_copy(model, UNCOPYABLE)
    images = tiny_data(10)[0]
    assert torch.equal(copied(images), model(images))
    with torch.no_grad():
        copied.fc2.bias += 1
    assert torch.allclose(copied(images), model(images) + 1)
    with untouched(model):
        result = unlearn(model, FORGET, **QUICK)
    assert_forgets(result, FORGET)
    assert evaluate(model, tiny_data(), FORGET).forget_accuracy == 100


def test_a_replaced_forward_is_forgotten_deeply_and_audited() -> None:
    model = tiny()
    by_closure(model)
    result = unlearn(model, FORGET, input_shape=SPEC.shape, **QUICK_DEEP)
    assert_forgets(result, FORGET)
    found = audit(model, result, FORGET, input_shape=SPEC.shape, relearn_steps=0, progress=False)
    masked = audit(
        model, zsu_fast.mask(model, FORGET), FORGET, input_shape=SPEC.shape, relearn_steps=0,
        progress=False,
    )  # fmt: skip
    assert found.verdict != masked.verdict


def test_a_function_that_refers_to_itself() -> None:
    model = tiny()

    def forward(x: Tensor, again: bool = True) -> Tensor:
        return forward(x, False) if again else TinyNet.forward(model, x)

    model.forward = forward
    copied = deep_copy(model, UNCOPYABLE)
    assert torch.equal(copied(tiny_data(3)[0]), model(tiny_data(3)[0]))


class Cached(TinyNet):
    """Keeps a tensor that it computes from a weight, as timm's LeViT does in eval mode."""

    def __init__(self) -> None:
        super().__init__()
        self.scale = nn.Parameter(torch.ones(1, 32))
        self.cache: dict[str, Tensor] = {}

    def train(self, mode: bool = True) -> None:  # returns None, as some models' does
        super().train(mode)
        if mode and self.cache:
            self.cache = {}

    def forward(self, x: Tensor) -> Tensor:
        x = self.act(self.fc1(self.act(self.bn(self.conv(x))).flatten(1)))
        if "scale" not in self.cache:
            self.cache["scale"] = 1.0 * self.scale
        return self.fc2(x * self.cache["scale"])


def cached(filled: str) -> Cached:
    model = Cached()
    model.load_state_dict(tiny().state_dict(), strict=False)
    model.train(False)
    with torch.set_grad_enabled(filled == "with gradients"):
        if filled:
            model(tiny_data(2)[0])
    return model


@pytest.mark.parametrize("inplace", [False, True])
@pytest.mark.parametrize("filled", ["", "with gradients", "without"])
def test_cached_tensors_are_computed_anew(filled: str, inplace: bool) -> None:
    model = cached(filled)
    result = unlearn(
        model, FORGET, tail="fc1", inplace=inplace, progress=False, depth="output", steps=100,
        **{k: QUICK[k] for k in ("impressions_per_class", "space", "mixtures", "batch")},
    )  # fmt: skip
    assert not torch.equal(result.scale, torch.ones(1, 32))  # it was trained
    assert not result.training
    fresh = cached("")
    fresh.load_state_dict(result.state_dict())
    images = tiny_data(20)[0]
    assert torch.equal(result(images), fresh(images))
    assert_forgets(result, FORGET)


def test_a_levit_of_timm_is_prepared() -> None:
    timm = pytest.importorskip("timm")
    model = timm.create_model("levit_128s", num_classes=5, img_size=64).eval()
    model(torch.zeros(1, 3, 64, 64))  # fills the caches, with gradients
    copied = deep_copy(model, UNCOPYABLE)
    images = torch.randn(2, 3, 64, 64)
    with torch.no_grad():
        assert torch.equal(copied(images), model(images))
    found = zsu_fast.models.prepare.prepare_model(model, input_shape=(3, 64, 64))
    assert found.classes == 5


def test_methods_that_return_none() -> None:
    class Silent(TinyNet):
        def train(self, mode: bool = True) -> None:
            super().train(mode)

        def eval(self) -> None:
            super().eval()

        def float(self) -> None:
            super().float()

    model = Silent()
    model.load_state_dict(tiny().state_dict())
    model.eval()
    assert same_bits(unlearn(model, FORGET, **QUICK), unlearned_tiny())


def test_weights_made_in_inference_mode() -> None:
    with torch.inference_mode():
        model = TinyNet()
        model.load_state_dict(tiny().state_dict())
        model.eval()
    assert same_bits(unlearn(model, FORGET, **QUICK), unlearned_tiny())
