"""The store: a directory of artifacts and records, one folder a stage key.

    stages/<key>/<artifact files>                the newest complete attempt's output
    stages/<key>/attempts/<n>/started.json       written first: who began when
    stages/<key>/attempts/<n>/log.txt
    stages/<key>/checkpoints/                    while the stage is not complete
    stages/<key>/attempts/<n>/record.json        written last, atomically: the attempt's authority
    runs/<time>.json                             one run of the command line
    index-<version>-<sha256>.parquet             for speed only, see `bench.store.index`

A file is written under a temporary name and renamed, so what has its final name is whole. What a
record says of its files (SHA-256) is checked before a stage builds on them.
"""

from __future__ import annotations

import fcntl
import hashlib
import json
import os
import shutil
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from bench.errors import UserError
from bench.store import gpu_meter


def sha256(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def write_atomic(path: Path, data: bytes) -> None:
    """Write a file so that it is either whole or not there. Raises `UserError` when it cannot."""
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        with temporary.open("wb") as file:
            file.write(data)
            file.flush()
            os.fsync(file.fileno())
        temporary.replace(path)
    except OSError as error:
        temporary.unlink(missing_ok=True)
        raise _store_error(path, error) from None


def write_json(path: Path, value: Any) -> None:
    write_atomic(path, _json(value))


def _json(value: Any) -> bytes:
    return json.dumps(value, indent=1, ensure_ascii=False).encode() + b"\n"


def write_first(path: Path, value: Any) -> bool:
    """Like `write_json` where there is no such file yet; of two writers one wins. Did this one?"""
    whole = path.with_name(f".{path.name}.{os.getpid()}.whole")
    write_atomic(whole, _json(value))
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


def _store_error(path: Path, error: OSError) -> UserError:
    reason = (error.strerror or str(error)).lower()
    return UserError(
        f"the store cannot be written ({reason}): {path.parent}; choose another --store"
    )


@dataclass
class StageState:
    """What the store holds of one key."""

    key: str
    #: newest complete record, if any
    record: dict[str, Any] | None = None
    #: every attempt's record, oldest first; those without a record have only their start
    attempts: list[dict[str, Any]] = field(default_factory=list)
    #: sentences on what is damaged
    problems: list[str] = field(default_factory=list)


class Store:
    """A store on a file system that all workers reach."""

    def __init__(self, root: Path) -> None:
        self.root = root.expanduser().resolve()

    # ------------------------------------------------------------------------------ opening

    def create(self) -> None:
        """Make the folders and prove that they can be written."""
        try:
            (self.root / "stages").mkdir(parents=True, exist_ok=True)
            (self.root / "runs").mkdir(exist_ok=True)
        except OSError as error:
            raise _store_error(self.root / "stages", error) from None
        probe = self.root / "runs" / f".probe-{os.getpid()}"
        write_atomic(probe, b"x" * 65536)
        probe.unlink()

    @contextmanager
    def lock(self) -> Iterator[None]:
        """Hold the store for one driver; the kernel releases it when that process dies."""
        with (self.root / "lock").open("a+") as file:
            try:
                fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError:
                file.seek(0)
                raise UserError(
                    f"another run (process {file.read().strip() or 'unknown'}) is using the store "
                    f"{self.root}; wait for it, or choose another --store"
                ) from None
            file.truncate(0)
            file.write(f"{os.getpid()}\n")
            file.flush()
            yield

    # ------------------------------------------------------------------------------ reading

    def folder(self, key: str) -> Path:
        return self.root / "stages" / key

    def checkpoints(self, key: str) -> Path:
        return self.folder(key) / "checkpoints"

    def clear_checkpoints(self, key: str) -> None:
        """A complete stage needs them no more, whichever code they are of."""
        shutil.rmtree(self.checkpoints(key), ignore_errors=True)

    def stage_keys(self) -> list[str]:
        stages = self.root / "stages"
        return sorted(p.name for p in stages.iterdir()) if stages.is_dir() else []

    def state(self, key: str) -> StageState:
        """Records of a key; damaged ones are named in `problems` and left out."""
        state = StageState(key)
        attempts = self.folder(key) / "attempts"
        if not attempts.is_dir():
            return state
        for folder in sorted((p for p in attempts.iterdir() if p.name.isdigit()), key=_number):
            record = self._attempt(folder, state)
            if record is not None:
                state.attempts.append(record)
                if record["status"] == "complete":
                    state.record = record
        return state

    def _attempt(self, folder: Path, state: StageState) -> dict[str, Any] | None:
        path = folder / "record.json"
        try:
            if path.exists():
                return self.read(path, state.key)
            path = folder / "started.json"
            if not path.exists():
                return None
            return json.loads(path.read_text(encoding="utf-8")) | {"status": "running"}
        except (OSError, ValueError, KeyError, TypeError) as error:
            state.problems.append(f"record {path.relative_to(self.root)} is damaged: {error}")
            return None

    def read(self, path: Path, key: str) -> dict[str, Any]:
        """A record of `key`. Raises ValueError, KeyError or TypeError where it is not sound."""
        record = json.loads(path.read_text(encoding="utf-8"))
        if record["key"] != key or record["checksum"] != record_checksum(record):
            raise ValueError("its checksum does not fit")
        return dict(record)

    def damage(self, state: StageState) -> str | None:
        """Check a complete stage's files against its record: what is wrong, or None."""
        assert state.record is not None
        for name, entry in state.record["files"].items():
            path = self.folder(state.key) / name
            if not path.exists():
                return f"{name} is missing"
            if path.stat().st_size != entry["bytes"] or sha256(path) != entry["sha256"]:
                return f"{name} does not fit its checksum"
        return None

    def set_aside(self, state: StageState, reason: str) -> None:
        """Move a damaged stage's files out of the way and close its record."""
        assert state.record is not None
        folder = self.folder(state.key)
        aside = self.root / "damaged" / f"{state.key}-{int(time.time())}"
        aside.mkdir(parents=True, exist_ok=True)
        for name in state.record["files"]:
            if (folder / name).exists():
                shutil.move(folder / name, aside / name)
        changed = state.record | {
            "status": "damaged",
            "error": {"class": "Damaged", "message": reason},
        }
        self.write_record(changed)

    # ------------------------------------------------------------------------------ writing

    def begin(self, key: str, start: dict[str, Any]) -> Path:
        """A new attempt's folder, its `started.json` written."""
        attempts = self.folder(key) / "attempts"
        attempts.mkdir(parents=True, exist_ok=True)
        number = max((_number(p) for p in attempts.iterdir() if p.name.isdigit()), default=0) + 1
        while True:
            try:
                (attempts / str(number)).mkdir()
                break
            except FileExistsError:
                number += 1
        folder = attempts / str(number)
        write_json(folder / "started.json", start | {"key": key, "attempt": number})
        return folder

    def put_file(self, key: str, name: str, data: bytes) -> dict[str, Any]:
        """Write one artifact file; returns its entry for the record."""
        write_atomic(self.folder(key) / name, data)
        return {"sha256": hashlib.sha256(data).hexdigest(), "bytes": len(data)}

    def close_attempt(self, record: dict[str, Any]) -> bool:
        """Write an attempt's record; False if it has one: its worker was given up for lost."""
        return write_first(self._record_path(record), sealed(record))

    def write_record(self, record: dict[str, Any]) -> None:
        """Put a record in place of the one that an attempt may have."""
        write_json(self._record_path(record), sealed(record))

    def _record_path(self, record: dict[str, Any]) -> Path:
        attempts = self.folder(record["key"]) / "attempts"
        return attempts / str(record["attempt"]) / "record.json"

    def close_abandoned(
        self,
        key: str,
        attempt: dict[str, Any],
        status: str,
        why: str,
        ended: float | None = None,
    ) -> None:
        """Write the record of an attempt whose process died before it could.

        `ended` is when, in seconds since the epoch; where nobody saw it, its last sign of life.
        """
        folder = self.folder(key) / "attempts" / str(attempt["attempt"])
        if ended is None:
            ended = max(p.stat().st_mtime for p in folder.iterdir() if p.name != "record.json")
        wall = max(0.0, ended - attempt["started_s"])
        cost = attempt["cost"] | {"wall_s": wall}
        cost["device_hours"] = cost["devices"] * wall / 3600
        if cost["device_kind"] == "gpu":
            cost |= gpu_meter.collect(folder, cost["devices"])
        record = attempt | {
            "status": status,
            "ended": iso(attempt["started_s"] + wall),
            "cost": cost,
            "error": {"class": status.capitalize(), "message": why},
            "metrics": [],
            "files": {},
            "log_tail": tail(folder / "log.txt"),
        }
        self.close_attempt(record)

    # --------------------------------------------------------------------------------- runs

    def write_run(self, run: dict[str, Any]) -> None:
        write_json(self.root / "runs" / f"{run['id']}.json", run)

    def close_runs(self) -> None:
        """Note of runs that ended without a word that they did; the caller holds the store."""
        for run in self.runs():
            if run["status"] == "running":
                self.write_run(run | {"status": "lost"})

    def runs(self) -> list[dict[str, Any]]:
        found = []
        for path in sorted((self.root / "runs").glob("*.json")):
            try:
                found.append(json.loads(path.read_text(encoding="utf-8")))
            except (OSError, ValueError):
                continue
        return found


def sealed(record: dict[str, Any]) -> dict[str, Any]:
    """A record with the checksum of its content."""
    return record | {"checksum": record_checksum(record)}


def record_checksum(record: dict[str, Any]) -> str:
    """SHA-256 over a record's content, so that a changed record is noticed."""
    content = {k: v for k, v in record.items() if k != "checksum"}
    text = json.dumps(content, sort_keys=True, separators=(",", ":"), ensure_ascii=False)
    return hashlib.sha256(text.encode()).hexdigest()


def iso(seconds: float) -> str:
    """A time stamp in UTC, to the millisecond."""
    whole = time.strftime("%Y-%m-%dT%H:%M:%S", time.gmtime(seconds))
    return f"{whole}.{int(seconds * 1000) % 1000:03d}Z"


def tail(path: Path, size: int = 4000) -> str:
    """The end of a log."""
    try:
        with path.open("rb") as file:
            file.seek(max(0, path.stat().st_size - size))
            return file.read().decode("utf-8", "replace")
    except OSError:
        return ""


def _number(path: Path) -> int:
    return int(path.name)
