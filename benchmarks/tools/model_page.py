"""Writes the rows of `model_table` as a page of the documentation."""

from __future__ import annotations

import importlib.metadata
import re
from collections import Counter
from collections.abc import Sequence

from benchmarks.tools.model_cases import CLASSES
from benchmarks.tools.model_rows import FEW, IMAGES, KEPT, MOST_BACK, Result, Row

_LIBRARIES = ("torch", "torchvision", "timm", "transformers", "onnx", "onnxscript", "onnxruntime")
_REASON = 300  # letters that are quoted
_SETTINGS = ", ".join(f"{name}={value}" for name, value in FEW.items())
_INTRODUCTION = f"""
Image classifiers of torchvision, timm and transformers: made small by the library's own arguments,
with random weights, {CLASSES} classes, and unlearned at both levels, with fewer rows and
steps than by default ({_SETTINGS}).
The table says what *works*. How much accuracy a level costs is in [Results](results.md).

<!-- not run: it takes an hour or more -->
```bash
python -m benchmarks.tools.model_table --out docs/models.md
```

What the columns say, each measured on {IMAGES} images that the run has not seen:

- *output*: the run with `depth="output"`. "ok": no image is assigned to a forgotten class, and at
  least {KEPT["output"]:.0f} % of the other answers stayed (*kept*, in per cent).
- *deep*: the default run. "ok": no image is assigned to a forgotten class, at least
  {KEPT["deep"]:.0f} % of the other answers stayed, and with the original last layer put back at
  most {MOST_BACK:.0f} % of the images of forgotten classes are recognised (*back*). "falls back to
  output": the package warned that only the outputs forget, and why; the output level's checks hold.
- *untouched, reloads*: the original has the same bits as before, and the result's weights, saved
  and loaded into a fresh model, give equal logits.
- *export*, *ONNX*: `torch.export`, and ONNX run by onnxruntime, give the same logits. "no": the
  original can't be exported either, unless the reason says otherwise.
"""


def page(rows: Sequence[Row]) -> str:
    """The page: what was done, a summary, one table per library, the reasons."""
    versions = ", ".join(f"{name} {importlib.metadata.version(name)}" for name in _LIBRARIES)
    lines = ["# Models that work", "", _INTRODUCTION.strip(), "", f"Versions: {versions}.", ""]
    lines += ["## Summary", "", *summary(rows), ""]
    for library in dict.fromkeys(row.model.partition("/")[0] for row in rows):
        chosen = [row for row in rows if row.model.startswith(f"{library}/")]
        lines += [f"## {library}", "", *table(chosen), ""]
    lines += ["## Reasons", "", *reasons(rows)]
    return "\n".join(lines) + "\n"


def summary(rows: Sequence[Row]) -> list[str]:
    """The number of models by outcome, as a table."""
    count = len(rows)
    lines = ["| what | models |", "|---|---|", f"| in the table | {count} |"]
    counts = Counter[str]()
    for row in rows:
        counts[f"output run: {words(row.output, 'output')}"] += 1
        counts[f"deep run: {words(row.deep, 'deep')}"] += 1
        for check, outcome in row.checks.items():
            kind = "ok" if outcome == "ok" else f"{outcome.partition(':')[0]} fails"
            counts[f"{_NAMES.get(check, check)}: {kind}"] += 1
    lines += [f"| {what} | {number} |" for what, number in sorted(counts.items())]
    wrong = sum(bool(row.faults) for row in rows)
    return [*lines, f"| wrong in silence, or a crash | {wrong} |"]


_NAMES = {"original": "original untouched", "reload": "saved and loaded", "export": "torch.export",
          "onnx": "ONNX", "runs": "takes images"}  # fmt: skip


def words(result: Result, asked: str) -> str:
    """The outcome of a run in a few words."""
    if result.outcome == "ok":
        return "ok"
    if result.outcome == "warned":
        return "below par, warned" if result.level == asked else f"falls back to {result.level}"
    return {"refused": "refused", "silent": "WRONG", "crash": "CRASH"}[result.outcome]


def table(rows: Sequence[Row]) -> list[str]:
    """The rows of a library as lines of a table."""
    lines = [
        "| model | family | pixels | weights | output | kept | deep | kept | back | untouched, "
        "reloads | export | ONNX | s |",
        "|---|---|---|---|---|---|---|---|---|---|---|---|---|",
    ]
    for row in rows:
        name = row.model.partition("/")[2]
        if row.error:
            cells = ["-"] * 5 + ["-"] * 3
        else:
            cells = [
                words(row.output, "output"), _share(row.output.kept),
                words(row.deep, "deep"), _share(row.deep.kept), _share(row.deep.back),
                _both(row, "original", "reload"), _short(row, "export"), _short(row, "onnx"),
            ]  # fmt: skip
        weights = f"{row.parameters / 1e6:.2f} M"
        lines.append(
            f"| `{name}` | {row.family} | {row.side} | {weights} | {' | '.join(cells)} | "
            f"{row.seconds:.0f} |"
        )
    return lines


def _share(value: float | None) -> str:
    return "-" if value is None else f"{value:.0f}"


def _short(row: Row, check: str) -> str:
    outcome = row.checks.get(check, "-")
    return outcome if outcome in ("ok", "-") else "no"


def _both(row: Row, *checks: str) -> str:
    return "-" if "reload" not in row.checks else (
        "ok" if all(row.checks.get(check) == "ok" for check in checks) else "NO"
    )  # fmt: skip


def reasons(rows: Sequence[Row]) -> list[str]:
    """Why a cell is not "ok", by reason."""
    found: dict[str, list[str]] = {}
    for row in rows:
        name = row.model.partition("/")[2]
        for text in _reasons_of(row):
            found.setdefault(text, []).append(f"`{name}`")
    return [f"- {text}: {', '.join(names)}" for text, names in sorted(found.items())]


def _reasons_of(row: Row) -> list[str]:
    texts = [row.error] if row.error else []
    for asked, result in (("output", row.output), ("deep", row.deep)):
        if result.outcome != "ok" and result.reason:
            texts.append(f"{asked} run, {words(result, asked)}. {result.reason}")
    texts += [f"{_NAMES.get(c, c)}. {text}" for c, text in row.checks.items() if text != "ok"]
    return [_plain(text) for text in texts]


def _plain(text: str) -> str:
    """One line, without Markdown's special letters, so that equal reasons are equal."""
    text = re.sub(r"\s+", " ", text).strip()
    text = re.sub(r"Forgotten in the outputs only: [^.]*\. ", "", text)  # the cell says so
    text = re.sub(r"(only|assigns) \d+%", r"\1 some %", text)
    text = re.sub(r", \d+% before", "", text)
    text = re.sub(r"last layer '[^']*'", "last layer", text)
    text = text[:_REASON] + (" ..." if len(text) > _REASON else "")
    return re.sub(r"([*_|<>\[\]`])", r"\\\1", text).rstrip(".")
