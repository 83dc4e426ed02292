"""The page's drawer of panels as SVG. Colours come from the page's style sheet by class."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from textwrap import wrap

from markupsafe import Markup, escape
from rich.cells import cell_len

from reports.display import plain, short
from reports.figures.model import Panel, Series
from reports.figures.palette import look

#: where a panel's axes begin and end; room is left for the numbers beside and below them
LEFT, RIGHT, BOTTOM, TOP = 62, 396, 214, 26
#: the end of one as wide as the page
WIDE = 1240
#: pixels that a letter takes in the widest of the common fonts, at a panel's text size
GLYPH = 7.8
#: pixels that a letter takes in a title of an axis, on average
_LETTER = 6


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


def plot(panel: Panel, *, wide: bool = False) -> Markup:
    """Return a panel, as high as its categories need; `wide` makes it as wide as the page."""
    left, right, bottom = float(LEFT), WIDE if wide else RIGHT, BOTTOM
    top = TOP if panel.title else 10
    if panel.categories:
        left = min(12 + GLYPH * max(map(cell_len, panel.categories)), 240)
        bottom = top + 24 * len(panel.categories)
    x, y = scales(panel, (left, right), (bottom, top), pad=0.0 if wide else 0.06)
    drawn = [words(short(panel.title, 44), 0, 13, "head")]
    for value in panel.marks or x.ticks(12 if wide else 5):
        drawn.append(line(x(value), x(value), bottom, top, "grid"))
        drawn.append(words(tick_text(value), x(value), bottom + 15, "tick", "middle"))
    for value, label in rows_of(panel, y):
        drawn.append(line(left, right, y(value), y(value), "grid"))
        drawn.append(words(label, left - 6, y(value) + 4, "tick", "end"))
    drawn.append(line(left, right, bottom, bottom, "axis"))
    if panel.x_label:
        label = short(panel.x_label + (", log scale" if panel.log_x else ""), 44)
        drawn.append(words(label, right, bottom + 31, "label", "end"))
    if panel.y_label:
        label = short(panel.y_label + (", log scale" if panel.log_y else ""), 60)
        middle = (bottom + top) / 2
        for i, part in enumerate(wrap(label, int((bottom - top) / _LETTER))):
            beside = 12 + 15 * i
            turned = {"transform": f"rotate(-90 {beside} {middle:g})", "text_anchor": "middle"}
            drawn.append(tag("text", part, x=beside, y=middle, class_="label", **turned))
    drawn += [line(x(at), x(at), bottom, top, "cut") for at in panel.cuts]
    drawn += [_drawn(one, x, y) for one in panel.series]
    for i, note in enumerate(panel.notes):
        level = bottom - 8 - 16 * i if note.row is None else y(note.row) + 4
        at, anchor = (right - 4, "end") if note.at_end else (left + 4, "start")
        drawn.append(words(note.text, at, level, "edge", anchor))
    return picture(f"{panel.title or panel.y_label}. {panel.said}", drawn, right + 20, bottom + 46)


def scales(
    panel: Panel, across: tuple[float, float], up: tuple[float, float], pad: float = 0.06
) -> tuple[Scale, Scale]:
    """Return the scales of a panel's axes, from one end of each to the other."""
    points = [point for one in panel.series for point in one.points]
    if panel.categories:
        y = Scale(len(panel.categories) - 0.5, -0.5, *up)
    else:
        ends = [p.y + sign * (p.sd or 0.0) for p in points for sign in (-1, 1)] or [0.0, 1.0]
        y = spanning(ends, *up, log=panel.log_y)
    return spanning([p.x for p in points] or [0.0, 1.0], *across, pad=pad, log=panel.log_x), y


def rows_of(panel: Panel, y: Scale) -> list[tuple[float, str]]:
    """Return where the y axis is marked, and how."""
    named: list[tuple[float, str]] = [*enumerate(panel.categories)]
    return named or [(value, tick_text(value)) for value in y.ticks()]


def _drawn(series: Series, x: Scale, y: Scale) -> Markup:
    """Return the line, whiskers and marks of a series; its name is said where it is pointed at."""
    found = [tag("title", series.name)]
    at = [(x(p.x), y(p.y)) for p in series.points]
    if series.line:
        dash = look(series.look).dash if series.dash is None else series.dash
        found.append(polyline(at, "line", stroke_dasharray=dash or None, stroke_width=series.width))
    for point, (across, down) in zip(series.points, at, strict=True) if series.dots else ():
        if point.sd:
            ends = y(point.y - point.sd), y(point.y + point.sd)
            found.append(line(across, across, *ends, "whisker"))
        found.append(mark(series.look, across, down, point.text))
    return tag("g", Markup("").join(found), class_=f"c{look(series.look).colour}")


#: corners of marks around 0, 0; what is no polygon is drawn as a line
_CORNERS = {
    "square": "-3.6,-3.6 3.6,-3.6 3.6,3.6 -3.6,3.6",
    "diamond": "0,-5.2 5.2,0 0,5.2 -5.2,0",
    "up": "0,-5 4.8,3.6 -4.8,3.6",
    "down": "0,5 4.8,-3.6 -4.8,-3.6",
    "star": "0,-5.6 1.5,-1.8 5.4,-1.7 2.4,0.8 3.3,4.6 0,2.4 -3.3,4.6 -2.4,0.8 -5.4,-1.7 -1.5,-1.8",
}
_STROKES = {"cross": "M-4,-4L4,4M-4,4L4,-4", "plus": "M-5,0L5,0M0,-5L0,5"}


def mark(number: int, x: float, y: float, text: str = "", *, small: bool = False) -> Markup:
    """Return the mark of a look at a place; `text` is what it says when it is pointed at."""
    said = tag("title", text) if text else Markup("")
    marker, at = look(number).marker, f"translate({x:.1f} {y:.1f})" + " scale(.75)" * small
    if marker in _STROKES:
        return tag("path", said, d=_STROKES[marker], transform=at, class_="stroke")
    if marker in _CORNERS:
        return tag("polygon", said, points=_CORNERS[marker], transform=at, class_="dot")
    return tag("circle", said, r=4, transform=at, class_="dot")


def swatch(number: int, *, bar: bool = False) -> Markup:
    """Return the look of a row as the legend shows it: its line with its mark, or a bar."""
    dash, width = (("", 9) if bar else (look(number).dash, 1.5)) if number >= 0 else ("2 1", 9)
    ends = [(1.0, 7.0), (31.0, 7.0)]
    drawn = polyline(ends, "line", stroke_dasharray=dash or None, stroke_width=width)
    marks = Markup("") if bar or number < 0 else mark(number, 16.0, 7.0)
    said = {"viewBox": "0 0 32 14", "width": 32, "height": 14, "aria_hidden": "true"}
    return tag("svg", drawn + marks, class_=f"swatch c{look(number).colour}", **said)


def polyline(points: Sequence[tuple[float, float]], class_: str, **attributes: object) -> Markup:
    """Return a line through points."""
    path = " ".join(f"{x:.1f},{y:.1f}" for x, y in points)
    return tag("polyline", points=path, class_=class_, **attributes)
