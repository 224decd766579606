"""`check`: models whose answer is known, on the zoo's LeNet5 and on tiny ones."""

from __future__ import annotations

import copy
from typing import Any

import multi_label_case
import pytest
import torch
from support import FORGET, QUICK, SPEC, Returning, TinyNet, deep_run, tiny, untouched
from torch import nn

import zsu_fast
from zsu_fast import ArgumentError, ModelError, Verdict, check
from zsu_fast.evaluation.audit.audited_model import audited_copy
from zsu_fast.evaluation.check import _same_layers_ahead
from zsu_fast.models import zoo
from zsu_fast.models.prepare import prepare_model
from zsu_fast.training.deep.split import find_deep_split

DIGITS = [1, 2, 3, 4]
IMAGES: dict[str, Any] = {"input_shape": SPEC.shape, "mean": SPEC.mean, "std": SPEC.std}


def judge(unlearned: nn.Module, forget: Any = FORGET, **options: Any) -> Verdict:
    return check(tiny(), unlearned, forget, progress=False, **IMAGES | options)


def masked(model: nn.Module, layer: str, forget: list[int], value: float) -> nn.Module:
    model.get_submodule(layer).bias.data[forget] = value
    return model


def figures(verdict: Verdict) -> tuple[str, bool, bool]:
    """The level, whether it passed, and whether the original last layer brings the classes back."""
    assert verdict.unmask_leak is not None
    return verdict.level, verdict.passed, verdict.unmask_leak > 0.9


# --- LeNet5 ----------------------------------------------------------------------------------


def test_lenet5_untouched() -> None:
    verdict = check(zoo.load("lenet5"), zoo.load("lenet5"), DIGITS, progress=False)
    assert figures(verdict) == ("none", False, True)
    assert verdict.leak == 1
    assert verdict.sentence.startswith("Not forgotten: 100% of the rows of classes 1 (one)")


def test_lenet5_with_a_masked_last_layer() -> None:
    model = masked(zoo.load("lenet5"), "fc3", DIGITS, -1e9)
    verdict = check(zoo.load("lenet5"), model, DIGITS, progress=False)
    assert figures(verdict) == ("output", True, True)
    assert (verdict.leak, verdict.agreement, verdict.unmask_agreement) == (0, 1, 1)


@pytest.mark.parametrize("depth", ["output", "deep"])
@pytest.mark.usefixtures("few_rows")
def test_lenet5_unlearned(depth: Any) -> None:
    original = zoo.load("lenet5")
    result = zsu_fast.unlearn(original, DIGITS, depth=depth, progress=False)
    with untouched(original), untouched(result):
        verdict = check(original, result, DIGITS, progress=False)
    assert figures(verdict) == (depth, True, depth == "output")
    assert verdict.leak == 0
    assert verdict.agreement > 0.85


# --- what passes for forgotten, and what does not --------------------------------------------


@pytest.mark.parametrize("hide", ["-inf", "mask", "raised others", "shuffled"])
def test_whatever_hides_the_outputs_is_output_level(hide: str) -> None:
    model = tiny()
    if hide == "-inf":
        masked(model, "fc2", FORGET, -torch.inf)
    elif hide == "mask":
        model = zsu_fast.mask(model, FORGET)
    elif hide == "raised others":
        model.fc2.bias.data[[0, 2, 4]] += 1e4
    else:
        order = torch.tensor([1, 0, 3, 2, 4])
        for parameter in model.fc2.parameters():
            parameter.data = parameter.data[order]
    verdict = judge(model)
    assert figures(verdict)[0::2] == ("output", True)
    assert verdict.passed == (hide != "shuffled")


def test_deep_results_of_other_splits_are_deep() -> None:
    _, result = deep_run(tail=3)
    verdict = judge(result, depth="deep")
    assert verdict.level == "deep"
    assert verdict.passed


def test_rows_are_images_where_early_layers_changed(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("zsu_fast.evaluation.check._same_layers_ahead", lambda *_: None)
    verdict = judge(tiny())
    assert "class impressions" in verdict.measured_on
    assert figures(verdict) == ("none", False, True)
    assert figures(judge(masked(tiny(), "fc2", FORGET, -1e9))) == ("output", True, True)
    assert judge(deep_run()[1], depth="deep").passed


@pytest.mark.parametrize("layer", ["conv1", "layer1.0.conv1", "layer3.2.conv2"])
def test_layers_ahead_of_the_rows_are_compared(layer: str) -> None:
    torch.manual_seed(0)
    original = zoo.build("resnet20_cifar").eval()
    prepared = prepare_model(original)
    deep = find_deep_split(prepared.model, "auto", prepared.spec)
    changed = copy.deepcopy(original)
    changed.get_submodule(layer).weight.data *= 1.1
    other = audited_copy("changed", changed, prepared.spec, prepared.device)
    ahead = layer != "layer3.2.conv2"
    assert (_same_layers_ahead(prepared, deep, other) is None) == ahead


def test_a_level_that_was_not_reached_fails() -> None:
    model = masked(tiny(), "fc2", FORGET, -1e9)
    assert judge(model, depth="output").passed
    verdict = judge(model, depth="deep")
    assert not verdict.passed
    assert "(deep was asked for)" in str(verdict)


def test_a_class_that_is_still_there_is_found() -> None:
    verdict = judge(masked(tiny(), "fc2", [1], -1e9))  # of 1 and 3
    assert not verdict.passed
    assert verdict.leak > 0.2


def test_a_retained_class_that_is_lost_is_found() -> None:
    verdict = judge(masked(tiny(), "fc2", [1, 3], -1e9), forget=[1])
    assert not verdict.passed
    assert any("class 3, to be kept" in text for text in verdict.failures)


def test_a_model_of_other_weights_does_not_pass() -> None:
    torch.manual_seed(3)
    verdict = judge(TinyNet().eval())
    assert not verdict.passed
    assert any("no relative of the original" in text for text in verdict.failures)


def test_a_model_of_a_single_layer() -> None:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Flatten(), nn.Linear(192, 5))
    assert check(model, model, [1], progress=False, **IMAGES).level == "none"
    hidden = masked(copy.deepcopy(model), "1", [1], -1e9)
    assert figures(check(model, hidden, [1], progress=False, **IMAGES)) == ("output", True, True)


