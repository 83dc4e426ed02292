"""What chooses a setting and what reports on it are different images, whatever the split."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
from safetensors.torch import load_file, save_file
from test_evals_parallel import VIEW, job

from maect import evals
from maect.datasets.splits import selection_rows
from maect.stages import evaluate, evaluate_encoder, features
from maect.stages.job import Output

SETTINGS: dict[str, dict[str, Any]] = {
    "knn": {},
    "probe": {"epochs": 3, "batch_size": 256},
    "probe_augmented": {"epochs": 1, "batch_size": 256, "view": VIEW},
    "low_shot": {"budgets": ["1"]},
    "low_shot_finetune": {"budgets": ["2"], "epochs": 2, "lrs": [1e-4, 1e-2], "view": VIEW},
    "cluster": {},
    "histogram": {},
    "probe_restricted": {"epochs": 3, "batch_size": 256},
    "probe_dinov2": {"epochs": 1, "batch_size": 256, "view": VIEW},
    "probe_attentive": {"epochs": 1, "batch_size": 256, "view": VIEW},
    "knn_dino": {},
    "knn_mim_refiner": {},
}
#: what features of several blocks are of
JOINED = {"block": [0, 1], "pool": "both", "norm": True}


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> dict[bool, Path]:
    """Features of a random encoder: the usual ones, and those of several blocks."""
    found = {joined: tmp_path_factory.mktemp("features") for joined in (False, True)}
    for joined, folder in found.items():
        one = job("features", 1, folder)
        one.settings |= JOINED if joined else {}
        save_file(features.run(one).tensors["features"], folder / "features.safetensors")
    return found


def run(kind: str, split: str, folder: Path) -> Output:
    one, evaluator = job("features", 1, folder), evals.get(kind)
    one.kind, one.inputs = kind, {"features": folder}
    one.settings |= {"settings": SETTINGS[kind], "split": split}
    one.settings |= JOINED | {"tokens": JOINED} if evaluator.joins_blocks else {}
    stage = evaluate_encoder if evaluator.needs_encoder else evaluate
    return stage.run(one)


def chosen(output: Output) -> dict[str, Any]:
    """What an evaluation chose, without what the published probe chooses on test: told beside."""
    found = output.summary["chosen"]
    return {name: what for name, what in found.items() if not name.startswith("test_selected")}


def test_every_evaluation_is_looked_at():
    assert SETTINGS.keys() == set(evals.names())


@pytest.mark.parametrize("split", ["test", "selection"])
@pytest.mark.parametrize("kind", SETTINGS)
def test_labels_that_are_reported_on_choose_nothing(
    kind: str, split: str, folders: dict[bool, Path], tmp_path: Path
):
    folder = folders[evals.get(kind).joins_blocks]
    tensors = load_file(folder / "features.safetensors")
    labels = tensors[f"{split}_y"].numpy()
    reported = selection_rows(split, len(labels)).get("test", np.arange(len(labels)))
    labels[reported] = np.random.default_rng(0).permutation(labels[reported])
    save_file(tensors, tmp_path / "features.safetensors")
    honest, permuted = (run(kind, split, where) for where in (folder, tmp_path))
    assert len(honest.tensors["predictions"]["labels"]) == len(reported)
    assert chosen(permuted) == chosen(honest)
    assert ("half" in honest.protocol["split"]) == (split == "selection")


def test_halves_share_no_image_and_leave_none_out():
    choosing, reporting = selection_rows("selection", 201).values()
    assert (len(choosing), len(reporting)) == (100, 101)
    assert sorted([*choosing, *reporting]) == list(range(201))
