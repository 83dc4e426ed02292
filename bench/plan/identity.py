"""What a stage is: keys from settings and inputs, code hashes from syntax trees.

Nothing here runs or imports the code that it hashes.
"""

from __future__ import annotations

import ast
import hashlib
import importlib.util
from functools import cache
from pathlib import Path
from typing import Any

import maect
from bench.store.record import Code
from maect.files import digest

#: part of every key; raised when the meaning of a key's content changes
SCHEMA = 2

#: definitions only: every number that a worker computes with stands resolved in the key
_NOT_CODE = {"maect", "maect.settings"}

_ROOT = Path(maect.__file__).parent


def stage_key(kind: str, settings: dict[str, Any], inputs: dict[str, str], data: str | None) -> str:
    """Return the key of a stage from its resolved settings, its inputs' keys and its data's
    fingerprint: 20 hexadecimal digits.
    """
    content = {"schema": SCHEMA, "kind": kind, "settings": settings, "inputs": inputs, "data": data}
    return digest(content, 20)


@cache
def _module(name: str) -> tuple[str, frozenset[str]] | None:
    """Hash of a maect module's syntax tree, and the maect modules it imports anywhere."""
    path = _ROOT.joinpath(*name.split(".")[1:])
    file = path / "__init__.py" if path.is_dir() else path.with_suffix(".py")
    if not file.exists():
        return None
    tree = ast.parse(file.read_text(encoding="utf-8"))
    imported: set[str] = set()
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            imported.update(alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            package = name if path.is_dir() else name.rpartition(".")[0]
            base = node.module or ""
            if node.level:
                base = importlib.util.resolve_name("." * node.level + base, package)
            imported.add(base)
            imported.update(f"{base}.{alias.name}" for alias in node.names)
        _drop_docstring(node)
    # Python 3.12 has a field more, which is empty in code for 3.11
    text = ast.dump(tree).replace(", type_params=[]", "")
    return hashlib.sha256(text.encode()).hexdigest()[:16], frozenset(
        module for module in imported if module.split(".")[0] == "maect"
    )


def _drop_docstring(node: ast.AST) -> None:
    if not isinstance(node, ast.Module | ast.ClassDef | ast.FunctionDef | ast.AsyncFunctionDef):
        return
    first = node.body[0] if node.body else None
    if (
        isinstance(first, ast.Expr)
        and isinstance(first.value, ast.Constant)
        and isinstance(first.value.value, str)
    ):
        node.body = node.body[1:] or [ast.Pass()]


@cache
def code_modules(*entries: str) -> dict[str, str]:
    """Hashes of `entries` and of every maect module they import, directly or not."""
    hashes: dict[str, str] = {}
    pending = [*entries]
    while pending:
        name = pending.pop()
        if name in hashes or name in _NOT_CODE:
            continue
        module = _module(name)
        if module is None:
            continue
        hashes[name] = module[0]
        pending.extend(module[1])
    return dict(sorted(hashes.items()))


@cache
def code(*entries: str) -> Code:
    """Return the code that a stage runs: a hash over all, and one a module to name what changed."""
    modules = code_modules(*entries)
    return Code(hash=digest(modules, 16), modules=modules)
