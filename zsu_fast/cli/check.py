"""The command ``zsu-fast check``."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from ..evaluation.check import check as run_check
from . import options
from .inputs import folder_order, labels_of, parse_classes
from .output import print_json, report_errors


@options.expand_options
def check(
    model: options.ModelOptions,
    unlearned: Annotated[
        Path, typer.Option(help="Weights file of the result to check.", show_default=False)
    ],
    forget: options.Forget,
    images: options.ImageOptions,
    depth: Annotated[
        str | None,
        typer.Option(help="The level that is required: deep or output. Default: either."),
    ] = None,
    class_names: options.ClassNames = None,
    multi_label: options.MultiLabel = None,
    seed: options.Seed = 0,
    device: options.Device = None,
    as_json: options.AsJson = False,
) -> None:
    """Says, without data, whether a model has forgotten classes, however it was unlearned.

    Exits with 0 if the verdict is that it has, with 1 if not, with 2 if it can't be told.
    """
    with report_errors(as_json):
        names = folder_order(class_names, None)
        original, result = model.load(), model.load(str(unlearned))
        classes = parse_classes(forget, labels_of(names, original))
        verdict = run_check(
            original, result, classes, depth=depth, class_names=names, **images.arguments(),
            output=images.choice, seed=seed, device=device, progress=False if as_json else None,
            multi_label=multi_label,
        )  # fmt: skip
        if as_json:
            print_json(verdict.to_dict())
        else:
            typer.echo(str(verdict))
    if not verdict.passed:
        raise typer.Exit(1)
