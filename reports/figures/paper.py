"""Panels for a paper, drawn by matplotlib from the series of the page."""

from __future__ import annotations

import io
import warnings
from typing import Any

import matplotlib
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure as Canvas
from matplotlib.lines import Line2D

from reports.display import plain, short
from reports.figures.model import Figure, Panel, Series
from reports.figures.palette import LIGHT, look
from reports.figures.svg import rows_of, scales, tick_text

#: inches: a column of a two-column paper, both columns
_COLUMN, _PAGE = 3.3, 6.9
_MARKERS = {
    **{"circle": "o", "square": "s", "diamond": "D", "up": "^", "down": "v"},
    **{"cross": "x", "plus": "+", "star": "*"},
}
_SETTINGS: Any = {
    "font.family": ["STIXGeneral", "DejaVu Sans"],
    "font.size": 8,
    "axes.linewidth": 0.6,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "pdf.fonttype": 42,  # the letters themselves, which every reader of PDF can search
    "svg.hashsalt": "maect-bench",
    "text.parse_math": False,  # names are text
}


def drawn(figure: Figure, panel: Panel, suffix: str) -> bytes:
    """Return a panel with the figure's legend as pdf, svg or png; the same again, bit for bit."""
    with matplotlib.rc_context(_SETTINGS), warnings.catch_warnings():
        warnings.filterwarnings("ignore", "Glyph")  # what no font has becomes a box
        lines = -(-len(figure.legend) // (6 if figure.bars else 2))
        high = 0.16 * len(panel.categories) + 0.7 if panel.categories else 2.2
        size = (_PAGE if figure.bars else _COLUMN, high + 0.14 * lines)
        canvas = Canvas(figsize=size, layout="constrained")
        FigureCanvasAgg(canvas)
        _draw(canvas, figure, panel)
        buffer = io.BytesIO()
        undated = {"pdf": {"CreationDate": None}, "svg": {"Date": None}}.get(suffix)
        canvas.savefig(buffer, format=suffix, dpi=300, metadata=undated)
    return buffer.getvalue()


def _draw(canvas: Canvas, figure: Figure, panel: Panel) -> None:
    axes = canvas.add_subplot()
    x, y = scales(panel, (0, 1), (0, 1), pad=0.0 if figure.bars else 0.06)
    axes.set(xlim=(x.low, x.high), xscale="log" if panel.log_x else "linear")
    axes.set(ylim=(y.low, y.high), yscale="log" if panel.log_y else "linear")
    marks = panel.marks or x.ticks(5)
    rows = rows_of(panel, y)
    axes.set_xticks(marks, [tick_text(value) for value in marks], minor=False)
    axes.set_yticks([at for at, _ in rows], [plain(text) for _, text in rows], minor=False)
    axes.minorticks_off()
    axes.grid(linewidth=0.3, color="0.85")
    axes.set_axisbelow(True)
    axes.set(xlabel=short(panel.x_label), ylabel=short(panel.y_label))
    if panel.title and panel.title != panel.x_label:
        axes.set_title(short(panel.title), fontsize=8)
    for cut in panel.cuts:
        axes.axvline(cut, color="0.5", linewidth=0.5, linestyle=":")
    for one in panel.series:
        style = _style(one, figure.bars)
        at = [p.x for p in one.points], [p.y for p in one.points]
        axes.plot(*at, **style)
        if one.dots and any(p.sd for p in one.points):
            spread = [p.sd or 0.0 for p in one.points]
            axes.errorbar(*at, yerr=spread, fmt="none", ecolor=style["color"], elinewidth=0.8)
    for i, note in enumerate(panel.notes):
        across, side = (0.98, "right") if note.at_end else (0.02, "left")
        place = (across, 0.04 + 0.07 * i) if note.row is None else (across, y(note.row))
        text = note.text.replace("▸", "→").replace("◂", "←")
        axes.text(*place, text, transform=axes.transAxes, ha=side, va="center", fontsize=7)
    solid = "" if figure.bars else None
    keys = [
        Line2D([], [], **_style(Series(number, "", (), dash=solid), figure.bars), label=plain(text))
        for number, text in figure.legend
    ]
    if keys:
        columns = 6 if figure.bars else 2
        canvas.legend(handles=keys, loc="outside lower center", ncols=columns, frameon=False)


def _style(series: Series, bars: bool) -> dict[str, Any]:
    """Return matplotlib's names for the look of a series."""
    of = look(series.look)
    dash = of.dash if series.dash is None else series.dash
    lengths = [float(part) for part in dash.split()]
    style: dict[str, Any] = {
        "color": LIGHT[of.colour] if series.look >= 0 else "0.4",
        "linewidth": series.width * (0.5 if bars and series.points else 0.8),
        "linestyle": (0, lengths) if series.line and lengths else "-" if series.line else "none",
    }
    if series.dots and not bars and series.look >= 0:
        style |= {"marker": _MARKERS[of.marker], "markersize": 4, "markeredgewidth": 0.8}
    return style
