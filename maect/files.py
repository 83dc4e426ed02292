"""Files and JSON that others rely on: whole or not there, equal for equal content."""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Iterable
from pathlib import Path
from typing import Any


def sha256(path: Path) -> str:
    """Return the SHA-256 of a file's content as hexadecimal digits. Raises OSError."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def write_atomic(path: Path, data: bytes | Iterable[bytes | memoryview]) -> None:
    """Write `data`, or its parts one after the other, under a temporary name, then rename: a crash
    leaves no half of a file.

    Raises OSError, or what the parts raise, and then leaves nothing behind.
    """
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        temporary.unlink(missing_ok=True)  # of a process that died, or a link that leads elsewhere
        with temporary.open("xb") as file:
            for part in (data,) if isinstance(data, bytes) else data:
                file.write(part)
            file.flush()
            os.fsync(file.fileno())
        temporary.replace(path)
    except BaseException:
        temporary.unlink(missing_ok=True)
        raise


def canonical(value: Any) -> str:
    """Return JSON text that is equal for equal data: keys sorted, no spaces, UTF-8."""
    return json.dumps(value, sort_keys=True, separators=(",", ":"), ensure_ascii=False)


def digest(value: Any, length: int = 64) -> str:
    """Return the first `length` hexadecimal digits of the SHA-256 of JSON data."""
    return hashlib.sha256(canonical(value).encode()).hexdigest()[:length]
