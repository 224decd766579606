"""A model under audit: a private copy, split before its last layer, and variants of it.

Audited models that share everything but the last layer (the original, its mask, often the unlearned
model) have one `AuditedModel.backbone_hash`, and their backbone runs once for all of them.
"""

from __future__ import annotations

import hashlib
from dataclasses import dataclass, field
from functools import cached_property

import torch
from torch import Tensor, nn

from ...errors import ModelError
from ...models.input_spec import InputSpec
from ...models.outputs import OutputChoice
from ...models.parameters import UNCOPYABLE, deep_copy, state, unwrap
from ...models.probe import probe
from ...models.wrapper import LogitsModel, working_copy
from ...splitting.batch_dim import BoundaryTensors
from ...splitting.layers import layer_names
from ...splitting.split import Split, split_at
from ...synthesis.class_sampling import class_weights
from ..accuracy import MaskedClassifier


@dataclass
class AuditedModel:
    """A model under audit.

    Attributes:
        name: its name in tables, one of `result.MODELS` or a description of the variant.
        model: a float32 copy in eval mode, independent of the user's model.
        layers: names of the modules with weights, in the order of the forward pass; the last one
            is the model's *last layer* (a Linear, or a convolution as in SqueezeNet).
        split: the model split before its last layer.
        spec: the images it takes.
        hidden: classes whose logits `zsu_fast.mask` sets to -inf after the model.
    """

    name: str
    model: LogitsModel
    layers: list[str]
    split: Split
    spec: InputSpec
    hidden: list[int] = field(default_factory=list)

    @property
    def last_layer(self) -> nn.Module:
        """The last layer with weights."""
        return self.model.module.get_submodule(self.layers[-1])

    def is_in_last_layer(self, name: str) -> bool:
        """Whether the tensor of this name belongs to the last layer."""
        return name.startswith(f"{self.layers[-1]}.")

    @property
    def device(self) -> torch.device:
        return next(self.model.parameters()).device

    @cached_property
    def backbone_hash(self) -> str:
        """SHA-256 of everything before the last layer: equal for models with equal features."""
        digest = hashlib.sha256(type(self.model.module).__qualname__.encode())
        for name, tensor in sorted(state(self.model.module).items()):
            if not self.is_in_last_layer(name):
                digest.update(f"|{name}|{tuple(tensor.shape)}|".encode())
                flat = tensor.detach().cpu().contiguous().flatten()
                digest.update(flat.view(torch.uint8).numpy().tobytes())
        return digest.hexdigest()

    def logits(self, features: BoundaryTensors) -> Tensor:
        """Returns logits [N, C] from the backbone's output, -inf for hidden classes."""
        logits: Tensor = self.split.tail(*features)
        if self.hidden:
            logits = logits.clone()
            logits[:, self.hidden] = -torch.inf
        return logits

    def last_layer_rows(self, classes: int) -> Tensor:
        """Returns each class's weights and bias in the last layer as one vector: [C, D].

        Raises:
            ModelError: the last layer does not have one row per class.
        """
        parts = [p.detach().float().cpu() for p in self.last_layer.parameters()]
        if any(len(p) != classes for p in parts):
            raise ModelError(
                f"{self.name}: its last layer does not have one row per class",
                "Rows can't be compared.",
            )
        return torch.cat([p.reshape(classes, -1) for p in parts], 1)

    def weights_and_biases(self, classes: int) -> tuple[Tensor, Tensor]:
        """Returns the last layer's weights, float32 [C, D], and biases, float32 [C], 0 without any.

        Raises:
            ModelError: the last layer does not have one row of weights per class.
        """
        weight = class_weights(self.model.module, self.layers[-1], classes)
        if weight is None:
            raise ModelError(
                f"{self.name}: its last layer does not have one row of weights per class",
                "It can't be fitted to other features.",
            )
        bias = getattr(self.last_layer, "bias", None)
        bias = torch.zeros(classes) if bias is None else bias.detach().float().cpu()
        return weight.detach().float().cpu().flatten(1), bias


