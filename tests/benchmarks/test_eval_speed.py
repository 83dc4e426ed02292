"""Evaluations against their peers: one core each, same features, same run.

Medians of process CPU time over repeats that alternate between the two sides. Each test prints
what it measured; the asserted ratios leave room for a busy machine and are not the aims.
"""

from __future__ import annotations

import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
import pytest
import torch
from sklearn.cluster import KMeans
from sklearn.linear_model import LogisticRegression
from sklearn.neighbors import NearestNeighbors
from threadpoolctl import threadpool_limits
from torch import Tensor, nn

from maect.evals.kmeans import kmeans
from maect.evals.linear_probe import Probes, rate
from maect.evals.logistic import fit_logistic
from maect.evals.low_shot import centred_rows
from maect.evals.nearest import vote
from maect.evals.neighbors import nearest, normalize_rows

REPEATS = 5
L2 = 0.00025


@pytest.fixture(autouse=True)
def _one_core() -> Iterator[None]:
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    with threadpool_limits(1):
        yield
    torch.set_num_threads(threads)


def seconds(sides: dict[str, Callable[[], object]]) -> dict[str, float]:
    """Median CPU seconds of each side, after one unmeasured call of each."""
    for call in sides.values():
        call()
    taken: dict[str, list[float]] = {name: [] for name in sides}
    for _ in range(REPEATS):
        for name, call in sides.items():
            start = time.process_time()
            call()
            taken[name].append(time.process_time() - start)
    return {name: float(np.median(times)) for name, times in taken.items()}


def show(capsys: pytest.CaptureFixture[str], title: str, taken: dict[str, float]) -> None:
    ours = taken["ours"]
    with capsys.disabled():
        print(f"\n{title}")
        for name, value in taken.items():
            print(f"  {name:32s} {1e3 * value:9.1f} ms   {value / ours:5.2f} x ours")


def classed(rows: int, dim: int, seed: int, classes: int = 10) -> tuple[Tensor, Tensor]:
    """Overlapping Gaussian classes: x [rows, dim] float32, y [rows]."""
    means = np.random.default_rng(11).standard_normal((classes, dim))
    draws = np.random.default_rng(seed)
    y = draws.permutation(np.arange(rows) % classes)
    x = 0.3 * means[y] + draws.standard_normal((rows, dim))
    return torch.from_numpy(x).float(), torch.from_numpy(y)


def matmul_topk_votes(
    stored: Tensor, labels: Tensor, queries: Tensor, k: int, temperature: float
) -> Tensor:
    """The recipe of lightly's `knn_predict` and most repositories: one product with all stored
    rows, top-k, one-hot votes weighted by exp(similarity / temperature); batches of 500 queries."""
    found = []
    for block in queries.split(500):
        similarity, index = (block @ stored.T).topk(k)
        hot = torch.zeros(len(block) * k, 10).scatter_(1, labels[index].view(-1, 1), 1.0)
        weight = (similarity / temperature).exp()[:, :, None]
        found.append(
            (hot.view(len(block), k, 10) * weight).sum(1).argsort(1, descending=True)[:, 0]
        )
    return torch.cat(found)


def test_knn(capsys: pytest.CaptureFixture[str]) -> None:
    (train_x, train_y), (test_x, _) = classed(50_000, 192, 0), classed(10_000, 192, 1)
    stored, queries, k = normalize_rows(train_x), normalize_rows(test_x), 20
    results: dict[str, np.ndarray] = {}

    def decide(similarity: np.ndarray, index: np.ndarray) -> np.ndarray:
        return vote(train_y.numpy()[index], similarity, 0.07, 10)

    def ours() -> None:
        similarity, index = nearest(stored, queries, k)
        results["ours"] = decide(similarity.numpy(), index.numpy())

    model = NearestNeighbors(n_neighbors=k, algorithm="brute", n_jobs=1).fit(stored.numpy())

    def scikit_learn() -> None:  # of unit rows, |a - b|^2 = 2 - 2 a.b
        distance, index = model.kneighbors(queries.numpy())
        results["scikit-learn"] = decide(1 - distance.astype(np.float64) ** 2 / 2, index)

    def recipe() -> None:
        results["recipe"] = matmul_topk_votes(stored, train_y, queries, k, 0.07).numpy()

    taken = seconds({"ours": ours, "scikit-learn, brute": scikit_learn, "lightly's recipe": recipe})
    show(capsys, "k-NN, 50,000 x 192 stored, 10,000 queries, k = 20", taken)
    for peer in ("scikit-learn", "recipe"):
        assert (results["ours"] == results[peer]).mean() >= 0.9999  # their near ties are in float32
    assert taken["scikit-learn, brute"] / taken["ours"] > 1.25
    assert taken["lightly's recipe"] / taken["ours"] > 1.0


@pytest.mark.skipif(not Path("/proc/self/clear_refs").exists(), reason="needs Linux's /proc")
def test_knn_memory(capsys: pytest.CaptureFixture[str]) -> None:
    code = """
import torch
from maect.evals.neighbors import nearest, normalize_rows
torch.set_num_threads(1)
rows = torch.Generator().manual_seed(0)
stored = normalize_rows(torch.randn(50_000, 192, generator=rows))
queries = normalize_rows(torch.randn(10_000, 192, generator=rows))
nearest(stored[:100], queries[:300], 20)
def memory(name):
    lines = open("/proc/self/status").read().splitlines()
    return next(int(line.split()[1]) for line in lines if line.startswith(name))
open("/proc/self/clear_refs", "w").write("5")  # forget the peak so far
before = memory("VmRSS")
nearest(stored, queries, 20)
print(memory("VmHWM") - before)
"""
    added_mib = int(subprocess.check_output([sys.executable, "-c", code])) / 1024
    matrix_mib = 50_000 * 10_000 * 4 / 2**20
    with capsys.disabled():
        print(f"\nk-NN peak memory: {added_mib:.0f} MiB, all similarities: {matrix_mib:.0f} MiB")
    assert added_mib < matrix_mib / 5


