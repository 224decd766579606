"""Where deep forgetting splits a model: which layers it trains, and where rows are inverted."""

from __future__ import annotations

from itertools import pairwise

import pytest
import torch
from deep_case import CPU, TwoClassifiers, deep_split
from support import SPEC, TinyNet, tiny
from torch import Tensor, nn
from torch.nn import functional as F

from zsu_fast import InputSpec
from zsu_fast.errors import ArgumentError, ModelError
from zsu_fast.models import zoo
from zsu_fast.models.input_spec import noise_images
from zsu_fast.models.wrapper import working_copy
from zsu_fast.synthesis.space import flatten_boundary
from zsu_fast.training.deep.split import DeepSplit, _same_boundary, find_deep_split


def spec_of(*shape: int) -> InputSpec:
    return InputSpec(shape, (0.5,) * shape[0], (0.25,) * shape[0], "the tests")


def linear_layers(*widths: int) -> nn.Module:
    """Layers of those widths, named 1, 3, 5 and so on, on images of ``widths[0]`` pixels."""
    layers: list[nn.Module] = [nn.Flatten()]
    for inputs, outputs in pairwise(widths):
        layers += [nn.Linear(inputs, outputs), nn.ReLU()]
    return nn.Sequential(*layers[:-1])


class Fire(nn.Module):
    """Two branches that take the same tensor, and a 1x1 classifier: SqueezeNet's end."""

    def __init__(self) -> None:
        super().__init__()
        self.squeeze = nn.Conv2d(3, 4, 1)
        self.one, self.three = nn.Conv2d(4, 6, 1), nn.Conv2d(4, 6, 3, padding=1)
        self.last = nn.Conv2d(12, 5, 1)

    def forward(self, x: Tensor) -> Tensor:
        x = self.squeeze(x).relu()
        x = torch.cat([self.one(x).relu(), self.three(x).relu()], 1)
        return self.last(x).mean((2, 3))


class Gated(nn.Module):
    """``one`` and ``two`` are narrow, and each is needed beside the other."""

    def __init__(self) -> None:
        super().__init__()
        self.one, self.two = nn.Linear(192, 4), nn.Linear(192, 4)
        self.left, self.right = nn.Linear(4, 64), nn.Linear(4, 64)
        self.inner, self.last = nn.Linear(64, 16), nn.Linear(16, 5)

    def forward(self, x: Tensor) -> Tensor:
        x = x.flatten(1)
        one, two = self.one(x).relu(), self.two(x).relu()
        return self.last(self.inner(self.left(one) * self.right(two)).relu())


def trained_layers(deep: DeepSplit) -> list[str]:
    return list(dict.fromkeys(name.rpartition(".")[0] for name in deep.parameters))


# --- what is trained -------------------------------------------------------------------------

LAYERS = {
    "lenet5": ["fc1", "fc2"],
    "karpathynet": ["conv3"],
    "resnet20_cifar": [f"layer3.2.{name}" for name in ("conv1", "bn1", "conv2", "bn2")],
    "vit_cifar": [
        *(f"blocks.3.{name}" for name in ("attn.qkv", "attn.proj", "norm2", "mlp.0", "mlp.2")),
        "norm",
    ],
}


@pytest.mark.parametrize("name", LAYERS)
def test_the_layers_ahead_of_the_last_one_are_trained(name: str) -> None:
    _, deep = deep_split(zoo.build(name), spec=zoo.ZOO[name].spec)
    assert trained_layers(deep) == LAYERS[name]
    assert deep.last.name not in LAYERS[name]
    assert deep.last.output_level


def test_branches_that_take_the_same_tensor_are_trained_together() -> None:
    _, deep = deep_split(Fire())  # three in ten of three layers are one: `three`
    assert trained_layers(deep) == ["one", "three"]


