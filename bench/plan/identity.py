"""What a stage is: keys from settings and inputs, code hashes from syntax trees.

Nothing here runs or imports the code that it hashes.
"""

from __future__ import annotations

import ast
import hashlib
import sys
from functools import cache
from importlib.util import resolve_name
from pathlib import Path
from typing import Any

import maect  # noqa: F401 - so that its place is known
from bench.store.record import Code
from maect.files import digest

#: part of every key; raised when the meaning of a key's content changes
SCHEMA = 2

#: definitions only: every number that a worker computes with stands resolved in the key
_NOT_CODE = {"maect", "maect.settings"}

_DOCUMENTED = ast.Module | ast.ClassDef | ast.FunctionDef | ast.AsyncFunctionDef


def stage_key(kind: str, settings: dict[str, Any], inputs: dict[str, str], data: str | None) -> str:
    """Return the key of a stage from its resolved settings, its inputs' keys and its data's
    fingerprint: 20 hexadecimal digits.
    """
    numerics = settings.get("numerics", {})
    if not numerics.get("compile"):  # then recomputing activations changes no bit
        told = {k: v for k, v in numerics.items() if k != "checkpoint_activations"}
        settings = settings | ({"numerics": told} if told else {})
    content = {"schema": SCHEMA, "kind": kind, "settings": settings, "inputs": inputs, "data": data}
    return digest(content, 20)


@cache
def code(*entries: str) -> Code:
    """Return the hashes of `entries` and of every module of their packages that they import.

    These packages are maect and, of an evaluation from outside, its own.
    """
    hashes: dict[str, str] = {}
    pending = [*entries]
    packages = frozenset(name.partition(".")[0] for name in ("maect", *entries))
    while pending:
        name = pending.pop()
        module = None if name in hashes or name in _NOT_CODE else _module(name, packages)
        if module is not None:
            hashes[name], imported = module
            pending += imported
    modules = dict(sorted(hashes.items()))
    return Code(hash=digest(modules, 16), modules=modules)


@cache
def _module(name: str, packages: frozenset[str]) -> tuple[str, list[str]] | None:
    """Return the hash of a module's syntax tree, docstrings apart, and what it imports.

    The names of imports stand for modules of `packages`, or for definitions in them. None where
    `name` is no module.
    """
    top, *inner = name.split(".")
    root = Path(str(sys.modules[top].__file__))
    path = root.parent.joinpath(*inner) if root.name == "__init__.py" else root
    package = name if path.is_dir() else name.rpartition(".")[0]
    file = path / "__init__.py" if path.is_dir() else path.with_suffix(".py")
    if not file.exists():
        return None
    tree = ast.parse(file.read_text(encoding="utf-8"))
    imported: set[str] = set()
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            imported.update(alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            base = resolve_name("." * node.level + (node.module or ""), package)
            imported.update([base, *(f"{base}.{alias.name}" for alias in node.names)])
        elif isinstance(node, _DOCUMENTED) and ast.get_docstring(node, clean=False) is not None:
            node.body = node.body[1:] or [ast.Pass()]
    # Python 3.12 has a field more, which is empty in code for 3.11
    text = ast.dump(tree).replace(", type_params=[]", "")
    ours = [module for module in imported if module.split(".")[0] in packages]
    return hashlib.sha256(text.encode()).hexdigest()[:16], ours
