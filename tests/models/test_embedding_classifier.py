"""An encoder and its gallery as one classifier."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from zsu_fast import ArgumentError, EmbeddingClassifier, ModelError
from zsu_fast.models.embedding_classifier import Metric, fitted_scale
from zsu_fast.models.infer_spec import resolve_spec
from zsu_fast.models.labels import class_names
from zsu_fast.models.wrapper import working_copy


def encoder() -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(nn.Flatten(), nn.Linear(48, 6))


TEMPLATES = torch.randn(4, 6, generator=torch.Generator().manual_seed(1))
IMAGES = torch.randn(3, 3, 4, 4, generator=torch.Generator().manual_seed(2))


class Returning(nn.Module):
    """An encoder that returns ``wrap(embeddings)``."""

    def __init__(self, wrap: Any) -> None:
        super().__init__()
        self.inner, self.wrap = encoder(), wrap

    def forward(self, x: Tensor) -> Any:
        return self.wrap(self.inner(x))


class DualEncoder(nn.Module):
    """Images and texts, as CLIP's ``forward``, which needs both."""

    def __init__(self) -> None:
        super().__init__()
        self.inner = encoder()

    def get_image_features(self, pixel_values: Tensor) -> Any:
        return SimpleNamespace(pooler_output=self.inner(pixel_values))

    def forward(self, input_ids: Tensor, pixel_values: Tensor) -> Tensor:  # noqa: ARG002
        raise AssertionError("texts are not needed")


@pytest.mark.parametrize("metric", ["cosine", "dot", "euclidean"])
def test_logits_are_scaled_similarities_and_a_bias(metric: Metric) -> None:
    bias = torch.tensor([0.0, 1.0, -1.0, 2.0])
    model = EmbeddingClassifier(encoder(), TEMPLATES, scale=3.0, metric=metric, bias=bias)
    z = encoder()(IMAGES)
    wanted = {
        "cosine": F.cosine_similarity(z[:, None], TEMPLATES, dim=2),
        "dot": z @ TEMPLATES.T,
        "euclidean": -torch.cdist(z, TEMPLATES).square(),
    }[metric]
    torch.testing.assert_close(model.similarities(z), wanted)
    torch.testing.assert_close(model(IMAGES), 3 * wanted + bias)


def test_the_best_of_several_templates_counts() -> None:
    groups = {"ada": TEMPLATES[:2], "ben": TEMPLATES[2], "cleo": TEMPLATES[3:]}
    model = EmbeddingClassifier(encoder(), groups)
    single = EmbeddingClassifier(encoder(), TEMPLATES)
    z = model.embed(IMAGES)
    each = single.similarities(z)
    wanted = torch.stack([each[:, :2].amax(1), each[:, 2], each[:, 3]], 1)
    torch.testing.assert_close(model.similarities(z), wanted)
    assert model.identity.tolist() == [0, 0, 1, 2]
    assert class_names(model) == ("ada", "ben", "cleo")
    assert model.gallery.part([2, 0]).identity.tolist() == [0, 1, 1]
    torch.testing.assert_close(model.gallery.part([2, 0]).similarities(z), wanted[:, [2, 0]])


@pytest.mark.parametrize(
    "wrap",
    [
        lambda z: z, lambda z: (z, z.sum()), lambda z: {"image_embeds": z, "loss": z.sum()},
        lambda z: SimpleNamespace(pooler_output=z, last_hidden_state=z[:, None]),
        lambda z: {"vector": z}, lambda z: z[:, :, None, None],
    ],
)  # fmt: skip
def test_embeddings_are_found_in_what_the_encoder_returns(wrap: Any) -> None:
    model = EmbeddingClassifier(Returning(wrap), TEMPLATES)
    torch.testing.assert_close(model.embed(IMAGES), encoder()(IMAGES))


