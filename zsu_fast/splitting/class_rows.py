"""Finds the tensors of a model that hold one row per class: those whose row c reaches logit c only.

A classifier is usually a layer, but it may be any tensor that the logits are computed from: text
embeddings in a buffer, a matrix that `forward` multiplies by itself. Gradients find them all, and
tell them from layers that happen to be as wide, and from rows that a parametrization mixes.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager

import torch
from torch import Tensor, nn

from ..errors import ModelError
from ..models.wrapper import LogitsModel

# For each tensor, the dimension along which it holds one entry ("row") per class.
ClassDims = dict[str, int]


def class_dims(logits: Tensor, tensors: Mapping[str, Tensor]) -> ClassDims:
    """Of ``tensors``, those whose entry c along a dimension reaches logit c and no other logit.

    Args:
        logits: [N, C], with a graph to ``tensors``, which is freed.
        tensors: by name; each requires a gradient.

    Returns:
        That dimension, the first or the last one, by name.
    """
    classes = logits.shape[1]
    fitting = {
        (name, dim)
        for name, tensor in tensors.items()
        for dim in {0, tensor.ndim - 1}
        if tensor.ndim and tensor.shape[dim] == classes
    }
    names = sorted({name for name, _ in fitting})
    if not names or not logits.requires_grad:
        return {}
    weight = torch.rand(logits.shape, generator=torch.Generator().manual_seed(0)) + 0.5
    weight, reached = weight.to(logits.device), set[tuple[str, int]]()
    for chosen in _subsets(classes, logits.device):
        total = (logits * weight * chosen).sum()
        values = [tensors[name] for name in names]
        grads = torch.autograd.grad(total, values, retain_graph=True, allow_unused=True)
        found = dict(zip(names, grads, strict=True))
        for name, dim in sorted(fitting):
            grad = found[name]
            if grad is None:
                fitting.discard((name, dim))
                continue
            rows = grad.movedim(dim, 0).flatten(1) if grad.ndim > 1 else grad[:, None]
            hit = (rows != 0).any(1)
            if bool((hit & ~chosen).any()):
                fitting.discard((name, dim))
            elif bool(hit.any()):
                reached.add((name, dim))
    dims: ClassDims = {}
    for name in tensors:
        found_dims = [dim for n, dim in sorted(fitting & reached) if n == name]
        if found_dims:
            dims[name] = found_dims[0]
    return dims


def _subsets(classes: int, device: torch.device) -> Iterator[Tensor]:
    """Yields subsets of the classes, bool [C]: two random halves and what each leaves out."""
    generator = torch.Generator().manual_seed(0)
    order = torch.randperm(classes, generator=generator)
    for place in (order % 2, order // 2 % 2):
        half = (place == 0).to(device)
        yield half
        yield ~half


def expose_class_buffers(model: LogitsModel, images: Tensor) -> list[str]:
    """Makes parameters of the buffers that hold one row per class, if no parameter does.

    Such as the text embeddings of a CLIP-like classifier. ``model`` is changed in place.

    Args:
        model: from `working_copy`.
        images: two or more.

    Returns:
        Their names.

    Raises:
        ModelError: the classifier is a tensor that ``state_dict()`` does not hold.
    """
    module = model.module
    with torch.no_grad():
        classes = model(images[:2]).shape[1]
    saved = module.state_dict(keep_vars=True).keys()
    buffers = {n: b for n, b in module.named_buffers() if _may_be_classifier(n, b, classes)}
    loose = {n: t for n, t in _plain_tensors(module) if _may_be_classifier(n, t, classes)}
    if not buffers and not loose:
        return []
    parameters = {n: p for n, p in module.named_parameters() if p.is_floating_point()}
    if any(parameters[n].ndim > 1 for n in _dims_of(model, images, parameters)):
        return []
    found = list(_dims_of(model, images, buffers | loose))
    unsaved = [name for name in found if name not in saved]
    if unsaved:
        raise ModelError(
            f"its classifier is {unsaved[0]}, a tensor that its state_dict() does not hold, so "
            f"that a changed one would be lost when the model is saved",
            f"Register it: module.register_buffer({unsaved[0].rpartition('.')[2]!r}, tensor).",
        )
    for name in found:
        path, _, own = name.rpartition(".")
        owner = module.get_submodule(path)
        value = owner._buffers.pop(own)
        assert value is not None
        owner.register_parameter(own, nn.Parameter(value.detach()))
    return found


def _dims_of(model: LogitsModel, images: Tensor, tensors: Mapping[str, Tensor]) -> ClassDims:
    """`class_dims` of tensors of the model, whose ``requires_grad`` is left as it was."""
    with requiring_gradients(tensors), torch.enable_grad():
        return class_dims(model(images[:2]), tensors)


def _may_be_classifier(name: str, tensor: Tensor, classes: int) -> bool:
    return (
        tensor.is_floating_point()
        and tensor.is_leaf
        and tensor.ndim > 1
        and classes in (tensor.shape[0], tensor.shape[-1])
        and ".parametrizations." not in f".{name}"
    )


def _plain_tensors(module: nn.Module) -> Iterator[tuple[str, Tensor]]:
    """Tensors in attributes of modules that are neither parameters nor buffers."""
    for path, owner in module.named_modules():
        for name, value in vars(owner).items():
            if isinstance(value, Tensor):
                yield f"{path}.{name}" if path else name, value


@contextmanager
def requiring_gradients(tensors: Mapping[str, Tensor]) -> Iterator[None]:
    """Lets tensors require gradients, frozen ones too, and leaves them as they were."""
    frozen = [tensor for tensor in tensors.values() if not tensor.requires_grad]
    try:
        for tensor in frozen:
            tensor.requires_grad_(True)
        yield
    finally:
        for tensor in frozen:
            tensor.requires_grad_(False)


def layer_of(parameter: str) -> str:
    """The module that owns a parameter, behind a parametrization or not."""
    layer, parametrization, _ = parameter.partition(".parametrizations.")
    return layer if parametrization else parameter.rpartition(".")[0]
