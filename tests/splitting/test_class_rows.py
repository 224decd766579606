"""Which tensors hold one row per class, and the splits that they lead to."""

from __future__ import annotations

import pytest
import torch
from splits import CPU
from support import TinyNet, tiny, tiny_data
from torch import Tensor, nn
from torch.nn import functional as F
from torch.nn.utils import parametrizations, prune

from zsu_fast import ModelError
from zsu_fast.models.wrapper import working_copy
from zsu_fast.splitting.class_rows import class_dims, expose_class_buffers
from zsu_fast.splitting.operand_split import OperandTail
from zsu_fast.splitting.split import Split, find_split


def dims_of(model: nn.Module, images: Tensor) -> dict[str, int]:
    return class_dims(model(images), dict(model.named_parameters()))


def last_split(model: nn.Module) -> Split:
    images, labels = tiny_data(6)
    return find_split(working_copy(model, CPU), "last", images, labels)


class Functional(TinyNet):
    """A CLIP-like classifier: ``scale * f @ text.T``, with no layer of its own."""

    def __init__(self, text: str = "buffer") -> None:
        super().__init__(classes=12)
        rows = F.normalize(torch.randn(5, 12, generator=torch.Generator().manual_seed(3)))
        if text == "transposed":
            self.text = nn.Parameter(rows.T.clone())
        elif text == "parameter":
            self.text = nn.Parameter(rows)
        elif text == "attribute":
            self.text = rows
        else:
            self.register_buffer("text", rows, persistent=text != "not saved")
        self.scale = nn.Parameter(torch.tensor(2.3))

    def forward(self, x: Tensor) -> Tensor:
        f = F.normalize(super().forward(x))
        text = self.text if self.text.shape[0] == 12 else self.text.T
        return self.scale.exp() * f @ text


class Cosine(nn.Module):
    """A cosine classifier: normalised features times normalised weights times a learned scale."""

    def __init__(self) -> None:
        super().__init__()
        self.weight, self.scale = nn.Parameter(torch.randn(5, 32)), nn.Parameter(torch.tensor(10.0))

    def forward(self, x: Tensor) -> Tensor:
        return self.scale * F.linear(F.normalize(x), F.normalize(self.weight))


def test_rows_are_told_from_layers_as_wide() -> None:
    model = TinyNet()
    model.conv, model.bn = nn.Conv2d(3, 5, 3, 2), nn.BatchNorm2d(5)
    model.fc1 = nn.Linear(45, 32)
    assert dims_of(model.eval(), tiny_data(4)[0]) == {"fc2.weight": 0, "fc2.bias": 0}


@pytest.mark.parametrize(("kind", "dim"), [("parameter", 0), ("transposed", 1)])
def test_rows_and_columns_of_an_expression(kind: str, dim: int) -> None:
    assert dims_of(Functional(kind).eval(), tiny_data(4)[0]) == {"text": dim}


@pytest.mark.parametrize("tie", [parametrizations.orthogonal, parametrizations.spectral_norm])
def test_rows_that_a_parametrization_mixes_are_none(tie: object) -> None:
    model = TinyNet().eval()
    tie(model.fc2)
    assert list(dims_of(model, tiny_data(4)[0])) == ["fc2.bias"]
    split = last_split(model)
    assert split.output_level
    assert not split.class_dims
    assert "fc2.parametrizations.weight.original" in split.parameters


def test_a_reweighted_layer_keeps_its_rows() -> None:
    model = TinyNet().eval()
    parametrizations.weight_norm(model.fc2)
    assert len(last_split(model).class_dims) == len(last_split(model).parameters) == 3


def test_a_scale_of_all_logits_is_not_trained() -> None:
    model = tiny()
    model.fc2 = Cosine()
    split = last_split(model)
    assert (split.parameters, split.fixed) == (["fc2.weight"], ["fc2.scale"])
    assert "only what holds one row per class" in split.reason
    assert split.directions
    assert not last_split(tiny()).directions


def test_a_layer_that_ignores_its_input_has_no_directions() -> None:
    model = tiny()
    nn.init.zeros_(model.fc2.weight)
    assert not last_split(model).directions


@pytest.mark.parametrize("kind", ["buffer", "parameter", "transposed"])
def test_the_split_lies_before_a_classifier_that_is_no_layer(kind: str) -> None:
    model, images = Functional(kind).eval(), tiny_data(6)[0]
    split = last_split(model)
    assert split.parameters == ["text"]
    assert isinstance(split.tail, OperandTail)
    assert split.directions
    with torch.no_grad():
        (features,) = split.backbone(images)
        assert features.shape == (6, 12)
        assert torch.allclose(split.tail(features), model(images), atol=1e-4)
        assert torch.allclose(split.tail(3 * features), model(images), atol=1e-4)  # directions
    logits = split.tail(features)
    (grad,) = torch.autograd.grad(logits[:, 2].sum(), [p for p in split.tail.parameters()
                                  if 5 in p.shape and 12 in p.shape])  # fmt: skip
    assert bool(grad.any())


def test_an_expression_that_needs_more_than_its_operand_is_split_at_a_layer() -> None:
    class Residual(Functional):
        def forward(self, x: Tensor) -> Tensor:
            features = TinyNet.forward(self, x)
            return features @ self.text.T + features[:, :5]

    split = last_split(Residual("parameter").eval())
    assert split.parameters[0] == "text"
    assert not isinstance(split.tail, OperandTail)


@pytest.mark.parametrize("kind", ["attribute", "not saved"])
def test_a_classifier_that_is_not_saved_is_refused(kind: str) -> None:
    with pytest.raises(
        ModelError, match=r"classifier is text, .*register_buffer\('text', tensor\)"
    ):
        last_split(Functional(kind).eval())


def test_buffers_are_left_alone_where_a_parameter_holds_the_rows() -> None:
    model = TinyNet().eval()
    prune.l1_unstructured(model.fc2, "weight", 0.5)
    work = working_copy(model, CPU)
    assert expose_class_buffers(work, tiny_data(4)[0]) == []
    assert "weight_mask" in dict(work.module.fc2.named_buffers())


def test_a_model_without_rows_per_class_is_warned_of() -> None:
    class Encoded(TinyNet):
        """The rows come from an encoder, as in a CLIP model with its text tower."""

        def __init__(self) -> None:
            super().__init__(classes=12)
            self.words, self.text = nn.Embedding(9, 7), nn.Linear(7, 12)
            self.register_buffer("tokens", torch.arange(20).view(5, 4) % 9)

        def forward(self, x: Tensor) -> Tensor:
            return super().forward(x) @ self.text(self.words(self.tokens).mean(1)).T

    assert "no tensor of the model holds one row per class" in last_split(Encoded().eval()).warning
    assert last_split(tiny()).warning == ""


def test_a_frozen_classifier_is_refused_and_a_frozen_body_kept() -> None:
    images, labels = tiny_data(6)
    work = working_copy(tiny(), CPU)
    work.module.fc2.requires_grad_(False)
    with pytest.raises(ModelError, match=r"fc2\.weight is frozen .*get_submodule\('fc2'\)"):
        find_split(work, "last", images, labels)
    work.module.requires_grad_(False)
    work.module.fc2.requires_grad_(True)
    split = find_split(work, 2, images, labels)
    assert split.parameters == ["fc2.weight", "fc2.bias"]
    assert {"fc1.weight", "fc1.bias"} <= set(split.fixed)
    assert [p.requires_grad for p in work.parameters()] == 6 * [False] + 2 * [True]
