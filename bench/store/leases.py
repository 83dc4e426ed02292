"""Who works on what in a store that several runs share.

    drivers/<run>     a run that is at work; its process holds a lock on the file while it lives
    leases/<key>      which run works on a stage

A run takes a stage's lease before a worker may begin an attempt, and gives it back once the attempt
has its record. The lease of a run that lives is removed by that run alone. Those of a dead run are
removed by whoever takes its file in `drivers/`, which goes last: so a run without that file has
been given up, and its workers, where some are left, publish nothing any more.
"""

from __future__ import annotations

import fcntl
import os
import platform
import re
import secrets
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from pydantic import BaseModel, ValidationError

from bench.errors import UserError
from bench.store.files import json_text, read_json, unreadable, write_first, writing

#: names of runs and of keys, as files of the store have them
NAME = re.compile(r"[\w-][\w.-]{0,200}")
#: stands for the run in a lease whose content cannot be read
UNREADABLE = "unreadable"


class Driver(BaseModel):
    """A run that is at work, or one that buries another."""

    run: str
    pid: int
    host: str
    #: whether no other run may work on the store meanwhile
    alone: bool = False
    #: signs of life so far
    beats: int = 0
    #: the run that removes what this one left behind
    buried_by: str | None = None

    def __str__(self) -> str:
        return f"process {self.pid} on {self.host or 'an unknown machine'}"


