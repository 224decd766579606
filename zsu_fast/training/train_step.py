"""Optimiser steps of the tail: eager, through torch.compile, or replayed from a CUDA graph.

All three do the same: select rows, tail forward, fused loss, backward, AdamW. The trainer passes a
block of steps at a time and validates between blocks.
"""

from __future__ import annotations

import logging
from collections.abc import Sequence
from contextlib import AbstractContextManager, nullcontext
from typing import Any, cast

import torch
from torch import Tensor, nn

from ..errors import ArgumentError
from ..runtime.cuda_graph import GraphCapturer, Loop as Loop
from ..runtime.torch_settings import SMALL, fp32_precision, has_bfloat16
from .fit_task import FitTask, copied_values

# Of a gradient's norm. Steps along gradients that are 0.3 % off are as good, and bfloat16 and TF32
# are that accurate where sums don't cancel.
_MAX_ERROR = 0.02
_log = logging.getLogger(__name__)


def make_train_step(
    loop: Loop, task: FitTask, scales: Sequence[float] | None = None
) -> EagerTrainStep:
    """Returns the train step called ``loop``.

    Args:
        loop: "eager", "compiled", "graph", or "auto": a graph on a GPU, eager on a CPU. There,
            compiling costs 2 to 12 s and a whole run with a small tail less than 1 s.
        task: what is trained.
        scales: factor on the learning rate of each parameter; None for 1.

    Raises:
        ArgumentError: "graph" without a GPU; `GraphTrainStep.run` raises it if capture fails.
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
    return GraphTrainStep(task, scales, required=loop == "graph")


class EagerTrainStep:
    """Takes blocks of optimiser steps: one after the other, in plain autograd."""

    capturable = False

    def __init__(self, task: FitTask, scales: Sequence[float] | None = None) -> None:
        self.task, self.tail, self.parameters = task, task.tail, task.parameters
        self.scales = [1.0] * len(self.parameters) if scales is None else list(scales)
        self.device, self.row_work = task.device, task.row_work
        self._fast_enough: bool | None = None  # whether `fast_matmul` is accurate; None: not tried
        self.reset()

    def reset(self) -> None:
        """Clears the optimiser's moments for a new attempt."""
        self.optimiser: Any = (
            _FusedAdam(self.parameters, self.scales, self.task.betas)
            if self._fused()
            else torch.optim.AdamW(
                self._groups(), betas=self.task.betas, weight_decay=0.0, capturable=self.capturable
            )
        )

    def _groups(self) -> list[dict[str, Any]]:
        """Parameters by the factor on their learning rate, for torch.optim."""
        pairs = list(zip(self.parameters, self.scales, strict=True))
        return [
            {"params": [p for p, s in pairs if s == scale], "scale": scale}
            for scale in dict.fromkeys(self.scales)
        ]

    def run(self, index: Tensor, rates: Sequence[float] | Tensor) -> Tensor:
        """Takes ``len(rates)`` steps on the rows ``index``, int64 [steps, batch].

        Returns:
            The last step's loss, a scalar on the device.
        """
        loss = torch.zeros((), device=self.device)
        index = index.to(self.device)
        with self._precision(index[0]):
            for batch, rate in zip(index, rates, strict=True):
                self._set_rate(rate)
                loss = self.step(batch)
        return loss

    def _precision(self, batch: Tensor) -> AbstractContextManager[None]:
        """`fast_matmul`, if the task allows it and it hardly changes the gradient of a batch."""
        work = self.row_work * len(batch)
        fast = fast_matmul(self.device, work) if self.task.fast_matmul else None
        if fast is None:
            return nullcontext()
        if self._fast_enough is None:
            error = self._gradient_error(batch, fast)
            self._fast_enough = error <= _MAX_ERROR
            if not self._fast_enough:
                _log.info("products stay in float32: they would change gradients by %.1g", error)
        again = fast_matmul(self.device, work)
        return again if self._fast_enough and again is not None else nullcontext()

    def _gradient_error(self, batch: Tensor, fast: AbstractContextManager[None]) -> float:
        """How far ``fast`` moves the gradient of the rows ``batch``, as a share of its norm."""
        rows = self.task.train.select(batch, self.task.objective.copies_teacher)

        def gradient() -> Tensor:
            _, grads = self.task.objective.gradients(self.tail, self.parameters, rows)
            return torch.cat([g.flatten().float() for g in grads if g is not None])

        want = gradient()
        with fast:
            got = gradient()
        return float((got - want).norm() / want.norm().clamp(min=1e-30))

    def _set_rate(self, rate: Any) -> None:
        for group in self.optimiser.param_groups:
            group["lr"] = rate * group["scale"]

    def step(self, batch: Tensor) -> Tensor:
        """Takes one step on the rows ``batch``, int64 [B], without synchronising; the loss."""
        rows = self.task.train.select(batch, self.task.objective.copies_teacher)
        loss, grads = self.task.objective.gradients(self.tail, self.parameters, rows)
        if self.task.masks is not None:
            grads = [
                grad if grad is None or mask is None else grad * mask
                for grad, mask in zip(grads, self.task.masks, strict=True)
            ]
        if isinstance(self.optimiser, _FusedAdam):
            self.optimiser.step(cast(Sequence[Tensor], grads))
            return loss
        for parameter, grad in zip(self.parameters, grads, strict=True):
            parameter.grad = grad
        self.optimiser.step()
        return loss

    def _fused(self) -> bool:
        return all(
            p.dtype == torch.float32 and p.device.type in ("cpu", "cuda") for p in self.parameters
        )


