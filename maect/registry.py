"""What the modules of a package expose, found by name: evaluations, training methods."""

from __future__ import annotations

import difflib
import importlib
import pkgutil
from collections.abc import Iterable, Mapping
from types import ModuleType
from typing import TypeVar

T = TypeVar("T")


def modules(package: str, path: Iterable[str]) -> list[ModuleType]:
    """Return the modules of a package, imported."""
    return [importlib.import_module(f"{package}.{i.name}") for i in pkgutil.iter_modules(path)]


def lookup(known: Mapping[str, T], name: str, what: str) -> T:
    """Return the one called `name`; ValueError with the nearest name if there is none."""
    if name in known:
        return known[name]
    near = difflib.get_close_matches(name, known, n=1)
    hint = f"did you mean '{near[0]}'?" if near else f"known are {', '.join(sorted(known))}"
    raise ValueError(f"there is no {what} '{name}'; {hint}")
