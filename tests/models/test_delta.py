"""Deltas: base plus delta is the result bit for bit, or is refused."""

from __future__ import annotations

import copy
import os
import random
from pathlib import Path

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import save_file
from support import QUICK, TinyNet, bits, same_bits, tiny, untouched
from torch import Tensor, nn

import zsu_fast
from zsu_fast import CheckpointError, ModelError, OutputError, apply_delta, save_delta
from zsu_fast.models import checkpoint
from zsu_fast.models.delta import FORMAT
from zsu_fast.models.parameters import weights_hash


@pytest.fixture(scope="module")
def pair() -> tuple[nn.Module, nn.Module]:
    base = tiny()
    return base, zsu_fast.unlearn(base, [1], tail="fc1", **QUICK)


def stored(path: Path) -> tuple[set[str], dict[str, str]]:
    with safe_open(str(path), "pt") as file:
        return set(file.keys()), file.metadata()


def changed_bytes(base: nn.Module, result: nn.Module) -> int:
    old, new = base.state_dict(), result.state_dict()
    return sum(len(bits(new[n])) for n in new if bits(new[n]) != bits(old[n]))


def test_base_plus_delta_is_the_result(tmp_path: Path, pair: tuple[nn.Module, nn.Module]) -> None:
    base, result = pair
    path = tmp_path / "d.safetensors"
    save_delta(base, result, path)
    names, metadata = stored(path)
    assert names == {"fc1.weight", "fc1.bias", "fc2.weight", "fc2.bias"}
    assert metadata == {
        "format": FORMAT,
        "base": weights_hash(base),
        "result": weights_hash(result),
    }
    with untouched(base):
        rebuilt = apply_delta(base, path)
    assert type(rebuilt) is TinyNet
    assert same_bits(rebuilt, result)
    assert rebuilt.fc1.weight.data_ptr() != base.fc1.weight.data_ptr()


@pytest.mark.parametrize("dtype", [torch.float64, torch.float16, torch.bfloat16])
def test_any_dtype(tmp_path: Path, dtype: torch.dtype) -> None:
    base = tiny().to(dtype)
    result = zsu_fast.unlearn(base, 2, tail="last", **QUICK)
    save_delta(base, result, tmp_path / "d.safetensors")
    assert same_bits(apply_delta(base, tmp_path / "d.safetensors"), result)


def test_bits_are_compared_not_values(tmp_path: Path) -> None:
    base = tiny()
    with torch.no_grad():
        base.fc2.bias[:2] = torch.tensor([0.0, float("nan")])
    result = copy.deepcopy(base)
    save_delta(base, result, tmp_path / "same.safetensors")
    assert stored(tmp_path / "same.safetensors")[0] == set()
    assert same_bits(apply_delta(base, tmp_path / "same.safetensors"), base)
    with torch.no_grad():
        result.fc2.bias[0] = -0.0
    save_delta(base, result, tmp_path / "minus.safetensors")
    assert stored(tmp_path / "minus.safetensors")[0] == {"fc2.bias"}
    assert same_bits(apply_delta(base, tmp_path / "minus.safetensors"), result)


def test_buffers_strides_and_scalars(tmp_path: Path) -> None:
    base = tiny().to(memory_format=torch.channels_last)
    result = copy.deepcopy(base)
    with torch.no_grad():
        result.conv.weight += 1
        result.bn.num_batches_tracked += 1
        result.bn.running_mean *= 2
    save_delta(base, result, tmp_path / "d.safetensors")
    rebuilt = apply_delta(base, tmp_path / "d.safetensors")
    assert same_bits(rebuilt, result)
    assert rebuilt.conv.weight.stride() == base.conv.weight.stride()


class Tied(nn.Module):
    def __init__(self, tied: bool = True) -> None:
        super().__init__()
        self.a, self.b = nn.Linear(300, 300), nn.Linear(300, 300)
        if tied:
            self.b.weight = self.a.weight


