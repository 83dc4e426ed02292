"""A store on object storage: the bucket is the authority, a folder of this machine a copy of it.

The copy has the layout of a local store, whose code reads and writes it. What is read is first made
equal to what the bucket has; what is written is put there too. `docs/cluster.md` tells in which
order, and what a kill leaves.
"""

from __future__ import annotations

import hashlib
import os
import re
import threading
import time
from collections.abc import Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager, suppress
from functools import partial
from pathlib import Path
from typing import Any

from bench.errors import UserError, reason
from bench.store.bucket_leases import BucketLeases
from bench.store.client import Meta, Objects, put_s
from bench.store.files import json_text, regular
from bench.store.record import Record, Run, Status
from bench.store.store import StageState, Store
from maect.files import sha256, write_atomic

#: requests at a time
AT_ONCE = 16
#: what a copy has of everything, as far as it was looked at; all else is fetched when it is read
_SMALL = re.compile(
    r"(store|calibration)\.json|runs/(?!\.)[^/\0]+\.json"
    r"|stages/(?!\.)[^/\0]+/attempts/[1-9][0-9]{0,5}/(started|record)\.json"
)


class ObjectStore(Store):
    """The store below a bucket's prefix, given by its URL.

    Raises `StoreGone` (a `UserError`) where it cannot be reached or used, `UserError` where it is
    of another version or the copy cannot be written; both at any later time as well.
    """

    def __init__(self, url: str, *, known: bool = False) -> None:
        """Open it; where it is `known`, a worker does, whose driver has looked at it."""
        self.objects = Objects(url.rstrip("/"))
        where = self.name + os.environ.get("AWS_ENDPOINT_URL", "")
        told = re.sub(r"[^\w.-]+", "-", url.partition("://")[2])[-60:].strip("-.")
        told += f"-{hashlib.sha256(where.encode()).hexdigest()[:8]}"
        top = Path(os.environ.get("MAECT_CACHE") or "~/.cache/maect-bench").expanduser()
        self.root = (top / "stores" / told).absolute()
        #: object -> what the newest listing of its folder told
        self._seen: dict[str, Meta] = {}
        #: keys read since the last listing of all; None: each is listed when it is read
        self._read: set[str] | None = None
        self.objects.answers = known
        with _copying(self.root / "store.json"):
            pass
        if not known:
            try:
                self._write_copy(self.root / "store.json", self.objects.get("store.json")[0])
            except FileNotFoundError:  # the copy may be of a store that is no more
                super().discard(self.root / "store.json", self.root / "stages")
            super().__init__(self.root)
        self.leases = BucketLeases(self.root, self.objects)

    def __reduce__(self) -> Any:
        """A worker opens it by its URL, with the credentials and the copy of its own machine."""
        return partial(ObjectStore, known=True), (self.name,)

    @property
    def name(self) -> str:
        return self.objects.url

    # ------------------------------------------------------------------------------ reading

    def refresh(self) -> None:
        self._compare("")
        self._read = set()

    def stage_keys(self) -> list[str]:
        self.refresh()
        found = (re.match(r"stages/(?!\.)([^/]+)/.", name) for name in self._seen)
        return sorted({match[1] for match in found if match})

    def state(self, key: str) -> StageState:
        if self._read is None or key in self._read:
            self._compare(f"stages/{key}/")
        if self._read is not None:
            self._read.add(key)
        return super().state(key)

    def runs(self, problems: list[str] | None = None) -> list[Run]:
        self._compare("runs/")
        return super().runs(problems)

    def _compare(self, prefix: str) -> None:
        """List a folder; make the copy's records, starts and runs equal to those below it."""
        found = self.objects.listing(prefix)
        seen = {name: one for name, one in self._seen.items() if not name.startswith(prefix)}
        self._seen = seen | found
        tops = [prefix] if prefix else ["stages", "runs"]
        for path in (path for top in tops for path in (self.root / top).rglob("*.json")):
            if _SMALL.fullmatch(name := self._name(path)) and name not in found:
                path.unlink(missing_ok=True)
        self._bring(name for name in found if _SMALL.fullmatch(name))

    def _bring(self, names: Iterable[str]) -> None:
        """Make files of the copy equal to objects that were listed. Raises `UserError`."""
        todo = [name for name in names if not _same(self.root / name, self._seen[name])]
        with ThreadPoolExecutor(AT_ONCE) as pool:
            list(pool.map(self._download, todo))

    def _download(self, name: str) -> None:
        path, at_s = self.root / name, put_s(self._seen[name])
        whole = path.with_name(f".{path.name}.{os.getpid()}.{threading.get_ident()}.part")
        with _copying(path), suppress(FileNotFoundError):  # removed since it was listed
            try:
                self.objects.download(name, whole)
                os.utime(whole, times=(at_s, at_s))
                whole.replace(path)
            finally:
                whole.unlink(missing_ok=True)

    def _name(self, path: Path) -> str:
        """Return what the object is called whose copy lies at a path."""
        return path.relative_to(self.root).as_posix()

    def plain_damages(self, record: Record) -> Iterator[str]:
        """Yield which files are missing or of another size, by the newest listing.

        What they hold is compared when they are fetched.
        """
        for name in record.files:
            if fault := self._unlike(record, name):
                yield f"{name} {fault}"

    def _unlike(self, record: Record, name: str) -> str | None:
        seen = self._seen.get(self._name(self.artifact(record) / name))
        if seen is None:
            return "is missing"
        return None if seen["size"] == record.files[name].bytes else "does not fit its checksum"

    def _fault(self, record: Record, name: str) -> str | None:
        if fault := self._unlike(record, name):
            return fault
        self._bring([self._name(self.artifact(record) / name)])
        return super()._fault(record, name)

    def fetch(self, key: str) -> Path:
        state = self.state(key)
        if state.record is None:
            raise ValueError(f"its input {key} is not in the store")
        for name in state.record.files:
            # a copy that fits its record needs no look at the bucket
            fault = super()._fault(state.record, name) and self._fault(state.record, name)
            if fault:
                self.set_aside(state, f"{name} {fault}")
                raise ValueError(
                    f"{name} {fault}: it is of {state.record.name}, which is set aside. The same "
                    "command makes it again"
                )
        return self.artifact(state.record)

    def fetch_checkpoint(self, path: Path, checksum: str | None = None) -> None:
        if checksum is None:
            self._seen |= (found := self.objects.listing(self._name(path)))
            self._bring(name for name in found if name.endswith(".json"))
        elif self._name(path) in self._seen:
            with suppress(OSError):
                if sha256(regular(path)) == checksum:
                    return
            self._download(self._name(path))

    # ------------------------------------------------------------------------------ writing

    def _write_copy(self, path: Path, data: bytes) -> None:
        with _copying(path):
            write_atomic(path, data)

    def _write(self, path: Path, value: Any) -> None:
        self.objects.put(self._name(path), json_text(value))
        self._write_copy(path, json_text(value))

    def _write_first(self, path: Path, value: Any) -> bool:
        data = json_text(value)
        if self.objects.put_over(self._name(path), data, None) is None:
            return False
        self._write_copy(path, data)
        return True

    def publish(self, *paths: Path) -> None:
        for path in paths:
            files = [path]
            if path.is_dir():  # of an attempt
                own = (".", "started.", "record.")
                found = (file for file in path.iterdir() if file.is_file())
                files = [file for file in found if not file.name.startswith(own)]
            for file in files:
                self.objects.put(self._name(file), file)

    def discard(self, *paths: Path) -> None:
        super().discard(*paths)
        for path in paths:
            name = self._name(path)
            self.objects.delete([name] if path.suffix else list(self.objects.listing(name)))

    def sizes(self) -> dict[str, int]:
        return {name: told["size"] for name, told in self.objects.listing().items()}

    def remove(self, path: Path) -> None:
        """Whoever is killed meanwhile leaves what no record names."""
        name = self._name(path)
        names = [n for n in self.objects.listing(name) if n == name or n.startswith(f"{name}/")]
        for first in (True, False):
            self.objects.delete([n for n in names if n.endswith("/record.json") == first])
        super().discard(path)

    def close_abandoned(
        self, attempt: Record, status: Status, why: str, ended_s: float | None = None
    ) -> None:
        prefix = self._name(self.attempt_folder(attempt.key, attempt.attempt))
        if not (self.root / prefix / "log.txt").exists():  # it ran on another machine
            there = (name for name in self._seen if name.startswith(f"{prefix}/"))
            self._bring(name for name in there if "/artifact/" not in name)
        super().close_abandoned(attempt, status, why, ended_s)

    def set_aside(self, state: StageState, why: str) -> None:
        assert state.record is not None
        for name in state.record.files:
            aside = f"damaged/{state.key}-{time.time_ns()}/{name}"
            self.objects.move(self._name(self.artifact(state.record) / name), aside)
        super().set_aside(state, why)


def _same(path: Path, seen: Meta) -> bool:
    """Return whether a file is surely equal to an object, by the MD5 that an ETag may be."""
    with suppress(OSError):
        if regular(path).stat().st_size == seen["size"]:
            with path.open("rb") as file:
                return f'"{hashlib.file_digest(file, "md5").hexdigest()}"' == seen["e_tag"]
    return False


@contextmanager
def _copying(path: Path) -> Iterator[None]:
    """Make the folder of a file of the copy. Raises `UserError` where it cannot be written."""
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        yield
    except OSError as error:
        raise UserError(
            f"the copy of the store cannot be written ({reason(error)}): {path.parent}; name "
            "another folder in MAECT_CACHE"
        ) from None
