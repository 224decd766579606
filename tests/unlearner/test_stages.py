"""The stages of `ZeroShotUnlearner`: run one by one, given impressions, and interrupted."""

from __future__ import annotations

import copy
import json
import warnings
from pathlib import Path
from typing import Any

import pytest
import torch
from support import (
    FORGET,
    QUICK,
    QUICK_DEEP,
    SPEC,
    assert_forgets,
    same_bits,
    tiny,
    tiny_data,
    unlearned_tiny,
    untouched,
)

import zsu_fast
from zsu_fast import ArgumentError, ZeroShotUnlearner, synthesize, unlearn
from zsu_fast.models.parameters import replace_parameters, weights_hash
from zsu_fast.runtime.progress import Event
from zsu_fast.training.features import FeatureSettings
from zsu_fast.training.fit_task import make_fit_task

# --- stages --------------------------------------------------------------------------------


def test_the_backbone_runs_once_per_impression() -> None:
    runner = ZeroShotUnlearner(tiny(), FORGET, tail="fc2", **QUICK)
    runner.synthesise()
    runner.split()
    rows: list[int] = []
    runner.work.module.conv.register_forward_hook(lambda _m, args, _o: rows.append(len(args[0])))
    runner.fit()
    assert sum(rows) == len(runner.impressions) + 2  # two of them find the layout
    assert runner.history[-1].step >= 60


def test_stages_one_by_one_equal_run() -> None:
    runner = ZeroShotUnlearner(tiny(), FORGET, **QUICK)
    impressions = runner.synthesise()
    split = runner.split()
    fit = runner.fit()
    result = runner.apply()
    assert runner.impressions is impressions
    assert runner.split_point is split
    assert runner.history is fit.history
    assert runner.stopped == fit.stopped != ""
    assert same_bits(result, unlearned_tiny())


def test_stages_out_of_order() -> None:
    runner = ZeroShotUnlearner(tiny(), FORGET, **QUICK)
    assert runner.history == []
    assert runner.stopped == ""
    with pytest.raises(ArgumentError, match=r"apply\(\): called before fit"):
        runner.apply()
    runner.fit()  # runs the stages before it
    assert_forgets(runner.apply(), FORGET)


def test_the_record_of_a_run() -> None:
    model = tiny()
    runner = ZeroShotUnlearner(model, FORGET, seed=5, **QUICK)
    result = runner.run()
    record = json.loads(runner.record.to_json())
    assert record["weights_before"] == weights_hash(model)
    assert record["weights_after"] == weights_hash(result) != record["weights_before"]
    assert record["forget"] == FORGET
    assert record["settings"]["seed"] == 5
    assert record["split"]["at"] == runner.split_point.name
    assert record["fit"]["stopped"] == runner.stopped
    assert set(record["timings"]) == {"synthesise", "split", "fit", "total"}


def test_split_of_a_model() -> None:
    model = tiny()
    images = tiny_data(20)[0]
    for at in ("auto", "last", "bn", "fc1"):
        with untouched(model):
            split = zsu_fast.split(model, at)
        assert torch.allclose(split.tail(*split.backbone(images)), model(images), atol=1e-4)
    with pytest.raises(ArgumentError, match="tail: got 'nowhere'"):
        zsu_fast.split(model, "nowhere")


# --- given impressions ---------------------------------------------------------------------


def test_given_impressions_are_used(tmp_path: Path) -> None:
    model = tiny()
    impressions = synthesize(model, per_class=8, progress=False)
    impressions.save(tmp_path / "impressions.safetensors")
    loaded = zsu_fast.ClassImpressions.load(tmp_path / "impressions.safetensors")
    runner = ZeroShotUnlearner(model, FORGET, impressions=loaded, **QUICK)
    result = runner.run()
    assert runner.impressions is loaded
    assert same_bits(result, unlearned_tiny())


def test_given_impressions_in_any_order() -> None:
    model = tiny()
    impressions = synthesize(model, per_class=8, progress=False)
    order = torch.empty(40, dtype=torch.int64)
    every_fourth = torch.arange(40) % 4 == 3  # all of class 1 and two of class 3
    order[every_fourth] = torch.tensor([*range(8, 16), 24, 25])
    order[~every_fourth] = torch.tensor([*range(8), *range(16, 24), *range(26, 40)])
    shuffled = copy.copy(impressions)
    for name in ("images", "labels", "confidence", "target", "steps", "hit"):
        setattr(shuffled, name, getattr(impressions, name)[order])
    runner = ZeroShotUnlearner(model, FORGET, impressions=shuffled, **QUICK)
    assert_forgets(runner.run(), FORGET)
    split, labels = runner.split_point, shuffled.labels
    assert split is not None
    task = make_fit_task(
        runner.work, split, split.features(shuffled.images), labels, runner.forget_mask,
        runner.options.objective, FeatureSettings(mixtures=0), seed=0,
    )  # fmt: skip
    both = (task.train.label, task.validation.label)
    assert [torch.bincount(label).tolist() for label in both] == [[6] * 5, [2] * 5]


