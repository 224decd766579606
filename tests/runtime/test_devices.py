"""No op mixes GPU and CPU tensors; checked without a GPU (`fake_gpu`)."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from fake_gpu import GPU, DeviceMixError, GpuTensor, on_fake_gpu
from support import QUICK, tiny, tiny_data
from torch import nn

import zsu_fast
from zsu_fast.models.input_spec import InputSpec
from zsu_fast.models.wrapper import working_copy
from zsu_fast.synthesis.dead_leaves import dead_leaves_chunks
from zsu_fast.synthesis.space import input_space
from zsu_fast.synthesis.synthesize import batch_rows
from zsu_fast.training import features

pytestmark = pytest.mark.skipif(
    torch.cuda.is_available(), reason="there is a real GPU: see test_gpu.py"
)


def test_the_fake_gpu_raises_where_a_real_one_does() -> None:
    with on_fake_gpu():
        x = torch.rand(3, 4, device="cuda").requires_grad_()
        y = (x @ torch.rand(4, 2).to("cuda")).square().sum()
        (grad,) = torch.autograd.grad(y, x)
        assert grad.device.type == "cuda"
        assert type(grad.cpu()) is torch.Tensor
        with pytest.raises(DeviceMixError, match="aten::mm"):
            x @ torch.rand(4, 2)
        with pytest.raises(DeviceMixError, match="aten::index_select"):
            x.index_select(0, torch.tensor([0]))
        assert x[torch.tensor([0])].shape == (1, 4)  # indices may lie on the CPU


@pytest.mark.parametrize(
    "options",
    [{}, {"tail": 2}, {"space": "tail-input"}, {"objective": "differential"},
     {"batch_norm": 1e-3}, {"forgotten": [2]}, {"inplace": True},
     {"depth": None, "space": None}, {"depth": None}],
    ids=str,
)  # fmt: skip
@pytest.mark.usefixtures("few_rows")
def test_unlearning_stays_on_the_device(options: dict[str, Any]) -> None:
    with on_fake_gpu():
        model = tiny().to("cuda")
        result = zsu_fast.unlearn(model, [1], **QUICK | options)
        assert all(isinstance(p.data, GpuTensor) for p in result.parameters())


@pytest.mark.parametrize("shape", [(3, 20, 24), (5,)])
def test_scenes_are_drawn_where_they_are_wanted(shape: tuple[int, ...]) -> None:
    """Those of the fake GPU are the same, as its random numbers are the CPU's."""
    want = list(dead_leaves_chunks(300, shape, 3))
    with on_fake_gpu():
        got = list(dead_leaves_chunks(300, shape, 3, GPU))
        assert {chunk.device for chunk in got} == {GPU}
        got = [chunk.cpu() for chunk in got]
    assert all(torch.equal(a, b) for a, b in zip(got, want, strict=True))


def test_a_model_on_the_cpu_is_returned_on_the_cpu() -> None:
    with on_fake_gpu():
        result = zsu_fast.unlearn(tiny(), [1], device="cuda", **QUICK)
        assert not any(isinstance(p.data, GpuTensor) for p in result.parameters())


def test_audit_and_plan_stay_on_the_device() -> None:
    with on_fake_gpu():
        original = tiny().to("cuda")
        unlearned = zsu_fast.unlearn(original, [1], **QUICK)
        result = zsu_fast.audit(
            original, unlearned, [1], tiny_data(), relearn_steps=3, shots=5,
            impressions_per_class=4, progress=False,
        )  # fmt: skip
        assert result.verdict
        assert zsu_fast.plan(original, [1], **QUICK).basis == "measured"


def test_batches_are_larger_on_a_gpu() -> None:
    spec = InputSpec((3, 224, 224), (0.0,) * 3, (1.0,) * 3, "the test")
    model = nn.Sequential(nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(3, 4))
    rows = {}
    for device in ("cpu", "cuda"):
        with on_fake_gpu():
            work = working_copy(model, torch.device(device))
            rows[device] = batch_rows(input_space(work, spec, "float32"))
    assert rows["cpu"] == (4 * 27, 20)  # 1.2 MB each: they fit in a cache
    assert rows["cuda"] == (4 * 445, 445)


def test_row_indices_on_the_cpu_are_found(monkeypatch: pytest.MonkeyPatch) -> None:
    """A former bug: the row indices were on the CPU."""

    def chunks(_rows: Any, _classes: int = 1) -> Any:
        yield torch.arange(4)

    monkeypatch.setattr(features.FeatureSet, "chunks", chunks)
    with on_fake_gpu(), pytest.raises(DeviceMixError, match="index_select"):
        zsu_fast.unlearn(tiny().to("cuda"), [1], **QUICK)
