"""The command ``zsu-fast audit``."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

import typer
from rich.console import Console
from rich.table import Column, Table

from ..errors import ArgumentError
from ..evaluation.audit import audit as run_audit
from ..evaluation.audit.result import Audit, show
from ..evaluation.report.page import write_report
from ..models import checkpoint
from ..models.infer_spec import resolve_spec
from ..models.labels import Labels
from . import options
from .inputs import folder_order, labels_of, parse_classes, read_images
from .output import (
    print_data_classes,
    print_json,
    print_labels,
    print_sentences,
    print_written,
    report_errors,
)


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
    shots: Annotated[
        int | None, typer.Option(help="Images per class that relearning may use. Default: 500.")
    ] = None
    relearn_steps: Annotated[
        int | None, typer.Option(help="At most this many steps of relearning; 0 skips it.")
    ] = None

    def check(self) -> None:
        """Raises if an option has no effect without ``data``."""
        needing = {
            "train_data": self.train_data, "shots": self.shots, "relearn_steps": self.relearn_steps,
        }  # fmt: skip
        for name, value in needing.items():
            if self.data is None and value:
                raise ArgumentError(name, f"got {value!r} without --data", "Add --data.")


@options.expand_options
def audit(
    model: options.ModelOptions,
    unlearned: Annotated[
        str, typer.Option(help="Weights file of the unlearned model.", show_default=False)
    ],
    forget: options.Forget,
    use: DataOptions,
    images: options.ImageOptions,
    class_names: options.ClassNames = None,
    multi_label: options.MultiLabel = None,
    report: options.Report = None,
    seed: options.Seed = 0,
    device: options.Device = None,
    force: options.Force = False,
    as_json: options.AsJson = False,
) -> None:
    """Tests what an unlearned model has forgotten, and what it only hides."""
    with report_errors(as_json):
        check_writable(force, report)
        use.check()
        original = model.load()
        spec = resolve_spec(original, **images.arguments())
        data = None if use.data is None else read_images(use.data, spec)
        names = folder_order(class_names, data)
        labels = labels_of(names, original)
        result = run_audit(
            original, model.load(unlearned), parse_classes(forget, labels), data,
            None if use.golden is None else model.load_alone(use.golden),
            train_data=None if use.train_data is None else read_images(use.train_data, spec),
            shots=500 if use.shots is None else use.shots, relearn_steps=use.relearn_steps,
            class_names=names, **images.arguments(), output=images.choice, seed=seed,
            device=device, progress=False if as_json else None, multi_label=multi_label,
        )  # fmt: skip
        if report is not None:
            title = f"{model.model}: what was forgotten"
            write_report(
                report, result, title=title, names=report_names(result, labels), force=force
            )
        if as_json:
            print_json(result.to_dict())
            return
        console = Console()
        _print(console, result)
        print_labels(console, "Forgotten", result.settings.get("labels", {}))
        print_data_classes(console, result.settings.get("data_classes", {}), labels)
        if report is not None:
            print_written(console, [report])


def check_writable(force: bool, report: Path | None, *others: Path | None) -> None:
    """Raises `OutputError` before the work if a file, or the report's JSON, can't be written."""
    for path in (*others, report, report and report.with_suffix(".json")):
        if path is not None:
            checkpoint.check_writable(path, force)


def report_names(result: Audit, labels: Labels | None) -> list[str] | None:
    """The names of all classes for the report: the model's, or else those in the data."""
    if labels is not None:
        return list(labels.names)
    named = {index: name for name, index in result.settings.get("data_classes", {}).items()}
    return [named.get(c, str(c)) for c in range(result.classes)] if named else None


def _print(console: Console, result: Audit) -> None:
    """Prints the verdict, the tests and the short table."""
    first, *others = result.verdict
    console.print(first, style="bold green" if result.passed else "bold red", markup=False)
    print_sentences(console, others)
    words = {True: "passed", False: "failed", None: "can't tell"}
    table = Table("test", "result", "why", title="tests")
    for check in result.checks:
        table.add_row(check.name, words[check.passed], check.says)
    console.print(table)
    names = [Column(row.name, justify="right") for row in result.rows]
    table = Table("", *names, title="models")
    for key in result.main:
        table.add_row(result.definitions[key].title, *[show(row.get(key)) for row in result.rows])
    console.print(table)
