"""The whole package on a GPU: every stage and loop, with the embedded weights and digits."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any
from unittest import mock

import pytest
import torch
from torch import Tensor, nn

import zsu_fast
from zsu_fast.cli import demo
from zsu_fast.models import zoo
from zsu_fast.models.wrapper import working_copy
from zsu_fast.runtime import memory
from zsu_fast.runtime.progress import Reporter
from zsu_fast.synthesis import ascent, synthesize
from zsu_fast.synthesis.ascent_settings import AscentSettings
from zsu_fast.synthesis.space import input_space
from zsu_fast.unlearner import ZeroShotUnlearner

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device here"),
]

FORGET = [1, 2, 3, 4]
OUTPUT: dict[str, Any] = {"depth": "output", "space": "input", "progress": False}


@pytest.fixture(scope="module")
def digits() -> tuple[Tensor, Tensor]:
    images, labels = demo.mnist_test()
    return images.cuda(), labels.cuda()


def assert_forgets(model: nn.Module, digits: tuple[Tensor, Tensor], slack: float = 0.2) -> None:
    measured = zsu_fast.evaluate(model, digits, FORGET)
    masked = zsu_fast.evaluate(zsu_fast.mask(zoo.load("lenet5").cuda(), FORGET), digits, FORGET)
    assert measured.forget_accuracy == 0
    assert measured.retain_accuracy >= masked.retain_accuracy - slack


def lenet5() -> nn.Module:
    return zoo.load("lenet5").cuda()


@pytest.mark.parametrize("loop", ["auto", "eager", "compiled", "graph"])
def test_it_forgets(digits: tuple[Tensor, Tensor], loop: Any) -> None:
    model = lenet5()
    before = {k: v.clone() for k, v in model.state_dict().items()}
    run = ZeroShotUnlearner(model, FORGET, loop=loop, **OUTPUT)
    result = run.run()
    assert {p.device.type for p in result.parameters()} == {"cuda"}
    assert_forgets(result, digits)
    for name, value in model.state_dict().items():
        assert torch.equal(value, before[name])
    assert torch.cuda.get_device_name() in run.record.versions["device"]


@pytest.mark.parametrize(
    "options",
    [{"space": "tail-input"}, {"tail": "fc1"}, {"objective": "differential"}, {"tail": 3},
     {"precision": "float32"}],
    ids=str,
)  # fmt: skip
def test_options(digits: tuple[Tensor, Tensor], options: dict[str, Any]) -> None:
    result = zsu_fast.unlearn(lenet5(), FORGET, **OUTPUT | options)
    measured = zsu_fast.evaluate(result, digits, FORGET)
    assert measured.forget_accuracy <= 2
    assert measured.retain_accuracy >= 97


def test_a_model_on_the_cpu_returns_there(digits: tuple[Tensor, Tensor]) -> None:
    result = zsu_fast.unlearn(zoo.load("lenet5"), FORGET, device="cuda", **OUTPUT)
    assert {p.device.type for p in result.parameters()} == {"cpu"}
    assert_forgets(result.cuda(), digits)


@pytest.mark.parametrize("options", [OUTPUT, {"progress": False}], ids=["output", "default"])
def test_two_runs_give_the_same_bits(options: dict[str, Any]) -> None:
    first, second = (zsu_fast.unlearn(lenet5(), FORGET, **options) for _ in range(2))
    for a, b in zip(first.parameters(), second.parameters(), strict=True):
        assert torch.equal(a, b)


def synthesised(width: int | None = None, eager: bool = False, **options: Any) -> Any:
    """160 impressions of LeNet5, at most ``width`` at a time."""
    model = working_copy(lenet5(), torch.device("cuda"))
    spec = zoo.ZOO["lenet5"].spec
    space = input_space(model, spec, "auto")
    loop: Any = "eager" if eager else "auto"
    settings = AscentSettings(per_class=16, loop=loop, **options)
    fit = memory.rows_that_fit
    with (
        mock.patch.object(memory, "rows_that_fit", lambda *a: width or fit(*a)),
        Reporter(False, None) as report,
    ):
        return synthesize.ascend(model, space, range(10), settings, report)


def test_captured_ascent_is_the_eager_ascent() -> None:
    """A row stops in the step in which it reaches its target, even in the middle of a graph.

    Batches shrink at different moments, so bfloat16 sums, and sometimes a row's last step, differ.
    """
    eager, graph = synthesised(eager=True, restarts=0), synthesised(restarts=0)
    assert eager.hit_rate > 0.9
    same = eager.steps == graph.steps
    assert same.float().mean() >= 0.9
    assert (eager.hit == graph.hit).float().mean() >= 0.98
    gap = (graph.images - eager.images)[same].flatten(1).norm(dim=1)
    assert gap.median() <= 0.05 * eager.images.flatten(1).norm(dim=1).median()


def test_few_captures_when_rows_wait_in_a_queue() -> None:
    """160 impressions, 24 at a time: finished rows free their slots in the captured batch."""
    captures = 0
    real = torch.cuda.CUDAGraph

    def counted(*args: Any) -> Any:
        nonlocal captures
        captures += 1
        return real(*args)

    whole = synthesised()
    with mock.patch.object(torch.cuda, "CUDAGraph", counted):
        queued = synthesised(width=24)
    assert bool(queued.hit.all())
    assert (queued.confidence >= queued.target - 0.05).all()
    assert 1 <= captures <= 12
    assert torch.equal(queued.labels, whole.labels)


def test_out_of_memory_halves_the_batch() -> None:
    real, failed = ascent.Ascent.step, []

    def step(self: Any, batch: Any) -> None:
        if len(batch.index) > 100:
            failed.append(len(batch.index))
            raise torch.OutOfMemoryError("CUDA out of memory")
        real(self, batch)

    with mock.patch.object(ascent.Ascent, "step", step):
        impressions = synthesised()
    assert failed
    assert bool(impressions.hit.all())


def test_deep(digits: tuple[Tensor, Tensor]) -> None:
    original = lenet5()
    deep = zsu_fast.unlearn(original, FORGET, progress=False)
    measured = zsu_fast.evaluate(deep, digits, FORGET)
    assert measured.forget_accuracy <= 1
    assert measured.retain_accuracy >= 95


def test_karpathynet_and_a_transformer() -> None:
    result = zsu_fast.unlearn(zoo.load("karpathynet").cuda(), [3, 4, 8], progress=False)
    assert {p.device.type for p in result.parameters()} == {"cuda"}
    quick: Any = {"impressions_per_class": 4, "max_steps": 20, "restarts": 0, "progress": False}
    model = zoo.build("vit_cifar").cuda()
    result = zsu_fast.unlearn(model, [3], tail=2, depth="output", space="input", **quick)
    images = torch.rand(16, 3, 32, 32, device="cuda")
    assert not bool((result(images).argmax(1) == 3).any())


def test_audit(digits: tuple[Tensor, Tensor]) -> None:
    original = lenet5()
    unlearned = zsu_fast.unlearn(original, FORGET, **OUTPUT)
    part = tuple(t[::4] for t in digits)
    result = zsu_fast.audit(original, unlearned, FORGET, part, progress=False)
    on_cpu = zsu_fast.audit(
        original.cpu(), unlearned.cpu(), FORGET, tuple(t.cpu() for t in part), progress=False
    )
    assert result.verdict[0] == on_cpu.verdict[0]


def test_plan() -> None:
    planned = zsu_fast.plan(lenet5(), FORGET)
    assert (planned.basis, planned.gpus) == ("measured", 1)
    assert planned.seconds["total"] > 0


def test_cache_and_command_line(tmp_path: Path) -> None:
    from typer.testing import CliRunner

    from zsu_fast.cli.app import app

    model = lenet5()
    first = zsu_fast.unlearn(model, FORGET, cache=tmp_path / "c", progress=False)
    second = zsu_fast.unlearn(model, FORGET, cache=tmp_path / "c", progress=False)
    for a, b in zip(first.parameters(), second.parameters(), strict=True):
        assert torch.equal(a, b)
    out = tmp_path / "out.safetensors"
    arguments = ["unlearn", "lenet5", "--forget", "1-4", "--device", "cuda", "--out", str(out)]
    result = CliRunner().invoke(app, arguments)
    assert result.exit_code == 0, result.output
    assert out.exists()


@pytest.mark.skipif(
    not torch.cuda.is_available() or not torch.distributed.is_nccl_available(),
    reason="no NCCL here",
)
def test_one_rank_over_nccl(tmp_path: Path) -> None:
    import subprocess
    import sys

    out = tmp_path / "out.safetensors"
    command = [
        sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "1",
        "-m", "zsu_fast", "unlearn", "lenet5", "--forget", "1-4", "--out", str(out),
    ]  # fmt: skip
    done = subprocess.run(command, capture_output=True, text=True, env=os.environ, check=False)
    assert done.returncode == 0, done.stderr[-2000:]
    assert out.exists()
