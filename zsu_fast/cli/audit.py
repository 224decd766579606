"""The bodies of ``zsu-fast audit`` and of ``zsu-fast unlearn --report``."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table
from torch import nn

from ..evaluation.audit.audit import audit
from ..evaluation.audit.metrics import BY_KEY
from ..evaluation.audit.result import MAIN, Audit, show
from ..evaluation.report.page import write_report
from ..models import checkpoint


def check_report(path: Path | None, force: bool) -> None:
    """Raises early where the page, or the JSON file beside it, could not be written."""
    if path is not None:
        checkpoint.check_writable(path, force)
        checkpoint.check_writable(path.with_suffix(".json"), force)


def report_run(
    path: Path,
    original: nn.Module,
    run: Any,
    unlearned: nn.Module,
    data: Any,
    force: bool,
    progress: bool | None,
) -> Audit:
    """Audits what a `ZeroShotUnlearner` made, and writes the report with the run's record."""
    spec = run.spec
    result = audit(
        original,
        unlearned,
        run.forget,
        data,
        input_shape=spec.shape,
        mean=spec.mean,
        std=spec.std,
        seed=run.options.seed,
        device=run.device,
        progress=progress,
    )
    record = run.record.to_dict()
    write_report(
        path,
        result,
        title=f"{record['model']}: what was forgotten",
        record=record,
        names=class_names(data),
        force=force,
    )
    return result


def class_names(data: Any) -> Sequence[str] | None:
    """The names in a folder of images, or of a data set that knows them."""
    names = getattr(getattr(data, "dataset", data), "classes", None)
    return names if isinstance(names, list | tuple) else None


def print_audit(console: Console, result: Audit) -> None:
    """The verdict, the tests and the short table."""
    first, *others = result.verdict
    console.print(first, style="bold green" if result.passed else "bold red", markup=False)
    for sentence in others:
        console.print(sentence, markup=False, highlight=False)
    words = {True: "passed", False: "failed", None: "can't tell"}
    table = Table(title="tests")
    for head in ("test", "result", "why"):
        table.add_column(head)
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
