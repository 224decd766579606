"""What a call without options is: deep, repeatable, and harmless to the user's model."""

from __future__ import annotations

import copy
import functools
import warnings
from typing import Any

import pytest
import torch
from support import (
    FORGET,
    TinyNet,
    assert_forgets,
    bits,
    changed_tensors,
    deep_run,
    same_bits,
    snapshot,
    tiny,
    tiny_data,
    untouched,
)
from torch import nn

import zsu_fast
from zsu_fast.models.parameters import weights_hash
from zsu_fast.runtime.progress import Event

TRAINED = {"fc1.weight", "fc1.bias", "fc2.weight", "fc2.bias"}


@functools.lru_cache(maxsize=1)
def _deep() -> tuple[zsu_fast.ZeroShotUnlearner, nn.Module]:
    return deep_run()


def deep_tiny() -> nn.Module:
    """The result of `deep_run`; shared, so copy it before changing it."""
    return _deep()[1]


def test_unlearn_with_no_option_at_all() -> None:
    model = tiny().train()
    with untouched(model):
        result = zsu_fast.unlearn(model, FORGET)
    assert result is not model
    assert type(result) is TinyNet
    assert result.training
    assert changed_tensors(model, result) == TRAINED
    assert_forgets(result, FORGET)
    before = snapshot(model)
    after = snapshot(result)
    assert (after.modes, after.flags) == (before.modes, before.flags)
    assert not {t[0] for t in before.tensors.values()} & {t[0] for t in after.tensors.values()}


def test_the_record_says_deep() -> None:
    run, result = _deep()
    record = run.record.to_dict()
    assert (record["depth"]["depth"], record["depth"]["level"]) == ("deep", "deep")
    assert record["settings"]["depth"] == "deep"
    assert record["weights_before"] == weights_hash(tiny())
    assert record["weights_after"] == weights_hash(result)
    assert set(record["split"]["trained"]) == TRAINED
    assert record["warnings"] == []
    assert run.options.space == "tail-input"


def test_in_place_gives_the_same_bits() -> None:
    model = tiny().train()
    identities = [id(p) for p in model.parameters()]
    result = deep_run(model, inplace=True)[1]
    assert result is model
    assert [id(p) for p in model.parameters()] == identities
    assert model.training
    assert same_bits(model, deep_tiny())


@pytest.mark.parametrize("inplace", [False, True])
def test_batchnorm_statistics_and_dropout_stay(inplace: bool) -> None:
    model = tiny()
    buffers = {name: bits(buffer) for name, buffer in model.named_buffers()}
    result = deep_run(model, inplace=inplace)[1]
    assert {name: bits(buffer) for name, buffer in result.named_buffers()} == buffers
    assert set(buffers) == {f"bn.{n}" for n in ("running_mean", "running_var",
                                                "num_batches_tracked")}  # fmt: skip
    assert result.drop.p == 0.5
    assert not any(module.training for module in result.modules())


@pytest.mark.parametrize(
    "modes", [{"bn": True}, {"drop": True}, {"conv": True, "fc2": True}], ids=str
)
def test_each_module_keeps_its_mode(modes: dict[str, bool]) -> None:
    model = tiny()
    for name, mode in modes.items():
        model.get_submodule(name).train(mode)
    expected = {name: module.training for name, module in model.named_modules()}
    with untouched(model):
        result = deep_run(model)[1]
    assert {name: module.training for name, module in result.named_modules()} == expected
    assert same_bits(result, deep_tiny())


def test_stages_one_by_one_equal_run() -> None:
    done = _deep()[0]
    run = zsu_fast.ZeroShotUnlearner(tiny(), FORGET, **_given(done))
    run.options.deep = done.options.deep
    impressions, split, fit = run.synthesise(), run.split(), run.fit()
    result = run.apply()
    assert run.impressions is impressions
    assert run.split_point is split
    assert run.stopped == fit.stopped != ""
    assert same_bits(result, deep_tiny())


def _given(run: zsu_fast.ZeroShotUnlearner) -> dict[str, Any]:
    options = {k: v for k, v in run.options.given.items() if k not in ("depth", "space")}
    return options | {"progress": False}


def test_a_fit_runs_the_stages_before_it() -> None:
    done = _deep()[0]
    run = zsu_fast.ZeroShotUnlearner(tiny(), FORGET, **_given(done))
    run.options.deep = done.options.deep
    run.fit()
    assert same_bits(run.apply(), deep_tiny())


# --- the caller's settings -------------------------------------------------------------------


@pytest.mark.parametrize(
    "mode",
    [torch.no_grad, torch.inference_mode, lambda: torch.autocast("cpu", torch.bfloat16)],
    ids=["no_grad", "inference_mode", "autocast"],
)
def test_modes_of_the_caller_have_no_effect(mode: Any) -> None:
    model = tiny()
    with mode():
        result = deep_run(model)[1]
    assert same_bits(result, deep_tiny())
    assert not any(p.is_inference() for p in result.parameters())


