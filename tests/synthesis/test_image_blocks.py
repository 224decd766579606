"""Small models whose convolutions compute blocks of images."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace

import pytest
import torch
from support import SPEC
from torch import Tensor, nn
from torch.nn import functional as F

import zsu_fast
from zsu_fast.models import zoo
from zsu_fast.models.input_spec import noise_images
from zsu_fast.models.wrapper import working_copy
from zsu_fast.ops import library
from zsu_fast.runtime import memory
from zsu_fast.synthesis import image_blocks, inference_copy as inference_copy_module
from zsu_fast.synthesis.ascent_settings import BatchLimits
from zsu_fast.synthesis.image_blocks import BlockedConv, BlockedPool, FromBlocks, block_images
from zsu_fast.synthesis.inference_copy import inference_copy
from zsu_fast.synthesis.space import input_space
from zsu_fast.synthesis.synthesize import batch_rows, synthesize

pytestmark = pytest.mark.skipif(not library.CPU.loaded, reason=str(library.CPU.reason))
CPU = torch.device("cpu")


def gradients(model: Callable[[Tensor], Tensor], images: Tensor) -> tuple[Tensor, Tensor]:
    """Logits, and the gradient of a mix of them."""
    x = images.clone().requires_grad_(True)
    logits = model(x)
    mix = torch.randn(logits.shape, generator=torch.Generator().manual_seed(0))
    (gradient,) = torch.autograd.grad((logits * mix.to(logits.dtype)).sum(), x)
    return logits.detach(), gradient


def assert_same(model: nn.Module, blocked: Callable[[Tensor], Tensor], images: Tensor) -> None:
    """In float64, but for a relu or pool that rounding switches."""
    want, gradient = gradients(model.double(), images.double())
    model.float()
    got, found = gradients(blocked, images)
    torch.testing.assert_close(got.double(), want, rtol=1e-4, atol=1e-5)
    assert float((found - gradient).norm()) <= 1e-4 * float(gradient.norm())


class Branches(nn.Module):
    """Residual sums, a layer in between that takes images, and convolutions after it."""

    def __init__(self) -> None:
        super().__init__()
        self.one, self.two = nn.Conv2d(3, 8, 3, padding=1), nn.Conv2d(8, 8, (3, 1), padding=(1, 0))
        self.three, self.norm = nn.Conv2d(8, 5, 2), nn.GroupNorm(2, 8)
        self.pool, self.fc = nn.MaxPool2d(2), nn.Linear(5, 4)

    def forward(self, x: Tensor) -> Tensor:
        x = torch.tanh(self.one(x))
        x = self.norm(x + self.two(x))
        x = F.relu(self.three(self.pool(x)))
        return self.fc(x.mean((2, 3)) + x.amax((2, 3)))


def branches() -> nn.Module:
    torch.manual_seed(0)
    return Branches().eval().requires_grad_(False)


def block(model: nn.Module, images: Tensor) -> nn.Module:
    found = block_images(model, images, 32)
    assert found is not None
    return found


@pytest.mark.parametrize("count", [1, 16, 19])
def test_logits_and_gradient_are_the_models(count: int) -> None:
    model, images = branches(), torch.randn(count, 3, 12, 10)
    blocked = block(model, images)
    assert sum(isinstance(m, BlockedConv) for m in blocked.modules()) == 3
    assert_same(model, blocked, images)
    assert isinstance(model.one, nn.Conv2d)  # it is a copy


@pytest.mark.parametrize("name", ["lenet5", "karpathynet"])
def test_the_zoos_small_models_run_in_blocks(name: str) -> None:
    model = zoo.load(name)
    images = noise_images(model.input_spec, 21)
    fast = inference_copy(working_copy(model, CPU), images[:2], "float32")
    assert (fast.block, fast.channels_last, fast.dtype) == (16, False, torch.float32)
    layers = list(fast.module.modules())
    assert not any(type(m) is nn.Conv2d for m in layers)
    assert sum(isinstance(m, BlockedPool) for m in layers) == (2 if name == "lenet5" else 3)
    graph = next(m for m in layers if isinstance(m, torch.fx.GraphModule)).graph
    assert sum(n.target == "from_blocks" for n in graph.nodes) == 1  # ahead of the first linear one
    assert_same(model, fast, images)


@pytest.mark.parametrize(
    "conv",
    [
        nn.Conv2d(3, 33, 3),
        nn.Conv2d(3, 8, 3, stride=2),
        nn.Conv2d(3, 8, 3, dilation=2),
        nn.Conv2d(3, 3, 3, groups=3),
        nn.Conv2d(3, 8, 3, padding="same"),
        nn.Conv2d(3, 8, 3, padding=3),
        nn.Conv2d(3, 8, 3, padding=1, padding_mode="reflect"),
        nn.Conv2d(3, 8, 3).double(),
    ],
    ids=str,
)
def test_a_model_with_another_convolution_stays_as_it_is(conv: nn.Conv2d) -> None:
    model = nn.Sequential(nn.Conv2d(3, 3, 1), nn.ReLU(), conv)
    assert block_images(model, torch.randn(2, 3, 12, 12), 32) is None


def test_large_images_and_others_stay_as_they_are() -> None:
    model = nn.Sequential(nn.Conv2d(3, 8, 3))
    assert block_images(model, torch.randn(2, 3, 64, 64), 32) is not None
    assert block_images(model, torch.randn(2, 3, 64, 65), 32) is None
    assert block_images(model, torch.randn(3, 12, 12), 32) is None
    assert block_images(model, torch.randn(2, 3, 12, 12), 7) is None
    assert block_images(nn.Sequential(nn.Linear(3, 2)), torch.randn(2, 3, 12, 12), 32) is None


class Untraceable(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv2d(3, 8, 3)

    def forward(self, x: Tensor) -> Tensor:
        return self.conv(x) if len(x) else x


class Named(Untraceable):
    def forward(self, x: Tensor) -> Tensor:
        return self.conv(input=x).flatten(1)


class Twice(nn.Module):
    """One convolution and one activation, in place, that run twice; a size; a sum in place."""

    def __init__(self) -> None:
        super().__init__()
        self.conv, self.act = nn.Conv2d(3, 3, 3, padding=1), nn.ReLU(inplace=True)
        self.fc = nn.Linear(3, 4)

    def forward(self, x: Tensor) -> Tensor:
        first = self.conv(x)
        y = self.conv(self.act(first)) + first
        y *= y.shape[2] / 10
        return self.fc(self.act(y).mean((2, 3)))


def test_a_model_that_cant_be_traced_stays_as_it_is() -> None:
    for model in (Untraceable(), Named()):
        assert block_images(model, torch.randn(2, 3, 12, 12), 32) is None
    fast = inference_copy(working_copy(Named().eval(), CPU), torch.randn(2, 3, 12, 12), "float32")
    assert fast.block == 1


class InPlace(Twice):
    """Changes a map that is used afterwards, by ops that blocks don't have."""

    def forward(self, x: Tensor) -> Tensor:
        y = self.conv(x)
        y.add_(1)
        return self.fc((F.relu_(y) + y).mean((2, 3)))


