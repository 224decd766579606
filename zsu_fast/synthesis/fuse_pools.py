"""Replaces max pooling, with the relu before or after it, by the op `max_pool`."""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from ..ops import backends
from ..ops.max_pool import max_pool, supported_windows
from ..runtime.fx_tracing import trace_or_none

_POOL = (F.max_pool2d, torch.max_pool2d)
_RELU = (F.relu, torch.relu, "relu")


class MaxPool(nn.Module):
    """`max_pool`, for float [N, C, H, W]."""

    def __init__(self, kernel: int, stride: int, padding: int, ceil_mode: bool, relu: bool) -> None:
        super().__init__()
        self.kernel, self.stride, self.padding = kernel, stride, padding
        self.ceil_mode, self.relu = ceil_mode, relu

    def forward(self, x: Tensor) -> Tensor:
        return max_pool(
            x, self.kernel, self.stride, self.padding, ceil_mode=self.ceil_mode, relu=self.relu,
            backend="cpp",
        )  # fmt: skip


def fuse_pools(model: nn.Module) -> torch.fx.GraphModule | None:
    """Replaces max pooling with square windows by `MaxPool`, which computes a relu before or after
    it, too; None if there is nothing to replace. It may change ``model``'s graph.

    The order of the two does not matter, but the gradient's path where several values of a window
    are cut off, and it is 0 there either way.
    """
    if backends.why_unavailable("cpp", "cpu") is not None:
        return None
    if not any(isinstance(m, nn.Conv2d) for m in model.modules()):
        return None
    traced = trace_or_none(model, "max pooling stays as it is")
    if traced is None:
        return None
    modules = dict(traced.named_modules())
    pools = [(node, windows) for node in traced.graph.nodes if (windows := _windows(node, modules))]
    for number, (node, windows) in enumerate(pools):
        before, after = node.all_input_nodes[0], next(iter(node.users), None)
        relu = [before] if _is_relu(before, modules) and len(before.users) == 1 else []
        if not relu and after is not None and len(node.users) == 1 and _is_relu(after, modules):
            relu = [after]
        name = f"fused_max_pool_{number}"
        traced.add_submodule(name, MaxPool(*windows, bool(relu)))
        source = before.all_input_nodes[0] if relu == [before] else before
        with traced.graph.inserting_before(node):
            fused = traced.graph.call_module(name, (source,))
        for replaced in [node, *relu] if relu == [before] else [*relu, node]:
            replaced.replace_all_uses_with(fused)
            traced.graph.erase_node(replaced)
    if not pools:
        return None
    traced.recompile()
    return traced


def _is_relu(node: torch.fx.Node, modules: dict[str, nn.Module]) -> bool:
    if node.op == "call_module":
        return type(modules.get(str(node.target))) is nn.ReLU
    return node.op in ("call_function", "call_method") and node.target in _RELU


def _windows(
    node: torch.fx.Node, modules: dict[str, nn.Module]
) -> tuple[int, int, int, bool] | None:
    """Kernel, stride, padding and ceil_mode of the max pooling that ``node`` computes; None if it
    computes none, or one that `MaxPool` doesn't.
    """
    names = ("kernel_size", "stride", "padding", "dilation", "ceil_mode", "return_indices")
    if node.op == "call_module" and type(modules[str(node.target)]) is nn.MaxPool2d:
        pool = modules[str(node.target)]
        return supported_windows(**{name: getattr(pool, name) for name in names})
    if node.op == "call_function" and node.target in _POOL and len(node.all_input_nodes) == 1:
        given = dict(zip(names, node.args[1:], strict=False)) | dict(node.kwargs)
        return supported_windows(**given)
    return None
