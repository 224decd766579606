"""A GPU for machines without one: CPU tensors that say they lie on cuda:0, and meet no others.

PyTorch checks devices only where there are two. `on_fake_gpu` runs code with device="cuda" on the
CPU, and raises where an op gets tensors of both kinds, as a real GPU would. Kernels, graphs and
streams are not there: loops run eagerly.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from typing import Any
from unittest import mock

import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode, return_and_correct_aliasing
from torch.utils._pytree import tree_leaves, tree_map

from zsu_fast.synthesis import ascent
from zsu_fast.training import train_step

GPU = torch.device("cuda", 0)
# ops that may read a tensor of the other kind: copies, and indices on the CPU
MIXING = {
    "aten::copy_", "aten::_to_copy", "aten::index", "aten::index_put", "aten::index_put_",
    "aten::_index_put_impl_",
}  # fmt: skip


class DeviceMixError(RuntimeError):
    """An op got tensors of the CPU and of the fake GPU."""


class GpuTensor(Tensor):
    """``inner``, under another device's name."""

    inner: Tensor

    @staticmethod
    def __new__(cls, inner: Tensor) -> GpuTensor:
        made = Tensor._make_wrapper_subclass(  # type: ignore[attr-defined]
            cls, inner.size(), strides=inner.stride(), storage_offset=inner.storage_offset(),
            dtype=inner.dtype, device=torch.device("cpu"),
        )  # fmt: skip
        made.inner = inner
        return made

    @property
    def device(self) -> torch.device:
        return GPU

    def tolist(self) -> Any:
        return self.inner.tolist()

    def numpy(self, *_: Any, **__: Any) -> Any:
        raise DeviceMixError("numpy() of a tensor on the GPU")

    def cpu(self, *_: Any, **__: Any) -> Tensor:
        return _ToCpu.apply(self)

    def to(self, *given: Any, **named: Any) -> Tensor:
        where = _device_in(given, named)
        if where is not None and where.type == "cpu":
            return torch.Tensor.to(self.cpu(), *given, **named)
        rest = [g.dtype if isinstance(g, Tensor) else g for g in given]
        rest = [g for g in rest if isinstance(g, torch.dtype)]
        named = {k: v for k, v in named.items() if k != "device"}
        return torch.Tensor.to(self, *rest, **named) if rest or named else self

    @classmethod
    def __torch_dispatch__(cls, func: Any, _types: Any, args: Any = (), kwargs: Any = None) -> Any:
        return _run(func, args, kwargs or {})


class _ToCpu(torch.autograd.Function):
    @staticmethod
    def forward(_ctx: Any, tensor: GpuTensor) -> Tensor:
        return tensor.inner.detach().clone()

    @staticmethod
    def backward(_ctx: Any, grad: Tensor) -> Tensor:
        return GpuTensor(grad)


def _device_in(given: Any, named: dict[str, Any]) -> torch.device | None:
    for value in (*given, named.get("device")):
        if isinstance(value, str | torch.device):
            return torch.device(value)
        if isinstance(value, Tensor):
            return value.device
    return None


def _run(func: Any, args: Any, kwargs: dict[str, Any]) -> Any:
    name = func._schema.name
    tensors = [t for t in tree_leaves((args, kwargs)) if isinstance(t, Tensor)]
    ours = [t for t in tensors if isinstance(t, GpuTensor)]
    others = [t for t in tensors if not isinstance(t, GpuTensor)]
    indexed = name.startswith("aten::index") and not isinstance(args[0], GpuTensor)
    if ours and (indexed or (name not in MIXING and any(t.ndim for t in others))):
        shapes = [tuple(t.shape) for t in ours], [tuple(t.shape) for t in others]
        raise DeviceMixError(f"{name} of {shapes[0]} on the GPU and {shapes[1]} on the CPU")
    asked = kwargs.get("device")
    bare_args, bare = tree_map(
        lambda t: t.inner if isinstance(t, GpuTensor) else t, (args, dict(kwargs))
    )
    if asked is not None:
        bare["device"] = torch.device("cpu")
    out = func(*bare_args, **bare)
    if name == "aten::copy_":
        return args[0]
    on_gpu = torch.device(asked).type == "cuda" if asked is not None else bool(ours)
    if not on_gpu:
        return out
    out = tree_map(lambda t: GpuTensor(t) if type(t) is Tensor else t, out)
    return return_and_correct_aliasing(func, args, kwargs, out) if ours and not asked else out


class _Factories(TorchDispatchMode):
    def __torch_dispatch__(self, func: Any, _types: Any, args: Any = (), kwargs: Any = None) -> Any:
        return _run(func, args, kwargs or {})


def _move(module: nn.Module, *given: Any, **named: Any) -> nn.Module:
    """`nn.Module.to`, which can't turn a parameter into one of another class."""
    where = _device_in(given, named)
    if where is None:
        return _real_to(module, *given, **named)
    types = [v for v in (*given, *named.values()) if isinstance(v, torch.dtype)]
    for part in module.modules():
        for owner in (part._parameters, part._buffers):
            for name, tensor in owner.items():
                if tensor is None:
                    continue
                new = tensor.detach().to(where)
                if types and new.is_floating_point():
                    new = new.to(types[0])
                trained = isinstance(tensor, nn.Parameter)
                owner[name] = nn.Parameter(new, tensor.requires_grad) if trained else new
    return module


def _tensor(data: Any, *given: Any, **named: Any) -> Tensor:
    """`torch.tensor`, which allocates before any mode is asked."""
    where = named.pop("device", None)
    made = _real_tensor(data, *given, **named)
    return made if where is None or torch.device(where).type == "cpu" else GpuTensor(made)


_real_to, _real_tensor = nn.Module.to, torch.tensor


@contextmanager
def on_fake_gpu() -> Iterator[None]:
    """Inside, device="cuda" is the fake GPU."""
    torch._C._ensureCUDADeviceGuardSet()  # type: ignore[attr-defined]  as FakeTensor does
    with ExitStack() as stack:
        for owner, name, value in (
            (torch.cuda, "_lazy_init", lambda: None),
            (torch.cuda, "is_available", lambda: True),
            (torch.cuda, "current_device", lambda: 0),
            (torch.cuda, "synchronize", lambda _device=None: None),
            (torch.cuda, "get_device_name", lambda _device=None: "a fake GPU"),
            (torch.cuda, "get_device_capability", lambda _device=None: (7, 0)),
            (torch.cuda, "mem_get_info", lambda _device=None: (1 << 33, 1 << 33)),
            (torch.cuda, "memory_allocated", lambda _device=None: 0),
            (torch.cuda, "max_memory_allocated", lambda _device=None: 1 << 20),
            (torch.cuda, "reset_peak_memory_stats", lambda _device=None: None),
            (torch, "tensor", _tensor),
            (nn.Module, "to", _move),
            (ascent, "capture_steps", lambda step, _device: step),
            (train_step, "GraphTrainStep", train_step.EagerTrainStep),
        ):
            stack.enter_context(mock.patch.object(owner, name, value))
        stack.enter_context(_Factories())
        yield
