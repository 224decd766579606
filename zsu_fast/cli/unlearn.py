"""The command ``zsu-fast unlearn``."""

from __future__ import annotations

import json
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.console import Console
from torch import nn

from ..errors import ArgumentError
from ..models import checkpoint
from ..models.delta import save_delta
from ..models.parameters import UNCOPYABLE, deep_copy
from ..options import paper_preset
from ..provenance.ledger import Entry, Ledger
from ..provenance.record import Record
from ..runtime import distributed
from ..unlearner import ZeroShotUnlearner
from .audit import audit_run, check_report
from .inputs import parse_classes, parse_tail
from .options import (
    AsJson,
    Device,
    Force,
    Forget,
    ImageOptions,
    ImpressionOptions,
    ModelOptions,
    Report,
    Seed,
    Tail,
    expand_options,
)
from .output import (
    print_json,
    print_level,
    print_sentences,
    print_split,
    print_written,
    progress_bar,
    report_errors,
)


@dataclass(frozen=True)
class OutputOptions:
    """Which files to write."""

    out: Annotated[
        Path | None,
        typer.Option(help="The .safetensors, .pt or .pth file to write.", show_default=False),
    ] = None
    delta: Annotated[
        Path | None, typer.Option(help="Write only the changed weights here, for `apply`.")
    ] = None
    record: Annotated[Path | None, typer.Option(help="Write the run's record (JSON) here.")] = None
    report: Report = None
    report_data: Annotated[
        str | None,
        typer.Option(help="Labelled images for the report only; formats as for evaluate --data."),
    ] = None
    force: Force = False

    def check(self) -> None:
        """Raises before the work if there is nothing to write, or no way to write it."""
        if self.out is None and self.delta is None:
            raise ArgumentError("out", "neither --out nor --delta was given", "Name a file.")
        for path in (self.out, self.delta, self.record):
            if path is not None:
                checkpoint.check_writable(path, self.force)
        check_report(self.report, self.force)


@dataclass(frozen=True)
class MethodOptions:
    """How to unlearn."""

    tail: Tail = "auto"
    depth: Annotated[
        str,
        typer.Option(help="output, or deep: the features forget too, which costs some RA."),
    ] = "output"
    objective: Annotated[str, typer.Option(help="masked or differential.")] = "masked"
    paper: Annotated[bool, typer.Option("--paper", help="Use the published recipe.")] = False

    def arguments(self) -> dict[str, Any]:
        """The options of `ZeroShotUnlearner`."""
        chosen = {"tail": parse_tail(self.tail), "depth": self.depth, "objective": self.objective}
        return chosen | paper_preset() if self.paper else chosen


@dataclass
class ResultFiles:
    """The files of a finished run: written all, or none.

    Attributes:
        options: their paths.
        base: the model before.
        result: the model that the run changes in place.
        written: what has been written.
    """

    options: OutputOptions
    base: nn.Module
    result: nn.Module
    written: list[Path] = field(default_factory=list)

    def write(self, record: Record) -> None:
        out, delta, record_file = self.options.out, self.options.delta, self.options.record
        force = self.options.force
        try:
            if out is not None:
                metadata = {
                    "zsu_fast.forget": json.dumps(record.forget),
                    "weights_before": record.weights_before,
                    "weights_after": record.weights_after,
                }
                checkpoint.save_weights(out, self.result, metadata, force)
                self.written.append(out)
            if delta is not None:
                save_delta(self.base, self.result, delta, force)
                self.written.append(delta)
            if record_file is not None:
                content = record.to_json().encode()
                checkpoint.write_atomically(record_file, lambda file: file.write(content), force)
                self.written.append(record_file)
        except BaseException:
            self.remove()
            raise

    def remove(self) -> None:
        while self.written:
            self.written.pop().unlink(missing_ok=True)


@dataclass(frozen=True, kw_only=True)
class LedgerAfterFiles(Ledger):
    """A ledger that writes the run's files before its entry, so that neither exists alone.

    Attributes:
        files: removed again if the entry can't be written.
        appended: the entry, once it is written.
    """

    files: ResultFiles
    appended: list[Entry] = field(default_factory=list)

    def append(self, record: Record) -> Entry:
        self.files.write(record)
        try:
            entry = super().append(record)
        except BaseException:
            self.files.remove()
            raise
        self.appended.append(entry)
        return entry


