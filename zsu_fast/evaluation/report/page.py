"""Puts the page together: which part of the audit goes where, in which words."""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from jinja2 import Environment, PackageLoader, StrictUndefined
from markupsafe import Markup

from ...models import checkpoint
from ...synthesis.impressions import ClassImpressions
from ..audit import Audit, Row
from ..audit.metrics import BY_KEY, METRICS
from ..audit.result import GOLDEN, MAIN, MASK, ORIGINAL, RANDOM, TRAINED_WORDS, UNLEARNED, show
from . import charts
from .pictures import gallery

# The models' CSS classes, in the order of their dashes and markers.
STYLES = {
    ORIGINAL: "original", UNLEARNED: "unlearned", GOLDEN: "golden", MASK: "mask", RANDOM: "random",
}  # fmt: skip
# With more classes than this, the page shows sorted changes in place of bars per class.
_MAX_BARS = 40
# Forgotten classes in the table of predictions.
_MAX_CONFUSED = 20
# Forgotten classes with pictures, and impressions per class.
_PICTURED, _PER_CLASS = 10, 6

ClassName = Callable[[int], str]


@dataclass(frozen=True)
class Bar:
    """A class's accuracy in several models."""

    label: str
    forgotten: bool
    values: list[tuple[str, str, float]]  # (model, style, per cent)


def render(
    audit: Audit,
    *,
    title: str = "What was forgotten",
    record: dict[str, Any] | None = None,
    names: Sequence[str] | None = None,
) -> str:
    """Returns the page as one string of HTML.

    Args:
        audit: its content.
        title: the heading.
        record: `Record.to_dict()` of the run, for its curves and hashes; None leaves them out.
        names: of the classes; None for their numbers.
    """
    environment = Environment(
        loader=PackageLoader("zsu_fast.evaluation.report", "."),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )

    def name(c: int) -> str:
        return str(names[c]) if names is not None and c < len(names) else str(c)

    return environment.get_template("page.html.j2").render(
        title=title, **_models(audit, name), **_run(record)
    )


def _models(audit: Audit, name: ClassName) -> dict[str, Any]:
    """The template's variables for the audit."""
    present = [r.name for r in audit.rows]
    details = {"settings": audit.settings, "counts": audit.counts, "seconds": audit.timings}
    return {
        "audit": audit,
        "name": name,
        "show": show,
        "main": [BY_KEY[k] for k in MAIN if any(k in r.values for r in audit.rows)],
        "metrics": METRICS,
        "ordered": _rows(audit, *STYLES),
        "legend": [(n, charts.key(i, s)) for i, (n, s) in enumerate(STYLES.items())
                   if n in present],
        "bars": _bars(audit, name),
        "changes": _changes(audit, name),
        "no_classes": audit.row(UNLEARNED).missing.get("fa", ""),
        "confusion": _confusion(audit, name),
        "layers": _layers(audit),
        "relearning": _relearning(audit),
        "galleries": _galleries(audit),
        "settings_json": json.dumps(details, indent=2),
    }  # fmt: skip


def _run(record: dict[str, Any] | None) -> dict[str, Any]:
    """The template's variables for the run."""
    return {
        "curves": _curves(record),
        "record": record,
        "record_json": json.dumps(record, indent=2) if record else "",
    }


def write_report(
    path: str | Path,
    audit: Audit,
    *,
    title: str = "What was forgotten",
    record: dict[str, Any] | None = None,
    names: Sequence[str] | None = None,
    force: bool = False,
) -> list[Path]:
    """Writes the page, and the audit as JSON beside it (same name, ``.json``).

    Args:
        path: the HTML file.
        audit, title, record, names: see `render`.
        force: replace existing files.

    Returns:
        The two paths.

    Raises:
        OutputError: a file exists or can't be written; checked before writing either.
    """
    page = Path(path)
    data = page.with_suffix(".json")
    for target in (page, data):
        checkpoint.check_writable(target, force)
    html = render(audit, title=title, record=record, names=names).encode()
    checkpoint.write_atomically(page, lambda file: file.write(html), force)
    content = json.dumps({"audit": audit.to_dict(), "record": record}, indent=2).encode()
    checkpoint.write_atomically(data, lambda file: file.write(content), force)
    return [page, data]


def _rows(audit: Audit, *names: str) -> list[Row]:
    rows = {r.name: r for r in audit.rows}
    return [rows[n] for n in names if n in rows]


def _bars(audit: Audit, name: ClassName) -> list[Bar]:
    """Accuracy per class before, after, and in the golden model (the paper's Figures 1, 2)."""
    rows = [(r.name, r.evaluation.per_class) for r in _rows(audit, ORIGINAL, UNLEARNED, GOLDEN)
            if r.evaluation]  # fmt: skip
    if not rows or audit.classes > _MAX_BARS:
        return []
    return [
        Bar(name(c), c in audit.forget, [(n, STYLES[n], accuracy[c]) for n, accuracy in rows])
        for c in sorted(rows[0][1])
    ]


