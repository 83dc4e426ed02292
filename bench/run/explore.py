"""Searches that explore: not every cell is tried, and not every one of those to its end.

Cells compete on the selection split, seed after seed: after each the search goes on with some and
stops others. What was left out stands in the run's record, so that a finished search stays so.
"""

from __future__ import annotations

from collections import Counter
from typing import Any

from bench.plan.stage import Plan
from bench.plan.status import UNTRIED


def of_cells(plan: Plan) -> dict[str, list[str]]:
    """Keys of the stages that rows of the search alone need, with those rows' names."""
    users: dict[str, dict[str, None]] = {}
    for row in plan.rows:
        for stage in row.stages():
            users.setdefault(stage.key, {})[row.variant.name] = None
    cells = plan.suite.cells.keys()
    return {key: list(names) for key, names in users.items() if names.keys() <= cells}


def why_left_out(labels: list[str], tried: dict[str, int], seeds: int) -> str:
    """Of a stage that these cells need; `tried` has the seeds that each cell came to."""
    most = max((tried.get(label, 0) for label in labels), default=0)
    if not most:
        return UNTRIED
    return f"stopped after {most} of {seeds} seeds by ASHA, others did better"


def untried(plan: Plan) -> set[str]:
    """Names of the cells that the search never came to; they are no rows of the report."""
    tried = {
        row.variant.name
        for row in plan.rows
        if any(s.status != "pruned" or s.reason != UNTRIED for s in row.evaluations.values())
    }
    return {row.variant.name for row in plan.rows} - tried


def note(plan: Plan) -> list[str]:
    """What kind of search made the rows, in a sentence."""
    suite = plan.suite
    if suite.search is None:
        return []
    count, method = len(suite.cells), suite.search.method
    how = {
        "grid": "every combination",
        "each": "one setting changed at a time",
        "random": f"combinations drawn at random, seed {suite.search.seed}",
        "optuna": f"combinations chosen by Optuna (TPE, seed {suite.search.seed})",
    }[method]
    if not suite.search.explores:
        return [f"Search: {count} cells, {how}; every one of them is run to its end."]
    states: dict[str, Any] = {}
    for row in plan.rows:
        if row.variant.name in suite.cells:
            pruned = {s.reason for s in row.evaluations.values() if s.status == "pruned"}
            states.setdefault(row.variant.name, set()).update(pruned)
    left = Counter("untried" if UNTRIED in s else "stopped" if s else "" for s in states.values())
    text = f"Exploration: {how}, compared by {suite.search.metric} on the selection split"
    if suite.search.asha:
        text += ", seed after seed (ASHA)"
    text += f". {count - left['untried']} of {count} cells were tried, {left['stopped']} of them "
    text += "stopped early; their cost is in the ledger. Such figures choose settings: what is "
    text += "chosen is to be run with seeds of its own and reported on the test split."
    return [text]
