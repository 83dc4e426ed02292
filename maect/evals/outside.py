"""Evaluations from outside the package: installed ones by entry point, single files by path.

An installed package names its module in the group `maect.evals` of its entry points; files are
named by the variable `MAECT_EVALS`, several as in `PATH`. Either exposes `EVALUATOR`, as the
modules of `maect.evals` do. A suite cannot name code: it is data, maybe a stranger's.
"""

from __future__ import annotations

import importlib
import importlib.util
import os
import re
import sys
from collections.abc import Callable, Iterator
from functools import partial
from importlib.metadata import entry_points
from pathlib import Path
from types import ModuleType

from maect.datasets.base import DataError
from maect.evals.base import Evaluator

VARIABLE, GROUP = "MAECT_EVALS", "maect.evals"
#: what no evaluation may be called, besides the training stages: other kinds of stages
TAKEN = ("data", "features", "gallery")


def settle() -> None:
    """Make the files that the variable names absolute: workers may be in another folder."""
    if given := os.environ.get(VARIABLE):
        paths = (os.path.abspath(os.path.expanduser(path)) for path in given.split(os.pathsep))
        os.environ[VARIABLE] = os.pathsep.join(paths)


def modules() -> Iterator[ModuleType]:
    """Yield the modules of all evaluations from outside. Raises DataError where one is none."""
    for entry in entry_points(group=GROUP):
        yield _checked(entry.load, f"entry point '{entry.name}'")
    for path in filter(None, os.environ.get(VARIABLE, "").split(os.pathsep)):
        yield _checked(partial(_of_file, Path(path)), f"{VARIABLE}={path}")


def _of_file(path: Path) -> ModuleType:
    """Return the module in a file; its name, a part of the code's hash, is that of the file."""
    name = f"evaluation_{path.stem}"
    spec = importlib.util.spec_from_file_location(name, path)
    if spec is None or spec.loader is None or not name.isidentifier():
        raise ImportError("it is no Python file, or its name no word")
    sys.modules[name] = module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def _checked(load: Callable[[], ModuleType], what: str) -> ModuleType:
    try:
        module = load()
    except Exception as error:  # of others' code anything can be wrong
        raise DataError(f"{what} cannot be loaded: {type(error).__name__}: {error}") from error
    found = getattr(module, "EVALUATOR", None)
    if not isinstance(found, Evaluator):
        raise DataError(f"{what} is no evaluation: it has no EVALUATOR; see docs/evaluation.md")
    # no import statement: it would put all methods into the code hash of every evaluation
    taken = (*TAKEN, *importlib.import_module("maect.methods").names())
    if not re.fullmatch("[A-Za-z][A-Za-z0-9_]*", found.name) or found.name in taken:
        raise DataError(f"{what}: an evaluation cannot be called '{found.name}'; rename it")
    if not str(module.__file__).endswith(".py"):
        raise DataError(
            f"{what}: the source of '{found.name}' is not here, and a result must say which code "
            f"it ran; install the package with its .py files"
        )
    return module
