"""t-tests, Holm's correction and power, against scipy and published tables."""

from __future__ import annotations

import html
import re
from dataclasses import replace

import numpy as np
import pytest
from report_views import (
    NAMED,
    full_view,
    headed_view,
    key_of,
    metric,
    record,
    search_view,
    stage,
    view_of,
)
from scipy import stats

from reports.formats.exports import to_markdown
from reports.formats.html import render_html
from reports.formats.text import render_text
from reports.tables.build import build_tables
from reports.tables.findings import findings, how_tested, numerics, ranking
from reports.tables.model import Cell, Column, Value
from reports.tables.statistics import (
    detectable_effect,
    holm,
    needed_pairs,
    power,
    predicted,
    shuffled_spread,
)  # fmt: skip


@pytest.mark.parametrize(("n", "effect"), [(2, 0.5), (3, 3.0), (3, 40.0), (20, 0.3), (500, 9.0)])
def test_power_is_that_of_scipys_noncentral_t(n: int, effect: float) -> None:
    critical, shift = stats.t.ppf(0.975, n - 1), effect * n**0.5
    expected = stats.nct.sf(critical, n - 1, shift) + stats.nct.cdf(-critical, n - 1, shift)
    assert power(n, effect) == pytest.approx(expected, abs=1e-7)


def test_needed_pairs_are_those_of_power_tables() -> None:
    # paired two-sided t-test, alpha 0.05, power 0.8 (G*Power 3.1)
    assert [needed_pairs(effect) for effect in (0.5, 0.8, 1.0)] == [34, 15, 10]
    assert needed_pairs(0.01) is None
    assert needed_pairs(0.0) is None


def test_the_detectable_effect_has_80_percent_power() -> None:
    for n in (2, 3, 5, 20):
        assert power(n, detectable_effect(n)) == pytest.approx(0.8, abs=1e-6)


def test_holm() -> None:
    # ordered 0.01 x 3, 0.03 x 2, max(0.06, 0.04 x 1)
    assert holm([0.01, 0.04, 0.03]) == pytest.approx([0.03, 0.06, 0.06])
    assert holm([0.9, 0.6]) == [1.0, 1.0]
    assert holm([]) == []


def test_comparison_is_paired_over_common_seeds() -> None:
    table = build_tables(full_view())[0]
    found = next(c for c in table.comparisons if (c.variant, c.column) == ("MAE-CT", "knn"))
    test = stats.ttest_rel([97.8, 98.2, 97.2], [94.6, 91.4, 94.2])
    assert (found.n, found.baseline) == (3, "MAE")
    assert found.mean == pytest.approx(13 / 3)
    assert found.t == pytest.approx(test.statistic)
    assert found.p == pytest.approx(test.pvalue, abs=1e-7)
    assert len(table.comparisons) == 10
    assert found.p_holm is not None
    assert found.p_holm > 0.05
    assert not found.survives


def test_the_prediction_interval_holds_19_of_20_means_of_other_seeds() -> None:
    """Ten seeds of a reference, three of another run of the same."""
    rng, column = np.random.default_rng(0), Column("knn", "k-NN", "%", "metric")

    def cell(n: int) -> Cell:
        values = rng.normal(90.0, 1.5, n)
        found = tuple(Value((seed,), value, ()) for seed, value in enumerate(values))
        return Cell("ok", found, values.mean(), values.std(ddof=1))

    tests = [predicted("MAE", column, cell(3), cell(10)) for _ in range(4000)]
    inside = [t.low < 0 < t.high for t in tests if t.low is not None and t.high is not None]
    assert len(inside) == 4000
    assert np.mean(inside) == pytest.approx(0.95, abs=0.01)
    assert inside == [t.p > 0.05 for t in tests if t.p is not None]


