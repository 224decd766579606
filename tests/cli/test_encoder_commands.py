"""Encoders on the command line: enroll, then every command with --gallery."""

from __future__ import annotations

import json
import warnings
from pathlib import Path

import numpy as np
import pytest
import torch
from command import call
from encoder_case import NAMES, tiny_encoder
from PIL import Image
from support import SPEC, tiny_data

from zsu_fast.models import checkpoint
from zsu_fast.models.gallery import Gallery
from zsu_fast.models.parameters import weights_hash

MODEL = "encoder_case:tiny_encoder"
QUICK = ["--impressions-per-class", "8", "--steps", "60"]


def write_images(path: Path, count: int, seed: int) -> str:
    """Labelled images as uint8, with the names of the identities."""
    images, labels = tiny_data(count, seed)
    mean, std = (torch.tensor(v)[:, None, None] for v in (SPEC.mean, SPEC.std))
    pixels = ((images * std + mean) * 255).round().clamp(0, 255).byte()
    np.savez(path, images=pixels.numpy(), labels=np.array([NAMES[c] for c in labels.tolist()]))
    return str(path)


@pytest.fixture(scope="module")
def files(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a gallery, images, and all files of a run that forgets bob."""
    folder = tmp_path_factory.mktemp("encoder")
    write_images(folder / "enrol.npz", 50, 2)
    write_images(folder / "test.npz", 200, 3)
    gallery, made = str(folder / "gallery.safetensors"), folder / "made"
    made.mkdir()
    call("enroll", MODEL, str(folder / "enrol.npz"), "--out", gallery)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        said = call(
            "unlearn", MODEL, "--gallery", gallery, "--forget", "bob", *QUICK,
            "--out", str(made / "encoder.safetensors"), "--delta", str(made / "delta.safetensors"),
            "--record", str(made / "record.json"), "--ledger", str(made / "ledger.jsonl"),
            "--out-gallery", str(made / "gallery.safetensors"),
            "--report", str(made / "report.html"), "--report-data", str(folder / "test.npz"),
        )  # fmt: skip
    (made / "said.txt").write_text(said)
    return folder


def test_enroll_writes_a_gallery_of_the_named_identities(files: Path) -> None:
    gallery = Gallery.load(files / "gallery.safetensors")
    assert gallery.names == NAMES
    assert gallery.encoder == weights_hash(tiny_encoder())
    out = str(files / "few.safetensors")
    facts = json.loads(call(
        "enroll", MODEL, str(files / "enrol.npz"), "--out", out, "--images-per-identity", "3",
        "--every-image", "--metric", "dot", "--json",
    ))  # fmt: skip
    assert (facts["identities"], facts["templates"], facts["width"]) == (5, 15, 32)
    assert Gallery.load(out).metric == "dot"
    assert "exists" in call("enroll", MODEL, str(files / "enrol.npz"), "--out", out, code=2)
    assert "cosine, dot" in call(
        "enroll", MODEL, str(files / "enrol.npz"), "--out", out, "--force", "--metric", "l1", code=2
    )


def test_folders_are_identities_and_an_empty_one_is_refused(tmp_path: Path) -> None:
    images, labels = tiny_data(10, 2)
    for index, (image, label) in enumerate(zip(images, labels.tolist(), strict=True)):
        folder = tmp_path / "people" / NAMES[label]
        folder.mkdir(parents=True, exist_ok=True)
        pixels = ((image - image.min()) * 60).byte().permute(1, 2, 0).numpy()
        Image.fromarray(pixels).save(folder / f"{index}.png")
    out = str(tmp_path / "gallery.safetensors")
    call("enroll", MODEL, str(tmp_path / "people"), "--out", out)
    assert Gallery.load(out).names == NAMES
    assert Gallery.load(out).enrolled["images"] == [2] * 5
    (tmp_path / "people" / "zoe").mkdir()
    says = call("enroll", MODEL, str(tmp_path / "people"), "--out", out, "--force", code=2)
    assert "there is no image of 'zoe'" in says
    assert Gallery.load(out).names == NAMES


def test_unlearn_writes_the_encoder_in_its_own_layout(files: Path) -> None:
    made = files / "made"
    said = (made / "said.txt").read_text()
    assert "Forgot 1 of 5 identities" in said
    assert "Written: the encoder alone." in said
    tensors = checkpoint.load_weights(made / "encoder.safetensors")
    assert set(tensors) == set(tiny_encoder().state_dict())
    record = json.loads((made / "record.json").read_text())
    assert record["weights_before"] == weights_hash(tiny_encoder())
    encoder = tiny_encoder()
    encoder.load_state_dict(tensors)
    assert record["weights_after"] == weights_hash(encoder)


def test_the_gallery_that_is_written_is_without_the_forgotten(files: Path) -> None:
    before = Gallery.load(files / "gallery.safetensors")
    after = Gallery.load(files / "made" / "gallery.safetensors")
    assert after.names == ("ann", "cleo", "dan", "eve")
    assert torch.equal(after.of("dan"), before.of("dan"))
    assert after.encoder == before.encoder


def test_the_ledger_names_nobody_and_knows_the_encoder(files: Path) -> None:
    made = files / "made"
    assert "bob" not in (made / "ledger.jsonl").read_text()
    ledger, weights = str(made / "ledger.jsonl"), str(made / "encoder.safetensors")
    gallery = str(files / "gallery.safetensors")
    used = ["--model", MODEL, "--weights", weights, "--gallery", gallery]
    assert "all intact" in call("ledger", "verify", ledger, *used)
    assert "the model has weights" in call("ledger", "verify", ledger, "--model", MODEL, code=2)
    assert "without --model" in call("ledger", "verify", ledger, "--gallery", gallery, code=2)


def test_who_holds_the_gallery_finds_the_request(files: Path) -> None:
    ledger = str(files / "made" / "ledger.jsonl")
    found = json.loads(
        call("ledger", "find", ledger, "--gallery", str(files / "gallery.safetensors"), "--json")
    )
    assert [row["identities"] for row in found] == [["bob"]]
    left = str(files / "made" / "gallery.safetensors")
    assert "No request concerns" in call("ledger", "find", ledger, "--gallery", left)


def test_a_delta_gives_the_same_encoder(files: Path) -> None:
    made, out = files / "made", str(files / "applied.safetensors")
    gallery = str(files / "gallery.safetensors")
    call("apply", MODEL, str(made / "delta.safetensors"), "--gallery", gallery, "--out", out)
    one, two = (checkpoint.load_weights(p) for p in (made / "encoder.safetensors", out))
    assert all(torch.equal(one[name], two[name]) for name in one)


def test_the_report_shows_the_distributions(files: Path) -> None:
    page = (files / "made" / "report.html").read_text()
    assert "Similarities, re-enrolled" in page
    assert "(bob)" in page


def test_evaluate_check_and_audit_take_the_gallery(files: Path) -> None:
    gallery, data = str(files / "gallery.safetensors"), str(files / "test.npz")
    result = str(files / "made" / "encoder.safetensors")
    common = [MODEL, "--gallery", gallery, "--forget", "bob"]
    before = json.loads(call("evaluate", *common, "--data", data, "--json"))
    after = json.loads(call("evaluate", *common, "--data", data, "--weights", result, "--json"))
    assert before["rates"]["rank1_forget"] > 90
    assert after["rates"]["identified_forget_1e2"] < before["rates"]["identified_forget_1e2"]
    assert "identified at FAR 1 %" in call("evaluate", *common, "--data", data)
    same = str(files / "same.safetensors")
    checkpoint.save_weights(same, tiny_encoder())
    assert "Not forgotten" in call("check", *common, "--unlearned", same, code=1)
    audit = json.loads(call(
        "audit", *common, "--unlearned", result, "--data", data, "--golden", same,
        "--relearn-steps", "2", "--shots", "5", "--json",
    ))  # fmt: skip
    assert [row["name"] for row in audit["rows"]] == ["original", "unlearned", "golden"]
    assert audit["settings"]["labels"] == {"1": "bob"}


def test_what_an_encoder_does_not_have_is_refused_before_the_work(files: Path) -> None:
    gallery, out = str(files / "gallery.safetensors"), str(files / "none.safetensors")
    common = ["unlearn", MODEL, "--forget", "bob", "--out", out]
    with_gallery = [*common, "--gallery", gallery]
    for options, says in (
        (["--compact"], "compact"), (["--depth", "output"], "depth"),
        (["--out-folder", str(files / "folder")], "such a folder holds a classifier"),
        (["--out-gallery", gallery], "exists"),
    ):  # fmt: skip
        assert says in call(*with_gallery, *options, code=2)
    assert "without --gallery" in call(*common, "--out-gallery", out + "2", code=2)
    assert "not a zsu_fast gallery" in call(
        *common, "--gallery", str(files / "made" / "encoder.safetensors"), code=2
    )
    narrow = str(files / "narrow.safetensors")
    Gallery(torch.randn(3, 7), ("ann", "bob", "cleo")).save(narrow)
    assert "32 values" in call(*common, "--gallery", narrow, code=2)
    alone = str(files / "alone.safetensors")
    Gallery(torch.randn(1, 32), ("bob",)).save(alone)
    assert "at least two" in call(*common, "--gallery", alone, code=2)
    assert not Path(out).exists()


def test_a_gallery_of_other_weights_is_warned_of_unless_they_were_unlearned(files: Path) -> None:
    data, other = str(files / "test.npz"), str(files / "other.safetensors")
    encoder = tiny_encoder()
    encoder.fc1.bias.data += 0.01
    checkpoint.save_weights(other, encoder)
    common = ["evaluate", MODEL, "--gallery", str(files / "gallery.safetensors"),
              "--forget", "bob", "--data", data]  # fmt: skip
    assert "were enrolled with weights" in call(*common, "--weights", other)
    result = str(files / "made" / "encoder.safetensors")
    assert "were enrolled with weights" not in call(*common, "--weights", result)
