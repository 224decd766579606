"""Who takes the tail's optimiser steps: eager, through torch.compile, or a replayed CUDA graph.

All three do the same: pick rows, tail forward, fused loss, backward, AdamW. The loop hands them a
block of steps at a time and looks at the held-out rows between blocks.
"""

from __future__ import annotations

import logging
from collections.abc import Sequence
from contextlib import AbstractContextManager, nullcontext
from typing import Any, Literal, Protocol

import torch
from torch import Tensor, nn

from ..errors import ArgumentError
from ..runtime.precision import fp32_precision, has_bfloat16
from ..runtime.threads import SMALL
from .fit_task import FitTask

Loop = Literal["auto", "eager", "compiled", "graph"]
LOOPS = ("auto", "eager", "compiled", "graph")
_log = logging.getLogger(__name__)


class TrainStep(Protocol):
    """Takes blocks of optimiser steps."""

    name: str

    def reset(self) -> None:
        """Forgets the optimiser's moments: a new attempt begins."""
        ...

    def run(self, index: Tensor, rates: list[float]) -> Tensor:
        """Takes ``len(rates)`` steps on the rows ``index``, int64 [steps, batch].

        Returns:
            The last step's loss, a scalar on the device.
        """
        ...


def make_train_step(loop: Loop, task: FitTask, scales: Sequence[float] | None = None) -> TrainStep:
    """The stepper that ``loop`` names; "auto" is a graph on a GPU and eager on a CPU.

    On a CPU a compiled tail does not pay for itself within a run: compiling costs 2 to 12 s, a
    whole run of a small tail less than 1 s. ``scales`` has a factor on the learning rate for each
    parameter; None is 1 for all.

    Raises:
        ArgumentError: "graph" without a GPU, or a tail that can't be captured.
    """
    on_gpu = task.device.type == "cuda"
    if loop == "compiled":
        return CompiledTrainStep(task, scales)
    if loop == "graph" and not on_gpu:
        raise ArgumentError(
            "loop",
            f"got 'graph', and the model is on {task.device}",
            "CUDA graphs need a CUDA device: pass device='cuda', or loop='auto'.",
        )
    if loop == "eager" or not on_gpu:
        return EagerTrainStep(task, scales)
    try:
        return GraphTrainStep(task, scales)
    except RuntimeError as error:
        if loop == "graph":
            raise ArgumentError(
                "loop", f"got 'graph', and capture failed: {error}", "Pass loop='auto'."
            ) from error
        _log.warning("the tail loop runs eagerly, its capture in a CUDA graph failed: %s", error)
        return EagerTrainStep(task, scales)


class EagerTrainStep:
    """Step by step, in plain autograd."""

    name = "eager"
    capturable = False

    def __init__(self, task: FitTask, scales: Sequence[float] | None = None) -> None:
        self.task, self.tail, self.parameters = task, task.tail, task.parameters
        self.scales = [1.0] * len(self.parameters) if scales is None else list(scales)
        self.device, self.row_work = task.device, task.row_work
        self.reset()

    def reset(self) -> None:
        self.optimiser: Any = (
            _FusedAdam(self.parameters, self.scales)
            if self._fused()
            else torch.optim.AdamW(self._groups(), weight_decay=0.0, capturable=self.capturable)
        )

    def _groups(self) -> list[dict[str, Any]]:
        """Parameters by the factor on their learning rate, for torch.optim."""
        by_scale: dict[float, list[nn.Parameter]] = {}
        for parameter, scale in zip(self.parameters, self.scales, strict=True):
            by_scale.setdefault(scale, []).append(parameter)
        return [{"params": some, "scale": scale} for scale, some in by_scale.items()]

    def run(self, index: Tensor, rates: list[float]) -> Tensor:
        loss = torch.zeros((), device=self.device)
        with bf16_matmul(self.device, self.row_work * index.shape[1]):
            for picked, rate in zip(index.to(self.device), rates, strict=True):
                for group in self.optimiser.param_groups:
                    group["lr"] = rate * group["scale"]
                loss = self.step(picked)
        return loss

    def step(self, picked: Tensor) -> Tensor:
        """One step on the rows ``picked``, int64 [batch]; no synchronisation."""
        rows = self.task.train.select(picked)
        logits = self.tail(*rows.features)
        loss, dlogits = self.task.objective(logits.detach(), rows)
        grads = torch.autograd.grad(logits, self.parameters, dlogits)
        if isinstance(self.optimiser, _FusedAdam):
            self.optimiser.step(grads)
            return loss
        for parameter, grad in zip(self.parameters, grads, strict=True):
            parameter.grad = grad
        self.optimiser.step()
        return loss

    def _fused(self) -> bool:
        kinds = {(p.device.type, p.dtype) for p in self.parameters}
        return kinds <= {("cpu", torch.float32), ("cuda", torch.float32)}


