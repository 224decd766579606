"""The command ``zsu-fast unlearn``."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, ExitStack, contextmanager
from dataclasses import asdict, dataclass, field
from functools import partial
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.console import Console
from torch import nn

from ..errors import ArgumentError
from ..evaluation.audit import audit
from ..evaluation.report.page import write_report
from ..models import checkpoint
from ..models.delta import save_delta
from ..models.parameters import UNCOPYABLE, deep_copy
from ..options import paper_preset
from ..provenance.ledger import Entry, Ledger
from ..provenance.record import Record
from ..runtime import distributed
from ..unlearner import ZeroShotUnlearner
from . import options, output
from .audit import check_writable, class_names
from .inputs import parse_classes, parse_tail, read_images


@dataclass(frozen=True)
class OutputOptions:
    """Which files to write."""

    out: Annotated[Path | None, options.OUT] = None
    delta: Annotated[
        Path | None, typer.Option(help="Write only the changed weights here, for `apply`.")
    ] = None
    record: Annotated[Path | None, typer.Option(help="Write the run's record (JSON) here.")] = None
    report: options.Report = None
    report_data: Annotated[
        str | None,
        typer.Option(help="Labelled images for the report only; formats as for evaluate --data."),
    ] = None
    force: options.Force = False

    def check(self) -> None:
        """Raises before the work if there is nothing to write, or no way to write it."""
        if self.out is None and self.delta is None:
            raise ArgumentError("out", "neither --out nor --delta was given", "Name a file.")
        check_writable(self.force, self.report, self.out, self.delta, self.record)

    @contextmanager
    def written(self, base: nn.Module, result: nn.Module, record: Record) -> Iterator[None]:
        """Writes the files; removes them again if one of them, or the block, fails."""
        with ExitStack() as undo:
            if self.out is not None:
                metadata = {
                    "zsu_fast.forget": json.dumps(record.forget),
                    "weights_before": record.weights_before,
                    "weights_after": record.weights_after,
                }
                checkpoint.save_weights(self.out, result, metadata, self.force)
                undo.callback(self.out.unlink, missing_ok=True)
            if self.delta is not None:
                save_delta(base, result, self.delta, self.force)
                undo.callback(self.delta.unlink, missing_ok=True)
            if self.record is not None:
                content = record.to_json().encode()
                checkpoint.write_atomically(self.record, lambda f: f.write(content), self.force)
                undo.callback(self.record.unlink, missing_ok=True)
            yield
            undo.pop_all()


@dataclass(frozen=True)
class MethodOptions:
    """How to unlearn."""

    tail: options.Tail = "auto"
    depth: Annotated[
        str | None,
        typer.Option(
            help="deep: the features forget too; output: only the last layer changes, which is "
            "quick and as easily undone as a mask. Default: deep."
        ),
    ] = None
    objective: Annotated[str, typer.Option(help="masked or differential.")] = "masked"
    paper: Annotated[bool, typer.Option("--paper", help="Use the published recipe.")] = False
    multi_label: options.MultiLabel = None

    def arguments(self) -> dict[str, Any]:
        """The options of `ZeroShotUnlearner`."""
        chosen = {
            "tail": parse_tail(self.tail), "depth": self.depth, "objective": self.objective,
            "multi_label": self.multi_label,
        }  # fmt: skip
        return chosen | paper_preset() if self.paper else chosen


@dataclass(frozen=True, kw_only=True)
class LedgerAfterFiles(Ledger):
    """A ledger that writes the run's files before its entry, so that neither exists alone."""

    write: Callable[[Record], AbstractContextManager[None]]
    appended: list[Entry] = field(default_factory=list)

    def append(self, record: Record) -> Entry:
        with self.write(record):
            self.appended.append(super().append(record))
        return self.appended[-1]


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


