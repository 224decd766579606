"""Puts the page together: what goes where, in which words."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ...errors import ZsuFastError
from ...models import checkpoint
from ...synthesis.impressions import ClassImpressions
from ..audit.metrics import BY_KEY, METRICS
from ..audit.result import GOLDEN, MAIN, MASK, ORIGINAL, RANDOM, UNLEARNED, Audit, Row, show
from . import charts
from .pictures import gallery

# The models' CSS classes, in the order of their dashes and markers.
STYLES = {
    ORIGINAL: "original", UNLEARNED: "unlearned", GOLDEN: "golden", MASK: "mask", RANDOM: "random",
}  # fmt: skip
# More classes than this are shown as changes, sorted, not as bars of each.
_FEW = 40
# Classes and impressions of each that are pictured.
_PICTURED, _EACH = 10, 6


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
    """The page as one string of HTML.

    Args:
        audit: what it tells.
        title: the heading.
        record: `Record.to_dict()` of the run, for its curves and hashes; None leaves them out.
        names: of the classes; None for their numbers.

    Raises:
        ZsuFastError: Jinja2 is not installed.
    """
    try:
        from jinja2 import Environment, PackageLoader, StrictUndefined
    except ImportError as error:
        raise ZsuFastError(
            f"The report needs Jinja2 ({error}). Run pip install 'zsu-fast[report]'."
        ) from error
    environment = Environment(
        loader=PackageLoader("zsu_fast.evaluation.report", "."),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )

    def name(c: int) -> str:
        return str(names[c]) if names is not None and c < len(names) else str(c)

    present = [r.name for r in audit.rows]
    context = {
        "title": title,
        "audit": audit,
        "name": name,
        "show": show,
        "styles": STYLES,
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
        "curves": _curves(record),
        "record": record,
        "record_json": json.dumps(record, indent=2) if record else "",
        "settings_json": json.dumps(
            {"settings": audit.settings, "counts": audit.counts, "seconds": audit.timings},
            indent=2,
        ),
    }  # fmt: skip
    return environment.get_template("page.html.j2").render(context)


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
        OutputError: a file exists or can't be written; checked before anything is written.
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


def _rows(audit: Audit, *wanted: str) -> list[Row]:
    have = {r.name: r for r in audit.rows}
    return [have[n] for n in wanted if n in have]


def _bars(audit: Audit, name: Any) -> list[Bar]:
    """Each class's accuracy before, after, and in the golden model (the paper's Figures 1, 2)."""
    rows = [r for r in _rows(audit, ORIGINAL, UNLEARNED, GOLDEN) if r.evaluation]
    if not rows or audit.classes > _FEW:
        return []
    classes = sorted(rows[0].evaluation.per_class)  # type: ignore[union-attr]
    return [
        Bar(name(c), c in audit.forget,
            [(r.name, STYLES[r.name], r.evaluation.per_class[c]) for r in rows if r.evaluation])
        for c in classes
    ]  # fmt: skip


def _changes(audit: Audit, name: Any) -> list[dict[str, Any]]:
    """Change per class, forgotten and other classes apart, sorted (the paper's Figures 3, 4)."""
    before, after = audit.row(ORIGINAL).evaluation, audit.row(UNLEARNED).evaluation
    if before is None or after is None or audit.classes <= _FEW:
        return []
    panels = []
    for words, wanted in (("forgotten classes", True), ("other classes", False)):
        delta = {
            c: after.per_class[c] - before.per_class[c]
            for c in before.per_class
            if (c in audit.forget) == wanted
        }
        if not delta:
            continue
        order = sorted(delta, key=lambda c: (delta[c], c))
        values = [delta[c] for c in order]
        chart, (low, high) = charts.changes(
            values,
            f"Change in accuracy of {len(values)} {words}, sorted",
            "lost" if wanted else "kept",
        )
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


def _confusion(audit: Audit, name: Any) -> list[dict[str, Any]]:
    """Forgotten class -> what each model answers instead."""
    rows = _rows(audit, ORIGINAL, UNLEARNED, MASK, GOLDEN)
    return [
        {
            "name": name(c),
            "answers": [
                (r.name, [(name(a), a in audit.forget, p) for a, p in r.confusion[c].items()])
                for r in rows
                if c in r.confusion
            ],
        }
        for c in audit.forget[:20]
        if any(c in r.confusion for r in rows)
    ]


def _layers(audit: Audit) -> dict[str, Any]:
    """Probe accuracy by layer as a chart, and the drift of each layer."""
    rows = _rows(audit, ORIGINAL, UNLEARNED, GOLDEN)
    names = [layer.layer for layer in audit.row(ORIGINAL).layers]
    series = []
    for row in rows:
        points = [
            (float(names.index(layer.layer)), layer.probe_forget)
            for layer in row.layers
            if layer.probe_forget is not None and layer.layer in names
        ]
        series.append(
            charts.Series(row.name, STYLES[row.name], points, list(STYLES).index(row.name))
        )
    return {
        "chart": charts.lines(
            series,
            "Linear probe's accuracy on forgotten classes, by layer",
            "input of layer",
            "accuracy, %",
            (0, 100),
            x_names=names,
        ),
        "drift": audit.row(UNLEARNED).layers,
    }


def _relearning(audit: Audit) -> list[tuple[str, Any]]:
    """FA over relearning steps, last layer and all weights."""
    made = []
    for kind, words in (("head", "last layer"), ("full", "all weights")):
        series = [
            charts.Series(row.name, STYLES[row.name], row.relearning.get(kind, []),
                          list(STYLES).index(row.name))
            for row in audit.rows
        ]  # fmt: skip
        chart = charts.lines(series, f"FA while relearning, {words}", "steps", "FA, %", (0, 100))
        if chart:
            made.append((words, chart))
    return made


def _galleries(audit: Audit) -> list[tuple[str, Any]]:
    """Impressions of the original, and what ascent makes of the forgotten classes afterwards."""
    shown: list[tuple[str, ClassImpressions]] = []
    if audit.impressions is not None:
        shown.append(("held-out impressions of the original", audit.impressions))
    for name in (UNLEARNED, GOLDEN):
        if name in audit.pictures:
            shown.append((f"the same ascent on the {name} model", audit.pictures[name]))
    made = []
    for words, impressions in shown:
        pictures = gallery(impressions, audit.forget[:_PICTURED], _EACH)
        if pictures:
            made.append((words, pictures))
    return made


def _curves(record: dict[str, Any] | None) -> list[tuple[str, Any]]:
    """Loss and stop curves of the run."""
    if not record or not record.get("fit", {}).get("history"):
        return []
    history, best = record["fit"]["history"], record["fit"].get("best")
    mark = (float(best["step"]), "kept") if best else None

    def points(key: str, scale: float = 1.0) -> list[tuple[float, float]]:
        return [(float(c["step"]), scale * c[key]) for c in history if c.get(key) is not None]

    return [
        ("training loss and distance from the mask", charts.lines(
            [charts.Series("loss of the last batch", "original", points("loss"), 0),
             charts.Series("divergence, held out", "unlearned", points("divergence"), 1)],
            "Loss of the last batch, and divergence from the mask on held-out rows, by step",
            "optimiser steps", "nats", log_y=True, mark=mark)),
        ("what decides when to stop", charts.lines(
            [charts.Series("answered with a forgotten class", "original", points("leak", 100), 0),
             charts.Series("agrees with the mask", "unlearned", points("agreement", 100), 1)],
            "Leak and agreement on held-out rows, by step",
            "optimiser steps", "% of held-out rows", (0, 100), mark=mark)),
    ]  # fmt: skip
