"""Folders to publish: read back by the libraries as the same model, and a card that says it all."""

from __future__ import annotations

import hashlib
import json
import os
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from support import FORGET, QUICK, bits, tiny, untouched
from torch import Tensor, nn

import zsu_fast
from zsu_fast import ArgumentError, OutputError, ZeroShotUnlearner, save_pretrained
from zsu_fast.errors import ModelError
from zsu_fast.models import zoo
from zsu_fast.models.infer_spec import resolve_spec
from zsu_fast.models.loading import load_model
from zsu_fast.models.parameters import weights_hash
from zsu_fast.provenance.folders import written_folder
from zsu_fast.provenance.new_folder import new_folder

NAMES = ["cat", "dog | [x](y)", "cow", "hen", "fox"]
LAST: dict[str, Any] = {
    "depth": "output", "tail": "last", "impressions_per_class": 4, "steps": 20, "progress": False,
}  # fmt: skip


def logits(model: nn.Module, images: Tensor) -> Tensor:
    with torch.no_grad():
        output = model.eval()(images)
    return getattr(output, "logits", output)


def vit() -> nn.Module:
    """A small transformers ViT with names of its five classes."""
    transformers = pytest.importorskip("transformers")
    config = transformers.ViTConfig(
        hidden_size=16, num_hidden_layers=1, num_attention_heads=2, intermediate_size=16,
        image_size=32, patch_size=8, id2label=dict(enumerate(NAMES)),
        label2id={n: i for i, n in enumerate(NAMES)},
    )  # fmt: skip
    return transformers.ViTForImageClassification(config).eval()


def mobilevit() -> nn.Module:
    transformers = pytest.importorskip("transformers")
    config = transformers.MobileViTConfig(
        image_size=64, hidden_sizes=[16, 16, 16], neck_hidden_sizes=[8, 8, 8, 8, 8, 8, 16],
        num_attention_heads=2, num_labels=5,
    )  # fmt: skip
    return transformers.MobileViTForImageClassification(config).eval()


def resnet() -> nn.Module:
    transformers = pytest.importorskip("transformers")
    config = transformers.ResNetConfig(
        embedding_size=8, hidden_sizes=[8, 8], depths=[1, 1], num_labels=5
    )
    return transformers.ResNetForImageClassification(config).eval()


@pytest.mark.parametrize("build", [vit, mobilevit, resnet])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_transformers(tmp_path: Path, build: Any, dtype: torch.dtype) -> None:
    transformers = pytest.importorskip("transformers")
    model = build().to(dtype)
    with untouched(model):
        path = save_pretrained(model, tmp_path / "out")
    images = torch.randn(2, 3, 64, 64) if build is not vit else torch.randn(2, 3, 32, 32)
    images = images.to(dtype)
    own = transformers.AutoModelForImageClassification.from_pretrained(path)
    for again in (own, load_model(f"hf:{path}")):
        assert weights_hash(again) == weights_hash(model)
        assert again.config.id2label == model.config.id2label
        assert bits(logits(again, images)) == bits(logits(model, images))
    assert type(model).__name__ in (path / "README.md").read_text()


@pytest.mark.parametrize(
    ("name", "options"),
    [("resnet10t", {"in_chans": 1}), ("vit_tiny_patch16_224", {"img_size": 32, "class_token": False,
                                                              "global_pool": "avg"})],
)  # fmt: skip
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
def test_timm(tmp_path: Path, name: str, options: dict[str, Any], dtype: torch.dtype) -> None:
    timm = pytest.importorskip("timm")
    model = timm.create_model(name, num_classes=5, **options).to(dtype).eval()
    model.pretrained_cfg |= {"num_classes": 5, "label_names": tuple(NAMES)}
    path = save_pretrained(model, tmp_path / "out")
    images = torch.randn(2, options.get("in_chans", 3), 32, 32).to(dtype)
    own = timm.create_model(f"local-dir:{path}", pretrained=True)
    for again in (own, load_model(f"hf:{path}")):
        again.to(dtype)
        assert weights_hash(again) == weights_hash(model)
        assert list(again.pretrained_cfg["label_names"]) == NAMES
        assert torch.equal(logits(again, images), logits(model, images))
    # another number of classes, as for fine-tuning
    assert timm.create_model(f"local-dir:{path}", pretrained=True, num_classes=2).num_classes == 2


def test_names_that_are_only_assumed_are_not_written(tmp_path: Path) -> None:
    timm = pytest.importorskip("timm")
    path = save_pretrained(timm.create_model("test_resnet"), tmp_path / "out")
    assert "tench" not in (path / "config.json").read_text()


