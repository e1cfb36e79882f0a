"""Charts that need no script: SVG with the colours of the page, readable on a phone."""

from __future__ import annotations

import html
import math
from collections.abc import Iterable, Sequence
from typing import NamedTuple

from page.document import as_text

WIDTH, LEFT, RIGHT, STEP = 460, 14, 446, 40
"""Measures of a forest: it is narrow, so that it can be read on a phone."""

STYLE = """<style>
.charts .plot { margin: 0; } .plot { margin: 12px 0 0; } .plot svg { max-width: 520px; }
.plot text { font-size: 13px; fill: var(--ink); } .plot .soft { fill: var(--soft); }
.plot line { stroke: var(--line); } .plot .zero { stroke: var(--soft); }
.plot .bar { stroke: var(--accent); stroke-width: 2.5; } .plot .dot { fill: var(--accent); }
.plot .one { fill: var(--soft); opacity: .75; }
.plot .off { fill: none; stroke: var(--soft); } .plot .on { fill: var(--right); }
</style>"""


def _colours(paper: str, ink: str, soft: str, line: str, accent: str) -> str:
    return (
        f".paper{{fill:{paper}}}text{{fill:{ink}}}.soft{{fill:{soft}}}line{{stroke:{line}}}"
        f".zero{{stroke:{soft}}}.bar{{stroke:{accent};stroke-width:2.5}}.dot{{fill:{accent}}}"
        f".one{{fill:{soft};opacity:.75}}"
    )


PICTURE_STYLE = (
    _colours("#ffffff", "#1f2328", "#59636e", "#e2e2e2", "#2f62d0")
    + "@media(prefers-color-scheme:dark){"
    + _colours("#0d1117", "#e6edf3", "#9198a1", "#2a3038", "#79a6ff")
    + "}"
)


class Bar(NamedTuple):
    """A row of a forest: a mean, half of its interval (NaN: none), and the averaged values."""

    name: str
    value: float
    half: float = math.nan
    parts: Sequence[float] = ()


class Point(NamedTuple):
    """A dot of a scatter.

    Attributes:
        kind: dot, on (chosen) or off (hollow). about: a text for the pointer.
    """

    x: float
    y: float
    kind: str = "dot"
    about: str = ""


def forest(bars: Iterable[Bar], title: str, *, zero: bool = False) -> str:
    """A chart of means and intervals, one below the other, as shares in percent; "" for none."""
    shown = _known(bars)
    return figure(title, *_forest(shown, zero)) if shown else ""


def forest_picture(bars: Iterable[Bar], title: str, *, zero: bool = False) -> str:
    """`forest` as an SVG file of its own, in light or dark colours as the reader prefers."""
    shown = _known(bars)
    if not shown:
        return ""
    content, width, height = _forest(shown, zero)
    return (
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {width} {height + 34}" '
        f'width="{3 * width // 2}" font-family="sans-serif" font-size="13"><style>{PICTURE_STYLE}'
        f'</style><rect class="paper" width="100%" height="100%" rx="6"/>'
        f'<text x="{LEFT}" y="22" font-weight="600">{as_text(title)}</text>'
        f'<g transform="translate(0 30)">{content}</g></svg>\n'
    )


def _known(bars: Iterable[Bar]) -> list[Bar]:
    return [bar for bar in bars if not math.isnan(bar.value)]


