"""Costs of rows and of the suite, against sums made by hand (seconds in report_views.CHAINS)."""

from __future__ import annotations

import json
import math

import pytest
from report_views import full_view, key_of, stage, view_of

from reports.formats.html import render_html
from reports.formats.text import render_text
from reports.tables.build import build_tables
from reports.tables.costs import ENERGY, QUANTITIES, ledger
from reports.tables.model import cell_text

COST = [{"title": "T", "columns": ["cost"]}]


def texts(view, variant: str) -> dict[str, str]:
    table = build_tables(view)[0]
    return {
        c.id: cell_text(table.cells[variant, c.id], c) for c in table.columns if c.kind == "cost"
    }


def test_own_and_cumulative_cost_of_a_row() -> None:
    view = full_view(tables=COST)
    table = build_tables(view)[0]
    assert [c.unit for c in table.columns] == ["core-min", "core-min", "s"]
    # MAE 45 s; head and tuning 27 s more; wall time would say the same; half of it was computed
    assert texts(view, "MAE") == {"cost.own": "0.75", "cost.total": "0.75", "cost.cpu": "22.5"}
    assert texts(view, "MAE-CT") == {"cost.own": "0.45", "cost.total": "1.20", "cost.cpu": "36.0"}
    assert texts(view, "raw pixels") == {"cost.own": "–", "cost.total": "–", "cost.cpu": "–"}


def test_device_time_counts_every_device() -> None:
    row = stage(
        key_of(1), "mae", "A", 0, wall_s=1800.0, devices=8, device_kind="gpu", device_hours=4.0
    )
    view = view_of([row], [], tables=COST)
    table = build_tables(view)[0]
    assert [c.unit for c in table.columns] == ["GPU-h", "min", "kWh"]
    assert texts(view, "A") == {
        "cost.total": "4.00",
        "cost.wall": "30.0",
        "cost.energy": "not measured",
    }


A, B, C = "mae", "head", "tune"


@pytest.mark.parametrize(
    ("stages", "text", "reason"),
    [
        # kind, seed and what differs from a complete stage of a minute
        ([(A, 0, {}), (A, 1, {"status": "pending"})], "1.00 (1 of 2)", "seed 1 pending: mae"),
        (
            [(A, 0, {}), (B, 0, {"status": "failed"}), (C, 0, {"status": "pending"})],
            "failed",
            "seed 0 failed: head",  # not what waits for it
        ),
        ([(A, 0, {"device_hours": None})], "not measured", "seed 0 not measured: mae"),  # no zero
        ([(A, 0, {}), (A, 1, {"device_kind": "gpu"})], "mixed hardware", "trained on CPU and GPU"),
        ([(A, 0, {}), (A, 1, {"device_hours": math.nan})], "not finite", "seed 1 measured no"),
    ],
)
def test_a_cost_without_its_sum_says_why(stages: list, text: str, reason: str) -> None:
    rows = [
        stage(f"{kind} {seed}", kind, "A", seed, wall_s=60.0, **changes)
        for kind, seed, changes in stages
    ]
    view = view_of(rows, [], tables=COST)
    assert texts(view, "A")["cost.total"] == text
    assert (build_tables(view)[0].cells["A", "cost.total"].reason or "").startswith(reason)
    unmeasured = sum("device_hours" in changes and changes["device_hours"] is None
                     for _, _, changes in stages)  # fmt: skip
    assert ledger(view).total.unmeasured == unmeasured


def test_the_suite_counts_shared_stages_once() -> None:
    found = ledger(full_view())
    seconds = {line.label: line.hours["core"] * 3600 for line in found.lines}
    # 3 seeds of MAE 45, long MAE 72, head + tune 27 and 30
    assert seconds["Training"] == pytest.approx(3 * (45 + 72 + 27 + 30))
    # raw pixels has 2 evaluations of 2 s, five other rows 2 x 3
    assert seconds["Evaluation"] == pytest.approx((2 + 5 * 6) * 2)
    assert found.total.hours["core"] * 3600 == pytest.approx(522 + 64)
    # the MAE serves two more rows, raw pixels two more seeds
    assert found.saved["core"] * 3600 == pytest.approx(2 * 3 * 45 + 2 * 2 * 2)


def test_failed_attempts_stand_apart_from_the_total() -> None:
    found = ledger(full_view())
    (failed,) = [line for line in found.lines if line.apart]
    assert (failed.label, len(failed.rows), failed.wall_s) == ("Attempts failed", 1, 7.2)
    assert failed.hours["core"] == pytest.approx(0.002)


def test_a_complete_attempt_that_was_redone_is_superseded() -> None:
    row = stage(key_of(1), "mae", "A", 0, attempt=2)
    tries = [
        {"key": row["key"], "attempt": n, "status": "complete", "wall_s": 2.0, "device_hours": 0.1}
        for n in (1, 2)
    ]
    found = ledger(view_of([row], [], tries))
    assert [(x.label, len(x.rows)) for x in found.lines if x.apart] == [("Attempts superseded", 1)]


def test_overhead_of_tuning_over_its_mae() -> None:
    found = {o["variant"]: o for o in ledger(full_view()).overheads}
    assert found["MAE-CT"]["percent"] == pytest.approx(100 * 27 / 45)
    assert found["MAE-CT_aug"]["percent"] == pytest.approx(100 * 30 / 45)
    assert set(found) == {"MAE-CT", "MAE-CT_aug"}
    said = " ".join(render_text(full_view()).split())
    assert "60.0 %" in said
    assert "at most 10 %" in said
    assert "1,500 steps of MAE stand against 330 of tuning" in said