@pytest.mark.parametrize(
    ("name", "options"),
    [
        ("squeezenet1_0", {}),
        ("googlenet", {"aux_logits": False, "transform_input": True, "init_weights": False}),
    ],
)
def test_torchvision(tmp_path: Path, name: str, options: dict[str, Any]) -> None:
    models = pytest.importorskip("torchvision.models")
    model = models.get_model(name, num_classes=5, **options).eval()
    model.class_names = NAMES
    model.input_spec = zsu_fast.InputSpec((3, 64, 64), (0.5,) * 3, (0.25,) * 3, "the test")
    path = save_pretrained(model, tmp_path / "out")
    again = load_model(f"hf:{path}")
    assert type(again) is type(model)
    assert weights_hash(again) == weights_hash(model)
    images = torch.randn(2, 3, 64, 64)
    assert torch.equal(logits(again, images), logits(model, images))
    assert again.class_names == NAMES
    assert resolve_spec(again) == model.input_spec


def test_zoo_and_a_class_of_the_users_own(tmp_path: Path) -> None:
    path = save_pretrained(zoo.load("karpathynet"), tmp_path / "zoo")
    assert weights_hash(load_model(f"hf:{path}")) == weights_hash(zoo.load("karpathynet"))
    model = tiny()
    path = save_pretrained(model, tmp_path / "own")
    with pytest.raises(ArgumentError, match=r"TinyNet.*package\.module:factory"):
        load_model(f"hf:{path}")
    again = load_model("support:TinyNet", str(path / "model.safetensors"))
    assert weights_hash(again) == weights_hash(model)


def test_a_folder_never_names_code_to_run(tmp_path: Path) -> None:
    path = save_pretrained(zoo.load("lenet5"), tmp_path / "out")
    config = json.loads((path / "config.json").read_text())
    for name in ("os:getcwd", "torchvision:datasets", "subprocess:run", 7):
        (path / "config.json").write_text(json.dumps(config | {"architecture": name}))
        with pytest.raises(ArgumentError, match="folder"):
            load_model(f"hf:{path}")


def test_a_folder_chooses_no_other_arguments(tmp_path: Path) -> None:
    models = pytest.importorskip("torchvision.models")
    path = save_pretrained(models.squeezenet1_1(num_classes=5).eval(), tmp_path / "out")
    config = json.loads((path / "config.json").read_text())
    for arguments in ({"weights": "DEFAULT", "dropout": 0.0, "transform_input": "yes"}, [1]):
        (path / "config.json").write_text(json.dumps(config | {"arguments": arguments}))
        assert load_model(f"hf:{path}").classifier[0].p == 0.5


def test_a_model_that_its_library_would_build_otherwise_is_refused(tmp_path: Path) -> None:
    timm = pytest.importorskip("timm")
    model = timm.create_model("resnet10t", num_classes=5)
    model.act1 = nn.Tanh()  # the same weights, another function
    with pytest.raises(ModelError, match="another model"):
        save_pretrained(model, tmp_path / "out")
    assert list(tmp_path.iterdir()) == []


def test_the_processor_comes_along(tmp_path: Path) -> None:
    vit().save_pretrained(tmp_path / "base")
    processor = {"image_mean": [0.1] * 3, "image_std": [0.3] * 3, "size": 32}
    (tmp_path / "base" / "preprocessor_config.json").write_text(json.dumps(processor))
    path = save_pretrained(load_model(f"hf:{tmp_path / 'base'}"), tmp_path / "out")
    assert json.loads((path / "preprocessor_config.json").read_text()) == processor
    assert resolve_spec(load_model(f"hf:{path}")).mean == (0.1,) * 3
    assert str(tmp_path) not in "".join(
        f.read_text() for f in path.iterdir() if f.suffix in (".md", ".json")
    )


# --- the card --------------------------------------------------------------------------------


def test_the_card_of_a_compact_result(tmp_path: Path) -> None:
    hub = pytest.importorskip("huggingface_hub")
    model = vit()
    run = ZeroShotUnlearner(model, FORGET, compact=True, **LAST)
    result = run.run()
    record = run.record.to_dict() | {"labels": {"1": NAMES[1], "3": NAMES[3]}}
    sentence = "Forgotten in the outputs only."
    path = save_pretrained(
        result, tmp_path / "out", record=record, verdict=SimpleNamespace(sentence=sentence)
    )
    card = hub.ModelCard.load(path / "README.md")
    assert card.data.library_name == "transformers"
    assert card.data.pipeline_tag == "image-classification"
    assert "machine-unlearning" in card.data.tags
    assert card.data.license is None
    text = card.text
    assert "forgotten | 1 (dog \\| \\[x\\](y)), 3 (hen) |" in text
    digest = hashlib.sha256((path / "record.json").read_bytes()).hexdigest()
    for words in (sentence, record["started"], digest, run.record.weights_after, "it has 3 of 5",
                  "level *output*", "license"):  # fmt: skip
        assert words in text
    assert json.loads((path / "record.json").read_text()) == record
    again = load_model(f"hf:{path}")
    assert weights_hash(again) == run.record.weights_after
    assert again.config.id2label == {0: NAMES[0], 1: NAMES[2], 2: NAMES[4]}


