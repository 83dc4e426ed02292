"""A suite over a folder of images: read once, broken files named, every stage run on it."""

from __future__ import annotations

import os
import re
import shutil
import subprocess
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import numpy as np
import polars as pl
import pytest
import torch
from bench_helpers import ROOT, SMOKE, Bench, completed, run_bench
from PIL import Image
from safetensors.torch import load_file

from bench.commands.data import prepare_data
from bench.plan.planner import make_plan
from bench.run.cluster import _lack
from bench.run.worker import StageFailed, run_stage
from bench.store.store import Store
from bench.suite.load import data_info, load_suite
from maect import evals
from maect.datasets import DataError, decoders
from maect.datasets.decoders import Crops, EncodedSplit
from maect.stages.features import with_channels

EVALUATION = ROOT / "docs" / "evaluation.md"
STAGES = ("mae", "head", "tune")
SETS = ["model.patch_size=8", "head.queue_size=64", *(f"{s}.batch_size=16" for s in STAGES),
        *(f"{s}.steps=3" for s in STAGES)]  # fmt: skip


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """60 training and 12 test images of two classes, larger and smaller than the 32 wanted."""
    monkeypatch.setenv("MAECT_DATA", str(tmp_path / "data"))
    random = np.random.default_rng(0)
    for split, count in (("train", 30), ("val", 6)):
        for label in ("cat", "dog"):
            place = tmp_path / "images" / split / label
            place.mkdir(parents=True)
            for number in range(count):
                shape = (int(random.integers(24, 60)), int(random.integers(24, 60)), 3)
                pixels = random.integers(0, 256, shape, dtype=np.uint8)
                Image.fromarray(pixels).save(place / f"{number}.png")
    data_info.cache_clear()
    return tmp_path / "images"


def suite_over(folder: Path, tmp_path: Path, extra: str = ""):
    text = SMOKE.read_text().replace(
        "data: {name: digits, image_size: 8}",
        f"data: {{name: image_folder, path: '{folder}', image_size: 32{extra}}}",
    )
    path = tmp_path / "folder.yaml"
    path.write_text(text)
    return load_suite(path, seeds=1, sets=SETS)


def test_every_stage_runs_on_an_image_folder(folder: Path, tmp_path: Path):
    assert prepare_data(suite_over(folder, tmp_path))
    store = Store(tmp_path / "store")
    store.create()
    plan = make_plan(suite_over(folder, tmp_path), store)
    assert plan.unresolved is None
    row = next(row for row in plan.rows if row.variant.name == "MAE-CT_aug")
    for stage in (*row.chain, row.features, row.evaluations["knn"]):
        run_stage(stage, store, "test", lambda event: None)
    record = store.state(row.evaluations["knn"].key).record
    assert record is not None
    assert 0 <= record.metrics[0].value <= 100
    assert not prepare_data(suite_over(folder, tmp_path))


