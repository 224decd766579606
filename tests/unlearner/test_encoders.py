"""Forgetting identities: `unlearn` of an `EmbeddingClassifier`."""

from __future__ import annotations

import warnings
from dataclasses import replace
from typing import Any

import pytest
import torch
from support import FEW_ROWS, QUICK_DEEP, SPEC, tiny, tiny_data, untouched
from torch import Tensor, nn

import zsu_fast
from zsu_fast import ArgumentError, EmbeddingClassifier, ModelError
from zsu_fast.models.outputs import EMBEDDING_REMEDY

OPTIONS: dict[str, Any] = QUICK_DEEP | {
    "input_shape": SPEC.shape, "mean": SPEC.mean, "std": SPEC.std,
}  # fmt: skip
NAMES = ["ada", "ben", "cleo", "dan", "eva"]


def tiny_encoder() -> nn.Module:
    encoder = tiny()
    encoder.fc2 = nn.Identity()
    return encoder


@torch.no_grad()
def enrolled(encoder: nn.Module) -> dict[str, Tensor]:
    images, labels = tiny_data()
    embeddings = encoder(images)
    return {name: embeddings[labels == c][:3] for c, name in enumerate(NAMES)}


def tiny_classifier(**options: Any) -> EmbeddingClassifier:
    encoder = tiny_encoder()
    return EmbeddingClassifier(encoder, enrolled(encoder), **options)


def run_of(model: nn.Module, forget: Any, **options: Any) -> zsu_fast.ZeroShotUnlearner:
    run = zsu_fast.ZeroShotUnlearner(model, forget, **OPTIONS | options)
    run.options.deep = replace(FEW_ROWS, steps=100)
    run.run()
    return run


@torch.no_grad()
def similarities(model: Any, encoder: nn.Module) -> tuple[Tensor, Tensor]:
    """Of test images with the templates of ``model``, and whom they show."""
    images, labels = tiny_data(seed=3)
    return model.similarities(encoder(images)), labels


def test_only_the_encoder_changes_and_the_person_is_a_stranger() -> None:
    model = tiny_classifier()
    with untouched(model):
        run = run_of(model, ["ben"])
    result: Any = run.unlearned
    assert type(result) is EmbeddingClassifier
    assert type(result.encoder) is type(model.encoder)
    assert torch.equal(result.templates, model.templates)
    assert not torch.equal(result.encoder.fc1.weight, model.encoder.fc1.weight)
    scores, labels = similarities(model, result.encoder)
    original, _ = similarities(model, model.encoder)
    retained = labels != 1
    impostors = scores[retained].clone()
    impostors[torch.arange(len(impostors)), labels[retained]] = -1
    threshold = impostors[:, [0, 2, 3, 4]].flatten().quantile(0.99)
    assert (original[labels == 1].amax(1) >= threshold).float().mean() > 0.95
    accepted = scores[labels == 1].amax(1) >= threshold
    assert accepted.float().mean() < 0.5
    assert scores[labels == 1].amax(1).mean() < threshold
    whom = torch.bincount(scores[labels == 1].argmax(1)[accepted], minlength=5)
    assert whom.max() < 0.25 * len(accepted)  # nobody else is accused
    assert (scores[retained].argmax(1) == labels[retained]).float().mean() > 0.95
    assert run.verdict is not None
    assert run.verdict.passed
    assert run.verdict.labels == {1: "ben"}
    assert run.record.gallery["forgotten_as"] == "stranger"
    share = run.record.depth["accepted"]
    assert share["before"] > 0.5 > share["after"]


def test_redistributed_images_stay_more_similar_to_others_than_a_strangers() -> None:
    model = tiny_classifier()
    highest = {}
    for forgotten_as in ("stranger", "redistribute"):
        run = run_of(model, [1], forgotten_as=forgotten_as)
        result: Any = run.unlearned
        scores, labels = similarities(model, result.encoder)
        highest[forgotten_as] = scores[labels == 1].amax(1).mean()
        assert run.record.gallery["forgotten_as"] == forgotten_as
    assert highest["stranger"] < highest["redistribute"] - 0.03


def test_rows_of_a_classifier_are_classes_and_not_strangers() -> None:
    model = tiny()
    rows = EmbeddingClassifier(tiny_encoder(), model.fc2.weight, metric="dot", bias=model.fc2.bias)
    torch.testing.assert_close(rows(tiny_data()[0]), model(tiny_data()[0]))
    run = zsu_fast.ZeroShotUnlearner(rows, [1], **OPTIONS)
    assert run.options.forgotten_as == "redistribute"
    run = zsu_fast.ZeroShotUnlearner(rows, [1], forgotten_as="stranger", **OPTIONS)
    assert run.record.gallery["forgotten_as"] == "stranger"


