"""`zsu_fast.doctor`: how the ascent is computed on this machine, and was in earlier runs."""

from __future__ import annotations

import platform
from pathlib import Path

import pytest
import torch

import zsu_fast
from zsu_fast.errors import ArgumentError
from zsu_fast.planning import doctor as doctor_module
from zsu_fast.planning.doctor import render
from zsu_fast.runtime.torch_settings import has_bfloat16
from zsu_fast.synthesis.cache import Cache
from zsu_fast.synthesis.candidates import Choice, remembered

HERE = {"processor": platform.processor(), "threads": torch.get_num_threads()}
FUSED = Choice("fused convolutions", 16, 0.5)


def folder_of_runs(path: Path) -> Path:
    """A cache with two choices, a shard of another kind, and a damaged file."""
    facts = {"weights": "a" * 64, "classes": [0, 2, 5], "format": 1}
    remembered(path, facts | HERE, lambda: FUSED)
    remembered(
        path, facts | HERE | {"threads": 99, "weights": "b" * 64}, lambda: Choice("default", 4)
    )
    Cache(path, facts).save(0, {"rows": torch.zeros(3)})
    (path / "damaged").mkdir()
    (path / "damaged" / "00000.safetensors").write_bytes(b"nothing")
    return path


def test_it_names_the_choices_in_a_cache(tmp_path: Path) -> None:
    found = zsu_fast.doctor(folder_of_runs(tmp_path))["ascent"]["choices"]
    first, other = sorted(found, key=lambda choice: choice["weights"])
    assert first == HERE | {
        "computed": str(FUSED), "weights": "a" * 64, "classes": 3, "here": True,
    }  # fmt: skip
    assert (other["computed"], other["here"]) == ("default, batches of 4", False)
    text = render(zsu_fast.doctor(tmp_path))
    assert (
        f"weights {'a' * 12}: fused convolutions, batches of 16: 0.50 of the default's time" in text
    )
    assert f"weights {'b' * 12}: default, batches of 4, another machine" in text


@pytest.mark.parametrize("bfloat16", [True, False])
def test_it_says_what_is_considered_here(monkeypatch: pytest.MonkeyPatch, bfloat16: bool) -> None:
    assert zsu_fast.doctor()["ascent"]["bfloat16"] == has_bfloat16(torch.device("cpu"))
    monkeypatch.setattr(doctor_module, "has_bfloat16", lambda _device: bfloat16)
    report = zsu_fast.doctor()
    assert report["ascent"]["choices"] is None
    assert ("float32" in report["ascent"]["variants"]) == bfloat16
    assert ("has no bfloat16" in render(report)) != bfloat16
    assert "name their cache" in render(report)


def test_a_cache_without_choices(tmp_path: Path) -> None:
    assert "no choice is stored" in render(zsu_fast.doctor(tmp_path))
    with pytest.raises(ArgumentError, match="which is no folder"):
        zsu_fast.doctor(tmp_path / "absent")
