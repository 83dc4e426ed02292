"""Reports of a suite: terminal text, the HTML page, exports, comparison, checks."""

from __future__ import annotations

import json
import logging
import re
import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

from bench.errors import UserError, require_writable, short, writing
from bench.plan.stage import Plan
from bench.report.frames import build_view
from bench.report.results import measured_in, read_results, stored_results
from bench.store.store import Store
from maect.files import write_atomic
from reports.figures.all import all_figures
from reports.formats.exports import FORMATS, plain_against, plain_report
from reports.formats.html import extract_suite, render_html
from reports.formats.text import against_text, render_text
from reports.frames import SuiteView
from reports.tables.against import Against, hold, measured
from reports.tables.build import build_tables
from reports.tables.compare import side_by_side
from reports.tables.model import Table


def write_report(
    command: str,
    *sides: tuple[Plan, Store],
    exports: Sequence[str] = (),
    show: str = "text",
    output: Path | None = None,
) -> SuiteView:
    """Print the tables; write the page and what else is asked for beside it. Return its data.

    Of two `sides`, a suite's plan in two stores, the second stands beside the first. `show` says
    what is printed: "text", the "table" with the sentence on the result, "json" (tables, failures
    and problems) or "nothing". The page goes to `output`, or into that folder. Raises `UserError`
    where what was asked for cannot be written; without the store's own page it does.
    """
    names = [store.root.name for _, store in sides]
    files = _Files(*sides[0], output, exports, beside=names[1:])
    view, *others = (build_view(plan, store, command) for plan, store in sides)
    for other in others:
        alike = names[0] == names[1]
        one, beside = (store.name for _, store in sides) if alike else names
        view = side_by_side(view, other, (one, beside))
    tables = build_tables(view)
    if show == "json":
        found = {"failures": view.failures.to_dicts(), "problems": view.problems}
        print(json.dumps(plain_report(view, tables) | found, indent=1, default=str))
    elif show != "nothing":
        print(render_text(view, tables, brief=show == "table"))
    files.write(view, tables, told=show == "text")
    return view


def tell_against(
    command: str,
    side: tuple[Plan, Store],
    *other: tuple[Plan, Store],
    results: Path,
    as_json: bool,
    output: Path | None = None,
) -> tuple[SuiteView, Against]:
    """Print how far a suite's tables reproduce a file of results, or the suite in an `other` store.

    Return the suite's data and what was found; with `output` the page says so too. Raises
    `UserError` where the reference cannot be read, or has none of its rows and columns, or the page
    cannot be written.
    """
    files = _Files(*side, output) if output else None
    stored = [stored_results(str(results), build_view(*one, command)) for one in other]
    reference = stored[0] if stored else read_results(results)
    view = build_view(*side, command)
    tables = build_tables(view)
    if measured(tables).keys().isdisjoint(reference.cells):
        what = f" It says: {short(reference.what)}" if reference.what else ""
        message = f"it has no row and column of suite {view.suite}; is it of another?{what}"
        raise UserError(message, file=results)
    found = hold(tables, measured_in(view), reference)
    print(json.dumps(plain_against(found), indent=1) if as_json else against_text(found))
    if files is not None:
        files.write(view, tables, told=not as_json, against=found)
    return view, found


def write_figures(folder: Path, view: SuiteView, formats: Sequence[str]) -> int:
    """Write each panel of a view's figures to a folder. Return how many files.

    Raises `UserError` where matplotlib is missing, there is nothing to draw, or the folder cannot
    be written.
    """
    logging.getLogger("matplotlib").setLevel(logging.ERROR)  # it tells of its font cache
    try:
        from reports.figures.paper import drawn
    except ModuleNotFoundError:
        needs = "figures need matplotlib: pip install 'maect-bench[figures]'"
        raise UserError(needs) from None
    figures = all_figures(view, build_tables(view))
    if not figures:
        raise UserError(f"nothing of suite {view.suite} can be drawn yet; run it first")
    panels = [(one, n, panel) for one in figures for n, panel in enumerate(one.panels, 1)]
    for one, number, panel in panels:
        for suffix in formats:
            path = folder / f"{one.id}-{number}.{suffix}"
            data = drawn(one, panel, suffix)
            with writing(path):
                folder.mkdir(parents=True, exist_ok=True)
                write_atomic(path, data)
    return len(panels) * len(formats)


class _Files:
    """What a report leaves: the page and its exports. Tried out before anything is computed."""

    def __init__(
        self,
        plan: Plan,
        store: Store,
        output: Path | None,
        exports: Sequence[str] = (),
        beside: Sequence[str] = (),
    ) -> None:
        name = re.sub(r"[^\w.-]+", "_", f"{plan.suite.name}-{plan.suite.profile}")[:100]
        name += "".join(f"-beside-{other[:100]}" for other in beside)
        page = store.pages / f"{name}.html"
        if output is not None:
            page = output / page.name if output.is_dir() else output
        self.paths = {"report": page}
        self.paths |= {name: page.with_suffix(FORMATS[name][0]) for name in exports}
        if page in [self.paths[name] for name in exports]:
            raise UserError(
                f"the page and an export would both be {page}; name it {page.stem}.html"
            )
        self.asked = bool(output or exports)
        for path in self.paths.values():
            with self._told(path):
                path.parent.mkdir(parents=True, exist_ok=True)
                require_writable(path)

    @contextmanager
    def _told(self, path: Path) -> Iterator[None]:
        """Say that a file cannot be written. Raises `UserError` where it was asked for."""
        try:
            with writing(path, "--output"):
                yield
        except UserError as error:
            if self.asked:
                raise
            print(f"no page: {error}", file=sys.stderr)
            self.paths = {}  # it was the page alone

    def write(
        self,
        view: SuiteView,
        tables: list[Table],
        *,
        told: bool,
        against: Against | None = None,
    ) -> None:
        """Write the page and the exports, as far as they can be written."""
        for name, path in self.paths.items():
            export = FORMATS[name][1] if name in FORMATS else None
            data = export(view, tables) if export else render_html(view, tables, against)
            with self._told(path):
                write_atomic(path, data.encode() if isinstance(data, str) else data)
                if told:
                    print(f"{name}: {path}")


def extract(path: Path) -> str:
    """Return the resolved suite that a page embeds. Raises `UserError`."""
    try:
        return extract_suite(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise UserError(f"no suite can be had from it: {error}", file=path) from None
