"""Evaluations of frozen features: k-NN, linear probe, low-shot regression, clustering.

Adding one is adding a module to this package that exposes `EVALUATOR` (see `base.Evaluator`);
`PRESETS` are further ones, of the same computation.
Importing this package does not import torch, and neither does reading an evaluation's settings.
"""

from __future__ import annotations

import difflib
import importlib
import pkgutil
from functools import cache
from typing import Any

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
    found: dict[str, Evaluator] = {}
    for info in pkgutil.iter_modules(__path__):
        module = importlib.import_module(f"{__name__}.{info.name}")
        own = [module.EVALUATOR] if hasattr(module, "EVALUATOR") else []
        for evaluator in [*own, *getattr(module, "PRESETS", [])]:
            if evaluator.name in found:
                raise ValueError(f"two evaluations of maect.evals are named '{evaluator.name}'")
            found[evaluator.name] = evaluator
    return found


def names() -> list[str]:
    return sorted(evaluators())


def get(name: str) -> Evaluator:
    """Return the evaluation called `name`; ValueError with the nearest name if there is none."""
    known = evaluators()
    if name in known:
        return known[name]
    near = difflib.get_close_matches(name, known, n=1)
    hint = f"did you mean '{near[0]}'?" if near else f"known are {', '.join(names())}"
    raise ValueError(f"there is no evaluation '{name}'; {hint}")


def __getattr__(name: str) -> Any:
    if name in _PUBLIC:
        return getattr(importlib.import_module(_PUBLIC[name]), name)
    raise AttributeError(f"module 'maect.evals' has no attribute {name!r}")
