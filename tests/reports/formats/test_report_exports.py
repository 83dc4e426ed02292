"""Every format says the same, with the same digits."""

from __future__ import annotations

import csv
import io
import json
import re
import subprocess
import unicodedata
from pathlib import Path

import polars as pl
import pytest
from report_views import full_view, key_of, metric, record, stage, view_of

from reports.formats.exports import (
    FORMATS,
    latex_escaped,
    to_csv,
    to_frame,
    to_json,
    to_latex,
    to_markdown,
    to_parquet,
)
from reports.formats.html import render_html
from reports.formats.text import render_text
from reports.frames import FAILURES
from reports.tables.build import build_tables
from reports.tables.model import number

NASTY = (
    '<script>alert(1)</script> {{ 7*7 }} 100 % _under_ $x$ \\end & # ~ ^ | " ° 😀 éøÿÅñçßµ ð½ ± '
    "\x1b[31m"
)


def printed(view) -> list[str]:
    """The numbers of the first table, row by row."""
    table = build_tables(view)[0]
    found = [number(table.cell(row, c), c) for row in table.rows for c in table.columns]
    return [text for text in found if text]


def test_html_latex_markdown_and_csv_show_the_same_digits() -> None:
    view = full_view()
    tables, numbers = build_tables(view), printed(view)
    html = render_html(view)
    page = html[html.index('<table class="book sortable">') : html.index("</table>")]
    cells = [re.sub("<[^>]+>", "", c) for c in re.findall(r"<td class=\"num.*?</td>", page, re.S)]
    shown = [re.sub("[a-z]+$", "", cell.strip()) for cell in cells]
    assert [cell for cell in shown if cell != "–"] == numbers

    body = to_latex(tables).split(r"\midrule")[1].split(r"\bottomrule")[0]
    latex = [cell for line in body.strip().split("\\\\\n") for cell in line.split("&")[1:]]
    plain = [re.sub(r"\\textcolor\{gray\}|\$\^\{.*?\}\$|[{}\\]", "", cell) for cell in latex]
    shown = [cell.replace("$pm$", "±").strip() for cell in plain]
    assert [cell for cell in shown if cell != "--"] == numbers

    lines = [line for line in to_markdown(tables).splitlines() if line.startswith("| ")][2:]
    cells = [cell.strip() for line in lines for cell in line.strip("| ").split("|")[1:]]
    shown = [re.sub("[ᵃᵇᶜ]+$", "", cell) for cell in cells]
    assert [cell for cell in shown if cell != "–"] == numbers

    frame = pl.read_csv(io.StringIO(to_csv(tables)))
    assert [text for text in frame["text"] if text] == numbers


def test_csv_parquet_and_json_read_back_to_the_same_values() -> None:
    tables = build_tables(full_view())
    frame = to_frame(tables)
    parquet = pl.read_parquet(io.BytesIO(to_parquet(tables)))
    assert parquet.equals(frame)
    back = pl.read_csv(io.StringIO(to_csv(tables)))
    for name in ("mean", "sd", "n"):
        assert back[name].to_list() == frame[name].to_list()
    row = frame.filter(pl.col("row") == "MAE-CT", pl.col("column") == "knn").row(0, named=True)
    assert json.loads(row["values"]) == [[[0], 97.8], [[1], 98.2], [[2], 97.2]]
    cell = json.loads(to_json(tables))[0]["rows"][4]["cells"]["knn"]
    assert (cell["mean"], cell["text"]) == (row["mean"], row["text"])


#: what a stranger may call anything
FOREIGN = [
    "=1+1", "+x", "-x", "@x", "\t=x", "\r\n=x", "＝x", ";=x", "a=b", '"=x', "[2pt]x", "*x",
    "a|b\nc", "\x1b[31mred\x9b0m", "\u202eright\u2066", "\ufeffx", "\u2028x", "<b>x</b>",
    '"><script>1</script>', "${x}$%#_^~", r"\end{document}\input{x}", "{{ 7*7 }}", "`x`",
    "![x](http://x)", "x\u00a0\u3000y", "",
]  # fmt: skip