class _FusedAdam:
    """AdamW without weight decay, on the fused kernel of `torch.optim.AdamW(fused=True)`.

    Around that kernel, torch.optim's step spends several times as long on hooks, grouping and
    checks: 6 % of a whole call on a small network. If a group's "lr" is a tensor, the step can be
    captured.
    """

    def __init__(
        self,
        parameters: list[nn.Parameter],
        scales: list[float],
        betas: tuple[float, float],
    ) -> None:
        self.betas = betas
        self.param_groups: list[dict[str, Any]] = []  # as in torch.optim
        for scale in dict.fromkeys(scales):
            places = [i for i, s in enumerate(scales) if s == scale]
            values = [parameters[i].detach() for i in places]
            group: dict[str, Any] = {"scale": scale, "lr": 1e-3, "places": places, "params": values}
            group |= {n: [torch.zeros_like(p) for p in values] for n in ("exp_avg", "exp_avg_sq")}
            group["steps"] = [torch.zeros((), device=p.device) for p in values]
            self.param_groups.append(group)

    def step(self, grads: Sequence[Tensor]) -> None:
        for group in self.param_groups:
            torch._foreach_add_(group["steps"], 1)
            own = [grads[i] for i in group["places"]]
            torch._fused_adamw_(
                group["params"], list(map(_laid_out_as, own, group["params"])), group["exp_avg"],
                group["exp_avg_sq"], [], group["steps"], lr=group["lr"], beta1=self.betas[0],
                beta2=self.betas[1], weight_decay=0.0, eps=1e-8, amsgrad=False, maximize=False,
            )  # fmt: skip

    @property
    def state(self) -> dict[Any, dict[str, Tensor]]:
        """The moments and step count of each parameter, as in torch.optim."""
        names = ("exp_avg", "exp_avg_sq", "steps")
        return {
            place: dict(zip(names, values, strict=True))
            for group in self.param_groups
            for place, *values in zip(group["places"], *(group[n] for n in names), strict=True)
        }


def _laid_out_as(grad: Tensor, parameter: Tensor) -> Tensor:
    """``grad`` in the parameter's strides, which the fused kernel takes for granted: gradients of
    convolutions on channels-last maps are channels-last.
    """
    if grad.stride() == parameter.stride():
        return grad
    return torch.empty_like(parameter).copy_(grad)


def fast_matmul(device: torch.device, work: int) -> AbstractContextManager[None] | None:
    """Products of float32 matrices in fewer digits, with float32 sums; None if nothing is gained.

    In bfloat16 on CPUs with units for it: with AMX, two to four times as fast for the last layer of
    an ImageNet model. In TF32 on GPUs since Ampere. Weights, optimiser and validation stay float32.
    Steps of at most ``SMALL`` multiply-adds stay so too.
    """
    if work <= SMALL or device.type not in ("cpu", "cuda") or not has_bfloat16(device):
        return None
    if device.type == "cuda":
        return fp32_precision(torch.backends.cuda.matmul, "tf32")
    return fp32_precision(torch.backends.mkldnn.matmul, "bf16")  # type: ignore[attr-defined]


class CompiledTrainStep(EagerTrainStep):
    """`EagerTrainStep` with the tail through torch.compile (default mode, static shapes)."""

    def __init__(self, task: FitTask, scales: Sequence[float] | None = None) -> None:
        super().__init__(task, scales)
        self.tail = cast(nn.Module, torch.compile(task.tail, dynamic=False))


class GraphTrainStep(EagerTrainStep):
    """A block of steps captured in one CUDA graph and replayed: one launch per block.

    Row indices, learning rates and losses go through buffers that the graph reads and writes;
    nothing in it depends on a value on the host. Blocks of another length than the first run
    eagerly. If capture fails, all do, with a warning, unless the graph is ``required``.
    """

    capturable = True

    def __init__(
        self, task: FitTask, scales: Sequence[float] | None = None, required: bool = False
    ) -> None:
        self.capturer = GraphCapturer("the training loop", required)
        super().__init__(task, scales)

    def reset(self) -> None:
        super().reset()
        for group in self.optimiser.param_groups:
            group["lr"] = torch.zeros((), device=self.device)
        self.graph: torch.cuda.CUDAGraph | None = None

    def run(self, index: Tensor, rates: Sequence[float] | Tensor) -> Tensor:
        index, rates = index.to(self.device), torch.as_tensor(rates, device=self.device)
        if self.graph is None and not self.capturer.failed:
            with self._precision(index[0]):
                self.graph = self._capture(index, rates)
        if self.graph is None or index.shape != self.index.shape:
            return super().run(index, rates)
        self.index.copy_(index)
        self.rates.copy_(rates)
        self.graph.replay()
        return self.losses[-1]

    def _set_rate(self, rate: Any) -> None:
        for group in self.optimiser.param_groups:
            group["lr"].copy_(rate * group["scale"])

    def _capture(self, index: Tensor, rates: Tensor) -> torch.cuda.CUDAGraph | None:
        """Captures the steps of a block; parameters and optimiser stay as they are."""
        self.index, self.rates = index.clone(), rates.clone()
        self.losses = torch.zeros(len(rates), device=self.device)
        before = copied_values(self.parameters)

        def first_steps() -> None:
            for batch in self.index[:3]:
                self.step(batch)
            self._restore(before)

        def block() -> None:
            for at in range(len(rates)):
                self._set_rate(self.rates[at])
                self.losses[at].copy_(self.step(self.index[at]))

        try:
            return self.capturer.try_capture(first_steps, block, self.parameters)
        finally:
            if self.capturer.failed:
                self._restore(before)

    @torch.no_grad()
    def _restore(self, parameters: list[Tensor]) -> None:
        """Undoes the steps of the warm-up."""
        for parameter, old in zip(self.parameters, parameters, strict=True):
            parameter.copy_(old)
            parameter.grad = None
        for state in self.optimiser.state.values():
            for value in state.values():
                value.zero_()
