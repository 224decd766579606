"""Cutting a model: the halves equal the whole, wherever and whatever the model."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from support import TinyNet, tiny, tiny_data, untouched
from torch import Tensor, nn
from torch.nn import functional as F

from zsu_fast import ArgumentError, ModelError, split
from zsu_fast.models import zoo
from zsu_fast.models.wrapper import working_copy
from zsu_fast.splitting.layers import layer_names
from zsu_fast.splitting.replay_split import ReplayTail
from zsu_fast.splitting.separability import fisher_ratios
from zsu_fast.splitting.split import Split, find_split, split_at

CPU = torch.device("cpu")


def cut(model: nn.Module, name: str, images: Tensor) -> Split:
    return split_at(working_copy(model, CPU), name, images, "a test")


def assert_cuts_right(model: nn.Module, name: str, images: Tensor) -> Split:
    """The halves equal the whole: on these images, on one alone, and on others."""
    halves = cut(model, name, images)
    with torch.no_grad():
        for batch in (images, images[:1], torch.rand_like(images)):
            want = model(batch)
            got = halves.tail(*halves.backbone(batch))
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
    assert len(halves.backbone(images)) == 2
    assert assert_cuts_right(model, "layer2.1", images).backbone(images)[0].shape == (3, 32, 16, 16)


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
        halves.tail.model.module.conv.weight.fill_(float("nan"))  # would show if it ran
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


# --- what crosses ----------------------------------------------------------------------------


class SequenceFirst(nn.Module):
    """Tokens [T, N, C], as in nn.TransformerEncoder by default, and a class token."""

    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Conv2d(3, 8, 2, 2)
        self.token = nn.Parameter(torch.randn(1, 1, 8))
        self.a, self.b, self.out = nn.Linear(8, 8), nn.Linear(8, 8), nn.Linear(8, 3)

    def forward(self, x: Tensor) -> Tensor:
        x = self.embed(x).flatten(2).permute(2, 0, 1)
        x = torch.cat([self.token.expand(1, x.shape[1], 8), x])
        x = x + torch.tanh(self.a(x))
        x = x + torch.tanh(self.b(x))
        return self.out(x[0])


class Windows(nn.Module):
    """Rows of one image are N * windows, and a bias is made of parameters before the cut."""

    def __init__(self) -> None:
        super().__init__()
        self.embed, self.bias = nn.Conv2d(3, 8, 2, 2), nn.Linear(4, 8)
        self.register_buffer("places", torch.rand(4, 4))
        self.a, self.out = nn.Linear(8, 8), nn.Linear(8, 3)

    def forward(self, x: Tensor) -> Tensor:
        n = x.shape[0]
        bias = self.bias(self.places)
        x = self.embed(x).unflatten(2, (2, -1)).unflatten(4, (2, -1))  # N C 2 h 2 w
        x = x.permute(0, 2, 4, 3, 5, 1).reshape(4 * n, -1, 8)
        x = torch.tanh(self.a(x + bias)).view(n, -1, 8)
        return self.out(x.mean(1))


class Strict(nn.Module):
    """Any model, with control flow on values around it, so that it does not trace."""

    def __init__(self, inner: nn.Module) -> None:
        super().__init__()
        self.inner = inner

    def forward(self, x: Tensor) -> Tensor:
        if x.shape[2] > 1000:
            raise ValueError("too large")
        return self.inner(x)


@pytest.mark.parametrize("traceable", [True, False])
@pytest.mark.parametrize("kind", [SequenceFirst, Windows])
def test_rows_that_are_not_first_are_brought_there(kind: Any, traceable: bool) -> None:
    model, images = kind().eval(), torch.rand(3, 3, 8, 8)
    prefix = "" if traceable else "inner."
    model = model if traceable else Strict(model)
    for name in ("a", "out"):
        halves = assert_cuts_right(model, prefix + name, images)
        assert isinstance(halves.tail, ReplayTail) == (not traceable)
        crossing = halves.backbone(images)
        assert all(len(f) == 3 for f in crossing)
        order = torch.tensor([2, 0, 1])
        for one, other in zip(halves.backbone(images[order]), crossing, strict=True):
            assert torch.allclose(one, other[order], atol=1e-6)
    assert cut(model, prefix + "out", images).parameters == [
        f"{prefix}out.{n}" for n in ("weight", "bias")
    ]  # no token, though a replay runs the code that uses it anew
    assert not any("bias." in p for p in cut(model, prefix + "a", images).parameters)


def test_a_replay_keeps_what_the_tail_reads_and_no_more() -> None:
    transformers = pytest.importorskip("transformers", reason="transformers is not installed")
    config = transformers.ViTConfig(
        hidden_size=24, num_hidden_layers=4, num_attention_heads=2, intermediate_size=48,
        image_size=64, num_labels=3,
    )  # fmt: skip
    model, images = transformers.ViTForImageClassification(config).eval(), torch.rand(3, 3, 64, 64)
    hidden = 17 * 24 * 4  # bytes of an image's hidden state: 16 patches and the class token

    def crossing(name: str) -> tuple[Split, float]:
        halves = split_at(working_copy(model, CPU), name, images, "a test")
        return halves, sum(f.nbytes for f in halves.backbone(images)) / len(images) / hidden

    last_block, states = crossing("vit.layers.3")
    assert isinstance(last_block.tail, ReplayTail)
    assert states == 1
    assert crossing("vit.layers.3.mlp.fc1")[1] == 3  # its input and two terms of the skip
    assert crossing("vit.layernorm")[1] == 1
    assert crossing("classifier")[1] == pytest.approx(1 / 17)
    with torch.no_grad():
        want = model(images).logits
        features = last_block.features(images)
        assert torch.allclose(last_block.tail(*features), want, atol=1e-5)


def test_a_replay_keeps_all_where_python_looks_at_values() -> None:
    class Gated(Branching):
        def forward(self, x: Tensor) -> Tensor:
            x = self.act(self.bn(self.conv(x))).flatten(1)
            y = self.act(self.fc1(x))
            return self.fc2(y if bool(x.max() < 50) else -y)  # x is no input of what follows

    model, images = Gated().eval(), tiny_data(4)[0]
    halves = cut(model, "fc2", images)
    assert len(halves.backbone(images)) > 1
    for batch in (images, -images, 100 * images):
        with torch.no_grad():
            assert torch.allclose(halves.tail(*halves.backbone(batch)), model(batch), atol=1e-5)


def test_heads_run_in_chunks_that_fit(monkeypatch: pytest.MonkeyPatch) -> None:
    images = tiny_data(30)[0]
    halves = cut(tiny(), "fc1", images)
    (whole,) = halves.features(images, batch=30)
    seen: list[int] = []
    halves.backbone.register_forward_pre_hook(lambda _m, args: seen.append(len(args[0])))
    map_bytes = 8 * 3 * 3 * 4  # of the convolution's output, an image; the image itself: 768
    assert map_bytes < 768
    monkeypatch.setattr("zsu_fast.splitting.layers._CHUNK_BYTES", 10 * 768)
    (parts,) = halves.features(images)
    assert seen == [1, 10, 10, 9]
    assert torch.allclose(whole, parts, atol=1e-6)


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
    ratios = dict(fisher_ratios(model, images, labels))
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


@pytest.mark.parametrize(("depth", "name"), [(1, "fc2"), (2, "fc1"), (3, "conv")])
def test_a_number_takes_so_many_layers(depth: int, name: str) -> None:
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


class Tokens(nn.Module):
    """Classes are told apart by the first token alone, or by the mean of the others."""

    def __init__(self, first: bool, sequence_first: bool) -> None:
        super().__init__()
        self.a, self.b = nn.Linear(4, 4), nn.Linear(4, 2)
        self.first, self.sequence_first = first, sequence_first
        with torch.no_grad():
            self.a.weight.copy_(torch.eye(4))

    def forward(self, x: Tensor) -> Tensor:  # [N, 8, 4]
        x = self.a(x.transpose(0, 1)).transpose(0, 1) if self.sequence_first else self.a(x)
        return self.b(x[:, 0] if self.first else x.mean(1))


@pytest.mark.parametrize("sequence_first", [False, True])
@pytest.mark.parametrize("first", [False, True])
def test_responsiveness_of_tokens(first: bool, sequence_first: bool) -> None:
    labels = torch.arange(60) % 2
    images = torch.randn(60, 8, 4)
    signal = (labels * 2.0 - 1)[:, None]
    if first:
        images[:, 0] = signal + 0.1 * images[:, 0]
        images[:, 1:] *= 10  # the mean is noise
    else:
        images = signal[:, None] + 3 * images - 2.9 * images.mean(1, keepdim=True)
    model = working_copy(Tokens(first, sequence_first), CPU)
    ratios = dict(fisher_ratios(model, images, labels))
    assert ratios["a"] == pytest.approx(ratios["b"], rel=0.01)
    assert ratios["a"] > 5


def test_responsiveness_of_maps_with_channels_last() -> None:
    class Swapped(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.conv, self.mlp, self.out = nn.Conv2d(8, 8, 1), nn.Linear(8, 8), nn.Linear(8, 2)
            with torch.no_grad():
                self.conv.weight.copy_(torch.eye(8).view(8, 8, 1, 1))
                self.conv.bias.zero_()

        def forward(self, x: Tensor) -> Tensor:
            return self.out(self.mlp(self.conv(x).permute(0, 2, 3, 1)).mean((1, 2)))

    labels = torch.arange(40) % 2
    images = torch.randn(40, 8, 16, 16)
    images[:, 3] += labels.view(-1, 1, 1)  # one channel, everywhere
    ratios = dict(fisher_ratios(working_copy(Swapped(), CPU), images, labels))
    assert ratios["mlp"] == pytest.approx(ratios["conv"], rel=1e-3)


def test_responsiveness_of_many_impressions_takes_a_sample(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("zsu_fast.splitting.separability.MOST_IMAGES", 40)
    seen: list[int] = []
    model = working_copy(tiny(), CPU)
    images = torch.rand(160, 3, 8, 8)
    model.register_forward_pre_hook(lambda _m, args: seen.append(len(args[0])))
    fisher_ratios(model, images, torch.arange(160) // 4)
    assert sum(seen) == 40  # beside the two of `layer_names`, which go to the inner model


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
            for parameter in [*halves.backbone.parameters(), *halves.tail.parameters()]:
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
