"""What a run will cost: figures that follow from what was measured, and what is refused."""

from __future__ import annotations

import json
import resource
from typing import Any

import pytest
import torch
from support import SPEC, tiny, untouched
from torch import nn
from typer.testing import CliRunner

import zsu_fast
from zsu_fast import Plan, ZeroShotUnlearner
from zsu_fast.cli.app import app
from zsu_fast.errors import ArgumentError
from zsu_fast.planning.pilot import Pilot, PilotResult
from zsu_fast.planning.plan import gpus_needed, measured_seconds
from zsu_fast.runtime import accelerators
from zsu_fast.runtime.measuring import PeakMemory
from zsu_fast.synthesis.active_batch import ActiveBatch
from zsu_fast.synthesis.ascent import Ascent

OPTIONS: dict[str, Any] = {
    "input_shape": SPEC.shape, "mean": SPEC.mean, "std": SPEC.std, "impressions_per_class": 8,
    "mixtures": 256, "steps": 100, "depth": "output", "space": "input",
}  # fmt: skip
STAGES = ["prepare", "synthesise", "split", "fit", "apply"]


def pilot(**changes: Any) -> PilotResult:
    """An invented pilot: steps cost 0.1 s and 0.01 s a row."""
    run = ZeroShotUnlearner(tiny(), [1], tail="last", progress=False, **OPTIONS)
    seconds = {
        "prepare": 1.0, "step wide": 1.1, "step narrow": 0.35, "fill wide": 0.0, "forward": 0.0,
        "split": 2.0, "feature": 0.5, "features": 0.25, "label": 0.25, "fit step": 0.125,
        "validate": 0.0, "apply": 3.0,
    }  # fmt: skip
    values: dict[str, Any] = {
        "run": run, "space": None, "count": 100, "width": 100, "timed": (100, 25),
        "reached": (32, 32), "shard": 400, "mean_steps": 5.0,
        "max_steps": 8, "row_bytes": 1, "train_rows": 200, "validation_rows": 60, "fit_steps": 80,
        "batch": 64, "tail_work": 1, "seconds": seconds,
    }  # fmt: skip
    return PilotResult(**values | changes)


# --- arithmetic ------------------------------------------------------------------------------


def test_seconds_follow_from_those_of_single_steps() -> None:
    got = measured_seconds(pilot())
    assert list(got) == STAGES
    assert got["prepare"] == 1
    assert got["synthesise"] == pytest.approx(8 * 0.1 + 100 * 5 * 0.01)
    assert got["split"] == 2
    assert got["fit"] == pytest.approx(0.25 + 100 * 0.5 + 260 * 0.25 + 80 * 0.125)
    assert got["apply"] == 3


def test_rows_beyond_a_batch_refill_it_and_shards_add_up() -> None:
    refilled = measured_seconds(pilot(count=400))["synthesise"]
    assert refilled == pytest.approx((400 * 5 / 100 + 8 / 2) * 0.1 + 400 * 5 * 0.01)
    assert measured_seconds(pilot(count=1200))["synthesise"] == pytest.approx(3 * refilled)


@pytest.mark.parametrize(
    ("within", "gpus"), [(None, 1), (20.0, 1), (11.0, 1), (6.0, 2), (3.0, 5), (1.0, None)]
)
def test_gpus_needed_to_finish_in_time(within: float | None, gpus: int | None) -> None:
    seconds = {"synthesise": 10.0, "fit": 1.0, "total": 11.0}
    assert gpus_needed(seconds, within) == gpus


def test_peak_memory_counts_what_was_freed_again() -> None:
    memory = PeakMemory(torch.device("cpu"))
    memory.end_stage("before")
    block = torch.ones(50 * 2**20)  # 200 MiB, touched
    del block
    memory.end_stage("block", more=2**30)
    memory.end_stage("after")
    base = memory.peaks["before"]
    assert memory.peaks["block"] - base > 150 * 2**20 + 2**30
    assert memory.peaks["after"] - base < 100 * 2**20


# --- plans of real runs ----------------------------------------------------------------------


@pytest.fixture(scope="module")
def planned() -> Plan:
    return zsu_fast.plan(tiny(), [1, 3], **OPTIONS)


def test_a_plan_says_what_the_run_does(planned: Plan) -> None:
    run = ZeroShotUnlearner(tiny(), [1, 3], progress=False, **OPTIONS)
    run.run()
    record = run.record
    assert planned.impressions == record.impressions["count"] == 40
    assert planned.impression_classes == record.impressions["classes"] == 5
    assert planned.tail == record.split["at"]
    assert planned.ascent_steps == pytest.approx(record.impressions["mean_steps"], rel=0.3)
    assert planned.classes == 5
    assert (planned.basis, planned.device, planned.gpus) == ("measured", "cpu", 0)
    assert [*planned.seconds] == [*STAGES, "total"]
    assert planned.total == pytest.approx(sum(planned.seconds[s] for s in STAGES))
    assert all(value > 0 for value in planned.seconds.values())
    # torch alone takes 200 MB, and what this process holds already counts; within a factor of ten
    # the time is right even on a busy machine
    assert 2e8 < planned.memory < 1024 * resource.getrusage(resource.RUSAGE_SELF).ru_maxrss + 1e9
    assert 0.1 < planned.total / record.timings["total"] < 10


def test_more_impressions_cost_more(planned: Plan) -> None:
    more = zsu_fast.plan(tiny(), [1, 3], **OPTIONS | {"impressions_per_class": 2000})
    assert more.impressions == 10_000
    assert more.seconds["synthesise"] > 10 * planned.seconds["synthesise"]
    assert more.memory > planned.memory