class Leases:
    """The leases of a store in a folder, as one process sees them.

    Workers only ask `still_ours`. Raises `UserError` where a file cannot be written.
    """

    def __init__(self, root: Path, name: str) -> None:
        self.root, self.name = root, name
        #: the run that this process drives, or None
        self.run: str | None = None
        self._held: set[str] = set()

    # ------------------------------------------------------------------------------------- drivers

    @contextmanager
    def driving(self, run: str | None = None, *, alone: bool = False) -> Iterator[None]:
        """Be the driver of a run until the block ends; what the dead left behind is removed.

        `run` is its name, which no other run of the store may have; by default a new one is made.
        Raises `UserError` where another one is at work that does not go together with this one.
        """
        run = run or f"{time.strftime('%Y%m%dT%H%M%S', time.gmtime())}-{secrets.token_hex(4)}"
        driver = Driver(run=run, pid=os.getpid(), host=platform.node(), alone=alone)
        with self._taken(driver) as ours:
            if not ours:
                raise UserError(f"{self.root / 'drivers' / run} is another run's")
            self.run = run
            try:
                others = self.drivers()
                if bad := next((d for d in others.values() if alone or d.alone), None):
                    raise UserError(
                        f"another run ({bad}) is using the store {self.name}; wait for it, or "
                        "choose another --store"
                    )
                yield
            finally:
                with suppress(UserError):
                    for key in list(self._held):
                        self.release(key)
                    self.drivers()  # whoever died meanwhile
                self.run = None

    def drivers(self) -> dict[str, Driver]:
        """Return the other runs that are at work.

        What dead runs left is removed, if this process drives a run itself.
        """
        found = {}
        for run in self._names("drivers"):
            if run == self.run:
                continue
            if (driver := self.living(run)) is not None:
                found[run] = driver
            elif self.run is not None:
                self._bury(run)
        return found

    def check_held(self) -> None:
        """Raise `MachineError` where another run has given this one up."""

    def still_ours(self, key: str, run: str) -> bool:
        """Return whether a worker of a run may publish an attempt at a stage."""
        content = self._read(f"drivers/{run}")
        there = content is not None and driver_in(run, content).buried_by is None
        return there and self.holder(key) in (None, run)

    # -------------------------------------------------------------------------------------- leases

    def claim(self, key: str) -> Driver | None:
        """Take a stage's lease for this run; return who has it, if that is another run at work."""
        assert self.run is not None
        while not self._create(f"leases/{key}", {"run": self.run}):
            holder = self.holder(key)
            if holder == self.run:
                break
            if holder is not None:
                if (driver := self.living(holder)) is not None:
                    return driver
                self._bury(holder)
        self._held.add(key)
        return None

    def release(self, key: str) -> None:
        """Give a stage's lease back, if this run has it; who was given up may have it no more."""
        if key in self._held:
            self._held.discard(key)
            if self.holder(key) == self.run:
                self._remove(f"leases/{key}")

    def elsewhere(self) -> dict[str, Driver]:
        """Return which stages other runs work on; what dead runs left is removed."""
        others = self.drivers()
        if not others:
            return {}
        holders = {key: self.holder(key) for key in self._names("leases") if key not in self._held}
        return {key: others[run] for key, run in holders.items() if run in others}

    def holder(self, key: str) -> str | None:
        """Return the run that has a stage's lease, or None."""
        content = self._read(f"leases/{key}")
        if content is None:
            return None
        run = content.get("run") if isinstance(content, dict) else None
        return run if isinstance(run, str) and NAME.fullmatch(run) else UNREADABLE

    def _bury(self, run: str) -> None:
        """Remove the leases of a dead run, then its file, unless somebody else is at that."""
        dead = Driver(run=run, pid=os.getpid(), host=platform.node(), buried_by=self.run)
        with self._taken(dead) as ours:
            for key in self._names("leases") if ours else ():
                if self.holder(key) == run:
                    self._remove(f"leases/{key}")

    # --------------------------------------------------------------------------------------- files

    def living(self, run: str) -> Driver | None:
        """Return a run that is at work, or None where it is not."""
        path = self.root / "drivers" / run
        try:
            number = os.open(path, os.O_RDONLY | os.O_NONBLOCK | os.O_NOFOLLOW)
        except PermissionError as error:  # another user's
            if self.run is not None:
                raise unreadable(path, error) from None
            return driver_in(run, None)
        except OSError:
            return None
        try:
            fcntl.flock(number, fcntl.LOCK_SH | fcntl.LOCK_NB)
        except OSError:
            return driver_in(run, self._read(f"drivers/{run}"))
        finally:
            os.close(number)
        return None

    @contextmanager
    def _taken(self, driver: Driver) -> Iterator[bool]:
        """Have a run's file, with what it says of its driver, until the end of the block.

        It is locked, made if need be. Yield False, and leave it as it is, where another process
        has the lock.
        """
        path = self.root / "drivers" / driver.run
        with writing(path):
            path.parent.mkdir(parents=True, exist_ok=True)
            number = _locked(path)
        if number is None:
            yield False
            return
        try:
            with suppress(OSError):  # a FIFO of somebody's
                os.ftruncate(number, 0)
                os.pwrite(number, json_text(driver.model_dump()), 0)
            yield True
        finally:
            try:
                path.unlink(missing_ok=True)
            finally:
                os.close(number)

    def _names(self, folder: str) -> list[str]:
        with suppress(OSError):
            return [name for name in os.listdir(self.root / folder) if NAME.fullmatch(name)]
        return []

    def _create(self, name: str, value: object) -> bool:
        return write_first(self.root / name, value)

    def _read(self, name: str) -> object:
        """Return the JSON data in a file; None where it is not there, an empty dict for others."""
        try:
            return read_json(self.root / name)
        except FileNotFoundError:
            return None
        except PermissionError as error:
            raise unreadable(self.root / name, error) from None
        except (OSError, ValueError):
            return {}

    def _remove(self, name: str) -> None:
        with writing(self.root / name):
            (self.root / name).unlink(missing_ok=True)


def driver_in(run: str, content: object) -> Driver:
    """Return a run's driver in JSON data; where they are of none, all but its name is unknown."""
    with suppress(ValidationError):
        driver = Driver.model_validate(content)
        if driver.run == run:
            return driver
    return Driver(run=run, pid=0, host="")


def _locked(path: Path) -> int | None:
    """Return a lock on a file, made if need be; None where another process has it.

    Whoever looks whether it is held (`Leases.living`) holds it for a moment: one second is waited.
    """
    end = time.monotonic() + 1.0
    while True:
        number = os.open(path, os.O_RDWR | os.O_CREAT | os.O_NOFOLLOW | os.O_NONBLOCK, 0o666)
        try:
            fcntl.flock(number, fcntl.LOCK_EX | fcntl.LOCK_NB)
            if os.fstat(number).st_nlink:  # else it was removed since it was opened
                return number
        except BlockingIOError:
            if time.monotonic() > end:
                os.close(number)
                return None
            time.sleep(0.05)
        except OSError:
            os.close(number)
            raise
        os.close(number)
