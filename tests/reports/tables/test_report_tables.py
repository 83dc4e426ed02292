"""Aggregation and states of cells, against numbers worked out by hand."""

from __future__ import annotations

import math
import re
from dataclasses import replace

import polars as pl
import pytest
from report_views import full_view, key_of, metric, record, stage, view_of
from rich.cells import cell_len

from reports.formats.exports import to_frame, to_latex, to_markdown
from reports.formats.html import render_html
from reports.formats.text import render_text, table_text
from reports.tables import published
from reports.tables.build import build_tables
from reports.tables.model import cell_text

TABLE = [{"title": "T", "rows": None, "columns": ["knn"], "baseline": None}]


def one_row(*stages: tuple[str, float | None], **changes: object):
    """A view of one row; a stage a seed, each (status, value)."""
    rows, metrics = [], []
    for seed, (status, value) in enumerate(stages):
        key = key_of("knn", seed)
        reason = "out of memory" if status == "failed" else None
        rows.append(stage(key, "knn", "A", seed, status=status, reason=reason))
        if value is not None:
            metrics.append(metric("A", seed, key, value))
    return view_of(rows, metrics, tables=TABLE, **changes)


def cell_of(view, variant: str = "A", column: str = "knn"):
    return build_tables(view)[0].cells[variant, column]


def test_mean_and_sd_over_seeds() -> None:
    table = build_tables(full_view())[0]
    cell = table.cells["MAE", "knn"]
    assert cell.n == 3
    assert cell.mean == pytest.approx((94.6 + 91.4 + 94.2) / 3)
    # deviations 1.2, -2.0, 0.8: squares sum to 6.08, over n - 1 = 2
    assert cell.sd == pytest.approx(math.sqrt(3.04))
    assert cell_text(cell, table.columns[0]) == "93.4 ± 1.7"
    assert cell.keys == tuple(key_of("knn", "MAE", seed) for seed in (0, 1, 2))


def test_a_stage_shared_by_all_seeds_counts_once() -> None:
    table = build_tables(full_view())[0]
    cell = table.cells["raw pixels", "knn"]
    assert (cell.n, cell.sd, cell.fixed, cell.state) == (1, None, True, "ok")
    assert cell_text(cell, table.columns[0]) == "96.6"
    assert "raw pixels: the same for all seeds, so n = 1, no spread." in table.notes


@pytest.mark.parametrize(
    ("stages", "state", "text"),
    [
        ([("complete", 90.0), ("complete", 92.0)], "ok", "91.0 ± 1.4"),
        ([("complete", 90.0), ("failed", None)], "short", "90.0 (1 of 2)"),
        ([("complete", 90.0), ("pending", None)], "short", "90.0 (1 of 2)"),
        ([("failed", None), ("pending", None)], "failed", "failed"),
        ([("running", None), ("pending", None)], "running", "running"),
        ([("interrupted", None), ("pending", None)], "interrupted", "interrupted"),
        ([("pending", None), ("pending", None)], "pending", "pending"),
        ([("stale", 90.0), ("complete", 92.0)], "stale", "91.0 ± 1.4 (stale)"),
        ([("stale", None), ("stale", None)], "stale", "stale"),
        ([("complete", None), ("complete", None)], "missing", "missing"),
        ([("complete", math.nan), ("complete", 92.0)], "not finite", "not finite"),
        # a value left by an earlier attempt of a stage that is running again does not count
        ([("running", 90.0), ("complete", 92.0)], "short", "92.0 (1 of 2)"),
    ],
)
def test_states_are_told_apart(stages: list, state: str, text: str) -> None:
    view = one_row(*stages)
    table = build_tables(view)[0]
    assert table.cells["A", "knn"].state == state
    assert cell_text(table.cells["A", "knn"], table.columns[0]) == text


def test_a_failed_cell_gives_its_reason() -> None:
    view = one_row(("failed", None))
    assert "seed 0 failed: out of memory" in (cell_of(view).reason or "")
    assert "out of memory" in render_text(view)


def test_open_seeds_are_told_together() -> None:
    view = one_row(("pending", None), ("failed", None), ("pending", None))
    assert cell_of(view).reason == "seeds 0, 2 pending; seed 1 failed: out of memory"