def test_of_a_dual_encoder_the_images_alone_are_encoded() -> None:
    model = EmbeddingClassifier(DualEncoder(), TEMPLATES)
    torch.testing.assert_close(model.embed(IMAGES), encoder()(IMAGES))
    work = working_copy(model, torch.device("cpu"))
    torch.testing.assert_close(work(IMAGES), model(IMAGES))


@pytest.mark.parametrize(
    ("wrap", "why"),
    [
        (lambda z: z.sum(1), "one vector per image"), (lambda z: z[:2], "one vector per image"),
        (lambda z: z[:, :, None].expand(-1, -1, 7), "one vector per image"),
        (lambda z: z[:, :5], "vectors of 5 values, and the templates have 6"),
        (lambda z: z.long(), "torch.int64"), (lambda z: {"a": z, "b": z}, "no embeddings"),
        (lambda _: None, "NoneType"),
    ],
)  # fmt: skip
def test_an_encoder_without_vectors_is_refused(wrap: Any, why: str) -> None:
    with pytest.raises(ModelError, match=why):
        EmbeddingClassifier(Returning(wrap), TEMPLATES)(IMAGES)


@pytest.mark.parametrize(
    ("arguments", "argument"),
    [
        ({"templates": TEMPLATES[:1]}, "templates"), ({"templates": []}, "templates"),
        ({"templates": {"ada": TEMPLATES}}, "templates"), ({"templates": "ada"}, "templates"),
        ({"templates": TEMPLATES.long()}, "templates"), ({"templates": TEMPLATES[0]}, "templates"),
        ({"templates": TEMPLATES * torch.tensor([[1.0], [0], [1], [1]])}, "templates"),
        ({"templates": TEMPLATES / 0}, "templates"),
        ({"templates": [TEMPLATES[0], TEMPLATES[0, :3]]}, "templates"),
        ({"templates": [TEMPLATES[0], None]}, "templates"),
        ({"names": ["a", "b", "b", "c"]}, "names"), ({"names": ["a"]}, "names"),
        ({"names": ["a", "b", "c", 4]}, "names"), ({"names": "abcd"}, "names"),
        ({"names": ["a"], "templates": {"ada": TEMPLATES[0], "ben": TEMPLATES[1]}}, "names"),
        ({"scale": 0}, "scale"), ({"scale": float("nan")}, "scale"), ({"metric": "l1"}, "metric"),
        ({"bias": torch.zeros(3)}, "bias"), ({"bias": torch.full((4,), torch.inf)}, "bias"),
        ({"encoder": len}, "encoder"),
    ],
)  # fmt: skip
def test_bad_arguments_are_refused(arguments: dict[str, Any], argument: str) -> None:
    with pytest.raises(ArgumentError) as error:
        EmbeddingClassifier(**{"encoder": encoder(), "templates": TEMPLATES} | arguments)
    assert error.value.argument == argument


@pytest.mark.parametrize("metric", ["cosine", "euclidean"])
def test_a_template_itself_is_recognised_with_the_fitted_scale(metric: Metric) -> None:
    templates = torch.randn(200, 32, generator=torch.Generator().manual_seed(3))
    model = EmbeddingClassifier(encoder(), templates, metric=metric)
    confidence = model.gallery(templates).softmax(1).diagonal().median()
    assert float(confidence) == pytest.approx(0.995, abs=2e-3)
    assert fitted_scale(model.gallery) == pytest.approx(model.scale, rel=1e-3)


def test_what_the_encoder_states_about_its_images_counts() -> None:
    inner: Any = encoder()
    inner.config = SimpleNamespace(vision_config=SimpleNamespace(image_size=4, num_channels=3))
    assert resolve_spec(EmbeddingClassifier(inner, TEMPLATES)).shape == (3, 4, 4)


def test_the_state_dict_restores_encoder_and_templates() -> None:
    model, other = (EmbeddingClassifier(encoder(), t) for t in (TEMPLATES, 2 - TEMPLATES))
    other.load_state_dict(model.state_dict())
    torch.testing.assert_close(other(IMAGES) / other.scale, model(IMAGES) / model.scale)
