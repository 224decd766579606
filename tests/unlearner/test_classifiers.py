"""Classifiers of all kinds, frozen parts, copies in the file, tails of several layers."""

from __future__ import annotations

import warnings
from dataclasses import replace
from typing import Any

import pytest
import torch
from support import (
    FEW_ROWS,
    FORGET,
    QUICK,
    SPEC,
    TinyNet,
    assert_forgets,
    changed_tensors,
    deep_run,
    same_bits,
    tiny,
    tiny_data,
    train,
    untouched,
)
from torch import Tensor, nn
from torch.nn import functional as F

from zsu_fast import ModelError, UnlearningWarning, ZeroShotUnlearner, evaluate, unlearn
from zsu_fast.splitting import split as splitting

OUTPUT: dict[str, Any] = {
    "depth": "output", "input_shape": SPEC.shape, "mean": SPEC.mean, "std": SPEC.std,
    "progress": False,
}  # fmt: skip
KEPT = [c for c in range(5) if c not in FORGET]


class Cosine(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.weight, self.scale = nn.Parameter(torch.randn(5, 32)), nn.Parameter(torch.tensor(10.0))

    def forward(self, x: Tensor) -> Tensor:
        return self.scale * F.linear(F.normalize(x), F.normalize(self.weight))


class Similarities(nn.Module):
    """A CLIP-like classifier: ``scale * f @ text.T``, with ``text`` a buffer or a parameter."""

    def __init__(self, parameter: bool = False) -> None:
        super().__init__()
        self.body, self.scale = TinyNet(classes=24), nn.Parameter(torch.tensor(2.3))
        text = F.normalize(torch.randn(5, 24, generator=torch.Generator().manual_seed(3)))
        if parameter:
            self.text = nn.Parameter(text)
        else:
            self.register_buffer("text", text)

    def forward(self, x: Tensor) -> Tensor:
        return self.scale.exp() * F.normalize(self.body(x)) @ self.text.T


def fitted(model: nn.Module) -> nn.Module:
    with torch.random.fork_rng():
        torch.manual_seed(1)
        for layer in model.modules():
            if isinstance(layer, nn.Linear | nn.Conv2d):
                layer.reset_parameters()
        return train(model)


def run_quietly(model: nn.Module, **options: Any) -> tuple[ZeroShotUnlearner, nn.Module, list[str]]:
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always", UnlearningWarning)
        run = ZeroShotUnlearner(model, FORGET, **options)
        result = run.run()
    return run, result, [str(w.message) for w in caught]


# --- classifiers that are no linear layer ------------------------------------------------------


@pytest.mark.parametrize("options", [OUTPUT, OUTPUT | {"space": "input"}])
def test_a_cosine_classifier_with_a_learned_scale(options: dict[str, Any]) -> None:
    model = tiny()
    model.fc2 = Cosine()
    model = fitted(model)
    with untouched(model):
        _, result, _ = run_quietly(model, **options)
    assert changed_tensors(model, result) == {"fc2.weight"}
    assert_forgets(result, FORGET)


@pytest.mark.parametrize("parameter", [False, True])
def test_a_classifier_that_is_no_layer(parameter: bool) -> None:
    model = fitted(Similarities(parameter))
    with untouched(model):
        run, result, _ = run_quietly(model, **OUTPUT)
    assert run.options.space == "input"  # the features are directions
    assert changed_tensors(model, result) == {"text"}
    assert torch.equal(result.text[KEPT], model.text[KEPT])
    assert_forgets(result, FORGET)


def test_a_classifier_without_biases_sees_images() -> None:
    model = tiny()
    model.fc2 = nn.Linear(model.fc2.in_features, 5, bias=False)
    run, result, _ = run_quietly(fitted(model), **OUTPUT)
    assert run.options.space == "input"  # no constant can lower a logit for all features alike
    assert_forgets(result, FORGET)
    with_biases, _, _ = run_quietly(tiny(), **OUTPUT)
    assert with_biases.options.space == "tail-input"


def test_a_classifier_that_is_no_layer_forgets_in_depth() -> None:
    model = fitted(Similarities())
    with untouched(model):  # one held-out row is a leak of 3 %
        run, result = deep_run(model, settings=replace(FEW_ROWS, leak=0.0))
    assert run.record.depth["level"] == "deep"
    assert not [n for n in run.record.depth["layers"] if n.startswith(("scale", "text"))]
    assert changed_tensors(model, result) >= {"text", "body.fc1.weight"}
    assert evaluate(result, tiny_data(2000), FORGET).forget_accuracy == 0
    put_back = type(result)()
    put_back.load_state_dict(result.state_dict() | {"text": model.text})
    before = evaluate(model, tiny_data(), FORGET).forget_accuracy
    assert evaluate(put_back.eval(), tiny_data(), FORGET).forget_accuracy < before - 40


@pytest.mark.parametrize("seed", range(3))
@pytest.mark.parametrize("options", [OUTPUT, {}], ids=["output", "deep"])
def test_no_direction_whatsoever_shows_a_forgotten_class(
    seed: int, options: dict[str, Any]
) -> None:
    """Images did, up to 9 %, at a leak of 0: training raised their logits where it saw no row."""
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        model = train(Similarities(), 40)
    _, result = deep_run(model, **options)
    features = F.normalize(torch.randn(10_000, 24, generator=torch.Generator().manual_seed(seed)))
    logits = features @ result.text.T
    assert not bool(torch.isin(logits.argmax(1), torch.tensor(FORGET)).any())
    before = features @ model.text.T
    before[:, FORGET] = -torch.inf
    assert torch.equal(logits.argmax(1), before.argmax(1))


def test_a_cosine_classifier_in_depth_says_what_the_checks_may_miss() -> None:
    model = tiny()
    model.fc2 = Cosine()
    with pytest.warns(UnlearningWarning, match="sees only the direction of the features"):
        run, _ = deep_run(fitted(model))
    assert run.record.depth["level"] == "deep"
    assert run.verdict is not None
    assert any("Measure FA and RA on images" in text for text in run.verdict.warnings)


@pytest.mark.parametrize("tail", ["fc1", "conv"])
@pytest.mark.parametrize("per_class", [8, 16])
def test_few_impressions_for_several_layers_are_told(tail: str, per_class: int) -> None:
    options = OUTPUT | {"impressions_per_class": per_class, "max_steps": 20, "steps": 50}
    run, _, caught = run_quietly(tiny(), tail=tail, **options)
    told = [text for text in caught if f"{per_class} impressions per class are few" in text]
    assert len(told) == (per_class == 8)
    assert len(run.verdict.warnings) >= len(told)  # type: ignore[union-attr]
    _, _, caught = run_quietly(tiny(), tail="last", **options)
    assert not any("impressions per class are few" in text for text in caught)


def test_one_class_left_of_a_classifier_of_directions() -> None:
    """The mean of its logits is its own: a tie, so the rows are trained."""
    model = fitted(Similarities())
    _, result = deep_run(model, [0, 1, 2, 3], depth="output")
    assert evaluate(result, tiny_data(), [0, 1, 2, 3]).forget_accuracy < 5


def test_rows_that_a_parametrization_mixes() -> None:
    model = tiny()
    nn.utils.parametrizations.spectral_norm(model.fc2)
    run, result, _ = run_quietly(fitted(model), **OUTPUT)
    assert_forgets(result, FORGET)
    assert run.result.best.agreement > 0.98


# --- frozen parts -------------------------------------------------------------------------------


def test_a_frozen_body_stays_as_it_is() -> None:
    model = tiny()
    for layer in (model.conv, model.bn, model.fc1):
        layer.requires_grad_(False)
    with untouched(model), pytest.warns(UnlearningWarning) as caught:
        result = unlearn(model, FORGET, tail=2, **QUICK)
    assert changed_tensors(model, result) == {"fc2.weight", "fc2.bias"}
    assert_forgets(result, FORGET)
    assert [w for w in caught if str(w.message).startswith("not covered: frozen parameters")]


def test_deep_forgetting_does_not_thaw_a_frozen_body() -> None:
    model = tiny()
    for layer in (model.conv, model.bn, model.fc1):
        layer.requires_grad_(False)
    with pytest.warns(UnlearningWarning, match="the layers ahead of its last one are frozen"):
        run, result = deep_run(model)
    assert run.record.depth["level"] == "output"
    assert changed_tensors(model, result) == {"fc2.weight", "fc2.bias"}


def test_a_frozen_classifier_is_refused_before_the_work() -> None:
    model, events = tiny(), []
    model.fc2.requires_grad_(False)
    match = r"fc2\.weight is frozen .*Unfreeze it: model"
    with untouched(model), pytest.raises(ModelError, match=match):
        unlearn(model, FORGET, callback=events.append, **QUICK)
    assert events == []


def test_an_adapter_is_trained_in_place_of_its_frozen_base() -> None:
    class Adapted(nn.Module):
        """LoRA by hand."""

        def __init__(self, base: nn.Linear, rank: int) -> None:
            super().__init__()
            self.base = base.requires_grad_(False)
            self.a = nn.Parameter(0.2 * torch.randn(rank, base.in_features))
            self.b = nn.Parameter(0.2 * torch.randn(base.out_features, rank))

        def forward(self, x: Tensor) -> Tensor:
            return self.base(x) + x @ self.a.T @ self.b.T

    torch.manual_seed(0)
    model = tiny()
    model.fc2 = Adapted(model.fc2, 16)
    model = fitted(model)
    for layer in (model.conv, model.bn, model.fc1):
        layer.requires_grad_(False)
    _, result, _ = run_quietly(model, **OUTPUT)
    assert changed_tensors(model, result) == {"fc2.b"}
    assert_forgets(result, FORGET)


# --- copies in the file -------------------------------------------------------------------------


def with_copy() -> nn.Module:
    model = tiny()
    model.original_module = nn.Linear(32, 5)
    model.original_module.load_state_dict(model.fc2.state_dict())
    return model


def test_a_further_copy_of_the_classes_is_named() -> None:
    with pytest.warns(UnlearningWarning, match=r"original_module\.weight.*everywhere=True"):
        run, result = deep_run(with_copy())
    assert run.record.split["copies"] == ["original_module.weight", "original_module.bias"]
    assert not run.record.split["erased"]
    assert torch.equal(result.original_module.weight, with_copy().original_module.weight)


@pytest.mark.parametrize("inplace", [False, True])
def test_further_copies_are_erased_on_request(inplace: bool) -> None:
    model = with_copy()
    _, result, said = run_quietly(model, everywhere=True, inplace=inplace, **QUICK)
    assert not [text for text in said if "original_module" in text]
    result.fc2 = result.original_module
    assert_forgets(result, FORGET)


# --- tails of several layers --------------------------------------------------------------------


@pytest.mark.parametrize("space", ["tail-input", "input"])
def test_retained_logits_keep_their_values(space: str) -> None:
    model, images = tiny(), tiny_data()[0]
    _, result, _ = run_quietly(model, tail=2, space=space, **OUTPUT)
    assert_forgets(result, FORGET)
    with torch.no_grad():
        before, after = model(images)[:, KEPT], result(images)[:, KEPT]
    assert abs(float((after - before).mean())) < 2.0  # 13 to 35 without the term that keeps them
    assert float((after - before).abs().mean()) < 0.2 * float(before.std())


def test_a_poor_fit_of_several_layers_is_replaced_by_one_of_the_last(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    def first_layer(*_args: Any) -> tuple[list[str], int, str]:
        return ["conv", "fc1", "fc2"], 0, "a test"

    monkeypatch.setattr(splitting, "_first_responsive_layer", first_layer)
    options = QUICK | {"learning_rate": 1.0, "steps": 20}  # ruins the layers ahead
    poor, _, _ = run_quietly(tiny(), tail="conv", **options)
    assert poor.result.best.agreement < 0.98
    model = tiny()
    run, result, _ = run_quietly(model, **options)
    assert changed_tensors(model, result) == {"fc2.weight", "fc2.bias"}
    assert run.record.split["trained"] == ["fc2.weight", "fc2.bias"]
    assert "trained from 'conv' on," in run.record.split["reason"]
    assert run.result.best.agreement > 0.98
    assert_forgets(result, FORGET)


def test_a_good_fit_of_several_layers_is_kept(monkeypatch: pytest.MonkeyPatch) -> None:
    def two_layers(*_args: Any) -> tuple[list[str], int, str]:
        return ["conv", "fc1", "fc2"], 1, "a test"

    monkeypatch.setattr(splitting, "_first_responsive_layer", two_layers)
    run, result, _ = run_quietly(tiny(), **QUICK)
    assert run.split_point.name == "fc1"
    assert same_bits(result, run_quietly(tiny(), tail="fc1", **QUICK)[1])
