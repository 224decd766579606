"""Further copies of the classes in a model's file: tensors with one row per class beside the
classifier.

Such as the layer that PEFT keeps beside the one it trains, an EMA copy, the heads of an ensemble,
or an auxiliary head. The logits may not depend on them, so shapes and names decide what they are.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping

import torch
from torch import Tensor, nn

from ..models.parameters import saved_tensors
from ..models.wrapper import LogitsModel
from ..runtime.hooks import forward_hooks
from .class_rows import ClassDims, class_dims, requiring_gradients


def class_copies(model: LogitsModel, images: Tensor, trained: Iterable[str]) -> ClassDims:
    """The tensors of the model's ``state_dict()`` that hold one row per class, but for ``trained``.

    Those that reach the logits are found by their gradients. Of the others, a matrix with as many
    rows as classes counts, and what else of that length its module has, unless it is called like
    one of the model's tensors in use that holds no such rows (a layer of an EMA copy).

    Args:
        model: from `working_copy`.
        images: two or more.
        trained: names of tensors that are not wanted; nor are those that share their memory.

    Returns:
        The dimension of the rows by name, in the order of the ``state_dict()``.
    """
    module = model.module
    saved = saved_tensors(module)
    with torch.no_grad():
        classes = model(images[:2]).shape[1]
    known = {saved[name].data_ptr() for name in trained if name in saved}
    candidates = {
        name: tensor for name, tensor in saved.items()
        if tensor.data_ptr() not in known and tensor.is_floating_point()
        and tensor.ndim and classes in (tensor.shape[0], tensor.shape[-1])
    }  # fmt: skip
    if not any(tensor.ndim > 1 for tensor in candidates.values()):
        return {}
    live, unknown = _in_use(model, images[:2])
    used = {name for name in saved if name in live or name.rpartition(".")[0] in unknown}
    found: ClassDims = {}
    for name in candidates:
        if name in used:
            dim = live.get(name)
        else:
            like = _namesake(name, {n: saved[n] for n in used}, saved[name].shape)
            dim = live.get(like) if like else (0 if _is_matrix(saved[name], classes) else None)
        if dim is not None:
            found[name] = dim
    owners = {name.rpartition(".")[0] for name in found if saved[name].ndim > 1}
    beside = {
        name: 0 for name, tensor in candidates.items()
        if name not in used and name.rpartition(".")[0] in owners and tensor.shape == (classes,)
    }  # fmt: skip
    found = {n: d for n, d in found.items() if n.rpartition(".")[0] in owners or n in used}
    return {name: (found | beside)[name] for name in saved if name in found or name in beside}


def _in_use(model: LogitsModel, images: Tensor) -> tuple[dict[str, int | None], set[str]]:
    """The tensors that reach the logits, with the dimension of their rows per class or None; and
    the modules that run without gradients, of which nothing is known.
    """
    module = model.module
    matrices = {n: b for n, b in module.named_buffers() if b.ndim > 1}  # not running_mean
    tensors = dict(module.named_parameters()) | matrices
    tensors = {n: t for n, t in tensors.items() if t.is_floating_point()}
    names = {m: name for name, m in module.named_modules()}
    unknown: set[str] = set()

    def note(layer: nn.Module, _args: object, output: object) -> None:
        if isinstance(output, Tensor) and not output.requires_grad:
            unknown.add(names[layer])

    with requiring_gradients(tensors), torch.enable_grad(), forward_hooks(names, note):
        logits = model(images)
        grads = torch.autograd.grad(
            logits.square().sum(), list(tensors.values()), retain_graph=True, allow_unused=True
        )
        reaching = [n for n, g in zip(tensors, grads, strict=True) if g is not None]
        dims = class_dims(logits, {n: tensors[n] for n in reaching})
    return {name: dims.get(name) for name in reaching}, unknown


def _namesake(name: str, used: Mapping[str, Tensor], shape: torch.Size) -> str | None:
    """The tensor in use, of the same shape, whose name ends most like ``name``."""
    best, most = None, 1  # "weight" alone says nothing
    for other, tensor in used.items():
        common = 0
        for a, b in zip(reversed(name.split(".")), reversed(other.split(".")), strict=False):
            if a != b:
                break
            common += 1
        if tensor.shape == shape and common > most:
            best, most = other, common
    return best


def _is_matrix(tensor: Tensor, classes: int) -> bool:
    return tensor.ndim > 1 and tensor.shape[0] == classes and tensor[0].numel() > 1


@torch.no_grad()
def erase_rows(model: nn.Module, dims: ClassDims, forget: Tensor) -> None:
    """Replaces the rows of forgotten classes by the mean of the others, in place.

    The logit of a linear layer is then the mean of the retained ones, so it is never the highest.

    Args:
        model: holds the tensors.
        dims: the dimension of the rows, by name in ``model.state_dict()``.
        forget: bool [C].
    """
    saved = saved_tensors(model)
    for name, dim in dims.items():
        rows, chosen = saved[name].movedim(dim, 0), forget.to(saved[name].device)
        rows[chosen] = rows[~chosen].float().mean(0).to(rows.dtype)