@options.expand_options
def unlearn(
    model: options.ModelOptions,
    forget: options.Forget,
    paths: OutputOptions,
    request: RequestOptions,
    method: MethodOptions,
    impressions: options.ImpressionOptions,
    images: options.ImageOptions,
    seed: options.Seed = 0,
    device: options.Device = None,
    as_json: options.AsJson = False,
) -> None:
    """Makes a model forget classes; writes the new weights, or only those that changed.

    Under torchrun, all processes synthesise the impressions together.
    """
    with (
        output.report_errors(as_json),
        distributed.launched(device) as ranks,
        output.report_errors(as_json, quiet=not ranks.is_main),
        ranks.all_or_none(),
    ):
        progress = False if as_json else None
        if ranks.is_main:
            paths.check()
        loaded = model.load()
        # the run changes `loaded` in place; the delta and the report need the model before it
        needs_base = ranks.is_main and (paths.delta is not None or paths.report is not None)
        base = deep_copy(loaded, UNCOPYABLE) if needs_base else loaded
        write = partial(paths.written, base, loaded)
        ledger = None
        if request.ledger is not None:
            ledger = LedgerAfterFiles(
                request.ledger, request.request, request.new_base, write=write
            )
        run = ZeroShotUnlearner(
            loaded, parse_classes(forget), ledger=ledger,
            forgotten=None if request.forgotten is None else parse_classes(request.forgotten),
            **method.arguments(), **asdict(impressions), **images.arguments(),
            seed=seed, device=device, inplace=True, progress=progress,
        )  # fmt: skip
        run.run()
        if not ranks.is_main:
            return
        entry = None if ledger is None else ledger.appended[0]
        if entry is None:
            with write(run.record):
                pass
        verdict = _write_report(paths, base, loaded, run, progress)
        (_print_json if as_json else _print)(paths, run, verdict, entry)


def _write_report(
    paths: OutputOptions, base: nn.Module, result: nn.Module, run: ZeroShotUnlearner,
    progress: bool | None,
) -> list[str]:  # fmt: skip
    """Audits the run and writes the report, if one was requested; returns the verdict."""
    if paths.report is None:
        return []
    spec, data = run.spec, paths.report_data
    images = None if data is None else read_images(data, spec)
    found = audit(
        base, result, run.forget, images, input_shape=spec.shape, mean=spec.mean, std=spec.std,
        seed=run.options.seed, device=run.device, progress=progress, multi_label=run.multi_label,
    )  # fmt: skip
    record, names = run.record.to_dict(), class_names(images)
    title = f"{record['model']}: what was forgotten"
    write_report(paths.report, found, title=title, record=record, names=names, force=paths.force)
    return found.verdict


def _print_json(
    paths: OutputOptions, run: ZeroShotUnlearner, verdict: list[str], entry: Entry | None
) -> None:
    out = None if paths.out is None else str(paths.out)
    summary: dict[str, Any] = {"out": out, "record": run.record.to_dict(), "verdict": verdict}
    if paths.delta is not None:
        summary["delta"] = str(paths.delta)
    if entry is not None:
        summary["ledger"] = {"request": entry["request"], "head": entry["hash"]}
    output.print_json(summary)


def _print(
    paths: OutputOptions, run: ZeroShotUnlearner, verdict: list[str], entry: Entry | None
) -> None:
    console = Console()
    facts = run.record.to_dict()
    best, total = facts["fit"]["best"], facts["timings"]["total"]
    console.print(f"Forgot {len(run.forget)} of {run.classes} classes in {total:.1f} s.")
    if facts["multi_label"]:
        console.print("Multi-label: each class has a sigmoid of its own.")
    console.print(
        f"Impressions: {facts['impressions']['count']}, "
        f"{100 * facts['impressions']['hit_rate']:.1f} % reached their confidence."
    )
    output.print_split(console, facts)
    console.print(
        f"On held-out rows, {100 * best['leak']:.2f} % are still assigned a forgotten class; "
        f"{100 * best['agreement']:.2f} % of the others agree with the masked original."
    )
    output.print_level(console, facts)
    output.print_sentences(console, verdict)
    if entry is not None:
        console.print(f"Request {entry['request']}, ledger head {entry['hash']}.")
    files = (paths.out, paths.delta, paths.record, paths.report)
    output.print_written(console, [path for path in files if path is not None])
