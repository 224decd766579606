"""Splits a model before one of its modules by tracing it with torch.fx."""

from __future__ import annotations

import operator
import warnings
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

from ..models.wrapper import LogitsModel
from ..runtime.fx_tracing import Tracer, break_reference_cycles, trace
from .batch_dim import (
    BatchDim,
    BatchMultiple,
    Features,
    Halves,
    NotBatchLinear,
    infer_batch_dim,
    infer_value,
    two_batches,
)


class _PackedBackbone(nn.Module):
    """A head whose outputs are brought to [N, ...]."""

    def __init__(self, head: nn.Module, rules: Sequence[BatchDim]) -> None:
        super().__init__()
        self.backbone, self.rules = head, rules

    def forward(self, x: Tensor) -> Features:
        return tuple(r.pack(t) for r, t in zip(self.rules, self.backbone(x), strict=True))


class _PackedTail(nn.Module):
    """A tail that takes them as `_PackedBackbone` returns them."""

    def __init__(self, tail: nn.Module, rules: Sequence[BatchDim]) -> None:
        super().__init__()
        self.tail, self.rules = tail, rules

    def forward(self, *features: Tensor) -> Tensor:
        return self.tail(*[r.unpack(f) for r, f in zip(self.rules, features, strict=True)])


class _Around(Tracer):
    """Traces through the modules that contain the one at ``path``, and through no other."""

    def __init__(self, path: str) -> None:
        super().__init__()
        self.path = path

    def is_leaf_module(self, _module: nn.Module, path: str) -> bool:
        return not self.path.startswith(f"{path}.")


def split_by_fx(model: LogitsModel, name: str, images: Tensor) -> Halves | None:
    """The halves, or None where symbolic tracing does not get through."""
    path = f"module.{name}"
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            traced = trace(model, _Around(path))
    except Exception:  # noqa: BLE001  control flow on values: `split_by_replay` handles those
        return None
    nodes = list(traced.graph.nodes)
    start = next(
        (i for i, n in enumerate(nodes) if n.op == "call_module" and n.target == path), None
    )
    if start is None:
        return None
    before, inside = nodes[:start], set(nodes[start:])
    crossing = [n for n in before if any(u in inside for u in n.users)]
    own = {n for n in crossing if n.op == "get_attr"}  # parameters: the tail gets its own
    after = [n for n in nodes if n in own or n in inside]
    crossing = [n for n in crossing if n not in own]
    runs = [_Recorder(traced, set(crossing)).values_for(batch) for batch in two_batches(images)]
    rules: dict[torch.fx.Node, BatchDim] = {}
    others: dict[torch.fx.Node, Any] = {}
    for node in crossing:
        two, three = runs[0][node], runs[1][node]
        if isinstance(two, Tensor) and isinstance(three, Tensor):
            rule = infer_batch_dim(two, three)
            if rule is not None:
                rules[node] = rule
            elif two.shape == three.shape and torch.equal(two, three):
                others[node] = two.detach()  # made of parameters alone
            else:
                return None
        else:
            try:
                others[node] = infer_value(two, three)
            except NotBatchLinear:
                return None
    if not rules:
        return None
    head_graph = torch.fx.Graph()
    head_map: dict[torch.fx.Node, Any] = {}
    for node in before:  # all of them: x.relu_() counts even if nothing uses its value
        head_map[node] = head_graph.node_copy(node, lambda n: head_map[n])
    head_graph.output(tuple(head_map[n] for n in rules))
    tail_graph = torch.fx.Graph()
    tail_map: dict[torch.fx.Node, Any] = {}
    for i, node in enumerate(rules):
        tail_map[node] = tail_graph.placeholder(f"feature_{i}")
    first, rule = next(iter(rules.items()))
    batch: torch.fx.Node | None = None
    for i, (node, value) in enumerate(others.items()):
        if isinstance(value, Tensor):
            traced.register_buffer(f"_constant_{i}", value, persistent=False)
            tail_map[node] = tail_graph.get_attr(f"_constant_{i}")
            continue
        if batch is None:
            batch = tail_graph.call_method("size", (tail_map[first], rule.dim))
            if rule.per_image > 1:
                batch = tail_graph.call_function(operator.floordiv, (batch, rule.per_image))
        tail_map[node] = _in_graph(value, tail_graph, batch)
    for node in after:
        tail_map[node] = tail_graph.node_copy(node, lambda n: tail_map[n])
    halves = []
    for graph in (head_graph, tail_graph):
        graph.lint()
        halves.append(torch.fx.GraphModule(traced, graph))
    break_reference_cycles(*halves)
    if all(r.plain for r in rules.values()):
        return halves[0], halves[1]
    listed = list(rules.values())
    return _PackedBackbone(halves[0], listed), _PackedTail(halves[1], listed)


def _in_graph(value: Any, graph: torch.fx.Graph, batch: torch.fx.Node) -> Any:
    """``value`` with `BatchMultiple` computed from the batch size."""
    if isinstance(value, BatchMultiple):
        return graph.call_function(operator.mul, (batch, value.times))
    if isinstance(value, tuple | list):
        return type(value)(_in_graph(v, graph, batch) for v in value)
    return value


class _Recorder(torch.fx.Interpreter):
    """Runs a graph and keeps the values of some of its nodes."""

    def __init__(self, traced: torch.fx.GraphModule, wanted: set[torch.fx.Node]) -> None:
        super().__init__(traced)
        self.wanted = wanted
        self.values: dict[torch.fx.Node, Any] = {}

    def values_for(self, images: Tensor) -> dict[torch.fx.Node, Any]:
        with torch.no_grad():
            self.run(images)
        return self.values

    def run_node(self, n: torch.fx.Node) -> Any:
        value = super().run_node(n)
        if n in self.wanted:
            self.values[n] = value
        return value
