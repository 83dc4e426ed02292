"""The one drawer of series as SVG. Colours come from the page's style sheet by class."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import NamedTuple

from markupsafe import Markup, escape
from rich.cells import cell_len

from reports.display import plain, short

#: colours that the style sheet has, c0 and up
PALETTE = 12
#: where a panel's axes begin and end; room is left for the numbers beside and below them
LEFT, RIGHT, BOTTOM, TOP = 46, 380, 214, 26
#: the end of one as wide as the page
WIDE = 1060
#: pixels that a letter takes in the widest of the common fonts, at a panel's text size
GLYPH = 7.8


def tag(name: str, text: object | None = None, **attributes: object) -> Markup:
    """Return one element, everything escaped. `class_` is class, `_` in names is a hyphen."""
    parts = [f"<{name}"]
    for key, value in attributes.items():
        if value is not None:
            shown = f"{value:.1f}" if isinstance(value, float) else plain(value)
            parts.append(f' {key.rstrip("_").replace("_", "-")}="{escape(shown)}"')
    if text is None:
        return Markup("".join(parts) + "/>")
    inner = text if isinstance(text, Markup) else escape(plain(text))
    return Markup("".join(parts) + f">{inner}</{name}>")


@dataclass(frozen=True)
class Scale:
    """Maps [low, high] to [start, end] pixels, linearly or by logarithm."""

    low: float
    high: float
    start: float
    end: float
    log: bool = False

    def __call__(self, value: float) -> float:
        low, high = self.low, self.high
        if self.log:
            value, low, high = math.log(max(value, low)), math.log(low), math.log(high)
        return self.start + (value - low) / (high - low) * (self.end - self.start)

    def ticks(self, most: int = 5) -> list[float]:
        """Return round numbers within the scale, about `most` of them."""
        if self.log:
            return _log_ticks(self.low, self.high)
        step = nice_step((self.high - self.low) / most)
        first = math.ceil(self.low / step - 1e-9)
        return [step * i for i in range(first, math.floor(self.high / step + 1e-9) + 1)]


def nice_step(rough: float) -> float:
    """Return the smallest of 1, 2, 5 × 10^k that is at least `rough`."""
    power = 10.0 ** math.floor(math.log10(rough))
    return next(m * power for m in (1.0, 2.0, 5.0, 10.0) if m * power >= rough * (1 - 1e-9))


def _log_ticks(low: float, high: float) -> list[float]:
    decades = range(math.floor(math.log10(low)), math.ceil(math.log10(high)) + 1)
    for steps in ((1,), (1, 3), (1, 2, 5), (1, 1.5, 2, 3, 4, 5, 7)):
        found = [m * 10.0**k for k in decades for m in steps if low <= m * 10.0**k <= high]
        if len(found) >= 3:
            return found
    return found or [low, high]


def spanning(
    values: Sequence[float], start: float, end: float, *, pad: float = 0.06, log: bool = False
) -> Scale:
    """Return a scale over `values` with some air; a flat range is opened up."""
    low, high = min(values), max(values)
    if log:
        ratio = max((high / low) ** pad, 1.15)
        return Scale(low / ratio, high * ratio, start, end, True)
    air = (high - low) * pad if high > low else abs(high) * 0.05 or 1.0
    return Scale(low - air, high + air, start, end)


def tick_text(value: float) -> str:
    """Return a tick's label: no more digits than it has."""
    if value == 0:
        return "0"
    if abs(value) >= 10000 and value % 1000 == 0:
        return f"{value / 1000:g}k"
    return f"{value:.6g}" if abs(value) >= 1e-4 else f"{value:.0e}"


def picture(title: str, parts: Sequence[Markup], wide: int, high: int) -> Markup:
    """Return an SVG image of elements; `title` is read out in place of the picture."""
    inner = Markup("").join([tag("title", title), *parts])
    said = {"viewBox": f"0 0 {wide} {high}", "width": wide, "height": high, "role": "img"}
    return tag("svg", inner, **said, class_="panel")


