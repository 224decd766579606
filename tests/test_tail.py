"""Cutting a model: the halves equal the whole, wherever and whatever the model."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from support import TinyNet, tiny, tiny_data, untouched
from torch import Tensor, nn
from torch.nn import functional as F

from zsu_fast import ArgumentError, ModelError, split, zoo
from zsu_fast.classifier import working_copy
from zsu_fast.cut import ReplayTail
from zsu_fast.responsive import layer_names, responsiveness
from zsu_fast.tail import Split, find_split, split_at

CPU = torch.device("cpu")


def cut(model: nn.Module, name: str, images: Tensor) -> Split:
    return split_at(working_copy(model, CPU), name, images, "a test")


def assert_cuts_right(model: nn.Module, name: str, images: Tensor) -> Split:
    """The halves equal the whole: on these images, on one alone, and on others."""
    halves = cut(model, name, images)
    with torch.no_grad():
        for batch in (images, images[:1], torch.rand_like(images)):
            want = model(batch)
            got = halves.tail(*halves.head(batch))
            scale = 1 + float(want.abs().max())
            assert torch.allclose(got, want, rtol=1e-4, atol=1e-5 * scale), name
    return halves


@pytest.mark.parametrize("name", ["lenet5", "karpathynet", "resnet20_cifar"])
def test_every_layer_of_the_zoo(name: str) -> None:
    model = zoo.build(name)
    images = torch.randn(3, *zoo.ZOO[name].spec.shape)
    layers = layer_names(model, images)
    assert len(layers) == {"lenet5": 5, "karpathynet": 4, "resnet20_cifar": 20}[name]
    with untouched(model):
        for layer in layers:
            halves = assert_cuts_right(model, layer, images)
            assert not isinstance(halves.tail, ReplayTail)  # these trace


def test_a_block_with_a_skip_connection_carries_both_values() -> None:
    model = zoo.build("resnet20_cifar")
    images = torch.randn(3, 3, 32, 32)
    halves = assert_cuts_right(model, "layer2.1.conv2", images)
    assert len(halves.head(images)) == 2
    assert assert_cuts_right(model, "layer2.1", images).head(images)[0].shape == (3, 32, 16, 16)


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
            assert_cuts_right(model, layer, images)


def test_modules_of_every_kind_can_be_named() -> None:
    model, images = tiny(), tiny_data(4)[0]
    for name in ("conv", "bn", "fc1", "drop", "fc2"):
        halves = assert_cuts_right(model, name, images)
        assert halves.name == name
        assert halves.reason == "a test"
    assert cut(model, "fc2", images).output_level
    assert not cut(model, "fc1", images).output_level
    assert cut(model, "drop", images).parameters == ["fc2.weight", "fc2.bias"]
    assert cut(model, "bn", images).parameters[:2] == ["bn.weight", "bn.bias"]


# --- models that do not trace, or write in place, or use modules twice -------------------------


class Branching(TinyNet):
    """Control flow on values: torch.fx does not get through."""

    def forward(self, x: Tensor) -> Tensor:
        x = self.act(self.bn(self.conv(x))).flatten(1)
        if float(x.detach().sum()) > -1e9:
            x = self.act(self.fc1(x))
        return self.fc2(self.drop(x))


@pytest.mark.parametrize("name", ["conv", "bn", "fc1", "drop", "fc2"])
def test_control_flow_goes_by_replay(name: str) -> None:
    model, images = Branching().eval(), tiny_data(4)[0]
    model.load_state_dict(tiny().state_dict())
    with untouched(model):
        halves = assert_cuts_right(model, name, images)
    assert isinstance(halves.tail, ReplayTail)
    traced = cut(tiny(), name, images)
    assert halves.parameters == traced.parameters
    calls: list[int] = []
    work = halves.tail.model.model
    work.conv.weight.register_hook(lambda _g: calls.append(1))
    halves.tail(*halves.features(images)).sum().backward()
    assert bool(calls) == (name == "conv")  # the tail does not train what is before it


def test_a_replayed_head_does_not_run_again() -> None:
    model, images = Branching().eval(), tiny_data(4)[0]
    halves = cut(model, "fc2", images)
    features = halves.features(images)
    with torch.no_grad():
        want = halves.tail(*features)
        halves.tail.model.model.conv.weight.fill_(float("nan"))  # would show if it ran
        assert torch.equal(halves.tail(*features), want)


def test_a_replay_leaves_no_patched_forward_behind() -> None:
    class Failing(Branching):
        broken = False

        def forward(self, x: Tensor) -> Tensor:
            y = super().forward(x)
            if self.broken:
                raise RuntimeError("late")
            return y

    images = tiny_data(4)[0]
    halves = cut(Failing().eval(), "fc2", images)
    features = halves.features(images)
    inner = halves.tail.model.model
    inner.broken = True
    with pytest.raises(RuntimeError, match="late"):
        halves.tail(*features)
    assert all("forward" not in m.__dict__ for m in inner.modules())
    inner.broken = False
    assert torch.isfinite(halves.tail(*features)).all()


@pytest.mark.parametrize("traceable", [True, False])
def test_a_module_that_is_called_twice(traceable: bool) -> None:
    class Twice(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.body, self.out = nn.Linear(12, 12), nn.Linear(12, 3)

        def forward(self, x: Tensor) -> Tensor:
            if not traceable and float(x.sum()) == 1e9:
                return x
            x = x.flatten(1)
            return self.out(torch.tanh(self.body(torch.tanh(self.body(x)))))

    model, images = Twice().eval(), torch.randn(4, 3, 2, 2)
    assert_cuts_right(model, "out", images)
    assert cut(model, "body", images).parameters[0] == "body.weight"


def test_a_tail_that_writes_into_its_input_gets_a_copy() -> None:
    class Writing(TinyNet):
        def forward(self, x: Tensor) -> Tensor:
            x = self.drop(self.bn(self.conv(x)).flatten(1))
            x.relu_()  # in eval mode dropout returns its input: this changes what crosses there
            return self.fc2(self.fc1(x).add_(1))

    model, images = Writing().eval(), tiny_data(6)[0]
    for name in ("drop", "fc1", "fc2", "bn"):
        halves = assert_cuts_right(model, name, images)
        features = halves.features(images)
        before = [f.clone() for f in features]
        with torch.no_grad():
            halves.tail(*features)
        assert all(torch.equal(a, b) for a, b in zip(features, before, strict=True))


def test_a_batch_size_taken_from_the_shape_is_not_frozen() -> None:
    class Sized(TinyNet):
        def forward(self, x: Tensor) -> Tensor:
            n = x.size(0)
            x = self.bn(self.conv(x))
            return self.fc2(F.relu(self.fc1(x.view(n, -1))).view(n, -1))

    model, images = Sized().eval(), tiny_data(6)[0]
    for name in ("bn", "fc1", "fc2"):
        assert_cuts_right(model, name, images)


def test_a_parameter_that_both_halves_use_by_function() -> None:
    class Functional(TinyNet):
        def __init__(self) -> None:
            super().__init__()
            self.scale = nn.Parameter(torch.rand(1))

        def forward(self, x: Tensor) -> Tensor:
            x = self.bn(self.conv(x) * self.scale).flatten(1)
            return self.fc2(F.relu(self.fc1(x) * self.scale))

    model, images = Functional().eval(), tiny_data(4)[0]
    assert_cuts_right(model, "conv", images)
    assert_cuts_right(model, "fc2", images)
    with pytest.raises(ArgumentError, match=r"tail: 'fc1' would train scale.*tied"):
        cut(model, "fc1", images)


def test_features_in_batches_equal_those_at_once() -> None:
    images = tiny_data(30)[0]
    halves = cut(tiny(), "fc1", images)
    (whole,), (parts,) = halves.features(images), halves.features(images, batch=7)
    assert torch.allclose(whole, parts, atol=1e-6)
    assert not whole.requires_grad


def test_output_that_depends_on_chance_is_refused() -> None:
    class Random(TinyNet):
        def forward(self, x: Tensor) -> Tensor:
            return super().forward(x + torch.randn_like(x))

    with pytest.raises(ModelError, match=r"cut at 'fc2' it gives other logits.*name another tail="):
        cut(Random().eval(), "fc2", tiny_data(4)[0])


# --- bad names -------------------------------------------------------------------------------


def test_a_name_that_is_no_module() -> None:
    with pytest.raises(ArgumentError, match=r"tail: got 'fc9'.*Pass 'auto' or one of 'conv', 'bn'"):
        cut(tiny(), "fc9", tiny_data(4)[0])


def test_a_module_that_is_never_called() -> None:
    class Idle(Branching):
        def __init__(self) -> None:
            super().__init__()
            self.idle = nn.Linear(3, 3)

    with pytest.raises(ArgumentError, match=r"tail: got 'idle', a module that the forward pass"):
        cut(Idle().eval(), "idle", tiny_data(4)[0])


def test_a_tail_without_parameters() -> None:
    model = nn.Sequential(nn.Flatten(), nn.Linear(12, 3), nn.Softmax(1)).eval()
    images = torch.randn(4, 3, 2, 2)
    with pytest.raises(ArgumentError, match=r"'2' is followed by no layer.*earlier module.*'1'"):
        cut(model, "2", images)


# --- auto, last, tied ------------------------------------------------------------------------


def test_responsiveness_finds_where_classes_part() -> None:
    class Late(nn.Module):
        """Its first layer mixes noise in; only behind the second are the classes apart."""

        def __init__(self) -> None:
            super().__init__()
            self.a, self.b = nn.Linear(4, 4), nn.Linear(4, 4)
            self.c = nn.Linear(4, 2)
            with torch.no_grad():
                self.a.weight.copy_(torch.eye(4))
                self.b.weight.copy_(torch.diag(torch.tensor([5.0, 0, 0, 0])))

        def forward(self, x: Tensor) -> Tensor:
            return self.c(self.b(self.a(x)))

    labels = torch.arange(64) % 2
    images = torch.randn(64, 4)
    images[:, 0] = labels * 2.0 - 1 + 0.1 * images[:, 0]
    model = working_copy(Late(), CPU)
    ratios = dict(responsiveness(model, images, labels))
    assert list(ratios) == ["a", "b", "c"]
    assert ratios["a"] == pytest.approx(ratios["b"], rel=1e-3)
    assert ratios["c"] > 20 * ratios["b"]
    found = find_split(model, "auto", images, labels)
    assert found.name == "c"
    assert "first responsive layer" in found.reason


def test_auto_takes_the_first_of_equally_good_layers() -> None:
    model = nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 4), nn.Linear(4, 2))
    with torch.no_grad():
        for layer in model[:2]:
            layer.weight.copy_(torch.eye(4))
    labels = torch.arange(32) % 2
    images = torch.randn(32, 4) + labels[:, None]
    assert find_split(working_copy(model, CPU), "auto", images, labels).name == "0"


def test_last_takes_the_last_layer_with_weights() -> None:
    images, labels = tiny_data(10)
    found = find_split(working_copy(tiny(), CPU), "last", images, labels)
    assert (found.name, found.output_level) == ("fc2", True)


class Tied(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.first, self.middle, self.final = (nn.Linear(12, 12) for _ in range(3))
        self.final.weight = self.first.weight

    def forward(self, x: Tensor) -> Tensor:
        return self.final(torch.tanh(self.middle(torch.tanh(self.first(x.flatten(1))))))


def test_tied_weights_move_the_cut_ahead_of_their_first_use() -> None:
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
        halves = split(model, at)
        with torch.no_grad():
            for parameter in [*halves.head.parameters(), *halves.tail.parameters()]:
                parameter.zero_()


def test_layers_in_the_order_of_the_forward_pass() -> None:
    class Backwards(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.second, self.first = nn.Linear(4, 3), nn.Linear(4, 4)
            self.norm, self.unused = nn.LayerNorm(4), nn.Linear(2, 2)

        def forward(self, x: Any) -> Any:
            return self.second(self.norm(self.first(x)))

    assert layer_names(Backwards(), torch.randn(2, 4)) == ["first", "second"]
