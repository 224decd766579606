"""Charts as inline SVG: sized by their box, coloured by the page's style, told apart by shape too.

Colours are classes (``original``, ``unlearned``, ...) so that light and dark pages differ in style
alone; each series also has its own dash and marker.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

from markupsafe import Markup, escape

_WIDTH, _HEIGHT = 440, 250
_LEFT, _RIGHT, _TOP, _BOTTOM = 48, 14, 12, 40
_DASHES = ("", "7 4", "2 3", "10 3 2 3", "4 2")


@dataclass(frozen=True)
class Series:
    """A line: its name, CSS class, points, and the place of its dash and marker."""

    name: str
    style: str
    points: Sequence[tuple[float, float]]
    number: int = 0


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
    """A line chart with markers.

    Args:
        series: what to draw; empty ones are left out.
        title: for screen readers.
        x_label, y_label: axes, with units.
        y_range: of the axis; None for that of the points.
        log_y: logarithmic, where all values are positive.
        mark: (x, words) of a vertical line.
        x_names: names of x = 0, 1, 2, ... instead of numbers.
    """
    shown = [s for s in series if s.points]
    if not shown:
        return Markup("")
    xs = [x for s in shown for x, _ in s.points] + ([mark[0]] if mark else [])
    ys = [y for s in shown for _, y in s.points if math.isfinite(y)]
    log_y = log_y and min(ys, default=0) > 0
    low, high = y_range or (min(ys), max(ys))
    if log_y:
        low, high = math.log10(low), math.log10(high)
    if high - low < 1e-9:
        low, high = low - 0.5, high + 0.5
    left, right = min(xs), max(max(xs), min(xs) + 1)

    def at_x(x: float) -> float:
        return _LEFT + (x - left) / (right - left) * (_WIDTH - _LEFT - _RIGHT)

    def at_y(y: float) -> float:
        y = math.log10(y) if log_y else y
        y = min(max(y, low), high)
        return _HEIGHT - _BOTTOM - (y - low) / (high - low) * (_HEIGHT - _TOP - _BOTTOM)

    parts = [_open(title)]
    for tick in _ticks(low, high, 4):
        y = at_y(10**tick if log_y else tick)
        label = f"{10**tick:.2g}" if log_y else f"{tick:.4g}"
        parts.append(f'<line class="grid" x1="{_LEFT}" x2="{_WIDTH - _RIGHT}" y1="{y:.1f}" '
                     f'y2="{y:.1f}"/><text x="{_LEFT - 6}" y="{y + 4:.1f}" '
                     f'text-anchor="end">{label}</text>')  # fmt: skip
    bottom = _HEIGHT - _BOTTOM
    if x_names:
        for i, name in enumerate(x_names):
            anchor = "middle" if 0 < i < len(x_names) - 1 else ("start" if i == 0 else "end")
            shown_name = name if len(name) <= 12 else "…" + name[-11:]
            parts.append(f'<text x="{at_x(i):.1f}" y="{bottom + 16}" text-anchor="{anchor}">'
                         f"{escape(shown_name)}</text>")  # fmt: skip
    else:
        for tick in _ticks(left, right, 5):
            parts.append(f'<text x="{at_x(tick):.1f}" y="{bottom + 16}" text-anchor="middle">'
                         f"{tick:.4g}</text>")  # fmt: skip
    middle = (_LEFT + _WIDTH - _RIGHT) / 2
    parts.append(f'<line class="axis" x1="{_LEFT}" x2="{_WIDTH - _RIGHT}" y1="{bottom}" '
                 f'y2="{bottom}"/><text x="{middle}" y="{_HEIGHT - 6}" text-anchor="middle">'
                 f'{escape(x_label)}</text><text transform="translate(13,{(_TOP + bottom) / 2}) '
                 f'rotate(-90)" text-anchor="middle">{escape(y_label)}</text>')  # fmt: skip
    if mark:
        x = at_x(mark[0])
        anchor = "end" if x > middle else "start"
        shift = -5 if anchor == "end" else 5
        parts.append(f'<line class="mark" x1="{x:.1f}" x2="{x:.1f}" y1="{_TOP}" y2="{bottom}"/>'
                     f'<text x="{x + shift:.1f}" y="{_TOP + 12}" text-anchor="{anchor}">'
                     f"{escape(mark[1])}</text>")  # fmt: skip
    for s in shown:
        points = [(at_x(x), at_y(y)) for x, y in s.points if math.isfinite(y)]
        path = " ".join(f"{x:.1f},{y:.1f}" for x, y in points)
        dash = _DASHES[s.number % len(_DASHES)]
        parts.append(f'<polyline class="line {escape(s.style)}" points="{path}"'
                     + (f' stroke-dasharray="{dash}"' if dash else "") + "/>")  # fmt: skip
        every = max(1, len(points) // 12)
        for i, (x, y) in enumerate(points):
            if i % every == 0 or i == len(points) - 1:
                parts.append(_marker(s.number, x, y, s.style))
    parts.append("</svg>")
    return Markup("".join(parts))


def key(number: int, style: str) -> Markup:
    """The line's sample for a legend."""
    dash = _DASHES[number % len(_DASHES)]
    return Markup(
        f'<svg class="key" viewBox="0 0 34 12" width="34" height="12" aria-hidden="true">'
        f'<line class="line {escape(style)}" x1="1" x2="33" y1="6" y2="6"'
        + (f' stroke-dasharray="{dash}"' if dash else "")
        + f"/>{_marker(number, 17, 6, style)}</svg>"
    )


def changes(values: Sequence[float], title: str, style: str) -> tuple[Markup, list[float]]:
    """Bars of change in accuracy, one a class, in the order given: readable for a thousand.

    Args:
        values: points of a per cent, -100 to 100.
        title: for screen readers.
        style: CSS class of the bars.

    Returns:
        The chart, and the lowest and highest value of its vertical axis (0 is between them).
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
    """0, or the next of 1, 2, 5, 10, 20, 50, 100."""
    return next((s for s in (0.0, 1.0, 2.0, 5.0, 10.0, 20.0, 50.0) if value <= s + 1e-9), 100.0)


def _open(title: str) -> str:
    return (
        f'<svg class="chart" viewBox="0 0 {_WIDTH} {_HEIGHT}" role="img">'
        f"<title>{escape(title)}</title>"
    )


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
    """About ``count`` round numbers between both."""
    raw = (high - low) / count
    power = 10 ** math.floor(math.log10(raw))
    step = next(m * power for m in (1, 2, 2.5, 5, 10) if m * power >= raw - 1e-12)
    first = math.ceil(low / step - 1e-9)
    return [i * step for i in range(first, math.floor(high / step + 1e-9) + 1)]