def rows_of(values: dict[str, list[float]], **changes: object):
    """A table of k-NN over rows with the given values by seed, compared with row "base"."""
    stages, metrics = [], []
    for variant, found in values.items():
        for seed, value in enumerate(found):
            key = key_of(variant, seed)
            stages.append(stage(key, "knn", variant, seed))
            metrics.append(metric(variant, seed, key, value, **changes))
    tables = [{"title": "T", "columns": ["knn"], "baseline": "base"}]
    return view_of(stages, metrics, tables=tables)


BASE = [90.0, 90.4, 89.8, 90.1, 90.3]
BETTER = [93.1, 93.3, 92.9, 93.2, 93.2]


def test_what_n_could_show_is_judged_as_what_it_shows() -> None:
    """By the level that Holm's correction asks of the best of all tests, not by 0.05."""
    table = build_tables(full_view())[0]
    tested = [c for c in table.comparisons if c.p is not None]
    for found in tested:
        level = 0.05 / len(tested)
        assert found.sd is not None
        assert found.detectable == pytest.approx(detectable_effect(3, level) * found.sd)
        assert found.needed == needed_pairs(abs(found.mean) / found.sd, level)
        if found.needed:  # scipy's noncentral t
            reach = []
            for n in (found.needed - 1, found.needed):
                critical = stats.t.isf(level / 2, n - 1)
                shift = abs(found.mean) / found.sd * n**0.5
                reach.append(stats.nct.sf(critical, n - 1, shift) if n > 1 else 0.0)
            assert reach[0] < 0.8 <= reach[1]
    # p = 0.02 alone, but 0.2 among ten: three seeds do not settle it
    (one,) = [c for c in tested if (c.variant, c.column) == ("MAE-CT", "probe")]
    assert one.p is not None
    assert one.p < 0.05
    assert not one.survives
    assert (one.needed or 0) > 3


def test_bold_is_what_survives_and_is_better() -> None:
    view = rows_of(
        {"base": BASE, "up": BETTER, "same": BASE[::-1], "down": [80.0, 80.5, 79.9, 80, 80.2]}
    )
    table = build_tables(view)[0]
    bold = {row.variant for row in table.rows if table.cells[row.variant, "knn"].bold}
    assert bold == {"up"}
    down = next(c for c in table.comparisons if c.variant == "down")
    assert down.p_holm is not None
    assert down.p_holm < 0.05


def test_the_primary_comparison_is_tested_by_itself_with_an_interval() -> None:
    view = headed_view()
    table = build_tables(view)[0]
    primary, further = table.named
    ours, matched = (
        [view.metrics.filter(column="knn", variant=row)["value"].to_list()]
        for row in ("MAE-CT", "compute-matched MAE")
    )
    test = stats.ttest_rel(*ours, *matched)
    interval = test.confidence_interval(0.95)
    assert (primary.n, primary.p_holm) == (10, None)
    assert primary.p == pytest.approx(test.pvalue)
    assert (primary.low, primary.high) == pytest.approx((interval.low, interval.high))
    # at 5 %, not at a share of it
    assert primary.detectable == pytest.approx(detectable_effect(10) * (primary.sd or 0.0))
    # a row that is the same for all seeds is a constant
    assert further.p == pytest.approx(stats.ttest_1samp(*ours, 96.6).pvalue)
    assert further.constant
    assert further.family == len([c for c in table.comparisons if c.p is not None]) + 1
    said = (
        "MAE-CT is better than compute-matched MAE in k-NN (k=10): "
        f"+{primary.mean:.1f} points, 95 % confidence interval +{primary.low:.1f} to "
        f"+{primary.high:.1f} (primary comparison, named by the suite; paired t over 10 seeds; "
        "p < 0.001)."
    )
    assert table.headline[0] == said
    assert "better than raw pixels in k-NN (k=10): +1.1 points" in table.headline[1]
    assert "one-sample t over 10 seeds against a constant" in table.headline[1]
    told = "Holm's correction over 11 tests, which the interval is without)."
    assert told in table.headline[1]
    page = html.unescape(re.sub("<[^>]+>", "", render_html(view)))
    for made in (render_text(view), to_markdown([table]), page):
        assert said in " ".join(made.replace("\\", "").split())
        assert made.index("primary comparison") < made.index("Digits: k-NN")


