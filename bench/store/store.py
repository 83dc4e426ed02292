"""The store: a directory of artifacts and records, one folder a stage key.

    store.json                                   the version of the store's layout
    stages/<key>/<artifact files>                the newest complete attempt's output
    stages/<key>/attempts/<n>/started.json       written first: who began when
    stages/<key>/attempts/<n>/log.txt
    stages/<key>/checkpoints/                    while the stage is not complete
    stages/<key>/attempts/<n>/record.json        written last, atomically: the attempt's authority
    runs/<time>.json                             one run of the command line

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
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from importlib.metadata import version
from pathlib import Path

from bench.errors import UserError
from bench.store.files import iso, store_error, tail, write_atomic, write_first, write_json
from bench.store.record import SCHEMA, Failure, File, Record, Run, Status, parsed, sealed, unsealed
from maect.files import sha256


@dataclass
class StageState:
    """What the store holds of one key."""

    key: str
    #: newest complete record, if any
    record: Record | None = None
    #: every attempt's record, oldest first; those without a record have only their start
    attempts: list[Record] = field(default_factory=list)
    #: sentences on what is damaged
    problems: list[str] = field(default_factory=list)


class Store:
    """A store on a file system that all workers reach.

    Raises `UserError` where the folder holds a store of another version.
    """

    def __init__(self, root: Path) -> None:
        self.root = root.expanduser().resolve()
        self._check_version()

    # ------------------------------------------------------------------------------ opening

    def _check_version(self) -> None:
        """Refuse a store of another layout; nothing of it is touched."""
        marker = self.root / "store.json"
        try:
            told = json.loads(marker.read_text(encoding="utf-8"))
            schema, wrote = int(told["schema"]), str(told["version"])
        except (FileNotFoundError, NotADirectoryError):
            if not (self.root / "stages").is_dir():
                return
            schema, wrote = 1, "0.1"
        except (OSError, ValueError, KeyError, TypeError) as error:
            raise UserError(f"{marker} cannot be read: {error}; choose another --store") from None
        if schema != SCHEMA:
            raise UserError(
                f"the store {self.root} was written by maect-bench {wrote} (records of version "
                f"{schema}; this is {version('maect-bench')}, which reads version {SCHEMA}). "
                f"Nothing was touched; choose another --store, or install that version"
            )

    def create(self) -> None:
        """Make the folders and prove that they can be written. Raises `UserError`."""
        probe = self.root / "runs" / f".probe-{os.getpid()}"
        try:
            self.root.mkdir(parents=True, exist_ok=True)
            if not (self.root / "store.json").exists():  # before `stages`: a store always has it
                told = {"schema": SCHEMA, "version": version("maect-bench")}
                write_json(self.root / "store.json", told)
            (self.root / "stages").mkdir(exist_ok=True)
            probe.parent.mkdir(exist_ok=True)
        except OSError as error:
            raise store_error(probe.parent, error) from None
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

    def in_use(self) -> bool:
        """Return whether a driver holds the store, as far as its lock tells."""
        try:
            lock = os.open(self.root / "lock", os.O_RDONLY | os.O_NONBLOCK | os.O_NOFOLLOW)
        except OSError as error:
            return not isinstance(error, FileNotFoundError)
        try:
            fcntl.flock(lock, fcntl.LOCK_SH | fcntl.LOCK_NB)
        except OSError:
            return True
        finally:
            os.close(lock)
        return False

    # ------------------------------------------------------------------------------ reading

    def folder(self, key: str) -> Path:
        """Return where a stage's artifact and attempts lie."""
        return self.root / "stages" / key

    def attempt_folder(self, key: str, number: int) -> Path:
        """Return where the log and the records of a key's attempt lie."""
        return self.folder(key) / "attempts" / str(number)

    def checkpoints(self, key: str) -> Path:
        """Return where a stage that is not complete keeps its state."""
        return self.folder(key) / "checkpoints"

    def clear_checkpoints(self, key: str) -> None:
        """Remove a stage's checkpoints, whichever code they are of."""
        shutil.rmtree(self.checkpoints(key), ignore_errors=True)

    def stage_keys(self) -> list[str]:
        """Return the keys of all stages that were ever begun."""
        stages = self.root / "stages"
        return sorted(p.name for p in stages.iterdir()) if stages.is_dir() else []

    def state(self, key: str) -> StageState:
        """Return the records of a key; damaged ones are named in `problems` and left out."""
        state = StageState(key)
        for number in self.attempts(key):
            record = self._attempt(number, state)
            if record is not None:
                state.attempts.append(record)
                if record.status == "complete":
                    state.record = record
        return state

    def attempts(self, key: str) -> list[int]:
        """Return the numbers of a key's attempts, in order."""
        with suppress(FileNotFoundError, NotADirectoryError):
            names = os.listdir(self.folder(key) / "attempts")
            return sorted(int(name) for name in names if name.isdigit())
        return []

    def _attempt(self, number: int, state: StageState) -> Record | None:
        folder = self.attempt_folder(state.key, number)
        path = folder / "record.json"
        try:
            if path.exists():
                record = unsealed(json.loads(path.read_bytes()), state.key)
            else:
                path = folder / "started.json"
                if not path.exists():
                    return None
                record = parsed(json.loads(path.read_bytes()))
            if (record.key, record.attempt) != (state.key, number):
                raise ValueError("it is of another attempt")
        except (OSError, ValueError, RecursionError) as error:
            what = str(error).splitlines()[0]
            state.problems.append(f"record {path.relative_to(self.root)} is damaged: {what}")
            return None
        return record

    def damage(self, state: StageState) -> str | None:
        """Return what is wrong with a complete stage's files, or None."""
        assert state.record is not None
        return next(self.damages(state.key, state.record), None)

    def damages(self, key: str, record: Record) -> Iterator[str]:
        """Yield everything that is wrong with the files that a record of `key` names."""
        for name, file in record.files.items():
            path = self.folder(key) / name
            if not path.is_file():
                yield f"{name} is missing"
            elif path.stat().st_size != file.bytes or sha256(path) != file.sha256:
                yield f"{name} does not fit its checksum"

    def set_aside(self, state: StageState, reason: str) -> None:
        """Move a damaged stage's files out of the way and close its record."""
        assert state.record is not None
        folder = self.folder(state.key)
        aside = self.root / "damaged" / f"{state.key}-{int(time.time())}"
        aside.mkdir(parents=True, exist_ok=True)
        for name in state.record.files:
            if (folder / name).exists():
                shutil.move(folder / name, aside / name)
        error = Failure(kind="Damaged", message=reason)
        self.write_record(state.record.model_copy(update={"status": "damaged", "error": error}))

    # ------------------------------------------------------------------------------ writing

    def begin(self, start: Record) -> Record:
        """Begin an attempt: write its `started.json`. Return the record with its number."""
        number = max(self.attempts(start.key), default=0) + 1
        while True:
            folder = self.attempt_folder(start.key, number)
            try:
                folder.mkdir(parents=True)
                break
            except FileExistsError:
                number += 1
        record = start.model_copy(update={"attempt": number})
        write_json(folder / "started.json", record.plain())
        return record

    def put_file(self, key: str, name: str, data: bytes) -> File:
        """Write one artifact file. Return its entry for the record."""
        write_atomic(self.folder(key) / name, data)
        return File(sha256=hashlib.sha256(data).hexdigest(), bytes=len(data))

    def close_attempt(self, record: Record, ended_s: float) -> bool:
        """Write an attempt's record, its end and cost filled in.

        `ended_s` is in seconds since the epoch. Return False if the attempt has a record already:
        it was given up for lost.
        """
        folder = self.attempt_folder(record.key, record.attempt)
        wall_s = max(0.0, ended_s - record.started_s)
        end = {
            "ended": iso(record.started_s + wall_s),
            "cost": record.cost.after(wall_s, folder),
            "log_tail": tail(folder / "log.txt"),
        }
        closed = record.model_copy(update=end)
        return write_first(folder / "record.json", sealed(closed))

    def write_record(self, record: Record) -> None:
        """Put a record in place of the one that an attempt may have."""
        folder = self.attempt_folder(record.key, record.attempt)
        write_json(folder / "record.json", sealed(record))

    def close_abandoned(
        self, attempt: Record, status: Status, why: str, ended_s: float | None = None
    ) -> None:
        """Write the record of an attempt whose process died before it could.

        `ended_s` is when, in seconds since the epoch; where nobody saw it, its last sign of life.
        """
        if ended_s is None:
            files = self.attempt_folder(attempt.key, attempt.attempt).iterdir()
            ended_s = max(p.stat().st_mtime for p in files if p.name != "record.json")
        error = Failure(kind=status.capitalize(), message=why)
        self.close_attempt(attempt.model_copy(update={"status": status, "error": error}), ended_s)

    # --------------------------------------------------------------------------------- runs

    def write_run(self, run: Run) -> None:
        """Write a run's record."""
        write_json(self.root / "runs" / f"{run.id}.json", run.model_dump())

    def close_runs(self) -> None:
        """Note which runs ended without a word; the caller holds the store."""
        for run in self.runs():
            if run.status == "running":
                self.write_run(run.model_copy(update={"status": "lost"}))

    def runs(self) -> list[Run]:
        """Return the records of all runs, oldest first; unreadable ones are left out."""
        found = []
        for path in sorted((self.root / "runs").glob("*.json")):
            with suppress(OSError, ValueError):
                found.append(Run.model_validate_json(path.read_bytes()))
        return found
