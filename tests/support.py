"""Shared by tests: a small trained classifier, snapshots of models, the real data."""

from __future__ import annotations

import copy
import functools
import importlib.util
import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from types import ModuleType
from typing import Any

import torch
from torch import Tensor, nn

import zsu_fast
from zsu_fast.models.input_spec import InputSpec
from zsu_fast.models.parameters import weights_hash
from zsu_fast.training.deep.settings import DeepSettings

SHARED = Path(__file__).resolve().parents[2] / "shared" / "data"
SPEC = InputSpec((3, 8, 8), (0.485, 0.456, 0.406), (0.229, 0.224, 0.225), "the tests")
FORGET = [1, 3]
# Options with which `unlearn` runs on the tiny model in a fraction of a second: by default, that is
# deep, and at the output level from images.
QUICK_DEEP: dict[str, Any] = {
    "impressions_per_class": 8,
    "steps": 150,
    "mixtures": 256,
    "batch": 128,
    "progress": False,
}
QUICK: dict[str, Any] = QUICK_DEEP | {"depth": "output", "space": "input"}


@dataclass(frozen=True)
class SameForBatchNorm(DeepSettings):
    """Settings that batch norms don't change."""

    def for_batch_norm(self) -> DeepSettings:
        return self


# Of deep forgetting: the fewest rows that there are, and few steps, in which a loss that keeps less
# of the retained logits forgets more.
FEW_ROWS = SameForBatchNorm(
    scenes=512,
    inverted=256,
    steps=60,
    batch=64,
    keep=8.0,
    constant=0.0,
    leak=0.04,
    inverted_share=1 / 9,
)


class TinyNet(nn.Module):
    """Convolution, BatchNorm, dropout, two linear layers: float [N, 3, 8, 8] -> [N, 5]."""

    def __init__(self, classes: int = 5) -> None:
        super().__init__()
        self.conv = nn.Conv2d(3, 8, 3, 2)
        self.bn = nn.BatchNorm2d(8)
        self.act = nn.ReLU(inplace=True)
        self.fc1 = nn.Linear(72, 32)
        self.drop = nn.Dropout(0.5)
        self.fc2 = nn.Linear(32, classes)

    def forward(self, x: Tensor) -> Tensor:
        x = self.act(self.bn(self.conv(x))).flatten(1)
        return self.fc2(self.drop(self.act(self.fc1(x))))


def tiny_data(count: int = 400, seed: int = 1) -> tuple[Tensor, Tensor]:
    """Noisy copies of five fixed patterns, normalised, and the index of each one's pattern."""
    patterns = torch.rand(5, 3, 8, 8, generator=torch.Generator().manual_seed(7))
    generator = torch.Generator().manual_seed(seed)
    labels = torch.arange(count) % 5
    images = patterns[labels] + 0.25 * torch.randn(count, 3, 8, 8, generator=generator)
    return SPEC.normalise(images.clamp(0, 1) * 255), labels


def train(model: nn.Module, steps: int = 150) -> nn.Module:
    """Trains a model on `tiny_data`; returns it in eval mode."""
    images, labels = tiny_data(seed=0)
    optimiser = torch.optim.Adam(model.parameters(), 1e-2)
    model.train()
    for _ in range(steps):
        optimiser.zero_grad()
        nn.functional.cross_entropy(model(images), labels).backward()
        optimiser.step()
    model.zero_grad()
    return model.eval()


@functools.lru_cache(maxsize=1)
def _trained() -> nn.Module:
    with torch.random.fork_rng():
        torch.manual_seed(0)
        return train(TinyNet())


def tiny() -> nn.Module:
    """A fresh copy of the trained TinyNet."""
    return copy.deepcopy(_trained())


@functools.lru_cache(maxsize=1)
def unlearned_tiny() -> nn.Module:
    """The trained TinyNet without the classes FORGET; shared, so copy it before changing it."""
    return zsu_fast.unlearn(tiny(), FORGET, **QUICK)


