"""The result of `unlearn`: it reaches the targets, is reproducible; bad arguments are refused."""

from __future__ import annotations

import copy
import inspect
import warnings
from typing import Any

import numpy as np
import pytest
import torch
from support import (
    FORGET,
    QUICK,
    SPEC,
    TinyNet,
    assert_forgets,
    changed_tensors,
    last_layer_inputs,
    same_bits,
    tiny,
    tiny_data,
    train,
    unlearned_tiny,
    untouched,
)
from torch import Tensor
from torch.nn import functional as F

import zsu_fast
from zsu_fast import (
    ArgumentError,
    ZeroShotUnlearner,
    evaluate,
    mask,
    paper_preset,
    synthesize,
    unlearn,
)
from zsu_fast.models import zoo
from zsu_fast.models.checkpoint import load_into

OUTPUT: dict[str, Any] = {"depth": "output", "space": "input", "progress": False}

# --- targets (benchmarks/end_to_end/table1.py has the whole tables) --------------------------


@pytest.mark.shared
def test_lenet5_forgets_mnist_digits(mnist: tuple[Tensor, Tensor]) -> None:
    model, forget = zoo.load("lenet5"), [1, 2, 3, 4]
    with untouched(model):
        result = evaluate(unlearn(model, forget, **OUTPUT), mnist, forget)
    baseline = evaluate(mask(model, forget), mnist, forget)
    assert result.forget_accuracy <= 0.05, str(result)
    assert result.retain_accuracy >= baseline.retain_accuracy - 0.2, str(result)


@pytest.fixture(scope="module")
def karpathynet_data(cifar10: tuple[Tensor, Tensor]) -> tuple[Tensor, Tensor]:
    """The inputs of its last layer for the test images, and the labels."""
    model = zoo.load("karpathynet")
    return last_layer_inputs(model, "fc1", model.input_spec.normalise(cifar10[0])), cifar10[1]


@pytest.mark.shared
@pytest.mark.parametrize("objective", ["masked", "differential"])
def test_karpathynet_forgets_cifar10_classes(
    objective: str, karpathynet_data: tuple[Tensor, Tensor]
) -> None:
    model, forget = zoo.load("karpathynet"), [3, 4, 8]
    baseline = evaluate(mask(model.fc1, forget), karpathynet_data, forget)
    with untouched(model):
        unlearned = unlearn(model, forget, objective=objective, **OUTPUT)
    assert changed_tensors(model, unlearned) == {"fc1.weight", "fc1.bias"}
    result = evaluate(unlearned.fc1, karpathynet_data, forget)
    if objective == "masked":
        assert result.forget_accuracy <= 0.1, str(result)
        assert result.retain_accuracy >= baseline.retain_accuracy - 0.4, str(result)
    else:  # the paper's loss has no target: it forgets and does not collapse
        assert result.forget_accuracy <= 1, str(result)
        assert result.retain_accuracy >= baseline.retain_accuracy - 2, str(result)


@pytest.mark.shared
def test_public_resnet20_forgets(cifar10: tuple[Tensor, Tensor], resnet20_weights: Any) -> None:
    model, forget = zoo.build("resnet20_cifar"), [0, 6]
    load_into(model, resnet20_weights)
    images, labels = model.input_spec.normalise(cifar10[0][:4000]), cifar10[1][:4000]
    data = last_layer_inputs(model, "linear", images), labels
    baseline = evaluate(mask(model.linear, forget), data, forget)
    with untouched(model):
        unlearned = unlearn(model, forget, **OUTPUT)
    assert changed_tensors(model, unlearned) == {"linear.weight", "linear.bias"}
    result = evaluate(unlearned.linear, data, forget)
    assert result.forget_accuracy <= 0.5, str(result)
    assert result.retain_accuracy >= baseline.retain_accuracy - 0.6, str(result)


# --- the result ------------------------------------------------------------------------------


def test_returns_a_copy_that_forgets() -> None:
    model = tiny()
    assert evaluate(model, tiny_data(), FORGET).overall_accuracy > 97
    with untouched(model):
        result = unlearn(model, FORGET, **QUICK)
    assert result is not model
    assert type(result) is TinyNet
    assert not result.training
    assert_forgets(result, FORGET)
    storage = {p.data_ptr() for p in model.parameters()}
    assert not storage & {p.data_ptr() for p in result.parameters()}


def test_inplace_changes_the_model_itself() -> None:
    model = tiny()
    original, identities = copy.deepcopy(model), [id(p) for p in model.parameters()]
    assert unlearn(model, FORGET, inplace=True, **QUICK) is model
    assert [id(p) for p in model.parameters()] == identities
    assert not same_bits(model, original)
    assert same_bits(model, unlearned_tiny())