class _FusedAdam:
    """AdamW without weight decay, on the fused kernel of `torch.optim.AdamW(fused=True)`.

    Around that kernel, torch.optim's step spends several times as long on hooks, grouping and
    checks: 6 % of a whole call on a small network. Where a group's rate "lr" is a tensor, the step
    can be captured.
    """

    def __init__(self, parameters: list[nn.Parameter], scales: list[float]) -> None:
        self.param_groups: list[dict[str, Any]] = []  # as in torch.optim
        for scale in dict.fromkeys(scales):
            places = [i for i, s in enumerate(scales) if s == scale]
            values = [parameters[i].detach() for i in places]
            self.param_groups.append(
                {
                    "scale": scale,
                    "lr": 1e-3,
                    "places": places,
                    "params": values,
                    "moments": [torch.zeros_like(p) for p in values],
                    "variances": [torch.zeros_like(p) for p in values],
                    "steps": [torch.zeros((), device=p.device) for p in values],
                }
            )

    def step(self, grads: tuple[Tensor, ...]) -> None:
        for group in self.param_groups:
            torch._foreach_add_(group["steps"], 1)
            torch._fused_adamw_(
                group["params"], [grads[i] for i in group["places"]], group["moments"],
                group["variances"], [], group["steps"], lr=group["lr"], beta1=0.9, beta2=0.999,
                weight_decay=0.0, eps=1e-8, amsgrad=False, maximize=False,
            )  # fmt: skip

    @property
    def state(self) -> dict[Any, dict[str, Tensor]]:
        """What a step remembers of each parameter, as in torch.optim."""
        names = ("moments", "variances", "steps")
        return {
            place: dict(zip(names, kept, strict=True))
            for group in self.param_groups
            for place, *kept in zip(group["places"], *(group[n] for n in names), strict=True)
        }


def bf16_matmul(device: torch.device, work: int) -> AbstractContextManager[None]:
    """Products of float32 matrices in bfloat16, sums in float32, where a CPU has units for that.

    Twice to four times as fast with AMX for the last layer of an ImageNet model, and steps from
    gradients that are 0.3 % off are as good. Weights, optimiser and checks stay float32. Below
    ``SMALL`` multiply-adds a step it would gain nothing.
    """
    if device.type != "cpu" or work <= SMALL or not has_bfloat16(device):
        return nullcontext()
    return fp32_precision(torch.backends.mkldnn.matmul, "bf16")  # type: ignore[attr-defined]


class CompiledTrainStep(EagerTrainStep):
    """The same, with the tail through torch.compile (default mode, static shapes)."""

    name = "compiled"

    def __init__(self, task: FitTask, scales: Sequence[float] | None = None) -> None:
        super().__init__(task, scales)
        compiled: Any = torch.compile(task.tail, dynamic=False)
        self.tail = compiled


class GraphTrainStep(EagerTrainStep):
    """Blocks of steps captured in one CUDA graph and replayed: one launch a block.

    FeatureSet, rates and losses go through buffers that the graph knows; nothing in it depends on a
    value that the host holds. Blocks of another length than the first run eagerly.
    """

    name = "graph"
    capturable = True

    def __init__(self, task: FitTask, scales: Sequence[float] | None = None) -> None:
        self.graph: torch.cuda.CUDAGraph | None = None
        super().__init__(task, scales)

    def reset(self) -> None:
        super().reset()
        for group in self.optimiser.param_groups:
            group["lr"] = torch.zeros((), device=self.device)
        self.graph = None

    def run(self, index: Tensor, rates: list[float]) -> Tensor:
        index = index.to(self.device)
        wanted = torch.tensor(rates, device=self.device)
        if self.graph is None:
            self._capture(index, wanted)
        assert self.graph is not None
        if index.shape != self.index.shape:
            loss = torch.zeros((), device=self.device)
            for picked, rate in zip(index, wanted, strict=True):
                self._set_rate(rate)
                loss = self.step(picked)
            return loss
        self.index.copy_(index)
        self.rates.copy_(wanted)
        self.graph.replay()
        return self.losses[-1]

    def _set_rate(self, rate: Tensor) -> None:
        for group in self.optimiser.param_groups:
            group["lr"].copy_(rate * group["scale"])

    def _capture(self, index: Tensor, rates: Tensor) -> None:
        self.index, self.rates = index.clone(), rates.clone()
        self.losses = torch.zeros(len(rates), device=self.device)
        before = [p.detach().clone() for p in self.parameters]
        side = torch.cuda.Stream(self.device)
        side.wait_stream(torch.cuda.current_stream(self.device))
        with torch.cuda.stream(side):  # warm-up: allocations, cuBLAS workspaces, Adam's state
            for picked in self.index[:3]:
                self.step(picked)
        torch.cuda.current_stream(self.device).wait_stream(side)
        with torch.no_grad():  # as if the warm-up had not been
            for parameter, old in zip(self.parameters, before, strict=True):
                parameter.copy_(old)
            for state in self.optimiser.state.values():
                for value in state.values():
                    value.zero_()
        for parameter in self.parameters:
            parameter.grad = None
        self.graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(self.graph):
            for at in range(len(rates)):
                self._set_rate(self.rates[at])
                self.losses[at].copy_(self.step(self.index[at]))
