"""Replaces convolutions by `FrozenConv`s and `SameConv`s, each together with what is added to its
output, such as a residual connection, and with the activation that follows; and means over all
pixels by `SpatialMean`s.
"""

from __future__ import annotations

import copy
import operator
from collections import Counter
from typing import Any

import torch
from torch import nn
from torch.nn import functional as F

from ..runtime.fx_tracing import Tracer, trace_or_none
from .frozen_conv import NONE, Activation, FrozenConv, is_supported, is_winograd_supported
from .same_conv import SameConv, is_same_conv
from .spatial_mean import SpatialMean, is_spatial_mean

_ADD = (operator.add, operator.iadd, torch.add, "add", "add_")
_RELU = (F.relu, torch.relu, torch.relu_, "relu", "relu_")


class _ConvTracer(Tracer):
    """Takes subclasses of convolutions as one step: timm's choose their padding by the size."""

    def is_leaf_module(self, m: nn.Module, module_qualified_name: str) -> bool:
        return isinstance(m, nn.Conv2d) or super().is_leaf_module(m, module_qualified_name)


def fuse_convs(model: nn.Module, winograd: bool = False) -> nn.Module | None:
    """A copy whose supported convolutions are frozen; None if there are none or, with
    ``winograd``, if `winograd_conv` would compute none of them.

    If torch.fx can't trace the model, sums and activations stay where they are.
    """
    if not any(map(is_winograd_supported if winograd else _can_freeze, model.modules())):
        return None
    fused: nn.Module = copy.deepcopy(model)
    activations: dict[str, Activation] = {}
    traced = trace_or_none(fused, "activations stay after their convolutions", _ConvTracer())
    if traced is not None:
        sums = _take_sums(traced)
        fused, activations = traced, _take_activations(traced, sums)
    for name, layer in list(fused.named_modules()):
        if isinstance(layer, nn.Conv2d) and _can_freeze(layer):
            kind = FrozenConv if is_supported(layer) else SameConv
            fused.set_submodule(name, kind(layer, activations.get(name, NONE), winograd))
        elif is_spatial_mean(layer):
            fused.set_submodule(name, SpatialMean())
    return fused


def _can_freeze(layer: nn.Module) -> bool:
    return is_supported(layer) or is_same_conv(layer)


def _take_sums(traced: torch.fx.GraphModule) -> set[str]:
    """Takes out of the graph each sum of two tensors that is a convolution's only user, gives the
    other one to the convolution as a second argument, and returns the names of these convolutions.
    """
    modules = dict(traced.named_modules())
    calls = _calls(traced)
    found: set[str] = set()
    for node in list(traced.graph.nodes):
        if node.op not in ("call_function", "call_method") or node.target not in _ADD:
            continue
        if node.kwargs or len(node.args) != 2 or node.args != tuple(node.all_input_nodes):
            continue  # a factor, a number, or twice the same
        for conv, other in (node.args, node.args[::-1]):
            name = str(conv.target)
            if not _is_alone(conv, modules, calls) or len(conv.args) != 1:
                continue
            with traced.graph.inserting_before(node):
                both = traced.graph.call_module(name, (conv.args[0], other))
            node.replace_all_uses_with(both)
            traced.graph.erase_node(node)
            traced.graph.erase_node(conv)
            found.add(name)
            break
    return found


def _is_alone(node: torch.fx.Node, modules: dict[str, nn.Module], calls: Counter[Any]) -> bool:
    """Whether ``node`` is the only call of a convolution that can be frozen, and has one user."""
    called_once = node.op == "call_module" and calls[node.target] == 1 == len(node.users)
    return called_once and _can_freeze(modules[str(node.target)])


def _calls(traced: torch.fx.GraphModule) -> Counter[Any]:
    """How many times each module is called."""
    return Counter(node.target for node in traced.graph.nodes if node.op == "call_module")


def _take_activations(traced: torch.fx.GraphModule, sums: set[str]) -> dict[str, Activation]:
    """Takes out of the graph each activation that is a convolution's only user, and returns them
    by the convolution's name. Of the convolutions ``sums``, only relu is taken.
    """
    modules = dict(traced.named_modules())
    calls = _calls(traced)
    found: dict[str, Activation] = {}
    for node in list(traced.graph.nodes):
        before = node.args[0] if node.args else None
        if not isinstance(before, torch.fx.Node):
            continue
        activation = _activation(node, modules)
        if activation is None and not _does_nothing(node, modules):
            continue
        if activation is not None:
            name = str(before.target)
            if not _is_alone(before, modules, calls) or name in found:
                continue
            if name in sums and activation.name != "relu":
                continue
            found[name] = activation
        node.replace_all_uses_with(before)
        traced.graph.erase_node(node)
    traced.recompile()
    return found


def _does_nothing(node: torch.fx.Node, modules: dict[str, nn.Module]) -> bool:
    return node.op == "call_module" and type(modules[str(node.target)]) is nn.Identity


def _activation(node: torch.fx.Node, modules: dict[str, nn.Module]) -> Activation | None:
    """What ``node`` computes, if oneDNN computes it together with a convolution."""
    if node.op == "call_module":
        layer = modules[str(node.target)]
        if type(layer) is nn.ReLU:
            return Activation("relu")
        if isinstance(layer, nn.Hardtanh) and type(layer) in (nn.ReLU6, nn.Hardtanh):
            return Activation("hardtanh", (float(layer.min_val), float(layer.max_val)))
        return None
    if node.op in ("call_function", "call_method") and node.target in _RELU:
        return Activation("relu")
    if node.op == "call_function" and node.target is F.relu6:
        return Activation("hardtanh", (0.0, 6.0))
    return None