# --- what can't be judged --------------------------------------------------------------------


def test_another_architecture_is_refused() -> None:
    with pytest.raises(ModelError, match=r"fc2\.bias: \(5,\) and \(4,\)"):
        judge(TinyNet(4).eval())
    with pytest.raises(ModelError, match="differ in more than values"):
        judge(nn.Sequential(nn.Flatten(), nn.Linear(192, 5)))


def test_an_original_that_never_predicts_the_class_is_refused() -> None:
    never = masked(tiny(), "fc2", [1], -1e9)
    with pytest.raises(ModelError, match="no row could be made that the original assigns to"):
        check(never, never, [1], progress=False, **IMAGES)


def test_bad_arguments_are_named() -> None:
    with pytest.raises(ArgumentError, match=r"forget: got \[5\]"):
        judge(tiny(), forget=[5])
    with pytest.raises(ArgumentError, match="depth: got 'deeper'"):
        judge(tiny(), depth="deeper")
    with pytest.raises(ArgumentError, match="class_names: it has 2 names"):
        judge(tiny(), class_names=["a", "b"])
    broken = tiny()
    broken.fc1.weight.data[0, 0] = torch.nan
    with pytest.raises(ModelError, match=r"fc1\.weight holds 1 NaN"):
        judge(broken)


def test_names_are_in_the_verdict_and_equal_calls_agree() -> None:
    result = zsu_fast.unlearn(tiny(), FORGET, **QUICK)
    verdict = judge(result, class_names=list("abcde"))
    assert verdict.labels == {1: "b", 3: "d"}
    assert judge(result, class_names=list("abcde")) == verdict
    assert judge(result, forget=["b", "d"], class_names=list("abcde")) == verdict


def test_output_says_which_item_holds_the_logits() -> None:
    def two_heads(model: nn.Module) -> nn.Module:
        return Returning(model, lambda logits: {"other": logits.flip(1), "animal": logits})

    result = masked(tiny(), "fc2", [0], -1e9)
    for output, level in (("animal", "output"), ("other", "none")):
        verdict = check(
            two_heads(tiny()), two_heads(result), [0], output=output, progress=False,
            **IMAGES,
        )  # fmt: skip
        assert verdict.level == level


# --- compact results ---------------------------------------------------------------------------


def test_a_compact_result_is_judged_as_the_full_one() -> None:
    run, compact = deep_run(compact=True)
    assert len(compact(torch.zeros(1, *SPEC.shape))[0]) == 5 - len(FORGET)
    with untouched(compact):
        verdict = judge(compact)
    full = judge(run.full_size)
    assert verdict.level == full.level == "deep"
    assert verdict.agreement == full.agreement
    assert verdict.unmask_leak == full.unmask_leak


def test_a_compact_result_without_other_rows_is_refused() -> None:
    _, compact = deep_run(compact=True)
    with pytest.raises(ModelError, match="for all but those in forget"):
        judge(compact, [FORGET[0]])


# --- multi-label ---------------------------------------------------------------------------------


def judge_several(unlearned: nn.Module) -> Verdict:
    several = multi_label_case.several()
    return check(several, unlearned, FORGET, multi_label=True, progress=False, **IMAGES)


def test_a_multi_label_model_untouched() -> None:
    verdict = judge_several(multi_label_case.several())
    assert (verdict.level, verdict.leak, verdict.agreement) == ("none", 1, 1)


def test_a_multi_label_model_with_masked_outputs() -> None:
    verdict = judge_several(masked(multi_label_case.several(), "fc2", FORGET, -1e9))
    assert figures(verdict) == ("output", True, True)
    assert (verdict.leak, verdict.agreement) == (0, 1)


def test_a_multi_label_model_that_forgot_deeply() -> None:
    _, result = multi_label_case.run()
    verdict = judge_several(result)
    assert verdict.level == "deep"
    assert verdict.leak < 0.1
    assert verdict.unmask_leak is not None
    assert verdict.unmask_leak < 0.4


def test_a_multi_label_model_that_lost_a_retained_class() -> None:
    kept = next(c for c in range(5) if c not in FORGET)
    verdict = judge_several(masked(multi_label_case.several(), "fc2", [*FORGET, kept], -1e9))
    assert not verdict.passed
    assert f"most rows of class {kept}, to be kept" in str(verdict)
