"""Where weights lie in a file: exactly the right ones are loaded, or the file is refused."""

from __future__ import annotations

import argparse
import collections
import datetime
import json
import pathlib
import warnings
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import save_file
from support import TinyNet, same_bits, tiny, untouched
from torch import Tensor, nn

from benchmarks.stress.fuzz_checkpoints import fuzz
from zsu_fast import CheckpointError, UnlearningWarning
from zsu_fast.errors import ModelError
from zsu_fast.models.checkpoint import load_into, load_weights, origin

State = dict[str, Tensor]


def state(prefix: str = "", add: float = 0) -> State:
    """The tiny model's weights under ``prefix``, with ``add`` added to the floats."""
    return {
        prefix + n: t + add if t.is_floating_point() else t for n, t in tiny().state_dict().items()
    }


def loads(path: Path | str, add: float = 0) -> nn.Module:
    """Loads a file without a warning; it has to hold `state` with ``add`` added."""
    fresh = TinyNet()
    load_into(fresh, path)
    assert_holds(fresh, add)
    return fresh


def assert_holds(model: nn.Module, add: float = 0) -> None:
    want = state(add=add)
    assert all(torch.equal(t, want[n]) for n, t in model.state_dict().items())


def warned(path: Path | str, words: str, add: float = 0) -> nn.Module:
    """As `loads`, with a warning that has to say ``words``."""
    fresh = TinyNet()
    with pytest.warns(UnlearningWarning, match=words):
        load_into(fresh, path)
    assert_holds(fresh, add)
    return fresh


def refused(path: Path | str, words: str) -> None:
    model = tiny()
    with untouched(model), pytest.raises(CheckpointError, match=words):
        load_into(model, path)


def save(tmp_path: Path, content: Any, name: str = "a.pt") -> Path:
    torch.save(content, tmp_path / name)
    return tmp_path / name


# --- the ending does not say what a file is ----------------------------------------------------


@pytest.mark.parametrize("ending", [".ckpt", ".pth.tar", "", ".weights", ".safetensors", ".pt"])
@pytest.mark.parametrize("form", ["safetensors", "torch", "old torch"])
def test_any_ending_is_read_by_content(tmp_path: Path, ending: str, form: str) -> None:
    path = tmp_path / f"model{ending}"
    if form == "safetensors":
        save_file(state(), path)
    else:
        torch.save(state(), path, _use_new_zipfile_serialization=form == "torch")
    loads(path)


@pytest.mark.parametrize(
    ("content", "words"),
    [
        (b"", "is empty"),
        (b"version https://git-lfs.github.com/spec/v1\noid", "Git LFS pointer.*git lfs pull"),
        (b"<!DOCTYPE html><html>", "a web page"),
        (b"\x1f\x8b\x08\0" + bytes(40), "gzip. Unpack it"),
        (b"\x89HDF\r\n\x1a\n" + bytes(40), "Keras"),
    ],
)
@pytest.mark.parametrize("ending", ["pt", "safetensors", "ckpt"])
def test_what_is_often_taken_for_weights(
    tmp_path: Path, content: bytes, words: str, ending: str
) -> None:
    (tmp_path / f"a.{ending}").write_bytes(content)
    refused(tmp_path / f"a.{ending}", words)


def test_archives_of_other_kinds(tmp_path: Path) -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # TorchScript is deprecated
        torch.jit.script(nn.Linear(2, 2)).save(str(tmp_path / "script.pt"))
    np.savez(tmp_path / "a.npz", weight=np.zeros(3))
    torch.export.save(
        torch.export.export(nn.Linear(2, 2), (torch.zeros(1, 2),)), tmp_path / "program.pt2"
    )
    refused(tmp_path / "script.pt", r"TorchScript archive\. Save torch\.jit\.load")
    refused(tmp_path / "a.npz", "NumPy archive")
    refused(tmp_path / "program.pt2", r"written by torch\.export")


# --- several weights in one file ---------------------------------------------------------------


@pytest.mark.parametrize("raw", ["state_dict", "model", "net", "model_state_dict"])
@pytest.mark.parametrize("ema", ["state_dict_ema", "model_ema", "ema", "swaModel", "ema_model"])
def test_raw_and_averaged_weights(tmp_path: Path, raw: str, ema: str) -> None:
    path = save(tmp_path, {ema: state(add=1), "epoch": 3, raw: state("module.")})
    model = warned(path, rf"'{raw}::module' were taken, not those under '{ema}'; choose with")
    found = origin(model)
    assert found is not None
    assert (found.entry, found.others) == (f"{raw}::module", (ema,))
    for entry in (ema, raw):
        model = loads(f"{path}::{entry}", add=1 if entry == ema else 0)
        assert origin(model).entry.split("::")[0] == entry  # type: ignore[union-attr]


