"""Replaces convolutions by frozen ones, each together with the activation that follows it."""

from __future__ import annotations

import copy
from collections import Counter

import torch
from torch import nn
from torch.nn import functional as F

from ..runtime.fx_tracing import Tracer, trace_or_none
from .frozen_conv import NONE, Activation, FrozenConv, is_supported, is_winograd_supported

_RELU = (F.relu, torch.relu, torch.relu_, "relu", "relu_")


class _ConvTracer(Tracer):
    """Takes subclasses of convolutions as one step: timm's choose their padding by the size."""

    def is_leaf_module(self, m: nn.Module, module_qualified_name: str) -> bool:
        return isinstance(m, nn.Conv2d) or super().is_leaf_module(m, module_qualified_name)


def fuse_convs(model: nn.Module, winograd: bool = False) -> nn.Module | None:
    """A copy whose supported convolutions are `FrozenConv`s; None if there are none or, with
    ``winograd``, if `winograd_conv` would compute none of them.

    If torch.fx can't trace the model, activations stay where they are.
    """
    if not any(map(is_winograd_supported if winograd else is_supported, model.modules())):
        return None
    fused: nn.Module = copy.deepcopy(model)
    activations: dict[str, Activation] = {}
    traced = trace_or_none(fused, "activations stay after their convolutions", _ConvTracer())
    if traced is not None:
        fused, activations = traced, _take_activations(traced)
    for name, layer in list(fused.named_modules()):
        if isinstance(layer, nn.Conv2d) and is_supported(layer):
            fused.set_submodule(name, FrozenConv(layer, activations.get(name, NONE), winograd))
    return fused


def _take_activations(traced: torch.fx.GraphModule) -> dict[str, Activation]:
    """Takes out of the graph each activation that is a convolution's only user, and returns them
    by the convolution's name.
    """
    modules = dict(traced.named_modules())
    calls = Counter(node.target for node in traced.graph.nodes if node.op == "call_module")
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
            alone = before.op == "call_module" and calls[name] == 1 and len(before.users) == 1
            if not alone or name in found or not is_supported(modules[name]):
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
