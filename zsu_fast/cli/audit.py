"""The command ``zsu-fast audit``, and the audit that ``zsu-fast unlearn --report`` makes."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.console import Console
from rich.table import Table
from torch import nn

from ..evaluation.audit import audit as run_audit
from ..evaluation.audit.metrics import BY_KEY
from ..evaluation.audit.result import MAIN, Audit, show
from ..evaluation.report.page import write_report
from ..models import checkpoint
from ..models.infer_spec import resolve_spec
from ..unlearner import ZeroShotUnlearner
from .inputs import parse_classes, read_images
from .options import (
    AsJson,
    Device,
    Force,
    Forget,
    ImageOptions,
    ModelOptions,
    Report,
    Seed,
    expand_options,
)
from .output import print_json, print_sentences, print_written, progress_bar, report_errors


@dataclass(frozen=True)
class DataOptions:
    """What the audit may use besides the two models."""

    data: Annotated[
        str | None,
        typer.Option(help="Labelled images not trained on; formats as for evaluate --data."),
    ] = None
    train_data: Annotated[
        str | None, typer.Option(help="Labelled images that were trained on.")
    ] = None
    golden: Annotated[
        str | None, typer.Option(help="Weights of a model trained without the classes.")
    ] = None
    shots: Annotated[int, typer.Option(help="Images per class that relearning may use.")] = 500
    relearn_steps: Annotated[
        int | None, typer.Option(help="At most this many steps of relearning; 0 skips it.")
    ] = None


@expand_options
def audit(
    model: ModelOptions,
    unlearned: Annotated[
        str, typer.Option(help="Weights file of the unlearned model.", show_default=False)
    ],
    forget: Forget,
    use: DataOptions,
    images: ImageOptions,
    report: Report = None,
    seed: Seed = 0,
    device: Device = None,
    force: Force = False,
    as_json: AsJson = False,
) -> None:
    """Tests what an unlearned model has forgotten, and what it only hides."""
    with report_errors(as_json):
        check_report(report, force)
        original = model.load()
        spec = resolve_spec(original, **images.arguments())
        data = None if use.data is None else read_images(use.data, spec)
        result = run_audit(
            original,
            model.load(unlearned),
            parse_classes(forget),
            data,
            None if use.golden is None else model.load(use.golden),
            train_data=None if use.train_data is None else read_images(use.train_data, spec),
            shots=use.shots,
            relearn_steps=use.relearn_steps,
            **images.arguments(),
            seed=seed,
            device=device,
            progress=progress_bar(as_json),
        )
        if report is not None:
            title = f"{model.model}: what was forgotten"
            write_report(report, result, title=title, names=_class_names(data), force=force)
        if as_json:
            print_json(result.to_dict())
            return
        console = Console()
        _print(console, result)
        if report is not None:
            print_written(console, [report])


def check_report(path: Path | None, force: bool) -> None:
    """Raises before the work if the page, or the JSON file beside it, can't be written.

    Raises:
        OutputError: one of them exists (without ``force``) or can't be written.
    """
    if path is not None:
        checkpoint.check_writable(path, force)
        checkpoint.check_writable(path.with_suffix(".json"), force)


def audit_run(
    path: Path,
    original: nn.Module,
    unlearned: nn.Module,
    run: ZeroShotUnlearner,
    data: str | None,
    force: bool,
    progress: bool | None,
) -> list[str]:
    """Audits a finished run and writes the report.

    Args:
        path: of the page.
        original, unlearned: the model before and after the run.
        run: the finished run.
        data: labelled images as `read_images` takes them, or None.
        force: replace existing files.
        progress: show a progress bar.

    Returns:
        The verdict's sentences.
    """
    spec = run.spec
    images = None if data is None else read_images(data, spec)
    result = run_audit(
        original,
        unlearned,
        run.forget,
        images,
        input_shape=spec.shape,
        mean=spec.mean,
        std=spec.std,
        seed=run.options.seed,
        device=run.device,
        progress=progress,
    )
    record = run.record.to_dict()
    title = f"{record['model']}: what was forgotten"
    write_report(path, result, title=title, record=record, names=_class_names(images), force=force)
    return list(result.verdict)


def _class_names(data: Any) -> Sequence[str] | None:
    """The names of the sub-folders, or of a data set that knows its classes' names."""
    names = getattr(getattr(data, "dataset", data), "classes", None)
    return names if isinstance(names, list | tuple) else None


def _print(console: Console, result: Audit) -> None:
    """Prints the verdict, the tests and the short table."""
    first, *others = result.verdict
    console.print(first, style="bold green" if result.passed else "bold red", markup=False)
    print_sentences(console, others)
    words = {True: "passed", False: "failed", None: "can't tell"}
    table = Table(title="tests")
    for name in ("test", "result", "why"):
        table.add_column(name)
    for check in result.checks:
        table.add_row(check.name, words[check.passed], check.says)
    console.print(table)
    table = Table(title="models")
    table.add_column("")
    for row in result.rows:
        table.add_column(row.name, justify="right")
    for key in MAIN:
        if any(key in row.values for row in result.rows):
            table.add_row(BY_KEY[key].title, *[show(row.get(key)) for row in result.rows])
    console.print(table)
