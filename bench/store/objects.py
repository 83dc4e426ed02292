"""A store on object storage: the bucket is the authority, a folder of this machine a copy of it.

The copy has the layout of a local store, whose code reads and writes it. What is read is first made
equal to what the bucket has; what is written is put there too. `docs/cluster.md` tells in which
order, and what a kill leaves.
"""

from __future__ import annotations

import hashlib
import os
import platform
import re
import secrets
import threading
import time
from collections.abc import Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager, suppress
from itertools import chain
from pathlib import Path
from typing import Any

import psutil
from obstore.exceptions import AlreadyExistsError, PreconditionError
from pydantic import BaseModel, ValidationError

from bench import environment
from bench.errors import MachineError, UserError, reason
from bench.store.client import Mark, Objects, Seen, StoreGone
from bench.store.files import json_text, regular, store_error, write_atomic
from bench.store.record import File, Record, Run, Status
from bench.store.store import StageState, Store
from maect.files import sha256

#: seconds between two signs of life of a driver, and after which its lease may be taken
BEAT_S, LAPSES_S = 10.0, 60.0
#: requests at a time
AT_ONCE = 16
#: what a copy has of everything, as far as it was looked at; all else is fetched when it is read
_SMALL = re.compile(
    r"(store|calibration)\.json|runs/(?!\.)[^/\0]+\.json"
    r"|stages/(?!\.)[^/\0]+/attempts/[1-9][0-9]{0,5}/(started|record)\.json"
)


class _Lease(BaseModel):
    """Who drives a store; the content of `lock`."""

    #: drawn for this lease; None: nobody
    holder: str | None = None
    pid: int = 0
    host: str = ""
    #: of the process: the machine's boot and its space of process numbers, and when it began
    space: str = ""
    process_s: float | None = None
    beats: int = 0


