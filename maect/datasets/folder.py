"""Sets in the layout of ImageNet: train/<class>/<file> and val/<class>/<file>."""

from __future__ import annotations

import os
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from maect.datasets.base import DataError, decode_threads
from maect.datasets.image_index import Index
from maect.datasets.images import Inspection, inspect

TEST_FOLDERS = ("val", "validation", "test")
_REPORT_EVERY = 2000


@dataclass(frozen=True)
class Listing:
    """The files of a set, training files first, each pool by name."""

    names: list[str]
    test: list[bool]
    labels: list[int]
    stamps: list[tuple[int, int]]
    classes: list[str]


def _entries(folder: Path) -> list[os.DirEntry[str]]:
    with os.scandir(folder) as found:
        return sorted((e for e in found if not e.name.startswith(".")), key=lambda e: e.name)


def listing(path: Path) -> Listing:
    """Return every file of a set with its size and time. Raises DataError where the layout differs.

    Whatever lies in a class's folder counts as an image of it: a file that is none is then
    found and named.
    """
    test_folder = next((name for name in TEST_FOLDERS if (path / name).is_dir()), None)
    if not (path / "train").is_dir() or test_folder is None:
        raise DataError(
            f"{path} is not laid out as ImageNet is: expected train/<class>/<file> and "
            f"val/<class>/<file>"
        )
    classes = [entry.name for entry in _entries(path / "train") if entry.is_dir()]
    number = {name: label for label, name in enumerate(classes)}
    result = Listing([], [], [], [], classes)
    for pool in ("train", test_folder):
        for folder in _entries(path / pool):
            if not folder.is_dir():
                continue
            if folder.name not in number:
                raise DataError(f"{pool}/{folder.name} is a class that train does not have")
            for entry in _entries(Path(folder.path)):
                if entry.is_dir():
                    raise DataError(
                        f"{pool}/{folder.name}/{entry.name} is a folder; images lie in the folder "
                        f"of their class itself"
                    )
                # a link to nothing stands for an image that cannot be read
                if entry.is_file() or entry.is_symlink():
                    status = entry.stat(follow_symlinks=entry.is_file())
                    result.names.append(f"{pool}/{folder.name}/{entry.name}")
                    result.test.append(pool != "train")
                    result.labels.append(number[folder.name])
                    result.stamps.append((status.st_size, status.st_mtime_ns))
    for test, pool in ((False, "train"), (True, test_folder)):
        if test not in result.test:
            raise DataError(f"{path / pool} holds no files")
    return result


def is_current(index: Index | None, files: Listing) -> bool:
    """Return whether an index was made from these very files."""
    return (
        index is not None
        and len(index) == len(files.names)
        and index.names.tolist() == [os.fsencode(name) for name in files.names]
        and index.labels.tolist() == files.labels
        and index.classes.tolist() == files.classes
        and np.array_equal(index.stamps, np.array(files.stamps))
    )


def _known(index: Index | None) -> dict[tuple[str, int, int], Inspection]:
    """Return what was found in each file, by name, size and modification time."""
    if index is None:
        return {}
    known = {}
    for row in range(len(index)):
        size, time = index.stamps[row].tolist()
        height, width = index.sizes[row].tolist()
        kind = str(index.kind_names[index.kinds[row]])
        found = Inspection(index.digests[row].tobytes(), height, width, kind, index.reason(row))
        known[index.name(row), size, time] = found
    return known


def update(path: Path, index: Index | None, progress: Callable[[str], None]) -> Index:
    """Return the index of the files as they are now; only those that changed are read."""
    files, known = listing(path), _known(index)

    def look(at: int) -> Inspection:
        name = files.names[at]
        return known.get((name, *files.stamps[at])) or _inspect(path / name)

    total = len(files.names)
    found: list[Inspection] = []
    with ThreadPoolExecutor(decode_threads()) as threads:
        for start in range(0, total, _REPORT_EVERY):
            found.extend(threads.map(look, range(start, min(start + _REPORT_EVERY, total))))
            progress(f"checked {len(found):,} of {total:,} images")
    return Index.build(files.names, files.test, files.labels, found, files.stamps, files.classes)


def _inspect(path: Path) -> Inspection:
    try:
        data = path.read_bytes()
    except OSError as error:
        return Inspection(bytes(32), reason=f"cannot be opened: {error.strerror}")
    return inspect(data)


def reader(path: Path, index: Index) -> Callable[[int], bytes]:
    """Reads the encoded bytes of a row of the index."""
    return lambda row: (path / index.name(row)).read_bytes()
