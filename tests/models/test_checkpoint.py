"""Weights files: unsafe ones are refused, and writes are complete or leave nothing."""

from __future__ import annotations

import errno
import io
import os
import pickle
import resource
import tempfile
import zipfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file
from support import TinyNet, bits, in_child, same_bits, tiny, untouched
from torch import nn

from zsu_fast import CheckpointError, OutputError
from zsu_fast.models import checkpoint, zoo
from zsu_fast.models.checkpoint import (
    check_ending,
    check_writable,
    load_into,
    load_tensors,
    load_weights,
    save_tensors,
    save_weights,
    write_atomically,
)


class Bomb:
    """Creates a file when it is unpickled."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self) -> Any:
        return (os.mkdir, (str(self.path),))


def only(folder: Path, *names: str) -> bool:
    """Whether the folder holds these files and no drafts."""
    return sorted(p.name for p in folder.iterdir()) == sorted(names)


# --- round trips -----------------------------------------------------------------------------


@pytest.mark.parametrize("ending", ["safetensors", "pt", "pth", "bin", "ckpt", "pth.tar", "PT"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
def test_weights_are_restored_bit_for_bit(tmp_path: Path, ending: str, dtype: torch.dtype) -> None:
    model, path = tiny().to(dtype), tmp_path / f"model.{ending}"
    with untouched(model):
        save_weights(path, model)
    assert only(tmp_path, path.name)
    if ending == "safetensors":
        assert load_tensors(path)[0].keys() == model.state_dict().keys()
    else:
        assert torch.load(path, weights_only=True).keys() == model.state_dict().keys()
    fresh = TinyNet()  # takes the dtype of the file
    load_into(fresh, path)
    assert same_bits(fresh, model)


def test_tied_tensors_and_wrappers_are_saved(tmp_path: Path) -> None:
    model = tiny()
    model.alias = model.fc2
    for wrapped in (nn.DataParallel(model), torch.compile(model, backend="eager")):
        path = tmp_path / f"{type(wrapped).__name__}.safetensors"
        save_weights(path, wrapped)
        loaded = load_weights(path)
        assert loaded.keys() == model.state_dict().keys()
        assert bits(loaded["alias.weight"]) == bits(loaded["fc2.weight"])


def test_views_and_strides_are_saved_by_value(tmp_path: Path) -> None:
    base = torch.arange(12.0).view(3, 4)
    save_tensors(tmp_path / "a.safetensors", {"t": base.t(), "row": base[1]}, {"k": "v"})
    tensors, metadata = load_tensors(tmp_path / "a.safetensors")
    assert torch.equal(tensors["t"], base.t())
    assert torch.equal(tensors["row"], base[1])
    assert metadata == {"k": "v"}


@pytest.mark.parametrize("key", ["state_dict", "model", "model_state_dict"])
def test_nested_and_data_parallel_checkpoints(tmp_path: Path, key: str) -> None:
    model = tiny()
    state = {f"module.{n}": t for n, t in model.state_dict().items()}
    torch.save({key: state, "epoch": 3}, tmp_path / "a.pt")
    fresh = TinyNet()
    load_into(fresh, tmp_path / "a.pt")
    assert same_bits(fresh, model)


@pytest.mark.parametrize("prefix", ["_orig_mod.", "module._orig_mod.", "_orig_mod.module."])
@pytest.mark.parametrize("ending", ["pt", "safetensors"])
def test_names_from_compiled_models(tmp_path: Path, prefix: str, ending: str) -> None:
    model = tiny()
    state = {prefix + n: t for n, t in model.state_dict().items()}
    path = tmp_path / f"a.{ending}"
    if ending == "pt":
        torch.save({"model": state}, path)
    else:
        save_tensors(path, state)
    fresh = TinyNet()
    load_into(fresh, path)
    assert same_bits(fresh, model)


def test_a_partly_compiled_model(tmp_path: Path) -> None:
    model, fresh = tiny(), TinyNet()
    save_weights(tmp_path / "a.safetensors", model)
    fresh.fc1 = torch.compile(fresh.fc1, backend="eager")
    assert "fc1._orig_mod.weight" in fresh.state_dict()
    load_into(fresh, tmp_path / "a.safetensors")
    save_weights(tmp_path / "b.safetensors", fresh)
    again = TinyNet()
    load_into(again, tmp_path / "b.safetensors")
    assert same_bits(again, model)


def test_weights_load_into_wrapped_models(tmp_path: Path) -> None:
    save_weights(tmp_path / "a.safetensors", tiny())
    for fresh in (nn.DataParallel(TinyNet()), torch.compile(TinyNet(), backend="eager")):
        load_into(fresh, tmp_path / "a.safetensors")
        assert same_bits(checkpoint.unwrap(fresh), tiny())


# --- refused ---------------------------------------------------------------------------------


@pytest.mark.parametrize("ending", ["pt", "pth", "bin", "pkl", "safetensors"])
@pytest.mark.parametrize("form", ["torch", "old torch", "pickle", "inside a state dict"])
def test_a_pickle_is_refused_and_never_executed(tmp_path: Path, ending: str, form: str) -> None:
    planted, path = tmp_path / "planted", tmp_path / f"bad.{ending}"
    bomb = Bomb(planted)
    if form == "pickle":
        path.write_bytes(pickle.dumps(bomb))
    elif form == "inside a state dict":
        torch.save({"state_dict": tiny().state_dict(), "extra": bomb}, path)
    else:
        torch.save(bomb, path, _use_new_zipfile_serialization=form == "torch")
    model = tiny()
    with untouched(model), pytest.raises(CheckpointError, match=r"weights: .*bad\."):
        load_into(model, path)
    assert not planted.exists()


def test_the_planted_pickle_runs_when_unpickled(tmp_path: Path) -> None:
    pickle.loads(pickle.dumps(Bomb(tmp_path / "planted")))
    assert (tmp_path / "planted").exists()


def test_a_pickled_module_is_refused(tmp_path: Path) -> None:
    torch.save(tiny(), tmp_path / "model.pt")
    with pytest.raises(CheckpointError, match=r"refused.*could run code.*Pass a safetensors file"):
        load_weights(tmp_path / "model.pt")


@pytest.mark.parametrize("ending", ["safetensors", "pt"])
@pytest.mark.parametrize("keep", [0, 1, 7, 8, 9, 100, 0.5, 0.99, -1])
def test_a_truncated_file(tmp_path: Path, ending: str, keep: float) -> None:
    path = tmp_path / f"a.{ending}"
    save_weights(path, tiny())
    content = path.read_bytes()
    size = int(keep * len(content)) if 0 < keep < 1 else int(keep)
    path.write_bytes(content[:size])
    model = tiny()
    with untouched(model), pytest.raises(CheckpointError, match=r"weights: .*a\."):
        load_into(model, path)


@pytest.mark.parametrize("content", [b"\0" * 64, b"\xff" * 64, b"{}", b"<html>not found</html>",
                                     (2).to_bytes(8, "little") + b"{}",
                                     (5).to_bytes(8, "little") + b"[1,2]"])  # fmt: skip
@pytest.mark.parametrize("ending", ["safetensors", "pt"])
def test_what_is_not_a_checkpoint(tmp_path: Path, ending: str, content: bytes) -> None:
    path = tmp_path / f"a.{ending}"
    path.write_bytes(content)
    model = tiny()
    with untouched(model), pytest.raises(CheckpointError):
        load_into(model, path)


def test_flipped_bytes_in_the_header(tmp_path: Path) -> None:
    path = tmp_path / "a.safetensors"
    save_weights(path, tiny())
    content = path.read_bytes()
    for at in range(0, 200, 3):
        path.write_bytes(content[:at] + bytes([content[at] ^ 0x55]) + content[at + 1 :])
        model = TinyNet()
        try:
            load_into(model, path)
        except CheckpointError:
            continue
        assert all(
            p.shape == q.shape for p, q in zip(model.parameters(), tiny().parameters(), strict=True)
        )


def test_a_zip_that_is_not_a_checkpoint(tmp_path: Path) -> None:
    with zipfile.ZipFile(tmp_path / "a.pt", "w") as file:
        file.writestr("readme.txt", "hello")
    with pytest.raises(CheckpointError, match=r"weights: .*refused"):
        load_weights(tmp_path / "a.pt")


@pytest.mark.parametrize("content", [[1, 2], torch.zeros(3), {"a": 1}, {}, {"lr": 0.1, "t": None},
                                     {"state_dict": {"w": "x"}}, "weights"])  # fmt: skip
def test_a_checkpoint_without_a_state_dict(tmp_path: Path, content: Any) -> None:
    torch.save(content, tmp_path / "a.pt")
    with pytest.raises(CheckpointError, match=r"Save model\.state_dict\(\)"):
        load_weights(tmp_path / "a.pt")


def test_no_such_file(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match=r"is not a file. Pass a safetensors"):
        load_weights(tmp_path / "nothing.pt")
    with pytest.raises(CheckpointError, match=r"a folder with no weights file. Pass a safetensors"):
        load_weights(tmp_path)


@pytest.mark.parametrize("wrong", ["missing", "unknown", "shape"])
def test_weights_of_another_model(tmp_path: Path, wrong: str) -> None:
    state = dict(tiny().state_dict())
    if wrong == "missing":
        del state["fc2.bias"]
    elif wrong == "unknown":
        state["fc3.bias"] = torch.zeros(2)
    else:
        state["fc2.weight"] = torch.zeros(7, 32)
    save_file(state, tmp_path / "a.safetensors")
    model = tiny()
    name = {"missing": "fc2.bias", "unknown": "fc3.bias", "shape": "fc2.weight is"}[wrong]
    with untouched(model), pytest.raises(CheckpointError, match=f"TinyNet: .*{name}.* Pass"):
        load_into(model, tmp_path / "a.safetensors")


# --- writing ---------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["a.weights", "a", "a.tar", "a.pkl", "a.safetensors.bak", "apt"])
def test_an_ending_that_stands_for_no_format(tmp_path: Path, name: str) -> None:
    for call in (check_ending, lambda path: save_weights(path, tiny())):
        with pytest.raises(
            OutputError, match=r"stands for no format.*\.safetensors, \.pt, .*\.tar"
        ):
            call(tmp_path / name)
    assert only(tmp_path)


def test_equal_content_is_equal_bytes(tmp_path: Path) -> None:
    """safetensors itself writes metadata in another order each time."""
    facts = {
        name: name for name in ("weights_before", "zsu_fast.forget", "weights_after", "b", "a")
    }
    for ending in ("safetensors", "pt", "ckpt"):
        for run in range(4):
            save_weights(tmp_path / f"{run}.{ending}", zoo.load("lenet5"), facts)
        first, *others = (tmp_path / f"{run}.{ending}" for run in range(4))
        assert all(other.read_bytes() == first.read_bytes() for other in others)
    tensors, metadata = load_tensors(tmp_path / "0.safetensors")
    assert tensors.keys() == zoo.load("lenet5").state_dict().keys()
    assert metadata == facts


def test_a_torch_file_holds_no_more_than_the_weights(tmp_path: Path) -> None:
    """Of a view, torch.save would write everything around it too."""
    model = nn.Linear(4, 2)
    secret = torch.full((1000, 4), 7.0)
    model.weight = nn.Parameter(secret[:2])
    save_weights(tmp_path / "a.pt", model)
    assert (tmp_path / "a.pt").stat().st_size < 4000
    tied = nn.Sequential(nn.Linear(3, 3), nn.Linear(3, 3))
    tied[1].weight = tied[0].weight
    save_weights(tmp_path / "b.pt", tied)
    state = torch.load(tmp_path / "b.pt", weights_only=True)
    assert state["0.weight"].data_ptr() == state["1.weight"].data_ptr()


@pytest.mark.parametrize("ending", ["safetensors", "pt"])
def test_existing_files_are_never_overwritten(tmp_path: Path, ending: str) -> None:
    path = tmp_path / f"a.{ending}"
    path.write_bytes(b"mine")
    with pytest.raises(OutputError, match=r"out: .* exists\. .*--force"):
        save_weights(path, tiny())
    with pytest.raises(OutputError, match=r"exists.*--force"):
        check_writable(path)
    assert path.read_bytes() == b"mine"
    assert only(tmp_path, path.name)
    check_writable(path, force=True)
    assert path.read_bytes() == b"mine"
    save_weights(path, tiny(), force=True)
    load_into(TinyNet(), path)
    assert only(tmp_path, path.name)


def test_a_file_that_appears_meanwhile_is_not_overwritten(tmp_path: Path) -> None:
    path = tmp_path / "a.bin"

    def write(file: Any) -> None:
        file.write(b"new")
        path.write_bytes(b"of another process")

    with pytest.raises(OutputError, match="exists"):
        write_atomically(path, write)
    assert path.read_bytes() == b"of another process"
    assert only(tmp_path, "a.bin")


def test_without_hard_links(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def no_links(*_: Any) -> None:
        raise OSError(errno.EPERM, "no hard links here")

    monkeypatch.setattr(os, "link", no_links)
    path = tmp_path / "a.bin"
    write_atomically(path, lambda file: file.write(b"one"))
    with pytest.raises(OutputError, match="exists"):
        write_atomically(path, lambda file: file.write(b"two"))
    assert path.read_bytes() == b"one"
    assert only(tmp_path, "a.bin")


@pytest.mark.parametrize("force", [False, True])
@pytest.mark.parametrize("error", [KeyboardInterrupt, OSError(errno.ENOSPC, "No space left")])
def test_no_partial_file_is_left(tmp_path: Path, error: Any, force: bool) -> None:
    path = tmp_path / "a.bin"
    if force:
        path.write_bytes(b"old")

    def write(file: Any) -> None:
        file.write(b"half")
        raise error

    wanted = KeyboardInterrupt if error is KeyboardInterrupt else OutputError
    with pytest.raises(wanted):
        write_atomically(path, write, force)
    assert only(tmp_path, *(["a.bin"] if force else []))
    assert not force or path.read_bytes() == b"old"


@pytest.mark.parametrize("ending", ["safetensors", "pt"])
@pytest.mark.parametrize("existing", [False, True])
def test_a_full_disk(tmp_path: Path, ending: str, existing: bool) -> None:
    """Simulated by a limit on file sizes: the write fails half-way, as on a full disk."""
    path, model = tmp_path / f"a.{ending}", tiny()
    if existing:
        path.write_bytes(b"old")
    size = sum(t.numel() for t in model.state_dict().values()) * 4

    def save() -> None:
        resource.setrlimit(resource.RLIMIT_FSIZE, (size // 2, size // 2))
        with pytest.raises(OutputError, match=r"out: .* can't be written .* has room"):
            save_weights(path, model, force=existing)

    assert in_child(save) == 0
    assert only(tmp_path, *([path.name] if existing else []))
    assert not existing or path.read_bytes() == b"old"


def test_space_that_runs_out_at_the_flush(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(_: int) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(OutputError, match="No space left"):
        save_weights(tmp_path / "a.safetensors", tiny())
    assert only(tmp_path)


@pytest.fixture
def read_only() -> Iterator[Path]:
    """A folder that all users may read; pytest's own are closed to other users."""
    with tempfile.TemporaryDirectory() as name:
        Path(name).chmod(0o555)
        yield Path(name)