@pytest.mark.parametrize(
    ("base", "row", "said"),
    [
        (BETTER, BASE, "row is worse than base in k-NN"),
        (BASE, [90.3, 90.1, 89.8, 90.4, 90.0], "No difference is shown between row and base"),
        (BASE, [value + 1.0 for value in BASE], "equal differences, allow no test (primary"),
        (BASE[:1], BETTER[:1], "over 1 seed; one seed, or equal differences, allow no test"),
        (BASE, [], "row against base, k-NN (k=10): nothing to compare yet"),
    ],
)
def test_the_headline_says_whatever_was_found(base: list, row: list, said: str) -> None:
    view = rows_of({"base": base, "row": row})
    view.named = [NAMED[0] | {"row": "row", "against": "base"}]
    view.variants = ["base", "row"]
    assert said in build_tables(view)[0].headline[0]


def test_all_tables_are_one_family_in_which_each_test_counts_once() -> None:
    view = full_view(named=NAMED)
    one, probe = ({"columns": c, "baseline": "MAE"} for c in (["knn", "probe"], ["probe"]))
    matched = {"columns": ["knn"], "baseline": "compute-matched MAE"}
    tables = build_tables(replace(view, tables=[one, probe, matched]))
    tested = {c.what: c for t in tables for c in [*t.comparisons, *t.named] if c.p is not None}
    family = [c for c in tested.values() if not c.primary]
    assert {c.family for c in family} == {len(family)}
    assert len(tested) == len(family) + 1  # the primary one, which stands in the last table too
    expected = holm([c.p or 0.0 for c in family])
    assert [c.p_holm for c in family] == pytest.approx(expected)


def test_lower_is_better_where_the_metric_says_so() -> None:
    view = rows_of({"base": BETTER, "low": BASE}, higher_is_better=False)
    assert build_tables(view)[0].cells["low", "knn"].bold


def test_equal_differences_are_not_tested() -> None:
    view = rows_of({"base": [1.0, 2.0, 3.0], "shift": [2.0, 3.0, 4.0]})
    (found,) = build_tables(view)[0].comparisons
    assert (found.mean, found.p, found.survives) == (1.0, None, False)


def test_three_seeds_are_said_to_be_few() -> None:
    view = full_view()
    said = " ".join(how_tested(build_tables(view)[0]))
    assert "Few seeds: over 3 seeds nothing survives" in said
    assert "Holm's correction over the 10 tests" in said
    assert "--seeds N" in said


def test_sampling_error_of_the_test_images_is_told_apart() -> None:
    view = full_view()
    said = " ".join(findings(build_tables(view)[0], view))
    # raw pixels: sqrt(96.6 x 3.4 / 500) = 0.81
    assert "500 test images. Their own sampling error" in said
    assert "one standard error is 0.8 points at 96.6 %" in said
    page = render_html(view)
    # random encoder, probe: sqrt(86.3 x 13.7 / 500) = 1.54
    assert page.count("± 1.5 (500 test images)") == 1
    assert page.count("(500 test images)</td>") == 12


def test_sampling_error_is_of_the_images_that_were_reported_on() -> None:
    view = full_view()
    half = {"split": "selection, the half that chose nothing", "test_images": 100}
    for told in view.records.values():
        told["protocol"] |= half
    said = " ".join(findings(build_tables(view)[0], view))
    # raw pixels: sqrt(96.6 x 3.4 / 100) = 1.81
    assert "100 selection images. Their own sampling error" in said
    assert "one standard error is 1.8 points at 96.6 %" in said