def test_tied_tensors_are_stored_once(tmp_path: Path) -> None:
    base, path = Tied(), tmp_path / "d.safetensors"
    result = copy.deepcopy(base)
    with torch.no_grad():
        result.a.weight += 1
    save_delta(base, result, path)
    assert stored(path)[0] == {"a.weight"}
    assert path.stat().st_size < 1.02 * 300 * 300 * 4
    rebuilt = apply_delta(base, path)
    assert same_bits(rebuilt, result)
    assert rebuilt.a.weight is rebuilt.b.weight
    loose = Tied(tied=False)  # the same values, without the tie
    loose.load_state_dict(base.state_dict())
    assert same_bits(apply_delta(loose, path), result)


def test_wrapped_models(tmp_path: Path, pair: tuple[nn.Module, nn.Module]) -> None:
    base, result = pair
    save_delta(nn.DataParallel(base), torch.compile(result, backend="eager"), tmp_path / "d")
    assert same_bits(apply_delta(base, tmp_path / "d"), result)
    assert same_bits(apply_delta(nn.DataParallel(base), tmp_path / "d").module, result)


def test_size_is_at_most_that_of_the_changed_tensors_plus_two_percent(tmp_path: Path) -> None:
    base = nn.Sequential(nn.Linear(500, 500), nn.Linear(500, 100), nn.Linear(100, 10))
    result = copy.deepcopy(base)
    with torch.no_grad():
        result[1].weight += 1
        result[2].bias += 1
    save_delta(base, result, tmp_path / "d.safetensors")
    assert (tmp_path / "d.safetensors").stat().st_size <= 1.02 * changed_bytes(base, result)


def test_the_size_of_the_header_is_bounded(
    tmp_path: Path, pair: tuple[nn.Module, nn.Module]
) -> None:
    base, result = pair
    save_delta(base, result, tmp_path / "d.safetensors")
    header = (tmp_path / "d.safetensors").stat().st_size - changed_bytes(base, result)
    names = stored(tmp_path / "d.safetensors")[0]
    assert 0 < header <= 512 + sum(160 + len(n) for n in names)


# --- refused ---------------------------------------------------------------------------------


def test_another_base_is_refused(tmp_path: Path, pair: tuple[nn.Module, nn.Module]) -> None:
    base, result = pair
    save_delta(base, result, tmp_path / "d")
    for other in (result, TinyNet(), TinyNet(7), copy.deepcopy(base).half(), nn.Linear(2, 2)):
        with untouched(other), pytest.raises(CheckpointError, match="fits weights"):
            apply_delta(other, tmp_path / "d")


def test_models_that_do_not_match_are_refused(tmp_path: Path) -> None:
    for other, word in ((TinyNet(7), "fc2.bias"), (tiny().half(), "bn"), (nn.ReLU(), "bn.bias")):
        with pytest.raises(ModelError, match=word):
            save_delta(tiny(), other, tmp_path / "d")
    assert list(tmp_path.iterdir()) == []


def test_not_overwritten_without_force(tmp_path: Path, pair: tuple[nn.Module, nn.Module]) -> None:
    (tmp_path / "d").write_bytes(b"mine")
    with pytest.raises(OutputError, match="exists"):
        save_delta(*pair, tmp_path / "d")
    assert (tmp_path / "d").read_bytes() == b"mine"
    save_delta(*pair, tmp_path / "d", force=True)
    assert same_bits(apply_delta(pair[0], tmp_path / "d"), pair[1])


def test_what_is_not_a_delta_is_refused(tmp_path: Path, pair: tuple[nn.Module, nn.Module]) -> None:
    checkpoint.save_weights(tmp_path / "weights.safetensors", pair[1])
    (tmp_path / "empty").write_bytes(b"")
    for name in ("weights.safetensors", "empty", "missing", "."):
        with pytest.raises(CheckpointError):
            apply_delta(pair[0], tmp_path / name)


