"""Runs a working copy on a few images to see what its output means, before any work."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_leaves

from ..errors import ArgumentError, ModelError
from ..runtime.hooks import forward_hooks
from .caches import stop_caching
from .embedding_classifier import EmbeddingClassifier
from .input_spec import InputSpec, noise_images
from .outputs import (
    EMBEDDING_REMEDY,
    OutputChoice,
    find_output,
    mark_beside_logits,
    matrices,
    pick_logits,
    stated_classes,
)  # fmt: skip
from .parameters import unwrap
from .squashing import MOST_PLACES, skip_squash
from .wrapper import LogitsModel, count_classes

# How far the sum of a row of probabilities may be from 1, and what is found from what is sought.
_TOLERANCE = 1e-3
# Names of classifiers; a module of such a name that does nothing stands where one was removed.
_HEADS = {"fc", "head", "heads", "classifier", "last_linear", "logits", "cls_head", "output_layer"}


def choose_item(work: LogitsModel, images: Tensor) -> None:
    """Sets which item of the output holds the logits, unless that is given (`find_output`)."""
    if work.output is None:
        work.output = find_output(work.module, images)


def probe(
    work: LogitsModel, spec: InputSpec, device: torch.device, multi_label: bool = False
) -> tuple[int, list[str]]:
    """Finds out what ``work`` returns, and sets it so that it returns logits.

    The item of the output that holds the logits is chosen (`find_output`), a softmax or sigmoid at
    the end is left out, and what the model stores for later calls is computed in each of them.

    Args:
        work: the working copy.
        spec: the images that it takes.
        device: where it is.
        multi_label: whether each class has a sigmoid of its own (`find_multi_label`).

    Returns:
        The number of classes; and what the user should know, in sentences.

    Raises:
        ArgumentError: the model raises for images of this shape.
        ModelError: it does not return logits, or its weights can't be reached.
    """
    images = _probe_images(spec).to(device)
    try:
        choose_item(work, images[:2])
    except ArgumentError:  # a ModelError too
        raise
    except Exception:  # noqa: BLE001  `count_classes` says what is wrong
        work.output = None
    classes = count_classes(work, spec, device)
    _check_weights_are_used(work, images[:2])
    with torch.no_grad():
        seen = _Seen.of(work, images)
        work.cast = seen.scores.dtype != torch.float32
        notes = _compare_with_single(work, images[:1], seen.scores)
        if isinstance(work.module, EmbeddingClassifier):  # known to return logits
            return classes, notes
        _check_no_embedding(work.module, seen)
        notes += _skip_squash(work, images, seen, multi_label)
    return classes, notes


def _probe_images(spec: InputSpec) -> Tensor:
    """Grey, two of noise, and noise with four times the contrast: [4, *shape]."""
    noise = noise_images(spec, 3)
    return torch.cat([torch.zeros(1, *spec.shape), noise[:2], 4 * noise[2:]])


@dataclass
class _Seen:
    """One forward pass.

    Attributes:
        scores: what the model returned, [N, C].
        makers: the modules that returned that very tensor, the innermost first, by name.
        silent: the linear layers that did not run, by name.
    """

    scores: Tensor
    makers: dict[str, nn.Module] = field(default_factory=dict)
    silent: dict[str, nn.Linear] = field(default_factory=dict)

    @classmethod
    def of(cls, work: LogitsModel, images: Tensor) -> _Seen:
        names = {module: name for name, module in work.module.named_modules()}
        returned: list[tuple[nn.Module, Any]] = []

        def note(module: nn.Module, _args: Any, output: Any) -> None:
            small = isinstance(output, Tensor) and output.ndim <= 2
            returned.append((module, output if small else None))

        with forward_hooks(names, note):
            scores = pick_logits(work.module(images), work.output)
        ran = {module for module, _ in returned}
        return cls(
            scores,
            {names[module]: module for module, output in returned if output is scores},
            {n: m for m, n in names.items() if isinstance(m, nn.Linear) and m not in ran},
        )


def _mark_side_heads(model: nn.Module, output: Any, logits: Tensor) -> None:
    """Marks the layers of other outputs than the logits (`outputs.is_beside_logits`)."""
    items = tree_leaves(vars(output) if hasattr(output, "logits") else output)
    others = [t for t in items if isinstance(t, Tensor) and t is not logits]
    used, beside = _leaves_behind([logits]), _leaves_behind(others)
    for module in model.modules() if others else ():
        own = {id(p) for p in matrices(module)}
        if own & beside and not own & used:
            mark_beside_logits(module)


def _leaves_behind(tensors: Sequence[Tensor]) -> set[int]:
    """The ids of the leaves, such as parameters, that autograd reaches from ``tensors``."""
    reached: set[int] = set()
    seen: set[Any] = set()
    queue = [t.grad_fn for t in tensors]
    while queue:
        node = queue.pop()
        if node is None or node in seen:
            continue
        seen.add(node)
        reached.add(id(getattr(node, "variable", None)))
        queue += [parent for parent, _ in node.next_functions]
    return reached


def _check_weights_are_used(work: LogitsModel, images: Tensor) -> None:
    """Checks that gradients reach a parameter of the copy.

    Also stops caches (`stop_caching`) and marks other heads (`_mark_side_heads`): each needs a
    forward pass with gradients.
    """
    try:
        with torch.enable_grad():
            output = work.module(images)
    except RuntimeError as error:  # it ran without gradients
        raise ModelError(
            f"it raises when gradients are computed ({error})",
            "Let forward() run without torch.inference_mode(), or clone() what comes out of it.",
        ) from error
    logits = pick_logits(output, work.output)
    stop_caching(work.module)
    _mark_side_heads(work.module, output, logits)
    if not {id(p) for p in work.module.parameters()} & _leaves_behind([logits]):
        raise ModelError(
            "autograd does not reach any of its weights from its output",
            "Its forward() may run under torch.no_grad() or torch.inference_mode(), detach its "
            "result, or call layers of another model (a function that was assigned to .forward and "
            "names the model as a global variable). Pass a module whose forward() runs its own "
            "layers.",
        )


def _compare_with_single(work: LogitsModel, image: Tensor, scores: Tensor) -> list[str]:
    """Compares a batch of one with the same image among others.

    Raises:
        ModelError: it can't run one, or it normalises over the batch.
    """
    error = ""
    try:
        single = work(image)
    except Exception as raised:  # noqa: BLE001  reports any error in the user's code
        error = f"{type(raised).__name__}: {raised}"
    else:
        if single.shape != (1, scores.shape[1]):
            error = f"its output is {tuple(single.shape)}"
    if error:
        raise ModelError(
            f"it runs several images but not a batch of one ({error})",
            "A squeeze() without a dimension in forward() also removes the batch dimension: name "
            "the dimensions, or use flatten(1).",
        )
    scores = scores.float()
    if bool(((scores.sum(0) - 1).abs() < _TOLERANCE).all()) and bool((scores >= 0).all()):
        raise ModelError(
            "each column of its output sums to 1 over the batch",
            "Its softmax runs over the images instead of the classes: pass dim=1 to it.",
        )
    scale = float(scores.abs().max())
    if bool(((single - scores[:1]).abs() <= 1e-4 + 1e-2 * scale).all()):
        return []
    return [
        "its output for an image depends on the others in the batch, perhaps by a normalisation "
        "with the statistics of the batch: what is measured depends on the batches."
    ]


def _check_no_embedding(model: nn.Module, seen: _Seen) -> None:
    """Checks that the columns of the output are classes.

    Raises:
        ModelError: the model has no classifier, does not run it, or returns unit vectors.
    """
    width = seen.scores.shape[1]
    innermost = next(iter(seen.makers.values()), None)
    stated = stated_classes(model)
    removed = next(
        (
            name
            for name, module in model.named_modules()
            if isinstance(module, nn.Identity)
            and _HEADS & set(name.split("."))
            and (name in seen.makers or (stated is not None and stated != width))
        ),
        None,
    )
    skipped = next(
        (
            name
            for name, layer in seen.silent.items()
            if layer.in_features == width != layer.out_features and _HEADS & set(name.split("."))
        ),
        None,
    )
    why = ""
    if stated == 0:
        why = "it states that it has 0 classes"
    elif removed is not None and not isinstance(innermost, nn.Linear | nn.Conv2d):
        why = f"its {removed!r} is an Identity"
    elif skipped is not None:
        why = f"its {skipped!r}, which takes {width} features, does not run"
    elif _all_close(seen.scores.float().norm(dim=1)) and not _all_close(seen.scores.abs().sum(1)):
        why = "each row of its output is a unit vector"
    if why:
        raise ModelError(f"its output is an embedding of {width} values: {why}", EMBEDDING_REMEDY)


@torch.no_grad()
def refuse_embedding(model: nn.Module, images: Tensor, output: OutputChoice | None) -> None:
    """Checks that the columns of the output are classes, for a model in eval mode.

    Args:
        model: the user's model; it is not changed.
        images: some, [N, ...], as the model takes them.
        output: which item of its output holds the logits.

    Raises:
        ModelError: it returns an embedding.
    """
    inner = unwrap(model)
    if isinstance(inner, EmbeddingClassifier):
        return
    _check_no_embedding(inner, _Seen.of(LogitsModel(inner, output), images))


def _all_close(values: Tensor, wanted: float = 1.0) -> bool:
    return bool(((values.float() - wanted).abs() < _TOLERANCE).all())


def _skip_squash(work: LogitsModel, images: Tensor, seen: _Seen, multi_label: bool) -> list[str]:
    """Makes ``work`` return what a softmax or sigmoid at its end takes; returns notes."""
    scores = seen.scores.float()
    if bool((scores >= -_TOLERANCE).all()) and _all_close(scores.sum(1)):
        kind, probabilities = "probabilities", scores
    elif _all_close(scores.exp().sum(1)):
        kind, probabilities = "log-probabilities", scores.exp()
    else:
        return _skip_bounded(work, images, seen, multi_label)
    if multi_label:
        raise ModelError(
            f"it returns {kind} of a softmax, so that its classes exclude each other",
            "Pass multi_label=False; or, if each class has a sigmoid of its own, logits.",
        )

    work.returns = kind

    def is_right(logits: Tensor) -> bool:
        return bool(((logits.softmax(1) - probabilities).abs() < _TOLERANCE).all())

    if _first_right(work, images, seen.makers.values(), is_right):
        return [f"it returns {kind}: it was unlearned ahead of its softmax."]
    work.log = kind == "probabilities"
    return [
        f"it returns {kind}, and what its softmax takes was not found: their logarithms serve as "
        f"logits, which costs some accuracy. Return logits from forward() if you can."
    ]


def _skip_bounded(work: LogitsModel, images: Tensor, seen: _Seen, multi_label: bool) -> list[str]:
    """The same for scores of -1 to 1, each by itself, as from a sigmoid or tanh."""
    scores = seen.scores.float()
    low, high = (float(x) for x in scores.aminmax())
    if low < -1 - _TOLERANCE or high > 1 + _TOLERANCE:
        return []

    def is_right(logits: Tensor) -> bool:
        rising = scores.flatten()[logits.flatten().argsort()]
        return bool((rising.diff() >= -1e-6).all()) and not torch.equal(logits, scores)

    if _first_right(work, images, seen.makers.values(), is_right):
        work.returns = "scores"
        if multi_label:  # known to end in a sigmoid
            return []
        return [
            f"it returns scores between {0 if low >= 0 else -1} and 1: it was unlearned ahead of "
            f"the sigmoid or tanh at its end."
        ]
    if low < 0 or high == low:
        return []
    if multi_label:
        raise ModelError(
            "its outputs lie between 0 and 1, and what its sigmoid takes was not found",
            "Return logits from forward(), ahead of the sigmoid.",
        )
    return [
        "its outputs lie between 0 and 1 for every image tried, and no sigmoid was found at its "
        "end: they were taken for logits as they are. Return logits from forward() if they are not."
    ]


def _first_right(
    work: LogitsModel, images: Tensor, makers: Iterable[nn.Module], is_right: Any
) -> bool:
    """Sets ``work`` to the first tensor ahead of a squash that ``is_right``; False if none is."""
    for module in makers:
        if "forward" in vars(module):
            continue
        kind = type(module)
        for place in range(MOST_PLACES):
            skip_squash(module, place)
            if is_right(work(images)):
                return True
            module.__class__ = kind
            del module.squash_place
    for place in range(MOST_PLACES):
        work.squash_place = place
        try:
            if is_right(work(images)):
                return True
        except IndexError:  # there are fewer such tensors
            break
    work.squash_place = None
    return False
