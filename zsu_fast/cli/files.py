"""Which files ``zsu-fast unlearn`` writes, and how: all of them, or none."""

from __future__ import annotations

import json
from collections.abc import Iterator
from contextlib import AbstractContextManager, ExitStack, contextmanager, nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any

import typer
from torch import nn

from ..errors import ArgumentError
from ..models import checkpoint
from ..models.compact import Compaction
from ..models.compact_file import compact_metadata, file_compaction
from ..models.delta import check_ending, save_delta
from ..models.embedding_classifier import deliverable
from ..models.gallery import Gallery, check_gallery_path
from ..provenance.folders import written_folder
from ..provenance.new_folder import check_folder
from ..provenance.record import Record
from ..unlearner import ZeroShotUnlearner
from . import options
from .audit import check_writable


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
    out_gallery: Annotated[
        Path | None,
        typer.Option(
            help="With --gallery: write the gallery without the forgotten identities here."
        ),
    ] = None
    force: options.Force = False

    def check(self, gallery: Path | None) -> None:
        """Raises before the work if there is nothing to write, or no way to write it.

        Args:
            gallery: the option --gallery; with it, the model is an encoder.
        """
        self._check_encoder(gallery)
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
        paths = [
            self.out, self.out_folder, self.delta, self.record, self.report, figures,
            self.out_gallery,
        ]  # fmt: skip
        named = [path.resolve() for path in paths if path is not None]
        if twice := [path for path in named if named.count(path) > 1]:
            raise ArgumentError("out", f"{twice[0]} is named twice", "Name a file for each output.")
        check_writable(self.force, self.report, self.out, self.delta, self.record)

    def _check_encoder(self, gallery: Path | None) -> None:
        if gallery is None and self.out_gallery is not None:
            raise ArgumentError(
                "out_gallery", f"got {self.out_gallery} without --gallery", "Add --gallery FILE."
            )
        if gallery is not None and self.out_folder is not None:
            raise ArgumentError(
                "out_folder",
                f"got {self.out_folder} with --gallery, and such a folder holds a classifier",
                "Name a file for the encoder's weights by --out.",
            )
        if self.out_gallery is not None:
            check_gallery_path(self.out_gallery, self.force)

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
        self, base: nn.Module, run: ZeroShotUnlearner, record: Record, model: options.ModelOptions
    ) -> Iterator[None]:
        """Writes the files; removes them again if one of them, or the block, fails.

        Args:
            base: the model before the run.
            run: gives the model after it, and the verdict.
            record: of the run.
            model: where ``base`` was loaded from: a file that may be a compact model's, a gallery.
        """
        assert run.unlearned is not None
        result, compaction = deliverable(run.unlearned), _all_compactions(record, model.weights)
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
                save_delta(deliverable(base), result, self.delta, self.force)
                undo.callback(self.delta.unlink, missing_ok=True)
            if self.record is not None:
                content = record.to_json().encode()
                checkpoint.write_atomically(self.record, lambda f: f.write(content), self.force)
                undo.callback(self.record.unlink, missing_ok=True)
            if self.out_gallery is not None and model.gallery is not None:
                left = Gallery.load(model.gallery).without(record.forgotten_rows)
                left.save(self.out_gallery, self.force)
                undo.callback(self.out_gallery.unlink, missing_ok=True)
            yield
            undo.pop_all()


def _all_compactions(record: Record, weights: str | None) -> Compaction | None:
    """From the architecture to the result: what was cut before the run, and what by it."""
    earlier = file_compaction(weights)
    return Compaction.from_dict(record.compact).after(earlier) if record.compact else earlier
