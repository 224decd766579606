"""The demo: a real LeNet5 forgets four digits, offline, judged on real images."""

from __future__ import annotations

import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from ..errors import ZsuFastError
from ..evaluation.accuracy import Evaluation, evaluate, mask
from ..evaluation.audit import audit
from ..evaluation.report.page import write_report
from ..models import checkpoint, zoo
from ..runtime.events import Callback
from ..unlearner import ZeroShotUnlearner

FORGET = [1, 2, 3, 4]
FILES = (
    "lenet5_unlearned.safetensors", "record.json", "report.html", "report.json",
)  # fmt: skip


@dataclass(frozen=True)
class Row:
    """A line of the demo's table; ``seconds`` is None for the original."""

    name: str
    evaluation: Evaluation
    seconds: float | None


def mnist_test() -> tuple[Tensor, Tensor]:
    """2,000 MNIST test images, 200 a digit: float32 [2000, 1, 28, 28] normalised, int64 [2000]."""
    with np.load(zoo.ASSETS / "mnist_test_2000.npz") as file:
        images, labels = torch.from_numpy(file["images"]), torch.from_numpy(file["labels"])
    return zoo.ZOO["lenet5"].spec.normalise(images), labels.long()


def run(
    out: str | Path,
    *,
    seed: int = 0,
    force: bool = False,
    progress: bool | None = None,
    callback: Callback | None = None,
) -> tuple[list[Row], dict[str, Any]]:
    """Forgets {1, 2, 3, 4} of the embedded LeNet5 and writes the result into the folder ``out``.

    Args:
        out: a folder, made if need be; gets the model, the record and the report.
        seed: of the run.
        force: replace files of an earlier demo.
        progress, callback: see `Reporter`.

    Returns:
        The table (original, mask, unlearned), and the run's record, the audit's verdict and the
        paths written; "report" says why where there is none.

    Raises:
        OutputError: a file exists (without ``force``) or can't be written; checked first.
    """
    folder = Path(out)
    folder.mkdir(parents=True, exist_ok=True)
    model_path, record_path, page_path, _ = (folder / name for name in FILES)
    for name in FILES:
        checkpoint.check_writable(folder / name, force)
    model, data = zoo.load("lenet5"), mnist_test()
    rows = [Row("original", evaluate(model, data, FORGET), None)]
    started = time.perf_counter()
    masked = mask(model, FORGET)
    seconds = time.perf_counter() - started
    rows.append(Row("mask", evaluate(masked, data, FORGET), seconds))
    started = time.perf_counter()
    run = ZeroShotUnlearner(model, FORGET, seed=seed, progress=progress, callback=callback)
    unlearned = run.run()
    seconds = time.perf_counter() - started
    rows.append(Row("unlearned", evaluate(unlearned, data, FORGET), seconds))

    checkpoint.save_weights(model_path, unlearned, force=force)
    record = run.record.to_json().encode()
    checkpoint.write_atomically(record_path, lambda file: file.write(record), force)
    page, verdict = str(page_path), []
    try:
        told = audit(
            model, unlearned, FORGET, data, zoo.load("lenet5_golden"), seed=seed, progress=progress
        )
        verdict = told.verdict
        title = "LeNet5 on MNIST: what was forgotten"
        write_report(page_path, told, title=title, record=run.record.to_dict(), force=force)
    except ZsuFastError as error:
        page = f"not written. {error}"
    written = {
        "model": str(model_path), "record": str(record_path), "report": page,
    }  # fmt: skip
    return rows, {"record": run.record.to_dict(), "verdict": verdict, "written": written}
