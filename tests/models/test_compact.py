"""Compact models: no rows for removed classes, the same logits for the others, or a refusal."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from support import FORGET, SPEC, TinyNet, same_bits, tiny, tiny_data, unlearned_tiny, untouched
from torch import Tensor, nn
from torch.nn import functional as F
from torch.nn.utils import parametrizations

from zsu_fast import ArgumentError, CheckpointError, compact
from zsu_fast.errors import ModelError
from zsu_fast.models import checkpoint, zoo
from zsu_fast.models.compact import Compaction, cut
from zsu_fast.models.compact_file import compact_metadata, file_compaction, fit_to_file
from zsu_fast.models.loading import load_model

KEPT = [0, 2, 4]
SHAPE = {"input_shape": SPEC.shape}


class Headed(TinyNet):
    """TinyNet's layers as a backbone, with 32 features, and a head of five classes.

    Args:
        make: gives the head's tensors and modules to the model.
        head: the model, features [N, 32] -> what forward returns.
    """

    def __init__(
        self, make: Callable[[nn.Module], None], head: Callable[[Any, Tensor], Any]
    ) -> None:
        super().__init__(32)
        self.head, self.num_classes = [head], 5
        make(self)
        self.eval()

    def forward(self, x: Tensor) -> Any:
        return self.head[0](self, super().forward(x))


def _linear(*names: str, bias: bool = True) -> Callable[[nn.Module], None]:
    def make(model: nn.Module) -> None:
        for name in names:
            model.add_module(name, nn.Linear(32, 5, bias))

    return make


def _tensors(**shapes: tuple[int, ...]) -> Callable[[nn.Module], None]:
    def make(model: nn.Module) -> None:
        for name, shape in shapes.items():
            model.register_parameter(name, nn.Parameter(torch.randn(shape)))

    return make


def _text(model: nn.Module) -> None:
    model.register_buffer("text", torch.randn(5, 32))


def _normalised(model: nn.Module) -> None:
    _linear("a", bias=False)(model)
    model.add_module("norm", nn.BatchNorm1d(5))


def _weight_norm(model: nn.Module) -> None:
    model.add_module("a", parametrizations.weight_norm(nn.Linear(32, 5)))


def _tied(model: nn.Module) -> None:
    _linear("a", "b")(model)
    model.b.weight = model.a.weight


HEADS: dict[str, tuple[Callable[[nn.Module], None], Callable[[Any, Tensor], Any]]] = {
    "cosine": (
        _tensors(w=(5, 32), scale=()),
        lambda m, f: m.scale * F.linear(F.normalize(f), F.normalize(m.w)),
    ),
    "columns": (_tensors(w=(32, 5)), lambda m, f: f @ m.w),
    "text embeddings": (_text, lambda m, f: f @ m.text.T),
    "normalised logits": (_normalised, lambda m, f: m.norm(m.a(f))),
    "weight norm": (_weight_norm, lambda m, f: m.a(f)),
    "two heads": (_linear("a", "b"), lambda m, f: (m.a(f) + m.b(f)) / 2),
    "tied heads": (_tied, lambda m, f: m.a(f) + m.b(f)),
    "an auxiliary head": (
        _linear("a", "b"), lambda m, f: (m.a(f), m.b(f)) if m.training else m.a(f)
    ),
    "a reshape by num_classes": (_linear("a"), lambda m, f: m.a(f).view(-1, m.num_classes)),
    "features too": (_linear("a"), lambda m, f: {"logits": m.a(f), "features": f}),
}  # fmt: skip


def logits(model: nn.Module, images: Tensor) -> Tensor:
    with torch.no_grad():
        output = model(images)
    return output["logits"] if isinstance(output, dict) else output


def test_only_the_rows_of_removed_classes_go() -> None:
    model, images = unlearned_tiny(), tiny_data(64)[0]
    with untouched(model):
        small = compact(model, FORGET)
    assert type(small) is TinyNet
    assert (small.fc2.out_features, small.fc2.weight.shape) == (3, (3, 32))
    assert torch.equal(small.fc2.weight, model.fc2.weight[KEPT])
    assert torch.equal(small.fc2.bias, model.fc2.bias[KEPT])
    # not bit for bit: a product with fewer columns may add up in another order
    torch.testing.assert_close(small(images), model(images)[:, KEPT], atol=1e-5, rtol=1e-5)
    assert small.fc2.weight.untyped_storage().nbytes() == 3 * 32 * 4, "the rows are still in memory"


@pytest.mark.parametrize("kind", HEADS)
def test_kinds_of_heads(kind: str) -> None:
    model, images = Headed(*HEADS[kind]), tiny_data(16)[0]
    with untouched(model):
        small = compact(model, FORGET, **SHAPE)
    assert small.num_classes == 3
    expected = logits(model, images)[:, KEPT]
    torch.testing.assert_close(logits(small, images), expected, atol=1e-5, rtol=1e-5)
    held = {n: t.shape for n, t in small.state_dict().items() if n.partition(".")[0] not in
            ("conv", "bn", "fc1", "fc2")}  # fmt: skip
    assert not [n for n, shape in held.items() if 5 in shape], held
    if kind == "tied heads":
        assert small.a.weight is small.b.weight


@pytest.mark.parametrize("squash", [F.log_softmax, F.softmax])
def test_probabilities_sum_to_one_over_the_retained_classes(squash: Any) -> None:
    model, images = Headed(_linear("a"), lambda m, f: squash(m.a(f), 1)), tiny_data(16)[0]
    small = compact(model, FORGET, **SHAPE)
    expected = squash(model.a(TinyNet.forward.__get__(model)(images))[:, KEPT], 1)
    torch.testing.assert_close(logits(small, images), expected.detach())


def test_a_hidden_layer_of_the_same_width_stays() -> None:
    def make(model: nn.Module) -> None:
        model.add_module("hidden", nn.Linear(32, 5))
        model.add_module("a", nn.Linear(5, 5))

    model, images = Headed(make, lambda m, f: m.a(m.hidden(f).relu())), tiny_data(16)[0]
    small = compact(model, FORGET, **SHAPE)
    assert (small.hidden.weight.shape, small.a.weight.shape) == ((5, 32), (3, 5))
    torch.testing.assert_close(logits(small, images), logits(model, images)[:, KEPT])


def _plain(model: nn.Module) -> None:
    model.text = torch.randn(5, 32)


def _orthogonal(model: nn.Module) -> None:
    model.add_module("a", parametrizations.orthogonal(nn.Linear(32, 5)))


@pytest.mark.parametrize(
    ("make", "head", "words"),
    [
        (_linear("a"), lambda m, f: m.a(f) - m.a(f).mean(1, keepdim=True), "other classes depend"),
        (_linear("a"), lambda m, f: F.normalize(m.a(f)), "unit vector"),
        (_plain, lambda m, f: f @ m.text.T, "none of its tensors"),
        (_orthogonal, lambda m, f: m.a(f), "parametrization"),
        (_linear("a"), lambda m, f: m.a(f).view(-1, 5), "does not run"),
        (_linear("a", "unused"), lambda m, f: m.a(f), r"unused\.weight, unused\.bias.*Remove"),
    ],
)
def test_what_is_not_one_row_per_class_is_refused(make: Any, head: Any, words: str) -> None:
    model = Headed(make, head)
    with untouched(model), pytest.raises(ModelError, match=words):
        compact(model, FORGET, **SHAPE)
    assert model.num_classes == 5


def test_a_single_class_is_not_left_alone() -> None:
    with pytest.raises(ModelError, match="single logit, number 2"):
        compact(tiny(), [0, 1, 3, 4])
    with pytest.raises(ArgumentError, match="every class"):
        compact(tiny(), range(5))


# --- the libraries' models -------------------------------------------------------------------


def test_transformers() -> None:
    transformers = pytest.importorskip("transformers")
    names = ["cat", "dog", "cow", "hen", "fox"]
    config = transformers.ResNetConfig(
        embedding_size=8, hidden_sizes=[8, 8], depths=[1, 1], num_channels=3,
        id2label=dict(enumerate(names)), label2id={n: i for i, n in enumerate(names)},
    )  # fmt: skip
    model = transformers.ResNetForImageClassification(config).eval()
    small = compact(model, FORGET, input_shape=(3, 32, 32))
    assert (small.num_labels, small.config.num_labels) == (3, 3)
    assert small.config.id2label == {0: "cat", 1: "cow", 2: "fox"}
    assert small.config.label2id == {"cat": 0, "cow": 1, "fox": 2}
    assert len(model.config.id2label) == 5
    images = torch.randn(2, 3, 32, 32)
    torch.testing.assert_close(
        small(images).logits, model(images).logits[:, KEPT], atol=1e-5, rtol=1e-5
    )
    labels = torch.tensor([2, 0])
    assert small(images, labels=labels).loss.isfinite()


@pytest.mark.parametrize(
    ("name", "options"),
    [
        ("resnet10t", {}),
        ("deit_tiny_distilled_patch16_224", {"img_size": 32}),
        ("mobilenetv3_small_050", {}),
    ],
)
def test_timm(name: str, options: dict[str, Any]) -> None:
    timm = pytest.importorskip("timm")
    model = timm.create_model(name, num_classes=5, **options).eval()
    names = ("cat", "dog", "cow", "hen", "fox")
    model.pretrained_cfg |= {
        "num_classes": 5, "label_names": names, "label_offset": 1,
        "label_descriptions": {n: n.upper() for n in names},
    }  # fmt: skip
    small = compact(model, FORGET, input_shape=(3, 32, 32))
    assert small.num_classes == 3
    assert small.default_cfg is small.pretrained_cfg
    assert small.pretrained_cfg["num_classes"] == 3
    assert small.pretrained_cfg["label_names"] == ("cat", "cow", "fox")
    assert sorted(small.pretrained_cfg["label_descriptions"]) == ["cat", "cow", "fox"]
    assert "label_offset" not in small.pretrained_cfg
    assert (model.num_classes, model.pretrained_cfg["num_classes"]) == (5, 5)
    fresh = timm.create_model(name, num_classes=3, **options)
    fresh.load_state_dict(small.state_dict())
    images = torch.randn(2, 3, 32, 32)
    torch.testing.assert_close(small(images), model(images)[:, KEPT], atol=1e-5, rtol=1e-5)


def test_torchvision_with_a_convolution_as_classifier() -> None:
    models = pytest.importorskip("torchvision.models")
    model = models.squeezenet1_1(num_classes=5).eval()
    small = compact(model, FORGET, input_shape=(3, 64, 64), class_names=list("abcde"))
    assert (small.num_classes, small.classifier[1].out_channels) == (3, 3)
    assert small.class_names == ("a", "c", "e")
    with pytest.raises(ArgumentError, match="got 4 names for 5 classes"):
        compact(model, FORGET, input_shape=(3, 64, 64), class_names=list("abcd"))
    models.squeezenet1_1(num_classes=3).load_state_dict(small.state_dict())
    images = torch.randn(2, 3, 64, 64)
    torch.testing.assert_close(small(images), model(images)[:, KEPT], atol=1e-5, rtol=1e-5)


def test_torchvision_auxiliary_heads_are_cut_too() -> None:
    models = pytest.importorskip("torchvision.models")
    model = models.googlenet(num_classes=5, init_weights=False).eval()
    small = compact(model, FORGET, input_shape=(3, 64, 64))
    fresh = models.googlenet(num_classes=3, init_weights=False)
    fresh.load_state_dict(small.state_dict())
    assert small.aux1.fc2.out_features == 3


# --- files -----------------------------------------------------------------------------------


def lenet_file(path: Path, removed: tuple[int, ...] = (3, 5)) -> nn.Module:
    """Writes a compact LeNet5 to ``path``, as the command does; returns it."""
    kept = tuple(c for c in range(10) if c not in removed)
    compaction = Compaction(10, kept, {"fc3.weight": 0, "fc3.bias": 0})
    model = zoo.load("lenet5")
    cut(model, compaction)
    checkpoint.save_weights(path, model, compact_metadata(compaction))
    return model


def test_a_compact_file_loads_into_the_architecture_with_all_classes(tmp_path: Path) -> None:
    path = tmp_path / "w.safetensors"
    small = lenet_file(path)
    again = load_model("lenet5", str(path))
    assert again.fc3.out_features == 8
    assert same_bits(again, small)
    assert file_compaction(path).new_index == {
        old: new for new, old in enumerate([0, 1, 2, 4, 6, 7, 8, 9])
    }


def test_a_compact_file_loads_into_a_model_built_with_as_many_classes(tmp_path: Path) -> None:
    models = pytest.importorskip("torchvision.models")
    model = models.squeezenet1_1(num_classes=5).eval()
    small = compact(model, FORGET, input_shape=(3, 64, 64))
    names = {"classifier.1.weight": 0, "classifier.1.bias": 0}
    path = tmp_path / "w.safetensors"
    checkpoint.save_weights(path, small, compact_metadata(Compaction(5, (0, 2, 4), names)))
    for classes in (3, 5):
        assert same_bits(load_model("torchvision:squeezenet1_1", str(path), classes), small)
    with pytest.raises(ModelError, match="not one row for each of 5 classes"):
        load_model("torchvision:squeezenet1_1", str(path), 8)


@pytest.mark.parametrize(
    "change",
    [
        {"classes_before": "10"},
        {"new_index": {"0": 1}},
        {"new_index": {"2": 0, "1": 1}},
        {"new_index": {"12": 0}},
        {"tensors": {"fc3.weight": "0"}},
        {"tensors": None},
    ],
)
def test_a_damaged_map_is_refused(tmp_path: Path, change: dict[str, Any]) -> None:
    path = tmp_path / "w.safetensors"
    facts = Compaction(10, (0, 1), {"fc3.weight": 0}).to_dict() | change
    checkpoint.save_weights(path, zoo.load("lenet5"), {"zsu_fast.compact": json.dumps(facts)})
    model = zoo.load("lenet5")
    with untouched(model), pytest.raises(CheckpointError, match="map of classes"):
        fit_to_file(model, path)


def test_two_compactions_in_one() -> None:
    first = Compaction(6, (0, 2, 3, 5), {"w": 0})
    second = Compaction(4, (0, 1, 3), {"w": 0})
    assert second.after(first) == Compaction(6, (0, 2, 5), {"w": 0})
    assert Compaction.from_dict(json.loads(json.dumps(first.to_dict()))) == first