def plain_probe(x: Tensor, y: Tensor, epochs: int) -> None:
    """One probe with torch's modules, autograd and optimizer, on the same cached features."""
    model = nn.Sequential(nn.BatchNorm1d(x.shape[1], affine=False), nn.Linear(x.shape[1], 10))
    optimizer = torch.optim.SGD(model.parameters(), lr=0.4, momentum=0.9)
    for _ in range(epochs):
        for rows in torch.randperm(len(y)).split(1024):
            optimizer.zero_grad()
            nn.functional.cross_entropy(model(x[rows]), y[rows]).backward()
            optimizer.step()


def our_probes(x: Tensor, y: Tensor, epochs: int, lrs: list[float]) -> None:
    probes = Probes(x.shape[1], 10, lrs)
    for _ in range(epochs):
        for i, rows in enumerate(torch.randperm(len(y)).split(1024)):
            probes.step(x.index_select(0, rows), y.index_select(0, rows), rate(i, 20, 2))


def test_ten_probes_together(capsys: pytest.CaptureFixture[str]) -> None:
    x, y = classed(20_480, 192, 0)
    lrs = [0.04 * i for i in range(1, 11)]
    taken = seconds(
        {
            "ours": lambda: our_probes(x, y, 3, lrs),
            "ours, one probe": lambda: our_probes(x, y, 3, lrs[-1:]),
            "torch modules, one probe": lambda: plain_probe(x, y, 3),
        }
    )
    show(capsys, "ten linear probes, 60 steps of 1,024 x 192, 10 classes", taken)
    assert taken["ours"] < 3.5 * taken["ours, one probe"]
    assert taken["ours"] < 2.0 * taken["torch modules, one probe"]


def shots(count: int, classes: int, dim: int, draws: int) -> list[tuple[Tensor, Tensor]]:
    return [
        (centred_rows(x), y)
        for x, y in (classed(count * classes, dim, seed, classes) for seed in range(draws))
    ]


def test_low_shot(capsys: pytest.CaptureFixture[str]) -> None:
    drawn = [part for count in (1, 2, 5) for part in shots(count, 10, 192, 3)]
    most = max(len(y) for _, y in drawn)
    x, y = torch.zeros(len(drawn), most, 192).double(), torch.full((len(drawn), most), -1)
    for i, (rows, labels) in enumerate(drawn):
        x[i, : len(labels)], y[i, : len(labels)] = rows, labels
    weights: dict[float, list[np.ndarray]] = {}

    def objective(weight: np.ndarray, rows: Tensor, labels: Tensor) -> float:
        scores = rows @ torch.from_numpy(weight).T
        fit = nn.functional.cross_entropy(scores, labels, reduction="sum").item()
        return fit + L2 / 2 * float((weight**2).sum())

    solved = fit_logistic(x, y, 10, L2)

    def scikit_learn(tol: float) -> Callable[[], None]:
        def call() -> None:
            model = LogisticRegression(C=1 / L2, fit_intercept=False, tol=tol, max_iter=10_000)
            weights[tol] = [model.fit(a.numpy(), b.numpy()).coef_ for a, b in drawn]

        return call

    taken = seconds(
        {
            "ours": lambda: fit_logistic(x, y, 10, L2),
            "scikit-learn lbfgs, tol 1e-8": scikit_learn(1e-8),
            "scikit-learn lbfgs, tol 1e-4": scikit_learn(1e-4),
        }
    )
    show(capsys, "low-shot, 1/2/5 images of 10 classes, three draws each, 192 features", taken)
    gap = {
        tol: max(
            objective(weight, *part) / best.item() - 1
            for weight, part, best in zip(found, drawn, solved.objective, strict=True)
        )
        for tol, found in weights.items()
    }
    with capsys.disabled():
        print(f"  scikit-learn's objective over ours, less 1, at each tol: {gap}")
    assert abs(gap[1e-8]) < 1e-5
    assert gap[1e-4] > 0
    assert taken["scikit-learn lbfgs, tol 1e-8"] / taken["ours"] > 1.5


def test_kmeans(capsys: pytest.CaptureFixture[str]) -> None:
    x, _ = classed(10_000, 192, 0)
    inertia = {}

    def ours() -> None:
        inertia["ours"] = kmeans(x, 10, runs=10).inertia.min().item()

    def scikit_learn() -> None:
        inertia["scikit-learn"] = KMeans(10, n_init=10, random_state=0).fit(x.numpy()).inertia_

    taken = seconds({"ours": ours, "scikit-learn": scikit_learn})
    show(capsys, "k-means, 10,000 x 192, 10 clusters, 10 starts", taken)
    assert inertia["ours"] == pytest.approx(inertia["scikit-learn"], rel=0.005)
    assert taken["scikit-learn"] / taken["ours"] > 0.7