def foreign_view(text: str):
    """A view whose every text is foreign."""
    rows = [stage(f"k{text}", "knn", f"{text}{i}", i, name=text) for i in (0, 1)]
    for row in rows:
        row |= {"reason": text, "worker": text, "device_model": text, "energy_reason": text}
        told = {"host": text, text: text}
        row["record"] = record(row, env=told, log_tail=text, settings={text: text})
    rows[1]["status"] = "failed"
    metrics = [metric(f"{text}0", 0, f"k{text}", 90.0, label=text, unit=text, protocol=text)]
    table = {"title": text, "columns": ["knn", "cost"], "groups": {text: ["knn", f"{text}1"]}}
    failure = dict.fromkeys(FAILURES, text) | {"rows": [text], "status": "failed"}
    return view_of(
        rows, metrics, tables=[table], title=text, scale=text, notes=[text], problems=[text],
        provenance={text: text}, failures=pl.DataFrame([failure], schema=FAILURES, orient="row"),
        runs=[{"started": text, "status": text, "command": text}],
    )  # fmt: skip


@pytest.mark.parametrize("text", FOREIGN)
def test_foreign_text_stays_text_in_every_format(text: str) -> None:
    view = foreign_view(text)
    tables = build_tables(view)
    exports = {name: export(tables) for name, (_, export) in FORMATS.items() if name != "parquet"}
    html = render_html(view)
    for made in (*exports.values(), html, render_text(view)):
        acted_on = {c for c in made if unicodedata.category(c) in ("Cc", "Cf", "Zl", "Zp")}
        assert acted_on <= {"\n", "\t"}
    for row in csv.DictReader(io.StringIO(exports["csv"])):
        assert not [cell for cell in row.values() if re.match(r"\s*[=+\-@＝]", cell)]
    assert exports["csv"].splitlines()[1].startswith('"')  # where ";" parts columns, too
    assert (html.count("<script"), html.count("<b>x")) == (2, 0)
    body = exports["latex"].split(r"\midrule")[1]
    assert not re.search(r"\\\\\s*[\[*]", body.replace(r"\\[r]", ""))
    assert exports["latex"].count(r"\end{document}") == 1
    rows = [line for line in exports["markdown"].splitlines() if line.startswith("| ")]
    assert len({len(re.findall(r"(?<!\\)\|", line)) for line in rows}) == 1
    assert json.loads(exports["json"])[0]["title"] == text


def test_latex_escapes() -> None:
    assert latex_escaped("a_b & 5 % {x} \\y $z$ #1 ~ ^") == (
        r"a\_b \& 5 \% \{x\} \textbackslash{}y \char36{}z\char36{} \#1 "
        r"\textasciitilde{} \textasciicircum{}"
    )
    assert latex_escaped("😀 é 表 ð ½") == "U+1F600 é U+8868 U+00F0 U+00BD"


def wide_view():
    columns = [f"metric {i}" for i in range(20)]
    rows = [stage(key_of(c), c, "A", 0) for c in columns]
    metrics = [metric("A", 0, key_of(c), 90.0, c) for c in columns]
    return view_of(rows, metrics, tables=[{"title": "T", "columns": columns}])


@pytest.mark.needs("pdflatex")
@pytest.mark.parametrize(
    "make",
    [full_view, wide_view, lambda: foreign_view(NASTY), lambda: foreign_view("[2pt]*`x")],
)
def test_latex_compiles_and_fits_the_page(make, tmp_path: Path) -> None:
    (tmp_path / "t.tex").write_text(to_latex(build_tables(make())), encoding="utf-8")
    command = ["pdflatex", "-interaction=nonstopmode", "-halt-on-error", "t.tex"]
    done = subprocess.run(command, cwd=tmp_path, capture_output=True, timeout=120, check=False)
    assert done.returncode == 0, done.stdout.decode(errors="replace")[-2000:]
    assert (tmp_path / "t.pdf").stat().st_size > 1000
    assert "Overfull" not in (tmp_path / "t.log").read_text(errors="replace")