def test_an_evaluation_that_is_not_planned_is_a_dash() -> None:
    view = one_row(("complete", 90.0))
    view.tables = [{"title": "T", "columns": ["probe"]}]
    table = build_tables(view)[0]
    assert table.cells["A", "probe"].state == "not planned"
    assert cell_text(table.cells["A", "probe"], table.columns[0]) == "–"


def test_two_protocols_never_share_a_column() -> None:
    rows, metrics = [], []
    for variant, protocol in (("A", "p1"), ("B", "p1"), ("C", "p2")):
        key = key_of(variant)
        rows.append(stage(key, "knn", variant, 0))
        metrics.append(metric(variant, 0, key, 90.0, protocol=protocol))
    table = build_tables(view_of(rows, metrics, tables=TABLE))[0]
    assert [table.cells[v, "knn"].state for v in "ABC"] == ["ok", "ok", "mixed protocols"]
    assert cell_text(table.cells["C", "knn"], table.columns[0]) == "mixed protocols"
    assert table.columns[0].protocol == "p1"
    assert len(table.problems) == 1
    assert "p2" in table.problems[0]


def test_protocols_named_as_different_columns_stand_side_by_side() -> None:
    rows, metrics = [], []
    for column, protocol in (("probe", "cached"), ("probe_fresh", "augmented")):
        for variant in ("A", "B"):
            key = key_of(variant, column)
            rows.append(stage(key, column, variant, 0))
            metrics.append(metric(variant, 0, key, 90.0, column, protocol=protocol))
    tables = [{"title": "T", "columns": ["probe", "probe_fresh"]}]
    table = build_tables(view_of(rows, metrics, tables=tables))[0]
    assert {cell.state for cell in table.cells.values()} == {"ok"}
    assert [column.protocol for column in table.columns] == ["cached", "augmented"]
    assert not table.problems


def test_seeds_of_different_protocols_make_no_mean() -> None:
    rows = [stage(key_of(s), "knn", "A", s) for s in (0, 1)]
    metrics = [metric("A", s, key_of(s), 90.0, protocol=f"p{s}") for s in (0, 1)]
    (exported,) = to_frame(build_tables(view_of(rows, metrics, tables=TABLE))).to_dicts()
    assert [exported[n] for n in ("state", "value")] == ["mixed protocols", None]


def test_the_spread_over_draws_stands_beside_the_one_over_seeds() -> None:
    rows, metrics = [], []
    for seed, draws in enumerate(([60.0, 70.0, 80.0], [62.0, 72.0, 88.0])):
        row = stage(key_of(seed), "low_shot", "A", seed)
        row["record"] = record(row, summary={"draws": {"accuracy_1": draws}})
        rows.append(row)
        told = {"metric": "accuracy_1", "label": "1-shot"}
        metrics.append(metric("A", seed, row["key"], sum(draws) / 3, "low_shot", **told))
    view = view_of(rows, metrics, tables=[{"title": "T", "columns": ["low_shot"]}])
    table = build_tables(view)[0]
    # over seeds 70 and 74; over draws 61, 71, 84, whose squares about 72 sum to 266, over n - 1 = 2
    assert table.cells["A", "low_shot"].draws_sd == pytest.approx(math.sqrt(133))
    for made in (
        render_text(view),
        to_markdown([table]).replace("\\", ""),
        to_latex(view, [table]),
    ):
        assert re.search(r"72\.0 .{1,5} 2\.8(\{\\,\{| )\[\}?11\.5", made)
    assert "over the draws of the labelled images" in table.notes[1]
    for told in ([[1.0, 2.0], [1.0]], ["x"], None, [[1.0]], [math.nan, 1.0]):
        for row in view.records.values():
            row["summary"] = {"draws": {"accuracy_1": told}}
        assert cell_of(view, column="low_shot").draws_sd is None


def test_rows_groups_and_digits_follow_the_declaration() -> None:
    declared = {
        "title": "T", "rows": ["MAE-CT", "MAE"], "columns": ["probe", "knn"], "digits": 2,
        "groups": {"ours": ["MAE-CT"], "before": ["MAE"], "frozen": ["probe", "knn"]},
    }  # fmt: skip
    table = build_tables(full_view(tables=[declared]))[0]
    assert [(row.variant, row.group) for row in table.rows] == [
        ("MAE-CT", "ours"), ("MAE", "before"),
    ]  # fmt: skip
    assert [(column.id, column.group) for column in table.columns] == [
        ("probe", "frozen"), ("knn", "frozen"),
    ]  # fmt: skip
    assert cell_text(table.cells["MAE", "knn"], table.columns[1]) == "93.40 ± 1.74"


