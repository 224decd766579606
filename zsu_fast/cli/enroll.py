"""The command ``zsu-fast enroll``."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any, cast

import typer
from rich.console import Console
from torch import nn

from ..evaluation.enrolment import enroll as run_enroll
from ..models.embedding_classifier import Metric
from ..models.gallery import check_gallery_path
from ..models.infer_spec import resolve_spec
from ..models.loading import load_model
from . import options
from .inputs import read_images
from .output import print_json, print_written, report_errors


@options.expand_options
def enroll(
    model: Annotated[str, typer.Argument(help=options.MODEL_HELP, show_default=False)],
    data: Annotated[
        str,
        typer.Argument(
            help="A folder with one sub-folder of images per identity, named as the identity; an "
            ".npz file; or 'demo'.",
            show_default=False,
        ),
    ],
    out: Annotated[
        Path, typer.Option(help="The gallery to write, .safetensors.", show_default=False)
    ],
    images: options.ImageOptions,
    weights: options.Weights = None,
    classes: options.Classes = None,
    images_per_identity: Annotated[
        int | None, typer.Option(help="Use at most this many images of each. Default: all.")
    ] = None,
    every_image: Annotated[
        bool,
        typer.Option(
            "--every-image", help="A template per image, instead of their mean per identity."
        ),
    ] = False,
    metric: Annotated[
        str, typer.Option(help="How embeddings are compared: cosine, dot or euclidean.")
    ] = "cosine",
    scale: Annotated[
        float | None,
        typer.Option(help="Factor on the similarities, as in the encoder's training."),
    ] = None,
    device: options.Device = None,
    force: options.Force = False,
    as_json: options.AsJson = False,
) -> None:
    """Computes the templates of identities from images of them, for --gallery."""
    with report_errors(as_json):
        check_gallery_path(out, force)
        encoder: nn.Module = load_model(model, weights, classes, encoder=True)
        spec = resolve_spec(encoder, **images.arguments())
        if device is not None:
            encoder = encoder.to(device)
        gallery = run_enroll(
            encoder, read_images(data, spec), images_per_identity=images_per_identity,
            every_image=every_image, metric=cast(Metric, metric), scale=scale,
            **images.arguments(),
        )  # fmt: skip
        gallery.save(out, force)
        facts: dict[str, Any] = {
            "out": str(out), "identities": len(gallery.names),
            "templates": len(gallery.templates), "width": gallery.width, "metric": gallery.metric,
            "encoder": gallery.encoder,
        }  # fmt: skip
        if as_json:
            print_json(facts)
            return
        console = Console()
        console.print(
            f"Enrolled {facts['identities']} identities, {facts['templates']} templates of "
            f"{facts['width']} numbers."
        )
        print_written(console, [out])
