"""The report as one offline HTML file: no request, readable without JavaScript."""

from __future__ import annotations

import base64
import hashlib
import json
import re
from collections import Counter
from dataclasses import replace
from functools import partial
from typing import Any

from jinja2 import Environment
from markupsafe import Markup, escape

from reports import display
from reports.display import fixed, plain, plural, short, time_unit
from reports.figures import palette
from reports.figures.all import all_figures
from reports.figures.charts import with_unit
from reports.figures.gallery import gallery
from reports.figures.svg import plot, swatch
from reports.formats import records
from reports.formats.templates import FOLDER, environment
from reports.frames import DONE, SuiteView
from reports.tables import costs, findings
from reports.tables.against import Against
from reports.tables.build import build_tables
from reports.tables.costs import Ledger
from reports.tables.model import Cell, Column, Table, full_label, number, remark
from reports.tables.published import PUBLISHED

_SUITE = re.compile(r'<script type="application/json" id="suite">(.*?)</script>', re.DOTALL)

_RUN = ("started", "wall_s", "status", "command")


def render_html(
    view: SuiteView, tables: list[Table] | None = None, against: Against | None = None
) -> str:
    """Return the page. Every string of the view is escaped; scripts and styles are ours alone.

    `tables` are those of the view, where they are at hand; `against` is how far they reproduce a
    reference, where one is given.
    """
    tables = tables or build_tables(view)
    style, script = (FOLDER.joinpath(f).read_text("utf-8") for f in ("style.css", "script.js"))
    style += palette.style()
    ledger = costs.ledger(view)
    best = [findings.best_row(tables[0]), *findings.ranking(tables[0], view)[:1]]
    lead, *further = tables[0].headline or best
    grey = tables[0].published
    return (
        _environment()
        .get_template("page.html")
        .render(
            view=view,
            status=_status(view),
            lead=lead,
            further=further,
            answers=_answers(view, tables, ledger, against),
            tables=[_TableView(table, i, view) for i, table in enumerate(tables)],
            grey=grey and _TableView(grey, len(tables), view),
            figures=all_figures(view, tables),
            gallery=gallery(view.gallery),
            ledger=ledger,
            book=_book(ledger),
            published=PUBLISHED,
            runs=[{name: run.get(name) for name in _RUN} for run in view.runs],
            entries=list(records.entries(view)),
            full=records.FULL,
            style=Markup(style),
            script=Markup(script),
            policy=_policy(style, script),
            embedded={"suite": view.resolved, "provenance": view.provenance},
        )
    )


def extract_suite(html: str) -> str:
    """Return the resolved suite that a page embeds as YAML, its provenance behind it in comments.

    Raises ValueError if the page embeds none.
    """
    found = _SUITE.search(html)
    try:
        embedded = json.loads(found.group(1)) if found else {}
        suite, provenance = embedded["suite"], embedded["provenance"]
    except (ValueError, KeyError, TypeError):
        suite = provenance = None
    if not isinstance(suite, str):
        raise ValueError("this file embeds no suite: it is no report, or it was changed")
    told = records.outline({"provenance": provenance}).splitlines()
    return suite + "".join(f"# {line}\n" for line in told)


def _environment() -> Environment:
    made = environment(_finalize, autoescape=True)
    made.policies["json.dumps_kwargs"] = {"default": str}
    for name in ("duration", "tail", "amount", "slug", "signed", "fixed"):
        made.filters[name] = getattr(display, name)
    made.filters |= {"remark": remark, "codes": _codes}
    made.filters["middle"] = partial(display.middle, limit=80)
    made.globals |= {"plural": plural, "record_anchor": records.anchor}
    made.globals |= {"needed_text": findings.needed_text, "plot": plot, "swatch": swatch}
    return made


def _finalize(value: Any) -> Any:
    """Return what is printed of a value: no control characters; markup of ours as it is."""
    if value is None:
        return "–"
    if isinstance(value, bool):
        return "yes" if value else "no"
    return plain(value) if isinstance(value, str) and not isinstance(value, Markup) else value


def _codes(text: str) -> Markup:
    """Return a sentence of ours, escaped, with what stands between backticks as code."""
    return Markup(re.sub(r"`([^`]+)`", r"<code>\1</code>", str(escape(plain(text)))))