def test_averaged_weights_alone(tmp_path: Path) -> None:
    loads(save(tmp_path, {"state_dict_ema": state("module."), "epoch": 1}))
    loads(save(tmp_path, {**state("ema_model.")}))


def test_averaged_weights_by_prefix(tmp_path: Path) -> None:
    content = {"state_dict": state("model.") | state("ema_model.module.", add=1)}
    path = save(tmp_path, content, "last.ckpt")
    warned(path, r"not those under 'state_dict::ema_model.module'")
    loads(f"{path}::ema_model", add=1)
    loads(f"{path}::state_dict::ema_model.module", add=1)


def test_averaged_weights_without_names_are_mentioned(tmp_path: Path) -> None:
    shadow = {"decay": 0.99, "shadow_params": [p.detach() for p in tiny().parameters()]}
    warned(save(tmp_path, {"model": state(), "ema": shadow}), "ema in .* holds no weights that fit")


def test_averaged_weights_do_not_stand_in_for_raw_ones_that_do_not_fit(tmp_path: Path) -> None:
    raw = state()
    del raw["fc2.bias"]
    path = save(tmp_path, {"state_dict": raw, "state_dict_ema": state(add=1)})
    refused(path, r"missing \['fc2.bias'\].*What fits is under 'state_dict_ema'")
    loads(f"{path}::state_dict_ema", add=1)


def test_equal_copies_are_no_choice(tmp_path: Path) -> None:
    loads(save(tmp_path, {"model": state(), "state_dict": state("module.")}))


def test_two_of_equal_standing(tmp_path: Path) -> None:
    path = save(tmp_path, {"student": state(), "teacher": state(add=1)})
    refused(path, r"different weights under 'student', 'teacher', and nothing says.*::student")
    loads(f"{path}::teacher", add=1)
    refused(save(tmp_path, {"model": state(), "net": state(add=1)}), "'model', 'net'")
    refused(
        save(tmp_path, state("models.0.") | state("models.1.", add=1)), "'models.0', 'models.1'"
    )


def test_an_entry_that_is_not_there(tmp_path: Path) -> None:
    path = save(tmp_path, {"model": state(), "optimizer": {"state": {}}})
    refused(f"{path}::ema", r"nothing that fits TinyNet under 'ema'.*holds tensors under 'model'")
    refused(f"{tmp_path / 'no.pt'}::ema", r"no\.pt is not a file")


def test_a_name_with_colons_is_a_name(tmp_path: Path) -> None:
    loads(save(tmp_path, state(), "a.pt::ema"))


def test_what_an_optimiser_stores_by_name_is_no_weights(tmp_path: Path) -> None:
    momentum = state(add=5)
    refused(
        save(tmp_path, {"optimizer": {"exp_avg": momentum}, "momentum": momentum}), "no tensors"
    )
    loads(save(tmp_path, {"params": state(), "grads": momentum, "optimizer": momentum}))


# --- prefixes, and what lies beside ------------------------------------------------------------


@pytest.mark.parametrize("prefix", ["model.", "net.", "module.", "ema_model.", "model.module.",
                                    "_orig_mod.", "network._orig_mod."])  # fmt: skip
def test_common_prefixes(tmp_path: Path, prefix: str) -> None:
    model = loads(save(tmp_path, {"state_dict": state(prefix)}))
    assert origin(model).left_out == ()  # type: ignore[union-attr]
    beside = {"criterion.weight": torch.ones(5), "train_acc.total": torch.tensor(3)}
    path = save(tmp_path, {"state_dict": state(prefix) | beside}, "b.pt")
    warned(path, r"left out of .*b\.pt: criterion, train_acc\.")


def test_an_unusual_prefix_if_all_share_it(tmp_path: Path) -> None:
    warned(save(tmp_path, state("encoder.")), "'encoder' in .* were taken")
    path = save(tmp_path, state("encoder.") | {"decoder.weight": torch.ones(3)})
    refused(path, r"fits under 'encoder', beside other tensors \(decoder.weight\).*::encoder")
    warned(f"{path}::encoder", "left out of .*decoder")


