"""suites/protocols.yaml: other tokens and further protocols, run for real in this process."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from bench_helpers import PAPER, ROOT, fill_store, stored
from safetensors.torch import load_file

from bench.store.store import Store
from bench.suite.load import load_suite
from maect import evals
from maect.datasets import data_root, low_shot
from maect.settings import DataSettings
from maect.stages.encoder import encoder_of
from maect.stages.evaluate import eval_input
from maect.stages.features import SPLITS, JobImages
from maect.stages.job import Job

PROTOCOLS = ROOT / "suites" / "protocols.yaml"
QUICK = ["mae.steps=4"]


@pytest.fixture(scope="module")
def store(tmp_path_factory: pytest.TempPathFactory) -> Store:
    """The MAE with all evaluations of the suite."""
    root = tmp_path_factory.mktemp("protocols") / "store"
    return fill_store(root, suite=PROTOCOLS, only="MAE", sets=QUICK)


def record(store: Store, name: str) -> dict[str, Any]:
    return stored(store.root, name)[1]


def metrics(store: Store, name: str) -> dict[str, float]:
    return {m["name"]: m["value"] for m in record(store, name)["metrics"]}


def test_blocks_give_what_the_encoder_says_at_each(store: Store) -> None:
    found = record(store, "MAE features (blocks 0, 1, mean of patches), seed 0")
    inputs = {name: store.fetch(source["key"]) for name, source in found["inputs"].items()}
    job = Job(found["settings"], inputs, data_root())
    images = JobImages(job)
    encoder = encoder_of(job, 1, averaged=True).eval()
    x, y = [], []
    for name in SPLITS:
        rows = np.arange(len(images.split(name)))
        with torch.inference_mode():
            tokens = encoder.features_by_depth(images.prepared(name, rows), [0, 1])
        x.append([block[:, 1:].mean(1) for block in tokens])
        y.append(images.split(name).labels)
    stored = load_file(store.fetch(found["key"]) / "features.safetensors")
    assert stored["test_x"].shape == (500, 2, 32)
    torch.testing.assert_close(stored["train_x"], torch.stack(x[0], 1))
    measured = metrics(store, "MAE knn_by_block, seed 0")
    for block in (0, 1):
        right = evals.knn(x[0][block], y[0], x[2][block], y[2], k=[10, 20])
        for k, accuracy in right.items():
            assert measured[f"accuracy_k{k}_block{block}"] == pytest.approx(accuracy, abs=0.41)
    primary = [m for m in record(store, "MAE knn_by_block, seed 0")["metrics"] if m["primary"]]
    assert [m["name"] for m in primary] == ["accuracy_k10_block1"]


def test_both_pools_stand_side_by_side(store: Store) -> None:
    found = record(store, "MAE features (class token and mean), seed 0")
    both = load_file(store.fetch(found["key"]) / "features.safetensors")
    usual = load_file(
        store.fetch(record(store, "MAE features, seed 0")["key"]) / "features.safetensors"
    )
    assert both["train_x"].shape == (1097, 64)
    torch.testing.assert_close(both["test_x"][:, 32:], usual["test_x"])
    probe = record(store, "MAE probe_both, seed 0")
    assert probe["kind"] == "probe"
    assert probe["protocol"]["tokens"] == {"block": None, "pool": "both"}
    assert "class token and mean" in probe["metrics"][0]["label"]


def images_and_input(store: Store) -> tuple[JobImages, evals.EvalInput]:
    found = record(store, "MAE features, seed 0")
    inputs = {name: store.fetch(source["key"]) for name, source in found["inputs"].items()}
    images = JobImages(Job(found["settings"], inputs, data_root()))
    tensors = load_file(store.fetch(found["key"]) / "features.safetensors")
    draws = low_shot(DataSettings(name="digits"))
    return images, eval_input(tensors, "test", draws, 0, images)


def test_the_augmented_probe_on_whole_images_is_the_cached_one(store: Store) -> None:
    _, given = images_and_input(store)
    kept = {"epochs": 3, "batch_size": 256}
    whole = {"crop_scale": [1.0, 1.0], "crop_ratio": [1.0, 1.0], "flip": 0.0}
    runs = {}
    for name, more in (("probe", {}), ("probe_augmented", {"view": whole})):
        settings = evals.get(name).settings.parse(kept | more)
        runs[name] = evals.get(name).run(given, settings).predictions["class"]
    assert (runs["probe"] == runs["probe_augmented"]).mean() > 0.99
    used = record(store, "MAE probe_augmented, seed 0")
    assert used["protocol"]["features"] == "augmented"
    assert used["protocol"]["view"]["crop_scale"] == [0.5, 1.0]
    assert {"encoder", "features"} == used["inputs"].keys()


def test_the_table_and_verify_know_them(store: Store, bench: Any) -> None:
    options = (PROTOCOLS, "--store", store.root, *(f"--set={text}" for text in QUICK))
    report = bench("report", *options, "--only", "MAE")
    assert report.code == 0, report
    assert "block 0" in report.out
    checked = bench("verify", *options, "--only", "MAE")
    assert checked.code == 0, checked
    assert "everything fits" in checked.out


def test_fine_tuning_reports_each_budget(store: Store) -> None:
    tuned = record(store, "MAE low_shot_finetune, seed 0")
    assert [m["name"] for m in tuned["metrics"]] == ["accuracy_1pct", "accuracy_10pct"]
    (ten,) = tuned["summary"]["chosen"]["accuracy_10pct"]
    assert ten["images"] > 100
    values = metrics(store, "MAE low_shot_finetune, seed 0")
    assert values["accuracy_10pct"] > 25  # ten classes; ten images, the 1 %, teach next to nothing
    assert 0 < values["accuracy_1pct"] < values["accuracy_10pct"]


def test_a_profile_may_evaluate_otherwise(tmp_path: Path) -> None:
    usual = ["knn", "probe", "low_shot", "cluster"]
    found = {name: load_suite(PAPER, profile=name) for name in ("digits", "cifar10")}
    assert [*found["digits"].variants["MAE"].evaluations] == [*usual, "knn_by_block"]
    more = ["knn_by_block", "probe_both", "probe_augmented", "low_shot_finetune"]
    assert [*found["cifar10"].variants["MAE"].evaluations] == [*usual, *more, "finetune"]
    assert [*found["cifar10"].variants["MAE-CT"].evaluations] == usual + more
    assert len(found["cifar10"].tables) == len(found["digits"].tables) + 1
    # a suite that takes the profile over keeps its own
    path = tmp_path / "other.yaml"
    path.write_text(
        f"suite: other\nprofile: cifar10\nprofiles_from: '{PAPER}'\nseeds: [0]\n"
        "evaluate: [knn]\nvariants: {MAE: {stages: [mae]}}\nprofiles: {cifar10: {}}\n"
    )
    assert [*load_suite(path).variants["MAE"].evaluations] == ["knn"]


@pytest.mark.parametrize(
    ("given", "says"),
    [
        ("evaluations.probe_both.block=2", "block 2 is none of the encoder's 2; write 0 to 1"),
        ("evaluations.probe_both.block=-3", "block -3 is none of the encoder's 2; write 0 to 1"),
        ("evaluations.probe_both.norm=true", "norm goes with block; without, the final norm"),
        ("evaluations.probe_both.block=[0, 0]", "each once"),
        ("evaluations.probe_both.block=[1, -1]", "names a block twice"),
        ("evaluations.probe_both.pool=max", "'evaluations.probe_both.pool'"),
        ("evaluations.probe_both.evaluation=probes", "did you mean 'probe'?"),
    ],
)
def test_mistakes_are_told(given: str, says: str, bench: Any, tmp_path: Path) -> None:
    done = bench("plan", PROTOCOLS, "--store", tmp_path / "store", "--set", given)
    assert done.code == 2
    assert says in done.err
    assert "Traceback" not in done.err