def test_a_sample_is_planned_as_such() -> None:
    assert zsu_fast.plan(tiny(), [1], retain_sample=2, **OPTIONS).impression_classes == 3


def test_the_space_at_the_cut_is_planned_too() -> None:
    got = zsu_fast.plan(tiny(), [1], **OPTIONS | {"space": "tail-input"})
    assert got.tail == "fc2"
    assert got.total > 0


def test_what_is_planned_is_the_output_level() -> None:
    options = {k: v for k, v in OPTIONS.items() if k not in ("depth", "space")}
    for given in (options, options | {"depth": None}):
        assert zsu_fast.plan(tiny(), [1], **given).tail == "fc2"


def test_planning_leaves_the_model_alone() -> None:
    model = tiny()
    with untouched(model):
        zsu_fast.plan(model, [1], **OPTIONS | {"inplace": True})


def test_other_gpus_are_planned_on_paper(monkeypatch: pytest.MonkeyPatch) -> None:
    slow, fast = (zsu_fast.plan(tiny(), [1], hardware=n, **OPTIONS) for n in ("T4", "h100"))
    assert fast.basis == "on paper"
    assert "H100" in fast.device
    assert any("30 %" in note and "nothing was run" in note for note in fast.notes)
    assert fast.gpus == 1
    assert fast.seconds["synthesise"] <= slow.seconds["synthesise"]
    small = accelerators.Accelerator("small", 1e12, 1e12, 1e4)
    monkeypatch.setitem(accelerators.ACCELERATORS, "h100", small)
    assert zsu_fast.plan(tiny(), [1], hardware="h100", **OPTIONS).gpus is None


@pytest.mark.parametrize(
    ("options", "argument"),
    [({"hardware": "abacus"}, "hardware"), ({"hardware": 5}, "hardware"), ({"within": 0}, "within"),
     ({"within": "soon"}, "within"), ({"depth": "deep"}, "depth"), ({"tail": 1.5}, "tail")],
    ids=str,
)  # fmt: skip
def test_what_cannot_be_planned_is_refused(options: Any, argument: str) -> None:
    with pytest.raises(ArgumentError, match=argument):
        zsu_fast.plan(tiny(), [1], **OPTIONS | options)


def test_a_cpu_that_is_too_slow_is_an_error() -> None:
    """It said that 0 GPUs are needed."""
    with pytest.raises(ArgumentError, match=r"within: got 0\.001 s, and on cpu the run"):
        zsu_fast.plan(tiny(), [1], within=0.001, **OPTIONS)
    assert zsu_fast.plan(tiny(), [1], within=1e6, **OPTIONS).gpus == 0


def test_the_pilot_is_bounded(monkeypatch: pytest.MonkeyPatch) -> None:
    """Of a slow model few impressions are tried, and their ascent is cut short."""
    rows: list[int] = []

    def count(self: Ascent, batch: ActiveBatch) -> None:
        rows.append(len(batch.x))
        step(self, batch)

    step = Ascent.step
    monkeypatch.setattr(Ascent, "step", count)
    zsu_fast.plan(tiny(), [1, 3], **OPTIONS)
    usual = sum(rows)
    rows.clear()
    for name in ("_ASCENT_SECONDS", "_STEP_SECONDS", "_FIT_SECONDS"):
        monkeypatch.setattr(f"zsu_fast.planning.pilot.{name}", 0.0)
    got = zsu_fast.plan(tiny(), [1, 3], **OPTIONS)
    assert sum(rows) < 20 < usual
    assert any("cut short: 2 of its 3" in note for note in got.notes)
    assert got.ascent_steps == 200  # all 300 that are allowed, but for the one that was in time
    assert got.seconds["synthesise"] > 0


@pytest.mark.parametrize("space", ["input", "tail-input"])
def test_features_at_the_tail_are_counted_once(space: str) -> None:
    """There their cost is that of a few noise images, not of each impression."""
    memory = PeakMemory(torch.device("cpu"))
    seconds = Pilot(tiny(), [1], OPTIONS | {"space": space}, memory).run_stages().seconds
    once, each = seconds["features"], seconds["feature"]
    assert (once > 0, each > 0) == (space == "tail-input", space == "input")


def test_a_plan_says_which_level_it_is_for(planned: Plan) -> None:
    options = {k: v for k, v in OPTIONS.items() if k != "depth"}
    default = zsu_fast.plan(tiny(), [1], **options)
    assert default.depth == planned.depth == "output"
    assert any("goes deep" in note for note in default.notes)
    assert not any("goes deep" in note for note in planned.notes)
    assert "depth='output'" in planned.render()


def test_a_model_of_one_layer() -> None:
    model = nn.Sequential(nn.Flatten(), nn.Linear(192, 4))
    assert zsu_fast.plan(model, [1], **OPTIONS).tail == "1"


# --- the command -----------------------------------------------------------------------------


def test_the_command_prints_the_plan() -> None:
    arguments = ["plan", "lenet5", "--forget", "1", "--impressions-per-class", "4"]
    result = CliRunner().invoke(app, [*arguments, "--json"])
    assert result.exit_code == 0, result.output
    facts = json.loads(result.stdout)
    assert facts["impressions"] == 40
    assert facts["seconds"]["total"] > 0
    shown = CliRunner().invoke(app, [*arguments, "--hardware", "h100", "--within", "60"])
    assert shown.exit_code == 0, shown.output
    assert "on paper" in shown.stdout
    assert "GPUs within 60 s: 1" in shown.stdout
    for refused in (["--hardware", "abacus"], ["--depth", "deep"], ["--within", "0.0001"]):
        assert CliRunner().invoke(app, [*arguments, *refused]).exit_code == 2
