"""A model as the audit sees it: a private copy, cut before its last layer, and un-masked variants.

The audit looks at several models that often share everything but the last layer: the original,
its mask, an unlearned model whose last layer was trained. Such subjects have one `backbone`, which
runs once for all of them.
"""

from __future__ import annotations

import copy
import hashlib
from dataclasses import dataclass, field
from functools import cached_property

import torch
from torch import Tensor, nn

from ...errors import ModelError
from ...models.input_spec import InputSpec
from ...models.parameters import state, unwrap
from ...models.wrapper import LogitsModel, working_copy
from ...splitting.batch_dim import Features
from ...splitting.layers import layer_names
from ...splitting.split import Split, split_at
from ..accuracy import MaskedClassifier


@dataclass
class AuditedModel:
    """A model under audit.

    Attributes:
        name: what it is called in tables: "original", "mask", "unlearned", ...
        model: a float32 copy in eval mode; changing it changes nothing of the user's.
        layers: names of the modules with weights, in the order of the forward pass; the last one
            is the model's *last layer* (a Linear, or a convolution as in SqueezeNet).
        cut: the model split before its last layer.
        hidden: classes whose logits are set to -inf behind the model, by `zsu_fast.mask`.
    """

    name: str
    model: LogitsModel
    layers: list[str]
    cut: Split
    hidden: list[int] = field(default_factory=list)

    @property
    def last(self) -> nn.Module:
        """The last layer with weights."""
        return self.model.module.get_submodule(self.layers[-1])

    @cached_property
    def backbone(self) -> str:
        """SHA-256 of everything before the last layer: equal for subjects with equal features."""
        digest = hashlib.sha256(type(self.model.module).__qualname__.encode())
        for name, tensor in sorted(state(self.model.module).items()):
            if not name.startswith(f"{self.layers[-1]}."):
                digest.update(f"|{name}|{tuple(tensor.shape)}|".encode())
                flat = tensor.detach().cpu().contiguous().flatten()
                digest.update(flat.view(torch.uint8).numpy().tobytes())
        return digest.hexdigest()

    def logits(self, crossing: Features) -> Tensor:
        """[N, C] from what crosses the cut, -inf where a class is hidden."""
        logits: Tensor = self.cut.tail(*crossing)
        if self.hidden:
            logits = logits.clone()
            logits[:, self.hidden] = -torch.inf
        return logits

    def forward(self, images: Tensor) -> Tensor:
        """[N, C] from images."""
        return self.logits(self.cut.backbone(images))


def make_audited_model(
    name: str, model: nn.Module, spec: InputSpec, device: torch.device
) -> AuditedModel:
    """Copies ``model`` and cuts the copy before its last layer.

    Args:
        name: see `AuditedModel`.
        model: any image classifier, or what `zsu_fast.mask` returns.
        spec: the images it takes.
        device: where to compute.

    Raises:
        ModelError: its weights or logits are NaN, or it can't be copied.
    """
    inner = unwrap(model)
    hidden: list[int] = []
    while isinstance(inner, MaskedClassifier):
        hidden = sorted({*hidden, *inner.forget})
        inner = unwrap(inner.model)
    return _cut(name, _finite_copy(inner, device), spec, hidden)


def variant(subject: AuditedModel, name: str, spec: InputSpec, own: bool = False) -> AuditedModel:
    """A copy of ``subject`` that nothing hides and whose last layer may be changed freely.

    Args:
        subject: what is copied.
        name: of the copy.
        spec: the images it takes.
        own: copy all weights; otherwise those before the last layer are shared, not copied.
    """
    shared: dict[int, object] = {}
    if not own:
        last = f"{subject.layers[-1]}."
        kept = state(subject.model.module).items()
        shared = {id(tensor): tensor for key, tensor in kept if not key.startswith(last)}
    return _cut(name, copy.deepcopy(subject.model, shared), spec, [])


def _finite_copy(model: nn.Module, device: torch.device) -> LogitsModel:
    """`working_copy`, which refuses infinite values, but for -inf in a bias: -1e30 stands for it.

    A bias of -inf is a way to mask a class, and this audit has to see through it. As -1e30 it
    still answers nothing, and gradients stay numbers.
    """
    try:
        copied = copy.deepcopy(model)
    except Exception as error:
        raise ModelError(
            f"{type(model).__name__} cannot be copied by copy.deepcopy ({error})",
            "Remove what cannot be copied: open files, locks, non-leaf tensors in attributes.",
        ) from error
    with torch.no_grad():
        for name, tensor in copied.named_parameters():
            if name.rpartition(".")[2] == "bias":
                tensor.masked_fill_(tensor == -torch.inf, -1e30 if tensor.itemsize > 2 else -6e4)
    return working_copy(copied, device)


def _cut(name: str, model: LogitsModel, spec: InputSpec, hidden: list[int]) -> AuditedModel:
    device = next(model.parameters()).device
    grey = torch.zeros(2, *spec.shape, device=device)
    with torch.no_grad():
        if bool(model(grey).isnan().any()):
            raise ModelError(f"{name}: its logits are NaN", "Load a checkpoint whose weights work.")
    layers = layer_names(model.module, grey)
    cut = split_at(model, layers[-1], grey, "before the last layer")
    return AuditedModel(name, model, layers, cut, hidden)
