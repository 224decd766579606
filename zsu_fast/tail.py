"""Where a model is cut: a frozen head, evaluated once, and a trainable tail.

The cut is a point in the data flow, not in a list of layers: everything that runs before the
named module is the head, everything from it on is the tail, and whatever values cross the cut
(one feature vector, or a feature map and the skip connection beside it) are the tail's inputs.
"""

from __future__ import annotations

import warnings
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from .classifier import LogitsModel
from .errors import ArgumentError, ModelError

Features = tuple[Tensor, ...]


class _Tied(ArgumentError):
    """The tail would train weights that the head uses too."""


@dataclass
class Split:
    """A model cut in two: ``tail(*head(x)) == model(x)``.

    Attributes:
        head: images [N, ...] -> the tuple of tensors that cross the cut, each [N, ...].
        tail: those tensors -> logits [N, C].
        name: the module at which the tail starts.
        reason: why there, in words.
        parameters: names (in the user's model) of what the tail trains.
        output_level: True if the tail is the last layer alone: the features stay as they are, so
            only the outputs forget.
    """

    head: nn.Module
    tail: nn.Module
    name: str
    reason: str
    parameters: list[str]
    output_level: bool

    def features(self, images: Tensor, batch: int = 256) -> Features:
        """The head's output for all images, computed in batches, without gradients."""
        with torch.no_grad():
            parts = [self.head(chunk) for chunk in images.split(batch)]
        return tuple(torch.cat(column) for column in zip(*parts, strict=True))


def find_split(model: LogitsModel, at: str, images: Tensor, labels: Tensor) -> Split:
    """Cuts ``model`` at ``at``: "auto", "last", or a module's name.

    "auto" takes the *first responsive layer*: the first one whose input tells the classes apart
    at least 0.9 times as well as the best layer's does, by the ratio of the variance between
    classes to that within them (`responsiveness`). "last" takes the last layer with weights.
    Where such a tail shares weights with the head, the cut moves to an earlier layer.

    Args:
        model: from `working_copy`.
        at: as above.
        images, labels: impressions of every class, [N, ...] and int64 [N].

    Raises:
        ArgumentError: no such module, or a tail that can't be trained.
    """
    probe = images[:4]
    if at not in ("auto", "last"):
        return split_at(model, at, probe, "named by the caller")
    if at == "last":
        layers = [(name, 1.0) for name in layer_names(model.model, probe)]
        chosen, reason = len(layers) - 1, "the last layer with weights"
    else:
        layers = responsiveness(model, images, labels)
        best = max(ratio for _, ratio in layers)
        chosen = next(i for i, (_, ratio) in enumerate(layers) if ratio >= 0.9 * best)
        reason = (
            f"first responsive layer: variance between classes over that within them is "
            f"{layers[chosen][1]:.3g} at its input, {best:.3g} at the best of {len(layers)} layers"
        )
    for i in range(chosen, -1, -1):
        name = layers[i][0]
        try:
            return split_at(model, name, probe, reason)
        except _Tied:
            reason = f"{reason}; moved ahead of {name!r}, whose weights are tied to the head"
    raise ModelError(
        "each layer shares its weights with an earlier one",
        "Name the module at which the tail is to start, by tail=.",
    )


def responsiveness(model: LogitsModel, images: Tensor, labels: Tensor) -> list[tuple[str, float]]:
    """How well each layer's input tells the classes apart, in the order of the forward pass.

    The ratio of the variance between class means to the variance around them (Fisher's, as the
    traces of both scatter matrices), on impressions; maps and tokens are averaged to at most
    4 x 4 positions first. 0 is none, without an upper bound.

    Args:
        model: from `working_copy`.
        images, labels: impressions of every class.

    Returns:
        (module name, ratio) of each layer with weights.
    """
    names = layer_names(model.model, images[:2])
    modules = dict(model.model.named_modules())
    inputs: dict[str, list[Tensor]] = {name: [] for name in names}
    hooks = []
    for name in names:

        def note(_module: nn.Module, args: Any, name: str = name) -> None:
            if args and isinstance(args[0], Tensor) and len(inputs[name]) <= len(seen):
                inputs[name].append(_summary(args[0]))

        hooks.append(modules[name].register_forward_pre_hook(note))
    seen: list[int] = []
    try:
        with torch.no_grad():
            for chunk in images.split(256):
                model(chunk)
                seen.append(len(chunk))
    finally:
        for hook in hooks:
            hook.remove()
    result = []
    for name in names:
        parts = inputs[name]
        complete = sum(len(p) for p in parts) == len(labels)
        result.append((name, _between_over_within(torch.cat(parts), labels) if complete else 0.0))
    return result