def test_the_card_of_a_deep_result(tmp_path: Path) -> None:
    run = ZeroShotUnlearner(tiny(), FORGET, **QUICK)
    model = run.run()
    facts = run.record.to_dict()
    facts["depth"] = {"level": "deep", "unmask_leak": {"before": 0.9, "after": 0.0125}}
    path = save_pretrained(model, tmp_path / "out", record=facts, verdict="Any text.")
    text = (path / "README.md").read_text()
    assert "1.25% of the held-out rows" in text
    assert "level *deep*" in text
    assert "level *output*" not in text
    assert "| Any text. |" in text


def test_without_a_record_the_card_claims_nothing(tmp_path: Path) -> None:
    path = save_pretrained(tiny(), tmp_path / "out")
    text = (path / "README.md").read_text()
    assert "not known which classes it forgot" in text
    assert not (path / "record.json").exists()
    assert "forgotten |" not in text


@pytest.mark.parametrize("record", ["a text", {"forget": [1]}, 7])
def test_what_is_no_record_is_refused(tmp_path: Path, record: Any) -> None:
    with pytest.raises(ArgumentError, match="record"):
        save_pretrained(tiny(), tmp_path / "out", record=record)


def test_a_record_of_other_weights_is_refused(tmp_path: Path) -> None:
    run = ZeroShotUnlearner(tiny(), FORGET, **QUICK)
    model = run.run()
    with pytest.raises(ArgumentError, match=r"record: its run ended with weights"):
        save_pretrained(tiny(), tmp_path / "out", record=run.record)
    save_pretrained(model, tmp_path / "out", record=run.record)
    assert sorted(p.name for p in tmp_path.iterdir()) == ["out"]


# --- the folder appears as a whole, or not at all --------------------------------------------


def test_a_folder_that_holds_anything_is_not_replaced_without_force(tmp_path: Path) -> None:
    out = tmp_path / "out"
    out.mkdir()
    save_pretrained(zoo.load("lenet5"), out)  # an empty one is no loss
    before = {p.name: p.read_bytes() for p in out.iterdir()}
    with pytest.raises(OutputError, match="not empty"):
        save_pretrained(tiny(), out)
    assert {p.name: p.read_bytes() for p in out.iterdir()} == before
    (out / ".git").mkdir()
    (out / ".git" / "HEAD").write_text("kept")
    (out / "record.json").write_text("stale")
    save_pretrained(tiny(), out, force=True)
    assert (out / ".git" / "HEAD").read_text() == "kept"
    assert not (out / "record.json").exists()
    assert "TinyNet" in (out / "config.json").read_text()
    (out / "thesis.tex").write_text("years of work")
    with pytest.raises(OutputError, match=r"thesis\.tex.*not replaced"):
        save_pretrained(tiny(), out, force=True)
    assert (out / "thesis.tex").read_text() == "years of work"
    assert sorted(p.name for p in tmp_path.iterdir()) == ["out"]


@pytest.mark.parametrize("there", [False, True])
def test_a_failure_leaves_what_was_there(tmp_path: Path, there: bool) -> None:
    out = tmp_path / "out"
    if there:
        save_pretrained(zoo.load("lenet5"), out)
        (out / ".git").mkdir()
    before = {p.name for p in out.iterdir()} if there else set()

    def fill(folder: Path) -> None:
        (folder / "config.json").write_text("{}")
        raise OSError(28, "No space left on device")

    with pytest.raises(OutputError, match="No space left"), new_folder(out, fill, force=True):
        pass
    seen = []

    def interrupted() -> None:
        with written_folder(tiny(), out, force=True) as path:
            seen.append((path / "config.json").read_text())
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        interrupted()
    assert "TinyNet" in seen[0]
    if there:
        assert {p.name for p in out.iterdir()} == before
        assert "LeNet5" in (out / "config.json").read_text()
    assert sorted(p.name for p in tmp_path.iterdir()) == (["out"] if there else [])


def test_places_that_cannot_be_written(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    for place in ("file", "no/folder", "nul\0"):
        with pytest.raises(OutputError, match="folder"):
            save_pretrained(tiny(), tmp_path / place)
    assert sorted(p.name for p in tmp_path.iterdir()) == ["file"]


def test_a_link_stays_a_link(tmp_path: Path) -> None:
    (tmp_path / "real").mkdir()
    os.symlink(tmp_path / "real", tmp_path / "link")
    save_pretrained(tiny(), tmp_path / "link")
    assert (tmp_path / "link").is_symlink()
    assert (tmp_path / "real" / "config.json").is_file()
