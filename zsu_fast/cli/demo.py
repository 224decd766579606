"""The demo: a real LeNet5 forgets four digits, offline, and is tested on real images."""

from __future__ import annotations

import time
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

from ..errors import ZsuFastError
from ..evaluation.accuracy import Evaluation, evaluate, mask
from ..evaluation.audit import audit
from ..evaluation.report.page import write_report
from ..models import checkpoint, zoo
from ..unlearner import ZeroShotUnlearner

FORGET = [1, 2, 3, 4]
FILES = ("lenet5_unlearned.safetensors", "record.json", "report.html", "report.json")


class DemoRow(NamedTuple):
    """A row of the demo's table; ``seconds`` is None for the original."""

    name: str
    evaluation: Evaluation
    seconds: float | None


def mnist_test() -> tuple[Tensor, Tensor]:
    """Loads the 2,000 MNIST test images that ship with the package, 200 per digit.

    Returns:
        Images, float32 [2000, 1, 28, 28], normalised for LeNet5; labels, int64 [2000].
    """
    with np.load(zoo.ASSETS / "mnist_test_2000.npz") as file:
        images, labels = torch.from_numpy(file["images"]), torch.from_numpy(file["labels"])
    return zoo.ZOO["lenet5"].spec.normalise(images), labels.long()


def run(
    out: str | Path, *, seed: int = 0, force: bool = False, progress: bool | None = None
) -> tuple[list[DemoRow], dict[str, Any]]:
    """Unlearns {1, 2, 3, 4} in the LeNet5 that ships, and writes the result into a folder.

    Args:
        out: the folder, created if necessary; receives the model, the record and the report.
        seed, progress: of the run and the audit.
        force: replace files of an earlier demo.

    Returns:
        The table (original, mask, unlearned), and a dict with the run's record, the audit's
        verdict and the paths written; if there is no report, its path says why.

    Raises:
        OutputError: a file exists (without ``force``) or can't be written; checked first.
    """
    folder = Path(out)
    folder.mkdir(parents=True, exist_ok=True)
    for name in FILES:
        checkpoint.check_writable(folder / name, force)
    model, data = zoo.load("lenet5"), mnist_test()
    rows = [DemoRow("original", evaluate(model, data, FORGET), None)]
    started = time.perf_counter()
    masked = mask(model, FORGET)
    seconds = time.perf_counter() - started
    rows.append(DemoRow("mask", evaluate(masked, data, FORGET), seconds))
    started = time.perf_counter()
    run = ZeroShotUnlearner(model, FORGET, seed=seed, progress=progress)
    unlearned = run.run()
    seconds = time.perf_counter() - started
    rows.append(DemoRow("unlearned", evaluate(unlearned, data, FORGET), seconds))

    model_path, record_path, page_path, _ = (folder / name for name in FILES)
    checkpoint.save_weights(model_path, unlearned, force=force)
    content = run.record.to_json().encode()
    checkpoint.write_atomically(record_path, lambda file: file.write(content), force)
    record, page, verdict = run.record.to_dict(), str(page_path), []
    try:
        golden = zoo.load("lenet5_golden")
        result = audit(model, unlearned, FORGET, data, golden, seed=seed, progress=progress)
        verdict = result.verdict
        title = "LeNet5 on MNIST: what was forgotten"
        write_report(page_path, result, title=title, record=record, force=force)
    except ZsuFastError as error:
        page = f"not written. {error}"
    written = {"model": str(model_path), "record": str(record_path), "report": page}
    return rows, {"record": record, "verdict": verdict, "written": written}