def words(text: str, x: float, y: float, class_: str, anchor: str | None = None) -> Markup:
    """Return a text element; `anchor` is the end of the text that stands at `x`."""
    return tag("text", text, x=x, y=y, class_=class_, text_anchor=anchor)


def line(x1: float, x2: float, y1: float, y2: float, class_: str) -> Markup:
    """Return a straight line from (x1, y1) to (x2, y2)."""
    return tag("line", x1=x1, x2=x2, y1=y1, y2=y2, class_=class_)


class Point(NamedTuple):
    """A value with its spread; `text` is what it says when it is pointed at."""

    x: float
    y: float
    sd: float | None = None
    text: str = ""


@dataclass(frozen=True)
class Series:
    """Points of one colour, joined by a line, marked by dots with whiskers, or both."""

    css: str
    name: str
    points: Sequence[Point]
    line: bool = True
    dots: bool = True


def plot(
    title: str,
    series: Sequence[Series],
    description: str,
    *,
    x_label: str = "",
    log_x: bool = False,
    log_y: bool = False,
    marks: Sequence[float] | None = None,
    categories: Sequence[str] = (),
    wide: bool = False,
    under: Callable[[Scale, Scale], list[Markup]] = lambda x, y: [],
) -> Markup:
    """Return all series over their axes, which are as wide as the points need.

    The x axis is marked at `marks`, else at round numbers. With `categories` y counts these from
    the top, and the picture is as high as they need; `wide` makes it as wide as the page. `under`
    draws below the series, given both scales.
    """
    points = [point for one in series for point in one.points]
    left, right, bottom = float(LEFT), WIDE if wide else RIGHT, BOTTOM
    if categories:
        left = min(12 + GLYPH * max(map(cell_len, categories)), 240)
        bottom = TOP + 24 * len(categories)
        y = Scale(len(categories) - 0.5, -0.5, bottom, TOP)
    else:
        ends = [p.y + sign * (p.sd or 0.0) for p in points for sign in (-1, 1)] or [0.0, 1.0]
        y = spanning(ends, bottom, TOP, log=log_y)
    pad = 0.0 if wide else 0.06
    x = spanning([p.x for p in points] or [0.0, 1.0], left, right, pad=pad, log=log_x)
    drawn = [words(short(title, 44), 0, 13, "head")]
    for value in marks or x.ticks(12 if wide else 5):
        drawn.append(line(x(value), x(value), bottom, TOP, "grid"))
        drawn.append(words(tick_text(value), x(value), bottom + 15, "tick", "middle"))
    rows: list[tuple[float, str]] = [*enumerate(categories)]
    rows = rows or [(value, tick_text(value)) for value in y.ticks()]
    for value, label in rows:
        drawn.append(line(left, right, y(value), y(value), "grid"))
        drawn.append(words(label, left - 6, y(value) + 4, "tick", "end"))
    drawn.append(line(left, right, bottom, bottom, "axis"))
    if x_label:
        label = short(x_label + (", log scale" if log_x else ""), 44)
        drawn.append(words(label, right, bottom + 31, "label", "end"))
    drawn += [*under(x, y), *(_drawn(one, x, y) for one in series)]
    return picture(f"{title}. {description}", drawn, right + 20, bottom + 46)


def _drawn(series: Series, x: Scale, y: Scale) -> Markup:
    """Return the line, whiskers and dots of a series; its name is said where it is pointed at."""
    found = [tag("title", series.name)]
    if series.line:
        found.append(polyline([(x(p.x), y(p.y)) for p in series.points], f"line {series.css}"))
    for point in series.points if series.dots else ():
        at = x(point.x)
        if point.sd:
            ends = y(point.y - point.sd), y(point.y + point.sd)
            found.append(line(at, at, *ends, f"whisker {series.css}"))
        said = tag("title", point.text)
        found.append(tag("circle", said, cx=at, cy=y(point.y), r=4, class_=f"dot {series.css}"))
    return tag("g", Markup("").join(found))


def polyline(points: Sequence[tuple[float, float]], class_: str) -> Markup:
    """Return a line through points."""
    path = " ".join(f"{x:.1f},{y:.1f}" for x, y in points)
    return tag("polyline", points=path, class_=class_)