@pytest.mark.parametrize(
    ("width", "count"), [(100, 3), (200, 2), (400, 1)], ids=["three", "fewer", "at least one"]
)
def test_at_most_three_layers_with_at_most_100_000_weights(width: int, count: int) -> None:
    model = linear_layers(192, *[width] * 12, 5)
    _, deep = deep_split(model)
    assert trained_layers(deep) == [str(n) for n in range(23, 23 - 2 * count, -2)][::-1]


@pytest.mark.parametrize(("layers", "count"), [(2, 1), (4, 1), (5, 2), (7, 2), (8, 3)])
def test_at_most_three_in_ten_layers(layers: int, count: int) -> None:
    _, deep = deep_split(linear_layers(192, *[8] * (layers - 1), 5))
    assert len(trained_layers(deep)) == count


@pytest.mark.parametrize(
    ("at", "layers"), [("conv2", ["conv2", "conv3"]), (2, ["conv3"]), (3, ["conv2", "conv3"])]
)
def test_a_module_or_a_number_of_layers(at: str | int, layers: list[str]) -> None:
    _, deep = deep_split(zoo.build("karpathynet"), at, zoo.ZOO["karpathynet"].spec)
    assert trained_layers(deep) == layers


@pytest.mark.parametrize(
    ("at", "words"),
    [
        ("fc2", "only the last layer follows it. Name an earlier module, such as 'fc1'"),
        ("nowhere", "nowhere"),
        (1, "only the last layer follows it. Leave tail out, or pass depth='output'"),
        ("last", "only the last layer follows it. Leave tail out"),
        (4, "from 2 to 3"),
    ],
)
def test_refused_tails(at: str | int, words: str) -> None:
    with pytest.raises(ArgumentError, match=words) as caught:
        deep_split(tiny(), at)
    assert caught.value.argument == "tail"


def test_a_single_layer_has_no_features() -> None:
    with pytest.raises(ArgumentError, match="single layer"):
        deep_split(nn.Sequential(nn.Flatten(), nn.Linear(192, 5)))


def test_a_second_way_to_the_logits_is_refused() -> None:
    with pytest.raises(ModelError, match="'fc2' is not the only way"):
        deep_split(TwoClassifiers())


# --- where rows are inverted -----------------------------------------------------------------


@pytest.mark.parametrize(
    ("name", "early", "shape"),
    [
        ("lenet5", "conv1", (1, 28, 28)),
        ("karpathynet", "conv1", (3, 32, 32)),
        ("resnet20_cifar", "layer3.1", (64, 8, 8)),
    ],
)
def test_rows_are_inverted_where_the_boundary_is_one_small_tensor(
    name: str, early: str, shape: tuple[int, ...]
) -> None:
    _, deep = deep_split(zoo.build(name), spec=zoo.ZOO[name].spec)
    assert deep.early.name == early
    assert deep.flat.shapes == [shape]


def test_one_tensor_is_better_than_a_smaller_pair() -> None:
    _, deep = deep_split(Gated())
    assert deep.split.name == "right"  # two of five layers
    assert deep.early.name == "one"  # 192 values, and eight in two tensors ahead of `left`


@pytest.mark.parametrize(("layers", "early"), [(6, "3"), (12, "11")])
def test_rows_are_inverted_at_most_four_layers_earlier(layers: int, early: str) -> None:
    """Each layer is wider than the one before: the earliest boundary is the smallest."""
    widths = [8 + n for n in range(layers)]
    _, deep = deep_split(linear_layers(192, *widths, 5))
    assert deep.early.name == early


def test_without_an_earlier_layer_rows_are_inverted_at_the_split() -> None:
    _, deep = deep_split(tiny(), "conv")
    assert deep.early is deep.split
    assert deep.middle is None
    points = flatten_boundary(deep.early.backbone(noise_images(SPEC, 2)))
    assert torch.equal(deep.features(points)[0].flatten(1), points)


