"""Which item of a model's output holds the logits."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from typing import Any

import torch
from torch import Tensor, nn

from ..errors import ArgumentError, ModelError
from ..runtime.hooks import forward_hooks

# Names of items that are no logits, in transformers' outputs and elsewhere.
_EMBEDDINGS = {
    "pooler_output", "last_hidden_state", "image_embeds", "embedding", "embeddings", "feature",
    "features",
}  # fmt: skip
EMBEDDING_REMEDY = (
    "Its dimensions would be forgotten as if they were classes. Pass the model with its classifier "
    "(in timm, create_model(..., num_classes=N); in transformers, ...ForImageClassification), or a "
    "module that applies one to the embedding; or, where embeddings are compared with templates "
    "(faces, retrieval, zero-shot), zsu_fast.EmbeddingClassifier(encoder, templates)."
)
_BESIDE = "_zsu_fast_beside_logits"
# An index, a key or attribute, or a function that takes the model's output and returns the logits.
OutputChoice = int | str | Callable[[Any], Tensor]


def check_output(output: Any) -> None:
    """Checks the option ``output``.

    Raises:
        ArgumentError: it is no index, key or callable.
    """
    named = isinstance(output, int | str) and not isinstance(output, bool)
    if output is not None and not named and not callable(output):
        raise ArgumentError(
            "output", f"got {output!r}", "Pass an index, a key or attribute, or a callable."
        )


def pick_logits(output: Any, choice: OutputChoice | None = None) -> Any:
    """Finds the logits in a classifier's output; also works on torch.fx proxies while tracing.

    Args:
        output: what the model returned.
        choice: which item holds the logits. None: ``output`` if it is a tensor, its attribute or
            item "logits", or else the first item; see `find_output` for several.

    Raises:
        ModelError: there are none.
        ArgumentError: there is no item ``choice``.
    """
    if choice is not None:
        return _chosen(output, choice)
    if isinstance(output, Tensor | torch.fx.Proxy):
        return output
    if isinstance(output, dict):
        if "logits" in output:
            return output["logits"]
        if len(output) == 1:
            return next(iter(output.values()))
    elif hasattr(output, "logits"):
        return output.logits
    elif isinstance(output, tuple | list) and output:
        return output[0]
    keys = f" with keys {sorted(map(str, output))}" if isinstance(output, dict) else ""
    raise ModelError(
        f"its output is a {type(output).__name__}{keys}, in which no logits were found",
        "Return a tensor [N, classes], a tuple that starts with it, a dict with the key 'logits', "
        "or an object with the attribute .logits; or say by output= which item holds the logits.",
    )


def _chosen(output: Any, choice: OutputChoice) -> Any:
    if isinstance(choice, str) and isinstance(output, Mapping):
        found = output.get(choice)
    elif isinstance(choice, str):
        found = getattr(output, choice, None)
    elif isinstance(choice, int):
        try:
            found = output[choice]
        except (IndexError, KeyError, TypeError):
            found = None
    else:
        found = choice(output)
    if isinstance(found, Tensor | torch.fx.Proxy):
        return found
    items = ", ".join(repr(key) for key, _ in _items(output)) or "none"
    raise ArgumentError(
        "output",
        f"got {choice!r}, which gives no tensor: the output is a {type(output).__name__} with the "
        f"items {items}",
        "Pass the index or key of the item that holds the logits, or a callable.",
    )


def _items(output: Any) -> Iterator[tuple[int | str, Any]]:
    """The items of a container with their indices, keys or attributes."""
    if isinstance(output, Mapping):
        yield from output.items()
    elif isinstance(output, tuple | list):
        yield from enumerate(output)


def score_items(output: Any) -> dict[int | str, Tensor]:
    """The items of ``output`` that may be logits: tensors [N, C] with two columns or more."""
    return {
        key: item
        for key, item in _items(output)
        if isinstance(item, Tensor) and item.ndim == 2 and item.shape[1] > 1
    }


def is_ambiguous(output: Any) -> bool:
    """Whether `pick_logits` could only guess which item of ``output`` holds the logits."""
    if isinstance(output, Tensor) or (isinstance(output, Mapping) and "logits" in output):
        return False
    scores = score_items(output)
    return len(scores) > 1 or (len(scores) == 1 and 0 not in scores)


def find_output(module: nn.Module, images: Tensor) -> int | str | None:
    """Finds the item of the output that the last layer makes; None if there is nothing to choose.

    Of two items, that one counts which is computed from the other's layer: of (features, logits),
    the logits. If that leaves several, the one with as many columns as the model says that it has
    classes.

    Args:
        module: a copy of the user's model whose parameters require gradients.
        images: [N, ...] as the model takes them, N >= 2.

    Raises:
        ModelError: several items may be the logits.
    """
    makers: dict[Any, str] = {}  # the autograd nodes of the layers' outputs

    def note(layer: nn.Module, _args: Any, result: Any) -> None:
        if isinstance(result, Tensor) and result.grad_fn is not None:
            makers.setdefault(result.grad_fn, names[layer])

    names = {m: name for name, m in module.named_modules() if matrices(m)}
    with forward_hooks(names, note), torch.enable_grad():
        output = module(images)
    if not is_ambiguous(output):
        return None
    scores = {k: v for k, v in score_items(output).items() if k not in _EMBEDDINGS}
    if not scores:
        keys = ", ".join(repr(key) for key, _ in _items(output))
        raise ModelError(f"its output is an embedding ({keys}), not logits", EMBEDDING_REMEDY)
    made = {key: _layers_behind(item, makers) for key, item in scores.items()}
    left = [
        key
        for key, (nearest, _) in made.items()
        if nearest and not any(nearest <= behind for _, behind in made.values())
    ]
    if len({frozenset(made[key][0]) for key in left}) > 1:
        stated = stated_classes(module)
        left = [key for key in left if scores[key].shape[1] == stated]
        if len({frozenset(made[key][0]) for key in left}) > 1:
            left = []
    if len(scores) == 1:
        left = list(scores)
    if not left:
        described = "; ".join(
            f"{key!r}: {item.shape[1]} columns"
            + (f", from {', '.join(sorted(made[key][0]))}" if made[key][0] else "")
            for key, item in scores.items()
        )
        raise ModelError(
            f"its output is a {type(output).__name__} of several tensors that may be the logits "
            f"({described})",
            f"Say which one by output=, such as output={next(iter(scores))!r}.",
        )
    return left[0]


def stated_classes(module: nn.Module) -> int | None:
    """The number of classes that a model states: ``num_classes``, or that of its config."""
    for holder in (module, getattr(module, "config", None)):
        for name in ("num_classes", "num_labels"):
            count = getattr(holder, name, None)
            if isinstance(count, int) and not isinstance(count, bool):
                return count
    return None


def matrices(module: nn.Module) -> list[nn.Parameter]:
    """The weight matrices that ``module`` itself owns, behind a parametrization or not."""
    parametrized = getattr(module, "parametrizations", None)
    own = [*module.parameters(recurse=False)]
    own += [*parametrized.parameters()] if isinstance(parametrized, nn.ModuleDict) else []
    return [p for p in own if p.ndim > 1]


def mark_beside_logits(module: nn.Module) -> None:
    """Marks a layer of a working copy as one of another head: it has no part in the logits."""
    vars(module)[_BESIDE] = True


def is_beside_logits(module: nn.Module) -> bool:
    """Whether `mark_beside_logits` marked the layer."""
    return _BESIDE in vars(module)


def _layers_behind(tensor: Tensor, makers: dict[Any, str]) -> tuple[set[str], set[str]]:
    """Names of the layers that made ``tensor``: the nearest ones, and those ahead of them."""
    nearest: set[str] = set()
    behind: set[str] = set()
    seen: set[Any] = set()
    queue = [(tensor.grad_fn, False)]
    while queue:
        node, passed = queue.pop()
        if node is None or (node, passed) in seen:
            continue
        seen.add((node, passed))
        name = makers.get(node)
        if name is not None:
            (behind if passed else nearest).add(name)
        queue += [(parent, passed or name is not None) for parent, _ in node.next_functions]
    return nearest, behind - nearest
