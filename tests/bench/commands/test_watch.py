"""`watch`: what runs on a store, read from the store alone."""

from __future__ import annotations

import json
import time
from pathlib import Path

import pytest
from bench_helpers import SMOKE, write_record, write_run

from bench.cli import main
from bench.commands.watch import look
from bench.plan.planner import make_plan
from bench.store.files import iso
from bench.store.store import StageState, Store
from bench.suite.load import load_suite


@pytest.fixture
def store(tmp_path: Path) -> Store:
    """A run with a stage complete, one failed and one at step 50 of its 100."""
    store = Store(tmp_path / "store")
    store.create()
    suite = load_suite(SMOKE, seeds=1, sets=["mae.steps=100"])
    first, second, *_ = (s for s in make_plan(suite, store).stages.values() if s.kind == "features")
    mae = next(s for s in make_plan(suite, store).stages.values() if s.kind == "mae")
    began = iso(time.time() - 90)
    write_run(store, "run", suite="smoke", profile="tiny", status="running", stages=28, cached=3,
              started=began, expected=iso(time.time() + 299))  # fmt: skip
    write_record(store, first, wall_s=36.0)
    write_record(store, second, status="failed", wall_s=36.0)
    record = write_record(store, mae, status="running")
    log = store.attempt_folder(mae.key, record.attempt) / "log.txt"
    log.write_text(f"{iso(time.time())} step 50/100 epoch 3 loss 0.6931 320 images/s\n")
    return store


def test_what_runs_is_told_while_the_store_is_held(
    store: Store, capsys: pytest.CaptureFixture[str]
):
    with store.leases.driving("run"):
        assert main(["watch", str(store.root)]) == 0
        out = capsys.readouterr().out
        assert main(["watch", str(store.root), "--json"]) == 0
        seen = json.loads(capsys.readouterr().out)
    assert "smoke, profile tiny: runs, 1 min 3" in out
    assert " s, about 4 min 5" in out and seen["left_s"] == pytest.approx(300, abs=30)
    assert "4 of 28 stages complete (3 of them were there), 1 failed" in out
    assert "MAE, seed 0: 50/100 epoch 3 loss 0.6931 320 images/s, " in out and " s left" in out
    [one] = seen["running"]
    # 50 steps of 64 images
    assert (
        one["left_s"] == pytest.approx(50 * 64 / 320, abs=5) and one["devices"] == "1 core (a CPU)"
    )
    assert seen["device_hours"]["cpu"] == pytest.approx(73 / 3600, abs=0.003)


def test_a_run_that_is_no_more_is_not_said_to_run(store: Store, capsys: pytest.CaptureFixture[str]):
    assert main(["watch", str(store.root)]) == 0
    out = capsys.readouterr().out
    assert "ended: lost" in out and "MAE, seed 0" not in out


def test_it_goes_on_until_the_run_ends(store: Store, capsys: pytest.CaptureFixture[str]):
    write_run(store, "run", suite="smoke", profile="tiny", status="complete", stages=28, wall_s=5.0)
    assert main(["watch", str(store.root), "--every", "0.1"]) == 0
    assert "ended: complete, 5.0 s" in capsys.readouterr().out


def test_a_stage_that_cannot_be_read_ends_no_watching(store: Store, tmp_path: Path):
    (store.root / "stages" / ("0" * 20)).symlink_to(tmp_path)
    known: dict[str, StageState] = {}
    first, second = look(store, known), look(store, known)
    assert first is not None and second is not None
    assert first["complete"] == second["complete"] == 1


def test_a_store_that_nothing_ran_on(tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    assert main(["watch", str(tmp_path / "none")]) == 2
    Store(tmp_path / "store").create()
    assert main(["watch", str(tmp_path / "store")]) == 0
    assert "nothing ran on this store yet" in capsys.readouterr().out