class ObjectStore(Store):
    """The store below a bucket's prefix, given by its URL.

    Raises `StoreGone` (a `UserError`) where it cannot be reached or used, `UserError` where it is
    of another version or the copy cannot be written; both at any later time as well.
    """

    def __init__(self, url: str) -> None:
        self._connect(url)
        try:
            self._write_copy(self.root / "store.json", self.objects.get("store.json"))
        except FileNotFoundError:
            for name in ("store.json", "stages"):  # of a store that is no more
                super().discard(self.root / name)
            if self.objects.listing("stages"):  # it was written before there was a `store.json`
                (self.root / "stages").mkdir()
        super().__init__(self.root)

    def __reduce__(self) -> Any:
        """A worker opens it by its URL, with the credentials and the copy of its own machine."""
        return _reached, (self.objects.url,)

    def _connect(self, url: str) -> None:
        self.objects = Objects(url.rstrip("/"))
        where = url + os.environ.get("AWS_ENDPOINT_URL", "")
        told = re.sub(r"[^\w.-]+", "-", url.partition("://")[2])[-60:].strip("-.")
        told += f"-{hashlib.sha256(where.encode()).hexdigest()[:8]}"
        top = Path(os.environ.get("MAECT_CACHE") or "~/.cache/maect-bench").expanduser()
        self.root = (top / "stores" / told).absolute()
        try:
            self.root.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise UserError(
                f"the copy of the store cannot be written ({reason(error)}): {self.root}; name "
                "another folder in MAECT_CACHE"
            ) from None
        #: object -> what the newest listing of its folder told
        self._seen: dict[str, Seen] = {}
        #: keys read since the last listing of all; None: each is listed when it is read
        self._read: set[str] | None = None
        self._lost: str | None = None

    # ------------------------------------------------------------------------------ opening

    @property
    def name(self) -> str:
        return self.objects.url

    def exists(self) -> bool:
        return (self.root / "store.json").exists()

    def create(self) -> None:
        super().create()  # of the copy
        with suppress(AlreadyExistsError):
            self.objects.put("store.json", self.root / "store.json", new=True)
        self._now()  # proves that it can be written

    def _now(self) -> float:
        """Return the server's time, in seconds since the epoch: that of a new object."""
        probe = f".probe-{secrets.token_hex(8)}"
        self.objects.put(probe, b"x")
        now = self.objects.head(probe).modified.timestamp()
        self.objects.delete([probe])
        return now

    @contextmanager
    def lock(self) -> Iterator[None]:
        """Hold the store for one driver, by a lease that lapses when its signs of life end."""
        lease = _Lease(
            holder=secrets.token_hex(8),
            pid=os.getpid(),
            host=platform.node(),
            space=_space(),
            process_s=environment.begun_s(os.getpid()),
        )
        mark, ended = self._take(lease), threading.Event()
        beats = threading.Thread(target=self._beat, args=(lease, mark, ended), daemon=True)
        beats.start()
        try:
            self.refresh()
            yield
        finally:
            ended.set()
            beats.join()

    def _take(self, lease: _Lease) -> Mark:
        """Make the lease ours. Return its mark. Raises `UserError` where another driver has it."""
        old, seen = self._lease(self.objects)
        if old.holder is not None and seen is not None and not _gone(old):
            age_s = max(0.0, self._now() - seen.modified.timestamp())
            if age_s < LAPSES_S:
                raise UserError(
                    f"another run (process {old.pid} on {old.host or 'an unknown machine'}) is "
                    f"using the store {self.name}; its last sign of life is {age_s:.0f} s old. "
                    f"Wait for it (a run that was killed holds a store for {LAPSES_S:.0f} s), or "
                    "choose another --store"
                )
        try:
            return self._put_lease(self.objects, lease, seen and seen.mark)
        except (AlreadyExistsError, PreconditionError):
            raise UserError(
                f"another run has begun to use the store {self.name} just now; wait for it, or "
                "choose another --store"
            ) from None

    def _lease(self, objects: Objects) -> tuple[_Lease, Seen | None]:
        """Return who drives the store, and what is known of the object that says so."""
        try:
            seen = objects.head("lock")
            return _Lease.model_validate_json(objects.get("lock")), seen
        except FileNotFoundError:
            return _Lease(), None
        except ValidationError:
            return _Lease(holder="unknown"), seen

    def _put_lease(self, objects: Objects, lease: _Lease, mark: Mark | None) -> Mark:
        """Write the lease over the one with this mark. Return its own.

        A put may be told to have failed that was done: it was tried again, as its answer was lost.
        """
        try:
            return objects.put("lock", json_text(lease.model_dump()), over=mark, new=not mark)
        except (AlreadyExistsError, PreconditionError):
            known, seen = self._lease(objects)
            if seen is None or known != lease:
                raise
            return seen.mark

    def _beat(self, lease: _Lease, mark: Mark, ended: threading.Event) -> None:
        """Give signs of life until the end, and then the lease away."""
        objects, last = Objects(self.name, patient=False), False
        while self._lost is None and not last:
            last = ended.wait(BEAT_S)
            beat = _Lease() if last else lease.model_copy(update={"beats": lease.beats + 1})
            try:
                mark, lease = self._put_lease(objects, beat, mark), beat
            except (AlreadyExistsError, PreconditionError):
                self._lost = f"another run took the store {self.name} over: this one gave no sign "
                self._lost += f"of life for {LAPSES_S:.0f} s"
            except StoreGone:  # for a while, maybe
                continue

    def check_held(self) -> None:
        if self._lost is not None:
            raise MachineError(self._lost)

    def in_use(self) -> bool:
        lease, seen = self._lease(self.objects)
        age_s = time.time() - seen.modified.timestamp() if seen is not None else 0.0
        return lease.holder is not None and age_s < LAPSES_S and not _gone(lease)

    # ------------------------------------------------------------------------------ reading

    def place(self, key: str) -> str:
        return f"{self.name}/stages/{key}"

    def refresh(self) -> None:
        self._compare("")
        self._read = set()

    def stage_keys(self) -> list[str]:
        self.refresh()
        parts = (name.split("/") for name in self._seen if name.startswith("stages/"))
        return sorted({part[1] for part in parts if len(part) > 2 and not part[1].startswith(".")})

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
        everything = ("*.json", "runs/*.json", "stages/*/attempts/*/*.json")
        below = {"": everything, "runs/": everything[:1]}.get(prefix, ("attempts/*/*.json",))
        for path in chain.from_iterable(map((self.root / prefix).glob, below)):
            if _SMALL.fullmatch(name := self._name(path)) and name not in found:
                path.unlink(missing_ok=True)
        self._bring(name for name in found if _SMALL.fullmatch(name))

    def _bring(self, names: Iterable[str]) -> None:
        """Make files of the copy equal to objects that were listed. Raises `UserError`."""
        todo = [name for name in names if not _same(self.root / name, self._seen[name])]
        with ThreadPoolExecutor(AT_ONCE) as pool:
            list(pool.map(self._download, todo))

    def _download(self, name: str) -> None:
        path, seen = self.root / name, self._seen[name]
        whole = path.with_name(f".{path.name}.{os.getpid()}.{threading.get_ident()}.part")
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            whole.unlink(missing_ok=True)
            self.objects.download(name, whole)
            os.utime(whole, times=(seen.modified.timestamp(),) * 2)
            whole.replace(path)
        except FileNotFoundError:  # removed since it was listed
            pass
        except OSError as error:
            raise store_error(path, error) from None
        finally:
            whole.unlink(missing_ok=True)

    def _name(self, path: Path) -> str:
        """Return what the object is called whose copy lies at a path."""
        return path.relative_to(self.root).as_posix()

    def plain_damages(self, key: str, record: Record) -> Iterator[str]:
        """Yield which files are missing or of another size, by the newest listing.

        What they hold is compared when they are fetched.
        """
        for name, told in record.files.items():
            if fault := self._unlike(key, name, told):
                yield f"{name} {fault}"

    def _unlike(self, key: str, name: str, told: File) -> str | None:
        seen = self._seen.get(f"stages/{key}/{name}")
        if seen is None:
            return "is missing"
        return None if seen.bytes == told.bytes else "does not fit its checksum"

    def _fault(self, key: str, record: Record, name: str) -> str | None:
        if fault := self._unlike(key, name, record.files[name]):
            return fault
        self._bring([f"stages/{key}/{name}"])
        return super()._fault(key, record, name)

    def fetch(self, key: str) -> Path:
        state = self.state(key)
        if state.record is None:
            raise ValueError(f"its input {key} is not in the store")
        for name in state.record.files:
            if super()._fault(key, state.record, name) is None:
                continue
            if fault := self._fault(key, state.record, name):
                told = f"{name} {fault}"
                self.set_aside(state, told)
                raise ValueError(
                    f"{told}: it is of {state.record.name}, which is set aside. The same command "
                    "makes it again"
                )
        return self.folder(key)

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
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise store_error(path, error) from None
        write_atomic(path, data)

    def _write(self, path: Path, value: Any) -> None:
        self.objects.put(self._name(path), json_text(value))
        self._write_copy(path, json_text(value))

    def _write_first(self, path: Path, value: Any) -> bool:
        data = json_text(value)
        try:
            self.objects.put(self._name(path), data, new=True)
        except AlreadyExistsError:
            if self.objects.get(self._name(path)) != data:  # else the answer to ours was lost
                return False
        self._write_copy(path, data)
        return True

    def publish(self, *paths: Path) -> None:
        for path in paths:
            known = path.iterdir() if path.is_dir() else (path,)
            for file in known:
                if not file.name.startswith((".", "started.", "record.")):
                    self.objects.put(self._name(file), file)

    def discard(self, *paths: Path) -> None:
        super().discard(*paths)
        for path in paths:
            name = self._name(path)
            if names := [name] if path.suffix else list(self.objects.listing(name)):
                self.objects.delete(names)

    def put_file(self, key: str, name: str, data: bytes) -> File:
        told = super().put_file(key, name, data)
        self.objects.put(f"stages/{key}/{name}", data)
        return told

    def begin(self, start: Record) -> Record:
        self._compare(f"stages/{start.key}/")
        return super().begin(start)

    def _claim(self, folder: Path, record: Record) -> None:
        if not self._write_first(folder / "started.json", record.plain()):
            raise FileExistsError

    def close_attempt(self, record: Record, ended_s: float) -> bool:
        folder = self.attempt_folder(record.key, record.attempt)
        if folder.is_dir():
            self.publish(folder)
        return super().close_attempt(record, ended_s)

    def close_abandoned(
        self, attempt: Record, status: Status, why: str, ended_s: float | None = None
    ) -> None:
        prefix = self._name(self.attempt_folder(attempt.key, attempt.attempt))
        here = (self.root / prefix / "log.txt").exists()  # it ran on this machine
        self._bring(name for name in self._seen if name.startswith(f"{prefix}/") and not here)
        super().close_abandoned(attempt, status, why, ended_s)

    def set_aside(self, state: StageState, why: str) -> None:
        assert state.record is not None
        for name in state.record.files:
            aside = f"damaged/{state.key}-{time.time_ns()}/{name}"
            self.objects.move(f"stages/{state.key}/{name}", aside)
        super().set_aside(state, why)


def _reached(url: str) -> ObjectStore:
    """Return the store at a URL, in a worker: its driver has looked at it."""
    store = ObjectStore.__new__(ObjectStore)
    store._connect(url)
    store.objects.answers = True
    return store


def _same(path: Path, seen: Seen) -> bool:
    """Return whether a file is surely equal to an object, by the MD5 that an ETag may be."""
    with suppress(OSError):
        if regular(path).stat().st_size == seen.bytes:
            with path.open("rb") as file:
                return hashlib.file_digest(file, "md5").hexdigest() == seen.tag
    return False


def _space() -> str:
    """Return what processes share that know each other by their numbers; empty: unknown."""
    with suppress(OSError):
        boot = Path("/proc/sys/kernel/random/boot_id").read_text(encoding="ascii").strip()
        return f"{boot} {os.readlink('/proc/self/ns/pid')}"
    return ""


def _gone(lease: _Lease) -> bool:
    """Return whether the holder ran here and surely is no more."""
    if not lease.space or lease.space != _space():
        return False
    with suppress(psutil.NoSuchProcess):
        ended = psutil.Process(lease.pid).status() == psutil.STATUS_ZOMBIE
        return ended or environment.begun_s(lease.pid) != lease.process_s
    return True
