"""The leases of a store in a bucket: files become objects, locks become signs of life.

A driver puts its object anew every few seconds, each time over its own last one. Once a minute has
passed without, another run may put over it, and the driver finds out with its next sign of life. On
the driver's own machine nobody has to wait: the copy of the store has a file that it holds locked.
"""

from __future__ import annotations

import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from pydantic_core import from_json

from bench.errors import MachineError
from bench.store.client import Meta, Objects, StoreGone, put_s
from bench.store.files import json_text, read_json
from bench.store.leases import NAME, Driver, Leases, driver_in

#: seconds between two signs of life of a driver, and after which its leases may be taken
BEAT_S, LAPSES_S = 10.0, 60.0


class BucketLeases(Leases):
    """The leases of a store whose copy lies at `root`. Raises `StoreGone` as `Objects` does."""

    def __init__(self, root: Path, objects: Objects) -> None:
        super().__init__(root, objects.url)
        self.objects = objects
        #: the server's clock less this process's monotonic one, seconds
        self._ahead_s: float | None = None
        self._lost: str | None = None

    # ------------------------------------------------------------------------------------- drivers

    @contextmanager
    def _living(self, driver: Driver) -> Iterator[None]:
        """Give signs of life until the end of the block."""
        mark, ended = _put(self.objects, driver, None), threading.Event()
        self._ahead_s = put_s(self.objects.get(f"drivers/{driver.run}")[1]) - time.monotonic()
        beats = threading.Thread(target=self._beat, args=(driver, mark, ended), daemon=True)
        beats.start()
        try:
            yield
        finally:
            ended.set()
            beats.join()
            if self._lost is None:
                with suppress(StoreGone):
                    self._remove(f"drivers/{driver.run}")

    def _beat(self, driver: Driver, mark: Meta | None, ended: threading.Event) -> None:
        objects = Objects(self.name, patient=False)
        while not ended.wait(BEAT_S):
            with suppress(StoreGone):  # for a while, maybe
                beat = driver.model_copy(update={"beats": driver.beats + 1})
                mark = _put(objects, beat, mark)
                if mark is None:
                    self._lost = f"another run took the store {self.name} over: this one gave no "
                    self._lost += f"sign of life for {LAPSES_S:.0f} s"
                    return
                driver = beat

    def check_held(self) -> None:
        if self._lost is not None:
            raise MachineError(self._lost)

    def living(self, run: str) -> Driver | None:
        try:
            data, seen = self.objects.get(f"drivers/{run}")
        except FileNotFoundError:
            return None
        driver = driver_in(run, _json(data))
        if driver.buried_by is None and self._here(run):
            return driver if super().living(run) else None
        return driver if self._age_s(seen) < LAPSES_S else None

    def _age_s(self, seen: Meta) -> float:
        now_s = time.time() if self._ahead_s is None else time.monotonic() + self._ahead_s
        return now_s - put_s(seen)

    def _here(self, run: str) -> bool:
        """Return whether a run's driver used this copy, so that its lock tells whether it lives."""
        with suppress(OSError, ValueError):
            driver = driver_in(run, read_json(self.root / "drivers" / run))
            return driver.pid > 0 and driver.buried_by is None
        return False

    @contextmanager
    def _taken(self, driver: Driver) -> Iterator[bool]:
        """Have a run's file in the copy, and its object."""
        here = self._here(driver.run)
        with super()._taken(driver) as ours:
            if ours and driver.buried_by is None:
                with self._living(driver):
                    yield True
            elif ours and self._put_over(driver, here):
                yield True
                self._remove(f"drivers/{driver.run}")
            else:
                yield False

    def _put_over(self, burial: Driver, here: bool) -> bool:
        """Put over the object of a dead run, `here` or elsewhere. Return whether that is done."""
        seen = None
        with suppress(FileNotFoundError):
            data, seen = self.objects.get(f"drivers/{burial.run}")
            surely_dead = here and driver_in(burial.run, _json(data)).buried_by is None
            if not surely_dead and self._age_s(seen) < LAPSES_S:
                return False  # it gave a sign of life, or somebody else buries it
        return _put(self.objects, burial, seen) is not None

    # ------------------------------------------------------------------------------------- objects

    def _names(self, folder: str) -> list[str]:
        found = (name.rpartition("/")[2] for name in self.objects.listing(folder))
        return [name for name in found if NAME.fullmatch(name)]

    def _create(self, name: str, value: object) -> bool:
        return self.objects.put_over(name, json_text(value), None) is not None

    def _read(self, name: str) -> object:
        try:
            return _json(self.objects.get(name)[0])
        except FileNotFoundError:
            return None

    def _remove(self, name: str) -> None:
        self.objects.delete([name])


def _put(objects: Objects, driver: Driver, seen: Meta | None) -> Meta | None:
    """Put a driver's object over the one that was seen. Return its mark, or None."""
    return objects.put_over(f"drivers/{driver.run}", json_text(driver.model_dump()), seen)


def _json(data: bytes) -> object:
    """Return the JSON data of an object; an empty dict for others."""
    try:
        return from_json(data)
    except ValueError:
        return {}
