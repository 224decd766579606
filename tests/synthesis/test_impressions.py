"""The file format of class impressions."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file
from support import bits, tiny
from torch import nn

from zsu_fast import (
    CheckpointError,
    ClassImpressions,
    OutputError,
    synthesize,
)

FIELDS = ("images", "labels", "confidence", "target", "steps", "hit")


def make(model: nn.Module | None = None, classes: Any = None, **options: Any) -> ClassImpressions:
    return synthesize(model or tiny(), classes, progress=False, **({"per_class": 8} | options))


def test_save_and_load(tmp_path: Path) -> None:
    made = make(per_class=4, mean=(0.1, 0.2, 0.3), std=(0.4, 0.5, 0.6))
    path = tmp_path / "made.safetensors"
    made.save(path)
    loaded = ClassImpressions.load(path)
    assert all(bits(getattr(made, f)) == bits(getattr(loaded, f)) for f in FIELDS)
    assert loaded.spec == made.spec
    with pytest.raises(OutputError, match="exists"):
        made.save(path)
    made.save(path, force=True)


def test_other_files_are_refused(tmp_path: Path) -> None:
    path = tmp_path / "a.safetensors"
    with pytest.raises(CheckpointError):
        ClassImpressions.load(path)
    save_file({"images": torch.zeros(1)}, path)
    with pytest.raises(CheckpointError, match=r"holds no class impressions.*synthesize"):
        ClassImpressions.load(path)
    made = make(per_class=4)
    made.save(path, force=True)
    path.write_bytes(path.read_bytes()[:-9])
    with pytest.raises(CheckpointError, match="not an intact safetensors"):
        ClassImpressions.load(path)


def test_another_version_of_the_format_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "a.safetensors"
    save_file({"images": torch.zeros(1)}, path, {"format": "zsu_fast.impressions/2"})
    match = r"the format 'zsu_fast\.impressions/2'.*reads 'zsu_fast\.impressions/1'"
    with pytest.raises(CheckpointError, match=match):
        ClassImpressions.load(path)