def test_overheads_of_many_rows_are_a_range() -> None:
    rows = []
    for i in range(4):
        rows.append(stage("mae", "mae", f"row {i}", 0, wall_s=100.0, own=False))
        rows.append(stage(f"tune {i}", "tune", f"row {i}", 0, wall_s=10.0 * (i + 1)))
    (sentence, why) = ledger(view_of(rows, [])).sentences
    assert sentence.startswith("In 4 rows head and tuning cost 10.0 to 40.0 % of the device time")
    assert why.startswith("The share is large")


def test_energy_is_blank_with_its_reason_unless_all_was_measured() -> None:
    rows = [
        stage(key_of(s), "mae", "A", s, energy_kwh=0.5, wall_s=3600.0 * (1 + s), device_kind="gpu",
              utilisation_percent=30.0 + 30 * s, peak_memory_mib=100.0 * s)
        for s in (0, 1)
    ]  # fmt: skip
    total = ledger(view_of(rows, [])).total
    assert [total.measured(quantity) for quantity in QUANTITIES] == [
        (5400.0, None), (1.0, None), (pytest.approx(50.0), None), (100.0, None)
    ]  # fmt: skip
    rows[1] |= {"energy_kwh": None, "energy_reason": "MIG"}
    view = view_of(rows, [], tables=COST)
    assert ledger(view).total.measured(ENERGY) == (
        None, "0.500 kWh over 1 of 2; the others: MIG"
    )  # fmt: skip
    assert texts(view, "A")["cost.energy"] == "0.50 (1 of 2)"
    assert build_tables(view)[0].cells["A", "cost.energy"].reason == (
        "seed 1 not measured: mae (MIG)"
    )


def test_integrated_energy_is_marked_in_the_sum() -> None:
    rows = [
        stage(source, "mae", "A", seed, device_kind="gpu", energy_kwh=0.5, energy_from=source)
        for seed, source in enumerate(("counter", "power", "counter+power"))
    ]
    (found,) = ledger(view_of(rows, [])).sentences
    assert found.startswith("Energy of 2 of 3 stages is integrated from the power drawn")
    assert ledger(view_of(rows[:1], [])).sentences == []
    page = render_html(view_of(rows, []))
    # a stage and its attempt each
    assert page.count("0.500 kWh, integrated from the power drawn") == 4


@pytest.mark.parametrize("model", ["NVIDIA H100 80GB HBM3", "NVIDIA H200"])
def test_what_readings_of_power_leave_out_is_said(model: str) -> None:
    row = stage("k", "mae", "A", 0, device_kind="gpu", device_model=model, energy_kwh=0.5,
                energy_from="counter")  # fmt: skip
    told = " ".join(ledger(view_of([row], [])).sentences)
    assert ("arXiv 2312.02741" in told) == ("H100" in model)


def test_what_groups_held_outside_attempts_stands_apart() -> None:
    runs = [{"status": "complete", "reserved_hours": {"gpu": 0.25}},
            {"status": "failed", "reserved_hours": {"gpu": 0.5, "cpu": 2.0}},
            {"status": "lost", "reserved_hours": None},
            {"status": "running", "reserved_hours": None}]  # fmt: skip
    row = stage("k", "mae", "A", 0, device_kind="gpu", device_hours=1.0)
    found = ledger(view_of([row], [], runs=runs))
    assert found.total.hours == {"GPU": 1.0}
    (told,) = found.sentences
    assert told == (
        "Worker groups held devices for another 0.750 GPU-h and 2.00 core-h (1 run did not tell) "
        "outside attempts, while they started, waited and ended; no figure above has them."
    )
    assert ledger(view_of([row], [], runs=runs[2:])).sentences == []


def test_a_failed_attempt_names_its_gpu_and_its_energy() -> None:
    gpu = {"uuid": "GPU-1", "model": "H100", "host": "n1"}
    row = stage("k", "mae", "A", 0, attempt=2, device_kind="gpu", wall_s=3600.0,
                energy_kwh=0.5, gpus=json.dumps([gpu]))  # fmt: skip
    tries = [
        {"key": "k", "attempt": n, "status": status, "wall_s": 3600.0, "device_hours": hours,
         "device_kind": "gpu", "energy_kwh": hours / 2, "gpus": row["gpus"]}
        for n, status, hours in ((1, "failed", 0.5), (2, "complete", 1.0))
    ]  # fmt: skip
    view = view_of([row], [], tries)
    found = ledger(view)
    (wasted,) = [line for line in found.lines if line.apart]
    assert (wasted.label, wasted.hours["GPU"]) == ("Attempts failed", 0.5)
    assert wasted.measured(ENERGY) == (0.25, None)
    assert [(g["uuid"], g["attempts"], g["hours"]) for g in found.gpus] == [("GPU-1", 2, 1.5)]
    html = render_html(view)
    assert "GPU-1 (H100, n1)" in html
    assert "<li>1: failed, 1 h 0 min, 0.500 GPU-h, 0.250 kWh" in html
    assert "GPU utilisation: blank (not measured)." in html


def test_what_a_search_gave_up_is_told_apart() -> None:
    rows = [
        stage("shared", "mae", "A", 0, wall_s=100.0),
        stage("shared", "mae", "B", 0, wall_s=100.0, own=False),
        stage("b", "tune", "B", 0, wall_s=10.0),
        stage("c", "tune", "B", 1, status="pruned"),
    ]
    found = ledger(view_of(rows, []))
    (line,) = [line for line in found.lines if line.apart]
    assert (len(line.rows), line.wall_s) == (1, 10.0)
    assert found.total.wall_s == 110.0
