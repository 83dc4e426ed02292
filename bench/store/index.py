"""An index over a store's records, so that a report need not read and check each of them again.

    index-<version>-<SHA-256 of the file>.parquet     a row for each record that was found sound

A row has the record's file, what the file system said of it, and each field of the record as JSON.
It counts only as long as the file is the one that was read. The index is derived from the records
and never the authority: only `report` (without `--check`) and `ls` look into it, so it cannot
change what runs or what `verify` finds, and without it nothing changes but the time.
"""

from __future__ import annotations

import hashlib
import io
import json
import os
import time
from contextlib import suppress
from pathlib import Path
from typing import Any

import polars as pl

from bench.errors import UserError
from bench.store.store import Store, write_atomic

VERSION = 1
#: seconds that a record must have lain unchanged: file systems' clocks tick slower than writes
SETTLED_S = 2.0
FILE, STAMP = "_file", "_stamp"


class IndexedStore(Store):
    """A store for those who only look: what its index knows is not read and checked again.

    Records may share their equal parts, so they must not be changed. With `rebuild` what the index
    has is passed over. `save` writes what is new.
    """

    def __init__(self, root: Path, *, rebuild: bool = False) -> None:
        super().__init__(root)
        self._frame = pl.DataFrame() if rebuild else self._load()
        self._records = _records(self._frame)
        self._new: list[dict[str, str]] = []

    def read(self, path: Path, key: str) -> dict[str, Any]:
        status = path.stat()  # before reading: what changes meanwhile has another stamp
        stamp = f"{status.st_ino} {status.st_size} {status.st_mtime_ns} {status.st_ctime_ns}"
        name = os.path.relpath(path, self.root)
        known, record = self._records.get(name, ("", {}))
        if known == stamp:
            return record
        record = super().read(path, key)
        if time.time() - max(status.st_ctime, status.st_mtime) > SETTLED_S:
            fields = {field: json.dumps(value) for field, value in record.items()}
            self._new.append(fields | {FILE: name, STAMP: stamp})
        return record

    def save(self) -> None:
        """Add what was read to the index; does nothing where the store cannot be written."""
        if not self._new:
            return
        names = dict.fromkeys(name for row in self._new for name in row)
        new = pl.DataFrame(self._new, schema=dict.fromkeys(names, pl.String), orient="row")
        if not self._frame.is_empty():
            there = [(self.root / name).exists() for name in self._frame[FILE]]
            old = self._frame.filter(pl.Series(there, dtype=pl.Boolean))
            old = old.join(new, on=FILE, how="anti")
            new = pl.concat([old, new], how="diagonal")
        buffer = io.BytesIO()
        new.write_parquet(buffer)
        path = self.root / _name(buffer.getvalue())
        with suppress(UserError, OSError):
            others = self._files()
            write_atomic(path, buffer.getvalue())
            for other in others:
                if other != path:
                    other.unlink(missing_ok=True)

    def _files(self) -> list[Path]:
        return sorted(self.root.glob("index-*.parquet"))

    def _load(self) -> pl.DataFrame:
        """The index's rows; none where it is missing, damaged or of another version."""
        for path in self._files():
            with suppress(OSError, pl.exceptions.PolarsError):
                data = path.read_bytes()
                if path.name == _name(data):
                    return pl.read_parquet(io.BytesIO(data))
        return pl.DataFrame()


def _name(data: bytes) -> str:
    return f"index-{VERSION}-{hashlib.sha256(data).hexdigest()}.parquet"


def _records(frame: pl.DataFrame) -> dict[str, tuple[str, dict[str, Any]]]:
    """(stamp, record) by file; of equal fields one is parsed and all share it."""
    if frame.is_empty():
        return {}
    records: list[dict[str, Any]] = [{} for _ in range(frame.height)]
    for column in frame.drop(FILE, STAMP):
        parsed = {text: json.loads(text) for text in column.unique() if text is not None}
        for record, text in zip(records, column, strict=True):
            if text is not None:
                record[column.name] = parsed[text]
    return dict(zip(frame[FILE], zip(frame[STAMP], records, strict=True), strict=True))
