"""Evaluations of frozen features: k-NN, linear probe, low-shot regression, clustering.

Adding one is adding a module to this package that exposes `EVALUATOR` (see `base.Evaluator`), or
one outside of it (see `outside`); `PRESETS` are further ones, of the same computation.
Importing this package does not import torch, and neither does reading an evaluation's settings.
"""

from __future__ import annotations

import importlib
from functools import cache
from types import ModuleType
from typing import Any

from maect import registry
from maect.datasets.base import DataError
from maect.evals import outside
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
    "code_of",
    "evaluators",
    "get",
    "names",
    *_PUBLIC,
]


@cache
def _found() -> dict[str, tuple[Evaluator, ModuleType]]:
    """Return all evaluations by name, those of this package and those from outside, each with the
    module that exposes it."""
    found: dict[str, tuple[Evaluator, ModuleType]] = {}
    for module in (*registry.modules(__name__, __path__), *outside.modules()):
        one = [module.EVALUATOR] if hasattr(module, "EVALUATOR") else []
        for evaluator in [*one, *getattr(module, "PRESETS", [])]:
            if evaluator.name in found:
                both = f"{found[evaluator.name][1].__name__} and {module.__name__}"
                raise DataError(f"two evaluations are named '{evaluator.name}': {both}; rename one")
            found[evaluator.name] = evaluator, module
    return found


def evaluators() -> dict[str, Evaluator]:
    """Return all evaluations by name."""
    return {name: evaluator for name, (evaluator, _) in _found().items()}


def code_of(name: str) -> str:
    """Return the module that an evaluation's code begins with."""
    return _found()[name][1].__name__


def names() -> list[str]:
    return sorted(_found())


def get(name: str) -> Evaluator:
    """Return the evaluation called `name`; ValueError with the nearest name if there is none."""
    return registry.lookup(_found(), name, "evaluation")[0]


def __getattr__(name: str) -> Any:
    if name in _PUBLIC:
        return getattr(importlib.import_module(_PUBLIC[name]), name)
    raise AttributeError(f"module 'maect.evals' has no attribute {name!r}")
