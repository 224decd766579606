"""A GPU for machines without one: CPU tensors that report the device cuda:0.

`on_fake_gpu` runs code with device="cuda" on the CPU, and raises if an op gets tensors of both
devices, as a real GPU would. There are no kernels or streams. Loops run eagerly, or with
``graphs=True`` in graphs that behave as CUDA's: capture changes no tensor and refuses reads by the
host, replay runs what was captured.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from typing import Any
from unittest import mock

import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode, return_and_correct_aliasing
from torch.utils._pytree import tree_leaves, tree_map

from zsu_fast.runtime import cuda_graph
from zsu_fast.training import train_step

GPU = torch.device("cuda", 0)
# ops that may read a tensor of the other device: copies, and indices on the CPU; index_add is the
# derivative of index_select, for which autograd makes zeros where the memory really is
MIXING = {
    "aten::copy_", "aten::_to_copy", "aten::index", "aten::index_put", "aten::index_put_",
    "aten::_index_put_impl_", "aten::index_add",
}  # fmt: skip


# ops that make the host wait for a value of the device
HOST_READS = {"aten::_local_scalar_dense", "aten::nonzero", "aten::masked_select", "aten::equal"}


class DeviceMixError(RuntimeError):
    """An op got tensors on the CPU and on the fake GPU."""


class GpuTensor(Tensor):
    """The CPU tensor ``inner``, which reports another device."""

    inner: Tensor

    @staticmethod
    def __new__(cls, inner: Tensor) -> GpuTensor:
        wrapper = Tensor._make_wrapper_subclass(  # type: ignore[attr-defined]
            cls, inner.size(), strides=inner.stride(), storage_offset=inner.storage_offset(),
            dtype=inner.dtype, device=torch.device("cpu"),
        )  # fmt: skip
        wrapper.inner = inner
        return wrapper

    @property
    def device(self) -> torch.device:
        return GPU

    def tolist(self) -> Any:
        _refuse_while_capturing("tolist")
        return self.inner.tolist()

    def numpy(self, *_: Any, **__: Any) -> Any:
        raise DeviceMixError("numpy() of a tensor on the GPU")

    def cpu(self, *_: Any, **__: Any) -> Tensor:
        _refuse_while_capturing("cpu")
        return _ToCpu.apply(self)

    def to(self, *args: Any, **kwargs: Any) -> Tensor:
        device = _device_in(args, kwargs)
        if device is not None and device.type == "cpu":
            return torch.Tensor.to(self.cpu(), *args, **kwargs)
        rest = [a.dtype if isinstance(a, Tensor) else a for a in args]
        rest = [a for a in rest if isinstance(a, torch.dtype)]
        kwargs = {k: v for k, v in kwargs.items() if k != "device"}
        return torch.Tensor.to(self, *rest, **kwargs) if rest or kwargs else self

    def quantile(self, q: float) -> Tensor:
        """torch makes a tensor of ``q`` where the memory really is."""
        return GpuTensor(self.inner.quantile(q))

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


class FakeGraph:
    """A captured function. Its capture runs it and then undoes what it did to tensors."""

    current: FakeGraph | None = None

    def __init__(self, run: Callable[[], None]) -> None:
        self.replay = run
        self._storages: dict[int, tuple[torch.UntypedStorage, torch.UntypedStorage]] = {}
        FakeGraph.current = self
        try:
            run()
        except RuntimeError as error:  # as on a GPU, the end of the capture raises another
            raise RuntimeError("CUDA error: operation failed due to a previous error") from error
        finally:
            FakeGraph.current = None
            for storage, old in self._storages.values():
                storage.copy_(old)

    def before(self, func: Any, args: Any, kwargs: dict[str, Any]) -> None:
        """Notes the storages that an op is about to change."""
        if func._schema.name in HOST_READS:
            _refuse_while_capturing(func._schema.name)
        for place, argument in enumerate(func._schema.arguments):
            if argument.alias_info is None or not argument.alias_info.is_write:
                continue
            value = args[place] if place < len(args) else kwargs.get(argument.name)
            for tensor in tree_leaves(value):
                storage = getattr(tensor, "inner", tensor).untyped_storage()
                self._storages.setdefault(storage.data_ptr(), (storage, storage.clone()))


def _refuse_while_capturing(name: str) -> None:
    if FakeGraph.current is not None:
        raise RuntimeError(f"CUDA error: {name} not permitted when stream is capturing")


def _device_in(args: Any, kwargs: dict[str, Any]) -> torch.device | None:
    for value in (*args, kwargs.get("device")):
        if isinstance(value, str | torch.device):
            return torch.device(value)
        if isinstance(value, Tensor):
            return value.device
    return None


def _run(func: Any, args: Any, kwargs: dict[str, Any]) -> Any:
    name = func._schema.name
    if FakeGraph.current is not None:
        FakeGraph.current.before(func, args, kwargs)
    tensors = [t for t in tree_leaves((args, kwargs)) if isinstance(t, Tensor)]
    ours = [t for t in tensors if isinstance(t, GpuTensor)]
    others = [t for t in tensors if not isinstance(t, GpuTensor)]
    indexed = name.startswith("aten::index") and name != "aten::index_add"
    indexed = indexed and not isinstance(args[0], GpuTensor)
    if ours and (indexed or (name not in MIXING and any(t.ndim for t in others))):
        shapes = [tuple(t.shape) for t in ours], [tuple(t.shape) for t in others]
        raise DeviceMixError(f"{name} of {shapes[0]} on the GPU and {shapes[1]} on the CPU")
    wanted = kwargs.get("device")
    inner_args, inner_kwargs = tree_map(
        lambda t: t.inner if isinstance(t, GpuTensor) else t, (args, dict(kwargs))
    )
    if wanted is not None:
        inner_kwargs["device"] = torch.device("cpu")
    out = func(*inner_args, **inner_kwargs)
    if name == "aten::copy_":
        return args[0]
    on_gpu = torch.device(wanted).type == "cuda" if wanted is not None else bool(ours)
    if not on_gpu:
        return out
    out = tree_map(lambda t: GpuTensor(t) if type(t) is Tensor else t, out)
    return return_and_correct_aliasing(func, args, kwargs, out) if ours and not wanted else out


class _Factories(TorchDispatchMode):
    def __torch_dispatch__(self, func: Any, _types: Any, args: Any = (), kwargs: Any = None) -> Any:
        return _run(func, args, kwargs or {})


def _move(module: nn.Module, *args: Any, **kwargs: Any) -> nn.Module:
    """Replaces `nn.Module.to`, which can't turn a parameter into one of another class."""
    device = _device_in(args, kwargs)
    if device is None:
        return _real_to(module, *args, **kwargs)
    types = [v for v in (*args, *kwargs.values()) if isinstance(v, torch.dtype)]
    for part in module.modules():
        for owner in (part._parameters, part._buffers):
            for name, tensor in owner.items():
                if tensor is None:
                    continue
                new = tensor.detach().to(device)
                if types and new.is_floating_point():
                    new = new.to(types[0])
                trained = isinstance(tensor, nn.Parameter)
                owner[name] = nn.Parameter(new, tensor.requires_grad) if trained else new
    return module