def test_a_local_copy_has_the_same_keys_and_gives_the_same_bits(
    folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    """The log of the stage that makes the copy tells of it; later stages find it."""
    monkeypatch.setenv("MAECT_LOCAL", str(tmp_path / "copies"))
    found: list[dict[str, Any]] = []
    for extra in ("", ", stage: local"):
        prepare_data(suite_over(folder, tmp_path, extra))
        store = Store(tmp_path / f"store{extra[2:]}")
        store.create()
        row = make_plan(suite_over(folder, tmp_path, extra), store, only="MAE-CT").rows[0]
        for stage in (*row.chain, row.features, row.evaluations["knn"]):
            run_stage(stage, store, "test", lambda event: None)
        found.append({key: record["files"] for key, record in completed(store.root).items()})
        told = [key for key in found[-1] if "of images to" in log_of(store, key)]
        assert told == ([row.chain[0].key] if extra else [])
    assert found[0] == found[1]
    assert len([*(tmp_path / "copies").glob("*/00000.bin")]) == 1


def log_of(store: Store, key: str) -> str:
    return (store.attempt_folder(key, 1) / "log.txt").read_text()


def test_data_that_are_not_in_a_folder_refuse_a_local_copy(bench: Bench):
    refused = bench("plan", SMOKE, "--set", "data.stage=local")
    assert refused.code == 2
    assert "stage 'local' goes with data 'image_folder' only" in refused.err


def test_the_time_of_processes_that_decode_is_counted(
    folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    assert prepare_data(suite_over(folder, tmp_path))
    store = Store(tmp_path / "store")
    store.create()
    stage = make_plan(suite_over(folder, tmp_path), store).rows[0].features
    crops = EncodedSplit.crops

    def elsewhere(*asked: Any) -> Crops:
        decoders.used_s += 1000.0
        return crops(*asked)

    monkeypatch.setattr(EncodedSplit, "crops", elsewhere)
    run_stage(stage, store, "test", lambda event: None)
    assert store.state(stage.key).record.cost.cpu_s >= 3000  # of three splits


def test_an_evaluation_may_be_of_other_data_than_the_row_is_trained_on(
    folder: Path, tmp_path: Path
):
    """An encoder of digits, 8 x 8 and grey, on the folder's colour images."""
    path = tmp_path / "transfer.yaml"
    path.write_text(
        f"""
suite: transfer
profile: tiny
profiles_from: {SMOKE}
seeds: [0]
evaluate: [knn, knn_there, finetune_there]
variants: {{raw pixels: {{init: pixels}}, MAE: {{stages: [mae]}}}}
tables: [{{title: Transfer, columns: [knn, knn_there, finetune_there]}}]
profiles:
  tiny:
    mae: {{steps: 2}}
    evaluations:
      knn_there: {{evaluation: knn, data: &there {{name: image_folder, path: '{folder}'}}}}
      finetune_there: {{evaluation: low_shot_finetune, data: *there, budgets: ["2"], epochs: 1}}
"""
    )
    assert prepare_data(load_suite(path))
    store = Store(tmp_path / "store")
    store.create()
    plan = make_plan(load_suite(path), store)
    assert plan.unresolved is None
    for stage in plan.stages.values():
        run_stage(stage, store, "test", lambda event: None)
    dims = {"raw pixels": 8 * 8 * 3, "MAE": 32}
    for row in plan.rows:
        here, there = (row.evaluations[name] for name in ("knn", "knn_there"))
        assert there.inputs["features"] is not here.inputs["features"]
        found = store.state(there.inputs["features"].key).record
        assert (found.data.name, found.summary["dim"]) == ("image_folder", dims[row.variant.name])
        records = [store.state(stage.key).record for stage in (here, there)]
        assert len({record.protocol_fingerprint for record in records}) == 2
        assert records[1].metrics[0].label == "k-NN, k=10, on image_folder"
    tuned = store.state(row.evaluations["finetune_there"].key).record
    assert tuned.summary["chosen"]["accuracy_2"][0]["images"] == 4


def predictions(evaluation: str, shifted: Path, tmp_path: Path) -> dict[str, torch.Tensor]:
    """What an evaluation of raw pixels predicts on the folder of a shifted test set."""
    path = tmp_path / "robust.yaml"
    path.write_text(
        f"""
suite: robust
profile: tiny
profiles_from: {SMOKE}
seeds: [0]
evaluate: [probe_shifted]
variants: {{raw pixels: {{init: pixels}}}}
tables: [{{title: Robustness, columns: [probe_shifted]}}]
profiles:
  tiny:
    evaluations:
      probe_shifted: {{evaluation: {evaluation}, epochs: 2, batch_size: 16,
                      data: {{name: image_folder, path: '{shifted}'}}}}
"""
    )
    prepare_data(load_suite(path))
    store = Store(tmp_path / "store")
    store.create()
    (row,) = make_plan(load_suite(path), store).rows
    stage = row.evaluations["probe_shifted"]
    for one in (stage.inputs["features"], stage):
        run_stage(one, store, "test", lambda event: None)
    return load_file(store.fetch(stage.key) / "predictions.safetensors")


def test_robustness_is_a_set_with_the_training_images_and_other_test_images(
    folder: Path, tmp_path: Path
):
    """As ImageNet-A: classes are matched by their folders' names, test images have some of them."""
    shutil.copytree(folder / "train" / "cat", folder / "train" / "ant")
    shifted = tmp_path / "shifted"
    (shifted / "val").mkdir(parents=True)
    (shifted / "train").symlink_to(folder / "train")
    for label in ("cat", "dog"):
        (shifted / "val" / label).symlink_to(folder / "val" / label)
    found = predictions("probe_restricted", shifted, tmp_path)
    assert {*found["labels"].tolist()} == {1, 2}  # ant, cat, dog
    assert {*found["class"].tolist()} <= {1, 2}


@pytest.mark.needs("bash")
def test_all_corruptions_become_one_test_set_by_the_line_in_the_docs(folder: Path, tmp_path: Path):
    """As ImageNet-C: corruption/severity/class/image, the same images in each."""
    for corruption in ("fog", "snow", "blur"):
        for severity in range(1, 6):
            shutil.copytree(folder / "val", tmp_path / "imagenet_c" / corruption / str(severity))
    (line,) = re.findall(r"^for f in imagenet_c/.*$", EVALUATION.read_text("utf-8"), re.MULTILINE)
    subprocess.run(["bash", "-ec", line], cwd=tmp_path, check=True)
    (tmp_path / "c" / "train").symlink_to(folder / "train")
    found = predictions("probe", tmp_path / "c", tmp_path)
    assert torch.bincount(found["labels"]).tolist() == [3 * 5 * 6] * 2


def test_channels_are_repeated_or_averaged():
    grey, colour = torch.rand(2, 1, 4, 4), torch.rand(2, 3, 4, 4)
    assert torch.equal(with_channels(grey, 3), torch.cat([grey] * 3, dim=1))
    assert torch.equal(with_channels(colour, 1), colour.mean(1, keepdim=True))
    assert with_channels(colour, 3) is colour


def test_broken_images_are_named(folder: Path, tmp_path: Path, capsys):
    (folder / "train" / "cat" / "3.png").write_bytes(b"")
    with pytest.raises(DataError, match=r"cat/3\.png"):
        prepare_data(suite_over(folder, tmp_path))
    prepare_data(suite_over(folder, tmp_path, ", max_broken: 0.1"))
    assert "cat/3.png" in capsys.readouterr().out


def as_shards(folder: Path, to: Path) -> None:
    """Write the images of a folder as one shard for training and one for testing."""
    to.mkdir()
    for split, name in (("train", "train"), ("val", "validation")):
        files = sorted((folder / split).rglob("*.png"))
        pl.DataFrame(
            {
                "image": [{"bytes": file.read_bytes(), "path": file.name} for file in files],
                "label": [("cat", "dog").index(file.parent.name) for file in files],
            }
        ).write_parquet(to / f"{name}-00000.parquet")


@pytest.mark.parametrize("kind", ["image_folder", "parquet"])
def test_a_run_begins_with_new_data_and_a_plan_names_what_does(
    kind: str, folder: Path, tmp_path: Path, bench: Bench
):
    """No count stands in the suite; `run` looks at the images, once, before it plans."""
    path = only_knn(suite_over(folder, tmp_path).path)
    if kind == "parquet":
        as_shards(folder, tmp_path / "shards")
        text = path.read_text().replace("image_folder", "parquet")
        path.write_text(text.replace(str(folder), str(tmp_path / "shards")))
    arguments = (path, "--store", tmp_path / "store", "--seeds", 1)
    arguments += tuple(word for one in SETS for word in ("--set", one))
    refused = bench("plan", *arguments)
    assert refused.code == 2
    assert "have not been checked yet; run: python -m bench data check" in refused.err
    assert "train_images" not in refused.err
    too_many = ("--workers", 7)  # no batch falls into so many parts: the run ends there
    run = bench("run", *arguments, *too_many)
    assert "cannot be cut into 7 equal parts" in run.err
    assert re.search("checked 72 of 72 images|unpacked 2 of 2 shards", run.out)
    assert not re.search("checked|unpacked", bench("run", *arguments, *too_many).out)
    planned = bench("plan", *arguments)
    assert planned.code == 0, planned.err
    assert "keys are not resolved" not in planned.out


def only_knn(path: Path) -> Path:
    """Make a suite's evaluations and columns k-NN alone."""
    text = path.read_text().replace("evaluate: [knn, probe]", "evaluate: [knn]")
    path.write_text(text.replace("columns: [knn, probe, cost]", "columns: [knn]"))
    return path


def test_published_lists_are_in_the_key_and_the_protocol_of_what_reads_them_alone(
    folder: Path, tmp_path: Path
):
    """With all images trained on; a budget without a list is told before the run."""
    lists = tmp_path / "lists"
    lists.mkdir()
    for name, rows in (("1imgs", 1), ("2imgs", 2), ("10percent", 3)):
        names = [f"{label}/{row}.png" for label in ("cat", "dog") for row in range(rows)]
        (lists / f"{name}.txt").write_text("\n".join(names))

    def suite(extra: str):
        path = only_knn(suite_over(folder, tmp_path, f", selection: 0{extra}").path)
        path.write_text(path.read_text().replace("evaluate: [knn]", "evaluate: [knn, low_shot]"))
        return load_suite(path, seeds=1, sets=SETS)

    published = f", low_shot: '{lists}'"
    with pytest.raises(DataError, match="holds no list for 5; leave these budgets out"):
        prepare_data(suite(published))
    (lists / "5imgs.txt").write_text(
        "\n".join(f"{label}/{row}.png" for label in ("cat", "dog") for row in range(5))
    )
    prepare_data(suite(published))
    store = Store(tmp_path / "store")
    store.create()
    plain, row = (make_plan(suite(extra), store).rows[0] for extra in ("", published))
    assert row.features.key == plain.features.key
    assert row.evaluations["knn"].key == plain.evaluations["knn"].key
    assert row.evaluations["low_shot"].key != plain.evaluations["low_shot"].key
    for stage in (row.features, row.evaluations["low_shot"]):
        run_stage(stage, store, "test", lambda event: None)
    record = store.state(row.evaluations["low_shot"].key).record
    assert record is not None and record.protocol is not None
    assert record.protocol["images"]["accuracy_5"] == [10]  # one draw
    assert record.protocol["lists"] == row.evaluations["low_shot"].settings["lists"]
    (lists / "1imgs.txt").write_text("cat/7.png\ndog/7.png")
    changed = make_plan(suite(published), store).rows[0].evaluations["low_shot"]
    assert changed.key != row.evaluations["low_shot"].key
    with pytest.raises(Exception, match="not those that were planned with"):
        run_stage(row.evaluations["low_shot"], store, "test", lambda event: None)


def test_a_split_that_is_empty_by_chance_is_missed_by_what_chooses_on_it(
    folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    """k-NN needs no selection split; the probe says so before anything is computed."""
    monkeypatch.setattr("maect.datasets.image_index.SELECTION_SHARE", 0.0)
    suite = suite_over(folder, tmp_path)
    with pytest.raises(DataError, match=r"probe needs images in the selection split"):
        prepare_data(suite)
    suite = load_suite(only_knn(suite.path), seeds=1, sets=SETS)
    prepare_data(suite)
    store = Store(tmp_path / "store")
    store.create()
    row = make_plan(suite, store, only="raw pixels").rows[0]
    for stage in (row.features, row.evaluations["knn"]):
        run_stage(stage, store, "test", lambda event: None)
    record = store.state(row.evaluations["knn"].key).record
    assert record is not None
    assert 0 <= record.metrics[0].value <= 100
    assert "the selection split has no images of 2 of 2 classes: cat, dog" in record.data.notes


@pytest.mark.parametrize(
    ("evaluation", "reported", "told"),
    [
        ("knn", "test", False),
        ("knn", "selection", True),
        ("cluster", "test", False),
        ("low_shot", "test", False),
        ("probe", "test", True),
        ("probe_augmented", "test", True),
        ("low_shot_finetune", "test", False),
    ],
)
def test_what_needs_the_selection_split(evaluation: str, reported: str, told: bool):
    evaluator = evals.get(evaluation)
    for counts in ({"selection": 1}, {"train": 9}):
        evaluator.require_images(reported, counts)
    with pytest.raises(ValueError, match="selection split") if told else nullcontext():
        evaluator.require_images(reported, {"selection": 0})


def test_names_that_are_no_utf8_are_worked_with_and_shown_escaped(folder: Path, tmp_path: Path):
    (folder / "train" / "cat").rename(folder / "train" / os.fsdecode(b"c\xe4t"))
    (folder / "val" / "cat").rename(folder / "val" / os.fsdecode(b"c\xe4t"))
    (folder / "train" / "dog" / os.fsdecode(b"\xff\x1b.png")).write_bytes(b"")
    path = only_knn(suite_over(folder, tmp_path, ", max_broken: 0.1").path)
    store = tmp_path / "store"
    done = run_bench("run", path, "--store", store, "--only", "raw pixels", "--seeds", 1,
                     "--workers", 0, *(w for one in SETS for w in ("--set", one)))  # fmt: skip
    assert done.code == 0, done.err
    name = r"train/dog/\xff\x1b.png"
    assert f"left out: {name}: empty file" in done.out
    for record in completed(store).values():
        assert record["data"]["broken_files"] == [f"{name}: empty file"]
    assert name in next((store / "reports").glob("*.html")).read_text()


def write_images(folder: Path, count: int) -> list[str]:
    """That many training images of 10 classes and 20 for testing; ten of the former broken."""
    random = np.random.default_rng(1)
    for split, images in (("train", count), ("val", 20)):
        for number in range(images):
            place = folder / split / f"class{number % 10}"
            place.mkdir(parents=True, exist_ok=True)
            pixels = random.integers(0, 256, (8, 8, 3), dtype=np.uint8)
            image = Image.fromarray(pixels)
            image = image.convert("CMYK") if split == "train" and number in (5, 6) else image
            suffix = "jpg" if image.mode == "CMYK" else "png"
            image.save(place / f"{number:04}.{suffix}")
    broken = [f"train/class{n % 10}/{n:04}.png" for n in range(7, count, count // 10)]
    for index, name in enumerate(broken):
        file = folder / name
        file.write_bytes([b"", b"no image", file.read_bytes()[:60]][index % 3])
    return broken


def test_ten_broken_images_among_a_thousand(tmp_path: Path, bench: Bench, monkeypatch):
    """The run, its records and the report say which ten; past the stated share it is an error."""
    monkeypatch.setenv("MAECT_DATA", str(tmp_path / "data"))
    broken = write_images(tmp_path / "images", 1000)
    assert len(broken) == 10
    text = SMOKE.read_text().replace(
        "data: {name: digits, image_size: 8}",
        f"data: {{name: image_folder, path: '{tmp_path / 'images'}', image_size: 8, "
        "train_images: 1000}",
    )
    suite, store = tmp_path / "folder.yaml", tmp_path / "store"
    suite.write_text(text)
    only_knn(suite)
    arguments = ["run", suite, "--store", store, "--seeds", "1", "--only", "raw pixels"]
    arguments += ["--workers", "0"]

    refused = bench(*arguments)  # ten are more than the 0.1 % allowed by default
    assert refused.code == 2
    assert "10 of 1000 training images cannot be read" in refused.err
    assert all(name in refused.err for name in broken)
    assert not store.exists()

    done = run_bench(*arguments, "--set", "data.max_broken=0.01")
    assert done.code == 0, done.err
    left_out = [line for line in done.out.splitlines() if line.startswith("left out: ")]
    assert [line.split(": ")[1] for line in left_out] == sorted(broken)
    assert "converted to RGB: 2 images of CMYK" in done.out
    for record in completed(store).values():
        data = record["data"]
        assert (data["broken"], data["converted"]) == (10, {"CMYK": 2})
        assert [entry.split(": ")[0] for entry in data["broken_files"]] == sorted(broken)
    page = next((store / "reports").glob("*.html")).read_text()
    assert "10 training images cannot be read and are left out" in page
    assert all(name in page for name in broken)
    assert "Images converted to RGB: 2 CMYK." in done.out


def test_another_node_with_other_images_is_found_out(folder: Path, tmp_path: Path):
    """At the start, for all nodes at once, and by a worker on a node that joined later."""
    suite = suite_over(folder, tmp_path)
    prepare_data(suite)
    suite = suite_over(folder, tmp_path)
    store = Store(tmp_path / "store")
    store.create()
    plan = make_plan(suite, store, only="raw pixels")
    stage = next(s for s in plan.stages.values() if s.kind == "features")
    settings = next(iter(suite.variants.values())).row.data
    known = [(settings, tmp_path / "data", stage.data.fingerprint)]
    assert _lack(known) == ""
    Image.fromarray(np.zeros((40, 40, 3), np.uint8)).save(folder / "train" / "cat" / "0.png")
    assert _lack(known) == f"{folder} holds other images than on the run's own node"
    with pytest.raises(StageFailed, match="is not what the run was planned with: there are other"):
        run_stage(stage, store, "later", lambda event: None, 0.0)
    shutil.rmtree(folder)
    assert f"there is no folder {folder}" in _lack(known)
