"""What the figures are computed from; what they look like is seen in the browser tests."""

from __future__ import annotations

import math
import re
from dataclasses import replace
from datetime import datetime, timedelta
from typing import Any

import polars as pl
import pytest
from report_views import full_view, key_of, metric, record, stage, view_of

from reports.display import middle
from reports.figures import along, charts
from reports.figures.model import Panel, Point, Series
from reports.figures.palette import BAD
from reports.figures.svg import Scale, nice_step, plot, spanning, tag
from reports.figures.timeline import timeline
from reports.formats.html import render_html
from reports.formats.text import render_text
from reports.tables.build import build_tables
from reports.tables.check import check


def test_pareto_front_is_what_nothing_beats_on_both() -> None:
    known = {"a": (1.0, 90.0), "b": (2.0, 95.0), "c": (2.0, 94.0), "d": (3.0, 95.0), "e": (4, 97)}
    points = {name: Point(*at) for name, at in known.items()}
    assert charts.front(points, True) == ["a", "b", "e"]
    assert charts.front(points, False) == ["a"]


def test_rows_off_the_scale() -> None:
    means = {"raw": 96.6, "random": 58.4, "mae": 93.4, "ct": 97.7}
    assert charts.off_scale(means) == {"random"}
    assert charts.off_scale({k: v for k, v in means.items() if k != "random"}) == set()
    assert charts.off_scale({"a": 1.0, "b": 2.0, "c": 3.0, "d": 4.0}) == set()


def test_scales_and_ticks() -> None:
    assert Scale(0, 10, 100, 200)(5) == 150
    assert Scale(1, 100, 0, 10, log=True)(10) == 5
    assert Scale(0, 1, 0, 1).ticks() == [0.0, 0.2, 0.4, 0.6000000000000001, 0.8, 1.0]
    assert nice_step(0.3) == 0.5
    flat = spanning([5.0, 5.0], 0, 100)
    assert flat.low < 5.0 < flat.high


def test_names_are_cut_in_their_middle() -> None:
    assert middle("MAE-CT queue_size=128 augment=min", 28) == "MAE-CT qu…ze=128 augment=min"
    assert len(middle("x" * 100, 28)) == 28
    assert middle("short", 28) == "short"


def test_long_names_lose_what_they_share() -> None:
    names = ["MAE", *(f"MAE-CT queue_size={size} augment=min" for size in (128, 1024))]
    told = ["MAE", "queue_size=128 augment=min", "queue_size=1024 augment=min"]
    assert charts.told_apart(names) == told
    assert charts.told_apart(["x" * 30, "x" * 30]) == ["x" * 30] * 2


def test_svg_escapes() -> None:
    assert tag("text", "<b>", title='"x"', x=1.25) == (
        '<text title="&#34;x&#34;" x="1.2">&lt;b&gt;</text>'
    )


def test_a_panel_that_says_nothing_is_not_drawn() -> None:
    flat, single = [(0.0, 1.0), (1.0, 1.0)], [(0.0, 1.0)]
    for points, tells in ((flat, False), (single, False), ([*flat, (2.0, 3.0)], True)):
        series = [Series(0, "A", [Point(x, y) for x, y in points])]
        assert Panel("", series, "").tells is tells
    view = full_view()
    for columns in view.curves.values():
        columns["temperature"] = [0.1] * len(columns["step"])
    figure = charts.curves(view)
    assert figure is not None
    assert not [panel for panel in figure.panels if "temperature" in panel.title]


def test_curves_have_a_panel_a_kind_and_column() -> None:
    figure = charts.curves(full_view())
    assert figure is not None
    heads = [panel.title for panel in figure.panels]
    losses = ["MAE: loss", "head: loss", "tuning: loss"]
    assert heads == [*losses, "head: neighbour accuracy", "tuning: neighbour accuracy"]
    # shared MAEs are drawn once: 3 short and 3 long ones
    assert len(figure.panels[0].series) == 6


def test_long_curves_are_means_of_neighbouring_steps() -> None:
    points = charts.smoothed([(float(i), float(i % 2)) for i in range(320)])
    assert len(points) == 80
    assert points[0] == Point(1.5, 0.5)
    assert charts.smoothed([(0.0, 1.0), (1.0, 2.0)]) == [Point(0.0, 1.0), Point(1.0, 2.0)]


def test_a_loss_that_falls_far_has_a_logarithmic_axis() -> None:
    curves = {"m": {"step": [0.0, 1.0, 2.0], "loss": [5.0, 1.0, 0.5]}}
    figure = charts.curves(view_of([stage("m", "mae", "A", 0)], [], curves=curves))
    assert figure is not None
    drawn = plot(figure.panels[0])
    assert "loss, log scale<" in drawn
    # 5 to 1 is further than 1 to 0.5
    points = re.search(r'points="([^"]+)"', drawn)
    assert points is not None
    ys = [float(point.split(",")[1]) for point in points.group(1).split()]
    assert (ys[1] - ys[0]) / (ys[2] - ys[1]) > 2


def test_curves_leave_out_what_is_not_finite() -> None:
    view = full_view()
    for columns in view.curves.values():
        columns["loss"][1] = float("nan")
    figure = charts.curves(view)
    assert figure is not None
    assert "nan" not in "".join(map(plot, figure.panels))