def test_seeds_that_share_an_ancestor_are_named() -> None:
    stages, metrics = [], []
    for seed in (0, 1):
        stages.append(stage("one-mae", "mae", "A", seed, own=False))
        stages.append(stage(key_of("tune", seed), "tune", "A", seed))
        stages.append(stage(key_of("knn", seed), "knn", "A", seed))
        metrics.append(metric("A", seed, key_of("knn", seed), 90.0 + seed))
    view = view_of(stages, metrics)
    said = " ".join(findings(build_tables(view)[0], view))
    assert "The seeds of A share an ancestor (mae)" in said


# ------------------------------------------------------------------------------ cells of a search


def test_shuffled_spreads_are_scipys_permutation_test() -> None:
    values = [[90.1, 91.0, 90.4], [90.6, 91.9, 90.7], [90.0, 91.4, 90.9]]

    def spread(*cells: list[float]) -> float:
        return sum((sum(c) / 3 - sum(map(sum, cells)) / 9) ** 2 for c in cells)

    # all 6^3 orders: cells swapped within each seed
    exact = stats.permutation_test(
        values, spread, permutation_type="samples", vectorized=False, n_resamples=10**6,
        alternative="greater",
    ).pvalue  # fmt: skip
    assert shuffled_spread(values) == pytest.approx(exact, abs=0.015)
    assert 0.05 < exact < 0.95


def searched(*cells: list[float]):
    rows = [(f"cell {i}", seed, x) for i, c in enumerate(cells) for seed, x in enumerate(c)]
    stages = [stage(key_of(v, s), "knn", v, s) for v, s, _ in rows]
    metrics = [metric(v, s, key_of(v, s), x) for v, s, x in rows]
    view = view_of(stages, metrics, cells={f"cell {i}": {} for i in range(len(cells))})
    return build_tables(view)[0], view


def test_a_report_says_what_a_search_can_rank() -> None:
    (noise,) = ranking(*searched([90.0, 92.0], [91.0, 91.0], [92.0, 90.2]))
    assert "the means of the 3 cells go from 91.0 to 91.1." in noise
    assert "inside the noise of 2 seeds" in noise
    apart = [[90.0 + i, 90.1 + i, 89.9 + i] for i in range(4)]
    assert "not all of the differences are noise" in ranking(*searched(*apart))[0]
    assert "One seed tells nothing" in ranking(*searched([90.0], [91.0], [95.0]))[0]
    assert ranking(*searched([90.0, 91.0], [91.0, 92.0])) == []
    view = full_view()
    assert ranking(build_tables(view)[0], view) == []


def trained(shards: int, *groups: tuple[int, str | None]):
    rows = []
    for seed, (workers, backend) in enumerate(groups):
        row = stage(key_of("mae", seed), "mae", "A", seed)
        row["record"] = record(
            row, settings={"numerics": {"shards": shards}},
            env={"workers": workers, "backend": backend}, cost={"device_kind": "cpu"},
        )  # fmt: skip
        rows.append(row)
    view = view_of(rows, [], tables=[{"title": "T", "columns": ["cost"]}])
    return numerics(build_tables(view)[0], view)


def test_cells_looked_at_on_the_test_split_are_counted() -> None:
    view = search_view()
    seen = ranking(build_tables(view)[0], view)[0]
    assert seen.startswith("k-NN (k=10): 8 cells were looked at on the test split; the best")
    for told in view.records.values():
        told["protocol"] |= {"split": "selection, the half that chose nothing"}
    assert "looked at" not in " ".join(ranking(build_tables(view)[0], view))


def test_a_report_says_what_its_numerics_promise() -> None:
    (exact,) = trained(4, (1, None), (2, "gloo"))
    assert "`exact`, trained on 1 CPU worker and on 2 CPU workers over gloo" in exact
    assert "the same bits on 1, 2 or 4 workers" in exact
    assert "69 %" in exact
    (fast,) = trained(1, (2, "nccl"))
    assert "`fast`, trained on 2 CPU workers over NCCL" in fast
    assert trained(1) == []
