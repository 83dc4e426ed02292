"""Training methods: the stages that a row's chain is made of.

Adding one is adding a module to this package that exposes `METHOD`, or several as `METHODS` (see
`base.Method` and docs/methods.md). A tuning method brings a second stage, NAME_head, which trains
its head on the frozen encoder first. Importing this package does not import torch, and neither does
reading a method's settings.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from functools import cache

from maect import registry
from maect.methods.base import PARTS, Method, Views, options_of

__all__ = ["PARTS", "Method", "Views", "get", "methods", "names", "options_of"]


@cache
def methods() -> dict[str, Method]:
    """Return all training stages of this package by name."""
    return registry.by_name(__name__, _found())


def names() -> list[str]:
    """Return the names of all training stages, in the order of a chain."""
    return sorted(methods(), key=lambda name: (PARTS.index(methods()[name].part), name))


def get(name: str) -> Method:
    """Return the training stage `name`; ValueError with the nearest name if there is none."""
    return registry.lookup(methods(), name, "training stage")


def _found() -> Iterator[Method]:
    """Yield what the modules expose, and the head stages that are made of it."""
    for module in registry.modules(__name__, __path__):
        if (one := getattr(module, "METHOD", None)) is not None:
            head = one.starts_from or f"{one.name}_head"
            alone = replace(one, module=module.__name__, starts_from=head)
            yield from (alone.initialised(), alone) if one.part == "tuning" else (alone,)
        for one in getattr(module, "METHODS", ()):
            yield replace(one, module=module.__name__)