def test_published_numbers_stand_apart_with_source_and_conflict() -> None:
    table = build_tables(full_view())[0]
    assert {column.kind for column in table.columns} == {"metric", "cost"}
    grey = table.published
    assert grey is not None
    cell = grey.cells["MAE-CT", "knn.published"]
    assert (grey.columns[0].kind, cell.mean) == ("published", 78.0)
    said = [grey.footnotes[mark] for mark in cell.marks]
    assert "README" in said[0]
    assert "80.2" in said[1]
    assert [row.variant for row in grey.rows] == ["MAE", "MAE-CT", "MAE-CT_aug"]
    assert "another scale" in grey.notes[0]


def test_published_numbers_are_of_the_very_metric() -> None:
    view = full_view()
    other_k = view.metrics.with_columns(pl.col("metric").replace("accuracy_k10", "accuracy_k20"))
    grey = build_tables(replace(view, metrics=other_k))[0].published
    assert grey is not None and [c.id for c in grey.columns] == ["probe.published"]


def test_other_methods_are_named_under_the_table_only() -> None:
    row = stage(key_of(0), "low_shot", "MAE", 0)
    values = [metric("MAE", 0, row["key"], 30.0, "low_shot", metric="accuracy_1", label="1-shot")]
    tables = [{"title": "T", "columns": ["low_shot"], "published": True}]
    grey = build_tables(view_of([row], values, tables=tables))[0].published
    assert grey is not None and grey.cells["MAE", "low_shot.published"].mean == 14.3
    assert any("Other methods, 1-shot: iBOT 48.5; Mugs 52.9" in n for n in grey.notes)


def test_published_numbers_of_the_same_model_are_no_mere_reference() -> None:
    grey, small = (
        build_tables(full_view(model=model))[0].published
        for model in ("vit_base_patch16", "vit_tiny_patch4")
    )
    assert grey is not None and small is not None
    assert grey.cells["MAE", "knn.published"].mean == 51.1
    assert "ViT-B/16 on ImageNet-1K" in grey.title
    assert "another scale" not in grey.notes[0]
    assert "another scale" in small.notes[0]


def test_a_row_is_matched_to_its_method_however_it_is_spelled() -> None:
    found = published.find("vit_large_patch16", "mae_ct AUG", "knn")
    assert found is not None
    assert found["value"] == 79.1
    assert published.find("vit_large_patch16", "MAE, compute-matched", "knn") is None


def test_open_cells_are_explained_once_for_rows_that_are_open_alike() -> None:
    rows, metrics = [], []
    for variant in ("A", "B", "C"):
        for column in ("knn", "probe"):
            key = key_of(variant, column)
            rows.append(stage(key, column, variant, 0, status="stale", reason="losses changed"))
            metrics.append(metric(variant, 0, key, 90.0, column))
    tables = [{"title": "T", "columns": ["knn", "probe"]}]
    (note,) = build_tables(view_of(rows, metrics, tables=tables))[0].notes
    assert note == (
        "all rows, k-NN (k=10), linear probe: stale (measured by other code: losses changed)"
    )
    rows[0] |= {"status": "complete", "reason": None}
    notes = build_tables(view_of(rows, metrics, tables=tables))[0].notes
    assert [note.split(": ")[0] for note in notes] == [
        "A, linear probe", "B; C, k-NN (k=10), linear probe"
    ]  # fmt: skip


def test_a_view_without_any_stage_renders() -> None:
    view = view_of([], [], variants=["A"], seeds=[0], tables=TABLE)
    assert build_tables(view)[0].cells["A", "knn"].state == "not planned"
    assert "digits 8x8" in render_text(view)


def test_terminal_lines_are_aligned_also_with_wide_characters() -> None:
    rows = [stage(key_of(v), "knn", v, 0) for v in ("表", "plain")]
    metrics = [metric(v, 0, key_of(v), 90.0) for v in ("表", "plain")]
    lines = render_text(view_of(rows, metrics, tables=TABLE)).splitlines()
    wide, narrow = (next(x for x in lines if x.startswith(v)) for v in ("表", "plain"))
    # the ideograph takes two columns of the terminal
    assert wide.index("90.0") + 1 == narrow.index("90.0")


