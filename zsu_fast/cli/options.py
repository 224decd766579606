"""Command-line options that several commands share.

Typer reads options from a function's signature. Here commands take related options as one
dataclass, and `expand_options` translates between the two.
"""

from __future__ import annotations

import functools
import inspect
import re
from collections.abc import Callable
from dataclasses import dataclass, is_dataclass
from pathlib import Path
from typing import Annotated, Any

import typer
from torch import nn

from ..models.compact_file import is_unlearned
from ..models.gallery import Gallery
from ..models.loading import load_model
from .inputs import parse_numbers

MODEL_HELP = (
    "A zoo name (lenet5, karpathynet, resnet20_cifar, ...), a torchvision or timm name "
    "(torchvision:resnet50, timm:...), hf:folder (of transformers, timm, or --out-folder), or "
    "package.module:factory."
)
Weights = Annotated[
    str | None,
    typer.Option(
        help="A safetensors file or a torch checkpoint of plain tensors, or a folder with one; "
        "FILE::ENTRY chooses among several weights in it (last.pt::state_dict_ema). 'pretrained' "
        "lets torchvision or timm download theirs."
    ),
]
Classes = Annotated[
    int | None, typer.Option(help="Number of logits of a torchvision or timm model.")
]
GalleryFile = Annotated[
    Path | None,
    typer.Option(
        help="A file of enrolled identities, written by enroll: the model is then an encoder (a "
        "zoo, torchvision or timm model without its last layer), and classes are identities."
    ),
]
Forget = Annotated[
    str,
    typer.Option(
        help="Classes to forget: 1,2,3 or 0-99 or 0-49,390-439, names such as tench,goldfish "
        "where the model or --class-names has them, or a file that lists them.",
        show_default=False,
    ),
]
ClassNames = Annotated[
    str | None,
    typer.Option(
        help="The names of the model's classes, in the order of its logits: a text file with one "
        "per line, or JSON. 'sorted': those of the data's folders, in sorted order. Default: what "
        "the model states."
    ),
]
Tail = Annotated[
    str,
    typer.Option(help="auto, last, the name of a module, or how many of the last layers to train."),
]
Depth = Annotated[
    str | None,
    typer.Option(
        help="deep: the features forget too; output: only the last layer changes, which is "
        "quick and as easily undone as a mask. Default: deep."
    ),
]
Space = Annotated[
    str | None,
    typer.Option(
        help="What is synthesised: tail-input (activations; quick) or input (images). "
        "Default: tail-input."
    ),
]
Steps = Annotated[
    int | None, typer.Option(help="Optimiser steps of the last layer's fit, at most.")
]
MultiLabel = Annotated[
    bool | None,
    typer.Option(
        "--multi-label/--single-label",
        help="Whether each class has a sigmoid of its own, and an image any number of classes. "
        "Default: as the model's config says, or its last operation shows.",
        show_default=False,
    ),
]
OUT = typer.Option(
    help="The file to write: .safetensors, or .pt, .pth, .bin, .ckpt, .pth.tar for torch.save.",
    show_default=False,
)
Report = Annotated[
    Path | None,
    typer.Option(help="Write an HTML report here, and its figures as .json beside it."),
]
Output = Annotated[
    str | None,
    typer.Option(
        help="Which item of the model's output holds the logits: an index or a key. Default: the "
        "item that the last layer makes."
    ),
]
Seed = Annotated[int, typer.Option(help="Seed of everything random.")]
Device = Annotated[str | None, typer.Option(help="cpu, cuda, cuda:1, ...")]
Force = Annotated[bool, typer.Option("--force", help="Replace existing files.")]
AsJson = Annotated[bool, typer.Option("--json", help="Print one JSON object instead of text.")]


@dataclass(frozen=True)
class ModelOptions:
    """Which model, and which weights."""

    model: Annotated[str, typer.Argument(help=MODEL_HELP, show_default=False)]
    weights: Weights = None
    classes: Classes = None
    gallery: GalleryFile = None

    def load(self, weights: str | None = None) -> nn.Module:
        """Builds the model with its own weights, or with those of the file ``weights``.

        With ``gallery``, the model is an encoder, and is returned with its templates.
        """
        encoder = self.gallery is not None
        model = load_model(self.model, weights or self.weights, self.classes, encoder)
        if self.gallery is None:
            return model
        gallery = Gallery.load(self.gallery)
        if weights is None and not is_unlearned(self.weights):
            gallery.check_encoder(model)
        return gallery.classifier(model)

    def load_alone(self, weights: str) -> nn.Module:
        """The model with other weights; with ``gallery``, its encoder without templates."""
        return load_model(self.model, weights, self.classes, self.gallery is not None)


@dataclass(frozen=True)
class ImageOptions:
    """What the model takes and returns, where the model itself does not say."""

    input_shape: Annotated[
        str | None, typer.Option(help="Channels, height and width, such as 3,224,224.")
    ] = None
    mean: Annotated[str | None, typer.Option(help="Mean per channel of pixels in 0..1.")] = None
    std: Annotated[
        str | None, typer.Option(help="Standard deviation per channel of pixels in 0..1.")
    ] = None
    output: Output = None

    @property
    def choice(self) -> int | str | None:
        """The index or key of the output's item that holds the logits."""
        text = self.output
        return int(text) if text is not None and re.fullmatch(r"-?\d+", text) else text

    def arguments(self) -> dict[str, Any]:
        """The numbers, as keyword arguments of the package's functions."""
        return {
            "input_shape": parse_numbers("input_shape", self.input_shape, int),
            "mean": parse_numbers("mean", self.mean, float),
            "std": parse_numbers("std", self.std, float),
        }


@dataclass(frozen=True)
class ImpressionOptions:
    """How many class impressions to synthesise."""

    impressions_per_class: Annotated[
        int | None, typer.Option(help="Default: 32, or fewer for many classes.")
    ] = None
    retain_sample: Annotated[
        int | None,
        typer.Option(
            help="Number of retained classes to synthesise. Default: all, or 1,024 if there are "
            "more than 4,096."
        ),
    ] = None


def expand_options(command: Callable[..., None]) -> Callable[..., None]:
    """Replaces parameters that are dataclasses by one keyword parameter per field, for Typer."""
    declared = inspect.signature(command, eval_str=True).parameters
    groups = {
        name: inspect.signature(parameter.annotation, eval_str=True).parameters
        for name, parameter in declared.items()
        if isinstance(parameter.annotation, type) and is_dataclass(parameter.annotation)
    }
    parameters = [
        option.replace(kind=option.KEYWORD_ONLY)
        for name, parameter in declared.items()
        for option in groups.get(name, {name: parameter}).values()
    ]

    @functools.wraps(command)
    def run(**values: Any) -> None:
        for name, options in groups.items():
            chosen = {option: values.pop(option) for option in options}
            values[name] = declared[name].annotation(**chosen)
        command(**values)

    run.__signature__ = inspect.Signature(parameters)  # type: ignore[attr-defined]
    run.__annotations__ = {p.name: p.annotation for p in parameters}
    return run
