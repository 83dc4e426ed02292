"""The one drawer of series as SVG. Colours come from the page's style sheet by class."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import NamedTuple

from markupsafe import Markup, escape

from reports.display import plain, short

#: colours that the style sheet has, c0 and up
PALETTE = 12
#: where a panel's axes begin and end; room is left for the numbers beside and below them
LEFT, RIGHT, BOTTOM, TOP = 46, 380, 214, 26
#: pixels that a letter takes in the widest of the common fonts, at a panel's text size
GLYPH = 7.8


def tag(name: str, text: object | None = None, **attributes: object) -> Markup:
    """One element; numbers shortened, everything escaped. `class_` is class, `_` in names is -."""
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
    air = (high - low) * pad or abs(high) * 0.05 or 1.0
    return Scale(low - air, high + air, start, end)


def tick_text(value: float) -> str:
    """Return a tick's label: no more digits than it has."""
    if value == 0:
        return "0"
    if abs(value) >= 10000 and value % 1000 == 0:
        return f"{value / 1000:g}k"
    return f"{value:.6g}" if abs(value) >= 1e-4 else f"{value:.0e}"


@dataclass
class Panel:
    """One set of axes with a heading; `body` is drawn inside them."""

    title: str
    x: Scale
    y: Scale
    width: int = 400
    height: int = 260
    x_label: str = ""
    #: labels of a categorical y axis, by position
    categories: Sequence[tuple[float, str]] | None = None
    #: where the x axis is marked, if not at round numbers
    marks: Sequence[float] | None = None
    body: list[Markup] = field(default_factory=list)

    def svg(self, description: str) -> Markup:
        """Return the whole panel; `description` is read out in place of the picture."""
        parts = [tag("title", f"{self.title}. {description}"), *self._axes(), *self.body]
        return tag(
            "svg",
            Markup("").join(parts),
            viewBox=f"0 0 {self.width} {self.height}",
            width=self.width,
            height=self.height,
            role="img",
            class_="panel",
        )

    def _axes(self) -> list[Markup]:
        left, right, bottom, top = self.x.start, self.x.end, self.y.start, self.y.end
        found = [tag("text", short(self.title, 44), x=0, y=13, class_="head")]
        for value in self.marks or self.x.ticks():
            px = self.x(value)
            found.append(tag("line", x1=px, x2=px, y1=bottom, y2=top, class_="grid"))
            found.append(
                tag(
                    "text",
                    tick_text(value),
                    x=px,
                    y=bottom + 15,
                    class_="tick",
                    text_anchor="middle",
                )
            )
        rows = self.categories or [(v, tick_text(v)) for v in self.y.ticks()]
        for value, label in rows:
            py = self.y(value)
            found.append(tag("line", x1=left, x2=right, y1=py, y2=py, class_="grid"))
            found.append(tag("text", label, x=left - 6, y=py + 4, class_="tick", text_anchor="end"))
        found.append(tag("line", x1=left, x2=right, y1=bottom, y2=bottom, class_="axis"))
        if self.x_label:
            label = short(self.x_label, 44)
            found.append(
                tag("text", label, x=right, y=bottom + 31, class_="label", text_anchor="end")
            )
        return found


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
    under: Callable[[Scale, Scale], list[Markup]] = lambda x, y: [],
) -> Markup:
    """Return a panel with all series, its axes as wide as they need.

    `under` draws below the series, given both scales.
    """
    points = [point for one in series for point in one.points]
    ends = [p.y + s * (p.sd or 0.0) for p in points for s in (-1, 1)] or [0.0, 1.0]
    x = spanning([p.x for p in points] or [0.0, 1.0], LEFT, RIGHT, log=log_x)
    y = spanning(ends, BOTTOM, TOP, log=log_y)
    label = x_label + (", log scale" if log_x else "")
    panel = Panel(title, x, y, x_label=label, marks=marks, body=under(x, y))
    for one in series:
        drawn = []
        if one.line:
            drawn.append(polyline([(x(p.x), y(p.y)) for p in one.points], f"line {one.css}"))
        for point in one.points if one.dots else ():
            if point.sd:
                ends_at = {"y1": y(point.y - point.sd), "y2": y(point.y + point.sd)}
                at = x(point.x)
                drawn.append(tag("line", x1=at, x2=at, **ends_at, class_=f"whisker {one.css}"))
            drawn.append(dot(x(point.x), y(point.y), one.css, point.text))
        panel.body.append(tag("g", Markup("").join([tag("title", one.name), *drawn])))
    return panel.svg(description)


def dot(x: float, y: float, css: str, text: str) -> Markup:
    """Return a dot that says `text` when it is pointed at."""
    return tag("circle", tag("title", text), cx=x, cy=y, r=4, class_=f"dot {css}")


def polyline(points: Sequence[tuple[float, float]], class_: str) -> Markup:
    path = " ".join(f"{x:.1f},{y:.1f}" for x, y in points)
    return tag("polyline", points=path, class_=class_)
