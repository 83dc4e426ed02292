"""The gallery stage: pictures of two rows, from features and an MAE that the suite has anyway."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from bench_helpers import SMOKE, Bench, write_run
from safetensors.numpy import load_file

from bench.commands.verify import verify
from bench.plan.planner import Plan, make_plan
from bench.run.worker import run_stage
from bench.store.store import Store
from bench.suite.load import load_suite
from maect import datasets, evals

SUITE = SMOKE.read_text(encoding="utf-8").replace(
    "evaluate: [knn, probe]", "evaluate: [knn]\ngallery: [MAE, MAE-CT]"
)


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Plan, Store]:
    """MAE and MAE-CT of one seed with their gallery, run in this process."""
    folder = tmp_path_factory.mktemp("gallery")
    path, store = folder / "pictures.yaml", Store(folder / "store")
    path.write_text(SUITE.replace("columns: [knn, probe, cost]", "columns: [knn]"))
    store.create()
    write_run(store, "in-process")
    suite = load_suite(path, seeds=1)
    for stage in make_plan(suite, store, only="MAE*").stages.values():
        if "matched" not in stage.title and "aug" not in stage.title:
            run_stage(stage, store, "in-process", lambda event: None)
    return path, make_plan(suite, store, only="MAE*"), store


@pytest.fixture(scope="module")
def pictures(made) -> dict[str, np.ndarray]:
    _, plan, store = made
    (stage,) = [stage for stage in plan.stages.values() if stage.kind == "gallery"]
    assert stage.status == "cached"
    return dict(load_file(store.fetch(stage.key) / "gallery.safetensors"))


def test_only_hidden_patches_are_made_up(made, pictures):
    _, plan, _ = made
    test = datasets.load(plan.suite.variants["MAE"].row.data, datasets.data_root(), "test")
    shown = test.batch(np.arange(len(test))).numpy()
    assert all((shown == image).all((1, 2, 3)).any() for image in pictures["original"])
    grey = (pictures["masked"] == 128).reshape(8, 4, 2, 4, 2).all((2, 4))  # [8, rows, columns]
    assert grey.sum((1, 2)).tolist() == [12] * 8
    same = (pictures["original"] == pictures["reconstructed"]).reshape(8, 4, 2, 4, 2).all((2, 4))
    assert same[~grey].all()
    assert not same[grey].all()
    assert len({patches.tobytes() for patches in grey}) > 1  # each image has a mask of its own


def test_neighbours_are_those_of_the_features(made, pictures):
    _, plan, store = made
    rows = {row.variant.name: row for row in plan.rows}
    for at, name in enumerate(("MAE", "MAE-CT")):
        features = load_file(store.fetch(rows[name].features.key) / "features.safetensors")
        queries = pictures["query_row"]
        wrong = 100 - evals.knn(
            features["train_x"], features["train_y"], features["test_x"][queries],
            features["test_y"][queries], k=1,
        )  # fmt: skip
        first = pictures["neighbor_label"][at, :, 0]
        assert (first != pictures["query_label"]).mean() == pytest.approx(wrong / 100)
    train = datasets.load(plan.suite.variants["MAE"].row.data, datasets.data_root(), "train")
    near = pictures["neighbor_row"]
    images = train.batch(near.ravel()).numpy().reshape(pictures["neighbor"].shape)
    assert (images == pictures["neighbor"]).all()
    assert (np.asarray(train.labels)[near] == pictures["neighbor_label"]).all()


def test_the_same_again_bit_for_bit(made):
    _, plan, store = made
    found = verify(plan, store, rerun="gallery")
    assert found.rerun
    assert [line for line in found.mismatches if "gallery" in line] == []


def test_a_report_shows_it_and_goes_on_without_it(made, pictures, bench: Bench):
    path, plan, store = made
    arguments = ("report", path, "--store", store.root, "--seeds", 1, "--only", "MAE*")
    page = store.root / "reports" / "smoke-tiny.html"
    assert bench(*arguments).code == 0
    assert 'id="gallery"' in page.read_text(encoding="utf-8")
    assert len(pictures["map_label"]) == 500
    (stage,) = [stage for stage in plan.stages.values() if stage.kind == "gallery"]
    file = store.fetch(stage.key) / "gallery.safetensors"
    content = file.read_bytes()
    file.write_bytes(content[:100])
    done = bench(*arguments)
    file.write_bytes(content)
    assert done.code == 0
    assert "gallery.safetensors is damaged" in done.out
    assert 'id="gallery"' not in page.read_text(encoding="utf-8")


def test_it_is_planned_where_both_rows_are(made):
    path, _, store = made
    suite = load_suite(path)
    kinds = [stage.kind for stage in make_plan(suite, store).stages.values()]
    assert kinds.count("gallery") == 1  # of the first seed only
    only = make_plan(suite, store, only="MAE-CT*")
    assert "gallery" not in [stage.kind for stage in only.stages.values()]
