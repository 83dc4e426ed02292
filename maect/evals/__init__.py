"""Evaluations of frozen features: k-NN, linear probe, low-shot regression, clustering.

Adding one is adding a module to this package that exposes `EVALUATOR` (see `base.Evaluator`).
Importing this package does not import torch, and neither does reading an evaluation's settings.
"""

from __future__ import annotations

import importlib
from functools import cache
from typing import Any

from maect import registry
from maect.evals.base import (
    EvalInput,
    EvalResult,
    Evaluator,
    Features,
    Images,
    Measured,
    Metric,
    Predictions,
)
from maect.evals.by_block import at_blocks

_PUBLIC = {"knn": "maect.evals.nearest", "effective_rank": "maect.collapse"}

__all__ = [
    "EvalInput",
    "EvalResult",
    "Evaluator",
    "Features",
    "Images",
    "Measured",
    "Metric",
    "Predictions",
    "at_blocks",
    "evaluators",
    "get",
    "names",
    *_PUBLIC,
]


@cache
def evaluators() -> dict[str, Evaluator]:
    """Return all evaluations of this package by name."""
    found = registry.exposed(__name__, __path__, "EVALUATOR")
    return registry.by_name(__name__, (evaluator for _, evaluator in found))


def names() -> list[str]:
    return sorted(evaluators())


def get(name: str) -> Evaluator:
    """Return the evaluation called `name`; ValueError with the nearest name if there is none."""
    return registry.lookup(evaluators(), name, "evaluation")


def __getattr__(name: str) -> Any:
    if name in _PUBLIC:
        return getattr(importlib.import_module(_PUBLIC[name]), name)
    raise AttributeError(f"module 'maect.evals' has no attribute {name!r}")
