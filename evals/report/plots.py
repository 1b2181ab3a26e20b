"""Plots as SVG, drawn from numbers by a few functions. Colours are the page's: everything here has a class and no style.

Each function returns one `<svg>` element; labels are escaped here. Nothing in it can run, load or link anything.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Sequence
from html import escape

from agentops.text import one_line
from evals.report.words import bounds, number
from evals.statistics import Calibration, Interval

WIDTH = 640
LABEL = 190
"""Pixels for the labels at the left of a forest plot; `WIDTH` is that of a whole plot, which shrinks with the page."""

DOTS = 60
"""Up to so many values each is a dot; more are counted in bars."""


def ticks(low: float, high: float, wanted: int = 5) -> list[float]:
    """Round numbers within the bounds, about as many as wanted."""
    if not high > low:
        return [low]
    rough = (high - low) / wanted
    power = 10.0 ** math.floor(math.log10(rough))
    step = next(factor * power for factor in (1, 2, 2.5, 5, 10) if factor * power >= rough * (1 - 1e-9))
    first, last = math.ceil(low / step - 1e-9), math.floor(high / step + 1e-9)
    return [place * step for place in range(first, last + 1)]


def forest(rows: Sequence[tuple[str, Interval]], low: float, high: float, *, zero: bool = False, name: str = "") -> str:
    """A line for each interval with its value as a dot, all on one scale; `zero` marks where there is no difference."""
    place = _scale(low, high, LABEL, WIDTH - 20)
    height = 26 * len(rows) + 34
    parts = list(_axis(place, ticks(low, high), 8, height - 26))
    if zero and low <= 0 <= high:
        parts.append(_line(place(0), 4, place(0), height - 26, "zero"))
    for row, (label, interval) in enumerate(rows):
        y = 20 + 26 * row
        parts.append(_text(LABEL - 12, y + 4, one_line(label, 28), "label end"))
        if interval.value is None:
            parts.append(_text(LABEL + 4, y + 4, "no score", "faint"))
            continue
        title = f"{one_line(label, 60)}: {number(interval.value, signed=zero)}, {bounds(interval, signed=zero)}"
        inner = ""
        if interval.low is not None and interval.high is not None:
            left, right = place(interval.low), place(interval.high)
            inner += _line(left, y, right, y, "whisker")
            inner += _line(left, y - 4, left, y + 4, "whisker") + _line(right, y - 4, right, y + 4, "whisker")
        parts.append(_group(inner + _circle(place(interval.value), y, 5, "mark"), title))
    return _svg(WIDTH, height, parts, name)


def distribution(values: Sequence[float], low: float, high: float, interval: Interval, *, name: str = "") -> str:
    """How values lie between the bounds: a dot each where they are few, else bars; below, their mean and its interval."""
    width, floor = WIDTH // 2, 112
    place = _scale(low, high, 14, width - 14)
    parts = list(_axis(place, ticks(low, high, 4), 8, floor))
    bins = 20
    spots: list[list[float]] = [[] for _ in range(bins)]
    for value in values:
        spots[min(bins - 1, max(0, int((value - low) / ((high - low) or 1) * bins)))].append(value)
    tallest = max((len(spot) for spot in spots), default=0) or 1
    cell = (place(high) - place(low)) / bins
    for index, spot in enumerate(spots):
        if not spot:
            continue
        left = place(low) + index * cell
        range_ = f"{number(low + (high - low) * index / bins)} to {number(low + (high - low) * (index + 1) / bins)}"
        title = f"{range_}: {len(spot)}"
        if len(values) <= DOTS:
            radius = min(4.5, cell / 2 - 0.5, 46 / tallest)
            x = place(math.fsum(spot) / len(spot))
            dots = "".join(_circle(x, floor - radius - 1 - 2 * radius * up, radius, "dot") for up in range(len(spot)))
            parts.append(_group(dots, title))
        else:
            tall = max(1.0, 96 * len(spot) / tallest)
            parts.append(_group(_rect(left + 0.5, floor - tall, cell - 1, tall, "bar"), title))
    if interval.value is not None:
        y = floor + 34
        inner = ""
        if interval.low is not None and interval.high is not None:
            inner = _line(place(interval.low), y, place(interval.high), y, "whisker")
        parts.append(
            _group(inner + _circle(place(interval.value), y, 4.5, "mark"), f"mean {number(interval.value)}, {bounds(interval)}")
        )
    return _svg(width, floor + 44, parts, name)


def calibrated(calibration: Calibration, *, name: str = "") -> str:
    """A dot for each bin: its mean score against the rate of good outcomes with its interval, as big as its cases are many. On
    the diagonal a score is what it says."""
    size, left, floor = WIDTH // 2, 44, WIDTH // 2 - 40
    across, up = _scale(0, 1, left, size - 14), _scale(0, 1, floor, 14)
    parts = list(_axis(across, ticks(0, 1), 14, floor))
    for tick in ticks(0, 1):
        parts += [_line(left, up(tick), size - 14, up(tick), "grid"), _text(left - 6, up(tick) + 4, f"{tick:g}", "tick end")]
    parts.append(_line(across(0), up(0), across(1), up(1), "ideal"))
    most = max(one.n for one in calibration.bins)
    for one in calibration.bins:
        x, inner = across(one.score), ""
        if one.rate.low is not None and one.rate.high is not None:
            inner = _line(x, up(one.rate.low), x, up(one.rate.high), "whisker")
        rate = one.rate.value or 0.0
        title = f"{one.n} of {number(one.low)} to {number(one.high)}: score {number(one.score)}, rate {number(rate)}"
        parts.append(_group(inner + _circle(x, up(rate), 3 + 5 * math.sqrt(one.n / most), "mark"), title))
    parts.append(_text((left + size - 14) / 2, size - 4, "score", "tick middle"))
    parts.append(f'<text class="tick middle" transform="translate(12 {_n((14 + floor) / 2)}) rotate(-90)">rate</text>')
    return _svg(size, size, parts, name)


def change(first: float, second: float, low: float, high: float, gain: float) -> str:
    """One case's way from one score to another: a hollow dot, a line, a full dot."""
    place = _scale(low, high, 6, 134)
    kind = "better" if gain > 0 else "worse"
    inner = _line(6, 9, 134, 9, "grid") + _line(place(first), 9, place(second), 9, f"way {kind}")
    inner += _circle(place(first), 9, 4, f"from {kind}") + _circle(place(second), 9, 4.5, f"to {kind}")
    return _svg(140, 18, [inner], f"{number(first)} to {number(second)}", "small")


