"""Removes the classifier of a model, so that it returns embeddings."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from ..errors import ModelError
from .embeddings import pick_embedding
from .infer_spec import resolve_spec
from .input_spec import noise_images

_REMEDY = "Pass module:factory, a function that returns the encoder."


@torch.no_grad()
def remove_classifier(model: nn.Module) -> str:
    """Replaces the last linear layer by ``nn.Identity``, in place; returns its name.

    Raises:
        ModelError: there is none, or the model does not return its input then; the model is
            unchanged.
    """
    linear = [(n, m) for n, m in model.named_modules() if isinstance(m, nn.Linear)]
    if not linear:
        raise ModelError("it has no linear layer to leave out for its embeddings", _REMEDY)
    name, layer = linear[-1]
    images = noise_images(resolve_spec(model), 2)
    first = next(model.parameters())
    inputs: list[Tensor] = []
    handle = layer.register_forward_pre_hook(lambda _layer, args: inputs.append(args[0]))
    training = [(module, module.training) for module in model.modules()]
    model.eval()
    try:
        model(images.to(first.device, first.dtype))
        model.set_submodule(name, nn.Identity())
        found = pick_embedding(model(images.to(first.device, first.dtype)))
    except BaseException:
        model.set_submodule(name, layer)
        raise
    finally:
        handle.remove()
        for module, mode in training:
            module.training = mode
    if len(inputs) != 1 or found.shape != inputs[0].shape or not torch.equal(found, inputs[0]):
        model.set_submodule(name, layer)
        raise ModelError(
            f"its last linear layer, {name!r}, does not make its output, so that it can't be left "
            f"out for the embeddings",
            _REMEDY,
        )
    return name