def test_timeline_draws_stages_failures_and_cuts_long_pauses() -> None:
    view = full_view()
    figure = timeline(view)
    assert figure is not None
    # 50 distinct stages and one failed attempt
    assert len(figure.panels[0].series) == 51
    assert [one.look for one in figure.panels[0].series].count(BAD) == 1
    assert "pause" not in figure.caption
    late = datetime(2026, 3, 2, 12, 0, 0)
    times = {"started": late.isoformat(), "ended": (late + timedelta(seconds=2)).isoformat()}
    rows = [
        stage(key_of(0), "mae", "A", 0),
        stage(key_of(1), "mae", "A", 1, **times),
        stage(key_of(2), "mae", "A", 2, started=None),
    ]
    figure = timeline(view_of(rows, []))
    assert figure is not None
    assert (len(figure.panels[0].series), len(figure.panels[0].cuts)) == (2, 1)
    assert "1 pause in which nothing ran cut short" in figure.caption


def test_ablation_joins_rows_that_differ_in_one_number() -> None:
    rows, metrics = [], []
    for size in (256, 512, 1024):
        for augment in ("min", "aug"):
            variant = f"{augment} {size}"
            head = stage(key_of("head", variant), "head", variant, 0)
            settings = {"queue_size": size, "augment": augment, "steps": 100}
            head["record"] = record(head, settings=settings)
            # the tuning stage repeats the head's queue in its own settings
            tune = stage(key_of("tune", variant), "tune", variant, 0)
            repeated = {"head": {"queue_size": size}, "steps": 300}
            tune["record"] = record(tune, settings=repeated)
            rows += [head, tune, stage(key_of(variant), "knn", variant, 0)]
            metrics.append(metric(variant, 0, key_of(variant), 90.0 + size / 512))
    view = view_of(rows, metrics, tables=[{"title": "T", "columns": ["knn"]}])
    figure = along.ablation(view, build_tables(view)[0])
    assert figure is not None
    assert figure.title == "By queue size"
    (panel,) = figure.panels
    assert (panel.x_label, panel.y_label) == ("queue_size (head)", "k-NN (k=10), %")
    assert [len(one.points) for one in panel.series] == [3, 3]
    assert [text for _, text in figure.legend] == ["min", "aug"]


def test_the_paper_table_has_no_ablation() -> None:
    view = full_view()
    assert along.ablation(view, build_tables(view)[0]) is None


def few_shot(variant: str, labels: int, level: float) -> dict[str, Any]:
    """An accuracy from some labelled images a class, a little above `level`."""
    place = {"along": "images a class", "at": float(labels), "series": "low-shot"}
    column, label = f"few.accuracy_{labels}", f"{labels}-shot"
    return metric(variant, 0, key_of(variant), level + labels, column, label=label, **place)


def test_a_curve_far_below_all_others_leaves_them_the_scale() -> None:
    levels = {"random": 20.0, "A": 80.0, "B": 84.0, "C": 90.0}
    rows = [stage(key_of(v), "few", v, 0) for v in levels]
    metrics = [few_shot(v, labels, level) for v, level in levels.items() for labels in (1, 2, 5)]
    (figure,) = along.by_number(view_of(rows, metrics))
    assert len(figure.panels[0].series) == 3
    assert [note.text for note in figure.panels[0].notes] == ["off the scale: random, 21.0 to 25.0"]


def test_numbered_metrics_make_a_curve() -> None:
    metrics = [few_shot("A", labels, 50.0) for labels in (1, 2, 5)]
    for block in range(1, 5):
        name, told = f"depth.accuracy_block{block}", f"k-NN, k=1, block {block}"
        place = {"along": "block", "at": float(block), "series": "k-NN, k=1"}
        metrics.append(metric("A", 0, key_of("A"), 60.0 + 10 * block, name, label=told, **place))
    rows = [stage(key_of("A"), kind, "A", 0) for kind in ("depth", "few")]
    depth, few = along.by_number(view_of(rows, metrics))
    (panel,) = depth.panels
    assert (depth.title, few.title) == ("By encoder depth", "By number of labels")
    assert panel.y_label == "k-NN, k=1, %"
    assert len(panel.series[0].points) == 4
    assert (few.panels[0].y_label, few.panels[0].notes) == ("low-shot, %", [])
    # the axis is marked where something was measured
    assert few.panels[0].marks == [1.0, 2.0, 5.0]


@pytest.mark.parametrize("number", [math.nan, math.inf, -math.inf, 1e308, -1e308, 1e-308])
def test_a_number_that_is_none_leaves_the_rest_of_the_report(number: float) -> None:
    view = full_view()
    first = pl.int_range(pl.len()) < 3

    def spoilt(frame: pl.DataFrame, *columns: str) -> pl.DataFrame:
        return frame.with_columns(
            pl.when(first).then(pl.lit(number)).otherwise(pl.col(name)).alias(name)
            for name in columns
        )

    view = replace(
        view,
        metrics=spoilt(view.metrics, "value", "at"),
        stages=spoilt(view.stages, "wall_s", "cpu_s", "device_hours", "peak_memory_mib"),
        attempts=spoilt(view.attempts, "wall_s", "cpu_s", "device_hours", "energy_kwh"),
    )
    assert "97.7" in render_text(view)
    assert "97.7" in render_html(view)
    known = [c for c in check(view) if "not finite" in c]
    assert bool(known) == (not abs(number) < 1)
