"""Splits a model before one of its modules by tracing it with torch.fx."""

from __future__ import annotations

import operator
import warnings
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn
from torch.fx import Graph, GraphModule, Node

from ..models.wrapper import LogitsModel
from ..runtime.fx_tracing import Tracer, break_reference_cycles, trace
from .batch_dim import (
    BatchDim,
    BatchMultiple,
    BoundaryTensors,
    NotBatchLinear,
    infer_batch_dim,
    infer_value,
    two_batches,
)


def split_by_fx(
    model: LogitsModel, name: str, images: Tensor
) -> tuple[nn.Module, nn.Module] | None:
    """Splits ``model`` before its module ``name``; arguments as for `split.split_at`.

    Returns:
        The backbone and the tail, or None if torch.fx can't trace the model, or if a value that
        passes between them depends on the images in a way that can't be recomputed.
    """
    path = f"module.{name}"
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            traced = trace(model, _ParentsTracer(model.get_submodule(path)))
    except Exception:  # noqa: BLE001  control flow on values: left to `split_by_replay`
        return None
    nodes = list(traced.graph.nodes)
    calls = [i for i, n in enumerate(nodes) if n.op == "call_module" and n.target == path]
    if not calls:
        return None
    start = calls[0]
    before, after = nodes[:start], nodes[start:]
    tail_nodes = set(after)
    crossing = [n for n in before if any(user in tail_nodes for user in n.users)]
    parameters = [n for n in crossing if n.op == "get_attr"]  # the tail gets its own reference
    boundary = _find_boundary(traced, [n for n in crossing if n.op != "get_attr"], images)
    if boundary is None:
        return None
    graphs = _backbone_graph(before, boundary), _tail_graph(traced, [*parameters, *after], boundary)
    for graph in graphs:
        graph.lint()
    backbone, tail = (GraphModule(traced, graph) for graph in graphs)
    break_reference_cycles(backbone, tail)
    dims = list(boundary.batch_dims.values())
    if all(dim.plain for dim in dims):
        return backbone, tail
    return _PackedBackbone(backbone, dims), _PackedTail(tail, dims)


class _ParentsTracer(Tracer):
    """Traces into the modules that contain ``module``, and into no other."""

    def __init__(self, module: nn.Module) -> None:
        super().__init__()
        self.module = module

    def is_leaf_module(self, m: nn.Module, _path: str) -> bool:
        return m is self.module or all(part is not self.module for part in m.modules())


@dataclass
class _Boundary:
    """The values that pass from the backbone to the tail.

    Attributes:
        batch_dims: of the boundary tensors.
        others: values that the tail holds or computes itself: tensors that depend on parameters
            alone, and values other than tensors, with a `BatchMultiple` for what counts images.
    """

    batch_dims: dict[Node, BatchDim] = field(default_factory=dict)
    others: dict[Node, Any] = field(default_factory=dict)


def _find_boundary(traced: GraphModule, crossing: list[Node], images: Tensor) -> _Boundary | None:
    """Sorts the values of ``crossing``; None if there is one that a tail can't be given."""
    runs = []
    for batch in two_batches(images):
        interpreter = torch.fx.Interpreter(traced, garbage_collect_values=False)
        try:
            with torch.no_grad():
                interpreter.run(batch)
        except Exception:  # noqa: BLE001  tracing took a wrong branch: a module had returned None
            return None
        runs.append(interpreter.env)
    boundary = _Boundary()
    for node in crossing:
        two, three = (run[node] for run in runs)
        tensors = isinstance(two, Tensor) and isinstance(three, Tensor)
        batch_dim = infer_batch_dim(two, three) if tensors else None
        if batch_dim is not None:
            boundary.batch_dims[node] = batch_dim
            continue
        try:
            boundary.others[node] = infer_value(two, three)
        except NotBatchLinear:
            return None
    return boundary if boundary.batch_dims else None


def _backbone_graph(nodes: list[Node], boundary: _Boundary) -> Graph:
    """All of ``nodes``, since x.relu_() has an effect even if nothing reads its value."""
    graph, copies = Graph(), dict[Node, Any]()
    for node in nodes:
        copies[node] = graph.node_copy(node, copies.__getitem__)
    graph.output(tuple(copies[n] for n in boundary.batch_dims))
    return graph


def _tail_graph(traced: GraphModule, nodes: list[Node], boundary: _Boundary) -> Graph:
    """``nodes``, fed with the boundary tensors; constants become buffers of ``traced``."""
    graph = Graph()
    copies: dict[Node, Any] = {
        node: graph.placeholder(f"feature_{i}") for i, node in enumerate(boundary.batch_dims)
    }
    first, batch_dim = next(iter(boundary.batch_dims.items()))
    batch: Node | None = None
    for i, (node, value) in enumerate(boundary.others.items()):
        if isinstance(value, Tensor):
            traced.register_buffer(f"_constant_{i}", value, persistent=False)
            copies[node] = graph.get_attr(f"_constant_{i}")
            continue
        if batch is None:
            batch = graph.call_method("size", (copies[first], batch_dim.dim))
            if batch_dim.per_image > 1:
                batch = graph.call_function(operator.floordiv, (batch, batch_dim.per_image))
        copies[node] = _in_graph(value, graph, batch)
    for node in nodes:
        copies[node] = graph.node_copy(node, copies.__getitem__)
    return graph


def _in_graph(value: Any, graph: Graph, batch: Node) -> Any:
    """``value`` with each `BatchMultiple` computed from the batch size."""
    if isinstance(value, BatchMultiple):
        return graph.call_function(operator.mul, (batch, value.times))
    if isinstance(value, tuple | list):
        return type(value)(_in_graph(v, graph, batch) for v in value)
    return value


class _PackedBackbone(nn.Module):
    """A backbone whose boundary tensors are brought to [N, ...]."""

    def __init__(self, backbone: nn.Module, batch_dims: Sequence[BatchDim]) -> None:
        super().__init__()
        self.backbone, self.batch_dims = backbone, batch_dims

    def forward(self, x: Tensor) -> BoundaryTensors:
        tensors = self.backbone(x)
        return tuple(dim.pack(t) for dim, t in zip(self.batch_dims, tensors, strict=True))


class _PackedTail(nn.Module):
    """A tail that takes the boundary tensors as `_PackedBackbone` returns them."""

    def __init__(self, tail: nn.Module, batch_dims: Sequence[BatchDim]) -> None:
        super().__init__()
        self.tail, self.batch_dims = tail, batch_dims

    def forward(self, *features: Tensor) -> Tensor:
        tensors = [dim.unpack(f) for dim, f in zip(self.batch_dims, features, strict=True)]
        return self.tail(*tensors)
