"""A copy of an image folder on a disk of this machine: the encoded files as they are, one after the
other in few large files, so that a shared file system is asked for each once.

Where an image lies follows from the set's index: its images in turn, by their sizes. So do the
checksums: the index has them of all images. A copy keeps nothing of its own but the size and
modification time of each large file when it was last found right.
"""

from __future__ import annotations

import fcntl
import hashlib
import json
import shutil
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np

from maect.datasets.base import DataError, listed, local_root
from maect.datasets.decoders import readable_before
from maect.datasets.image_index import Index
from maect.datasets.images import Place, read_file
from maect.files import write_atomic

#: a large file ends with the image that reaches so many bytes
_BYTES = 1 << 28
#: originals read at a time: a shared file system answers late, not slowly
_THREADS = 16


def copied(
    index: Index, original: Callable[[int], Place], progress: Callable[[str], None]
) -> Callable[[int], Place]:
    """Return where the encoded bytes of a row are in this machine's copy, made where it is not
    whole; `original` tells where they are otherwise.

    Raises DataError where there is too little space, the copy cannot be written, or an original is
    no longer what the index says.
    """
    # whatever the selection split is, the images are the same
    copy = _Copy(index, original, local_root() / index.fingerprint(None)[:16])
    if copy.wanting():
        try:
            copy.complete(progress)
        except OSError as error:
            raise DataError(
                f"the images could not be copied to {copy.folder}: {error.strerror or error}. "
                f"MAECT_LOCAL names another folder for copies"
            ) from None
    return copy.place


class _Copy:
    """The large files of one set in `folder`."""

    def __init__(self, index: Index, original: Callable[[int], Place], folder: Path) -> None:
        self.index, self.original, self.folder = index, original, folder
        # of a file that could not be opened the index has no checksum: it has no part in the copy
        self._lengths = np.where(index.digests.any(axis=1), index.stamps[:, 0], 0)
        starts = np.cumsum(self._lengths) - self._lengths
        #: each large file's first row, and each row's large file
        _, first, self._number = np.unique(starts // _BYTES, return_index=True, return_inverse=True)
        self._offsets = starts - starts[first[self._number]]
        self._bounds = [*first.tolist(), len(index)]
        self._sizes = np.add.reduceat(self._lengths, first).tolist()
        self._files = [folder / f"{number:05}.bin" for number in range(len(first))]
        #: name of a large file -> its size and modification time when it was last found right
        self._stamps: dict[str, list[int]] = {}

    def place(self, row: int) -> Place:
        """Return where a row's encoded bytes are in the copy."""
        return self._files[self._number[row]], int(self._offsets[row]), int(self._lengths[row])

    def wanting(self) -> list[int]:
        """Return numbers of the large files that are not there as they were found right."""
        try:
            self._stamps = dict(json.loads((self.folder / "stamps.json").read_bytes()))
        except (OSError, ValueError, TypeError):  # there is none, or it is damaged
            self._stamps = {}
        known = [self._stamps.get(file.name) for file in self._files]
        return [n for n, told in enumerate(known) if not told or told != self._stamp(n)]

    def complete(self, progress: Callable[[str], None]) -> None:
        """Write the large files that are missing or damaged, while others of this machine wait.

        Raises OSError; DataError as `copied`.
        """
        self.folder.mkdir(parents=True, exist_ok=True)
        with (self.folder / "lock").open("wb") as lock:
            try:
                fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError:
                progress(f"another process copies the images to {self.folder}: waiting for it")
                fcntl.flock(lock, fcntl.LOCK_EX)
            for left in self.folder.glob(".*.tmp"):  # of processes that died
                left.unlink()
            missing = [number for number in self.wanting() if not self._is_right(number)]
            if damaged := [self._files[n] for n in missing if self._files[n].exists()]:
                names = listed(file.name for file in damaged)
                progress(f"the copy in {self.folder} is damaged and made anew: {names}")
                for file in damaged:
                    file.unlink()
            self._write(missing, progress)

    def _write(self, missing: list[int], progress: Callable[[str], None]) -> None:
        total_mb, done_mb = sum(self._sizes[number] for number in missing) / 1e6, 0.0
        free_mb = shutil.disk_usage(self.folder).free / 1e6
        if total_mb > free_mb:
            raise DataError(
                f"copying the images takes {total_mb:,.1f} MB in {self.folder}, where "
                f"{free_mb:,.1f} MB are free: make room, set MAECT_LOCAL to another folder, or "
                f"leave out data.stage"
            )
        for number in missing:
            write_atomic(self._files[number], self._originals(number))
            if not self._is_right(number):
                raise DataError(f"{self._files[number]} does not hold what was written to it")
            done_mb += self._sizes[number] / 1e6
            progress(f"copied {done_mb:,.1f} of {total_mb:,.1f} MB of images to {self.folder}")

    def _stamp(self, number: int) -> list[int] | None:
        """Return size and time of a large file; None where it is not there in its full size."""
        try:
            status = self._files[number].stat()
        except OSError:
            return None
        full = status.st_size == self._sizes[number]
        return [status.st_size, status.st_mtime_ns] if full else None

    def _is_right(self, number: int) -> bool:
        """Return whether a large file holds images of the right checksums, and if so note it."""
        stamp = self._stamp(number)
        if stamp is None:
            return False
        with self._files[number].open("rb") as file:
            if not all(
                self._fits(row, file.read(self._lengths[row])) for row in self._rows(number)
            ):
                return False
        self._stamps[self._files[number].name] = stamp
        write_atomic(self.folder / "stamps.json", json.dumps(self._stamps).encode())
        return True

    def _fits(self, row: int, data: bytes) -> bool:
        return hashlib.sha256(data).digest() == self.index.digests[row].tobytes()

    def _rows(self, number: int) -> Iterator[int]:
        """Yield the rows of a large file, without those of which it holds nothing."""
        first, end = self._bounds[number : number + 2]
        return (row for row in range(first, end) if self._lengths[row])

    def _originals(self, number: int) -> Iterator[bytes]:
        """Yield the images of a large file, read and compared with their checksums."""
        with ThreadPoolExecutor(_THREADS) as threads:
            yield from threads.map(self._original, self._rows(number))

    def _original(self, row: int) -> bytes:
        with readable_before(self.index.name(row)):
            data = read_file(*self.original(row))
            if not self._fits(row, data):
                raise ValueError("it holds something else")
        return data