def test_maps_that_are_changed_in_place_are_not_kept_in_blocks() -> None:
    """Whatever the number of blocks: the copy is compared with the model on two images alone."""
    torch.manual_seed(0)
    model, images = InPlace().eval().requires_grad_(False), torch.randn(19, 3, 9, 8)
    fast = inference_copy(working_copy(model, CPU), images[:2], "float32")
    assert fast.block == 1
    assert_same(model, fast, images)


def test_layers_that_run_twice_and_in_place() -> None:
    torch.manual_seed(0)
    model, images = Twice().eval().requires_grad_(False), torch.randn(5, 3, 9, 8)
    assert_same(model, block(model, images), images)


def test_blocks_take_the_place_of_bfloat16_unless_it_is_asked_for(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(inference_copy_module, "has_bfloat16", lambda _device: True)
    model = zoo.load("karpathynet")
    work, images = working_copy(model, CPU), noise_images(model.input_spec, 2)
    fast, asked = (inference_copy(work, images, p) for p in ("auto", "bfloat16"))
    assert (fast.block, fast.dtype) == (16, torch.float32)
    assert (asked.block, asked.dtype) == (1, torch.bfloat16)


def test_a_copy_that_computes_something_else_is_dropped(monkeypatch: pytest.MonkeyPatch) -> None:
    right = image_blocks.blocked_weight
    monkeypatch.setattr(image_blocks, "blocked_weight", lambda weight: 1.1 * right(weight))
    model = zoo.load("lenet5")
    fast = inference_copy(working_copy(model, CPU), noise_images(model.input_spec, 2), "float32")
    assert fast.block == 1


def test_memory_and_batch_are_those_of_full_blocks() -> None:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Conv2d(3, 8, 3), nn.ReLU(), nn.Flatten(), nn.Linear(288, 5)).eval()
    space = input_space(working_copy(model, CPU), SPEC, "float32")
    one = memory.bytes_per_row(space.fast_model, space.one_point())
    assert one / 16 < space.bytes_per_row() < one / 4  # relu keeps its output in blocks
    limits = BatchLimits()
    assert batch_rows(space, limits)[1] == 16 * limits.blocks
    small = replace(limits, cache_bytes=50 * space.bytes_per_row())
    assert batch_rows(space, small)[1] == 48
    assert batch_rows(space, replace(limits, cache_bytes=1))[1] == 16


def test_the_impressions_of_an_image_do_not_depend_on_its_block(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Up to rounding; as without blocks."""
    model = zoo.load("lenet5")
    options = {"per_class": 3, "max_steps": 5, "progress": False, "precision": "float32"}
    together = synthesize(model, [1, 2, 3], **options)
    alone = synthesize(model, [2], **options)
    torch.testing.assert_close(together.images[3:6], alone.images, rtol=1e-3, atol=1e-3)
    monkeypatch.setattr(inference_copy_module, "_FEW_CHANNELS", 0)
    torch.testing.assert_close(
        synthesize(model, [1, 2, 3], **options).images, together.images, rtol=1e-2, atol=1e-2
    )


def test_an_unlearned_lenet_has_plain_layers() -> None:
    model = zoo.load("lenet5")
    made = zsu_fast.unlearn(model, [1], depth="output", space="input", max_steps=2, progress=False,
                            impressions_per_class=2)  # fmt: skip
    assert not any(isinstance(m, BlockedConv | FromBlocks) for m in made.modules())
    assert [type(m) for m in made.modules()] == [type(m) for m in model.modules()]
