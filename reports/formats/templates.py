"""The one maker of jinja2 environments: what a template prints goes through its format's guard."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

from jinja2 import Environment, FileSystemLoader, StrictUndefined

from reports.display import short

FOLDER = Path(__file__).parents[1] / "templates"


def environment(guard: Callable[[Any], Any], **options: Any) -> Environment:
    """Return an environment over the templates; `guard` makes of any value what is printed."""
    made = Environment(
        loader=FileSystemLoader(FOLDER),
        finalize=guard,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
        **options,
    )
    made.filters["short"] = short
    return made
