"""The files of a store: read whatever a stranger put there, written whole or not at all."""

from __future__ import annotations

import errno
import json
import os
import secrets
import stat
import time
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from pydantic_core import from_json

from bench.errors import UserError, reason
from maect import files

#: bytes that a JSON file of a store may have
LARGEST = 2**28


def regular(path: Path) -> Path:
    """Return the path of a regular file. Raises OSError for a link, a FIFO, a device, a folder."""
    mode = path.lstat().st_mode
    if not stat.S_ISREG(mode):
        raise OSError(errno.EINVAL, "it is a link" if stat.S_ISLNK(mode) else "it is no file")
    return path


def read_json(path: Path) -> Any:
    """Return the content of a JSON file. Raises OSError or ValueError for what is none."""
    with regular(path).open("rb") as file:
        data = file.read(LARGEST + 1)
    if len(data) > LARGEST:
        raise ValueError(f"it has more than {LARGEST} bytes")
    return from_json(data)  # which refuses more than 200 levels


def write_atomic(path: Path, data: bytes | Iterable[bytes | memoryview]) -> None:
    """Write a file so that it is either whole or not there. Raises `UserError` if it cannot."""
    with writing(path):
        files.write_atomic(path, data)


def write_json(path: Path, value: Any) -> None:
    """Write JSON data for people to read as well. Raises `UserError` if it cannot."""
    write_atomic(path, json_text(value))


def write_first(path: Path, value: Any) -> bool:
    """Like `write_json` where there is no such file yet. Return whether this writer was first."""
    # on other machines processes have the same numbers
    whole = path.with_name(f".{path.name}.{secrets.token_hex(8)}.whole")
    write_atomic(whole, json_text(value))
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


def json_text(value: Any) -> bytes:
    """Return JSON data as they are written: for people to read as well."""
    return json.dumps(value, indent=1, ensure_ascii=False).encode() + b"\n"


@contextmanager
def writing(path: Path) -> Iterator[None]:
    """Raise `UserError` where a file cannot be written."""
    try:
        yield
    except OSError as error:
        told = f"the store cannot be written ({reason(error)}): {path.parent}"
        raise UserError(f"{told}; choose another --store") from None


def unreadable(what: object, error: Exception) -> UserError:
    """Return what to tell about a part of a store that cannot be read."""
    return UserError(f"{what} cannot be read: {reason(error)}; choose another --store")


def iso(seconds: float) -> str:
    """Return a time stamp in UTC, to the millisecond, of seconds since the epoch."""
    whole = time.strftime("%Y-%m-%dT%H:%M:%S", time.gmtime(seconds))
    return f"{whole}.{int(seconds * 1000) % 1000:03d}Z"


def tail(path: Path, size: int = 4000) -> str:
    """Return the last `size` bytes of a log as text; empty where there is none."""
    try:
        with regular(path).open("rb") as file:
            file.seek(max(0, path.stat().st_size - size))
            return file.read().decode("utf-8", "replace")
    except OSError:
        return ""
