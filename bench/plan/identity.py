"""What a stage is: keys from settings and inputs, code hashes from syntax trees.

Nothing here runs or imports the code that it hashes.
"""

from __future__ import annotations

import ast
import hashlib
from functools import cache
from importlib.util import resolve_name
from pathlib import Path
from typing import Any

import maect
from bench.store.record import Code
from maect.files import digest

#: part of every key; raised when the meaning of a key's content changes
SCHEMA = 2

#: definitions only: every number that a worker computes with stands resolved in the key
_NOT_CODE = {"maect", "maect.settings"}

_DOCUMENTED = ast.Module | ast.ClassDef | ast.FunctionDef | ast.AsyncFunctionDef

_ROOT = Path(maect.__file__).parent


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
    """Return the hashes of `entries` and of every maect module they import, directly or not."""
    hashes: dict[str, str] = {}
    pending = [*entries]
    while pending:
        name = pending.pop()
        module = None if name in hashes or name in _NOT_CODE else _module(name)
        if module is not None:
            hashes[name], imported = module
            pending += imported
    modules = dict(sorted(hashes.items()))
    return Code(hash=digest(modules, 16), modules=modules)


@cache
def _module(name: str) -> tuple[str, list[str]] | None:
    """Return the hash of a maect module's syntax tree, docstrings apart, and what it imports.

    The names of imports stand for maect modules, or for definitions in them. None where `name` is
    no module.
    """
    path = _ROOT.joinpath(*name.split(".")[1:])
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
    ours = [module for module in imported if module.split(".")[0] == "maect"]
    return hashlib.sha256(text.encode()).hexdigest()[:16], ours
