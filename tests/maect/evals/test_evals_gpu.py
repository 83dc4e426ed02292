"""Every evaluation computes on a GPU what it computes on the CPU, and repeats it to the bit."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import save_file
from torch import Tensor

from maect import evals
from maect.datasets import data_root
from maect.evals.kmeans import kmeans, silhouettes
from maect.evals.neighbors import nearest, normalize_rows
from maect.parallel import make_deterministic
from maect.stages import evaluate, evaluate_encoder, features
from maect.stages.job import Job, Output

pytestmark = pytest.mark.gpu
MODEL = {"size": "custom", "patch_size": 2, "dim": 32, "depth": 2, "heads": 2, "mlp_ratio": 2.0}
VIEW = {"crop_scale": [0.5, 1.0], "flip": 0.0}
PROBE: dict[str, Any] = {"epochs": 5, "batch_size": 128, "base_lrs": [0.1, 0.4]}
#: all that a recipe may draw
RECIPE = {"rand_augment": 9, "erasing": 0.5, "mixup": 0.8, "cutmix": 1.0, "drop_path": 0.3}
KINDS: dict[str, dict[str, Any]] = {
    "cluster": {"runs": 4, "standardize": True},
    "histogram": {"bins": 4},
    "knn": {},
    "low_shot": {"budgets": ["1", "2", "5", "10%"]},
    "low_shot_finetune": {
        "budgets": ["1"],
        "epochs": 2,
        "batch_size": 7,
        "lrs": [1e-4],
        "view": VIEW,
        **RECIPE,
    },
    "probe": PROBE,
    "probe_augmented": PROBE | {"view": VIEW, "epochs": 2},
    "probe_restricted": PROBE,
}
#: share of the predictions that may differ: a near tie among 350 images, or among learning rates,
#: and rounding that grows as networks train and as images choose among clusters
SLACK = {"knn": 0.005, "histogram": 0.0, "low_shot": 0.02, "cluster": 0.2}
REST = 0.1
#: by how much predicted numbers may
CLOSE = {"histogram": 1e-4, "predicted": 1e-4, "similarity": 1e-5}


def job_of(kind: str, folder: Path, device: str, **more: Any) -> Job:
    settings: dict[str, Any] = {
        "data": {"name": "digits", "image_size": 8},
        "model": MODEL,
        "numerics": {"precision": "fp32"},
        "seed": 0,
        "init": "random",
        "pool": "mean",
        **more,
    }
    inputs = {}
    if kind in KINDS:
        settings |= {"settings": KINDS[kind], "split": "test"}
        inputs = {"features": folder}
    place = torch.device(device)
    return Job(settings, inputs, data_root(), kind=kind, data_name="digits", device=place)


def output_of(kind: str, folder: Path, device: str, **more: Any) -> Output:
    module = evaluate_encoder if evals.get(kind).needs_encoder else evaluate
    return module.run(job_of(kind, folder, device, **more))


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Features that both devices read."""
    at = tmp_path_factory.mktemp("features")
    tensors = features.run(job_of("features", at, "cpu")).tensors["features"]
    save_file(tensors, at / "features.safetensors")
    return at


def assert_agree(kind: str, cpu: dict[str, Tensor], gpu: dict[str, Tensor]) -> None:
    assert cpu.keys() == gpu.keys()
    for name, tensor in cpu.items():
        found = gpu[name]
        if found.is_floating_point():
            if name.partition("_block")[0] in CLOSE:
                close = CLOSE[name.partition("_block")[0]]
                torch.testing.assert_close(found, tensor, rtol=0, atol=close)
        else:
            differ = (found != tensor).double().mean().item()
            assert differ <= SLACK.get(kind, REST), f"{name}: {differ:.2%} differ"


def test_features_of_a_gpu_are_those_of_the_cpu(folder: Path) -> None:
    one, two = (
        features.run(job_of("features", folder, device)).tensors["features"]
        for device in ("cpu", "cuda")
    )
    for name, tensor in one.items():
        torch.testing.assert_close(two[name], tensor, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("kind", KINDS)
def test_a_gpu_predicts_what_the_cpu_predicts_and_repeats_it(kind: str, folder: Path) -> None:
    cpu, gpu, again = (output_of(kind, folder, device) for device in ("cpu", "cuda", "cuda"))
    first, second = (output.tensors["predictions"] for output in (gpu, again))
    for name, tensor in first.items():
        assert torch.equal(second[name], tensor), name
    assert gpu.values == again.values
    assert_agree(kind, cpu.tensors["predictions"], first)
    for name, value in cpu.values.items():
        assert gpu.values[name] == pytest.approx(value, abs=0.01 + 100 * SLACK.get(kind, REST)), (
            name
        )


@pytest.mark.parametrize("kind", ["knn", "probe"])
def test_blocks_go_to_the_gpu_one_by_one(kind: str, folder: Path, tmp_path: Path) -> None:
    blocks: dict[str, Any] = {"block": [0, 1]}
    made = features.run(job_of("features", folder, "cpu", **blocks)).tensors["features"]
    save_file(made, tmp_path / "features.safetensors")
    cpu, gpu = (output_of(kind, tmp_path, d, tokens=blocks) for d in ("cpu", "cuda"))
    assert_agree(kind, cpu.tensors["predictions"], gpu.tensors["predictions"])


def test_neighbours_of_many_rows_are_exact() -> None:
    """In several blocks of stored rows and of queries, the neighbours of the CPU."""
    make_deterministic(1)
    draws = np.random.default_rng(0).standard_normal((40_000, 768)).astype(np.float32)
    stored, queries = torch.from_numpy(draws), torch.from_numpy(draws[:600] + 0.5 * draws[600:1200])
    found = [nearest(stored.to(d), queries.to(d), 20, normalize_rows) for d in ("cpu", "cuda")]
    assert (found[0][1] == found[1][1]).double().mean() > 0.999
    torch.testing.assert_close(found[0][0], found[1][0], rtol=0, atol=1e-6)


def test_many_clusters_repeat() -> None:
    """As many as ImageNet's classes; with an empty cluster now and then."""
    make_deterministic(1)
    draws = torch.randn(5_000, 128, generator=torch.manual_seed(0))
    x = torch.cat([draws, draws[:50].repeat(20, 1)]).cuda()
    first, second = (kmeans(x, 1_000, runs=3, max_iterations=10) for _ in range(2))
    assert torch.equal(first.label, second.label)
    assert torch.equal(first.inertia, second.inertia)
    assert len(first.label[0].unique()) > 990
    width = silhouettes(x, first.label[0], 1_000)
    expected = silhouettes(x.cpu(), first.label[0].cpu(), 1_000)
    torch.testing.assert_close(width.cpu(), expected, rtol=0, atol=1e-5)
