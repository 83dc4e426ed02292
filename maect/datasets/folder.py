"""Sets in the layout of ImageNet: train/<class>/<file> and val/<class>/<file>."""

from __future__ import annotations

import os
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from maect.datasets.base import DataError, decode_threads, listed, readable
from maect.datasets.image_index import Files, Index
from maect.datasets.images import Inspection, Place, inspect, read_file

TEST_FOLDERS = ("val", "validation", "test")
_REPORT_EVERY = 2000
#: ends of the names of images, torchvision's, in lower case
_IMAGES = (".jpg", ".jpeg", ".png", ".ppm", ".bmp", ".pgm", ".tif", ".tiff", ".webp")
#: folders that systems and shares leave behind; so are those that begin with a dot
_LEFTOVERS = ("@eaDir", "__MACOSX", "$RECYCLE.BIN", "System Volume Information", "lost+found")


def _entries(folder: Path, pool: str, left_out: list[str]) -> list[os.DirEntry[str]]:
    """Return what lies in a folder, by name, without what is no image by its name."""

    def usable(entry: os.DirEntry[str]) -> bool:
        image = entry.name.lower().endswith(_IMAGES)
        known = entry.name not in _LEFTOVERS if _is_dir(entry) else image
        return known and not entry.name.startswith(".")

    with os.scandir(folder) as entries:
        found = sorted(entries, key=lambda entry: entry.name)
    left_out += [f"{pool}/{entry.name}" for entry in found if not usable(entry)]
    return [entry for entry in found if usable(entry)]


def _is_dir(entry: os.DirEntry[str]) -> bool:
    try:
        return entry.is_dir()
    except OSError:  # a link that loops
        return False


@readable()
def listing(path: Path) -> Files:
    """Return every image of a set with its size and time.

    A file with an image's extension in a class's folder counts as an image of this class: a file
    that is none is then found and named. Raises DataError where the layout differs or a folder
    cannot be read.
    """
    test_folders = [name for name in TEST_FOLDERS if (path / name).is_dir()]
    if not (path / "train").is_dir() or not test_folders:
        raise DataError(
            f"{path} is not laid out as ImageNet is: expected train/<class>/<file> and "
            f"val/<class>/<file>"
        )
    left_out = list(test_folders[1:])
    pools = {pool: _entries(path / pool, pool, left_out) for pool in ("train", test_folders[0])}
    for pool, entries in pools.items():
        loose = [f"{pool}/{entry.name}" for entry in entries if not _is_dir(entry)]
        if loose:
            raise DataError(
                f"{listed(loose)} in {path}: each image belongs into the folder of its "
                f"class, {pool}/<class>/<file>"
            )
    classes = sorted({entry.name for found in pools.values() for entry in found})
    number = {name: label for label, name in enumerate(classes)}
    rows: list[tuple[str, bool, int, tuple[int, int]]] = []
    for pool, folders in pools.items():
        before = len(rows)
        for folder in folders:
            inside = f"{pool}/{folder.name}"
            for entry in _entries(Path(folder.path), inside, left_out):
                name = f"{inside}/{entry.name}"
                if _is_dir(entry):
                    raise DataError(
                        f"{name} is a folder; images lie in the folder of their class itself"
                    )
                try:
                    status = entry.stat()
                except OSError:  # a link to nothing, or that loops: an image that cannot be read
                    status = entry.stat(follow_symlinks=False)
                stamp = (status.st_size, status.st_mtime_ns)
                rows.append((name, pool != "train", number[folder.name], stamp))
        if len(rows) == before:
            raise DataError(f"{path / pool} holds no images: no file ends in {', '.join(_IMAGES)}")
    return Files.of(rows, classes, left_out)


def is_current(path: Path, known: Path) -> bool:
    """Return whether every image has been looked at as it is now."""
    index = Index.load(known.with_suffix(".npz"))
    return index is not None and index.is_of(listing(path))


def update(path: Path, known: Path, progress: Callable[[str], None]) -> None:
    """Read the images that are new or have changed."""
    files, index = listing(path), Index.load(known.with_suffix(".npz"))
    if index is not None and index.is_of(files):
        return
    seen: dict[tuple[bytes, bytes], Inspection] = {}
    if index is not None:
        keys = zip(index.names.tolist(), map(bytes, index.stamps), strict=True)
        seen = {key: index.inspection(row) for row, key in enumerate(keys)}

    def look(row: int) -> Inspection:
        if found := seen.get((files.names[row], bytes(files.stamps[row]))):
            return found
        try:
            return inspect(read_file(path / files.name(row)))
        except OSError as error:
            return Inspection(bytes(32), reason=f"cannot be opened: {error.strerror}")

    found: list[Inspection] = []
    with ThreadPoolExecutor(decode_threads()) as threads:
        for start in range(0, len(files), _REPORT_EVERY):
            found.extend(threads.map(look, range(len(files))[start : start + _REPORT_EVERY]))
            progress(f"checked {len(found):,} of {len(files):,} images")
    Index.build(files, found).save(known.with_suffix(".npz"))


def load(path: Path, known: Path) -> tuple[Index, Callable[[int], Place]]:
    """Return the index as it was made, and where the encoded bytes of a row of it are."""
    index = Index.load(known.with_suffix(".npz"))
    if index is None:
        raise DataError(f"the images in {path} have not been checked yet")
    return index, lambda row: (path / index.name(row), 0, None)
