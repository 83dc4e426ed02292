"""`bench verify`: changed predictions, metrics, artifacts; stages run again."""

from __future__ import annotations

import hashlib
import json
import os
import re
import shutil
from pathlib import Path
from typing import Any

import pytest
from bench_helpers import SMOKE, fill_store, forge, stored, write_run
from safetensors.numpy import load_file, save
from soak_helpers import limited

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
    path = store.fetch(record["key"]) / "predictions.safetensors"
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


def test_a_report_on_half_of_the_selection_split_verifies(bench, tmp_path: Path):
    sets = ("report_on=selection",)
    store = fill_store(tmp_path / "store", only="raw pixels", sets=sets)
    done = bench("verify", SMOKE, "--seeds", 1, "--store", store.root, "--set", *sets)
    assert (done.code, done.err) == (0, "")
    assert "from 200 predictions" in done.out  # k-NN and the probe, on 100 images each


def test_a_changed_prediction_is_named_although_its_checksums_were_made_to_fit(verify, root):
    store, record, data = change_predictions(root, "MAE knn, seed 0")
    done = verify()
    assert done.code == 3
    assert "predictions.safetensors does not fit its checksum" in done.err
    assert "table 'Digits, a few steps', MAE" in done.err
    assert "raw pixels" not in done.err
    record["files"]["predictions.safetensors"]["sha256"] = hashlib.sha256(data).hexdigest()
    forge(store, record)
    forged = verify()
    assert (forged.code, "checksum" in forged.err) == (3, False)
    for err in (done.err, forged.err):
        assert f"MAE knn, seed 0 (key {record['key'][:10]}): metric accuracy_k10 is" in err


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
        (("summary",), {"draws": {"accuracy_k10": [1.0]}}, "its values by draw are not those of"),
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
    path = store.fetch(record["key"]) / "predictions.safetensors"
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
    (store.fetch(record["key"]) / "decoder.safetensors").unlink()
    record["cost"]["device_hours"] *= 0.5
    forge(store, record)
    store, record = stored(root, "MAE probe, seed 0")
    path = store.fetch(record["key"]) / "predictions.safetensors"
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
    path = store.fetch(record["key"]) / "decoder.safetensors"
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


# ------------------------------------------------------------------------------ what is not there


def ended(root: Path) -> None:
    """A second run ended here: its record says what it left."""
    store = Store(root)
    statuses = {key: store.state(key).statuses for key in store.stage_keys()}
    write_run(store, "second", attempts=statuses)


@pytest.mark.parametrize(
    ("gone", "said"),
    [
        ("stages/KEY", "1 record of it gone, of attempt 1"),
        ("stages/KEY/attempts", "1 record of it gone, of attempt 1"),
        ("stages/KEY/attempts/1", "1 record of it gone, of attempt 1"),
        ("stages/KEY/attempts/1/record.json", "1 record of it gone, of attempt 1"),
        ("runs/in-process.json", "the record of the run in-process that made it is gone"),
    ],
)
@pytest.mark.parametrize("title", ["MAE, seed 0", "raw pixels knn"])
def test_what_a_run_left_and_is_gone_is_named(verify, root, gone: str, said: str, title: str):
    key = stored(root, title)[1]["key"]
    ended(root)
    assert verify().code == 0
    path = root / gone.replace("KEY", key)
    shutil.rmtree(path) if path.is_dir() else path.unlink()
    done = verify()
    assert done.code == 3
    assert f"{title} (key {key[:10]}): {said}" in done.err


def test_an_attempt_that_is_gone_and_an_input_are_named_without_a_run(verify, root):
    store, record = stored(root, "MAE, seed 0")
    folder = store.folder(record["key"]) / "attempts"
    (folder / "1").rename(folder / "2")
    forge(store, record | {"attempt": 2})
    done = verify()
    assert done.code == 3
    assert "MAE, seed 0" in done.err
    assert "1 record of it gone, of attempt 1" in done.err
    shutil.rmtree(folder.parent)
    done = verify()
    assert done.code == 3
    assert "MAE features, seed 0" in done.err
    assert "its 'encoder' is gone: MAE, seed 0" in done.err


FUTURE = {
    "started": "2999-01-01T00:00:00.000Z",
    "started_s": 32472144000.0,
    "ended": "2999-01-01T00:00:01.000Z",
    "wall_s": 1.0,
    "device_hours": 1 / 3600,
}


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"wall_s": -3598.0, "device_hours": -3598 / 3600}, "-3598.0 for wall_s, which cannot be"),
        ({"cpu_s": -1.0}, "-1.0 for cpu_s, which cannot be"),
        ({"energy_kwh": -1.0}, "-1.0 for energy_kwh, which cannot be"),
        ({"started": "2020-01-01T00:00:00.000Z"}, "two times at which it started"),
        (FUTURE, "that it ended in the future, 2999-01-01"),
        ({"ended": None}, "that it ended, but not when or what it cost"),
        ({"wall_s": None}, "that it ended, but not when or what it cost"),
        ({"device_hours": None}, "that it ended, but not when or what it cost"),
    ],
    ids=str,
)
def test_times_and_costs_that_cannot_be_are_named(verify, root, changes: dict, said: str):
    store, record = stored(root, "raw pixels knn")
    for name, value in changes.items():
        (record if name in record else record["cost"])[name] = value
    forge(store, record)
    done = verify()
    assert done.code == 3
    assert f"raw pixels knn (key {record['key'][:10]}): attempt 1 says " in done.err
    assert said in done.err


@pytest.mark.parametrize(
    "content",
    [b"", b"\xff" * 100, b"8" * 8 + b"{" * 100, b"\x02" + b"\0" * 7 + b"{}", b"link", b"fifo"],
    ids=str,
)
def test_predictions_that_are_none_are_named(verify, root, content: bytes):
    store, record = stored(root, "raw pixels knn")
    path = store.fetch(record["key"]) / "predictions.safetensors"
    other = path.rename(root.parent / "elsewhere")
    match content:
        case b"link":
            path.symlink_to(other)
        case b"fifo":
            os.mkfifo(path)
        case _:
            path.write_bytes(content)
    with limited(content):
        done = verify()
    assert done.code == 3
    assert "its predictions cannot be read" in done.err


def test_a_stage_whose_input_is_a_fifo_is_not_run_again(verify, root):
    store, record = stored(root, "raw pixels features")
    path = store.fetch(record["key"]) / "features.safetensors"
    path.unlink()
    os.mkfifo(path)
    with limited("a FIFO"):
        done = verify("--rerun", "raw pixels knn")
    assert done.code == 3
    assert "raw pixels knn" in done.err
    assert "it cannot be run again: its 'features' is damaged" in done.err


def test_a_record_nested_too_deeply_and_a_run_that_is_none_are_named(verify, root):
    path = root / "stages" / stored(root, "raw pixels knn")[1]["key"] / "attempts/1/record.json"
    path.write_text("[" * 100_000)
    (root / "runs" / "x.json").write_text("{}")
    done = verify()
    assert done.code == 3
    assert "record.json is damaged: recursion limit exceeded" in done.err
    assert "mismatch: runs/x.json is no record of a run" in done.err
