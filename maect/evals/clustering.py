"""Clustering: k-means on the test features, judged against the classes."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np
from pydantic import PositiveInt

from maect.evals.base import EvalInput, EvalResult, Evaluator, Metric, labels_of
from maect.settings import Positive, Settings

_LABELS = {"accuracy": "cluster ACC", "nmi": "NMI", "ami": "AMI", "ari": "ARI"}
_NOTE = "the _best values take the best run by the test labels: an upper end, not a result"


class ClusterSettings(Settings):
    """k-means on the test images' features, with as many clusters as these images have classes."""

    #: independent starts; the main values are those of the run with the lowest inertia
    runs: PositiveInt = 10
    #: of a run of k-means
    max_iterations: PositiveInt = 300
    #: a run ends when its centres move less: squared shift over the mean variance of a feature
    tolerance: Positive = 1e-4
    #: first subtract the mean and divide by the deviation of the test features
    standardize: bool = False


def cluster_accuracy(clusters: np.ndarray, labels: np.ndarray) -> float:
    """Return how many images' clusters are matched to their class, in percent: [M], [M] -> float.

    Clusters and classes are matched one to one so that they are most (Hungarian method).
    """
    from scipy.optimize import linear_sum_assignment
    from sklearn.metrics.cluster import contingency_matrix

    table = contingency_matrix(labels, clusters)
    return 100.0 * float(table[linear_sum_assignment(table, maximize=True)].sum() / len(labels))


def _scores(clusters: np.ndarray, labels: np.ndarray) -> dict[str, float]:
    """Return the scores of one run by the names of `_LABELS`, in percent."""
    from sklearn import metrics

    return {
        "accuracy": cluster_accuracy(clusters, labels),
        "nmi": 100.0 * float(metrics.normalized_mutual_info_score(labels, clusters)),
        "ami": 100.0 * float(metrics.adjusted_mutual_info_score(labels, clusters)),
        "ari": 100.0 * float(metrics.adjusted_rand_score(labels, clusters)),
    }


def _metrics(settings: ClusterSettings) -> list[Metric]:
    main = [
        Metric(name, label, "%", True, primary=name == "accuracy")
        for name, label in _LABELS.items()
    ]
    spread = [
        Metric(f"{name}_{kind}", f"{label}, {what}", "%", True)
        for kind, what in (("mean", "mean of runs"), ("best", "best run by test labels"))
        for name, label in _LABELS.items()
    ]
    return [*main, Metric("silhouette", "silhouette", "%", True), *spread]


def _derive(predictions: Mapping[str, np.ndarray], labels: np.ndarray) -> dict[str, float]:
    """Return the scores of the main run, their mean and best over the runs, in percent."""
    runs = [_scores(clusters, labels) for clusters in predictions["cluster_by_run"].T]
    values: dict[str, float] = {}
    for name in _LABELS:
        each = [run[name] for run in runs]
        values[name] = each[0]
        values[f"{name}_mean"] = float(np.mean(each))
        values[f"{name}_best"] = max(each)
    return values | {"silhouette": 100.0 * float(predictions["silhouette"].mean())}


def _compute(data: EvalInput, settings: ClusterSettings) -> EvalResult:
    from sklearn.metrics import silhouette_samples

    from maect.evals.kmeans import kmeans, silhouettes
    from maect.evals.neighbors import standardized, statistics

    x = data.test.x
    x = (standardized(x, statistics(x)) if settings.standardize else x).float()
    classes = len(np.unique(labels_of(data.test.y)))
    found = kmeans(
        x,
        classes,
        runs=settings.runs,
        seed=data.seed,
        max_iterations=settings.max_iterations,
        tol=settings.tolerance,
    )
    order = found.inertia.argsort(stable=True)
    clusters = found.label[order].T.cpu().numpy().astype(np.int32)  # [M, R], lowest inertia first
    defined = 1 < len(np.unique(clusters[:, 0])) < len(x)
    if not defined:
        width = np.zeros(len(x))
    elif x.device.type == "cpu":
        width = silhouette_samples(x.numpy(), clusters[:, 0])
    else:  # on CPUs minutes for ImageNet's test images
        width = silhouettes(x, found.label[order[0]], classes).cpu().numpy()
    predictions = {
        "cluster": clusters[:, 0],
        "cluster_by_run": clusters,
        "silhouette": width.astype(np.float32),
    }
    protocol: dict[str, Any] = {
        "start": "greedy k-means++",
        "clusters": classes,
        "images": "test",
        "value": "run with the lowest inertia; _mean: over runs; _best: best run by test labels",
    }
    chosen = {"inertia": found.inertia[order].tolist()}
    notes = [_NOTE]
    if classes < data.classes:
        notes.append(f"{classes} clusters: so many of {data.classes} classes have test images")
    return EvalResult(predictions, chosen, protocol, notes)


EVALUATOR = Evaluator(
    name="cluster",
    label="clustering",
    settings=ClusterSettings,
    metrics=_metrics,
    compute=_compute,
    derive=_derive,
    uses_seed=True,
)
