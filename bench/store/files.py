"""Writing files of a store: whole or not there, and in words if that fails."""

from __future__ import annotations

import json
import os
import time
from pathlib import Path
from typing import Any

from bench.errors import UserError
from maect import files


def write_atomic(path: Path, data: bytes) -> None:
    """Write a file so that it is either whole or not there. Raises `UserError` if it cannot."""
    try:
        files.write_atomic(path, data)
    except OSError as error:
        raise store_error(path, error) from None


def write_json(path: Path, value: Any) -> None:
    """Write JSON data for people to read as well. Raises `UserError` if it cannot."""
    write_atomic(path, _text(value))


def write_first(path: Path, value: Any) -> bool:
    """Like `write_json` where there is no such file yet. Return whether this writer was first."""
    whole = path.with_name(f".{path.name}.{os.getpid()}.whole")
    write_atomic(whole, _text(value))
    try:
        os.link(whole, path)
    except FileExistsError:
        return False
    except OSError:  # a file system without hard links
        if path.exists():
            return False
        whole.replace(path)
    finally:
        whole.unlink(missing_ok=True)
    return True


def _text(value: Any) -> bytes:
    return json.dumps(value, indent=1, ensure_ascii=False).encode() + b"\n"


def store_error(path: Path, error: OSError) -> UserError:
    """Return what to tell about a file that cannot be written."""
    reason = (error.strerror or str(error)).lower()
    return UserError(
        f"the store cannot be written ({reason}): {path.parent}; choose another --store"
    )


def iso(seconds: float) -> str:
    """Return a time stamp in UTC, to the millisecond, of seconds since the epoch."""
    whole = time.strftime("%Y-%m-%dT%H:%M:%S", time.gmtime(seconds))
    return f"{whole}.{int(seconds * 1000) % 1000:03d}Z"


def tail(path: Path, size: int = 4000) -> str:
    """Return the last `size` bytes of a log as text; empty where there is none."""
    try:
        with path.open("rb") as file:
            file.seek(max(0, path.stat().st_size - size))
            return file.read().decode("utf-8", "replace")
    except OSError:
        return ""