def deep_run(
    model: nn.Module | None = None,
    forget: Any = FORGET,
    settings: DeepSettings = FEW_ROWS,
    **options: Any,
) -> tuple[zsu_fast.ZeroShotUnlearner, nn.Module]:
    """A finished run of the default depth; by default on the tiny model."""
    given = QUICK_DEEP | {"input_shape": SPEC.shape, "mean": SPEC.mean, "std": SPEC.std} | options
    run = zsu_fast.ZeroShotUnlearner(tiny() if model is None else model, forget, **given)
    run.options.deep = settings
    return run, run.run()


@dataclass
class Answer:
    """An output object with logits, as in transformers."""

    logits: Tensor
    loss: None = None


class Returning(nn.Module):
    """A classifier that returns ``wrap(logits)``."""

    def __init__(self, inner: nn.Module, wrap: Callable[[Tensor], Any]) -> None:
        super().__init__()
        self.inner, self.wrap = inner, wrap

    def forward(self, x: Tensor) -> Any:
        return self.wrap(self.inner(x))


def bits(tensor: Tensor) -> bytes:
    """The bytes of a tensor; unlike values, they are equal for equal NaNs."""
    return tensor.detach().cpu().contiguous().flatten().view(torch.uint8).numpy().tobytes()


@dataclass
class Snapshot:
    """What a call must not change in a model."""

    digest: str
    tensors: dict[str, tuple[int, torch.dtype, bytes]]
    modes: dict[str, bool]
    flags: dict[str, bool]


def snapshot(model: nn.Module) -> Snapshot:
    """Records the hash, every tensor's address and bits, modes, and requires_grad flags."""
    named = [*model.named_parameters(remove_duplicate=False), *model.named_buffers()]
    return Snapshot(
        weights_hash(model),
        {n: (t.data_ptr(), t.dtype, bits(t)) for n, t in named},
        {n: m.training for n, m in model.named_modules()},
        {n: p.requires_grad for n, p in model.named_parameters()},
    )


@contextmanager
def untouched(model: nn.Module) -> Iterator[None]:
    """Fails if the block changes anything of ``model``."""
    before = snapshot(model)
    yield
    after = snapshot(model)
    changed = [n for n in before.tensors if before.tensors[n] != after.tensors.get(n)]
    assert not changed, f"changed: {changed}"
    assert before == after


def changed_tensors(before: nn.Module, after: nn.Module) -> set[str]:
    """Names of the tensors in the state dict whose bits differ."""
    old, new = before.state_dict(), after.state_dict()
    assert list(old) == list(new)
    return {n for n in old if bits(old[n]) != bits(new[n])}


def same_bits(a: nn.Module, b: nn.Module) -> bool:
    return not changed_tensors(a, b)


def last_layer_inputs(model: nn.Module, layer: str, images: Tensor) -> Tensor:
    """What the last layer, named ``layer``, gets of ``images``: [N, ...] -> [N, features].

    Models that differ in the last layer alone share them: one pass of the backbone serves all.
    """
    headless = copy.deepcopy(model).eval()
    headless.set_submodule(layer, nn.Identity())
    with torch.no_grad():
        features = torch.cat([headless(part) for part in images.split(500)])
        logits = model.get_submodule(layer)(features[:50])
        assert torch.allclose(logits, model(images[:50]), atol=1e-5)
    return features


def assert_forgets(model: nn.Module, forget: list[int], most: float = 2, least: float = 95) -> None:
    """FA on the tiny data is at most ``most`` %, RA at least ``least`` %."""
    result = zsu_fast.evaluate(model, tiny_data(), forget)
    assert result.forget_accuracy is not None
    assert result.retain_accuracy is not None
    assert result.forget_accuracy <= most, str(result)
    assert result.retain_accuracy >= least, str(result)


def in_child(action: Callable[[], None]) -> int:
    """Runs ``action`` in a forked process; returns 0 if it returns, 1 if it raises.

    For actions that would affect this process: dropping root, limiting file sizes.
    """
    pid = os.fork()
    if pid == 0:
        try:
            action()
        except BaseException as error:  # noqa: BLE001  the child must end here
            print(f"{type(error).__name__}: {error}", flush=True)
            os._exit(1)
        os._exit(0)
    return os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])


def shared_loader() -> ModuleType:
    """The loaders of the shared real data."""
    spec = importlib.util.spec_from_file_location("shared_data_load", SHARED / "load.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module
