"""What is noticed about a model by running it on a few images."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from support import SPEC, TinyNet, tiny, tiny_data, untouched
from torch import Tensor, nn
from torch.nn import functional as F

from zsu_fast import ModelError, evaluate
from zsu_fast.models.prepare import PreparedModel, prepare_model


def prepared(model: nn.Module) -> PreparedModel:
    with untouched(model):
        return prepare_model(model, None, SPEC.shape, SPEC.mean, SPEC.std)


class InEval(TinyNet):
    """Re-identification: logits for training, the features in eval mode."""

    def __init__(self) -> None:
        super().__init__()
        self.classifier = nn.Linear(5, 7)

    def forward(self, x: Tensor) -> Tensor:
        x = super().forward(x)
        return self.classifier(x) if self.training else x


class Normalised(TinyNet):
    def forward(self, x: Tensor) -> Tensor:
        return F.normalize(super().forward(x))


class Headless(TinyNet):
    def __init__(self) -> None:
        super().__init__()
        self.fc2 = nn.Sequential()
        self.head = nn.Sequential(nn.Dropout(), nn.Identity())

    def forward(self, x: Tensor) -> Tensor:
        return self.head(F.relu(super().forward(x)))


def without_classes(holder: str) -> nn.Module:
    model = tiny()
    if holder == "config":
        model.config = nn.Module()
        model.config.num_labels = 0
    else:
        model.num_classes = 0
    return model


EMBEDDINGS: dict[str, tuple[Callable[[], nn.Module], str]] = {
    "num_classes": (lambda: without_classes("model"), "it states that it has 0 classes"),
    "num_labels": (lambda: without_classes("config"), "it states that it has 0 classes"),
    "identity": (Headless, r"its 'head\.1' is an Identity"),
    "eval mode": (InEval, "its 'classifier', which takes 5 features, does not run"),
    "unit vectors": (Normalised, "each row of its output is a unit vector"),
}


@pytest.mark.parametrize("kind", EMBEDDINGS)
def test_embeddings_are_refused(kind: str) -> None:
    make, match = EMBEDDINGS[kind]
    with pytest.raises(ModelError, match=rf"an embedding of \d+ values: {match}.*its classifier"):
        prepared(make().eval())


@pytest.mark.parametrize("kind", EMBEDDINGS)
def test_embeddings_are_not_evaluated(kind: str) -> None:
    make, match = EMBEDDINGS[kind]
    with pytest.raises(ModelError, match=match):
        evaluate(make().eval(), tiny_data(10), [1])


def test_embeddings_of_timm_and_torchvision() -> None:
    timm = pytest.importorskip("timm")
    models = pytest.importorskip("torchvision.models")
    squeezenet, vgg = models.squeezenet1_1(), models.vgg11_bn(init_weights=False)
    squeezenet.classifier[1] = nn.Identity()
    vgg.classifier[6] = nn.Identity()
    for model in (timm.create_model("resnet10t", num_classes=0), squeezenet, vgg):
        with pytest.raises(ModelError, match="an embedding of"):
            prepare_model(model.eval(), input_shape=(3, 64, 64))


def test_an_identity_behind_the_classifier_is_no_embedding() -> None:
    model = nn.Sequential()
    model.add_module("head", nn.Sequential(tiny(), nn.Identity()))
    assert prepared(model.eval()).classes == 5


def test_a_replaced_classifier_with_a_stale_number_of_classes_is_accepted() -> None:
    model = tiny()
    model.num_classes = 1000
    assert prepared(model).classes == 5


# --- batches, gradients ----------------------------------------------------------------------


class Squeezed(TinyNet):
    def forward(self, x: Tensor) -> Tensor:
        return self.fc2(self.act(self.fc1(self.bn(self.conv(x)).flatten(1)))[:, :, None].squeeze())


def test_a_squeeze_that_removes_the_batch_is_refused_at_the_start() -> None:
    with pytest.raises(ModelError, match=r"not a batch of one.*A squeeze\(\) without a dimension"):
        prepared(Squeezed().eval())


def test_a_last_batch_of_one_image_is_evaluated_all_the_same() -> None:
    model = Squeezed().eval()
    model.load_state_dict(tiny().state_dict())
    assert evaluate(model, tiny_data(9), [1], batch=4) == evaluate(model, tiny_data(9), [1])


def test_an_output_that_depends_on_the_batch_is_noted() -> None:
    model = tiny()
    model.bn = nn.BatchNorm2d(8, track_running_stats=False)
    assert "depends on the others in the batch" in prepared(model.eval()).notes[0]


class WithoutGradients(TinyNet):
    @torch.no_grad()
    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x)


class Inference(TinyNet):
    def forward(self, x: Tensor) -> Tensor:
        with torch.inference_mode():
            x = self.conv(x)
        return self.fc2(self.act(self.fc1(self.bn(x).flatten(1))))


@pytest.mark.parametrize(
    ("kind", "match"),
    [
        (WithoutGradients, r"autograd does not reach any of its weights.*no_grad\(\)"),
        (Inference, r"raises when gradients are computed.*clone\(\)"),
    ],
)
def test_weights_that_no_gradient_reaches_are_refused(
    kind: Callable[[], nn.Module], match: str
) -> None:
    with pytest.raises(ModelError, match=match):
        prepared(kind().eval())


def test_a_model_that_runs_another_ones_layers_is_refused() -> None:
    model = tiny()
    namespace = {"net": model}
    exec("def forward(x): return net.fc2(net.fc1(net.conv(x).flatten(1)))", namespace)
    model.forward = namespace["forward"]  # a copy's forward would run the original's layers
    with pytest.raises(ModelError, match="names the model as a global variable"):
        prepared(model)


def test_output_in_bfloat16_is_cast() -> None:
    class Autocast(TinyNet):
        def forward(self, x: Tensor) -> Tensor:
            with torch.autocast("cpu", torch.bfloat16):
                return super().forward(x)

    found = prepared(Autocast().eval())
    assert found.model(torch.zeros(2, *SPEC.shape)).dtype == torch.float32