@pytest.mark.parametrize("tail", ["fc1", "fc2", "last", "conv"])
def test_only_the_tail_changes(tail: str) -> None:
    model = tiny()
    runner = ZeroShotUnlearner(model, FORGET, tail=tail, **QUICK)
    result = runner.run()
    changed = changed_tensors(model, result)
    assert changed == set(runner.split_point.parameters)
    later = {"fc2": {"fc2"}, "last": {"fc2"}, "fc1": {"fc1", "fc2"}}
    assert {n.split(".")[0] for n in changed} == later.get(tail, {"conv", "bn", "fc1", "fc2"})
    if tail != "conv":  # training the whole network requires more impressions
        assert_forgets(result, FORGET)


def test_the_seed_determines_the_bits() -> None:
    model = tiny()
    first = unlearn(model, FORGET, seed=3, **QUICK)
    torch.manual_seed(99)  # the global generator has no effect
    assert same_bits(first, unlearn(model, FORGET, seed=3, **QUICK))
    assert not same_bits(first, unlearn(model, FORGET, seed=4, **QUICK))


def test_the_global_generator_is_unchanged() -> None:
    before = torch.get_rng_state()
    unlearn(tiny(), FORGET, **QUICK)
    assert torch.equal(torch.get_rng_state(), before)


def test_the_differential_objective_forgets() -> None:
    result = unlearn(tiny(), FORGET, objective="differential", **QUICK)
    assert_forgets(result, FORGET, most=5, least=85)


def test_the_paper_preset_follows_the_paper() -> None:
    preset = paper_preset() | {"impressions_per_class": 4, "max_steps": 30, "steps": 10}
    runner = ZeroShotUnlearner(tiny(), FORGET, progress=False, **preset)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # it warns that it does not forget
        result = runner.run()
    assert paper_preset()["weights"] == (0.9, 0.1)
    assert (runner.impressions.target == 1).all()
    assert (runner.impressions.steps == 30).all()
    assert runner.history[-1].step == 10
    assert "all 10 steps" in runner.stopped
    assert all(p.isfinite().all() for p in result.parameters())
    assert set(paper_preset()) <= set(inspect.signature(ZeroShotUnlearner).parameters)


def test_one_impression_per_class_of_forty_classes() -> None:
    generator = torch.Generator().manual_seed(0)
    patterns = torch.rand(40, 3, 8, 8, generator=generator)
    labels = torch.arange(400) % 40
    noisy = patterns[labels] + 0.1 * torch.randn(400, 3, 8, 8, generator=generator)
    images, forget = SPEC.normalise(noisy.clamp(0, 1) * 255), [7, 11, 30]
    model = TinyNet(40)
    optimiser = torch.optim.Adam(model.parameters(), 3e-3)
    model.eval()  # it learns faster without dropout and batch statistics
    for _ in range(150):
        optimiser.zero_grad()
        F.cross_entropy(model(images), labels).backward()
        optimiser.step()
    assert evaluate(model, (images, labels), forget).overall_accuracy > 97
    options = QUICK | {"impressions_per_class": 1, "mixtures": None}
    runner = ZeroShotUnlearner(model, forget, **options)
    result = evaluate(runner.run(), (images, labels), forget)
    assert len(runner.impressions) == 40
    assert runner.split_point.name == "fc2"
    assert "with one impression per class" in runner.split_point.reason
    assert result.forget_accuracy <= 5, str(result)
    assert result.retain_accuracy >= 90, str(result)


def test_the_result_can_be_trained() -> None:
    result = copy.deepcopy(unlearned_tiny())
    assert evaluate(train(result, 60), tiny_data(), FORGET).overall_accuracy > 90


def test_the_default_dtype_has_no_effect() -> None:
    expected = unlearned_tiny()
    torch.set_default_dtype(torch.float64)
    try:
        result = unlearn(tiny(), FORGET, **QUICK)
        assert torch.get_default_dtype() == torch.float64
    finally:
        torch.set_default_dtype(torch.float32)
    assert same_bits(result, expected)


@pytest.mark.parametrize(
    "mode",
    [torch.no_grad, torch.inference_mode, lambda: torch.autocast("cpu", torch.bfloat16)],
    ids=["no_grad", "inference_mode", "autocast"],
)
@pytest.mark.parametrize("inplace", [False, True])
def test_modes_of_the_caller_have_no_effect(mode: Any, inplace: bool) -> None:
    model, other = tiny(), tiny()
    with mode():
        result = unlearn(model, FORGET, inplace=inplace, **QUICK)
        impressions = synthesize(other, [0], per_class=4, progress=False)
        zsu_fast.split(other)
        enabled = torch.is_grad_enabled(), torch.is_inference_mode_enabled()
    with mode():
        assert enabled == (torch.is_grad_enabled(), torch.is_inference_mode_enabled())
    assert same_bits(result, unlearned_tiny())
    assert not any(p.is_inference() for p in result.parameters())
    expected = synthesize(tiny(), [0], per_class=4, progress=False)
    assert torch.equal(impressions.images, expected.images)
    train(result, 2)