class Transformer(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.inner = zoo.CompactViT(24, 2, 3, 5)

    def forward(self, x: Tensor) -> Tensor:
        return self.inner(F.interpolate(x, 32))


@pytest.mark.parametrize(
    ("model", "at"),
    [(TinyNet, "auto"), (TinyNet, "conv"), (Fire, "auto"), (Gated, "auto"), (Transformer, "auto"),
     (lambda: zoo.build("resnet20_cifar"), "auto"),
     (lambda: zoo.build("resnet20_cifar"), "layer3.2.conv2")],
    ids=["tiny", "first layer", "fire", "gated", "transformer", "resnet", "inside a block"],
)  # fmt: skip
def test_the_three_parts_equal_the_model(model: type[nn.Module], at: str) -> None:
    torch.manual_seed(0)
    work, deep = deep_split(model().eval(), at)
    images = torch.randn(5, *SPEC.shape)
    with torch.no_grad():
        want = work(images)
        points = flatten_boundary(deep.early.backbone(images))
        assert torch.allclose(deep.split.tail(*deep.features(points)), want, atol=1e-4)
        assert torch.allclose(deep.split.tail(*deep.image_features(images)), want, atol=1e-4)
        assert torch.allclose(deep.flat(points), want, atol=1e-4)
        last = work.module.get_submodule(deep.last.name)
        for given in (points, images):
            logits = (
                last(deep.last_features(work, given, given is images))
                .reshape(*want.shape, -1)
                .mean(2)
            )
            assert torch.allclose(logits, want, atol=1e-4)


# --- large images ----------------------------------------------------------------------------


def pooling(size: int, flatten_to: int | None = None) -> nn.Module:
    """Halves its images four times, and pools them to ``size``; or takes one resolution alone."""
    pool = nn.Flatten() if flatten_to else nn.Sequential(nn.AdaptiveAvgPool2d(size), nn.Flatten())
    halving = [nn.Sequential(nn.Conv2d(n, 4, 3, 2, 1), nn.ReLU()) for n in (3, 4, 4, 4)]
    return nn.Sequential(*halving, pool, nn.Linear(4 * (flatten_to or size) ** 2, 5))


@pytest.mark.parametrize(
    ("shape", "model", "drawn"),
    [
        ((3, 192, 192), pooling(1), (3, 128, 128)),
        ((3, 192, 256), pooling(1), (3, 128, 160)),
        ((3, 160, 160), pooling(1), (3, 160, 160)),  # not large
        ((3, 192, 192), pooling(8), (3, 128, 128)),
        ((3, 192, 192), pooling(9), (3, 192, 192)),  # would enlarge the maps of 8 pixels
        ((3, 192, 192), pooling(1, 12), (3, 192, 192)),  # does not run on smaller images
    ],
    ids=["reduced", "oblong", "small", "pooled", "enlarged", "one resolution"],
)
def test_large_images_are_drawn_at_128_pixels(
    shape: tuple[int, ...], model: nn.Module, drawn: tuple[int, ...]
) -> None:
    assert deep_split(model, spec=spec_of(*shape))[1].shape == drawn


def test_full_size_images_are_reduced_for_features_and_whole_for_the_last_layer() -> None:
    model = working_copy(pooling(1).eval(), CPU)
    deep = find_deep_split(model, "auto", spec_of(3, 192, 192))
    images = torch.rand(3, 3, 192, 192)
    small = F.interpolate(images, (128, 128), mode="bilinear", antialias=True)
    with torch.no_grad():
        logits = deep.split.tail(*deep.image_features(images))
        assert torch.allclose(logits, model(small), atol=1e-5)
        last = model.module.get_submodule(deep.last.name)
        assert torch.allclose(
            last(deep.last_features(model, images, True)), model(images), atol=1e-5
        )


def test_an_infinite_value_does_not_make_boundaries_the_same() -> None:
    a = torch.tensor([[-torch.inf, 1.0]])
    assert _same_boundary((a,), (a.clone(),))
    assert not _same_boundary((a,), (a + 1,))
