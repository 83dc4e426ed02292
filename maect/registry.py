"""What the modules of a package expose, found by name: evaluations, training methods."""

from __future__ import annotations

import difflib
import importlib
import pkgutil
from collections.abc import Iterable, Iterator, Mapping
from typing import Any, TypeVar

T = TypeVar("T")


def exposed(package: str, path: Iterable[str], attribute: str) -> Iterator[tuple[str, Any]]:
    """Yield each module of a package that has `attribute`, by its dotted name, and the value."""
    for info in pkgutil.iter_modules(path):
        module = importlib.import_module(f"{package}.{info.name}")
        if hasattr(module, attribute):
            yield module.__name__, getattr(module, attribute)


def by_name(package: str, found: Iterable[T]) -> dict[str, T]:
    """Return what was found by its `name`. Raises ValueError where two have one name."""
    named: dict[str, T] = {}
    for one in found:
        name = one.name  # type: ignore[attr-defined]
        if name in named:
            raise ValueError(f"two modules of {package} are named '{name}'")
        named[name] = one
    return named


def lookup(known: Mapping[str, T], name: str, what: str) -> T:
    """Return the one called `name`; ValueError with the nearest name if there is none."""
    if name in known:
        return known[name]
    near = difflib.get_close_matches(name, known, n=1)
    hint = f"did you mean '{near[0]}'?" if near else f"known are {', '.join(sorted(known))}"
    raise ValueError(f"there is no {what} '{name}'; {hint}")
