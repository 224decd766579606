"""Puts the page together: which part of the audit goes where, in which words."""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from markupsafe import Markup

from ...models import checkpoint
from ...synthesis.impressions import ClassImpressions
from ..audit import Audit, Row
from ..audit.result import GOLDEN, MASK, ORIGINAL, RANDOM, TRAINED_WORDS, UNLEARNED, show
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

# What the distributions of an encoder's similarities are of, in words.
_PAIRS = {
    "forgotten, own": "images of forgotten identities with their own templates",
    "forgotten, other": "images of forgotten identities with the nearest retained identity",
    "retained, own": "images of retained identities with their own templates",
}

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
    from jinja2 import Environment, PackageLoader, StrictUndefined  # only a report needs it

    environment = Environment(
        loader=PackageLoader("zsu_fast.evaluation.report", "."), autoescape=True,
        undefined=StrictUndefined, trim_blocks=True, lstrip_blocks=True,
    )  # fmt: skip

    def name(c: int) -> str:
        return str(names[c]) if names is not None and c < len(names) else str(c)

    return environment.get_template("page.html.j2").render(
        title=title, **_models(audit, name), curves=_curves(record), record=record,
        record_json=json.dumps(record, indent=2) if record else "",
    )  # fmt: skip


def _models(audit: Audit, name: ClassName) -> dict[str, Any]:
    """The template's variables for the audit."""
    details = {"settings": audit.settings, "counts": audit.counts, "seconds": audit.timings}
    return {
        "audit": audit,
        "name": name,
        "show": show,
        "main": [audit.definitions[k] for k in audit.main],
        "encoder": bool(audit.settings.get("encoder")),
        "distributions": _distributions(audit),
        "stranger_key": charts.key(3, STYLES[MASK]),
        "metrics": list(audit.definitions.values()),
        "ordered": _rows(audit, *STYLES),
        "legend": [(n, charts.key(i, s)) for i, (n, s) in enumerate(STYLES.items())
                   if _rows(audit, n)],
        "bars": _bars(audit, name),
        "changes": _changes(audit, name),
        "no_classes": audit.row(UNLEARNED).missing.get("fa", ""),
        "confusion": _confusion(audit, name),
        "layers": _layers(audit),
        "relearning": _relearning(audit),
        "galleries": _galleries(audit),
        "settings_json": json.dumps(details, indent=2),
    }  # fmt: skip


def write_report(
    path: str | Path,
    audit: Audit,
    *,
    title: str = "What was forgotten",
    record: dict[str, Any] | None = None,
    names: Sequence[str] | None = None,
    force: bool = False,
) -> list[Path]:
    """Writes the page, and the audit as JSON beside it (same name, ``.json``); returns both paths.

    Args:
        path: the HTML file.
        audit, title, record, names: see `render`.
        force: replace existing files.

    Raises:
        OutputError: a file exists or can't be written; checked before writing either.
    """
    page, data = Path(path), Path(path).with_suffix(".json")
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
    forgotten = [c for c in before.per_class if c in audit.forget]
    others = [c for c in before.per_class if c not in audit.forget]
    for words, style, classes in (
        ("forgotten classes", "lost", forgotten), ("other classes", "retained", others),
    ):  # fmt: skip
        delta = {c: after.per_class[c] - before.per_class[c] for c in classes}
        if not delta:
            continue
        order = sorted(delta, key=lambda c: (delta[c], c))
        values = [delta[c] for c in order]
        title = f"Change in accuracy of {len(values)} {words}, sorted"
        chart, (low, high) = charts.changes(values, title, style)
        levels = [(100 * (high - v) / (high - low), f"{v:+.0f}" if v else "0")
                  for v in dict.fromkeys((high, 0.0, low))]  # fmt: skip
        panels.append({
            "words": words, "chart": chart, "levels": levels,
            "count": len(values), "mean": sum(values) / len(values),
            "down": sum(v < 0 for v in values), "up": sum(v > 0 for v in values),
            "extremes": [(name(c), before.per_class[c], after.per_class[c], delta[c])
                         for c in (order if len(order) <= 8 else order[:5] + order[-3:])],
        })  # fmt: skip
    return panels