def _forest(shown: Sequence[Bar], zero: bool) -> tuple[str, int, int]:
    """The SVG of a forest, its width and its height."""
    ends = [100 * value for bar in shown for value in _reach(bar)]
    low, high = min(ends), max(ends)
    low, high = (min(low, 0.0), max(high, 0.0)) if zero else (low, high)
    marks = ticks(low, high)
    low, high = min(low, marks[0]), max(high, marks[-1])

    def x(value: float) -> float:
        return round(LEFT + (value - low) / ((high - low) or 1) * (RIGHT - LEFT), 1)

    bottom = STEP * len(shown) + 4
    parts = []
    for mark in marks:
        kind = ' class="zero"' if zero and mark == 0 else ""
        parts.append(f'<line{kind} x1="{x(mark)}" x2="{x(mark)}" y1="4" y2="{bottom}"/>')
        label = f"{mark:+g}" if zero and mark else f"{mark:g}"
        half = 4 * len(label)  # of its width; labels wider than the margin are moved inwards
        place = min(max(x(mark), half), WIDTH - half)
        parts.append(
            f'<text class="soft" x="{place}" y="{bottom + 17}" text-anchor="middle">{label}</text>'
        )
    for row, bar in enumerate(shown):
        y = STEP * row + STEP - 11
        short = bar.name if len(bar.name) <= 56 else f"{bar.name[:55]}…"
        parts.append(f'<text x="{LEFT}" y="{y - 11}">{html.escape(short)}</text>')
        if not math.isnan(bar.half):
            ends = [x(100 * (bar.value + side * bar.half)) for side in (-1, 1)]
            parts.append(f'<line class="bar" x1="{ends[0]}" x2="{ends[1]}" y1="{y}" y2="{y}"/>')
        parts += [f'<circle class="one" cx="{x(100 * v)}" cy="{y}" r="3"/>' for v in bar.parts]
        parts.append(f'<circle class="dot" cx="{x(100 * bar.value)}" cy="{y}" r="4.5"/>')
    return "".join(parts), WIDTH, bottom + 26


def _reach(bar: Bar) -> list[float]:
    half = 0.0 if math.isnan(bar.half) else bar.half
    return [bar.value - half, bar.value + half, *bar.parts]


def scatter(points: Sequence[Point], title: str, *, log: bool = False) -> str:
    """A chart of shares, in percent, against an option, with a logarithmic axis if `log`."""
    if not points:
        return ""
    place = math.log10 if log else float
    (x0, x1), (y0, y1) = _wider([place(p.x) for p in points]), _wider([100 * p.y for p in points])
    left, right, top, bottom = 46, 330, 10, 150

    def across(x: float) -> float:
        return round(left + (place(x) - x0) / (x1 - x0) * (right - left), 1)

    def up(y: float) -> float:
        return round(bottom - (y - y0) / (y1 - y0) * (bottom - top), 1)

    parts = []
    for mark in ticks(y0, y1, 4):
        if y0 <= mark <= y1:
            parts.append(f'<line x1="{left}" x2="{right}" y1="{up(mark)}" y2="{up(mark)}"/>')
            parts.append(
                f'<text class="soft" x="{left - 6}" y="{up(mark) + 4}" '
                f'text-anchor="end">{mark:g}</text>'
            )
    ends = sorted({min(p.x for p in points), max(p.x for p in points)})
    for x, anchor in zip(ends, ("start", "end") if len(ends) > 1 else ("middle",), strict=True):
        parts.append(
            f'<text class="soft" x="{across(x)}" y="{bottom + 20}" '
            f'text-anchor="{anchor}">{x:g}</text>'
        )
    for point in points:
        about = f"<title>{as_text(point.about)}</title>" if point.about else ""
        parts.append(
            f'<circle class="{point.kind}" cx="{across(point.x)}" cy="{up(100 * point.y)}" '
            f'r="4.5">{about}</circle>'
        )
    return figure(title, "".join(parts), 340, bottom + 28)


def _wider(values: Sequence[float]) -> tuple[float, float]:
    low, high = min(values), max(values)
    room = (high - low) * 0.06 or abs(high) * 0.05 or 1.0
    return low - room, high + room


def ticks(low: float, high: float, most: int = 7) -> list[float]:
    """Round numbers from about `low` to about `high`, with at most `most` steps within."""
    span = (high - low) or 1.0
    step = 10 ** math.floor(math.log10(span / most))
    step = next(step * factor for factor in (1, 2, 5, 10) if span / (step * factor) <= most)
    first = math.floor(low / step)
    last = max(math.ceil(high / step), first + 1)
    return [round(number * step, 10) for number in range(first, last + 1)]


def figure(title: str, content: str, width: int, height: int) -> str:
    """A chart with its title."""
    return (
        f'<figure class="chart plot"><figcaption><b>{as_text(title)}</b></figcaption>'
        f'<svg viewBox="0 0 {width} {height}" role="img" aria-label="{as_text(title)}">'
        f"{content}</svg></figure>"
    )