def _summary(x: Tensor) -> Tensor:
    """[N, ...] -> float32 [N, D] with D bounded: maps pooled to 4 x 4, tokens averaged."""
    x = x.float()
    if x.ndim == 4 and max(x.shape[-2:]) > 4:
        x = nn.functional.adaptive_avg_pool2d(x, (min(4, x.shape[-2]), min(4, x.shape[-1])))
    elif x.ndim == 3:
        x = x.mean(1)
    return x.flatten(1)


def _between_over_within(features: Tensor, labels: Tensor) -> float:
    classes, index = labels.unique(return_inverse=True)
    count = torch.bincount(index).to(features.dtype)[:, None]
    centred = features - features.mean(0)
    means = torch.zeros(len(classes), features.shape[1], device=features.device)
    means = means.index_add_(0, index, centred) / count
    between = float((count * means.square()).sum())
    within = float((centred - means[index]).square().sum())
    return between / within if within > 0 else 0.0


def layer_names(model: nn.Module, images: Tensor) -> list[str]:
    """Modules with a weight matrix of their own, in the order in which a forward pass calls them.

    Normalisation layers have none: they belong to the layer before them.
    """
    order: list[str] = []
    hooks = []
    for name, module in model.named_modules():
        if name and any(p.ndim > 1 for p in module.parameters(recurse=False)):

            def note(_module: nn.Module, _args: Any, name: str = name) -> None:
                if name not in order:
                    order.append(name)

            hooks.append(module.register_forward_pre_hook(note))
    try:
        with torch.no_grad():
            model(images)
    finally:
        for hook in hooks:
            hook.remove()
    return order


def split_at(model: LogitsModel, name: str, images: Tensor, reason: str) -> Split:
    """Cuts ``model`` before its module ``name``.

    Args:
        model: from `working_copy`; the tail shares its parameters.
        name: as in ``model.model.named_modules()``.
        images: two or more valid images, to check the cut with.
        reason: recorded in the split.

    Raises:
        ArgumentError: no such module, it is never called, or the tail has nothing to train.
    """
    names = dict(model.model.named_modules())
    if name not in names or not name:
        known = [n for n in names if n]
        raise ArgumentError(
            "tail",
            f"got {name!r}, and the model has no module of that name",
            f"Pass 'auto' or one of {_some(known)}.",
        )
    head, tail = _split_by_graph(model, name, images) or _split_by_replay(model, name, images)
    with torch.no_grad():
        want = model(images)
        crossing = head(images)
        versions = [t._version for t in crossing]
        got = tail(*crossing)
    if [t._version for t in crossing] != versions:
        tail = _Cloning(tail)
    if not torch.allclose(got, want, rtol=1e-3, atol=1e-4 * (1 + float(want.abs().max()))):
        raise ModelError(
            f"cut at {name!r} it gives other logits than whole (by "
            f"{float((got - want).abs().max()):.3g})",
            "Its forward pass depends on state or chance; name another tail=.",
        )
    parameters = _trained_by(model, tail, crossing)
    if not parameters:
        raise ArgumentError(
            "tail",
            f"{name!r} is followed by no layer with parameters",
            f"Name an earlier module, such as {layer_names(model.model, images)[-1]!r}.",
        )
    tied = _tied_to_head(model, head, parameters, images)
    if tied:
        raise _Tied(
            "tail",
            f"{name!r} would train {tied[0]}, which the frozen head uses too (tied weights)",
            "Name the module at which the shared weights are used first, or leave tail='auto'.",
        )
    layers = {p.rpartition(".")[0] for p in parameters}
    return Split(head, tail, name, reason, parameters, output_level=len(layers) == 1)


