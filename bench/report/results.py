"""Files of results: the tables of a run with all values by seed, which later runs compare with."""

from __future__ import annotations

import json
import math
import re
from pathlib import Path
from statistics import fmean, stdev
from typing import Any

from bench.errors import UserError, nearest_file, reason, writing
from bench.store.files import read_json
from maect.files import write_atomic
from reports.frames import SuiteView
from reports.tables.against import Reference, measured
from reports.tables.build import build_tables
from reports.tables.model import Cell, Table, Value

#: decimals of a value, and of means and spreads
_VALUE, _MEAN = 3, 2


def read_results(path: Path) -> Reference:
    """Return the metrics in a file of results. Raises `UserError` where it is none."""
    try:
        content = read_json(path.resolve())
        cells = {
            (row, column): _cell(**cell)
            for table in content["tables"]
            for row, columns in table["rows"].items()
            for column, cell in columns.items()
            if not column.startswith("cost.")
        }
        environment = _origin(dict(content.get("environment", {})), content.get("commit"))
    except OSError as error:
        near = nearest_file(path) or "; name a file of results, or a store"
        raise UserError(f"{path} cannot be read: {reason(error)}{near}") from None
    except (ValueError, TypeError, LookupError, AttributeError, ArithmeticError):
        written = "python -m bench export SUITE --results --to FILE"
        message = f"it holds no results of a suite; such a file is written by: {written}"
        raise UserError(message, file=path) from None
    # as many as the longest of all metrics: 96.2 may stand for 96.200
    values = [repr(value.value) for cell in cells.values() for value in cell.values]
    decimals = [len(text.removesuffix(".0").partition(".")[2]) for text in values]
    what = str(content.get("what", ""))
    return Reference(str(path), what, cells, environment, max(decimals, default=0))


def _cell(values: list[float], seeds: list[int] | None = None, **_: Any) -> Cell:
    """Return a cell as a file has it: values of seeds 0, 1, ... unless it names others.

    One value may be that of several seeds. Raises ValueError or TypeError where it is no cell.
    """
    numbers = [value + 0.0 for value in values]
    seeds = list(range(len(numbers))) if seeds is None else seeds
    by_seed = [(seed,) for seed in seeds] if len(numbers) > 1 else [tuple(seeds)]
    if not all(abs(number) < 1e100 for number in numbers) or len({*seeds}) < len(seeds):
        raise ValueError("a value is no number, or two values are of one seed")
    found = tuple(Value(s, v, ()) for s, v in zip(by_seed, numbers, strict=True))
    return Cell("ok", found, fmean(numbers), stdev(numbers) if len(numbers) > 1 else None)


def stored_results(name: str, view: SuiteView) -> Reference:
    """Return the metrics of a suite in a store."""
    cells = {at: cell for at, (_, cell) in measured(build_tables(view)).items() if cell.valued}
    return Reference(name, _what(view), cells, measured_in(view))


def measured_in(view: SuiteView) -> dict[str, Any]:
    """Return the environment of a suite's records, and the commit of the code."""
    return _origin(view.provenance["environment"], view.provenance["commit"])


def _origin(environment: dict[str, Any], commit: object) -> dict[str, Any]:
    return environment | ({"commit": str(commit)[:7]} if commit else {})


def _what(view: SuiteView) -> str:
    first, last = min(view.seeds), max(view.seeds)
    in_order = view.seeds == [*range(first, last + 1)] and first < last
    seeds = f"{first} to {last}" if in_order else ", ".join(map(str, view.seeds))
    return f"suite {view.suite}, profile {view.profile}, seeds {seeds}"


def write_results(path: Path, view: SuiteView) -> None:
    """Write the tables of a view, a cell a line.

    Raises `UserError` where no metric has a value, or the file cannot be written.
    """
    tables = build_tables(view)
    if not any(cell.valued for _, cell in measured(tables).values()):
        raise UserError(f"nothing of suite {view.suite} is measured yet; run it first")
    took = [run["wall_s"] for run in view.runs]
    content = {
        "what": _what(view),
        "commit": view.provenance["commit"],
        "command": view.runs[-1]["command"] if view.runs else view.provenance["command"],
        "environment": {k: v for k, v in view.provenance["environment"].items() if k != "host"},
        "run": {
            "wall_s": None if None in took else round(math.fsum(took)),
            "stages": view.stages["key"].n_unique(),
        },
        "tables": [{"title": table.title, "rows": _rows(table)} for table in tables],
    }
    # a cell is the only mapping that begins with a mean
    text = re.sub(
        r'\{\s+("mean":[^{}]*\])\s+\}',
        lambda cell: "{" + " ".join(cell[1].split()) + "}",
        json.dumps(content, indent=1),
    )
    with writing(path):
        write_atomic(path, f"{text}\n".encode())


def _rows(table: Table) -> dict[str, dict[str, Any]]:
    """Return the cells of a table that have a value; one value may be that of several seeds."""
    return {
        row.variant: {
            column.id: {
                "mean": round(cell.mean, _MEAN),
                "sd": None if cell.sd is None else round(cell.sd, _MEAN),
                "n": cell.n,
                "values": [round(value.value, _VALUE) for value in cell.values],
                "seeds": [seed for value in cell.values for seed in value.seeds],
            }
            for column in table.columns
            if (cell := table.cell(row, column)).valued and cell.mean is not None
        }
        for row in table.rows
    }