def test_another_format_version_is_refused(
    tmp_path: Path, pair: tuple[nn.Module, nn.Module]
) -> None:
    base, result = pair
    facts = {"base": weights_hash(base), "result": weights_hash(result)}
    for version in ("zsu_fast.delta/0", "zsu_fast.delta/2"):
        forge(tmp_path / "d", dict(result.state_dict()), format=version, **facts)
        with untouched(base), pytest.raises(CheckpointError, match=f"{version}.*reads {FORMAT}"):
            apply_delta(base, tmp_path / "d")
    forge(tmp_path / "d", dict(result.state_dict()), format="another.delta/1", **facts)
    with pytest.raises(CheckpointError, match="not a zsu_fast delta"):
        apply_delta(base, tmp_path / "d")


def forge(path: Path, tensors: dict[str, Tensor], **metadata: str) -> None:
    save_file(tensors, str(path), metadata)


def test_a_forged_delta_is_refused(tmp_path: Path, pair: tuple[nn.Module, nn.Module]) -> None:
    base, result = pair
    good = {n: t.clone() for n, t in result.state_dict().items() if n.startswith("fc")}
    facts = {"format": FORMAT, "base": weights_hash(base), "result": weights_hash(result)}
    path = tmp_path / "d"
    forge(path, good, **facts)
    assert same_bits(apply_delta(base, path), result)
    less = {n: t for n, t in good.items() if n != "fc2.bias"}
    nudged = good | {"fc2.bias": good["fc2.bias"].nextafter(torch.tensor(9.0))}
    for tensors in (
        less,
        nudged,
        good | {"conv.weight": torch.zeros(8, 3, 3, 3)},
        good | {"new": torch.zeros(1)},
        good | {"fc2.bias": good["fc2.bias"].double()},
        good | {"fc2.bias": good["fc2.bias"][None]},
    ):
        forge(path, tensors, **facts)
        with untouched(base), pytest.raises(CheckpointError, match="altered or damaged"):
            apply_delta(base, path)
    deep = "[" * 100_000
    for tied in ("[]", "{", '{"fc1.bias": "x"}', '{"fc1.bias": 1}', '{"x": "fc1.bias"}', deep):
        forge(path, good, **facts, tied=tied)
        with pytest.raises(CheckpointError, match="altered or damaged"):
            apply_delta(base, path)
    for missing in facts:
        forge(path, good, **{k: v for k, v in facts.items() if k != missing})
        with pytest.raises(CheckpointError):
            apply_delta(base, path)


def test_a_truncated_delta_is_refused(tmp_path: Path, pair: tuple[nn.Module, nn.Module]) -> None:
    save_delta(*pair, tmp_path / "d")
    whole = (tmp_path / "d").read_bytes()
    for length in {0, 1, 7, 8, 9, len(whole) // 2, len(whole) - 1}:
        (tmp_path / "d").write_bytes(whole[:length])
        with pytest.raises(CheckpointError):
            apply_delta(pair[0], tmp_path / "d")


def test_mutated_deltas_are_refused_or_harmless(
    tmp_path: Path, pair: tuple[nn.Module, nn.Module]
) -> None:
    """300 here; ``benchmarks/stress/fuzz.py`` runs 20,000 on all kinds of files."""
    base, result = pair
    save_delta(base, result, tmp_path / "d")
    whole, draw, refused = (tmp_path / "d").read_bytes(), random.Random(0), 0
    header = 8 + int.from_bytes(whole[:8], "little")
    for _ in range(300):
        mutant = bytearray(whole)
        for _ in range(draw.choice((1, 1, 2, 5))):
            mutant[draw.randrange(draw.choice((header, len(mutant))))] = draw.randrange(256)
        (tmp_path / "d").write_bytes(mutant)
        try:
            assert same_bits(apply_delta(base, tmp_path / "d"), result)
        except CheckpointError:
            refused += 1
    assert refused >= 290  # the others changed white space, or replaced a byte by itself
    assert os.listdir(tmp_path) == ["d"]


@pytest.mark.parametrize("name", ["d.pt", "d.ckpt", "d.pth.tar", "D.PTH"])
def test_a_delta_is_not_named_like_a_torch_file(
    tmp_path: Path, pair: tuple[nn.Module, nn.Module], name: str
) -> None:
    with pytest.raises(OutputError, match=r"delta: .*ending of a torch\.save file"):
        save_delta(*pair, tmp_path / name)
    assert list(tmp_path.iterdir()) == []