def _confusion(audit: Audit, name: ClassName) -> list[dict[str, Any]]:
    """Forgotten class -> each model's most frequent predictions."""
    tables = []
    for c in audit.forget[:_MAX_CONFUSED]:
        predictions = [
            (r.name, [(name(p), p in audit.forget, share) for p, share in r.confusion[c].items()])
            for r in _rows(audit, ORIGINAL, UNLEARNED, MASK, GOLDEN)
            if c in r.confusion
        ]
        if predictions:
            tables.append({"name": name(c), "predictions": predictions})
    return tables


def _series(row: Row, points: charts.Points) -> charts.Series:
    return charts.Series(row.name, STYLES[row.name], points, list(STYLES).index(row.name))


def _layers(audit: Audit) -> dict[str, Any]:
    """A chart of probe accuracy by layer, and the drift of each layer."""
    names = [entry.layer for entry in audit.row(ORIGINAL).layers]
    series = [
        _series(row, [(names.index(entry.layer), entry.probe_forget) for entry in row.layers
                      if entry.probe_forget is not None and entry.layer in names])
        for row in _rows(audit, ORIGINAL, UNLEARNED, GOLDEN)
    ]  # fmt: skip
    title = "Accuracy of a linear probe on forgotten classes, by layer"
    chart = charts.lines(series, title, "input of layer", "accuracy, %", (0, 100), x_names=names)
    return {"chart": chart, "drift": audit.row(UNLEARNED).layers}


def _relearning(audit: Audit) -> list[tuple[str, Markup]]:
    """FA over relearning steps, last layer and all weights."""
    figures = []
    for trained, words in TRAINED_WORDS.items():
        series = [_series(row, row.relearning.get(trained, [])) for row in audit.rows]
        title = f"FA while relearning, {words}"
        figures.append((words, charts.lines(series, title, "steps", "FA, %", (0, 100))))
    return [(words, chart) for words, chart in figures if chart]


def _distributions(audit: Audit) -> list[tuple[str, list[tuple[str, Markup]]]]:
    """Similarities of an encoder's images: (gallery, [(kind of pair in words, chart)])."""
    sections = []
    for templates, key in (("original's templates", "threshold_1e2"), ("re-enrolled", "")):
        rows = [r for r in audit.rows if templates in r.distributions]
        mark = audit.row(UNLEARNED).get(key) if rows else None
        figures = []
        for kind, words in _PAIRS.items():
            series = [_series(r, r.distributions[templates].get(kind, [])) for r in rows]
            if not any(s.points for s in series):
                continue
            strangers = audit.row(ORIGINAL).distributions[templates].get("retained, other", [])
            series.append(charts.Series("strangers", STYLES[MASK], strangers, 3))
            chart = charts.lines(
                series, f"Similarity of {words}; {templates}", "similarity", "% of the pairs",
                mark=None if mark is None else (mark, "FAR 1 %"),
            )  # fmt: skip
            figures.append((words, chart))
        if figures:
            sections.append((templates, figures))
    return sections


def _galleries(audit: Audit) -> list[tuple[str, Any]]:
    """Impressions of the original, and those of the forgotten classes from other models."""
    sources: list[tuple[str, ClassImpressions]] = []
    if audit.impressions is not None:
        sources.append(("held-out impressions of the original", audit.impressions))
    for name in (UNLEARNED, GOLDEN):
        if name in audit.pictures:
            sources.append((f"the same ascent on the {name} model", audit.pictures[name]))
    classes = audit.forget[:_PICTURED]
    galleries = ((words, gallery(found, classes, _PER_CLASS)) for words, found in sources)
    return [(words, pictures) for words, pictures in galleries if pictures]


def _curves(record: dict[str, Any] | None) -> list[tuple[str, Markup]]:
    """The run's loss and its stopping criteria by step."""
    if not record or not record.get("fit", {}).get("history"):
        return []
    history, best = record["fit"]["history"], record["fit"].get("best")
    mark = (best["step"], "best") if best else None

    def points(key: str, scale: float = 1.0) -> charts.Points:
        return [(c["step"], scale * c[key]) for c in history if c.get(key) is not None]

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
