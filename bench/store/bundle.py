"""A store in one file, as `export --bundle` writes it for a reviewer: it is only read.

    SHA256SUMS          of all that follows, as `sha256sum -c` reads it
    bundle.json         what the suite was planned with (`Told`)
    environment.json    versions, processor, commit, data
    store.json, runs/, stages/     as in a store, without weights and features
    suite/              the suite's file, and those that it takes profiles from

It is an uncompressed tar file of plain files, the same bytes for the same content. It comes from a
stranger: what export does not write (links, other names, sizes beyond the file) is refused.
"""

from __future__ import annotations

import re
import shutil
import tarfile
from collections.abc import Iterable, Iterator
from pathlib import Path
from tempfile import mkdtemp
from typing import Any, BinaryIO, NoReturn
from weakref import finalize

from pydantic import BaseModel

from bench.errors import UserError, reason, short
from bench.store.files import read_json
from bench.store.record import Count, Name, Record, Run
from bench.store.store import Store
from maect.datasets import DataInfo
from maect.files import sha256
from maect.settings import DataSettings

#: of the files that stages left, those that a bundle has: the table and the page need them
HELD = ("predictions.safetensors", "curves.json", "gallery.safetensors")
_NAME = r"\w[\w .+-]{0,99}"
_KNOWN = re.compile(
    rf"SHA256SUMS|(bundle|environment|store)\.json|suite/{_NAME}|runs/{_NAME}\.json"
    rf"|stages/{_NAME}/attempts/[1-9][0-9]{{0,5}}/(started|record)\.json"
    rf"|stages/{_NAME}/(attempts/[1-9][0-9]{{0,5}}/artifact/)?({'|'.join(map(re.escape, HELD))})"
)
_BLOCK = tarfile.BLOCKSIZE


class Told(BaseModel):
    """What the plan of a bundle's suite depends on, apart from the suite's file."""

    #: name of that file
    suite: Name
    profile: str
    seeds: Count
    sets: list[str]
    only: str
    keep_stale: bool
    #: where the data are not at hand, they are taken to be these
    data: list[tuple[DataSettings, DataInfo]]
    #: instructions -> the class of processors that computed with them
    processors: dict[str, str | None]
    #: stage and number of attempts that were killed before they wrote a word
    empty: list[tuple[Name, Count]] = []


def tar(files: Iterable[tuple[str, bytes]]) -> Iterator[bytes]:
    """Yield the bytes of a tar file, which depend on names and contents only."""
    for name, data in files:
        info = tarfile.TarInfo(name)  # of nobody, at time 0
        info.size = len(data)
        yield info.tobuf(tarfile.USTAR_FORMAT, "utf-8")
        yield data
        yield bytes(-len(data) % _BLOCK)
    yield bytes(2 * _BLOCK)


class Bundle(Store):
    """The store in a bundle, unpacked into a folder that goes with this process.

    Raises `UserError` where the file is no bundle or cannot be unpacked.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        folder = Path(mkdtemp(prefix="bench-bundle-"))
        finalize(self, shutil.rmtree, folder, ignore_errors=True)
        root = folder / path.name
        try:
            with path.open("rb") as file:
                self._unpack(file, root)
            self.faults = list(_faults(root))
            self.told = Told.model_validate(read_json(root / "bundle.json"))
            for key, attempt in self.told.empty:
                (root / f"stages/{key}/attempts/{attempt}").mkdir(parents=True, exist_ok=True)
        except (OSError, ValueError, tarfile.TarError) as error:
            raise UserError(
                f"the store {path} is a file, and no bundle that can be read ({reason(error)}); "
                "choose another --store, or write it anew with `export --bundle`"
            ) from None
        super().__init__(root)
        self.processors = self.told.processors

    def _unpack(self, file: BinaryIO, root: Path) -> None:
        """Write what a bundle holds below `root`. Raises `UserError` for anything else in it."""
        size = self.path.stat().st_size
        while (block := file.read(_BLOCK)) != bytes(_BLOCK):
            info = tarfile.TarInfo.frombuf(block, "utf-8", "strict")
            if info.type != tarfile.REGTYPE or not _KNOWN.fullmatch(info.name):
                what = f"holds '{short(info.name)}', as no bundle does; ask for another"
                raise UserError(what, file=self.path)
            if not 0 <= info.size <= size - file.tell():
                raise tarfile.ReadError(f"{info.name} has not the size that it says")
            target = root / info.name
            target.parent.mkdir(parents=True, exist_ok=True)
            with target.open("xb") as copy:
                for start in range(0, info.size, 2**20):
                    copy.write(file.read(min(2**20, info.size - start)))
            file.seek(-info.size % _BLOCK, 1)

    @property
    def name(self) -> str:
        return str(self.path)

    @property
    def pages(self) -> Path:
        return self.path.parent / "reports"

    def left_out(self, record: Record) -> set[str]:
        folder = self.artifact(record)
        return {name for name in record.files if name not in HELD and not (folder / name).exists()}

    def runs(self, problems: list[str] | None = None) -> list[Run]:
        if problems is not None:
            problems += self.faults
        return super().runs(problems)

    def create(self) -> NoReturn:
        raise UserError(
            "it is a bundle, which is only read; name a folder: --store", file=self.path
        )

    def _write(self, path: Path, value: Any) -> NoReturn:
        self.create()

    def remove(self, path: Path) -> NoReturn:
        self.create()


def _faults(root: Path) -> Iterator[str]:
    """Yield which files below a folder do not fit its checksums, or have none."""
    lines = (root / "SHA256SUMS").read_text(encoding="utf-8").splitlines()
    sums = dict(line.split("  ", 1)[::-1] for line in lines)
    there = {path.relative_to(root).as_posix(): path for path in root.rglob("*") if path.is_file()}
    for name in sorted({*sums, *there} - {"SHA256SUMS"}):
        if name not in there:
            yield f"{name} is missing in the bundle"
        elif sums.get(name) != sha256(there[name]):
            yield f"{name} does not fit the bundle's checksum"