def test_the_default_dtype_and_the_global_generator_have_no_effect() -> None:
    expected = deep_tiny()
    torch.manual_seed(99)
    before = torch.get_rng_state()
    torch.set_default_dtype(torch.float64)
    try:
        result = deep_run()[1]
    finally:
        torch.set_default_dtype(torch.float32)
    assert same_bits(result, expected)
    assert torch.equal(torch.get_rng_state(), before)


def frozen() -> nn.Module:
    return tiny().requires_grad_(False)


def wrapped() -> nn.Module:
    return nn.DataParallel(tiny())


@pytest.mark.parametrize("make", [frozen, wrapped])
def test_frozen_and_wrapped_models(make: Any) -> None:
    model = make()
    with untouched(model):
        result = deep_run(model)[1]
    assert type(result) is type(model)
    assert [p.requires_grad for p in result.parameters()] == [
        p.requires_grad for p in model.parameters()
    ]
    assert same_bits(getattr(result, "module", result), deep_tiny())


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("inplace", [False, True])
def test_dtypes_stay(dtype: torch.dtype, inplace: bool) -> None:
    model = tiny().to(dtype)
    dtypes = {name: t.dtype for name, t in model.state_dict().items()}
    run, result = deep_run(model, inplace=inplace)
    assert run.record.depth["level"] == "deep"
    assert {name: t.dtype for name, t in result.state_dict().items()} == dtypes
    assert_forgets(result, FORGET)


# --- errors and Ctrl-C -----------------------------------------------------------------------


@pytest.mark.parametrize("error", [KeyboardInterrupt, ZeroDivisionError])
@pytest.mark.parametrize(
    ("stage", "call"),
    [("synthesise", 1), ("fit", 1), ("fit", 4), ("fit", 5), ("fit", 9)],
    ids=["inversion", "layers, begun", "layers, done", "last layer, begun", "last layer"],
)
def test_an_error_in_a_stage(stage: str, call: int, error: type[BaseException]) -> None:
    calls = {"synthesise": 0, "fit": 0}

    def callback(event: Event) -> None:
        calls[event.stage] += 1
        if event.stage == stage and calls[stage] == call:
            raise error

    model = tiny().train()
    with untouched(model), pytest.raises(error):
        deep_run(model, inplace=True, callback=callback)


def test_warnings_as_errors() -> None:
    model = tiny()
    with torch.no_grad():  # a class that no row reaches
        model.fc2.weight[4] = 0
        model.fc2.bias[4] = -1e4
    with warnings.catch_warnings(), untouched(model):
        warnings.simplefilter("error")
        with pytest.raises(UserWarning, match="class 4"):
            deep_run(model, inplace=True)


# --- what it is for --------------------------------------------------------------------------


def test_less_comes_back_with_the_original_last_layer_than_at_the_output_level() -> None:
    original, data = tiny(), tiny_data()
    output = zsu_fast.unlearn(original, FORGET, depth="output", progress=False)

    def put_back(unlearned: nn.Module) -> float:
        model = copy.deepcopy(unlearned)
        model.fc2 = original.fc2
        return float(zsu_fast.evaluate(model, data, FORGET).forget_accuracy or 0)

    assert put_back(output) > 95
    assert put_back(deep_tiny()) < 85


# --- which level a tail means ----------------------------------------------------------------


def test_a_tail_that_names_the_last_layer_is_output_level() -> None:
    """It was an error that spoke of depth='deep', which nobody had passed."""
    run, result = deep_run(tail="fc2")
    assert changed_tensors(tiny(), result) == {"fc2.weight", "fc2.bias"}
    depth = run.record.depth
    assert (depth["depth"], depth["level"]) == ("output", "output")
    assert "fallback" not in depth
    assert any("Only the last layer (fc2.weight" in note for note in run.record.warnings)
    with pytest.raises(zsu_fast.ArgumentError, match="tail: got 'fc2' with depth='deep'"):
        deep_run(tail="fc2", depth="deep")


@pytest.mark.parametrize("depth", ["deep", "output"])
@pytest.mark.parametrize("tail", ["nowhere", 9, "drop"])
def test_a_wrong_tail_is_found_before_the_synthesis(depth: Any, tail: Any) -> None:
    def callback(event: Event) -> None:
        raise AssertionError(f"{event.stage} began")

    options = {"input_shape": (3, 8, 8), "mean": 0.5, "std": 0.5, "callback": callback}
    for space in ("input", "tail-input"):
        if tail == "drop" and depth == "output":
            continue  # the last layer follows it
        with pytest.raises(zsu_fast.ArgumentError, match="tail: got"):
            zsu_fast.unlearn(tiny(), FORGET, tail=tail, depth=depth, space=space, **options)


def test_options_without_effect_are_said() -> None:
    run, _ = deep_run(weights=(0.5, 0.5))
    assert any("weights had no effect" in note for note in run.record.warnings)
    impressions = zsu_fast.synthesize(tiny(), per_class=8, progress=False)
    run = zsu_fast.ZeroShotUnlearner(
        tiny(), FORGET, impressions=impressions, impressions_per_class=9, max_steps=5
    )
    (said,) = run.record.depth["unused"]
    assert said == "max_steps, impressions_per_class had no effect: impressions were given."
