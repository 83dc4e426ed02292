"""Reports of a suite: terminal text, the HTML page, exports, comparison, checks."""

from __future__ import annotations

import json
import re
from collections.abc import Sequence
from pathlib import Path

from bench.errors import UserError
from bench.plan.planner import make_plan
from bench.plan.stage import Plan
from bench.report.frames import build_view
from bench.store.files import write_atomic
from bench.store.store import Store
from bench.suite.schema import Suite
from reports.facts import Facts
from reports.formats.exports import FORMATS, plain_tables
from reports.formats.html import extract_suite, render_html
from reports.formats.text import render_text
from reports.frames import SuiteView
from reports.tables.build import build_tables
from reports.tables.check import check
from reports.tables.compare import side_by_side


def page_path(plan: Plan, store: Store) -> Path:
    """Return where a suite's page goes; its name is the suite's, made safe for a file."""
    name = re.sub(r"[^\w.-]+", "_", f"{plan.suite.name}-{plan.suite.profile}")
    return store.root / "reports" / f"{name[:100]}.html"


def write_report(
    plan: Plan,
    store: Store,
    command: str,
    exports: Sequence[str] = (),
    *,
    as_json: bool = False,
) -> SuiteView:
    """Print the tables; write the page and what else is asked for beside it. Return its data.

    With `as_json` tables and failures are printed as JSON, and nothing else.
    """
    view = build_view(plan, store, command)
    _write(view, page_path(plan, store), exports, as_json=as_json)
    return view


def _write(
    view: SuiteView, path: Path, exports: Sequence[str] = (), *, as_json: bool = False
) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    facts = Facts(view)
    tables = build_tables(view, facts)
    write_atomic(path, render_html(view, facts, tables).encode())
    said = [f"\nreport: {path}"]
    for name in exports:
        suffix, export = FORMATS[name]
        data = export(tables)
        target = path.with_suffix(suffix)
        write_atomic(target, data.encode() if isinstance(data, str) else data)
        said.append(f"{name}: {target}")
    if as_json:
        found = {"tables": plain_tables(tables), "failures": view.failures.to_dicts()}
        print(json.dumps(found, indent=1))
    else:
        print("\n".join([render_text(view, facts, tables), *said]))


def compare(suite: Suite, stores: tuple[Store, Store], only: str, command: str) -> None:
    """The same suite of two stores side by side, written into the first."""
    plans = [make_plan(suite, store, keep_stale=True, only=only) for store in stores]
    names = (str(stores[0].root.name), str(stores[1].root.name))
    if names[0] == names[1]:
        names = (str(stores[0].root), str(stores[1].root))
    views = [build_view(p, s, command) for p, s in zip(plans, stores, strict=True)]
    path = page_path(plans[0], stores[0])
    both = side_by_side(views[0], views[1], names)
    _write(both, path.with_name(f"{path.stem}-beside-{stores[1].root.name}.html"))


def problems(view: SuiteView) -> list[str]:
    """Return what speaks against publishing the table."""
    return check(view)


def extract(path: Path) -> str:
    """Return the resolved suite that a page embeds. Raises `UserError`."""
    try:
        return extract_suite(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise UserError(f"no suite can be had from it: {error}", file=path) from None
