"""Published protocols of k-NN by name: its computation, other settings and other tokens."""

from __future__ import annotations

import dataclasses
from typing import Any

from pydantic import Field, PositiveInt

from maect.evals import nearest
from maect.evals.base import Evaluator, Metric
from maect.settings import Positive


class DinoKnnSettings(nearest.KnnSettings):
    """k-NN as DINO evaluates: features as they are but for their length, 20 neighbours."""

    k: list[PositiveInt] = Field(default=[20], min_length=1)
    temperature: Positive | None = 0.07
    standardize: bool = False


class MimRefinerKnnSettings(nearest.KnnSettings):
    """k-NN as MIM-Refiner evaluates: standardised, 20 neighbours."""

    k: list[PositiveInt] = Field(default=[20], min_length=1)


def _knn(
    name: str, whose: str, settings: type[Any], tokens: dict[str, Any], source: str
) -> Evaluator:
    """Return k-NN by these defaults, its labels saying `whose` protocol it is."""

    def metrics(given: Any) -> list[Metric]:
        return [
            dataclasses.replace(
                metric, label=f"{metric.label} ({whose})", series=f"{metric.series} ({whose})"
            )
            for metric in nearest.EVALUATOR.metrics(given)
        ]

    return dataclasses.replace(
        nearest.EVALUATOR,
        name=name,
        label=f"k-NN ({whose})",
        settings=settings,
        metrics=metrics,
        tokens=tokens,
        source=source,
    )


PRESETS = [
    _knn(
        "knn_dino",
        "DINO",
        DinoKnnSettings,
        {"pool": "cls"},
        "DINO, arXiv 2104.14294, eval_knn.py: k = 20, temperature 0.07",
    ),
    _knn(
        "knn_mim_refiner",
        "MIM-Refiner",
        MimRefinerKnnSettings,
        {"pool": "cls", "block": -1},
        "MIM-Refiner, arXiv 2402.10093: class token of the last block without the final norm",
    ),
]
