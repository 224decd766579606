"""Folders of models that no library has a format for: what their config.json says.

A config names an architecture of the zoo or of torchvision. It never names code to import, so that
a folder from elsewhere can be loaded safely.
"""

from __future__ import annotations

import inspect
import sys
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass, field
from typing import Any

import torch
from torch import nn

from ..errors import ArgumentError
from ..version import VERSION
from . import zoo
from .input_spec import InputSpec

KEY, FORMAT = "zsu_fast", "zsu_fast.model/1"
# Arguments of torchvision's models that change what they compute and are attributes of theirs too;
# and the one, no attribute, that spares an initialisation which takes seconds.
_ARGUMENTS = ("aux_logits", "transform_input", "init_weights")


@dataclass(frozen=True)
class Architecture:
    """How to build a model: its name, as for `load_model`, and arguments of its factory."""

    name: str
    classes: int
    arguments: dict[str, Any] = field(default_factory=dict)

    def build(self) -> nn.Module:
        """Builds it with random weights, in eval mode."""
        source, _, name = self.name.rpartition(":")
        if not source and name in zoo.ZOO:
            return zoo.build(name, self.classes)
        if source == "torchvision":
            from torchvision import models

            if name in models.list_models(module=models):
                given = {**self.arguments, "num_classes": self.classes}
                return models.get_model(name, weights=None, **given).eval()
        raise ArgumentError(
            "model",
            f"its folder names the architecture {self.name!r}, which this version does not know",
            "Pass package.module:factory as the model, and the folder's model.safetensors as "
            "weights.",
        )


def architectures(model: nn.Module, classes: int) -> Iterator[Architecture]:
    """The architectures of the zoo and of torchvision with the class and the tensors of ``model``.

    Their options may differ where that does not show in the tensors: compare the outputs.
    """
    shapes = _shapes(model)
    for candidate in _candidates(model, classes):
        with torch.device("meta"):
            try:
                built = candidate.build()
            except (TypeError, ValueError, RuntimeError):  # it has no such argument
                continue
        if type(built) is type(model) and _shapes(built) == shapes:
            yield candidate


def _candidates(model: nn.Module, classes: int) -> Iterator[Architecture]:
    module = type(model).__module__
    if module == zoo.__name__:
        yield from (Architecture(name, classes) for name in zoo.ZOO)
    if module.startswith("torchvision.models."):
        from torchvision import models

        accepted = inspect.signature(type(model).__init__).parameters
        own = {n: getattr(model, n, False) for n in _ARGUMENTS if n in accepted}
        builders = vars(sys.modules[module])
        for name in models.list_models(module=models):
            if name in builders:
                yield Architecture(f"torchvision:{name}", classes, own)


def _shapes(model: nn.Module) -> dict[str, Any]:
    return {name: (t.shape, t.dtype) for name, t in model.state_dict().items()}


def read_spec(values: Any) -> InputSpec | None:
    """The `InputSpec` of its fields as read from JSON; None if they are not those of one."""
    try:
        fields: dict[str, Any] = dict(values)
        fields |= {k: tuple(v) for k, v in fields.items() if isinstance(v, list)}
        return InputSpec(**fields)
    except (TypeError, ValueError):
        return None


def to_config(
    model: nn.Module,
    classes: int | None,
    architecture: Architecture | None,
    names: Sequence[str] | None,
    spec: InputSpec | None,
) -> dict[str, Any]:
    """The content of config.json; ``architecture`` is None for a class of the user's own."""
    kind = type(model)
    config: dict[str, Any] = {
        KEY: {"format": FORMAT, "version": VERSION},
        "class": f"{kind.__module__}.{kind.__qualname__}",
        "architecture": None if architecture is None else architecture.name,
        "arguments": {} if architecture is None else architecture.arguments,
        "num_classes": classes,
        "input": None if spec is None else asdict(spec),
    }
    if names is not None:
        config["id2label"] = {str(index): name for index, name in enumerate(names)}
    return config


def from_config(config: dict[str, Any]) -> nn.Module:
    """Builds the model of a config with random weights, with its images and names of classes.

    Raises:
        ArgumentError: it is of another version, malformed, or of a user's own class.
    """
    found = config[KEY].get("format") if isinstance(config[KEY], dict) else None
    name, classes = config.get("architecture"), config.get("num_classes")
    if found != FORMAT:
        raise ArgumentError(
            "model", f"its folder has format {found!r}, this version reads {FORMAT}", "Write it "
            "again with this version, or load it with the version that wrote it.",
        )  # fmt: skip
    if not isinstance(name, str) or type(classes) is not int or classes < 1:
        raise ArgumentError(
            "model",
            f"its folder holds a {config.get('class')}, and does not say how to build it",
            "Pass package.module:factory as the model, and the folder's model.safetensors as "
            "weights.",
        )
    given = config.get("arguments")
    given = given if isinstance(given, dict) else {}
    arguments = {k: given[k] for k in _ARGUMENTS if type(given.get(k)) is bool}
    model = Architecture(name, classes, arguments).build()
    if (spec := read_spec(config.get("input"))) is not None:
        model.input_spec = spec  # type: ignore[assignment]
    names = config.get("id2label")
    if isinstance(names, dict) and len(names) == classes:
        model.class_names = [names[str(c)] for c in range(classes)]  # type: ignore[assignment]
    return model
