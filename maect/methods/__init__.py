"""Training methods: the stages that a row's chain is made of.

Adding one is adding a module to this package that exposes `METHOD`, or several as `METHODS` (see
`base.Method` and docs/methods.md). A tuning method brings a second stage, NAME_head, which trains
its head on the frozen encoder first. Importing this package does not import torch, and neither does
reading a method's settings.
"""

from __future__ import annotations

from dataclasses import replace
from functools import cache

from maect import registry
from maect.methods.base import PARTS, Method, Views, options_of

__all__ = ["PARTS", "Method", "Views", "get", "methods", "names", "options_of"]


@cache
def methods() -> dict[str, Method]:
    """Return all training stages of this package by name: those that the modules expose, and the
    head stages that are made of them. ValueError where two have one name."""
    named: dict[str, Method] = {}
    for module in registry.modules(__name__, __path__):
        found = [*getattr(module, "METHODS", ())]
        if (own := getattr(module, "METHOD", None)) is not None:
            own = replace(own, starts_from=own.starts_from or f"{own.name}_head")
            found += [own.initialised(), own] if own.part == "tuning" else [own]
        for one in found:
            if one.name in named:
                raise ValueError(f"two modules of {__name__} are named '{one.name}'")
            named[one.name] = replace(one, module=module.__name__)
    return named


def names() -> list[str]:
    """Return the names of all training stages, in the order of a chain."""
    return sorted(methods(), key=lambda name: (PARTS.index(methods()[name].part), name))


def get(name: str) -> Method:
    """Return the training stage `name`; ValueError with the nearest name if there is none."""
    return registry.lookup(methods(), name, "training stage")
