"""A figure as data: what the page draws as SVG, and what matplotlib draws for a paper."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import NamedTuple


class Point(NamedTuple):
    """A value with its spread; `text` is what it says when it is pointed at."""

    x: float
    y: float
    sd: float | None = None
    text: str = ""


@dataclass(frozen=True)
class Series:
    """Points of one look (see `palette`), joined by a line, marked with whiskers, or both.

    `dash` is the line's pattern, that of the look unless given; `width` is in pixels.
    """

    look: int
    name: str
    points: Sequence[Point]
    line: bool = True
    dots: bool = True
    width: float = 1.5
    dash: str | None = None


class Note(NamedTuple):
    """A word inside a panel: at one of its sides, in a row of its categories or at the bottom."""

    text: str
    at_end: bool = True
    row: int | None = None


@dataclass(frozen=True)
class Panel:
    """All series over one pair of axes.

    The x axis is marked at `marks`, else at round numbers. With `categories` y counts these from
    the top. `said` tells what is seen to who does not see it; `cuts` are places on the x axis.
    """

    title: str
    series: Sequence[Series]
    said: str
    x_label: str = ""
    y_label: str = ""
    log_x: bool = False
    log_y: bool = False
    marks: Sequence[float] | None = None
    categories: Sequence[str] = ()
    notes: Sequence[Note] = ()
    cuts: Sequence[float] = ()

    @property
    def tells(self) -> bool:
        """Return whether there is more to see than a flat line or a single point."""
        points = [point for one in self.series for point in one.points]
        level = not self.categories and len({point.y for point in points}) < 2
        return len({point.x for point in points}) > 1 and not level


@dataclass(frozen=True)
class Figure:
    """Panels under one caption; `legend` is (look, text).

    `bars` have no marks; what the tables say too, or is about the run, is `folded` on the page.
    """

    id: str
    title: str
    caption: str
    panels: list[Panel]
    legend: list[tuple[int, str]]
    bars: bool = False
    folded: bool = False


def figure(
    name: str,
    title: str,
    caption: str,
    panels: Iterable[Panel],
    legend: list[tuple[int, str]],
    **more: bool,
) -> Figure | None:
    """Return a figure of the panels that tell something; None without any."""
    found = [panel for panel in panels if panel.tells]
    return Figure(name, title, caption, found, legend, **more) if found else None