def _changes(audit: Audit, name: ClassName) -> list[dict[str, Any]]:
    """Change per class, forgotten and other classes apart, sorted (the paper's Figures 3, 4)."""
    before, after = audit.row(ORIGINAL).evaluation, audit.row(UNLEARNED).evaluation
    if before is None or after is None or audit.classes <= _MAX_BARS:
        return []
    panels = []
    for words, style, forgotten in (
        ("forgotten classes", "lost", True),
        ("other classes", "retained", False),
    ):
        delta = {
            c: after.per_class[c] - before.per_class[c]
            for c in before.per_class
            if (c in audit.forget) == forgotten
        }
        if not delta:
            continue
        order = sorted(delta, key=lambda c: (delta[c], c))
        values = [delta[c] for c in order]
        title = f"Change in accuracy of {len(values)} {words}, sorted"
        chart, (low, high) = charts.changes(values, title, style)
        levels = [(100 * (high - v) / (high - low), f"{v:+.0f}" if v else "0")
                  for v in dict.fromkeys((high, 0.0, low))]  # fmt: skip
        panels.append({
            "words": words,
            "count": len(values),
            "mean": sum(values) / len(values),
            "down": sum(v < 0 for v in values),
            "up": sum(v > 0 for v in values),
            "chart": chart,
            "levels": levels,
            "extremes": [(name(c), before.per_class[c], after.per_class[c], delta[c])
                         for c in (order if len(order) <= 8 else order[:5] + order[-3:])],
        })  # fmt: skip
    return panels


def _confusion(audit: Audit, name: ClassName) -> list[dict[str, Any]]:
    """Forgotten class -> each model's most frequent predictions."""
    rows = _rows(audit, ORIGINAL, UNLEARNED, MASK, GOLDEN)
    return [
        {
            "name": name(c),
            "predictions": [
                (
                    r.name,
                    [(name(p), p in audit.forget, share) for p, share in r.confusion[c].items()],
                )
                for r in rows
                if c in r.confusion
            ],
        }
        for c in audit.forget[:_MAX_CONFUSED]
        if any(c in r.confusion for r in rows)
    ]


def _series(row: Row, points: Sequence[tuple[float, float]]) -> charts.Series:
    return charts.Series(row.name, STYLES[row.name], points, list(STYLES).index(row.name))


def _layers(audit: Audit) -> dict[str, Any]:
    """A chart of probe accuracy by layer, and the drift of each layer."""
    names = [layer.layer for layer in audit.row(ORIGINAL).layers]
    series = []
    for row in _rows(audit, ORIGINAL, UNLEARNED, GOLDEN):
        points = [
            (float(names.index(layer.layer)), layer.probe_forget)
            for layer in row.layers
            if layer.probe_forget is not None and layer.layer in names
        ]
        series.append(_series(row, points))
    title = "Accuracy of a linear probe on forgotten classes, by layer"
    chart = charts.lines(series, title, "input of layer", "accuracy, %", (0, 100), x_names=names)
    return {"chart": chart, "drift": audit.row(UNLEARNED).layers}


def _relearning(audit: Audit) -> list[tuple[str, Markup]]:
    """FA over relearning steps, last layer and all weights."""
    figures = []
    for trained, words in TRAINED_WORDS.items():
        series = [_series(row, row.relearning.get(trained, [])) for row in audit.rows]
        chart = charts.lines(series, f"FA while relearning, {words}", "steps", "FA, %", (0, 100))
        if chart:
            figures.append((words, chart))
    return figures


def _galleries(audit: Audit) -> list[tuple[str, Any]]:
    """Impressions of the original, and those of the forgotten classes from other models."""
    sources: list[tuple[str, ClassImpressions]] = []
    if audit.impressions is not None:
        sources.append(("held-out impressions of the original", audit.impressions))
    for name in (UNLEARNED, GOLDEN):
        if name in audit.pictures:
            sources.append((f"the same ascent on the {name} model", audit.pictures[name]))
    galleries = []
    for words, impressions in sources:
        pictures = gallery(impressions, audit.forget[:_PICTURED], _PER_CLASS)
        if pictures:
            galleries.append((words, pictures))
    return galleries


def _curves(record: dict[str, Any] | None) -> list[tuple[str, Markup]]:
    """The run's loss and its stopping criteria by step."""
    if not record or not record.get("fit", {}).get("history"):
        return []
    history, best = record["fit"]["history"], record["fit"].get("best")
    mark = (float(best["step"]), "best") if best else None

    def points(key: str, scale: float = 1.0) -> list[tuple[float, float]]:
        return [(float(c["step"]), scale * c[key]) for c in history if c.get(key) is not None]

    return [
        ("training loss and divergence from the mask", charts.lines(
            [charts.Series("loss of the last batch", "original", points("loss"), 0),
             charts.Series("divergence, held out", "unlearned", points("divergence"), 1)],
            "Loss of the last batch, and divergence from the mask on held-out rows, by step",
            "optimiser steps", "nats", log_y=True, mark=mark)),
        ("stopping criteria", charts.lines(
            [charts.Series("predicted as a forgotten class", "original", points("leak", 100), 0),
             charts.Series("agrees with the mask", "unlearned", points("agreement", 100), 1)],
            "Leak and agreement on held-out rows, by step",
            "optimiser steps", "% of held-out rows", (0, 100), mark=mark)),
    ]  # fmt: skip