def _tensor(data: Any, *args: Any, **kwargs: Any) -> Tensor:
    """Replaces `torch.tensor`, which dispatch modes can't redirect."""
    device = kwargs.pop("device", None)
    tensor = _real_tensor(data, *args, **kwargs)
    return tensor if device is None or torch.device(device).type == "cpu" else GpuTensor(tensor)


def _as_tensor(data: Any, *args: Any, **kwargs: Any) -> Tensor:
    """Replaces `torch.as_tensor`, likewise."""
    return data.to(*args, **kwargs) if isinstance(data, Tensor) else _tensor(data, *args, **kwargs)


_real_to, _real_tensor, _RealGenerator = nn.Module.to, torch.tensor, torch.Generator


class _Generator:
    """Replaces `torch.Generator`: one of the GPU draws where the memory really is."""

    def __new__(cls, _device: Any = "cpu") -> Any:
        return _RealGenerator()


@contextmanager
def on_fake_gpu(graphs: bool = False) -> Iterator[None]:
    """In the block, device="cuda" is the fake GPU; see the module for ``graphs``."""
    torch._C._ensureCUDADeviceGuardSet()  # type: ignore[attr-defined]  as FakeTensor does
    eagerly = (
        (cuda_graph.GraphCapturer, "try_capture", lambda *_, **_options: None),
        (train_step, "GraphTrainStep", lambda *args, **_: train_step.EagerTrainStep(*args)),
    )
    captured = (
        (cuda_graph, "warm_up", lambda run, _device: run()),
        (cuda_graph, "capture", FakeGraph),
    )
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
            (torch, "as_tensor", _as_tensor),
            (torch, "Generator", _Generator),
            (nn.Module, "to", _move),
            *(captured if graphs else eagerly),
        ):
            stack.enter_context(mock.patch.object(owner, name, value))
        stack.enter_context(_Factories())
        yield
