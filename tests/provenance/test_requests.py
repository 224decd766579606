"""Successive requests: ``forgotten=``, and the command line with a ledger."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from support import (
    QUICK,
    assert_forgets,
    deep_run,
    same_bits,
    tiny,
    tiny_data,
    untouched,
)
from typer.testing import CliRunner

import zsu_fast
from zsu_fast import ArgumentError, Ledger
from zsu_fast.cli.app import app
from zsu_fast.models import checkpoint, zoo
from zsu_fast.models.compact_file import file_compaction
from zsu_fast.models.loading import load_model
from zsu_fast.models.parameters import weights_hash
from zsu_fast.provenance.ledger import verify
from zsu_fast.unlearner import ZeroShotUnlearner

LENET = ["--impressions-per-class", "8", "--tail", "last"]


def call(*arguments: str, code: int = 0) -> str:
    result = CliRunner().invoke(app, list(arguments))
    assert result.exit_code == code, result.output
    return result.stdout if "--json" in arguments else result.output


def test_what_was_forgotten_stays_forgotten() -> None:
    model, before = tiny(), []
    for wanted in (3, 0, 4):
        run = ZeroShotUnlearner(model, wanted, forgotten=before, **QUICK, tail="last")
        with untouched(model):
            model = run.run()
        impressions = run.impressions
        assert impressions is not None
        assert impressions.labels.unique().tolist() == [c for c in range(5) if c not in before]
        assert run.forget_mask.nonzero()[:, 0].tolist() == sorted([*before, wanted])
        assert run.record.forget == [wanted]
        assert run.record.forgotten == sorted(before)
        assert not [w for w in run.record.warnings if "no impression" in w]
        before.append(wanted)
        assert_forgets(model, before)


def test_tail_inputs_are_not_synthesised_for_forgotten_classes() -> None:
    run = ZeroShotUnlearner(
        tiny(), 0, forgotten=[3], tail="last", **QUICK | {"space": "tail-input"}
    )
    assert run.synthesise().labels.unique().tolist() == [0, 1, 2, 4]
    run.run()
    assert run.result is not None
    assert run.result.best is not None
    assert run.result.best.leak <= 0.01


def test_impressions_reach_every_remaining_class() -> None:
    """Other logits may lead so far that raising one logit is not enough."""
    model = zoo.load("lenet5")
    with torch.no_grad():
        model.fc3.bias[0] += 50
    restarted = zsu_fast.synthesize(model, range(10), per_class=4, progress=False)
    assert restarted.hit_rate == 1.0
    once = zsu_fast.synthesize(model, range(10), per_class=4, restarts=0, progress=False)
    assert once.hit_rate < 0.9


def test_without_forgotten_they_are_synthesised_again() -> None:
    first = zsu_fast.unlearn(tiny(), 3, **QUICK, tail="last")
    run = ZeroShotUnlearner(first, 0, **QUICK, tail="last", max_steps=20, restarts=0)
    run.run()
    assert [w for w in run.record.warnings if "no impression" in w and "class 3" in w]


def test_the_leak_includes_classes_forgotten_before() -> None:
    """The model still predicts class 3, declared forgotten: the first validation shows it."""
    run = ZeroShotUnlearner(tiny(), 0, forgotten=3, **QUICK, tail="last")
    without = ZeroShotUnlearner(tiny(), 0, **QUICK, tail="last")
    all_classes = zsu_fast.synthesize(tiny(), per_class=8, progress=False)
    run.impressions = without.impressions = all_classes
    for each in (run, without):
        each.split()
        each.fit()
    assert run.history[0].leak > without.history[0].leak + 0.1
    assert run.result is not None
    assert run.result.best is not None
    assert run.result.best.leak <= 0.01


def test_given_impressions_may_lack_forgotten_classes() -> None:
    first = zsu_fast.unlearn(tiny(), 3, **QUICK, tail="last")
    some = zsu_fast.synthesize(first, [0, 1, 2, 4], per_class=8, progress=False)
    options = QUICK | {"tail": "last", "impressions": some}
    assert_forgets(zsu_fast.unlearn(first, 0, forgotten=[3], **options), [0, 3])
    with pytest.raises(ArgumentError, match="impressions"):
        zsu_fast.unlearn(first, 0, **options)


@pytest.mark.parametrize("none", [None, [], (), torch.empty(0, dtype=torch.int64)])
def test_nothing_forgotten_before(none: Any) -> None:
    options = QUICK | {"tail": "last", "steps": 20, "impressions_per_class": 4}
    result = zsu_fast.unlearn(tiny(), 1, forgotten=none, **options)
    assert same_bits(result, zsu_fast.unlearn(tiny(), 1, **options))


@pytest.mark.parametrize(
    ("forget", "forgotten", "words"),
    [
        ([1], [1], "forgotten before"),
        ([1, 2], [3, 2], r"\[2\]"),
        ([1], [0, 2, 3, 4], "nothing is left"),
        ([1], [5], "forgotten: got .*out of range"),
        ([1], "23", "forgotten"),
        ([1], [True], "forgotten"),
        ([1], [0.5], "forgotten"),
        ([1], -1, "negative"),
    ],
)
def test_bad_arguments(forget: Any, forgotten: Any, words: str) -> None:
    model = tiny()
    with untouched(model), pytest.raises(ArgumentError, match=words):
        zsu_fast.unlearn(model, forget, forgotten=forgotten, **QUICK)


def test_a_compact_result_and_the_requests_after_it(tmp_path: Path) -> None:
    book = tmp_path / "ledger"
    options: dict[str, Any] = QUICK | {"tail": "last", "ledger": book}
    model = tiny()
    run = ZeroShotUnlearner(model, 1, compact=True, **options)
    with untouched(model):
        first = run.run()
    assert first is run.unlearned
    assert (first.fc2.out_features, model.fc2.out_features) == (4, 5)
    assert run.record.compact["new_index"] == {"0": 0, "2": 1, "3": 2, "4": 3}
    assert run.record.weights_after == weights_hash(first)
    full = zsu_fast.unlearn(tiny(), 1, **QUICK, tail="last")
    assert run.full_size is not None
    assert same_bits(run.full_size, full)
    kept = full.fc2.weight[[0, 2, 3, 4]]
    assert torch.equal(first.fc2.weight, kept)
    assert Ledger(book).forgotten() == []  # no row is left of what was forgotten
    with pytest.raises(ArgumentError, match=r"forgotten: got \[1\], but by .*compact"):
        zsu_fast.unlearn(first, 0, forgotten=1, **options)
    second = zsu_fast.unlearn(first, 0, **options)
    assert Ledger(book).forgotten() == [0]
    third = zsu_fast.unlearn(second, 3, forgotten=[0], compact=True, **options)  # 0 goes as well
    assert third.fc2.out_features == 2
    # of the original classes, 2 and 3 are left: they are still told apart
    images, labels = tiny_data()
    chosen = (labels == 2) | (labels == 3)
    assert (third(images[chosen]).argmax(1) + 2 == labels[chosen]).float().mean() > 0.95
    assert Ledger(book).forgotten() == []
    assert verify(book, model=third) == []


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"inplace": True}, "inplace: got True with compact=True"),
        ({"compact": "yes"}, "compact: got 'yes'"),
        ({"forgotten": [0, 2, 3]}, "single logit, number 4"),
    ],
)
def test_compact_is_refused_before_the_work(options: dict[str, Any], words: str) -> None:
    model = tiny()
    with untouched(model), pytest.raises(ArgumentError, match=words):
        ZeroShotUnlearner(model, 1, **QUICK | {"compact": True} | options)


def test_a_deep_compact_result() -> None:
    run, full = deep_run()
    compact_run, small = deep_run(compact=True)
    assert run.record.depth["level"] == compact_run.record.depth["level"] == "deep"
    images = tiny_data()[0]
    kept = [0, 2, 4]
    torch.testing.assert_close(small(images), full(images)[:, kept], atol=1e-5, rtol=1e-5)


# --- from the command line -------------------------------------------------------------------


def test_two_requests_with_files_and_ledger(tmp_path: Path) -> None:
    one, two, delta, book, copy, record = (
        str(tmp_path / n) for n in ("1.safetensors", "2.pt", "d", "ledger", "copy.pt", "record")
    )
    call("unlearn", "lenet5", "--forget", "5", "--out", one, "--ledger", book, *LENET)
    printed = json.loads(
        call("unlearn", "lenet5", "--weights", one, "--forget", "2", "--delta", delta, "--out", two,
             "--record", record, "--ledger", book, "--request", "R-2", "--json", *LENET)
    )  # fmt: skip
    assert printed["delta"] == delta
    assert printed["ledger"]["request"] == "R-2"
    assert printed["record"]["forgotten"] == [5]
    applied = json.loads(call("apply", "lenet5", delta, "--weights", one, "--out", copy, "--json"))
    assert applied["weights_after"] == printed["record"]["weights_after"]
    models = [zoo.build("lenet5") for _ in range(2)]
    for model, file in zip(models, (two, copy), strict=True):
        checkpoint.load_into(model, file)
    assert same_bits(*models)
    good = json.loads(call("ledger", "verify", book, "--head", printed["ledger"]["head"], "--model",
                           "lenet5", "--weights", copy, "--json"))  # fmt: skip
    assert good == {"entries": 2, "head": printed["ledger"]["head"], "forgotten": [2, 5]}
    assert "2 entries" in call("ledger", "verify", book)
    assert "R-2" in call("ledger", "show", book)
    assert [e["forget"] for e in json.loads(call("ledger", "show", book, "--json"))] == [[5], [2]]
    wrong = call("ledger", "verify", book, "--model", "lenet5", "--weights", one, code=2)
    assert "the model has weights" in wrong
    Path(book).write_bytes(Path(book).read_bytes().replace(b'"forget":[5]', b'"forget":[6]'))
    assert "edited" in call("ledger", "verify", book, code=2)
    assert "edited" in call("ledger", "show", book, code=2)


def test_only_a_delta_and_wrong_bases(tmp_path: Path) -> None:
    delta, out = tmp_path / "d", tmp_path / "out.safetensors"
    text = call("unlearn", "lenet5", "--forget", "1", "--delta", str(delta), *LENET)
    assert str(delta) in text.replace("\n", "")
    call("apply", "lenet5", str(delta), "--out", str(out))
    refused = call("apply", "lenet5", str(delta), "--weights", str(out), "--out",
                   str(tmp_path / "x.pt"), code=2)  # fmt: skip
    assert "fits weights" in refused
    assert "exists" in call("apply", "lenet5", str(delta), "--out", str(out), code=2)
    neither = call("unlearn", "lenet5", "--forget", "1", code=2)
    assert "--delta" in neither
    assert sorted(p.name for p in tmp_path.iterdir()) == ["d", "out.safetensors"]


def test_compact_files_and_folders(tmp_path: Path) -> None:
    one, two, three, folder, book = (
        str(tmp_path / n) for n in ("1.safetensors", "2.safetensors", "3.safetensors", "f", "l")
    )
    printed = json.loads(
        call("unlearn", "lenet5", "--forget", "3,5", "--compact", "--out", one, "--out-folder",
             folder, "--ledger", book, "--report", str(tmp_path / "r.html"), "--json", *LENET)
    )  # fmt: skip
    assert printed["record"]["compact"]["classes"] == 8
    assert printed["verdict"]  # the audit of the same result before the rows were cut
    again = load_model("lenet5", one)
    assert weights_hash(again) == printed["record"]["weights_after"]
    assert same_bits(again, load_model(f"hf:{folder}"))
    assert again.fc3.out_features == 8
    record = json.loads((tmp_path / "f" / "record.json").read_text())
    assert record["compact"]["new_index"]["4"] == 3
    assert json.loads(call("ledger", "verify", book, "--json"))["forgotten"] == []
    # the next request, by the new numbers: the file says what was cut by both
    text = call("unlearn", "lenet5", "--weights", one, "--forget", "3", "--compact", "--out", two,
                "--ledger", book, *LENET)  # fmt: skip
    assert "7 classes left" in text
    assert list(file_compaction(two).new_index) == [0, 1, 2, 6, 7, 8, 9]
    assert load_model("lenet5", two).fc3.out_features == 7
    # a request that is not compact: its file still says what was cut before
    call("unlearn", "lenet5", "--weights", two, "--forget", "0", "--out", three, *LENET)
    assert load_model("lenet5", three).fc3.out_features == 7
    last = ["--out", str(tmp_path / "4.safetensors"), *LENET]
    refused = call("unlearn", "lenet5", "--weights", three, "--forget", "1", "--forgotten", "0,3",
                   *last, code=2)  # fmt: skip
    assert "forgotten: got [3], but" in refused.replace("\n", " ")
    call("unlearn", "lenet5", "--weights", three, "--forget", "1", "--forgotten", "0", *last)


@pytest.mark.parametrize(
    ("outputs", "words"),
    [
        (["--delta", "d", "--out", "o.safetensors"], "delta: got --compact"),
        (["--out", "o.pt"], "out: got o.pt with --compact"),
        (["--out-folder", "there"], "not empty"),
    ],
)
def test_compact_outputs_that_cannot_be_right(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, outputs: list[str], words: str
) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "there").mkdir()
    (tmp_path / "there" / "file").write_text("")
    text = call("unlearn", "lenet5", "--forget", "1", "--compact", *outputs, *LENET, code=2)
    assert words in " ".join(text.split())
    assert [p.name for p in tmp_path.iterdir()] == ["there"]


def test_no_folder_without_its_ledger_entry(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(*_: Any) -> None:
        raise zsu_fast.OutputError("ledger: no space")

    monkeypatch.setattr(Ledger, "append", fail)
    call("unlearn", "lenet5", "--forget", "1", "--ledger", str(tmp_path / "ledger"),
         "--out-folder", str(tmp_path / "f"), *LENET, code=2)  # fmt: skip
    assert list(tmp_path.iterdir()) == []


def test_no_file_without_its_ledger_entry(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(*_: Any) -> None:
        raise zsu_fast.OutputError("ledger: no space")

    monkeypatch.setattr(Ledger, "append", fail)
    book = tmp_path / "ledger"
    arguments = ["unlearn", "lenet5", "--forget", "1", "--ledger", str(book), *LENET]
    call(*arguments, "--out", str(tmp_path / "o.pt"), "--delta", str(tmp_path / "d"), code=2)
    assert list(tmp_path.iterdir()) == []


def test_a_ledger_of_other_weights_is_refused_before_the_work(tmp_path: Path) -> None:
    book, out = tmp_path / "ledger", tmp_path / "o.pt"
    call("unlearn", "lenet5", "--forget", "1", "--ledger", str(book), "--out", str(out), *LENET)
    again = ["unlearn", "lenet5", "--forget", "2", "--ledger", str(book), *LENET, "--out"]
    assert "--other-base" in call(*again, str(tmp_path / "p.pt"), code=2)
    assert not (tmp_path / "p.pt").exists()
    call(*again, str(tmp_path / "p.pt"), "--other-base")
    assert verify(book) == []
    entries = Ledger(book).entries()
    assert entries[1]["hash_before"] == weights_hash(zoo.load("lenet5"))
    assert (entries[1]["new_base"], entries[1]["forgotten"]) == (True, [])