def _trained_by(model: LogitsModel, tail: nn.Module, crossing: Features) -> list[str]:
    """Names of the parameters on which the tail's logits depend."""
    named = {n: p for n, p in model.model.named_parameters() if p.requires_grad}
    with torch.enable_grad():
        logits = tail(*crossing)
        if not logits.requires_grad:
            return []
        grads = torch.autograd.grad(logits.sum(), list(named.values()), allow_unused=True)
    return [n for n, g in zip(named, grads, strict=True) if g is not None]


def _tied_to_head(
    model: LogitsModel, head: nn.Module, parameters: Sequence[str], images: Tensor
) -> list[str]:
    """Those of ``parameters`` that the head's output depends on as well."""
    named = dict(model.model.named_parameters())
    chosen = [named[n] for n in parameters]
    with torch.enable_grad():
        roots = [t.sum() for t in head(images) if t.requires_grad]
        if not roots:
            return []
        grads = torch.autograd.grad(torch.stack(roots).sum(), chosen, allow_unused=True)
    return [n for n, g in zip(parameters, grads, strict=True) if g is not None]


# --- cut by torch.fx: exact, and the tail is a graph that compiles ---------------------------


def _split_by_graph(
    model: LogitsModel, name: str, images: Tensor
) -> tuple[nn.Module, nn.Module] | None:
    """The two halves as graphs, or None where symbolic tracing does not get through."""
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            traced = torch.fx.symbolic_trace(model)
    except Exception:  # noqa: BLE001  control flow on values: `_split_by_replay` handles those
        return None
    nodes = list(traced.graph.nodes)
    path = f"model.{name}"
    start = next((i for i, n in enumerate(nodes) if _inside(n, path)), None)
    if start is None:
        return None
    before, after = nodes[:start], nodes[start:]
    output = next(n for n in nodes if n.op == "output")
    inside = set(after)
    crossing = [n for n in before if any(u in inside for u in n.users)]
    if any(n.op == "get_attr" for n in crossing):
        moved = {n for n in crossing if n.op == "get_attr"}
        after = [n for n in nodes if n in moved or n in inside]
        crossing = [n for n in crossing if n not in moved]
    constants = _constants(traced, crossing, images)
    if constants is None or output in before:
        return None
    crossing = [n for n in crossing if n not in constants]
    if not crossing:
        return None
    head_graph = torch.fx.Graph()
    head_map: dict[torch.fx.Node, Any] = {}
    for node in before:  # all of them: x.relu_() counts even if nothing uses its value
        head_map[node] = head_graph.node_copy(node, lambda n: head_map[n])
    head_graph.output(tuple(head_map[n] for n in crossing))
    tail_graph = torch.fx.Graph()
    tail_map: dict[torch.fx.Node, Any] = {}
    for i, node in enumerate(crossing):
        tail_map[node] = tail_graph.placeholder(f"feature_{i}")
    for node, value in constants.items():
        tail_map[node] = (
            tail_graph.call_method("size", (tail_map[crossing[0]], 0)) if value is _BATCH else value
        )
    for node in after:
        tail_map[node] = tail_graph.node_copy(node, lambda n: tail_map[n])
    halves = []
    for graph in (head_graph, tail_graph):
        graph.lint()
        halves.append(torch.fx.GraphModule(traced, graph))
    return halves[0], halves[1]


class _Batch:
    """Stands for a number that is the batch size, whatever that will be."""


_BATCH = _Batch()


def _constants(
    traced: torch.fx.GraphModule, crossing: Sequence[torch.fx.Node], images: Tensor
) -> dict[torch.fx.Node, Any] | None:
    """Crossing values that are no tensors: the same for each batch, or the batch size itself."""
    seen: list[dict[torch.fx.Node, Any]] = []
    for size in (2, 3):
        batch = images[:1].expand(size, *images.shape[1:])
        recorder = _Recorder(traced, set(crossing))
        with torch.no_grad():
            recorder.run(batch)
        seen.append(recorder.values)
    constants: dict[torch.fx.Node, Any] = {}
    for node in crossing:
        two, three = seen[0][node], seen[1][node]
        if isinstance(two, Tensor):
            if two.ndim == 0 or two.shape[0] != 2 or three.shape[0] != 3:
                return None
        elif two == three:
            constants[node] = two
        elif (two, three) == (2, 3):
            constants[node] = _BATCH
        else:
            return None
    return constants


