"""What runs the encoder, on 1, 2 and 4 workers (gloo): features, augmented probe, fine-tuning."""

from __future__ import annotations

import multiprocessing
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from safetensors.torch import save_file
from torch import Tensor

from maect.datasets import data_root
from maect.stages import evaluate_encoder, features
from maect.stages.job import Job, Output

WORKERS = (1, 2, 4)
MODEL = {"size": "custom", "patch_size": 2, "dim": 16, "depth": 2, "heads": 2, "mlp_ratio": 2.0}
VIEW = {"crop_scale": [0.5, 1.0], "flip": 0.0}
#: fine-tuning on one image a class: ten images, which no number of workers divides; all that a
#: recipe may draw
RECIPE = {"rand_augment": 9, "erasing": 0.5, "mixup": 0.8, "cutmix": 1.0, "drop_path": 0.3}
KINDS: dict[str, dict[str, Any]] = {
    "probe_augmented": {"epochs": 2, "batch_size": 256, "view": VIEW},
    "low_shot_finetune": {"budgets": ["1"], "epochs": 3, "batch_size": 7, "view": VIEW, **RECIPE},
}


def job(kind: str, shards: int, folder: Path) -> Job:
    settings: dict[str, Any] = {
        "data": {"name": "digits", "image_size": 8},
        "model": MODEL,
        "numerics": {"shards": shards},
        "seed": 0,
        "init": "random",
        "pool": "mean",
    }
    if kind in KINDS:
        settings |= {"settings": KINDS[kind], "split": "test"}
    inputs = {"features": folder} if kind in KINDS else {}
    return Job(settings, inputs, data_root(), kind=kind, data_name="digits")


def run(folder: Path, shards: int) -> dict[str, Output]:
    """Features, then what reads them; the features lie in `folder` for all worker counts."""
    found = {"features": features.run(job("features", shards, folder))}
    if not (folder / "features.safetensors").exists():
        save_file(found["features"].tensors["features"], folder / "features.safetensors")
    for kind in KINDS:
        found[kind] = evaluate_encoder.run(job(kind, shards, folder))
    return found


def worker(rank: int, workers: int, folder: Path) -> None:
    torch.set_num_threads(1)
    if workers > 1:
        meet = f"file://{folder}/meet{workers}"
        dist.init_process_group("gloo", init_method=meet, rank=rank, world_size=workers)
    found = {(shards, kind): out for shards in (1, 4) for kind, out in run(folder, shards).items()}
    if rank == 0:
        tensors = {at: next(iter(out.tensors.values())) for at, out in found.items()}
        summaries = {at: out.summary for at, out in found.items()}
        torch.save((tensors, summaries), folder / f"{workers}.pt")
    if workers > 1:
        dist.destroy_process_group()


Found = tuple[dict[tuple[int, str], dict[str, Tensor]], dict[tuple[int, str], Any]]


@pytest.fixture(scope="module")
def found(tmp_path_factory: pytest.TempPathFactory) -> dict[int, Found]:
    """Worker count -> tensors and summaries by (shards, kind), as the first worker has them."""
    folder = tmp_path_factory.mktemp("parallel")
    # the imports, which cost seconds, happen once for all workers
    multiprocessing.set_forkserver_preload(["maect.stages.evaluate_encoder"])
    for workers in WORKERS:
        if workers == 1:
            worker(0, 1, folder)
        else:
            arguments = (workers, folder)
            mp.start_processes(worker, arguments, nprocs=workers, start_method="forkserver")
    return {workers: torch.load(folder / f"{workers}.pt") for workers in WORKERS}


@pytest.mark.parametrize("workers", [2, 4])
@pytest.mark.parametrize("kind", ["features", *KINDS])
def test_four_logical_shards_leave_the_same_bits(
    found: dict[int, Found], kind: str, workers: int
) -> None:
    (one, said), (several, said_by_several) = found[1], found[workers]
    assert several[4, kind].keys() == one[4, kind].keys()
    for name, tensor in one[4, kind].items():
        assert torch.equal(several[4, kind][name], tensor), name
    assert said_by_several[4, kind] == said[4, kind]


@pytest.mark.parametrize("workers", [2, 4])
@pytest.mark.parametrize("kind", ["features", *KINDS])
def test_without_shards_they_differ_by_rounding_only(
    found: dict[int, Found], kind: str, workers: int
) -> None:
    one, several = (found[count][0][1, kind] for count in (1, workers))
    if kind == "features":
        assert all(torch.equal(several[name], tensor) for name, tensor in one.items())
    else:
        agree = np.mean((several["labels"] == one["labels"]).numpy())
        name = next(name for name in one if name.startswith("class"))
        assert agree == 1
        assert (several[name] == one[name]).float().mean() > 0.97
