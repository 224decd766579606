"""The cache: impressions are found again, resumed after an interruption, never of another run."""

from __future__ import annotations

import os
import subprocess
import sys
import warnings
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from limited import SMALL, synthesize_limited
from support import QUICK, bits, same_bits, tiny
from torch import nn

from zsu_fast import ClassImpressions, Event, UnlearningWarning, ZeroShotUnlearner, ops

FIELDS = ("images", "labels", "confidence", "target", "steps", "hit")


@pytest.fixture
def steps(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """Gets the batch size of every ascent step that is taken."""
    taken: list[int] = []
    step = ops.ascent_step_

    def spy(x: torch.Tensor, *rest: Any, **named: Any) -> None:
        taken.append(len(x))
        step(x, *rest, **named)

    monkeypatch.setattr(ops, "ascent_step_", spy)
    return taken


def make(folder: Path | None, model: nn.Module | None = None, **options: Any) -> ClassImpressions:
    """16 impressions per shard: three shards of 40."""
    given = {"per_class": 8, "limits": SMALL} | options
    return synthesize_limited(given.pop("limits"), model or tiny(), cache=folder, **given)


def runner(forget: list[int], **options: Any) -> ZeroShotUnlearner:
    """Whose impressions come in three shards too."""
    run = ZeroShotUnlearner(tiny(), forget, **options)
    run.options.ascent = replace(run.options.ascent, limits=SMALL)
    return run


def same(a: ClassImpressions, b: ClassImpressions) -> bool:
    return all(bits(getattr(a, f)) == bits(getattr(b, f)) for f in FIELDS)


def shards(folder: Path) -> list[Path]:
    return sorted(folder.rglob("*.safetensors"))


class Cut(Exception):
    """The power fails."""


def cut_off(folder: Path, error: type[BaseException], after: int = 1) -> None:
    """A run that ends by ``error`` once ``after`` shards are there."""

    def callback(_event: Event) -> bool:
        if len(shards(folder)) >= after:
            raise error
        return False

    with pytest.raises(error):
        make(folder, callback=callback)
    assert len(shards(folder)) == after


# --- found again -----------------------------------------------------------------------------


def test_a_second_call_takes_no_step(tmp_path: Path, steps: list[int]) -> None:
    plain = make(None)
    steps.clear()
    first = make(tmp_path)
    assert steps
    assert len(shards(tmp_path)) == 3
    steps.clear()
    second = make(tmp_path)
    assert steps == []
    assert same(first, plain)
    assert same(first, second)


def test_unlearn_finds_them_too(tmp_path: Path, steps: list[int]) -> None:
    for space in ("input", "tail-input"):
        options = QUICK | {"cache": tmp_path, "space": space}
        first = runner([1, 3], **options)
        changed = first.run()
        assert steps
        steps.clear()
        again = runner([0], **options)  # other classes, the same impressions
        again.run()
        assert steps == []
        assert same(first.impressions, again.impressions)
        assert same_bits(changed, runner([1, 3], **options).run())
    assert len(shards(tmp_path)) == 6


def test_nothing_is_written_without_a_cache(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    make(None)
    assert list(tmp_path.iterdir()) == []


# --- resumed ---------------------------------------------------------------------------------


@pytest.mark.parametrize("error", [Cut, KeyboardInterrupt])
@pytest.mark.parametrize("after", [1, 2])
def test_a_run_that_was_cut_off_goes_on(
    tmp_path: Path, steps: list[int], error: type[BaseException], after: int
) -> None:
    undisturbed = make(None)
    whole = sum(steps)
    cut_off(tmp_path, error, after)
    steps.clear()
    assert same(make(tmp_path), undisturbed)
    assert 0 < sum(steps) < whole * (1.1 - after / 3)


@pytest.mark.parametrize("missing", [0, 1, 2])
def test_bits_do_not_depend_on_which_shards_were_there(
    tmp_path: Path, steps: list[int], missing: int
) -> None:
    first = make(tmp_path)
    shards(tmp_path)[missing].unlink()
    steps.clear()
    assert same(make(tmp_path), first)
    assert steps
    assert len(shards(tmp_path)) == 3


def test_a_run_stopped_by_the_callback_keeps_whole_shards_only(tmp_path: Path) -> None:
    part = make(tmp_path, callback=lambda event: event.done >= 20)
    assert 20 <= len(part) < 40
    assert len(shards(tmp_path)) == 1
    assert same(make(tmp_path), make(None))


# --- damaged, or of another run --------------------------------------------------------------


@pytest.mark.parametrize("damage", ["cut short", "empty", "flipped header", "text"])
def test_a_damaged_shard_is_made_anew(tmp_path: Path, steps: list[int], damage: str) -> None:
    first = make(tmp_path)
    path = shards(tmp_path)[1]
    content = path.read_bytes()
    path.write_bytes({
        "cut short": content[:-7],
        "empty": b"",
        "flipped header": b"\xff" * 8 + content[8:],
        "text": b"no tensors here",
    }[damage])  # fmt: skip
    steps.clear()
    with pytest.warns(UnlearningWarning, match=r"cache: .*00001\.safetensors.* made anew"):
        assert same(make(tmp_path), first)
    assert steps
    assert path.read_bytes() == content  # and stored again


def test_a_shard_that_is_not_of_this_run_is_not_used(tmp_path: Path) -> None:
    first, _ = make(tmp_path, seed=1), make(tmp_path, seed=2)
    of = {p.parent for p in shards(tmp_path)}
    assert len(of) == 2
    one, other = of
    (one / "00000.safetensors").write_bytes((other / "00000.safetensors").read_bytes())
    (other / "00000.safetensors").write_bytes((other / "00001.safetensors").read_bytes())
    assert same(make(tmp_path, seed=1), first)


@pytest.mark.parametrize(
    ("name", "value"),
    [("seed", 1), ("per_class", 9), ("confidence", (0.5, 0.9)), ("max_steps", 99),
     ("restarts", 1), ("step_size", 0.02), ("beta", 0.0), ("precision", "bfloat16"),
     ("mean", (0.0, 0.0, 0.0)), ("std", (1.0, 1.0, 1.0)), ("classes", [0, 1, 2, 3])],
)  # fmt: skip
def test_another_setting_does_not_hit(
    tmp_path: Path, steps: list[int], name: str, value: Any
) -> None:
    make(tmp_path, precision="float32")
    steps.clear()
    options = {"precision": "float32", name: value}
    made = make(tmp_path, **options)
    assert steps
    assert same(made, make(None, **options))


def other_weights() -> nn.Module:
    model = tiny()
    with torch.no_grad():
        model.fc2.bias[0] += 1e-3
    return model


def other_statistics() -> nn.Module:
    model = tiny()
    model.bn.running_mean += 1e-3
    return model


def other_activation() -> nn.Module:
    """The same weights by name and value, another function."""
    model = tiny()
    model.act = nn.SiLU()
    return model


@pytest.mark.parametrize("other", [other_weights, other_statistics, other_activation])
def test_another_model_does_not_hit(tmp_path: Path, steps: list[int], other: Any) -> None:
    make(tmp_path)
    steps.clear()
    made = make(tmp_path, other())
    assert steps
    assert same(made, make(None, other()))


def test_shards_of_another_size_do_not_hit(tmp_path: Path, steps: list[int]) -> None:
    make(tmp_path)
    steps.clear()
    assert len(make(tmp_path, limits=replace(SMALL, batches_per_shard=2))) == 40
    assert steps


# --- a folder that can't be used -------------------------------------------------------------


def test_an_unwritable_folder_warns_once_and_the_run_goes_on(tmp_path: Path) -> None:
    in_the_way = tmp_path / "file"
    in_the_way.write_text("not a folder")
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        made = make(in_the_way / "cache")
    said = [str(w.message) for w in caught if "cache:" in str(w.message)]
    assert len(said) == 1  # for three shards
    assert str(in_the_way) in said[0]
    assert "The run goes on." in said[0]
    assert same(made, make(None))


def test_two_processes_with_one_folder(tmp_path: Path) -> None:
    script = (
        "import sys, torch\n"
        "from limited import SMALL, synthesize_limited\n"
        "from zsu_fast.models import zoo\n"
        "torch.set_num_threads(1)\n"
        "made = synthesize_limited(SMALL, zoo.load('lenet5'), per_class=4, precision='float32',\n"
        "                          cache=sys.argv[1])\n"
        "made.save(sys.argv[2])\n"
    )
    here = Path(__file__).resolve()
    path = os.pathsep.join(map(str, (here.parents[2], here.parent)))
    environment = os.environ | {"PYTHONPATH": path, "OMP_NUM_THREADS": "1"}
    outputs = [tmp_path / f"made{i}.safetensors" for i in range(2)]
    folder = tmp_path / "cache"
    running = [
        subprocess.Popen(
            [sys.executable, "-W", "error", "-c", script, str(folder), str(output)],
            env=environment, cwd=tmp_path,
        )
        for output in outputs
    ]  # fmt: skip
    assert [process.wait(timeout=300) for process in running] == [0, 0]
    first, second = (ClassImpressions.load(output) for output in outputs)
    assert same(first, second)
    assert [p.name for p in shards(folder)] == [f"{i:05}.safetensors" for i in range(3)]
    assert sorted(p for p in folder.rglob("*") if p.is_file()) == shards(folder)  # no drafts left