@dataclass(frozen=True)
class RequestOptions:
    """The request's place among earlier ones."""

    forgotten: Annotated[
        str | None,
        typer.Option(
            help="Classes forgotten before, written as for --forget. Default: the ledger's."
        ),
    ] = None
    ledger: Annotated[Path | None, typer.Option(help="Ledger to which this request is added.")] = (
        None
    )
    request: Annotated[str | None, typer.Option(help="Id of the request in the ledger.")] = None
    new_base: Annotated[
        bool,
        typer.Option("--other-base", help="The model is not the result of the last entry."),
    ] = False

    def open_ledger(self, files: ResultFiles) -> LedgerAfterFiles | None:
        """The ledger, if one was named."""
        if self.ledger is None:
            return None
        return LedgerAfterFiles(self.ledger, self.request, self.new_base, files=files)


@expand_options
def unlearn(
    model: ModelOptions,
    forget: Forget,
    output: OutputOptions,
    request: RequestOptions,
    method: MethodOptions,
    impressions: ImpressionOptions,
    images: ImageOptions,
    seed: Seed = 0,
    device: Device = None,
    as_json: AsJson = False,
) -> None:
    """Makes a model forget classes; writes the new weights, or only those that changed.

    Under torchrun, all processes synthesise the impressions together.
    """
    with (
        report_errors(as_json),
        distributed.launched(device) as ranks,
        report_errors(as_json, quiet=not ranks.is_main),
        ranks.all_or_none(),
    ):
        if ranks.is_main:
            output.check()
        loaded = model.load()
        # the run changes `loaded` in place; the delta and the report need the model before it
        needs_base = ranks.is_main and (output.delta is not None or output.report is not None)
        base = deep_copy(loaded, UNCOPYABLE) if needs_base else loaded
        files = ResultFiles(output, base, loaded)
        ledger = request.open_ledger(files)
        run = ZeroShotUnlearner(
            loaded,
            parse_classes(forget),
            forgotten=None if request.forgotten is None else parse_classes(request.forgotten),
            ledger=ledger,
            **method.arguments(),
            **asdict(impressions),
            **images.arguments(),
            seed=seed,
            device=device,
            inplace=True,
            progress=progress_bar(as_json),
        )
        run.run()
        if not ranks.is_main:
            return
        if ledger is None:
            files.write(run.record)
        verdict: list[str] = []
        if output.report is not None:
            verdict = audit_run(
                output.report, base, loaded, run, output.report_data, output.force,
                progress_bar(as_json),
            )  # fmt: skip
        entry = ledger.appended[0] if ledger is not None else None
        if as_json:
            print_json(_summary(output, run.record, verdict, entry))
        else:
            _print(files, run, verdict, entry)


def _summary(
    output: OutputOptions, record: Record, verdict: list[str], entry: Entry | None
) -> dict[str, Any]:
    """The result as plain values, for JSON."""
    summary: dict[str, Any] = {
        "out": None if output.out is None else str(output.out),
        "record": record.to_dict(),
        "verdict": verdict,
    }
    if output.delta is not None:
        summary["delta"] = str(output.delta)
    if entry is not None:
        summary["ledger"] = {"request": entry["request"], "head": entry["hash"]}
    return summary


def _print(
    files: ResultFiles, run: ZeroShotUnlearner, verdict: list[str], entry: Entry | None
) -> None:
    """The result as text, for people."""
    console = Console()
    facts = run.record.to_dict()
    best, total = facts["fit"]["best"], facts["timings"]["total"]
    console.print(f"Forgot {len(run.forget)} of {run.classes} classes in {total:.1f} s.")
    console.print(
        f"Impressions: {facts['impressions']['count']}, "
        f"{100 * facts['impressions']['hit_rate']:.1f} % reached their confidence."
    )
    print_split(console, facts)
    console.print(
        f"On held-out rows, {100 * best['leak']:.2f} % are still assigned a forgotten class; "
        f"{100 * best['agreement']:.2f} % of the others agree with the masked original."
    )
    print_level(console, facts)
    print_sentences(console, verdict)
    if entry is not None:
        console.print(f"Request {entry['request']}, ledger head {entry['hash']}.")
    report = [] if files.options.report is None else [files.options.report]
    print_written(console, [*files.written, *report])
