"""Charts as inline SVG: sized by their container, coloured by the page's style sheet.

Colours are CSS classes (``original``, ``unlearned``, ...), so that light and dark pages differ in
style alone. Each series also has its own dash and marker, to be distinguished without colours.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

from markupsafe import Markup, escape

_WIDTH, _HEIGHT = 440, 250
_LEFT, _RIGHT, _TOP, _BOTTOM = 48, 14, 12, 40
_DASHES = ("", "7 4", "2 3", "10 3 2 3", "4 2")

Points = Sequence[tuple[float, float]]


@dataclass(frozen=True)
class Series:
    """A line: its name, CSS class, points, and the number of its dash and marker."""

    name: str
    style: str
    points: Points
    number: int = 0


@dataclass(frozen=True)
class _Axes:
    """The ranges of a chart; the vertical one holds powers of ten if it is logarithmic."""

    left: float
    right: float
    low: float
    high: float
    log_y: bool

    def x(self, value: float) -> float:
        return _LEFT + (value - self.left) / (self.right - self.left) * (_WIDTH - _LEFT - _RIGHT)

    def y(self, value: float) -> float:
        """Clamps the value to the axis."""
        value = math.log10(value) if self.log_y else value
        share = (min(max(value, self.low), self.high) - self.low) / (self.high - self.low)
        return _HEIGHT - _BOTTOM - share * (_HEIGHT - _TOP - _BOTTOM)


def lines(
    series: Sequence[Series],
    title: str,
    x_label: str,
    y_label: str,
    y_range: tuple[float, float] | None = None,
    log_y: bool = False,
    mark: tuple[float, str] | None = None,
    x_names: Sequence[str] | None = None,
) -> Markup:
    """Draws a line chart with markers; returns "" if no series has points.

    Args:
        series: the lines; empty ones are left out.
        title: for screen readers.
        x_label, y_label: of the axes, with units.
        y_range: of the vertical axis; None for the range of the points.
        log_y: use a logarithmic vertical axis if all values are positive.
        mark: (x, label) of a vertical line.
        x_names: names of x = 0, 1, 2, ... in place of numbers.
    """
    shown = [s for s in series if s.points]
    if not shown:
        return Markup("")
    axes = _fit_axes(shown, y_range, log_y, mark)
    parts = [
        f'<svg class="chart" viewBox="0 0 {_WIDTH} {_HEIGHT}" role="img">'
        f"<title>{escape(title)}</title>",
        *_y_axis(axes, y_label),
        *_x_axis(axes, x_label, x_names),
        _vertical_mark(axes.x(mark[0]), mark[1]) if mark else "",
        *(_line(axes, s) for s in shown),
        "</svg>",
    ]
    return Markup("".join(parts))


def _fit_axes(
    series: Sequence[Series],
    y_range: tuple[float, float] | None,
    log_y: bool,
    mark: tuple[float, str] | None,
) -> _Axes:
    xs = [x for s in series for x, _ in s.points] + ([mark[0]] if mark else [])
    ys = [y for s in series for _, y in s.points if math.isfinite(y)]
    log_y = log_y and min(ys, default=0) > 0
    low, high = y_range or (min(ys), max(ys))
    if log_y:
        low, high = math.log10(low), math.log10(high)
    if high - low < 1e-9:
        low, high = low - 0.5, high + 0.5
    return _Axes(min(xs), max(max(xs), min(xs) + 1), low, high, log_y)


def _y_axis(axes: _Axes, label: str) -> list[str]:
    """Grid lines with their values, and the label."""
    parts = []
    for tick in _ticks(axes.low, axes.high, 4):
        y = axes.y(10**tick if axes.log_y else tick)
        text = f"{10**tick:.2g}" if axes.log_y else f"{tick:.4g}"
        parts.append(f'<line class="grid" x1="{_LEFT}" x2="{_WIDTH - _RIGHT}" y1="{y:.1f}" '
                     f'y2="{y:.1f}"/><text x="{_LEFT - 6}" y="{y + 4:.1f}" '
                     f'text-anchor="end">{text}</text>')  # fmt: skip
    parts.append(f'<text transform="translate(13,{(_TOP + _HEIGHT - _BOTTOM) / 2}) '
                 f'rotate(-90)" text-anchor="middle">{escape(label)}</text>')  # fmt: skip
    return parts


def _x_axis(axes: _Axes, label: str, names: Sequence[str] | None) -> list[str]:
    """The axis line, its values or names, and the label."""
    bottom = _HEIGHT - _BOTTOM
    ticks = [(tick, f"{tick:.4g}", "middle") for tick in _ticks(axes.left, axes.right, 5)]
    if names:
        anchors = ["start", *["middle"] * (len(names) - 2), "end"]
        short = [name if len(name) <= 12 else "…" + name[-11:] for name in names]
        ticks = list(zip(range(len(names)), short, anchors, strict=False))
    parts = [
        f'<text x="{axes.x(x):.1f}" y="{bottom + 16}" text-anchor="{anchor}">{escape(text)}</text>'
        for x, text, anchor in ticks
    ]
    middle = (_LEFT + _WIDTH - _RIGHT) / 2
    parts.append(f'<line class="axis" x1="{_LEFT}" x2="{_WIDTH - _RIGHT}" y1="{bottom}" '
                 f'y2="{bottom}"/><text x="{middle}" y="{_HEIGHT - 6}" text-anchor="middle">'
                 f"{escape(label)}</text>")  # fmt: skip
    return parts


def _vertical_mark(x: float, label: str) -> str:
    """A dashed vertical line with a label on its wider side."""
    is_right = x > (_LEFT + _WIDTH - _RIGHT) / 2
    anchor, shift = ("end", -5) if is_right else ("start", 5)
    return (
        f'<line class="mark" x1="{x:.1f}" x2="{x:.1f}" y1="{_TOP}" y2="{_HEIGHT - _BOTTOM}"/>'
        f'<text x="{x + shift:.1f}" y="{_TOP + 12}" text-anchor="{anchor}">{escape(label)}</text>'
    )


def _line(axes: _Axes, series: Series) -> str:
    """The line, and about twelve markers on it."""
    points = [(axes.x(x), axes.y(y)) for x, y in series.points if math.isfinite(y)]
    path = " ".join(f"{x:.1f},{y:.1f}" for x, y in points)
    every = max(1, len(points) // 12)
    marked = [p for i, p in enumerate(points) if i % every == 0 or i == len(points) - 1]
    return (
        f'<polyline class="line {escape(series.style)}" points="{path}"{_dash(series.number)}/>'
        + "".join(_marker(series.number, x, y, series.style) for x, y in marked)
    )


def key(number: int, style: str) -> Markup:
    """Draws a sample of the line for a legend."""
    return Markup(
        f'<svg class="key" viewBox="0 0 34 12" width="34" height="12" aria-hidden="true">'
        f'<line class="line {escape(style)}" x1="1" x2="33" y1="6" y2="6"{_dash(number)}/>'
        f"{_marker(number, 17, 6, style)}</svg>"
    )


def _dash(number: int) -> str:
    dash = _DASHES[number % len(_DASHES)]
    return f' stroke-dasharray="{dash}"' if dash else ""


def changes(values: Sequence[float], title: str, style: str) -> tuple[Markup, list[float]]:
    """Draws the change in accuracy as one bar per class, readable for a thousand classes.

    Args:
        values: percentage points, -100 to 100, in the order of the bars.
        title, style: for screen readers, and the CSS class of the bars.

    Returns:
        The chart, and the lowest and highest value of its vertical axis; 0 lies between them.
    """
    width, height = 1000, 200
    low, high = -_round_up(-min([0.0, *values])), _round_up(max([0.0, *values]))
    if low == high:
        high = 1.0
    scale = height / (high - low)
    step = width / max(1, len(values))
    zero = high * scale
    parts = [
        f'<svg class="changes" viewBox="0 0 {width} {height}" preserveAspectRatio="none" '
        f'role="img"><title>{escape(title)}</title>'
    ]
    for i, value in enumerate(values):
        top = zero - max(value, 0) * scale
        parts.append(f'<rect class="bar {style}" x="{i * step:.2f}" width="{step * 0.86:.2f}" '
                     f'y="{top:.1f}" height="{max(abs(value) * scale, 0.8):.1f}"/>')  # fmt: skip
    parts.append(f'<line class="axis" x1="0" x2="{width}" y1="{zero:.1f}" y2="{zero:.1f}"/></svg>')
    return Markup("".join(parts)), [low, high]


def _round_up(value: float) -> float:
    """Returns 0, or the next of 1, 2, 5, 10, 20, 50, 100."""
    return next((s for s in (0.0, 1.0, 2.0, 5.0, 10.0, 20.0, 50.0) if value <= s + 1e-9), 100.0)


def _marker(number: int, x: float, y: float, style: str) -> str:
    kind, css = number % 5, f'class="dot {escape(style)}"'
    if kind == 0:
        return f'<circle {css} cx="{x:.1f}" cy="{y:.1f}" r="3.2"/>'
    if kind == 1:
        return f'<rect {css} x="{x - 3:.1f}" y="{y - 3:.1f}" width="6" height="6"/>'
    shapes = {
        2: ((0, -4), (4, 3), (-4, 3)),
        3: ((0, -4.5), (4.5, 0), (0, 4.5), (-4.5, 0)),
        4: ((0, 4), (4, -3), (-4, -3)),
    }
    path = " ".join(f"{x + a:.1f},{y + b:.1f}" for a, b in shapes[kind])
    return f'<polygon {css} points="{path}"/>'


def _ticks(low: float, high: float, count: int) -> list[float]:
    """Returns about ``count`` round numbers between ``low`` and ``high``."""
    raw = (high - low) / count
    power = 10 ** math.floor(math.log10(raw))
    step = next(m * power for m in (1, 2, 2.5, 5, 10) if m * power >= raw - 1e-12)
    first = math.ceil(low / step - 1e-9)
    return [i * step for i in range(first, math.floor(high / step + 1e-9) + 1)]
