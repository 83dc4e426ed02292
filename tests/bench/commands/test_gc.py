"""`bench gc`: what goes, and what never does."""

from __future__ import annotations

import json
import os
import shutil
from pathlib import Path

import pytest
from bench_helpers import PAPER, SMOKE, SWEEP, fill_store, write_record, write_run

from bench.plan.planner import make_plan
from bench.store.objects import ObjectStore
from bench.store.store import Store
from bench.suite.load import load_suite

ROW = "  MAE-CT: {stages: [mae, head, tune], augment: min}\n"


def fill(store: Store, suite: Path, most: int | None = None) -> set[str]:
    """Complete records of a suite's stages, or of its first. Return their keys."""
    stages = list(make_plan(load_suite(suite), store).stages.values())[:most]
    for stage in stages:
        write_record(store, stage)
    return {stage.key for stage in stages}


def files(root: Path) -> set[str]:
    return {path.relative_to(root).as_posix() for path in root.rglob("*")} - {"lock", "removed"}


@pytest.fixture
def gc(bench, store: Store):
    return lambda *arguments: bench("gc", *arguments, "--store", store.root)


def test_what_no_suite_refers_to_is_listed_then_removed(bench, gc, store: Store):
    smoke, sweep = fill(store, SMOKE), fill(store, SWEEP, 50)  # the cells of a search too
    (store.root / "ray" / "20261101T000000-1-1").mkdir(parents=True)
    (store.root / "stages" / "notes.txt").write_text("mine")
    before = files(store.root)
    assert "\n1 referred to by none" in gc(SMOKE, f"{SWEEP}:digits", "--dry-run").out
    for keep, other in (SMOKE, sweep), (f"{SWEEP}:digits", smoke):
        done = gc(keep)
        assert (done.code, done.err) == (0, "")
        assert f"{len(other) + 1} referred to by none of these suites" in done.out
        assert f"to remove them: python -m bench gc {keep} --store" in done.out
    assert files(store.root) == before
    told = json.loads(gc(SMOKE, "--yes", "--json").out)
    assert {item["key"] for item in told["items"]} == sweep | {None} and told["removed"]
    assert {*store.stage_keys()} == smoke | {"notes.txt"}
    assert not os.listdir(store.root / "ray")
    assert f"{len(smoke)} cached, 0 to run" in bench("plan", SMOKE, "--store", store.root).out
    assert gc(SMOKE, "--yes").out == "0 removed, 0.0 MiB in all\n"


def test_what_a_run_with_more_seeds_left_is_told_of_and_can_be_kept(gc, store: Store):
    plan = make_plan(load_suite(SMOKE, seeds=3), store)
    for stage in plan.stages.values():
        write_record(store, stage)
    command = f"python -m bench run {SMOKE} --seeds 3"
    write_run(store, "run", suite="smoke", profile="tiny", command=command)
    more = plan.stages.keys() - make_plan(load_suite(SMOKE), store).stages.keys()
    assert f"\n  {len(more)} of: {command}\n" in gc(SMOKE).out
    assert gc(SMOKE, "--seeds", 3, "--yes").out == "0 removed, 0.0 MiB in all\n"
    assert {*store.stage_keys()} == {*plan.stages}


def test_a_row_keeps_its_inputs(gc, store: Store, tmp_path: Path):
    fill(store, SMOKE)
    text = SMOKE.read_text()
    before, _, rest = text.partition("variants:\n")
    one = tmp_path / "one.yaml"
    one.write_text(
        f"{before}variants:\n{ROW}\ntables: [{{title: t, columns: [knn]}}]\n\n"
        + rest[rest.index("profiles:") :]
    )
    kept = make_plan(load_suite(one), None).stages
    assert {"mae", "head", "tune", "features"} <= {stage.kind for stage in kept.values()}
    assert gc(one, "--yes").code == 0
    assert {*store.stage_keys()} == {*kept}


def test_an_unknown_profile_or_data_that_are_not_here_remove_nothing(gc, store: Store):
    fill(store, SMOKE, 2)
    before = files(store.root)
    done = gc(PAPER, "--yes")
    assert done.code == 2 and "nothing tells which stages it refers to" in done.err
    assert f"write {PAPER}:PROFILE" in done.err
    assert "there is no profile 'tine'; did you mean 'tiny'" in gc(f"{SMOKE}:tine", "--yes").err
    assert gc("--yes").code == 2
    assert files(store.root) == before


