"""Backbone and tail together equal the model, wherever it is split and whatever it is."""

from __future__ import annotations

import pytest
import torch
from splits import CPU, Branching, assert_splits_right, split_before
from support import TinyNet, tiny, tiny_data, untouched
from torch import Tensor, nn
from torch.nn import functional as F

from zsu_fast import ArgumentError, ModelError, split
from zsu_fast.models import zoo
from zsu_fast.models.wrapper import working_copy
from zsu_fast.splitting.layers import layer_names
from zsu_fast.splitting.replay_split import ReplayTail
from zsu_fast.splitting.split import find_split, split_at


@pytest.mark.parametrize("name", ["lenet5", "karpathynet", "resnet20_cifar"])
def test_every_layer_of_the_zoo(name: str) -> None:
    model = zoo.build(name)
    images = torch.randn(3, *zoo.ZOO[name].spec.shape)
    layers = layer_names(model, images)
    assert len(layers) == {"lenet5": 5, "karpathynet": 4, "resnet20_cifar": 20}[name]
    with untouched(model):
        for layer in layers:
            found = assert_splits_right(model, layer, images)
            assert not isinstance(found.tail, ReplayTail)  # these trace


def test_a_block_with_a_skip_connection_carries_both_values() -> None:
    model = zoo.build("resnet20_cifar")
    images = torch.randn(3, 3, 32, 32)
    found = assert_splits_right(model, "layer2.1.conv2", images)
    assert len(found.backbone(images)) == 2
    found = assert_splits_right(model, "layer2.1", images)
    assert found.backbone(images)[0].shape == (3, 32, 16, 16)


@pytest.mark.parametrize(
    ("build", "size", "every"),
    [("alexnet", 64, 4), ("resnet18", 32, 2), ("mobilenet_v3_small", 32, 7)],
)
def test_layers_of_torchvision_models(build: str, size: int, every: int) -> None:
    models = pytest.importorskip("torchvision.models")
    model = getattr(models, build)(num_classes=10).eval()
    images = torch.randn(2, 3, size, size)
    layers = layer_names(model, images)
    with untouched(model):
        for layer in {*layers[::every], layers[-1]}:
            assert_splits_right(model, layer, images)


def test_modules_of_every_kind_can_be_named() -> None:
    model, images = tiny(), tiny_data(4)[0]
    for name in ("conv", "bn", "fc1", "drop", "fc2"):
        found = assert_splits_right(model, name, images)
        assert found.name == name
        assert found.reason == "a test"
    assert split_before(model, "fc2", images).output_level
    assert not split_before(model, "fc1", images).output_level
    assert split_before(model, "drop", images).parameters == ["fc2.weight", "fc2.bias"]
    assert split_before(model, "bn", images).parameters[:2] == ["bn.weight", "bn.bias"]


# --- models that write in place, or use modules twice -----------------------------------------