class _Recorder(torch.fx.Interpreter):
    """Runs a graph and keeps the values of some of its nodes."""

    def __init__(self, traced: torch.fx.GraphModule, wanted: set[torch.fx.Node]) -> None:
        super().__init__(traced)
        self.wanted = wanted
        self.values: dict[torch.fx.Node, Any] = {}

    def run_node(self, n: torch.fx.Node) -> Any:
        value = super().run_node(n)
        if n in self.wanted:
            self.values[n] = value
        return value


def _inside(node: torch.fx.Node, path: str) -> bool:
    if node.op == "call_module" and f"{node.target}.".startswith(f"{path}."):
        return True
    return any(
        f"{entry[0] if isinstance(entry, tuple) else key}.".startswith(f"{path}.")
        for key, entry in (node.meta.get("nn_module_stack") or {}).items()
    )


# --- cut by replay: for models that Python control flow keeps from being traced --------------


class _Reached(Exception):
    """The module at the cut is about to run."""


class _ReplayHead(nn.Module):
    """Runs the model up to the cut and returns the image and each finished module's output."""

    def __init__(self, model: LogitsModel, name: str) -> None:
        super().__init__()
        self.model, self.name = model, name

    def forward(self, x: Tensor) -> Features:
        return (x, *[output for _, output in self.recorded(x)])

    def recorded(self, x: Tensor) -> list[tuple[str, Tensor]]:
        done: list[tuple[str, Tensor]] = []
        hooks = []
        for name, module in self.model.model.named_modules():
            if not name:
                continue

            def after(_m: nn.Module, _a: Any, output: Any, name: str = name) -> None:
                if isinstance(output, Tensor):
                    # a finished parent replaces its finished children
                    while done and done[-1][0].startswith(f"{name}."):
                        done.pop()
                    done.append((name, output))

            def before(_m: nn.Module, _a: Any) -> None:
                raise _Reached

            hooks.append(module.register_forward_hook(after))
            if name == self.name:
                hooks.append(module.register_forward_pre_hook(before))
        try:
            self.model(x)
        except _Reached:
            return done
        finally:
            for hook in hooks:
                hook.remove()
        raise ArgumentError(
            "tail",
            f"got {self.name!r}, a module that the forward pass never calls",
            "Name a module that takes part in the forward pass.",
        )


class _ReplayTail(nn.Module):
    """Runs the model with the modules before the cut answering from their recorded outputs."""

    def __init__(self, model: LogitsModel, names: Sequence[str]) -> None:
        super().__init__()
        self.model, self.names = model, list(names)

    def forward(self, x: Tensor, *outputs: Tensor) -> Tensor:
        modules = dict(self.model.model.named_modules())
        queues: dict[str, Iterator[Tensor]] = {}
        for name in self.names:
            queues.setdefault(
                name,
                iter([o for n, o in zip(self.names, outputs, strict=True) if n == name]),
            )
        originals = {}
        for name, queue in queues.items():
            module = modules[name]
            original = module.forward

            def replay(
                *args: Any, queue: Iterator[Tensor] = queue, original: Any = original, **kw: Any
            ) -> Any:
                recorded = next(queue, None)
                return original(*args, **kw) if recorded is None else recorded

            originals[name] = module.__dict__.get("forward")
            module.forward = replay
        try:
            logits = self.model(x)
        finally:
            for name, own in originals.items():
                if own is None:
                    del modules[name].__dict__["forward"]
                else:
                    modules[name].forward = own
        return logits


def _split_by_replay(model: LogitsModel, name: str, images: Tensor) -> tuple[nn.Module, nn.Module]:
    head = _ReplayHead(model, name)
    with torch.no_grad():
        names = [n for n, _ in head.recorded(images)]
    return head, _ReplayTail(model, names)


class _Cloning(nn.Module):
    """A tail that writes into its inputs gets copies of them."""

    def __init__(self, tail: nn.Module) -> None:
        super().__init__()
        self.tail = tail

    def forward(self, *features: Tensor) -> Tensor:
        return self.tail(*[f.clone() for f in features])


def _some(names: Sequence[str], most: int = 12) -> str:
    shown = ", ".join(repr(n) for n in names[:most])
    return shown + (f" and {len(names) - most} more" if len(names) > most else "")
