"""k-means against scikit-learn's, clustering scores, effective rank."""

from __future__ import annotations

import itertools

import numpy as np
import pytest
import torch
from sklearn.cluster import KMeans
from sklearn.metrics import silhouette_samples

from maect import evals
from maect.evals import kmeans as kmeans_module
from maect.evals.clustering import ClusterSettings, cluster_accuracy
from maect.evals.kmeans import kmeans


def blobs(seed: int, rows: int, spread: float, classes: int = 5, dim: int = 16) -> evals.Features:
    draws = np.random.default_rng(seed)
    means = draws.standard_normal((classes, dim))
    y = draws.permutation(np.arange(rows) % classes)
    x = means[y] + spread * draws.standard_normal((rows, dim))
    return evals.Features(torch.from_numpy(x).float(), torch.from_numpy(y))


def run(data: evals.Features, settings: ClusterSettings, seed: int = 0) -> evals.EvalResult:
    given = evals.EvalInput(data, data, data, classes=5, seed=seed)
    return evals.get("cluster").run(given, settings)


@pytest.mark.parametrize("spread", [0.3, 1.0, 3.0])
def test_inertia_is_that_of_scikit_learn(spread: float) -> None:
    x = blobs(0, 800, spread).x
    ours = kmeans(x, 5, runs=10, seed=1)
    theirs = KMeans(5, n_init=10, random_state=0).fit(x.numpy()).inertia_
    assert ours.inertia.min().item() == pytest.approx(theirs, rel=0.005)


def test_ends_where_labels_and_centres_agree() -> None:
    x = blobs(0, 300, 1.0).x.double()
    found = kmeans(x, 4, runs=3, tol=1e-12)
    for label, center, inertia in zip(found.label, found.center, found.inertia, strict=True):
        distance = torch.cdist(x, center.double()).square()
        assert torch.equal(distance.argmin(1), label)
        assert inertia.item() == pytest.approx(distance.min(1).values.sum().item(), rel=1e-5)
        for k in range(4):
            torch.testing.assert_close(x[label == k].mean(0).float(), center[k])


def test_is_deterministic_and_depends_on_the_seed() -> None:
    x = blobs(0, 300, 3.0).x
    first, second = kmeans(x, 6, runs=4, seed=3), kmeans(x, 6, runs=4, seed=3)
    assert torch.equal(first.label, second.label)
    assert torch.equal(first.inertia, second.inertia)
    assert not torch.equal(first.label, kmeans(x, 6, runs=4, seed=4).label)


def test_more_clusters_than_different_images_are_no_failure() -> None:
    x = torch.eye(3).repeat(10, 1)
    found = kmeans(x, 5, runs=3)
    assert found.inertia.max().item() == pytest.approx(0.0, abs=1e-9)
    same = found.label.view(3, 10, 3)
    assert torch.equal(same, same[:, :1].expand_as(same))


def test_silhouettes_are_those_of_scikit_learn(monkeypatch: pytest.MonkeyPatch) -> None:
    """In blocks; also of a cluster of one image, of equal images, and where a cluster is empty."""
    monkeypatch.setattr(kmeans_module, "_GPU_BLOCK", 7 * 304)
    data = blobs(0, 300, 1.0)
    x = torch.cat([data.x, torch.full((1, 16), 9.0), torch.full((3, 16), -9.0)])
    label = torch.cat([data.y, torch.tensor([6, 7, 7, 7])])
    found = kmeans_module.silhouettes(x, label, 9)
    expected = silhouette_samples(x.double().numpy(), label.numpy())
    np.testing.assert_allclose(found.numpy(), expected, atol=1e-6)


def test_bad_input_is_refused() -> None:
    with pytest.raises(ValueError, match="7 clusters of 6 images"):
        kmeans(torch.randn(6, 2), 7)
    with pytest.raises(ValueError, match="NaN"):
        kmeans(torch.full((6, 2), float("nan")), 2)


def test_cluster_accuracy_is_that_of_the_best_matching() -> None:
    draws = np.random.default_rng(0)
    labels, clusters = draws.integers(0, 4, 60), draws.integers(0, 4, 60)
    best = max(
        100 * np.mean(np.array(order)[clusters] == labels)
        for order in itertools.permutations(range(4))
    )
    assert cluster_accuracy(clusters, labels) == pytest.approx(best)
    assert cluster_accuracy((labels + 1) % 4, labels) == 100
    assert cluster_accuracy(np.zeros(60, int), labels) == 100 * (np.bincount(labels).max() / 60)


def test_separate_classes_score_everything() -> None:
    result = run(blobs(0, 200, 0.01), ClusterSettings(runs=3))
    for name in ("accuracy", "nmi", "ami", "ari"):
        assert result.values[name] == pytest.approx(100.0)
    assert result.values["silhouette"] > 95.0


def test_best_and_mean_are_kept_apart_from_the_run_of_lowest_inertia() -> None:
    data = blobs(0, 200, 3.0)
    result = run(data, ClusterSettings(runs=8))
    labels = data.y.numpy()
    each = [cluster_accuracy(c, labels) for c in result.predictions["cluster_by_run"].T]
    assert len(each) == 8
    assert max(each) > min(each)
    assert result.values["accuracy"] == pytest.approx(each[0])
    assert result.values["accuracy_mean"] == pytest.approx(np.mean(each))
    assert result.values["accuracy_best"] == pytest.approx(max(each))
    inertia = result.chosen["inertia"]
    assert inertia == sorted(inertia)


def test_test_labels_choose_no_run() -> None:
    data = blobs(0, 200, 3.0)
    first = run(data, ClusterSettings(runs=8))
    data.y = data.y[torch.from_numpy(np.random.default_rng(1).permutation(200))]
    second = run(data, ClusterSettings(runs=8))
    for key, array in first.predictions.items():
        np.testing.assert_array_equal(array, second.predictions[key])
    assert first.chosen == second.chosen


def test_effective_rank_counts_directions() -> None:
    draws = torch.from_numpy(np.random.default_rng(0).standard_normal((2000, 3)))
    axes = torch.linalg.qr(torch.from_numpy(np.random.default_rng(1).standard_normal((40, 3)))).Q
    spread = draws - draws.mean(0)
    even = torch.linalg.qr(spread).Q  # three directions of equal strength
    assert evals.effective_rank(even @ axes.T + 7) == pytest.approx(3.0, abs=1e-6)
    one = spread[:, :1] @ axes[:, :1].T
    assert evals.effective_rank(one.float() - 4) == pytest.approx(1.0, abs=0.01)
    weights = torch.tensor([4.0, 1.0, 1.0]).double()
    share = (weights / weights.sum()).numpy()
    expected = np.exp(-(share * np.log(share)).sum())
    assert evals.effective_rank((even * weights) @ axes.T) == pytest.approx(expected, abs=1e-6)
    assert evals.effective_rank(np.full((30, 5), 0.1)) == 0.0


def test_effective_rank_refuses_what_is_no_matrix() -> None:
    with pytest.raises(ValueError, match="not a matrix"):
        evals.effective_rank(torch.zeros(3))
    with pytest.raises(ValueError, match="NaN"):
        evals.effective_rank(torch.full((3, 2), float("inf")))
