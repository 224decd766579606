"""Relearning: when it ends, where it starts, and the Anamnesis Index."""

from __future__ import annotations

from types import SimpleNamespace

import pytest
import torch
from support import SPEC, snapshot, tiny, tiny_data

from zsu_fast.evaluation.audit.audited_model import audited_copy, variant
from zsu_fast.evaluation.audit.relearning import RelearnTask, add_anamnesis_index, relearn
from zsu_fast.evaluation.audit.result import TRAINED_WORDS, Row


def test_relearning_ends_at_the_goal_and_starts_alike() -> None:
    images, labels = tiny_data(100)
    test_images, test_labels = tiny_data(100, seed=9)
    mine = test_labels == 1
    original = audited_copy("original", tiny(), SPEC, torch.device("cpu"))
    hidden = variant(original, "hidden")
    with torch.no_grad():
        hidden.last_layer.bias[1] = -1e9

    def task(goal: float) -> RelearnTask:
        return RelearnTask(images, labels, test_images[mine], test_labels[mine], [1], goal, 60, 0)

    before = snapshot(original.model)
    for trained in TRAINED_WORDS:
        done = relearn(original, task(80), trained)
        assert done.steps is not None
        assert done.accuracy >= 80
        assert done.curve[0] == (0, 0.0)
        assert done.curve[-1][0] == done.steps
        assert relearn(hidden, task(80), trained).curve == done.curve
        never = relearn(original, task(101), trained)
        assert never.steps is None
        assert never.curve[-1][0] == 60
    assert snapshot(original.model) == before


def test_one_lucky_measurement_is_not_relearned() -> None:
    """The goal has to be met by the mean of the last three measurements."""
    images, labels = tiny_data(100)
    original = audited_copy("original", tiny(), SPEC, torch.device("cpu"))
    mine = labels == 1
    task = RelearnTask(images, labels, images[mine], labels[mine], [1], 80, 60, 0)
    done = relearn(original, task, "full")
    measured = [fa for _, fa in done.curve]
    assert measured[-1] >= 80
    assert measured[-2] >= 80 or done.accuracy < measured[-1]
    assert done.accuracy == pytest.approx(sum(measured[-3:]) / 3)
    assert sum(measured[-4:-1]) / 3 < 80


@pytest.mark.parametrize(("steps", "index"), [(163, 163 / 400), (240, None), (None, None)])
def test_a_golden_model_that_never_relearned_gives_no_passing_index(
    steps: int | None, index: float | None
) -> None:
    """163 is below half of more than 400 steps, whatever the golden model takes; 240 may not be."""
    rows = {name: Row(name) for name in ("original", "unlearned", "golden")}
    context = SimpleNamespace(rows=rows, notes=[])
    counts = {"original": 126, "unlearned": steps, "golden": None}
    add_anamnesis_index(context, "full", counts, 400)  # type: ignore[arg-type]
    assert rows["unlearned"].values.get("ain_full") == index
    assert rows["original"].values["ain_full"] == 126 / 400
    if index is None:
        assert "golden model" in rows["unlearned"].missing["ain_full"]
