"""k-NN: neighbours of each test image among the training images vote for its class.

`PRESETS` are protocols of other papers: the same computation, other settings and tokens.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from functools import partial
from typing import Any

import numpy as np
from pydantic import Field, PositiveInt

from maect.evals.base import (
    EvalInput,
    EvalResult,
    Evaluator,
    Features,
    Metric,
    labels_of,
    percent_correct,
)
from maect.settings import Positive, Settings


class KnnSettings(Settings):
    """The official protocol: standardised features, cosine, votes exp(similarity / 0.07)."""

    #: numbers of neighbours, each a metric of its own; the first is the primary one
    k: list[PositiveInt] = Field(default=[10, 20], min_length=1)
    #: votes exp(similarity / temperature); null: every neighbour counts the same
    temperature: Positive | None = 0.07
    #: first subtract the mean and divide by the deviation of the training features
    standardize: bool = True


class DinoKnnSettings(KnnSettings):
    """k-NN as DINO evaluates: features as they are but for their length, 20 neighbours."""

    k: list[PositiveInt] = Field(default=[20], min_length=1)
    standardize: bool = False


class MimRefinerKnnSettings(KnnSettings):
    """k-NN as MIM-Refiner evaluates: standardised, 20 neighbours."""

    k: list[PositiveInt] = Field(default=[20], min_length=1)


def vote(
    classes: np.ndarray, similarity: np.ndarray, temperature: float | None, count: int
) -> np.ndarray:
    """Class with the most votes, the lower one if several have: [M, k], [M, k] -> [M] int64.

    A neighbour's vote is exp(similarity / temperature), or 1 if there is no temperature.
    """
    predicted = np.empty(len(classes), dtype=np.int64)
    for start in range(0, len(classes), 4096):
        rows = slice(start, start + 4096)
        weight = np.ones_like(similarity[rows])
        if temperature is not None:  # over the best one's vote, which cannot overflow
            weight = np.exp((similarity[rows] - similarity[rows, :1]) / temperature)
        score = np.zeros((len(weight), count))
        for column in range(weight.shape[1]):
            score[np.arange(len(weight)), classes[rows, column]] += weight[:, column]
        predicted[rows] = score.argmax(1)
    return predicted


def knn(
    train_x: Any,
    train_y: Any,
    test_x: Any,
    test_y: Any,
    k: int | Sequence[int],
    temperature: float | None = 0.07,
    standardize: bool = True,
) -> float | dict[int, float]:
    """Return the k-NN accuracy in percent; a dict k -> accuracy if `k` is a sequence.

    train_x [N, D], train_y [N], test_x [M, D], test_y [M]. Raises ValueError if k is not in 1..N
    or a feature is not finite.
    """
    import torch

    train, test = (
        Features(torch.as_tensor(x), torch.from_numpy(labels_of(y)))
        for x, y in ((train_x, train_y), (test_x, test_y))
    )
    counts = [int(count) for count in np.atleast_1d(k)]
    settings = KnnSettings(k=counts, temperature=temperature, standardize=standardize)
    values = EVALUATOR.run(EvalInput(train, test, test, classes=0), settings).values
    accuracy = {count: values[f"accuracy_k{count}"] for count in counts}
    return accuracy if np.iterable(k) else accuracy[counts[0]]


def _metrics(settings: KnnSettings, whose: str = "") -> list[Metric]:
    """Return accuracy and purity for each k; `whose` protocol it is ends their labels."""
    series = {"accuracy": "k-NN", "purity": "neighbours of the same class"}
    return [
        Metric(
            f"{name}_k{k}",
            f"{label}, k={k}{whose}",
            "%",
            True,
            primary=name == "accuracy" and k == settings.k[0],
            along="neighbours",
            at=float(k),
            series=f"{label}{whose}",
        )
        for name, label in series.items()
        for k in settings.k
    ]


def _derive(predictions: Mapping[str, np.ndarray], labels: np.ndarray) -> dict[str, float]:
    """Return accuracy and purity for each k, in percent."""
    counts = [int(key.removeprefix("class_k")) for key in predictions if key[:7] == "class_k"]
    same = predictions["neighbor_class"] == labels[:, None]
    values = {f"accuracy_k{k}": percent_correct(predictions[f"class_k{k}"], labels) for k in counts}
    return values | {f"purity_k{k}": 100.0 * float(same[:, :k].mean()) for k in counts}


def _compute(data: EvalInput, settings: KnnSettings) -> EvalResult:
    from maect.evals.neighbors import nearest, normalize_rows, statistics

    y, spread = labels_of(data.train.y), statistics(data.train.x) if settings.standardize else None
    unit = partial(normalize_rows, found=spread)
    found, index = nearest(data.train.x, data.test.x, max(settings.k), unit)
    similarity, near = found.numpy(), y[index.numpy()]
    predictions = {
        "neighbor": index.numpy().astype(np.int32),
        "neighbor_class": near.astype(np.int32),
        "similarity": similarity.astype(np.float32),
    }
    for k in settings.k:
        votes = vote(near[:, :k], similarity[:, :k], settings.temperature, int(y.max()) + 1)
        predictions[f"class_k{k}"] = votes.astype(np.int32)
    protocol = {
        "similarity": "cosine",
        "ties": "neighbours: lower training row; classes: lower class",
        "train_images": len(y),
    }
    return EvalResult(predictions, {}, protocol)


EVALUATOR = Evaluator(
    name="knn",
    label="k-NN",
    settings=KnnSettings,
    metrics=_metrics,
    compute=_compute,
    derive=_derive,
    uses_seed=False,
)

PRESETS = [
    dataclasses.replace(
        EVALUATOR,
        name="knn_dino",
        label="k-NN (DINO)",
        settings=DinoKnnSettings,
        metrics=partial(_metrics, whose=" (DINO)"),
        tokens={"pool": "cls"},
        source="DINO, arXiv 2104.14294, eval_knn.py: k = 20, temperature 0.07",
    ),
    dataclasses.replace(
        EVALUATOR,
        name="knn_mim_refiner",
        label="k-NN (MIM-Refiner)",
        settings=MimRefinerKnnSettings,
        metrics=partial(_metrics, whose=" (MIM-Refiner)"),
        tokens={"pool": "cls", "block": -1},
        source="MIM-Refiner, arXiv 2402.10093: class token of the last block without the final "
        "norm",
    ),
]