def _scale(low: float, high: float, left: float, right: float) -> Callable[[float], float]:
    span = (high - low) or 1.0
    edges = sorted((left, right))
    return lambda value: min(edges[1], max(edges[0], left + (value - low) / span * (right - left)))


def _axis(place: Callable[[float], float], marks: Iterable[float], top: float, floor: float) -> Iterable[str]:
    for mark in marks:
        yield _line(place(mark), top, place(mark), floor, "grid")
        yield _text(place(mark), floor + 16, f"{mark:,.6g}".replace("-", "−"), "tick middle")


def _n(value: float) -> str:
    return f"{value:.2f}".rstrip("0").rstrip(".")


def _line(x1: float, y1: float, x2: float, y2: float, kind: str) -> str:
    return f'<line class="{kind}" x1="{_n(x1)}" y1="{_n(y1)}" x2="{_n(x2)}" y2="{_n(y2)}"/>'


def _circle(x: float, y: float, radius: float, kind: str) -> str:
    return f'<circle class="{kind}" cx="{_n(x)}" cy="{_n(y)}" r="{_n(radius)}"/>'


def _rect(x: float, y: float, width: float, height: float, kind: str) -> str:
    return f'<rect class="{kind}" x="{_n(x)}" y="{_n(y)}" width="{_n(width)}" height="{_n(height)}"/>'


def _text(x: float, y: float, text: str, kind: str) -> str:
    return f'<text class="{kind}" x="{_n(x)}" y="{_n(y)}">{escape(text)}</text>'


def _group(inner: str, title: str) -> str:
    return f"<g><title>{escape(title)}</title>{inner}</g>"


def _svg(width: float, height: float, parts: Iterable[str], name: str, kind: str = "plot") -> str:
    label = escape(one_line(name, 200))
    head = f'<svg class="{kind}" viewBox="0 0 {_n(width)} {_n(height)}" width="{_n(width)}" height="{_n(height)}" role="img"'
    return f'{head} aria-label="{label}">{"".join(parts)}</svg>'
