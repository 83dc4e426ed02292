"""Figures for a paper: of the page's series, in letters that are in the file."""

from __future__ import annotations

import subprocess
from pathlib import Path

import pytest
from report_views import digits_view

from reports.figures.all import all_figures
from reports.figures.model import Figure, Note, Panel, Point, Series
from reports.figures.paper import drawn
from reports.tables.build import build_tables


def test_each_panel_of_the_page_is_drawn_with_all_its_rows() -> None:
    view = digits_view()
    figures = {one.id: one for one in all_figures(view, build_tables(view))}
    assert {"pareto", "seeds", "seeds-2", "by-number-of-labels", "curves"} <= figures.keys()
    figure = figures["pareto"]
    svg = drawn(figure, figure.panels[0], "svg").decode()
    assert all(f"<!-- {name} -->" in svg for name in ("MAE-CT", "MAE, compute-matched"))
    assert "<!-- k-NN, k=10, % -->" in svg


@pytest.mark.needs("pdffonts")
def test_pdffonts_finds_every_font_embedded_whatever_a_row_is_called(tmp_path: Path) -> None:
    name = "$x_1$ \\alpha 100 % é 表 \x1b[31m"
    points = [Point(1.0, 1e-6, 1e-7), Point(10.0, 1e-5)]
    panel = Panel(
        name, [Series(3, name, points), Series(-1, name, points, dash="2 1")], name, name, name,
        log_x=True, log_y=True, notes=[Note(f"{name} ▸")], cuts=[3.0],
    )  # fmt: skip
    path = tmp_path / "panel.pdf"
    path.write_bytes(drawn(Figure("x", name, name, [panel], [(3, name)]), panel, "pdf"))
    told = subprocess.run(["pdffonts", path], capture_output=True, text=True, check=True).stdout
    _, rule, *fonts = told.splitlines()
    embedded = rule.split(" ")[:4]
    start = sum(len(part) + 1 for part in embedded[:3])
    assert fonts and all(line[start:].split()[0] == "yes" for line in fonts)
