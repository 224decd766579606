"""The command ``zsu-fast unlearn``."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import AbstractContextManager
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Annotated, Any

import torch
import typer
from rich.console import Console
from torch import nn

from ..errors import ArgumentError
from ..evaluation.audit import audit
from ..evaluation.labelled_data import LabelledData
from ..evaluation.report.page import write_report
from ..evaluation.run_model import run_model
from ..models.compact_file import (
    check_forgotten_in_file,
)
from ..models.parameters import UNCOPYABLE, deep_copy
from ..options import paper_preset
from ..provenance.ledger import Entry, Ledger
from ..provenance.record import Record
from ..runtime import distributed
from ..synthesis.impressions import ClassImpressions
from ..unlearner import ZeroShotUnlearner
from . import options, output
from .audit import report_names
from .files import OutputOptions
from .inputs import folder_order, labels_of, parse_classes, parse_tail, read_images


@dataclass(frozen=True)
class MethodOptions:
    """How to unlearn."""

    tail: options.Tail = "auto"
    depth: options.Depth = None
    space: options.Space = None
    objective: Annotated[str, typer.Option(help="masked or differential.")] = "masked"
    everywhere: Annotated[
        bool,
        typer.Option(
            "--everywhere",
            help="Erase the classes' rows in further copies of the classifier too, such as an EMA "
            "copy or an auxiliary head.",
        ),
    ] = False
    steps: options.Steps = None
    margin: Annotated[
        float | None,
        typer.Option(help="Logits by which forgotten classes are pushed down. Default: computed."),
    ] = None
    cache: Annotated[
        Path | None,
        typer.Option(help="Folder for finished rows, from which an interrupted run resumes."),
    ] = None
    impressions: Annotated[
        Path | None, typer.Option(help="Class impressions to use, a file of ClassImpressions.save.")
    ] = None
    forgotten_as: Annotated[
        str | None,
        typer.Option(
            help="With --gallery: stranger (images of the forgotten are less similar to every "
            "template than the acceptance threshold) or redistribute (they go to whom they "
            "resemble). Default: stranger."
        ),
    ] = None
    paper: Annotated[bool, typer.Option("--paper", help="Use the published recipe.")] = False
    multi_label: options.MultiLabel = None

    def arguments(self) -> dict[str, Any]:
        """The options of `ZeroShotUnlearner`.

        Raises:
            ArgumentError: ``paper`` with an option that it decides, or no such impressions.
        """
        chosen = {
            "tail": parse_tail(self.tail), "depth": self.depth, "space": self.space,
            "objective": self.objective, "steps": self.steps, "margin": self.margin,
        }  # fmt: skip
        recipe = paper_preset() if self.paper else {}
        for name, value in chosen.items():
            default = getattr(MethodOptions, name)
            if name in recipe and value not in (default, recipe[name]):
                raise ArgumentError(
                    "paper", f"got --{name} {value} too", "Leave one out: the recipe decides it."
                )
        given = self.impressions
        return chosen | recipe | {
            "forgotten_as": self.forgotten_as, "everywhere": self.everywhere, "cache": self.cache,
            "multi_label": self.multi_label,
            "impressions": None if given is None else ClassImpressions.load(given),
        }  # fmt: skip


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
    ledger_names: Annotated[
        bool,
        typer.Option(
            "--ledger-names",
            help="Write the names of forgotten identities into the ledger. With --gallery, it "
            "holds salted hashes of their templates only.",
        ),
    ] = False
    new_base: Annotated[
        bool,
        typer.Option("--other-base", help="The model is not the result of the last entry."),
    ] = False

    def check(self) -> None:
        """Raises if an option has no effect without ``ledger``."""
        alone = {
            "request": self.request is not None, "other_base": self.new_base,
            "ledger_names": self.ledger_names,
        }  # fmt: skip
        if self.ledger is None and any(alone.values()):
            name = next(name for name, given in alone.items() if given)
            raise ArgumentError(name, "given without --ledger", "Name the ledger too.")


@options.expand_options
def unlearn(
    model: options.ModelOptions,
    forget: options.Forget,
    paths: OutputOptions,
    request: RequestOptions,
    method: MethodOptions,
    impressions: options.ImpressionOptions,
    images: options.ImageOptions,
    class_names: options.ClassNames = None,
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
            paths.check(model.gallery)
            request.check()
        arguments = method.arguments()
        loaded = model.load()
        labels = labels_of(folder_order(class_names, None), loaded)
        classes = parse_classes(forget, labels)
        before = None if request.forgotten is None else parse_classes(request.forgotten, labels)
        numbers = [c for c in before or () if isinstance(c, int)]  # names stay right when cut
        check_forgotten_in_file(model.weights, numbers)
        # the run changes `loaded` in place; the delta and the report need the model before it
        needs_base = ranks.is_main and (paths.delta is not None or paths.report is not None)
        base = deep_copy(loaded, UNCOPYABLE) if needs_base else loaded

        def write(record: Record) -> AbstractContextManager[None]:
            return paths.written(base, run, record, model)

        ledger = None
        if request.ledger is not None:
            ledger = LedgerAfterFiles(
                request.ledger,
                request.request,
                request.new_base,
                request.ledger_names,
                write=write,
            )
        run = ZeroShotUnlearner(
            loaded, classes, ledger=ledger, class_names=labels, forgotten=before,
            **arguments, **asdict(impressions), **images.arguments(), output=images.choice,
            seed=seed, device=device, inplace=not paths.compact, compact=paths.compact,
            progress=progress,
        )  # fmt: skip
        data = None
        if ranks.is_main and paths.report_data is not None:
            data = read_images(paths.report_data, run.spec)
            _check_images(run, data)
        run.run()
        if not ranks.is_main:
            return
        entry = None if ledger is None else ledger.appended[0]
        if entry is None:
            with write(run.record):
                pass
        says = _write_report(paths, base, run.full_size or loaded, run, data, progress)
        (_print_json if as_json else _print)(paths, run, says, entry)


@torch.no_grad()
def _check_images(run: ZeroShotUnlearner, data: Any) -> None:
    """Raises before the work if the model can't take the first images of the report's data."""
    source = LabelledData(data, "report_data", run.spec, run.labels)
    classes = run.classes if run.gallery is None else run.gallery.classes
    source.match(run.original, classes)
    images, labels = next(source.batches(8))
    source.targets(labels, classes)
    run_model(run.work, images[:8], argument="report_data")


def _write_report(
    paths: OutputOptions, base: nn.Module, result: nn.Module, run: ZeroShotUnlearner, data: Any,
    progress: bool | None,
) -> list[str]:  # fmt: skip
    """Audits the run and writes the report, if one was requested; returns what the audit says."""
    if paths.report is None:
        return []
    spec = run.spec
    found = audit(
        base, result, run.forget, data, class_names=run.labels,
        output=run.work.output if run.gallery is None else None,
        input_shape=spec.shape, mean=spec.mean, std=spec.std, seed=run.options.seed,
        device=run.device, progress=progress, multi_label=run.multi_label,
    )  # fmt: skip
    assert run.verdict is not None
    record = run.record.to_dict() | {"verdict": run.verdict.to_dict()}
    names = report_names(found, run.labels)
    title = f"{record['model']}: what was forgotten"
    write_report(paths.report, found, title=title, record=record, names=names, force=paths.force)
    return found.verdict


def _print_json(
    paths: OutputOptions, run: ZeroShotUnlearner, says: list[str], entry: Entry | None
) -> None:
    assert run.verdict is not None
    out = None if paths.out is None else str(paths.out)
    summary: dict[str, Any] = {
        "out": out, "record": run.record.to_dict(), "verdict": run.verdict.to_dict(), "audit": says,
    }  # fmt: skip
    if paths.out_folder is not None:
        summary["out_folder"] = str(paths.out_folder)
    if paths.delta is not None:
        summary["delta"] = str(paths.delta)
    if paths.out_gallery is not None:
        summary["out_gallery"] = str(paths.out_gallery)
    if entry is not None:
        summary["ledger"] = {"request": entry["request"], "head": entry["hash"]}
    output.print_json(summary)


def _print(
    paths: OutputOptions, run: ZeroShotUnlearner, says: list[str], entry: Entry | None
) -> None:
    console = Console()
    facts = run.record.to_dict()
    total = facts["timings"]["total"]
    what = "classes" if run.gallery is None else "identities"
    console.print(f"Forgot {len(run.forget)} of {facts['classes']} {what} in {total:.1f} s.")
    output.print_labels(console, "Forgotten", facts["labels"])
    if facts["compact"]:
        console.print(
            f"The classifier has {facts['compact']['classes']} classes left, numbered anew: the "
            f"record and the file hold the map."
        )
    if facts["multi_label"]:
        console.print("Multi-label: each class has a sigmoid of its own.")
    console.print(
        f"Impressions: {facts['impressions']['count']}, "
        f"{100 * facts['impressions']['hit_rate']:.1f} % reached their confidence."
    )
    output.print_split(console, facts)
    output.print_level(console, facts)
    console.print(str(run.verdict), markup=False, highlight=False, soft_wrap=True)
    output.print_sentences(console, says)
    if entry is not None:
        console.print(f"Request {entry['request']}, ledger head {entry['hash']}.")
    if run.gallery is not None:
        console.print(
            "Written: the encoder alone. Delete the templates of the forgotten wherever they are."
        )
    files = (
        paths.out, paths.out_folder, paths.delta, paths.record, paths.report, paths.out_gallery,
    )  # fmt: skip
    output.print_written(console, [path for path in files if path is not None])