def test_losses_beside_weights_without_a_prefix(tmp_path: Path) -> None:
    warned(save(tmp_path, state() | {"criterion.weight": torch.ones(5)}), "left out of .*criterion")
    refused(save(tmp_path, state() | {"fc3.weight": torch.ones(5)}), r"unknown \['fc3.weight'\]")
    refused(save(tmp_path, state() | {"fc2.scale": torch.ones(5)}), r"unknown \['fc2.scale'\]")


def test_a_prefix_of_the_model_that_the_file_lacks(tmp_path: Path) -> None:
    class Wrapper(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.backbone = TinyNet()

    for content in (state(), {"model": state("net.")}):
        model = Wrapper()
        load_into(model, save(tmp_path, content))
        assert_holds(model.backbone)
    with pytest.raises(CheckpointError, match="does not fit Wrapper"):
        load_into(Wrapper(), save(tmp_path, state("head.")))


def test_what_libraries_add_to_a_state_dict(tmp_path: Path) -> None:
    """thop's counters, AveragedModel's count, and files from before BatchNorm counted batches."""
    loads(save(tmp_path, state() | {"total_ops": torch.zeros(1), "conv.total_ops": torch.zeros(1)}))
    averaged = torch.optim.swa_utils.AveragedModel(tiny())
    warned(save(tmp_path, averaged.state_dict()), "left out of .*n_averaged")
    old = {n: t for n, t in state().items() if not n.endswith("num_batches_tracked")}
    fresh = TinyNet()
    load_into(fresh, save(tmp_path, old))
    assert torch.equal(fresh.bn.running_var, old["bn.running_var"])


def test_buffers_that_the_model_computes(tmp_path: Path) -> None:
    class Net(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.fc = nn.Linear(2, 2)
            self.register_buffer("index", torch.arange(3), persistent=False)

    weights = Net().state_dict()
    load_into(Net(), save(tmp_path, weights | {"index": torch.arange(3)}))
    with pytest.raises(CheckpointError, match=r"unknown .'index'"):
        load_into(Net(), save(tmp_path, weights | {"index": torch.arange(3) + 1}))


# --- objects without code ----------------------------------------------------------------------


def test_objects_without_code_are_read(tmp_path: Path) -> None:
    beside = {
        "args": argparse.Namespace(lr=0.1, out=pathlib.PurePosixPath("runs"), best=np.float32(2)),
        "best": np.float64(71.5), "step": np.int64(3), "curve": np.arange(3.0), "path": Path("x"),
        "when": datetime.datetime(2024, 1, 2, tzinfo=datetime.timezone.utc),
        "counts": collections.defaultdict(int, a=1), "tags": frozenset({1}), "flag": np.bool_(True),
        "metric": torch.tensor(3.0),
    }  # fmt: skip
    loads(save(tmp_path, {"state_dict": state(), **beside}))


def test_reading_leaves_torchs_list_of_safe_globals_as_it_was(tmp_path: Path) -> None:
    path = save(tmp_path, {"model": state(), "args": argparse.Namespace(a=1)})
    torch.serialization.add_safe_globals([argparse.Namespace])
    try:
        before = set(torch.serialization.get_safe_globals())
        loads(path)
        assert set(torch.serialization.get_safe_globals()) == before
    finally:
        torch.serialization.clear_safe_globals()
    loads(path)
    assert torch.serialization.get_safe_globals() == []


class Config:
    """A class that is not allowed."""


def test_a_refused_class_is_named_in_plain_text(tmp_path: Path) -> None:
    path = save(tmp_path, {"model": state(), "config": Config()})
    with pytest.raises(CheckpointError) as caught:
        load_weights(path)
    text = str(caught.value)
    assert f"it holds {Config.__module__}.Config, a pickle that could run code" in text
    assert text.isprintable()
    torch.serialization.add_safe_globals([Config])
    try:
        loads(path)  # the user vouches for it
    finally:
        torch.serialization.clear_safe_globals()


@pytest.mark.filterwarnings("ignore:Detected pickle protocol")
def test_a_pickle_protocol_that_torch_does_not_read_safely(tmp_path: Path) -> None:
    torch.save(state(), tmp_path / "a.pt", pickle_protocol=4)
    refused(tmp_path / "a.pt", "protocol that torch does not read safely. Save it again")


# --- dtypes ------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64])
def test_the_model_takes_the_dtype_of_the_file(tmp_path: Path, dtype: torch.dtype) -> None:
    saved, fresh = tiny().to(dtype), TinyNet()
    held = fresh.fc1.weight
    load_into(fresh, save(tmp_path, {"model": saved.state_dict()}))
    assert same_bits(fresh, saved)
    assert fresh.fc1.weight is held  # optimisers still know it
    assert fresh.bn.num_batches_tracked.dtype == torch.int64


def test_mixed_dtypes_are_told(tmp_path: Path) -> None:
    mixed = {n: t.half() if n.startswith("fc") else t for n, t in state().items()}
    fresh = TinyNet()
    with pytest.warns(UnlearningWarning, match="stores float16, float32; the model stays float32"):
        load_into(fresh, save(tmp_path, mixed))
    assert torch.equal(fresh.fc1.weight, mixed["fc1.weight"].float())


def test_integers_are_no_weights(tmp_path: Path) -> None:
    quantised = state() | {"fc1.weight": torch.ones(32, 72, dtype=torch.int8)}
    refused(save(tmp_path, quantised), "fc1.weight is int8, the model needs float32")
    counter = state() | {"bn.num_batches_tracked": torch.tensor(150.0)}
    loads(save(tmp_path, counter))  # a counter, saved as float
    counter["bn.num_batches_tracked"] += 0.5
    refused(save(tmp_path, counter), "num_batches_tracked is float32, the model needs int64")


def test_lazy_layers(tmp_path: Path) -> None:
    model = nn.Sequential(nn.LazyLinear(3))
    with pytest.raises(ModelError, match=r"lazy layers.*Run one batch"):
        load_into(model, save(tmp_path, nn.Sequential(nn.Linear(2, 3)).state_dict()))


def test_state_that_is_no_tensor(tmp_path: Path) -> None:
    class Extra(nn.Linear):
        def get_extra_state(self) -> dict[str, int]:
            return {"scale": 3}

        def set_extra_state(self, state: Any) -> None:
            raise AssertionError(state)

    path = save(tmp_path, nn.Linear(2, 3).state_dict())
    with pytest.raises(ModelError, match=r"more than tensors \(_extra_state\)"):
        load_into(Extra(2, 3), path)


# --- folders and shards ------------------------------------------------------------------------


def shards(folder: Path) -> Path:
    """Writes the weights as two shards and an index; returns the index."""
    names = list(state())
    where = {n: f"model-0000{1 + i % 2}-of-00002.safetensors" for i, n in enumerate(names)}
    for file in set(where.values()):
        save_file({n: state()[n] for n in names if where[n] == file}, folder / file)
    index = folder / "model.safetensors.index.json"
    index.write_text(json.dumps({"metadata": {}, "weight_map": where}))
    return index


def test_sharded_files(tmp_path: Path) -> None:
    index = shards(tmp_path)
    assert origin(loads(tmp_path)).file == str(index)  # type: ignore[union-attr]
    loads(index)
    first, second = sorted(tmp_path.glob("*.safetensors"))
    refused(first, "missing .*one of several shards: pass their index or folder")
    second.unlink()
    refused(index, r"00002-of-00002\.safetensors is not a file")
    save_file({"fc1.weight": torch.zeros(2)}, second)
    refused(index, "does not hold the tensors that model.safetensors.index.json states")


@pytest.mark.parametrize(
    "text", ["[]", "{", '{"weight_map": 3}', '{"weight_map": {"a": "../b.safetensors"}}']
)
def test_a_damaged_index(tmp_path: Path, text: str) -> None:
    (tmp_path / "model.safetensors.index.json").write_text(text)
    refused(tmp_path, "is not the index of a sharded checkpoint")


def test_a_folder_with_one_file_or_several(tmp_path: Path) -> None:
    save(tmp_path, state(), "best.pth")
    loads(tmp_path)
    save(tmp_path, state(add=1), "last.pth")
    refused(tmp_path, r"a folder with 2 weights files \(best.pth, last.pth\)")
    save(tmp_path, state(), "pytorch_model.bin")
    loads(tmp_path)


# --- the record of what was read ---------------------------------------------------------------


def test_the_origin_is_forgotten_when_the_weights_change(tmp_path: Path) -> None:
    model = loads(save(tmp_path, state()))
    assert origin(nn.DataParallel(model)) is origin(model) is not None
    with torch.no_grad():
        model.fc2.bias.add_(1)
    assert origin(model) is None
    assert origin(tiny()) is None


# --- at random ---------------------------------------------------------------------------------


def test_random_layouts_give_the_right_weights_or_a_clear_error() -> None:
    counts, wrong = fuzz(250, seed=11)
    assert not wrong, "\n".join(wrong[:5])
    by_outcome: collections.Counter[str] = collections.Counter()
    for (_, outcome), count in counts.items():
        by_outcome[outcome] += count
    assert min(by_outcome[o] for o in ("loaded", "loaded with a warning", "refused")) > 40