def audited_copy(
    name: str, model: nn.Module, spec: InputSpec, device: torch.device,
    output: OutputChoice | None = None, multi_label: bool = False,
) -> AuditedModel:  # fmt: skip
    """Copies ``model``, also the result of `zsu_fast.mask`, and splits it before its last layer.

    Args:
        name, spec: see `AuditedModel`.
        model: the user's model; it is not changed.
        device: where to copy it.
        output: which item of its output holds the logits; None: see `find_output`.
        multi_label: whether each class has a sigmoid of its own.

    Raises:
        ModelError: its weights or logits are NaN, it does not return logits, or it can't be copied.
    """
    inner = unwrap(model)
    hidden: list[int] = []
    while isinstance(inner, MaskedClassifier):
        hidden = sorted({*hidden, *inner.forget})
        output = inner.output if output is None else output
        inner = unwrap(inner.model)
    work = _finite_copy(inner, device, output)
    probe(work, spec, device, multi_label)
    return _split(name, work, spec, hidden)


def variant(audited: AuditedModel, name: str, copy_backbone: bool = False) -> AuditedModel:
    """Copies a model for changes to its last layer; the copy has no hidden classes.

    It shares the weights before the last layer with ``audited``, unless ``copy_backbone``.
    """
    shared = {}
    if not copy_backbone:
        tensors = state(audited.model.module)
        shared = {id(t): t for key, t in tensors.items() if not audited.is_in_last_layer(key)}
    copied = deep_copy(audited.model, UNCOPYABLE, shared)
    assert isinstance(copied, LogitsModel)
    return _split(name, copied, audited.spec, [])


def unmasked(
    audited: AuditedModel, original: AuditedModel, rows: list[int] | None, classes: int
) -> AuditedModel:
    """Returns a variant of ``audited`` with rows of the original's last layer put back.

    It is the exact opposite of a mask. If the model recognises the forgotten classes once their
    rows are the original's, unlearning removed the classifier's access to the features, not the
    features.

    Args:
        audited, original: models with last layers of one shape; both stay unchanged.
        rows: the classes whose weights and biases are put back. None: all classes, which also
            undoes a shuffled last layer and raised rows of *other* classes.
        classes: the number of logits.

    Raises:
        ModelError: the last layers differ in shape, or do not have one row per class.
    """
    old = dict(original.last_layer.named_parameters())
    shapes, wanted = (
        {n: tuple(p.shape) for n, p in m.last_layer.named_parameters()} for m in (audited, original)
    )
    if shapes != wanted:
        raise ModelError(
            f"{audited.name}: its last layer {shapes} differs in shape from the original's",
            "The un-mask test needs models of one architecture.",
        )
    if any(shape[0] != classes for shape in shapes.values()):
        raise ModelError(
            f"{audited.name}: its last layer {audited.layers[-1]!r} does not have one row for each "
            f"of {classes} classes: {shapes}",
            "The un-mask test needs a Linear or convolution with one output per class.",
        )
    part = "rows" if rows is not None else "last layer"
    restored = variant(audited, f"{audited.name}, original {part} back")
    index = torch.tensor(list(range(classes)) if rows is None else rows)
    with torch.no_grad():
        for name, parameter in restored.last_layer.named_parameters():
            parameter[index] = old[name][index]
    return restored


def _finite_copy(
    model: nn.Module, device: torch.device, output: OutputChoice | None
) -> LogitsModel:
    """`working_copy`, with -1e30 in place of -inf in a bias; it refuses other infinite values.

    A bias of -inf is a way to mask a class, and the audit has to see through it. With -1e30 the
    class is still never predicted, and gradients stay finite.
    """
    copied = deep_copy(model, UNCOPYABLE)
    with torch.no_grad():
        for name, tensor in copied.named_parameters():
            if name.rpartition(".")[2] == "bias":
                tensor.masked_fill_(tensor == -torch.inf, -1e30 if tensor.itemsize > 2 else -6e4)
    return working_copy(copied, device, output)


def _split(name: str, model: LogitsModel, spec: InputSpec, hidden: list[int]) -> AuditedModel:
    device = next(model.parameters()).device
    images = torch.zeros(2, *spec.shape, device=device)
    with torch.no_grad():
        if bool(model(images).isnan().any()):
            raise ModelError(f"{name}: its logits are NaN", "Load a checkpoint whose weights work.")
    layers = layer_names(model.module, images)
    split = split_at(model, layers[-1], images, "before the last layer")
    return AuditedModel(name, model, layers, split, spec, hidden)