def _policy(style: str, script: str) -> str:
    """Return the policy: nothing from outside, no script or style but the two of the page."""

    def hashed(text: str) -> str:
        return f"'sha256-{base64.b64encode(hashlib.sha256(text.encode()).digest()).decode()}'"

    return (
        f"default-src 'none'; img-src data:; style-src {hashed(style)}; script-src {hashed(script)}"
    )


def _status(view: SuiteView) -> str:
    """Return "44 stages, all complete", or what is still open."""
    counts = Counter(view.distinct["status"].to_list())
    total = sum(counts.values())
    done = sum(counts[status] for status in DONE)
    if done == total:
        stale = f", {counts['stale']} of them by other code" if counts["stale"] else ""
        return f"{plural(total, 'stage')}, all complete{stale}"
    rest = ", ".join(f"{n} {status}" for status, n in counts.items() if status not in DONE)
    return f"{done} of {plural(total, 'stage')} complete; {rest}"


def _answers(
    view: SuiteView, tables: list[Table], ledger: Ledger, against: Against | None
) -> dict[str, str]:
    """Return what stands under the lead: what it cost, at which scale, what to bear in mind."""
    caveats = "; ".join(findings.caveats(tables[0], view))
    told = {
        "Cost": costs.in_short(ledger, tables),
        "Scale": short(view.scale, 300),
        "Caveat": f"{caveats[:1].upper()}{caveats[1:]}." if caveats else "",
    }
    if against is not None:
        name = short(against.reference.name, 100)
        told["Against"] = f"{against.sentence[:1].upper()}{against.sentence[1:]} ({name})"
    return {name: text for name, text in told.items() if text}


class _TableView:
    """A table with what only the page needs: anchors, markup of cells, header cells."""

    def __init__(self, table: Table, index: int, view: SuiteView) -> None:
        self.table, self.index, self.view = table, index, view
        self.columns = {column.id: column for column in table.columns}
        self.bold = findings.how_tested(table)
        self.findings = findings.findings(table, view)
        #: (row, column) -> id of the cell's line among the values by seed
        self.anchors = {
            (row.variant, column.id): f"v-{index}-{i}-{j}"
            for i, row in enumerate(table.rows)
            for j, column in enumerate(table.columns)
        }
        self.crossed = [_TableView(one, index, view) for one in table.crossed]
        for crossed in self.crossed:
            origins = crossed.table.origins
            crossed.anchors = {at: self.anchors[origin] for at, origin in origins.items()}
        self.spread = {
            column.id
            for row in table.rows
            for column in table.metrics
            if table.cell(row, column).sd is not None
        }

    def named(self, column: Column) -> str:
        """Return the column's name and unit, where its header does not stand above it."""
        return with_unit(replace(column, label=short(full_label(column), 60)))

    def number(self, cell: Cell, column: Column) -> Markup:
        """Return the number with its spread set apart, so that means line up below each other."""
        text = number(cell, column)
        if not text or column.id not in self.spread:
            return Markup("{}").format(text)
        mean, _, sd = text.partition(" ± ")
        spread = f" ± {sd}" if sd else ""
        return Markup('{}<span class="sd">{}</span>').format(mean, spread)

    def images(self, cell: Cell, column: Column) -> str:
        """Return the spread that the images measured on give a cell, seeds apart."""
        found = findings.sampling_error(self.view, column, cell)
        return "" if found is None else f"± {fixed(found[0], column.digits)} ({found[1]})"


def _book(ledger: Ledger) -> dict[str, Any]:
    """Return what the printed ledger has: lines, a unit for each kind of device, columns.

    `quantities` are those that some line has; `unmeasured` says why the suite's whole lacks others.
    """
    apart = [line for line in ledger.lines if line.apart]
    lines = [*(line for line in ledger.lines if not line.apart), ledger.total, *apart]
    whole = [(q, *ledger.total.measured(q)) for q in costs.QUANTITIES]
    total = ledger.total.hours
    kinds = {kind: total.get(kind, 0.0) for kind in sorted({k for x in lines for k in x.hours})}
    return {
        "lines": lines,
        "units": {kind: time_unit(max(hours, 1e-9)) for kind, hours in kinds.items()},
        "quantities": [
            q for q in costs.QUANTITIES if any(x.measured(q)[0] is not None for x in lines)
        ],
        # of attempts that held one device each, the sum of wall time is their device time
        "wall": any(abs(line.wall_s - 3600 * sum(line.hours.values())) > 1e-3 for line in lines),
        "unmeasured": [f"{q.label}: blank ({why})." for q, value, why in whole if value is None],
    }
