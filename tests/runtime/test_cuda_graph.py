"""Loops run in CUDA graphs where the model allows it, and eagerly, with a warning, elsewhere."""

from __future__ import annotations

import warnings
from contextlib import nullcontext
from typing import Any
from unittest import mock

import pytest
import torch
from fake_gpu import FakeGraph, on_fake_gpu
from support import QUICK, tiny
from torch import Tensor, nn

import zsu_fast
from zsu_fast.errors import ArgumentError, UnlearningWarning
from zsu_fast.runtime import cuda_graph

pytestmark = pytest.mark.skipif(
    torch.cuda.is_available(), reason="there is a real GPU: see test_gpu.py"
)
SHORT: dict[str, Any] = QUICK | {
    "impressions_per_class": 3, "max_steps": 15, "restarts": 0, "steps": 8, "mixtures": 16,
    "batch": 16, "early_stop": False,
}  # fmt: skip
ASCENT, TRAINING = "ascent of the impressions runs eagerly", "training loop runs eagerly"


class HostSync(nn.Module):
    """Reads a value of its input on the host, which a CUDA graph can't capture."""

    def __init__(self, inner: nn.Module) -> None:
        super().__init__()
        self.inner = inner

    def forward(self, x: Tensor) -> Tensor:
        return self.inner(x) if x.detach().abs().max().item() < 1e9 else x


def model(layer: str | None) -> nn.Module:
    """The tiny model; its layer of this name reads a value on the host."""
    made = tiny()
    if layer is not None:
        setattr(made, layer, HostSync(getattr(made, layer)))
    return made


def run(layer: str | None, graphs: bool = True, **options: Any) -> tuple[list[Tensor], list[str]]:
    """Unlearns on the fake GPU: the parameters, and what was warned of the loops."""
    with warnings.catch_warnings(record=True) as caught, on_fake_gpu(graphs):
        warnings.simplefilter("always")
        result = zsu_fast.unlearn(model(layer), [1], device="cuda", **SHORT | options)
    texts = [str(w.message) for w in caught if "runs eagerly" in str(w.message)]
    assert all(w.category is UnlearningWarning for w in caught if str(w.message) in texts)
    return [p.detach() for p in result.parameters()], texts


def close(got: list[Tensor], want: list[Tensor]) -> None:
    for a, b in zip(got, want, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-5)


def test_a_model_that_can_be_captured_is_captured() -> None:
    """The same results from replayed steps; also a test of the fake graphs."""
    captured, texts = run(None, tail=2)
    assert texts == []
    close(captured, run(None, loop="eager", tail=2)[0])


def test_an_ascent_that_cannot_be_captured_goes_on_eagerly() -> None:
    """The split keeps the host read in the frozen part: the training loop has none."""
    got, texts = run("conv")
    (text,) = texts
    assert ASCENT in text
    assert "not permitted when stream is capturing" in text  # the cause, not its consequence
    assert "loop='eager'" in text
    eager, silent = run("conv", loop="eager")
    assert silent == []
    close(got, eager)


def test_a_training_loop_that_cannot_be_captured_goes_on_eagerly() -> None:
    made = zsu_fast.synthesize(tiny(), per_class=3, progress=False)
    options: dict[str, Any] = {"tail": 2, "impressions": made, "impressions_per_class": None}
    got, texts = run("drop", **options)
    (text,) = texts
    assert TRAINING in text
    assert "not permitted when stream is capturing" in text
    eager, silent = run("drop", loop="eager", **options)
    assert silent == []
    close(got, eager)


def test_memory_that_runs_out_in_a_capture_halves_the_batch(
    caplog: pytest.LogCaptureFixture,
) -> None:
    """And the ascent stays captured."""
    captures = 0

    def capture(steps: Any) -> Any:
        nonlocal captures
        captures += 1
        if captures == 1:
            raise torch.OutOfMemoryError("CUDA out of memory")
        return FakeGraph(steps)

    with on_fake_gpu(graphs=True), mock.patch.object(cuda_graph, "capture", capture):
        made = zsu_fast.synthesize(tiny().to("cuda"), per_class=1, max_steps=4, progress=False)
    assert len(made.labels) == 5
    assert captures > 1
    (message,) = caplog.messages
    assert "2 rows at a time" in message


@pytest.mark.parametrize("layer", ["conv", "drop"])
def test_a_required_graph_that_cannot_be_captured_is_refused(layer: str) -> None:
    before = model(layer)
    start = [p.clone() for p in before.parameters()]
    with on_fake_gpu(graphs=True), pytest.raises(ArgumentError, match=r"loop: got 'graph'.*captur"):
        zsu_fast.unlearn(before, [1], device="cuda", inplace=True, tail=2, loop="graph",
                         **SHORT)  # fmt: skip
    assert all(torch.equal(p, old) for p, old in zip(before.parameters(), start, strict=True))


def test_a_capture_leaves_other_threads_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    """A model that is served in another thread must not be hit by errors of the capture."""
    modes: list[str] = []

    class Generator:
        state = "before"

        def clone_state(self) -> str:
            return self.state

        def graphsafe_set_state(self, state: str) -> None:
            self.state = state

    generator = Generator()
    current: list[Any] = []
    monkeypatch.setattr(torch.cuda, "CUDAGraph", lambda: "graph")
    monkeypatch.setattr(torch.cuda, "current_stream", lambda: _Stream())
    monkeypatch.setattr(torch.cuda, "set_stream", current.append)
    monkeypatch.setattr(torch.cuda, "default_generators", [generator])
    monkeypatch.setattr(
        torch.cuda, "graph",
        lambda _graph, capture_error_mode: (modes.append(capture_error_mode), nullcontext())[1],
    )  # fmt: skip
    assert cuda_graph.capture(lambda: None) == "graph"  # type: ignore[comparison-overlap]
    assert modes == ["thread_local"]

    def fail() -> None:
        generator.state = "capturing"
        raise RuntimeError("a host read")

    with pytest.raises(RuntimeError, match="a host read"):
        cuda_graph.capture(fail)
    assert generator.state == "before"  # or random numbers on the GPU would raise from now on
    assert len(current) == 2


class _Stream:
    device = torch.device("cuda", 0)