@pytest.mark.parametrize("change", ["few", "shape", "classes"])
def test_given_impressions_that_do_not_fit(change: str) -> None:
    model = tiny()
    if change == "few":
        impressions = synthesize(model, [0, 1, 2], per_class=4, progress=False)
    elif change == "shape":
        impressions = synthesize(model, per_class=4, progress=False)
        impressions.spec = zsu_fast.InputSpec(
            (3, 9, 9), impressions.spec.mean, impressions.spec.std
        )
    else:
        impressions = synthesize(model, per_class=4, progress=False)
        impressions.labels[-1] = 5
    with untouched(model), pytest.raises(ArgumentError, match=r"impressions: got .* Pass some of"):
        unlearn(model, FORGET, impressions=impressions, **QUICK)


# --- interruptions ---------------------------------------------------------------------------


def interrupt_at(stage: str, call: int) -> Any:
    calls = {"synthesise": 0, "fit": 0}

    def callback(event: Event) -> None:
        calls[event.stage] += 1
        if event.stage == stage and calls[stage] == call:
            raise KeyboardInterrupt

    return callback


@pytest.mark.parametrize(("stage", "call"), [("synthesise", 1), ("synthesise", 5), ("fit", 1),
                                             ("fit", 7)])  # fmt: skip
def test_ctrl_c_in_a_stage(stage: str, call: int) -> None:
    model = tiny().train()
    with untouched(model), pytest.raises(KeyboardInterrupt):
        unlearn(model, FORGET, inplace=True, callback=interrupt_at(stage, call), **QUICK)


class _Interrupting(torch.Tensor):
    """Raises KeyboardInterrupt when it is copied."""

    @classmethod
    def __torch_function__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func is torch.Tensor.copy_:
            raise KeyboardInterrupt
        return super().__torch_function__(func, types, args, kwargs or {})


def test_ctrl_c_while_parameters_are_replaced() -> None:
    model = tiny()
    values = {n: torch.zeros_like(p) for n, p in model.named_parameters()}
    values["fc1.weight"] = values["fc1.weight"].as_subclass(_Interrupting)
    assert next(iter(values)) != "fc1.weight"
    with untouched(model), pytest.raises(KeyboardInterrupt):
        replace_parameters(model, values)
    values["fc1.weight"] = torch.zeros_like(model.fc1.weight)
    replace_parameters(model, values)
    assert all(not p.any() for p in model.parameters())


@pytest.mark.usefixtures("few_rows")
@pytest.mark.parametrize("options", [QUICK, QUICK_DEEP], ids=["output", "deep"])
@pytest.mark.parametrize("error", [KeyboardInterrupt, MemoryError])
def test_a_failure_after_the_weights_are_written(
    error: type[BaseException], options: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(*_: Any) -> None:
        raise error

    model = tiny()
    runner = ZeroShotUnlearner(model, FORGET, inplace=True, **options)
    monkeypatch.setattr(zsu_fast.provenance.record.Record, "finish", fail)
    with untouched(model), pytest.raises(error):
        runner.run()


def test_warnings_as_errors() -> None:
    model = tiny()
    with torch.no_grad():
        model.fc2.weight[4] = 0
        model.fc2.bias[4] = -1e4
    options = QUICK | {"max_steps": 20, "restarts": 0, "tail": "fc1"}
    with warnings.catch_warnings(), untouched(model):
        warnings.simplefilter("error")
        with pytest.raises(UserWarning, match="class 4"):
            unlearn(model, FORGET, inplace=True, mean=SPEC.mean, std=SPEC.std, **options)


def test_errors_of_the_callback_are_raised() -> None:
    def callback(event: Event) -> None:
        if event.stage == "fit":
            raise ZeroDivisionError("mine")

    model = tiny()
    with untouched(model), pytest.raises(ZeroDivisionError, match="mine"):
        unlearn(model, FORGET, inplace=True, callback=callback, **QUICK)


def test_the_callback_ends_the_fit() -> None:
    events: list[Event] = []

    def callback(event: Event) -> bool:
        events.append(event)
        return event.stage == "fit" and len([e for e in events if e.stage == "fit"]) == 20

    runner = ZeroShotUnlearner(tiny(), FORGET, callback=callback, **QUICK)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        result = runner.run()
    assert "callback asked to stop in fit" in runner.stopped
    assert events[-1].stage == "fit"
    assert len([e for e in events if e.stage == "fit"]) == 20
    assert runner.result.best is min(runner.history, key=lambda c: c.divergence)
    assert runner.result.learning_rate > 0
    assert not same_bits(result, tiny())


def test_the_callback_ends_the_synthesis() -> None:
    def callback(event: Event) -> bool:
        return event.stage == "synthesise" and event.done >= 0.9 * event.total

    runner = ZeroShotUnlearner(tiny(), FORGET, callback=callback, **QUICK)
    result = runner.run()
    assert len(runner.impressions) < 40
    assert runner.impressions.hit.all()
    assert_forgets(result, FORGET)


def test_the_callback_ends_the_synthesis_too_early() -> None:
    model = tiny()
    with untouched(model), pytest.raises(zsu_fast.ZsuFastError, match="callback: it stopped"):
        unlearn(model, FORGET, inplace=True, callback=lambda _: True, **QUICK)
