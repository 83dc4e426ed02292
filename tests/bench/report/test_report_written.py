"""`report` as a command: what it writes where, in stores that cannot be written or were left."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import pytest
from bench_helpers import SMOKE, Bench, write_record

from bench.plan.planner import make_plan
from bench.plan.stage import Plan
from bench.run import worker
from bench.store.store import Store
from bench.suite.load import load_suite

#: what is in the page's way -> what is said of it
IN_THE_WAY: dict[str, tuple[Callable[[Path], object], str]] = {
    "a file": (lambda folder: folder.write_text("x"), "file exists"),
    "a folder": (lambda folder: (folder / "smoke-tiny.html").mkdir(parents=True), "it is a folder"),
}


@pytest.fixture
def plan(store: Store) -> Plan:
    return make_plan(load_suite(SMOKE, seeds=1), store)


def files(folder: Path) -> list[str]:
    return sorted(str(path.relative_to(folder)) for path in folder.rglob("*"))


@pytest.mark.parametrize("what", IN_THE_WAY)
def test_without_a_page_the_table_is_printed(what: str, store: Store, bench: Bench):
    put, said = IN_THE_WAY[what]
    put(store.root / "reports")
    before = files(store.root.parent)
    arguments = ("report", SMOKE, "--store", store.root)
    done = bench(*arguments)
    assert (done.code, "report: " in done.out) == (0, False)
    assert "Digits, a few steps" in done.out
    assert f"cannot be written ({said}); name another place: --output PATH" in done.err
    assert len(done.err.splitlines()) == 1
    told = bench(*arguments, "--json")
    assert told.code == 0
    assert {"commit", "tables", "failures", "problems"} <= json.loads(told.out).keys()
    # what was asked for and cannot be had is a mistake, told before any work
    refused = bench(*arguments, "--export", "csv")
    assert (refused.code, refused.out, len(refused.err.splitlines())) == (2, "", 1)
    assert files(store.root.parent) == before
    elsewhere = store.root.parent / "elsewhere"
    assert bench(*arguments, "--output", elsewhere / "page.html", "--export", "csv").code == 0
    assert files(elsewhere) == ["page.csv", "page.html"]


def test_output_is_a_file_or_a_folder(store: Store, tmp_path: Path, bench: Bench):
    arguments = ("report", SMOKE, "--store", store.root, "--output")
    (tmp_path / "folder").mkdir()
    assert bench(*arguments, tmp_path / "folder").code == 0
    assert files(tmp_path / "folder") == ["smoke-tiny.html"]
    other = Store(tmp_path / "other")
    other.create()
    beside = (*arguments, tmp_path / "b.html", "--export", "latex", "--compare")
    assert (bench(*beside, other.root).code, (tmp_path / "b.tex").is_file()) == (0, True)
    assert f"both are {store.root}" in bench(*beside, store.root).err
    (tmp_path / "file").write_text("x")
    for output, said in ((tmp_path / "file/x", "file exists"), (tmp_path / "x.md", "x.html")):
        done = bench(*arguments, output, "--export", "markdown")
        assert (done.code, said in done.err, len(done.err.splitlines())) == (2, True, 1)
    assert not (store.root / "reports").exists()


def test_what_a_dead_run_left_is_not_running(store: Store, plan: Plan, bench: Bench):
    mae = next(stage for stage in plan.stages.values() if stage.title == "MAE, seed 0")
    write_record(store, mae, status="running")
    arguments = ("report", SMOKE, "--store", store.root, "--seeds", 1)
    with store.leases.driving("run"):
        assert "MAE, seed 0 interrupted" not in (out := bench(*arguments).out)
        assert "  running" in out
    out = bench(*arguments).out
    assert "MAE, seed 0 interrupted: Lost: its run ended without a word" in out
    assert "  running" not in out


def test_a_stage_names_the_one_that_failed(store: Store, plan: Plan, bench: Bench):
    tune = next(stage for stage in plan.stages.values() if stage.title == "MAE-CT tuning, seed 0")
    write_record(store, tune, status="failed")
    out = " ".join(bench("report", SMOKE, "--store", store.root, "--seeds", 1).out.split())
    assert (
        "MAE-CT, k-NN, k=10, linear probe: failed (seed 0 failed: its input failed: MAE-CT " in out
    )
    assert "its input failed: MAE-CT tuning, seed 0)" in out


@pytest.mark.parametrize("how", ["pending", "failed"])
def test_two_names_of_one_evaluation_are_told_alike(
    how: str, store: Store, tmp_path: Path, bench: Bench
):
    """They share a stage, which has a row for each in the view."""
    text = SMOKE.read_text().replace("[knn, probe", "[knn, again")
    text = text.replace(
        "      probe: {epochs: 5, batch_size: 256}", "      again: {evaluation: knn}"
    )
    path = tmp_path / "twice.yaml"
    path.write_text(text)
    plan = make_plan(load_suite(path, seeds=1), store)
    (row,) = (row for row in plan.rows if row.variant.name == "raw pixels")
    assert row.evaluations["knn"] is row.evaluations["again"]
    if how == "failed":
        write_record(store, row.features)
        write_record(store, row.evaluations["knn"], status="failed")
    arguments = ("report", path, "--store", store.root, "--seeds", 1, "--json")
    (table,) = json.loads(bench(*arguments).out)["tables"]
    (cells,) = (one["cells"] for one in table["rows"] if one["row"] == "raw pixels")
    assert [cells[name]["state"] for name in ("knn", "again")] == [how, how]


def test_cpu_time_is_that_of_all_workers(store: Store, plan: Plan, monkeypatch: pytest.MonkeyPatch):
    """Of two, of whom the other used 1,000 s."""
    features = next(s for s in plan.stages.values() if s.title.startswith("raw pixels features"))
    monkeypatch.setattr(worker, "_of_all", lambda group, used: [used, (1000.0, None)])
    worker.run_stage(features, store, "run", lambda event: None)
    (record,) = store.state(features.key).attempts
    assert 1000.0 < (record.cost.cpu_s or 0.0) < 1100.0
