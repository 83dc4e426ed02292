"""The store: a directory of artifacts and records, one folder a stage key.

    store.json                                   the version of the store's layout
    stages/<key>/attempts/<n>/started.json       written first: who began when
    stages/<key>/attempts/<n>/log.txt
    stages/<key>/attempts/<n>/artifact/<files>   its output
    stages/<key>/attempts/<n>/record.json        written last, atomically: the attempt's authority
    stages/<key>/checkpoints/                    while the stage is not complete
    runs/<time>.json                             one run of the command line
    drivers/<run>, leases/<key>                  who works on what (`bench.store.leases`)
    damaged/, removed/, ray/                     set aside, half removed, Ray's: nobody reads them

A file is written under a temporary name and renamed, so what has its final name is whole. What a
record says of its files (SHA-256) is checked before a stage builds on them. In version 2 of the
layout the files of the newest complete attempt lay in the stage's own folder; they are read there.
"""

from __future__ import annotations

import errno
import hashlib
import os
import re
import shutil
import time
from collections.abc import Iterator, Mapping
from contextlib import suppress
from dataclasses import dataclass, field
from importlib.metadata import version
from itertools import chain, count
from pathlib import Path
from typing import Any

from bench.errors import UserError, reason
from bench.store.files import (
    iso,
    read_json,
    regular,
    tail,
    unreadable,
    write_atomic,
    write_first,
    write_json,
    writing,
)
from bench.store.leases import Leases
from bench.store.record import (
    READ,
    SCHEMA,
    Failure,
    File,
    Record,
    Run,
    Status,
    parsed,
    sealed,
    unsealed,
)
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

    @property
    def statuses(self) -> dict[int, Status]:
        """Return attempt -> status."""
        return {attempt.attempt: attempt.status for attempt in self.attempts}


def _refuse_link(path: Path) -> None:
    """Raise `UserError` where there is a link: what is written there would leave the store."""
    if path.is_symlink():
        raise UserError(f"{path} is a link, and a store has none; replace it by what it points at")