def test_a_read_only_folder(read_only: Path) -> None:

    def save() -> None:
        if os.geteuid() == 0:  # root may write everywhere
            os.setuid(65534)
        for attempt in (
            lambda: save_weights(read_only / "a.safetensors", tiny()),
            lambda: check_writable(read_only / "a.safetensors"),
        ):
            with pytest.raises(OutputError, match=r"out: .*Permission denied.*writable"):
                attempt()

    assert in_child(save) == 0
    assert only(read_only)


@pytest.mark.parametrize("path", ["/proc/nothing/a.pt", "/dev/null/a.pt", "/proc/a.pt"])
def test_a_folder_that_accepts_no_files(path: str) -> None:
    for attempt in (lambda: check_writable(path), lambda: save_weights(path, tiny())):
        with pytest.raises(OutputError, match=r"out: .* can't be written"):
            attempt()


def test_a_folder_in_place_of_a_file(tmp_path: Path) -> None:
    with pytest.raises(OutputError, match=r"is a folder\. Name a file in it"):
        check_writable(tmp_path)
    with pytest.raises(OutputError, match=r"out: "):
        save_weights(tmp_path, tiny(), force=True)
    assert only(tmp_path)


def test_check_writable_leaves_nothing(tmp_path: Path) -> None:
    check_writable(tmp_path / "a.safetensors")
    assert only(tmp_path)


def test_a_torch_file_is_readable_by_torch(tmp_path: Path) -> None:
    save_weights(tmp_path / "a.pt", tiny())
    state = torch.load(io.BytesIO((tmp_path / "a.pt").read_bytes()), weights_only=True)
    TinyNet().load_state_dict(state)


def test_an_invalid_file_name_is_refused(tmp_path: Path) -> None:
    for call in (check_writable, lambda path: save_weights(path, tiny())):
        with pytest.raises(OutputError, match="name of a file"):
            call(str(tmp_path / "a\0b.safetensors"))


def test_modules_that_need_their_version(tmp_path: Path) -> None:
    """torchvision's MNASNet loads nothing from a dict that does not state its version."""
    mnasnet = pytest.importorskip("torchvision").models.mnasnet0_5
    saved, loaded = mnasnet(num_classes=3), mnasnet(num_classes=3)
    path = tmp_path / "weights.safetensors"
    checkpoint.save_weights(path, saved)
    checkpoint.load_into(loaded, path)
    for name, value in saved.state_dict().items():
        assert torch.equal(loaded.state_dict()[name], value)