# --- classes to forget -----------------------------------------------------------------------


@pytest.mark.parametrize(
    "forget",
    [[], set(), range(5), [5], [-1], -1, [1, 1], True, [True], 1.0, [1.5], "1", ["one"], None,
     np.array([0.5]), torch.tensor([True, False, False, False, False]), torch.tensor([1.0])],
    ids=repr,
)  # fmt: skip
@pytest.mark.parametrize("inplace", [False, True])
def test_invalid_classes_are_refused(forget: Any, inplace: bool) -> None:
    model = tiny().train()
    with untouched(model), pytest.raises(ArgumentError, match=r"^forget: got .+\. "):
        unlearn(model, forget, inplace=inplace)


@pytest.mark.parametrize(
    "forget",
    [(3, 1), {1, 3}, range(1, 4, 2), np.array([1, 3]), [np.int64(3), np.int8(1)],
     torch.tensor([3, 1])],
    ids=repr,
)  # fmt: skip
def test_every_form_of_classes_gives_the_same_result(forget: Any) -> None:
    assert same_bits(unlearn(tiny(), forget, **QUICK), unlearned_tiny())


@pytest.mark.parametrize("array", [np.asarray, lambda v: torch.from_numpy(np.asarray(v))])
def test_arrays_as_options_give_the_same_result(array: Any) -> None:
    options: dict[str, Any] = {"mean": [0.4, 0.5, 0.6], "std": [0.2, 0.3, 0.4]}
    options |= {"input_shape": [3, 8, 8], "weights": [0.9, 0.1], "objective": "differential"}
    want = unlearn(tiny(), FORGET, **QUICK | options)
    arrays = {k: v if k == "objective" else array(v) for k, v in options.items()}
    assert same_bits(unlearn(tiny(), FORGET, **QUICK | arrays), want)


def test_one_class_as_an_int() -> None:
    assert_forgets(unlearn(tiny(), 2, **QUICK), [2])


# --- options ---------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("tail", "nowhere"), ("tail", ""), ("tail", 3.0), ("tail", None),
        ("objective", "best"), ("objective", None),
        ("impressions_per_class", 0), ("impressions_per_class", -1),
        ("impressions_per_class", True), ("space", "output"),
        ("depth", "abyss"), ("depth", 1), ("depth", ["deep"]),
        ("impressions_per_class", 8.0), ("impressions_per_class", "8"),
        ("confidence", (0.9, 0.5)), ("confidence", (0, 0.5)), ("confidence", (0.5, 1.0)),
        ("confidence", 0.9), ("confidence", (0.5,)), ("confidence", ("a", "b")),
        ("max_steps", 0), ("max_steps", 1.5), ("restarts", -1),
        ("step_size", 0), ("step_size", 2), ("step_size", float("nan")), ("step_size", "fast"),
        ("inplace", 1), ("early_stop", "no"), ("progress", 1), ("callback", "f"), ("cache", 3),
        ("cache", "a\0b"), ("seed", 1 << 63), ("impressions", [1]), ("device", 10**30),
        ("objective", ["masked"]), ("space", ["input"]), ("precision", []), ("loop", {}),
        ("beta", -1), ("beta", float("nan")), ("beta", "none"),
        ("input_shape", (3, 8)), ("input_shape", (3, 9, 9)), ("mean", (1, 2)), ("std", 0),
        ("mixtures", -1), ("mixtures", 1.5), ("steps", 0), ("steps", True), ("batch", 0),
        ("learning_rate", 0), ("learning_rate", float("nan")), ("learning_rate", "slow"),
        ("weights", (0.9,)), ("weights", (0.9, -1)), ("weights", 0.9),
        ("weights", (float("nan"), 0.1)), ("weights", (float("inf"), 0.1)),
        ("margin", -1), ("margin", float("inf")), ("margin", "wide"),
        ("seed", -1), ("seed", 1.5), ("seed", True), ("device", "nonsense"),
    ],
    ids=repr,
)  # fmt: skip
def test_invalid_options_are_named(name: str, value: Any) -> None:
    model = tiny()
    with untouched(model), pytest.raises(ArgumentError) as caught:
        unlearn(model, FORGET, **(QUICK | {"inplace": True, name: value}))
    assert caught.value.argument == name
    shown = repr(value) if name != "tail" or value != "nowhere" else "nowhere"
    assert shown in str(caught.value)
    assert caught.value.remedy


def test_an_unknown_option() -> None:
    with pytest.raises(TypeError, match="epochs"):
        unlearn(tiny(), FORGET, epochs=3)
