"""`bench diff`: what differs between two stores, two stages, two profiles."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
from bench_helpers import SMOKE, fill_store, forge, record_of

from bench.store.record import sealed
from bench.store.store import Store


@pytest.fixture(scope="module")
def first(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return fill_store(tmp_path_factory.mktemp("diff") / "first", only="MAE").root


@pytest.fixture(scope="module")
def second(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The same with another learning rate."""
    root = tmp_path_factory.mktemp("diff") / "second"
    return fill_store(root, only="MAE", sets=["mae.lr=0.001"]).root


def test_no_line_is_wider_than_a_narrow_terminal(bench, first, second, monkeypatch):
    key = next(iter(Store(first).stage_keys()))
    wide = bench("show", key, "--store", first).out
    assert max(map(len, wide.splitlines())) > 60
    monkeypatch.setenv("COLUMNS", "60")
    told = bench("show", key, "--store", first).out
    assert told.split() == wide.split()  # whole words
    told += bench("diff", first, second).out
    for words in (("ls",), ("plan", SMOKE), ("verify", SMOKE)):
        told += bench(*words, "--store", first).out
    paths = [word for word in told.split() if "/" in word]  # which are not broken
    assert all(len(line) <= 60 or any(p in line for p in paths) for line in told.splitlines())


def test_a_copy_does_not_differ(bench, first, tmp_path):
    other = Path(shutil.copytree(first, tmp_path / "copy"))
    done = bench("diff", first, other)
    assert (done.code, done.err) == (0, "")
    assert "4 stages in both" in done.out
    for line in ("settings: equal", "code: equal", "environment: equal", "data: equal"):
        assert line in done.out
    assert "7 equal, 0 differ" in done.out
    assert "artifacts: bit for bit equal" in done.out


def test_settings_come_first_and_then_what_they_changed(bench, first, second):
    done = bench("diff", first, second)
    assert done.code == 3
    assert "settings: 1\n  MAE, seed 0: lr 0.003 -> 0.001\n" in done.out
    assert "code: equal" in done.out
    assert "data: equal" in done.out
    places = [done.out.index(f"\n{name}:") for name in ("settings", "code", "environment", "data")]
    assert places == sorted(places) and places[-1] < done.out.index("\nmetrics:")
    found = json.loads(bench("diff", first, second, "--json").out)
    assert found["settings"] == [
        {"what": "train.lr", "a": 0.003, "b": 0.001, "stages": ["MAE, seed 0"]}
    ]
    assert found["metrics"]
    for entry in found["metrics"]:
        assert entry["difference"] == entry["b"] - entry["a"]
    assert "MAE, seed 0/encoder.safetensors" in found["artifacts"]


def test_code_environment_and_data_are_told_apart(bench, first, tmp_path):
    other = Store(Path(shutil.copytree(first, tmp_path / "copy")))
    for key in other.stage_keys():
        record = other.state(key).record.plain()
        if record["kind"] == "mae":
            record["code"]["modules"]["maect.losses"] = "another"
        record["env"] |= {"torch": "9.9", "host": "elsewhere"}
        forge(other, record)
    done = bench("diff", first, other.root)
    assert done.code == 3
    assert "code: 1\n  MAE, seed 0: maect.losses " in done.out
    assert "-> another\n" in done.out
    assert "environment: 1\n  all 4 stages: torch " in done.out
    for key in other.stage_keys():  # the environment alone is shown, but is no difference
        code = Store(first).state(key).record.code
        forge(other, other.state(key).record.model_copy(update={"code": code}).plain())
    assert bench("diff", first, other.root).code == 0


def test_a_change_in_many_stages_is_a_line_by_rows(bench, plan_of, tmp_path):
    changes = ["tune.head_lr=0.001", "evaluations.probe.epochs=6"]
    for side, sets in (("a", []), ("b", changes)):
        plan, store = plan_of(seeds=10, sets=sets, store=tmp_path / side), Store(tmp_path / side)
        store.create()
        for number, stage in enumerate(plan.stages.values()):
            record = record_of(stage, number + (side == "b"), {"host": "here"})
            (folder := store.folder(stage.key) / "attempts" / "1").mkdir(parents=True)
            (folder / "record.json").write_text(json.dumps(sealed(record)))
    out = bench("diff", tmp_path / "a", tmp_path / "b").out
    assert "settings: 2\n" in out
    assert "  all 70 stages of probe: settings.epochs 5 -> 6\n" in out
    assert "  all 30 stages of tune: head_lr 0.004 -> 0.001\n" in out
    assert "  MAE-CT knn, seeds 0 to 9:\n    accuracy_k10 " in out
    assert out.count("\n") < 90


def test_stages_suites_and_profiles_of_one_store(bench, first):
    keys = {Store(first).state(key).record.kind: key for key in Store(first).stage_keys()}
    done = bench("diff", keys["knn"], keys["probe"], "--store", first)
    assert done.code == 3
    assert "MAE knn, seed 0 / MAE probe, seed 0" in done.out
    assert bench("diff", SMOKE, f"{SMOKE}:tiny", "--store", first).code == 0


def test_mistakes_are_told(bench, first, tmp_path):
    for wrong in (tmp_path, "ffffffffffff", f"{SMOKE}:huge", tmp_path / "none.yaml"):
        done = bench("diff", first, wrong, "--store", first)
        assert (done.code, done.out) == (2, "")
        assert done.err.startswith("error: ")
