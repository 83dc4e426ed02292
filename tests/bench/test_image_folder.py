"""A suite over a folder of images: read once, broken files named, every stage run on it."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from bench_helpers import SMOKE
from PIL import Image

from bench.data import prepare_data
from bench.plan import make_plan
from bench.store import Store
from bench.suite import data_info, load_suite
from bench.worker import Task, run_task
from maect.datasets import DataError

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
        f"data: {{name: image_folder, path: '{folder}', image_size: 32, train_images: 60{extra}}}",
    )
    path = tmp_path / "folder.yaml"
    path.write_text(text)
    return load_suite(path, seeds=1, sets=SETS)


def test_every_stage_runs_on_an_image_folder(folder: Path, tmp_path: Path):
    assert make_plan(suite_over(folder, tmp_path), Store(tmp_path / "store")).unresolved
    assert prepare_data(suite_over(folder, tmp_path))
    store = Store(tmp_path / "store")
    store.create()
    plan = make_plan(suite_over(folder, tmp_path), store)
    assert plan.unresolved is None
    row = next(row for row in plan.rows if row.variant.name == "MAE-CT_aug")
    for stage in (*row.chain, row.features, row.evaluations["knn"]):
        run_task(Task.of(stage), store.root, "test", lambda key, event: None)
    record = store.state(row.evaluations["knn"].key).record
    assert record is not None
    assert 0 <= record["metrics"][0]["value"] <= 100
    assert not prepare_data(suite_over(folder, tmp_path))


def test_broken_images_are_named(folder: Path, tmp_path: Path, capsys):
    (folder / "train" / "cat" / "3.png").write_bytes(b"")
    with pytest.raises(DataError, match=r"cat/3\.png"):
        prepare_data(suite_over(folder, tmp_path))
    prepare_data(suite_over(folder, tmp_path, ", max_broken: 0.1"))
    assert "cat/3.png" in capsys.readouterr().out