def test_templates_that_are_in_no_gallery_are_forgotten() -> None:
    encoder = tiny_encoder()
    people = enrolled(encoder)
    outside = people.pop("ben")
    model = EmbeddingClassifier(encoder, people)
    whole = EmbeddingClassifier(encoder, enrolled(encoder))
    run = run_of(model, outside)
    result: Any = run.unlearned
    assert run.forget == [4, 5, 6]  # numbered on from the gallery
    assert run.record.gallery["templates"] == 3
    assert result.class_names == ("ada", "cleo", "dan", "eva")
    before, labels = similarities(whole, encoder)
    after, _ = similarities(whole, result.encoder)
    assert before[labels == 1, 1].mean() > 0.95
    assert after[labels == 1, 1].mean() < 0.9
    retained = labels != 1
    assert (after[retained].argmax(1) == labels[retained]).float().mean() > 0.95


def test_many_identities_are_sampled_and_keep_their_numbers() -> None:
    encoder = tiny_encoder()
    generator = torch.Generator().manual_seed(0)
    templates = torch.rand(60, 32, generator=generator)
    with torch.no_grad():
        templates[41] = encoder(tiny_data()[0][1:2])[0]
    model = EmbeddingClassifier(encoder, templates)
    run = zsu_fast.ZeroShotUnlearner(model, [41], retain_sample=10, **OPTIONS)
    run.options.deep = replace(FEW_ROWS, steps=20)
    impressions = run.synthesise()
    assert run.classes == 11
    assert run.record.classes == 60
    assert 41 in impressions.labels.tolist()
    assert impressions.labels.max() > 11
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", zsu_fast.UnlearningWarning)  # few rows, random templates
        result: Any = run.run()
    assert len(result.gallery) == 60
    assert run.verdict is not None
    assert run.verdict.forgotten == [41]


def test_a_plan_says_what_the_run_takes() -> None:
    plan = zsu_fast.plan(tiny_classifier(), ["ben"], **{**OPTIONS, "progress": None})
    assert plan.depth == "deep"
    assert plan.classes == 5
    assert plan.total == pytest.approx(
        sum(plan.seconds[s] for s in ("prepare", "synthesise", "fit"))
    )
    with pytest.raises(ArgumentError, match="hardware"):
        zsu_fast.plan(tiny_classifier(), ["ben"], hardware="H100", **OPTIONS)


@pytest.mark.parametrize(
    ("options", "argument"),
    [
        ({"depth": "output"}, "depth"), ({"tail": "last"}, "tail"), ({"tail": 1}, "tail"),
        ({"objective": "differential"}, "objective"), ({"compact": True}, "compact"),
        ({"everywhere": True}, "everywhere"), ({"multi_label": True}, "multi_label"),
        ({"output": 0}, "output"), ({"forgotten_as": "nobody"}, "forgotten_as"),
    ],
)  # fmt: skip
def test_what_an_encoder_can_not_do_is_refused(options: dict[str, Any], argument: str) -> None:
    model = tiny_classifier()
    with untouched(model), pytest.raises(ArgumentError) as error:
        zsu_fast.unlearn(model, [1], **OPTIONS | options)
    assert error.value.argument == argument


def test_failed_deep_forgetting_raises_and_leaves_the_model_as_it_was() -> None:
    model = tiny_classifier()
    run = zsu_fast.ZeroShotUnlearner(model, [1], inplace=True, **OPTIONS)
    run.options.deep = replace(FEW_ROWS, steps=1, rate=1e-9, factors=(1.0,))
    with untouched(model), pytest.raises(ModelError, match="encoder can't forget"):
        run.run()


def test_the_encoder_of_frozen_layers_is_refused() -> None:
    model = tiny_classifier()
    model.encoder.fc1.requires_grad_(False)
    with pytest.raises(ModelError, match="frozen"):
        zsu_fast.unlearn(model, [1], **OPTIONS)


@pytest.mark.parametrize("wrong", [torch.zeros(1, 32), torch.full((1, 32), torch.nan)])
def test_templates_to_forget_have_to_be_vectors(wrong: Tensor) -> None:
    with pytest.raises(ArgumentError, match="forget: got"):
        zsu_fast.unlearn(tiny_classifier(), wrong, **OPTIONS)


def test_templates_to_forget_of_another_width_or_of_someone_who_stays_are_refused() -> None:
    model = tiny_classifier()
    with pytest.raises(ArgumentError, match=r"\[k, 32\]"):
        zsu_fast.unlearn(model, torch.rand(2, 31), **OPTIONS)
    with pytest.raises(ArgumentError, match="same template as 'cleo'"):
        zsu_fast.unlearn(model, model.templates[6], **OPTIONS)
    with pytest.raises(ArgumentError, match="zoe"):
        zsu_fast.unlearn(model, ["zoe"], **OPTIONS)


def test_strangers_are_for_encoders_only() -> None:
    with pytest.raises(ArgumentError, match="forgotten_as"):
        zsu_fast.unlearn(tiny(), [1], forgotten_as="stranger", **OPTIONS)


def test_an_embedding_by_itself_is_refused_with_the_way_to_forget_it() -> None:
    class Unit(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.inner = tiny_encoder()

        def forward(self, x: Tensor) -> Tensor:
            return nn.functional.normalize(self.inner(x))

    with pytest.raises(ModelError) as error:
        zsu_fast.unlearn(Unit(), [1], **OPTIONS)
    assert "EmbeddingClassifier" in EMBEDDING_REMEDY
    assert EMBEDDING_REMEDY in str(error.value)
