"""Gallery files: what is written is read, and what can't be compared is refused."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from zsu_fast import ArgumentError, CheckpointError, OutputError
from zsu_fast.models import checkpoint
from zsu_fast.models.gallery import Gallery


def vectors(count: int = 4, width: int = 6) -> torch.Tensor:
    return torch.randn(count, width, generator=torch.Generator().manual_seed(0))


def test_a_saved_gallery_is_read_back_with_everything_in_it(tmp_path: Path) -> None:
    gallery = Gallery(
        vectors(), ("jane", "joe"), torch.tensor([0, 1, 1, 0]), "dot", 12.5,
        torch.tensor([0.5, -1.0]), "abc", {"images": 3},
    )  # fmt: skip
    gallery.save(tmp_path / "g.safetensors")
    read = Gallery.load(tmp_path / "g.safetensors")
    assert torch.equal(read.templates, gallery.templates)
    assert read.identity is not None
    assert read.identity.tolist() == [0, 1, 1, 0]
    assert read.bias is not None
    assert read.bias.tolist() == [0.5, -1.0]
    facts = (read.names, read.metric, read.scale, read.encoder, read.enrolled)
    assert facts == (("jane", "joe"), "dot", 12.5, "abc", {"images": 3})
    assert torch.equal(read.of("joe"), gallery.templates[[1, 2]])


def test_an_existing_gallery_is_replaced_only_with_force(tmp_path: Path) -> None:
    path = tmp_path / "g.safetensors"
    Gallery(vectors(1), ("jane",)).save(path)
    before = path.read_bytes()
    with pytest.raises(OutputError, match="exists"):
        Gallery(vectors(1) * 2, ("jane",)).save(path)
    assert path.read_bytes() == before
    Gallery(vectors(1) * 2, ("jane",)).save(path, force=True)
    assert path.read_bytes() != before


@pytest.mark.parametrize(
    ("changed", "says"),
    [
        ({"templates": torch.full((2, 3), torch.nan)}, "row 0, 1 has NaN"),
        ({"templates": torch.tensor([[1.0, 2.0], [0.0, 0.0]])}, "row 1 is zero"),
        ({"templates": torch.ones(2)}, r"shape \(2,\)"),
        ({"templates": torch.ones(0, 3)}, r"shape \(0, 3\)"),
        ({"templates": torch.ones(2, 3, dtype=torch.int64)}, "torch.int64"),
        ({"names": ("jane", "jane")}, "'jane' occurs twice"),
        ({"names": ("jane", " ")}, "no name"),
        ({"names": ()}, "names"),
        ({"names": ("jane", "joe", "ann")}, r"identities of shape \(3,\)"),
        ({"identity": torch.tensor([0, 0])}, "'joe' has no template"),
        ({"identity": torch.tensor([0, 2])}, "from 0 to 2, with 2 names"),
        ({"identity": torch.tensor([0.0, 1.0])}, "torch.float32"),
        ({"metric": "manhattan"}, "cosine, dot, euclidean"),
        ({"scale": 0.0}, "scale"),
        ({"bias": torch.tensor([0.0, torch.inf])}, "not finite"),
        ({"bias": torch.zeros(3)}, r"shape \(3,\)"),
    ],
)
def test_a_gallery_that_cannot_be_compared_is_refused(changed: dict[str, Any], says: str) -> None:
    given: dict[str, Any] = {"templates": vectors(2), "names": ("jane", "joe")}
    with pytest.raises(ArgumentError, match=says):
        Gallery(**(given | changed))


@pytest.mark.parametrize(
    ("tensors", "metadata", "says"),
    [
        ({"templates": vectors(2)}, {}, "not a zsu_fast gallery"),
        ({"templates": vectors(2)}, {"format": "zsu_fast.gallery/9"}, "this version"),
        ({"templates": vectors(2)}, {"format": "zsu_fast.gallery/1"}, "has no 'names'"),
        (
            {"templates": vectors(1), "identity": torch.tensor([0])},
            {"format": "zsu_fast.gallery/1", "names": "[", "metric": "dot"},
            "damaged",
        ),
        (
            {"templates": vectors(1) * torch.nan, "identity": torch.tensor([0])},
            {"format": "zsu_fast.gallery/1", "names": '["jane"]', "metric": "dot"},
            "g.safetensors can't be used: templates: row 0 has NaN",
        ),
    ],
)
def test_a_file_that_is_no_gallery_is_refused(
    tmp_path: Path, tensors: dict[str, torch.Tensor], metadata: dict[str, str], says: str
) -> None:
    checkpoint.save_tensors(tmp_path / "g.safetensors", tensors, metadata)
    with pytest.raises(CheckpointError, match=says):
        Gallery.load(tmp_path / "g.safetensors")


def test_a_gallery_of_other_weights_is_warned_of() -> None:
    encoder = torch.nn.Linear(3, 6)
    with pytest.warns(UserWarning, match="were enrolled with weights abc"):
        Gallery(vectors(1), ("jane",), encoder="abc").check_encoder(encoder)