@pytest.mark.parametrize("columns", [80, 100, 160])
def test_headings_are_whole_words_within_the_terminal(columns: int, monkeypatch) -> None:
    monkeypatch.setenv("COLUMNS", str(columns))
    key = key_of(0)
    label = "k-NN, k=10, block 1, mean of patches"
    metrics = [metric("A", 0, key, 90.0, name, label=label) for name in ("knn", "probe")]
    view = view_of([stage(key, "knn", "A", 0)], metrics, tables=[{"columns": ["knn", "probe"]}])
    lines = render_text(view).splitlines()
    assert max(map(cell_len, lines)) <= columns
    heads = [line for line in lines if "block" in line or "patches" in line]
    assert [line.split("  ")[-1].strip() for line in heads] == ["block 1, mean", "of patches"]
    assert not any("…" in line for line in lines)


def test_a_wide_table_goes_on_below_within_the_terminal() -> None:
    columns, variants = [f"metric{i}" for i in range(9)], ("A", "a row with a longer name")
    rows = [stage(key_of(v, c, s), c, v, s) for v in variants for c in columns for s in (0, 1)]
    metrics = [
        metric(v, s, key_of(v, c, s), 10.0 * i + s, c)
        for v in variants for i, c in enumerate(columns) for s in (0, 1)
    ]  # fmt: skip
    view = view_of(rows, metrics, tables=[{"title": "T", "columns": [*columns, "cost"]}])
    lines = table_text(build_tables(view)[0])
    assert max(map(cell_len, lines)) <= 100
    for name in variants:
        found = " ".join(line.removeprefix(name) for line in lines if line.startswith(name))
        assert [f"{10 * i}.5 ± 0.7" for i in range(9)] == re.findall(r"[\d.]+ ± [\d.]+", found)
    assert sum(line.startswith("A ") for line in lines) == 2


def test_a_grid_is_also_printed_by_its_settings() -> None:
    """Four queue sizes down, two augmentations across; each cell leads to its values by seed."""
    sizes, pipelines = ("128", "256", "512", "1024"), ("min", "aug")
    cells = {
        f"MAE-CT queue_size={q} augment={a}": {"queue_size": q, "augment": a}
        for q in sizes for a in pipelines
    }  # fmt: skip
    rows = [(v, seed, 90.0 + i + seed) for i, v in enumerate(["MAE", *cells]) for seed in (0, 1)]
    stages = [stage(key_of(v, s), "knn", v, s) for v, s, _ in rows]
    metrics = [metric(v, s, key_of(v, s), x) for v, s, x in rows]
    view = view_of(stages, metrics, cells=cells)
    (table,) = build_tables(view)
    (crossed,) = table.crossed
    assert [row.variant for row in crossed.rows] == list(sizes)
    assert [(c.label, c.group, c.unit) for c in crossed.columns] == [
        ("min", "augment", "%"), ("aug", "augment", "%")
    ]  # fmt: skip
    assert crossed.cells["512", "aug"] is table.cells["MAE-CT queue_size=512 augment=aug", "knn"]
    text = render_text(view)
    assert "k-NN (k=10) by queue_size and augment\n" in text
    assert "\n128         91.5 ± 0.7  92.5 ± 0.7\n" in text
    assert "| queue\\_size | min (%) | aug (%) |" in to_markdown([table])
    assert "queue\\_size & {min} & {aug}" in to_latex(view, [table])
    assert len(to_frame([table])) == len(metrics)  # no value twice
    page = render_html(view)
    assert "Table 1, crossed." in page
    line = re.search(r'<th scope="row" title="1024">1024</th>\s*<td[^>]*><a href="#([^"]+)">', page)
    assert line is not None
    assert f'id="{line[1]}"' in page
    # no longer all combinations; as many rows as there would be, of which each has one setting
    kept = dict(list(cells.items())[1:])
    assert build_tables(replace(view, cells=kept))[0].crossed == []
    names = list(cells)[:4]
    one = dict(zip(names, [{"a": "1"}, {"a": "2"}, {"b": "1"}, {"b": "2"}], strict=True))
    assert build_tables(replace(view, cells=one))[0].crossed == []