class Store:
    """A store on a file system that all workers reach; `bench.store.objects` has others.

    It may be a stranger's: what a record says of itself (key, attempt, run) must be what its path
    says. Raises `UserError` where the folder cannot be opened or holds a store of another version.
    """

    #: instructions -> the class of processors whose bits it has, where that is told
    processors: Mapping[str, str | None] = {}

    def __init__(self, root: Path) -> None:
        try:
            self.root = root.expanduser().resolve()
            self.leases = Leases(self.root, str(self.root))
            for path in self.root.iterdir():
                _refuse_link(path)
        except FileNotFoundError:
            return
        except (OSError, RuntimeError, ValueError) as error:
            raise unreadable(f"the store {root}", error) from None
        self._check_version()

    # ------------------------------------------------------------------------------ opening

    @property
    def name(self) -> str:
        """Return how messages call the store."""
        return str(self.root)

    @property
    def pages(self) -> Path:
        """Return the folder for the pages of reports, unless another is named."""
        return self.root / "reports"

    def exists(self) -> bool:
        """Return whether anything was ever stored."""
        return (self.root / "store.json").exists()

    def _check_version(self) -> None:
        """Refuse a store of another layout; nothing of it is touched."""
        marker = self.root / "store.json"
        try:
            told = read_json(marker)
            schema, wrote = int(told["schema"]), str(told["version"])
        except FileNotFoundError:
            if not (self.root / "stages").is_dir():
                return
            schema, wrote = 1, "0.1"
        except (OSError, ValueError, KeyError, TypeError, OverflowError) as error:
            raise unreadable(marker, error) from None
        if schema not in READ:
            raise UserError(
                f"the store {self.name} was written by maect-bench {wrote} (records of version "
                f"{schema}; this is {version('maect-bench')}, which reads version {SCHEMA}). "
                f"Nothing was touched; choose another --store, or install that version"
            )

    def create(self) -> None:
        """Make the folders and prove that they can be written. Raises `UserError`."""
        with writing(self.root / "store.json"):
            self.root.mkdir(parents=True, exist_ok=True)
            # before there are `stages`: a store always has it
            if not self.exists() or read_json(self.root / "store.json")["schema"] != SCHEMA:
                told = {"schema": SCHEMA, "version": version("maect-bench")}
                self._write(self.root / "store.json", told)
            for name in ("stages", "runs", "drivers", "leases"):
                probe = self.root / name / f".probe-{os.getpid()}"
                probe.parent.mkdir(exist_ok=True)
                write_atomic(probe, b"x" * 65536)
                probe.unlink()

    def check_usable(self, key: str) -> None:
        """Raise `UserError` where a run could not work in a stage's folder, or would leave it."""
        top = self.folder(key)
        for path in chain([top] if os.path.lexists(top) else [], top.rglob("*")):
            _refuse_link(path)
            needed = os.R_OK | os.W_OK | os.X_OK if path.is_dir() else os.R_OK
            if not os.access(path, needed, effective_ids=True):
                raise UserError(f"{path} is another user's; choose another --store")
        try:
            self.attempts(key)
        except OSError as error:
            raise unreadable(top, error) from None

    # ------------------------------------------------------------------------------ reading

    def refresh(self) -> None:
        """Look anew at what is there, before many keys are read."""

    def fetch(self, key: str) -> Path:
        """Return the folder with the newest complete artifact of a key, for a stage to read.

        Raises ValueError where there is none, or where it does not fit its record and that is seen.
        """
        record = self.state(key).record
        if record is None:
            raise ValueError(f"its input {key} is not in the store")
        return self.artifact(record)

    def fetch_checkpoint(self, path: Path, sha256: str | None = None) -> None:
        """See to it that a checkpoint's file is here, or of a folder the notes of all."""

    def artifact(self, record: Record) -> Path:
        """Return where the files lie that a record names."""
        if record.schema_ < 3:
            return self.folder(record.key)
        return self.attempt_folder(record.key, record.attempt) / "artifact"

    def folder(self, key: str) -> Path:
        """Return where all lies that is of a stage."""
        return self.root / "stages" / key

    def attempt_folder(self, key: str, number: int) -> Path:
        """Return where all lies that is of a key's attempt."""
        return self.folder(key) / "attempts" / str(number)

    def checkpoints(self, key: str) -> Path:
        """Return where a stage that is not complete keeps its state."""
        return self.folder(key) / "checkpoints"

    def stage_keys(self) -> list[str]:
        """Return the keys of all stages that were ever begun. Raises `UserError`."""
        stages = self.root / "stages"
        try:
            return sorted(name for name in os.listdir(stages) if not name.startswith("."))
        except FileNotFoundError:
            return []
        except OSError as error:
            raise unreadable(stages, error) from None

    def state(self, key: str) -> StageState:
        """Return the records of a key; damaged ones are named in `problems` and left out."""
        state = StageState(key)
        try:
            numbers = self.attempts(key)
        except OSError as error:
            state.problems.append(f"stages/{key} cannot be read: {reason(error)}")
            return state
        for number in numbers:
            record = self._attempt(number, state)
            if record is not None:
                state.attempts.append(record)
                if record.status == "complete":
                    state.record = record
        return state

    def attempts(self, key: str) -> list[int]:
        """Return the numbers of a key's attempts, in order. Raises OSError."""
        folder = self.folder(key) / "attempts"
        if folder.is_symlink() or folder.parent.is_symlink():
            raise OSError(errno.ELOOP, "it is a link")
        try:
            names = os.listdir(folder)
        except FileNotFoundError:
            return []
        return sorted(int(name) for name in names if re.fullmatch("[1-9][0-9]{0,5}", name))

    def _attempt(self, number: int, state: StageState) -> Record | None:
        folder = self.attempt_folder(state.key, number)
        path = folder / "record.json"
        try:
            if folder.is_symlink() or (folder / "artifact").is_symlink():
                raise ValueError("its folder is a link")
            names = os.listdir(folder)
            if path.name in names:
                record = unsealed(read_json(path))
            else:
                path = folder / "started.json"
                if path.name not in names:
                    return None
                record = parsed(read_json(path))
                if record.status != "running":
                    raise ValueError(f"it says that the attempt is {record.status}")
            if (record.key, record.attempt) != (state.key, number):
                raise ValueError("it is of another attempt")
        except (OSError, ValueError) as error:
            state.problems.append(
                f"record {path.relative_to(self.root)} is damaged: {reason(error)}"
            )
            return None
        return record

    def plain_damages(self, record: Record) -> Iterator[str]:
        """Yield what is wrong with a record's files, as far as that is soon seen."""
        return self.damages(record)

    def left_out(self, record: Record) -> set[str]:
        """Return which files that a record names were never meant to be here."""
        return set()

    def damages(self, record: Record) -> Iterator[str]:
        """Yield everything that is wrong with the files that a record names."""
        for name in record.files.keys() - self.left_out(record):
            if fault := self._fault(record, name):
                yield f"{name} {fault}"

    def _fault(self, record: Record, name: str) -> str | None:
        """Return what is wrong with a file that a record names, or None."""
        told = record.files[name]
        try:
            path = regular(self.artifact(record) / name)
            sound = path.stat().st_size == told.bytes and sha256(path) == told.sha256
        except FileNotFoundError:
            return "is missing"
        except OSError as error:
            return f"cannot be read: {reason(error)}"
        return None if sound else "does not fit its checksum"

    def read(self, record: Record, name: str) -> bytes:
        """Return a file that a record names. Raises ValueError where it does not fit."""
        if fault := self._fault(record, name):
            raise ValueError(f"it {fault}")
        return (self.artifact(record) / name).read_bytes()

    def set_aside(self, state: StageState, why: str) -> None:
        """Move a damaged stage's files out of the way and close its record."""
        assert state.record is not None
        folder = self.artifact(state.record)
        aside = self.root / "damaged" / f"{state.key}-{time.time_ns()}"
        with writing(aside):
            aside.mkdir(parents=True)
            for name in state.record.files.keys() - {"attempts", "checkpoints"}:
                if os.path.lexists(folder / name):
                    shutil.move(folder / name, aside / name)
        end = {"status": "damaged", "error": Failure(kind="Damaged", message=why)}
        record = state.record.model_copy(update=end)
        self._write(self.attempt_folder(state.key, record.attempt) / "record.json", sealed(record))

    def sizes(self) -> dict[str, int]:
        """Return path below the root -> bytes, 0 for folders; links are not followed."""
        found = dict[str, int]()
        for folder, folders, names in os.walk(self.root):
            below = Path(folder).relative_to(self.root)
            found |= {(below / name).as_posix(): 0 for name in folders}
            for name in names:
                with suppress(OSError):  # removed since it was listed
                    told = Path(folder, name).lstat()
                    found[(below / name).as_posix()] = told.st_size
        return found

    def remove(self, path: Path) -> None:
        """Remove what lies at a path below the root; a link goes, what it leads to stays.

        Whoever is killed meanwhile leaves it whole, or the rest of it in `removed`, which nobody
        reads. Raises `UserError`.
        """
        gone = self.root / "removed" / f"{path.name}-{time.time_ns()}"
        with writing(path):
            gone.parent.mkdir(exist_ok=True)
            path.rename(gone)
            if gone.is_dir() and not gone.is_symlink():
                shutil.rmtree(gone)
            else:
                gone.unlink()

    # ------------------------------------------------------------------------------ writing

    def _write(self, path: Path, value: Any) -> None:
        write_json(path, value)

    def _write_first(self, path: Path, value: Any) -> bool:
        return write_first(path, value)

    def publish(self, *paths: Path) -> None:
        """Make known to all machines what was written below the root; folders with all in them."""

    def discard(self, *paths: Path) -> None:
        """Remove files or folders below the root, if they are there."""
        for path in paths:
            shutil.rmtree(path, ignore_errors=True)
            with suppress(OSError):
                path.unlink()

    def begin(self, start: Record) -> Record:
        """Begin an attempt: write its `started.json`. Return the record with its number."""
        with writing(self.folder(start.key)):
            for number in count(max(self.attempts(start.key), default=0) + 1):
                record = start.model_copy(update={"attempt": number})
                folder = self.attempt_folder(start.key, number)
                folder.mkdir(parents=True, exist_ok=True)
                if self._write_first(folder / "started.json", record.plain()):
                    break  # else it is another writer's
        return record

    def put_file(self, record: Record, name: str, data: bytes) -> File:
        """Write a file of an attempt's artifact. Return its entry for the attempt's record."""
        path = self.artifact(record) / name
        with writing(path):
            path.parent.mkdir(exist_ok=True)
        write_atomic(path, data)
        self.publish(path)
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
        self.publish(folder)
        first = self._write_first(folder / "record.json", sealed(closed))
        if first and record.status == "complete":  # which replaces what there was
            with suppress(OSError):
                old = [n for n in self.attempts(record.key) if n < record.attempt]
                self.discard(*(self.attempt_folder(record.key, n) / "artifact" for n in old))
        elif first:
            self.discard(folder / "artifact")
        return first

    def close_abandoned(
        self, attempt: Record, status: Status, why: str, ended_s: float | None = None
    ) -> None:
        """Write the record of an attempt whose process died before it could.

        `ended_s` is when, in seconds since the epoch; where nobody saw it, its last sign of life.
        """
        if ended_s is None:
            files = self.attempt_folder(attempt.key, attempt.attempt).iterdir()
            times = [p.lstat().st_mtime for p in files if p.name != "record.json"]
            ended_s = min(max(times), time.time())
        error = Failure(kind=status.capitalize(), message=why)
        self.close_attempt(attempt.model_copy(update={"status": status, "error": error}), ended_s)

    # --------------------------------------------------------------------------------- runs

    def write_run(self, run: Run) -> None:
        """Write a run's record."""
        self._write(self.root / "runs" / f"{run.id}.json", run.model_dump())

    def close_runs(self) -> None:
        """Note which runs ended without a word; the caller drives one itself."""
        at_work = self.leases.drivers()
        for run in self.runs():
            if run.status == "running" and run.id not in at_work:
                self.write_run(run.model_copy(update={"status": "lost"}))

    def runs(self, problems: list[str] | None = None) -> list[Run]:
        """Return the records of all runs, oldest first; what is none is named in `problems`."""
        found = []
        for path in sorted((self.root / "runs").glob("*.json")):
            try:
                run = Run.model_validate(read_json(path))
                if f"{run.id}.json" != path.name:
                    raise ValueError("it is of another run")
                found.append(run)
            except (OSError, ValueError) as error:
                if problems is not None:
                    problems.append(f"runs/{path.name} is no record of a run: {reason(error)}")
        return found
