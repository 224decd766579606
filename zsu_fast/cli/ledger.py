"""The commands ``zsu-fast ledger verify`` and ``zsu-fast ledger show``."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer
from rich.console import Console
from rich.table import Table

from ..errors import LedgerError, shorten
from ..models.loading import load_model
from ..provenance.ledger import Entry, Ledger, verify as find_problems
from .options import MODEL_HELP, AsJson, Classes, Weights
from .output import escape, print_json, report_errors

app = typer.Typer(help="The ledger of requests to forget.", no_args_is_help=True)
LedgerFile = Annotated[Path, typer.Argument(help="The ledger.", show_default=False)]


@app.command()
def verify(
    path: LedgerFile,
    head: Annotated[
        str | None,
        typer.Option(
            help="Hash of the last entry, stored elsewhere: reveals whether entries were cut off."
        ),
    ] = None,
    model: Annotated[str | None, typer.Option(help=f"The model in use. {MODEL_HELP}")] = None,
    weights: Weights = None,
    classes: Classes = None,
    as_json: AsJson = False,
) -> None:
    """Checks every entry and the chain; exits with 2 if something is wrong."""
    with report_errors(as_json):
        used = None if model is None else load_model(model, weights, classes)
        problems = find_problems(path, head, used)
        if problems:
            raise LedgerError(f"ledger: {path} is not what was written: {'; '.join(problems)}.")
        ledger = Ledger(path)
        entries = ledger.entries()
        if as_json:
            print_json(
                {"entries": len(entries), "head": ledger.head, "forgotten": ledger.forgotten()}
            )
        else:
            typer.echo(f"{len(entries)} entries, all intact. Head: {ledger.head}")


@app.command()
def show(path: LedgerFile, as_json: AsJson = False) -> None:
    """Lists the requests."""
    with report_errors(as_json):
        entries = Ledger(path).entries()
        if as_json:
            print_json(entries)
        else:
            Console().print(_table(path, entries))


def _table(path: Path, entries: list[Entry]) -> Table:
    table = Table(title=escape(str(path)))
    for name in ("number", "request", "time", "forget", "forgotten before", "weights", "leak %"):
        table.add_column(name)
    for entry in entries:
        leak = entry["metrics"].get("leak")
        table.add_row(
            str(entry["number"]),
            escape(entry["request"]),
            escape(entry["time"]),
            shorten(entry["forget"], 12),
            shorten(entry["forgotten"], 12),
            f"{escape(entry['hash_before'][:8])} to {escape(entry['hash_after'][:8])}",
            f"{100 * leak:.2f}" if isinstance(leak, float) else "-",
        )
    return table
