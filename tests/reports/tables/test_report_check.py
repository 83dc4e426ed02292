"""`report --check`: each reason to doubt a table is found and named."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import polars as pl
import pytest
from report_views import full_view, key_of, metric, stage, view_of

from reports.formats.html import render_html
from reports.tables.build import build_tables
from reports.tables.check import check
from reports.tables.compare import side_by_side


def changed(key: str, **changes: Any):
    """The full view with one record changed."""
    view = full_view()
    told = view.records[key] | changes
    of_key = pl.col("key") == key
    columns = {"code": told["code"]["hash"], "torch": told["env"].get("torch")}
    columns |= {"device_model": told.get("model", "Xeon")}
    stages = view.stages.with_columns(
        pl.when(of_key).then(pl.lit(value)).otherwise(name).alias(name)
        for name, value in columns.items()
    )
    return replace(view, stages=stages, records=view.records | {key: told})


def test_a_finished_suite_has_no_problem() -> None:
    assert check(full_view()) == []


def test_open_cells_are_named() -> None:
    view = full_view()
    failed = key_of("probe", "MAE-CT", 1)
    stages = view.stages.with_columns(
        pl.when(pl.col("key") == failed).then(pl.lit("failed")).otherwise("status").alias("status")
    )
    (problem,) = check(replace(view, stages=stages))
    assert problem.startswith("MAE-CT, linear probe: short")
    assert "seed 1 failed" in problem


@pytest.mark.parametrize(
    ("kind", "changes", "expected"),
    [
        ("knn", {"code": {"hash": "other"}}, "k-NN (k=10): its knn stages mix code"),
        (
            "knn",
            {"model": "EPYC"},
            "k-NN (k=10): its knn stages mix hardware: Xeon (15 stages), EPYC",
        ),
        ("knn", {"cost": {"device_model": "A100"}}, None),
        ("tune", {"code": {"hash": "other"}}, "k-NN (k=10): its tune stages mix code"),
        ("tune", {"env": {"torch": "2.99"}}, "k-NN (k=10): its tune stages mix torch"),
    ],
)
def test_mixed_code_and_place_are_named(kind: str, changes: dict, expected: str | None) -> None:
    found = check(changed(key_of(kind, "MAE-CT", 1), **changes))
    assert [p for p in found if expected and p.startswith(expected)] or not (expected or found)


def test_numbers_chosen_on_the_test_split_are_named() -> None:
    key = key_of("probe", "MAE", 0)
    found = check(changed(key, protocol={"split": "test", "lr_selected_on": "test"}))
    assert found == ["linear probe: these numbers were selected on the test split"]


@pytest.mark.parametrize(
    "said", [{"metric": "accuracy_test_selected"}, {"label": "ACC, best run by test labels"}]
)
def test_metrics_that_say_so_are_test_selected(said: dict[str, str]) -> None:
    row = stage(key_of(0), "probe", "A", 0)
    values = [metric("A", 0, row["key"], 90.0, "probe", **said)]
    (problem,) = check(view_of([row], values, tables=[{"title": "T", "columns": ["probe"]}]))
    assert "selected on the test split" in problem


def test_problems_of_the_store_are_passed_on() -> None:
    assert check(full_view(problems=["record x is corrupt"])) == ["store: record x is corrupt"]


def test_two_runs_side_by_side() -> None:
    a, b = full_view(), full_view()
    better = b.metrics.with_columns(pl.col("value") + 1.0)
    both = side_by_side(a, replace(b, metrics=better), ("before", "after"))
    table = build_tables(both)[0]
    assert [row.variant for row in table.rows[4:6]] == ["MAE (before)", "MAE (after)"]
    assert [row.group for row in table.rows[4:6]] == ["MAE", "MAE"]
    before, after = (table.cells[f"MAE ({name})", "knn"] for name in ("before", "after"))
    assert before.mean is not None
    assert after.mean == pytest.approx(before.mean + 1.0)
    assert "before: digits" not in render_html(both)
    inputs = [i for key in both.by_key for i in both.record(key)["inputs"].values()]
    assert inputs
    assert all(given["key"] in both.by_key for given in inputs)
    assert len(set(both.stages["key"])) == 2 * len(set(a.stages["key"]))
