"""What runs the encoder announces the images that it asks for, so that they are decoded ahead."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image
from safetensors.torch import save_file

from maect import datasets
from maect.datasets.decoders import Crops, EncodedSplit, Request
from maect.parallel import Group
from maect.settings import DataSettings
from maect.stages import evaluate_encoder, features
from maect.stages.job import Job

MODEL = {"size": "custom", "patch_size": 8, "dim": 16, "depth": 1, "heads": 2}
KINDS: dict[str, dict[str, Any]] = {
    "probe_augmented": {"epochs": 2, "batch_size": 20},
    "low_shot_finetune": {"budgets": ["5"], "epochs": 2, "batch_size": 3, "cutmix": 1.0},
    "histogram": {"bins": 2},
}


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder of images of several sizes, and the features of them."""
    place = tmp_path_factory.mktemp("place")
    draws = np.random.default_rng(0)
    for pool, count in (("train", 150), ("val", 20)):
        for number in range(count):
            pixels = draws.integers(0, 256, (20 + number % 3, 24, 3), np.uint8)
            file = place / "set" / pool / f"class{number % 2}" / f"{number}.png"
            file.parent.mkdir(parents=True, exist_ok=True)
            Image.fromarray(pixels).save(file)
    datasets.prepare(
        DataSettings(name="image_folder", path=str(place / "set"), image_size=16), place
    )
    made = features.run(job_of("features", place)).tensors["features"]
    save_file(made, place / "features.safetensors")
    return place


def job_of(kind: str, place: Path) -> Job:
    settings: dict[str, Any] = {
        "data": {"name": "image_folder", "image_size": 16},
        "model": MODEL,
        "numerics": {},
        "seed": 0,
        "init": "random",
        "pool": "mean",
    }
    if kind in KINDS:
        settings |= {"settings": KINDS[kind], "split": "test"}
    inputs = {"features": place} if kind in KINDS else {}
    name, path = "image_folder", str(place / "set")
    return Job(settings, inputs, place, kind=kind, data_name=name, data_path=path)


@pytest.mark.parametrize("kind", ["features", *KINDS])
def test_all_images_are_announced(kind: str, place: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    announced, asked, crops = 0, 0, EncodedSplit.crops

    def counted(split: EncodedSplit, rows: np.ndarray, request: Callable[[], Request]) -> Crops:
        nonlocal announced, asked

        def unannounced() -> Request:
            nonlocal announced
            announced -= len(rows)
            return request()

        announced, asked = announced + len(rows), asked + len(rows)
        return crops(split, rows, unannounced)

    monkeypatch.setattr(EncodedSplit, "crops", counted)
    (features if kind == "features" else evaluate_encoder).run(job_of(kind, place))
    assert asked >= 100
    # fine-tuning looks at one image of each draw first, to see which weights take part
    assert asked - announced == (3 if kind == "low_shot_finetune" else 0)


@pytest.mark.parametrize("workers", [1, 2, 3, 8])
@pytest.mark.parametrize("count", [0, 1, 31, 64])
def test_each_worker_computes_what_it_is_dealt(workers: int, count: int) -> None:
    everything = set()
    for rank in range(workers):
        group = Group()
        group.rank, group.size = rank, workers
        dealt = group.dealt(count, 10)
        turns = -(-count // (10 * workers))
        assert len(dealt) == turns
        everything |= {(rows.start, rows.stop) for rows in dealt}
    assert everything == {(start, min(start + 10, count)) for start in range(0, count, 10)}
