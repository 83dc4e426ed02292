"""`bench verify`: changed predictions, metrics, artifacts; stages run again."""

from __future__ import annotations

import hashlib
import json
import re
import shutil
from pathlib import Path
from typing import Any

import pytest
from bench_helpers import SMOKE, fill_store, forge, stored
from safetensors.numpy import load_file, save

from bench.store.store import Store


@pytest.fixture(scope="module")
def finished(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Raw pixels and the MAE of one seed, each with its evaluations."""
    root = tmp_path_factory.mktemp("verify") / "store"
    fill_store(root, only="raw pixels")
    return fill_store(root, only="MAE").root


@pytest.fixture
def root(finished: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(finished, tmp_path / "store"))


@pytest.fixture
def verify(bench, root: Path):
    def run(*options: object) -> Any:
        return bench("verify", SMOKE, "--seeds", 1, "--store", root, *options)

    return run


def change_predictions(root: Path, name: str) -> tuple[Store, dict[str, Any], bytes]:
    """The first prediction of a stage changed to another class."""
    store, record = stored(root, name)
    path = store.folder(record["key"]) / "predictions.safetensors"
    found = load_file(path)
    right = found["class_k10"] == found["labels"]
    found["class_k10"][right.argmax()] += 1
    path.write_bytes(save(found))
    return store, record, path.read_bytes()


def test_a_sound_store_verifies(verify):
    done = verify()
    assert (done.code, done.err) == (0, "")
    assert re.search(r"7 of \d+ stages are in the store", done.out)
    assert "everything fits" in done.out
    found = json.loads(verify("--json").out)
    assert (found["stages"], found["records"], found["mismatches"]) == (7, 7, [])
    # four metrics of k-NN and some of the probe, on 500 images, for two rows
    assert (found["metrics"], found["predictions"], found["cells"]) == (14, 2000, 4)


def test_a_changed_prediction_is_named(verify, root):
    change_predictions(root, "MAE knn, seed 0")
    done = verify()
    assert done.code == 3
    assert "MAE knn, seed 0" in done.err
    assert "predictions.safetensors does not fit its checksum" in done.err
    assert "metric accuracy_k10 is" in done.err
    assert "table 'Digits, a few steps', MAE" in done.err
    assert "raw pixels" not in done.err


def test_a_changed_prediction_shows_although_its_checksums_were_made_to_fit(verify, root):
    store, record, data = change_predictions(root, "MAE knn, seed 0")
    record["files"]["predictions.safetensors"]["sha256"] = hashlib.sha256(data).hexdigest()
    forge(store, record)
    done = verify()
    assert done.code == 3
    assert "checksum" not in done.err
    assert "MAE knn, seed 0" in done.err
    assert "metric accuracy_k10 is" in done.err


def test_a_changed_metric_is_named_with_and_without_a_new_checksum(verify, root):
    store, record = stored(root, "raw pixels knn")
    said = record["metrics"][0]["value"]
    record["metrics"][0]["value"] = said + 1
    forge(store, record)
    done = verify()
    assert done.code == 3
    message = f"metric accuracy_k10 is {said + 1} in its record, {said} by its predictions"
    assert message in done.err
    path = store.folder(record["key"]) / "attempts" / "1" / "record.json"
    path.write_text(path.read_text().replace(str(said + 1), str(said + 2)))
    done = verify()
    assert done.code == 3
    assert "record.json is damaged: its checksum does not fit" in done.err
    assert f"metric accuracy_k10 is {said + 2} in its record" in done.err


@pytest.mark.parametrize(
    ("path", "value", "expected"),
    [
        (("settings", "split"), "train", "its settings are not those of its key"),
        (("data", "fingerprint"), "f00d", "its data are not those of its key"),
        (("protocol", "k"), [1], "its protocol's fingerprint is of another protocol"),
        (("metrics", 0, "label"), "k-NN, best", "metric accuracy_k10 is not in its record as it"),
        (("metrics", 1, "name"), "accuracy_k5", "metric accuracy_k20 is not in its record as it"),
        (("cost", "wall_s"), 0.0, "says 0.0 s, but took"),
        (("started",), "yesterday", "its 'started' is not as records have it"),
        (("protocol_fingerprint",), None, "its protocol's fingerprint is of another protocol"),
        (("metrics",), None, "its 'metrics' is not as records have it"),
    ],
)
def test_a_changed_field_is_named_although_its_checksum_was_made_to_fit(
    verify, root, path: tuple, value: object, expected: str
) -> None:
    store, record = stored(root, "raw pixels knn")
    inner: Any = record
    for step in path[:-1]:
        inner = inner[step]
    assert inner[path[-1]] != value
    inner[path[-1]] = value
    forge(store, record)
    done = verify()
    assert done.code == 3
    assert f"raw pixels knn (key {record['key'][:10]})" in done.err
    assert expected in done.err


def test_a_prediction_that_is_missing_is_named_although_all_checksums_were_made_to_fit(
    verify, root
) -> None:
    store, record = stored(root, "raw pixels knn")
    path = store.folder(record["key"]) / "predictions.safetensors"
    found = {name: array for name, array in load_file(path).items() if name != "class_k20"}
    path.write_bytes(save(found))
    data = path.read_bytes()
    sha256 = hashlib.sha256(data).hexdigest()
    record["files"][path.name] = {"sha256": sha256, "bytes": len(data)}
    forge(store, record)
    done = verify()
    assert done.code == 3
    assert "metric accuracy_k20 cannot be derived from its predictions" in done.err


def test_changed_costs_labels_and_missing_files_are_named(verify, root):
    store, record = stored(root, "MAE, seed 0")
    (store.folder(record["key"]) / "decoder.safetensors").unlink()
    record["cost"]["device_hours"] *= 0.5
    forge(store, record)
    store, record = stored(root, "MAE probe, seed 0")
    path = store.folder(record["key"]) / "predictions.safetensors"
    found = load_file(path)
    found["labels"][0] = (found["labels"][0] + 1) % 10
    path.write_bytes(save(found))
    done = verify()
    assert done.code == 3
    assert "decoder.safetensors is missing" in done.err
    assert "device-hours, but held 1 for" in done.err
    assert "its labels are not those of the features it evaluated" in done.err


def test_stages_run_again_come_out_bit_for_bit(verify, root):
    before = sorted(p.name for p in (root / "stages").iterdir())
    done = verify("--rerun", "MAE*, seed 0")
    assert (done.code, done.err) == (0, "")
    assert "run again  4 stages: MAE, seed 0, MAE features, seed 0" in done.out
    assert sorted(p.name for p in (root / "stages").iterdir()) == before
    assert len(list((root / "stages").glob("*/attempts/*"))) == len(before)


def test_a_result_that_does_not_come_out_again_is_told_with_how_much(verify, root):
    store, record = stored(root, "MAE, seed 0")
    path = store.folder(record["key"]) / "decoder.safetensors"
    found = load_file(path)
    found["mask_token"] = found["mask_token"] + 0.5
    path.write_bytes(save(found))
    entry = {"sha256": hashlib.sha256(path.read_bytes()).hexdigest(), "bytes": path.stat().st_size}
    record["files"]["decoder.safetensors"] = entry
    forge(store, record)
    done = verify("--rerun", "mae")
    assert done.code == 3
    assert "decoder.safetensors differs in 1 of" in done.err
    assert "by 0.5 at most" in done.err


def test_mistakes_are_told(verify, bench, tmp_path):
    done = verify("--rerun", "nothing*")
    assert done.code == 2
    assert "--rerun 'nothing*' fits no stage" in done.err
    assert bench("verify", SMOKE, "--store", tmp_path / "none").code == 2
    done = verify("--only", "MAE-CT", "--set", "mae.lr=0.5")
    assert done.code == 3
    assert "nothing was verified" in done.err
