"""Which models work: many image classifiers, each unlearned, saved, loaded and exported.

    python -m benchmarks.tools.model_table --out docs/models.md
    python -m benchmarks.tools.model_table --only levit          # prints the rows
    python -m benchmarks.tools.model_table --list

Models are the small ones of `model_cases`, with random weights; nothing is downloaded. This tests
what works, not how well: deep forgetting has fewer rows and steps than by default.

A random network gives all images about the same answer, and then nothing can be checked. So the
statistics of its BatchNorm layers are taken from dead-leaves images, and its last layer is
whitened on them (`spread`): each class is then the answer for some images.

Every claim of a row is measured here and not by the package's own figures: on images that the run
has not seen, no answer may be a forgotten class, and the others must be those of the original.
Each model runs in a process of its own, with a time limit; whatever it raises becomes its row.
"""

from __future__ import annotations

import argparse
import importlib
import json
import logging
import multiprocessing
import sys
from dataclasses import asdict
from multiprocessing.connection import Connection
from pathlib import Path

from benchmarks.tools.model_cases import Case, cases
from benchmarks.tools.model_page import page, table
from benchmarks.tools.model_rows import Row
from benchmarks.tools.model_runs import measure

TIME_LIMIT = 600  # seconds per model


def _send(case: Case, pipe: Connection) -> None:
    logging.disable(logging.WARNING)
    try:
        row = measure(case)
    except Exception as error:  # noqa: BLE001  a row of the table
        row = Row(str(case), case.family, case.side, error=f"{type(error).__name__}: {error}")
    pipe.send(row)


def measure_apart(case: Case, limit: float) -> Row:
    """`measure` in a process of its own, for at most ``limit`` seconds."""
    context = multiprocessing.get_context("fork")
    ours, theirs = context.Pipe(duplex=False)
    process = context.Process(target=_send, args=(case, theirs))
    process.start()
    theirs.close()
    try:
        if ours.poll(limit):
            return ours.recv()
        error = f"not finished after {limit:.0f} s"
    except EOFError:
        process.join()
        error = f"the process ended with code {process.exitcode}"
    finally:
        process.kill()
        process.join()
    return Row(str(case), case.family, case.side, error=error)


def main() -> None:
    """Measures the models that the arguments name, and prints or writes their rows."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--only", help="models whose name contains this")
    parser.add_argument("--out", type=Path, help="the page to write; else rows are printed only")
    parser.add_argument("--rows", type=Path, help="JSON lines: finished rows are taken from here")
    parser.add_argument("--limit", type=float, default=TIME_LIMIT, help="seconds per model")
    parser.add_argument("--list", action="store_true", help="print the models and end")
    arguments = parser.parse_args()
    chosen = [case for case in cases() if (arguments.only or "").lower() in str(case).lower()]
    if arguments.list:
        print(*chosen, sep="\n")
        return
    done = _finished(arguments.rows)
    for library in ("timm", "torchvision", "transformers", "onnxruntime", "onnxscript"):
        importlib.import_module(library)  # once, ahead of the forks
    rows = []
    for case in chosen:
        row = done.get(str(case)) or measure_apart(case, arguments.limit)
        if arguments.rows and str(case) not in done:
            with arguments.rows.open("a") as file:
                file.write(json.dumps(asdict(row)) + "\n")
        print(*table([row])[2:], *[f"    {text}" for text in row.faults], sep="\n", flush=True)
        rows.append(row)
    if arguments.out:
        arguments.out.write_text(page(rows))
    sys.exit(any(row.faults for row in rows))


def _finished(path: Path | None) -> dict[str, Row]:
    lines = path.read_text().splitlines() if path and path.exists() else []
    return {row.model: row for row in (Row.of_dict(json.loads(line)) for line in lines)}


if __name__ == "__main__":
    main()
