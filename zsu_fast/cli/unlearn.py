"""The command ``zsu-fast unlearn``."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, ExitStack, contextmanager, nullcontext
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
from ..models import checkpoint
from ..models.compact import Compaction
from ..models.compact_file import (
    check_forgotten_in_file,
    compact_metadata,
    file_compaction,
)
from ..models.delta import check_ending, save_delta
from ..models.parameters import UNCOPYABLE, deep_copy
from ..options import paper_preset
from ..provenance.folders import written_folder
from ..provenance.ledger import Entry, Ledger
from ..provenance.new_folder import check_folder
from ..provenance.record import Record
from ..runtime import distributed
from ..synthesis.impressions import ClassImpressions
from ..unlearner import ZeroShotUnlearner
from . import options, output
from .audit import check_writable, report_names
from .inputs import folder_order, labels_of, parse_classes, parse_tail, read_images


@dataclass(frozen=True)
class OutputOptions:
    """Which files to write."""

    out: Annotated[Path | None, options.OUT] = None
    out_folder: Annotated[
        Path | None,
        typer.Option(
            help="Write a folder to publish: config, weights, record and model card, in the format "
            "of the model's library."
        ),
    ] = None
    delta: Annotated[
        Path | None, typer.Option(help="Write only the changed weights here, for `apply`.")
    ] = None
    record: Annotated[Path | None, typer.Option(help="Write the run's record (JSON) here.")] = None
    compact: Annotated[
        bool,
        typer.Option(
            "--compact",
            help="Write a classifier without rows for the forgotten classes; the others are "
            "numbered anew, and the record and the file hold the map.",
        ),
    ] = False
    report: options.Report = None
    report_data: Annotated[
        str | None,
        typer.Option(help="Labelled images for the report only; formats as for evaluate --data."),
    ] = None
    force: options.Force = False

    def check(self) -> None:
        """Raises before the work if there is nothing to write, or no way to write it."""
        if self.out is None and self.delta is None and self.out_folder is None:
            raise ArgumentError(
                "out", "none of --out, --out-folder and --delta was given", "Name a file."
            )
        if self.report_data is not None and self.report is None:
            raise ArgumentError(
                "report_data", f"got {self.report_data!r} without --report", "Add --report FILE."
            )
        self._check_compact()
        if self.out is not None:
            checkpoint.check_ending(self.out)
        if self.delta is not None:
            check_ending(self.delta)
        if self.out_folder is not None:
            check_folder(self.out_folder, self.force)
        figures = self.report and self.report.with_suffix(".json")
        paths = [self.out, self.out_folder, self.delta, self.record, self.report, figures]
        named = [path.resolve() for path in paths if path is not None]
        if twice := [path for path in named if named.count(path) > 1]:
            raise ArgumentError("out", f"{twice[0]} is named twice", "Name a file for each output.")
        check_writable(self.force, self.report, self.out, self.delta, self.record)

    def _check_compact(self) -> None:
        if not self.compact:
            return
        if self.delta is not None:
            raise ArgumentError(
                "delta",
                "got --compact too, and a delta holds values of tensors of the same shapes",
                "Leave one of them out.",
            )
        if self.out is not None and self.out.suffix != ".safetensors":
            raise ArgumentError(
                "out",
                f"got {self.out} with --compact, and only safetensors files say which class each "
                f"logit is",
                "Name a .safetensors file.",
            )

    @contextmanager
    def written(
        self, base: nn.Module, run: ZeroShotUnlearner, record: Record, weights: str | None
    ) -> Iterator[None]:
        """Writes the files; removes them again if one of them, or the block, fails.

        Args:
            base: the model before the run.
            run: gives the model after it, and the verdict.
            record: of the run.
            weights: the file that ``base`` was loaded from, which may be a compact model's.
        """
        result, compaction = run.unlearned, _all_compactions(record, weights)
        assert result is not None
        folder: AbstractContextManager[Any] = nullcontext()
        if self.out_folder is not None:
            folder = written_folder(
                result, self.out_folder, record=record, verdict=run.verdict,
                force=self.force, compaction=compaction,
            )  # fmt: skip
        with folder, ExitStack() as undo:
            if self.out is not None:
                metadata = {
                    "zsu_fast.forget": json.dumps(record.forget),
                    "weights_before": record.weights_before,
                    "weights_after": record.weights_after,
                } | compact_metadata(compaction, record.forgotten_rows)
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


def _all_compactions(record: Record, weights: str | None) -> Compaction | None:
    """From the architecture to the result: what was cut before the run, and what by it."""
    earlier = file_compaction(weights)
    return Compaction.from_dict(record.compact).after(earlier) if record.compact else earlier


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
            "everywhere": self.everywhere, "cache": self.cache, "multi_label": self.multi_label,
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
    new_base: Annotated[
        bool,
        typer.Option("--other-base", help="The model is not the result of the last entry."),
    ] = False

    def check(self) -> None:
        """Raises if an option has no effect without ``ledger``."""
        alone = {"request": self.request is not None, "other_base": self.new_base}
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
            paths.check()
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
            return paths.written(base, run, record, model.weights)

        ledger = None
        if request.ledger is not None:
            ledger = LedgerAfterFiles(
                request.ledger, request.request, request.new_base, write=write
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
    source.match(run.original, run.classes)
    images, labels = next(source.batches(8))
    source.targets(labels, run.classes)
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
        base, result, run.forget, data, class_names=run.labels, output=run.work.output,
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
    if entry is not None:
        summary["ledger"] = {"request": entry["request"], "head": entry["hash"]}
    output.print_json(summary)


def _print(
    paths: OutputOptions, run: ZeroShotUnlearner, says: list[str], entry: Entry | None
) -> None:
    console = Console()
    facts = run.record.to_dict()
    total = facts["timings"]["total"]
    console.print(f"Forgot {len(run.forget)} of {run.classes} classes in {total:.1f} s.")
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
    files = (paths.out, paths.out_folder, paths.delta, paths.record, paths.report)
    output.print_written(console, [path for path in files if path is not None])