def test_a_store_in_use_is_listed_but_nothing_is_removed(gc, store: Store):
    fill(store, SWEEP, 2)
    before = files(store.root)
    with store.leases.driving():
        assert gc(SMOKE).code == 0
        done = gc(SMOKE, "--yes")
    assert done.code == 2 and "is using the store" in done.err
    assert files(store.root) == before


def test_checkpoints_go_once_no_attempt_needs_them(gc, store: Store):
    done, redone = list(make_plan(load_suite(SMOKE), store).stages.values())[:2]
    for stage in (done, redone):
        write_record(store, stage)
        (store.checkpoints(stage.key) / "code").mkdir(parents=True)
    write_record(store, redone, status="interrupted")
    assert f"checkpoints of {done.title}" in gc(SMOKE, "--yes").out
    assert not store.checkpoints(done.key).exists() and store.checkpoints(redone.key).exists()
    assert store.state(done.key).record and len(store.state(redone.key).attempts) == 2


def test_stages_of_other_processors_stay(gc, store: Store):
    first = next(iter(make_plan(load_suite(SWEEP), store).stages.values()))
    numerics = first.settings["numerics"] | {"processors": "avx2 Other"}
    write_record(store, first, settings=first.settings | {"numerics": numerics})
    done = gc(SMOKE, "--yes")
    assert "kept: 1 stage of other processors" in done.out
    assert store.stage_keys() == [first.key]


def test_links_are_removed_and_not_followed(gc, store: Store, tmp_path: Path):
    outside = tmp_path / "outside"
    outside.mkdir()
    (outside / "mine").write_text("mine")
    link = store.root / "stages" / ("0" * 20)
    link.symlink_to(outside)
    inner = store.root / "stages" / ("1" * 20)
    inner.mkdir()
    (inner / "link").symlink_to(outside)
    assert "2 removed, 0.0 MiB" in gc(SMOKE, "--yes").out
    assert not os.path.lexists(link) and not inner.exists()
    assert (outside / "mine").read_text() == "mine"


def test_a_suite_that_was_removed_may_be_run_again(bench, gc, store: Store):
    stage = next(iter(make_plan(load_suite(SWEEP), store).stages.values()))
    write_record(store, stage, status="failed")
    write_record(store, stage)
    write_run(store, "run", attempts={stage.key: {1: "failed", 2: "complete"}})
    assert gc(SMOKE, "--yes").code == 0
    write_record(store, stage)
    assert "gone" not in bench("verify", SWEEP, "--store", store.root).err


def test_a_store_in_a_bucket(bench, bucket: str):
    store = ObjectStore(bucket)
    store.create()
    kept, gone = fill(store, SMOKE, 3), fill(store, SWEEP, 3)
    before = store.sizes()
    assert f"{len(gone)} referred to by none" in bench("gc", SMOKE, "--store", bucket).out
    with store.leases.driving():
        assert "is using the store" in bench("gc", SMOKE, "--yes", "--store", bucket).err
    assert store.sizes().keys() == before.keys()
    assert f"{len(gone)} removed, 0.0 MiB" in bench("gc", SMOKE, "--yes", "--store", bucket).out
    assert {*store.stage_keys()} == kept
    left = {name for name in before if name.split("/")[1:2] not in [[key] for key in gone]}
    assert store.sizes().keys() == left


@pytest.fixture(scope="module")
def pixels(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The raw pixels of smoke.yaml, run for real, and two stages of another suite."""
    store = fill_store(tmp_path_factory.mktemp("gc") / "store", only="raw pixels")
    fill(store, SWEEP, 2)
    return store.root


@pytest.mark.parametrize("moment", range(0, 12, 2))
def test_killed_in_the_middle(
    bench, pixels: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, moment: int
):
    root = Path(shutil.copytree(pixels, tmp_path / "store"))
    for name in ("rename", "unlink", "rmdir", "replace"):
        whole = getattr(os, name)

        def ends(*given, whole=whole, **options):
            nonlocal moment
            moment -= 1
            if moment < 0:
                raise KeyboardInterrupt
            return whole(*given, **options)

        monkeypatch.setattr(os, name, ends)
    assert bench("gc", SMOKE, "--yes", "--store", root).code == 130
    monkeypatch.undo()
    shown = ("--seeds", 1, "--only", "raw pixels", "--store", root)
    assert "3 cached, 0 to run" in bench("plan", SMOKE, *shown).out
    assert bench("verify", SMOKE, *shown[:2], *shown[4:]).code == 0
    assert bench("gc", SMOKE, "--yes", "--store", root).code == 0
    assert len(Store(root).stage_keys()) == 3 and not os.listdir(root / "removed")
