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
from report_views import (
    digits_view,
    full_view,
    key_of,
    metric,
    record,
    search_view,
    stage,
    view_of,
)

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

    body = to_latex(view, tables).split(r"\midrule")[1].split(r"\bottomrule")[0]
    latex = [cell for line in body.strip().split("\\\\\n") for cell in line.split("&")[1:]]
    shown = [cell.replace(r"\bfseries", "").replace("+-", "±").strip(" \\") for cell in latex]
    assert [cell for cell in shown if cell != "{--}"] == numbers

    lines = [line for line in to_markdown(tables).splitlines() if line.startswith("| ")]
    cells = [cell.strip() for line in lines[2:8] for cell in line.strip("| ").split("|")[1:]]
    assert [cell for cell in cells if cell != "–"] == numbers


def test_csv_has_one_measured_value_a_row() -> None:
    view = digits_view()
    tables = build_tables(view)
    frame = pl.read_csv(io.StringIO(to_csv(tables)))
    assert pl.read_parquet(io.BytesIO(to_parquet(tables))).equals(to_frame(tables))
    ours = frame.filter(kind="metric", row="MAE-CT", metric="low_shot.accuracy_5")
    assert ours["seed"].to_list() == list(range(10))
    assert set(ours["unit"]) == {"%"} and set(ours["protocol"]) == {"low_shot.accuracy_5-p1"}
    assert ours["value"].mean() == pytest.approx(89.0, abs=0.05)
    assert set(frame["kind"]) == {"metric", "cost", "published"}
    grey = frame.filter(kind="published", row="MAE-CT_aug", metric="low_shot")
    assert grey.select("value", "seed").rows() == [(49.6, None)]
    assert "low-shot figure" in grey["source"].item()
    # the same for all seeds: one value, not one a seed
    raw = pl.read_csv(io.StringIO(to_csv(build_tables(full_view())))).filter(row="raw pixels")
    assert raw.filter(metric="knn").select("seed", "seeds", "value").rows() == [
        (None, "0 1 2", 96.6)
    ]
    # what failed is there, without a value
    open_ = to_frame(build_tables(search_view())).filter(state="failed", kind="metric")
    assert open_["value"].null_count() == len(open_)


def test_json_says_where_the_tables_come_from() -> None:
    view = full_view(provenance={"commit": "abc", "environment": {"torch": "2.11"}})
    for key in [key_of("knn", "MAE-CT", seed) for seed in (0, 1, 2)]:
        view.records[key] |= {"protocol_fingerprint": "knn-p1", "protocol": {"k": 10}}
    found = json.loads(to_json(view, build_tables(view)))
    assert (found["commit"], found["environment"]) == ("abc", {"torch": "2.11"})
    assert (found["suite"], found["protocols"]) == ("paper_table", {"knn-p1": {"k": 10}})
    cell = found["tables"][0]["rows"][4]["cells"]["knn"]
    assert (cell["text"], [v["value"] for v in cell["values"]]) == (
        "97.7 ± 0.5",
        [97.8, 98.2, 97.2],
    )
    assert found["published"]["rows"][1]["cells"]["knn.published"]["mean"] == 78.0


def test_published_numbers_stand_in_a_table_of_their_own() -> None:
    """Behind all measured columns in LaTeX, where they are asked for."""
    view = digits_view()
    tables = build_tables(view)
    assert {column.kind for table in tables for column in table.columns} == {"metric", "cost"}
    assert [row.variant for row in tables[0].published.rows] == ["MAE", "MAE-CT", "MAE-CT_aug"]
    assert "Published" not in to_latex(view, tables)
    first, second = to_latex(view, tables, published=True).split(r"\end{tabular}")[:2]
    for text, columns in ((first, 2), (second, 4)):
        grey = ["color=gray" in options for options in re.findall(r"S\[(.*?)\]", text)]
        assert grey == sorted(grey) and sum(grey) == columns
        assert f"\\multicolumn{{{columns}}}{{c}}{{Published, ViT-L/16 on ImageNet-1K}}" in text
    assert "Grey: Printed by others" in second


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
    exports = {
        name: export(view, tables) for name, (_, export) in FORMATS.items() if name != "parquet"
    }
    html = render_html(view)
    for made in (*exports.values(), html, render_text(view)):
        acted_on = {c for c in made if unicodedata.category(c) in ("Cc", "Cf", "Zl", "Zp")}
        assert acted_on <= {"\n", "\t"}
    for row in csv.DictReader(io.StringIO(exports["csv"])):
        assert not [cell for cell in row.values() if re.match(r"\s*[=+\-@＝]", cell)]
    assert exports["csv"].splitlines()[1].startswith('"')  # where ";" parts columns, too
    assert (html.count("<script"), html.count("<b>x")) == (2, 0)
    body = exports["latex"].split(r"\midrule")[1]
    assert not re.search(r"\\\\\s*[\[*]", body)
    assert r"\end{document}" not in exports["latex"]
    rows = [line for line in exports["markdown"].splitlines() if line.startswith("| ")]
    assert len({len(re.findall(r"(?<!\\)\|", line)) for line in rows}) == 1
    assert json.loads(exports["json"])["tables"][0]["title"] == text


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


PAPER = r"""\documentclass[twocolumn]{article}
\usepackage[utf8]{inputenc}
\usepackage{booktabs,siunitx,graphicx,xcolor}
\begin{document}
See Table~\ref{tab:paper-table-digits-1}.
\input{t}
\end{document}
"""


@pytest.mark.needs("pdflatex")
@pytest.mark.needs("siunitx.sty")
@pytest.mark.parametrize(
    "make",
    [digits_view, search_view, wide_view, lambda: foreign_view(NASTY)],
)
def test_latex_is_a_fragment_for_a_paper_of_two_columns(make, tmp_path: Path) -> None:
    view = make()
    text = to_latex(view, build_tables(view), published=True)
    (tmp_path / "t.tex").write_text(text, encoding="utf-8")
    (tmp_path / "paper.tex").write_text(PAPER, encoding="utf-8")
    command = ["pdflatex", "-interaction=nonstopmode", "-halt-on-error", "paper.tex"]
    for _ in range(2):
        done = subprocess.run(command, cwd=tmp_path, capture_output=True, timeout=120, check=False)
        assert done.returncode == 0, done.stdout.decode(errors="replace")[-2000:]
    log = (tmp_path / "paper.log").read_text(errors="replace")
    assert "Overfull" not in log
    assert "There were undefined references" not in log