@pytest.mark.parametrize("traceable", [True, False])
def test_a_module_that_is_called_twice(traceable: bool) -> None:
    class Twice(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.body, self.out = nn.Linear(12, 12), nn.Linear(12, 3)

        def forward(self, x: Tensor) -> Tensor:
            if not traceable and float(x.detach().sum()) == 1e9:
                return x
            x = x.flatten(1)
            return self.out(torch.tanh(self.body(torch.tanh(self.body(x)))))

    model, images = Twice().eval(), torch.randn(4, 3, 2, 2)
    assert_splits_right(model, "out", images)
    assert split_before(model, "body", images).parameters[0] == "body.weight"


def test_a_tail_that_writes_into_its_input_gets_a_copy() -> None:
    class Writing(TinyNet):
        def forward(self, x: Tensor) -> Tensor:
            x = self.drop(self.bn(self.conv(x)).flatten(1))
            x.relu_()  # in eval mode dropout returns its input: this changes what crosses there
            return self.fc2(self.fc1(x).add_(1))

    model, images = Writing().eval(), tiny_data(6)[0]
    for name in ("drop", "fc1", "fc2", "bn"):
        found = assert_splits_right(model, name, images)
        features = found.features(images)
        before = [f.clone() for f in features]
        with torch.no_grad():
            found.tail(*features)
        assert all(torch.equal(a, b) for a, b in zip(features, before, strict=True))


def test_a_parameter_that_backbone_and_tail_use_by_function() -> None:
    class Functional(TinyNet):
        def __init__(self) -> None:
            super().__init__()
            self.scale = nn.Parameter(torch.rand(1))

        def forward(self, x: Tensor) -> Tensor:
            x = self.bn(self.conv(x) * self.scale).flatten(1)
            return self.fc2(F.relu(self.fc1(x) * self.scale))

    model, images = Functional().eval(), tiny_data(4)[0]
    assert_splits_right(model, "conv", images)
    assert_splits_right(model, "fc2", images)
    with pytest.raises(ArgumentError, match=r"tail: 'fc1' would train scale.*tied"):
        split_before(model, "fc1", images)


def test_features_in_batches_equal_those_at_once() -> None:
    images = tiny_data(30)[0]
    found = split_before(tiny(), "fc1", images)
    (whole,), (parts,) = found.features(images), found.features(images, batch=7)
    assert torch.allclose(whole, parts, atol=1e-6)
    assert not whole.requires_grad


def test_output_that_depends_on_chance_is_refused() -> None:
    class Random(TinyNet):
        def forward(self, x: Tensor) -> Tensor:
            return super().forward(x + torch.randn_like(x))

    with pytest.raises(
        ModelError, match=r"split at 'fc2', it gives other logits.*name another tail="
    ):
        split_before(Random().eval(), "fc2", tiny_data(4)[0])


# --- bad names -------------------------------------------------------------------------------


def test_a_name_that_is_no_module() -> None:
    with pytest.raises(ArgumentError, match=r"tail: got 'fc9'.*Pass 'auto' or one of 'conv', 'bn'"):
        split_before(tiny(), "fc9", tiny_data(4)[0])


def test_a_module_that_is_never_called() -> None:
    class Idle(Branching):
        def __init__(self) -> None:
            super().__init__()
            self.idle = nn.Linear(3, 3)

    with pytest.raises(ArgumentError, match=r"tail: got 'idle', a module that the forward pass"):
        split_before(Idle().eval(), "idle", tiny_data(4)[0])


def test_a_tail_without_parameters() -> None:
    model = nn.Sequential(nn.Flatten(), nn.Linear(12, 3), nn.Softmax(1)).eval()
    images = torch.randn(4, 3, 2, 2)
    with pytest.raises(ArgumentError, match=r"'2' is followed by no layer.*earlier module.*'1'"):
        split_before(model, "2", images)


# --- last, tied ------------------------------------------------------------------------------


def test_last_takes_the_last_layer_with_weights() -> None:
    images, labels = tiny_data(10)
    found = find_split(working_copy(tiny(), CPU), "last", images, labels)
    assert (found.name, found.output_level) == ("fc2", True)


@pytest.mark.parametrize(("depth", "name"), [(1, "fc2"), (2, "fc1"), (3, "conv")])
def test_a_number_takes_that_many_last_layers(depth: int, name: str) -> None:
    images, labels = tiny_data(10)
    found = find_split(working_copy(tiny(), CPU), depth, images, labels)
    assert found.name == name
    assert found.reason == (
        "the last layer with weights" if depth == 1 else f"the last {depth} layers"
    )


@pytest.mark.parametrize("depth", [0, -1, 4, True])
def test_a_number_that_is_no_depth(depth: int) -> None:
    images, labels = tiny_data(10)
    with pytest.raises(ArgumentError, match=r"tail: got .*number of layers from 1 to 3"):
        find_split(working_copy(tiny(), CPU), depth, images, labels)


class Tied(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.first, self.middle, self.final = (nn.Linear(12, 12) for _ in range(3))
        self.final.weight = self.first.weight

    def forward(self, x: Tensor) -> Tensor:
        return self.final(torch.tanh(self.middle(torch.tanh(self.first(x.flatten(1))))))


def test_tied_weights_move_the_split_ahead_of_their_first_use() -> None:
    images, labels = torch.randn(12, 3, 2, 2), torch.arange(12)
    work = working_copy(Tied(), CPU)
    found = find_split(work, "last", images, labels)
    assert found.name == "first"
    assert "moved ahead of 'final'" in found.reason
    assert "moved ahead of 'middle'" in found.reason
    assert found.parameters.count("first.weight") == 1
    with pytest.raises(ArgumentError, match=r"tail: 'middle' would train first\.weight.*tied"):
        split_at(work, "middle", images, "a test")


@pytest.mark.parametrize("at", ["auto", "last", "fc1"])
def test_split_is_a_copy(at: str) -> None:
    model = tiny()
    with untouched(model):
        found = split(model, at)
        with torch.no_grad():
            for parameter in [*found.backbone.parameters(), *found.tail.parameters()]:
                parameter.zero_()
