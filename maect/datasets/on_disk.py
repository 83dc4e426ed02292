"""Sets too large to be held decoded: `image_folder` and `parquet`."""

from __future__ import annotations

import hashlib
from collections.abc import Callable
from pathlib import Path

import numpy as np

from maect.datasets import folder, shards, splits
from maect.datasets.base import DataError, DataInfo
from maect.datasets.encoded import EncodedSplit
from maect.datasets.image_index import Index
from maect.datasets.named import IMAGENET_MEAN, IMAGENET_STD
from maect.settings import DataSettings

Reader = Callable[[int], bytes]


def _places(settings: DataSettings, root: Path) -> tuple[Path, Path]:
    """Return the set's folder, and where what is known of it is kept: "<...>.npz" or a folder."""
    if settings.path is None:
        raise DataError(f"data '{settings.name}' needs a path")
    path = Path(settings.path).expanduser().resolve()
    known = hashlib.sha256(f"{settings.name}:{path}".encode()).hexdigest()[:16]
    return path, root / "index" / known


def _current(settings: DataSettings, root: Path) -> tuple[Index, Reader] | None:
    """The index of a set where it is up to date. Raises DataError where the layout is wrong."""
    path, known = _places(settings, root)
    if settings.name == "parquet":
        return shards.load(path, known) if shards.is_current(path, known) else None
    index = Index.load(known.with_suffix(".npz"))
    if index is None or not folder.is_current(index, folder.listing(path)):
        return None
    return index, folder.reader(path, index)


def _planned(settings: DataSettings, hint: str) -> DataInfo:
    """Return a set as far as its settings tell: enough to plan with, not to run."""
    if settings.train_images is None:
        raise DataError(f"{hint}. To plan without the data, write train_images: N")
    return DataInfo(
        settings.name,
        (3, settings.image_size, settings.image_size),
        settings.classes or 0,
        {"train": settings.train_images},
        None,
        str(settings.path),
        IMAGENET_MEAN,
        IMAGENET_STD,
        hint,
    )


def _info(settings: DataSettings, index: Index) -> DataInfo:
    index.require_usable(settings.max_broken)
    if settings.classes is not None and settings.classes != len(index.classes):
        raise DataError(
            f"{settings.path} has {len(index.classes)} classes, the suite says {settings.classes}"
        )
    return DataInfo(
        settings.name,
        (3, settings.image_size, settings.image_size),
        len(index.classes),
        {name: len(rows) for name, rows in index.splits().items()},
        index.fingerprint(),
        str(settings.path),
        IMAGENET_MEAN,
        IMAGENET_STD,
        broken=tuple(index.broken()),
        converted=index.converted(),
    )


def describe(settings: DataSettings, root: Path) -> DataInfo:
    """From the index where it is up to date, else from the settings; reads no image."""
    path, _ = _places(settings, root)
    if not path.is_dir():
        return _planned(settings, f"there is no folder {path}")
    try:
        found = _current(settings, root)
        if found is None:
            return _planned(settings, f"the images in {path} have not been checked yet")
        return _info(settings, found[0])
    except DataError as error:
        if settings.train_images is None:
            raise
        return _planned(settings, str(error))


def prepare(settings: DataSettings, root: Path, progress: Callable[[str], None]) -> DataInfo:
    """Read and decode every image that is new or changed, once, and say what was found.

    Raises DataError where the layout is wrong, a test image cannot be read, or more training
    images than `max_broken` allows.
    """
    path, _ = _places(settings, root)
    if not path.is_dir():
        raise DataError(f"there is no folder {path}")
    try:
        return _info(settings, _updated(settings, root, progress))
    except OSError as error:
        raise DataError(
            f"what is found in {path} could not be kept in {root}: {error}. MAECT_DATA names "
            f"another data directory"
        ) from None


def _updated(settings: DataSettings, root: Path, progress: Callable[[str], None]) -> Index:
    """Return the index of the set as it is now, kept for the next time."""
    path, known = _places(settings, root)
    if settings.name == "parquet":
        shards.update(path, known, progress)
        return shards.load(path, known)[0]
    file = known.with_suffix(".npz")
    index = Index.load(file)
    if index is None or not folder.is_current(index, folder.listing(path)):
        index = folder.update(path, index, progress)
        index.save(file)
    return index


def _opened(settings: DataSettings, root: Path) -> tuple[Index, Reader]:
    """Return the index as it was made, without looking at the files again."""
    path, known = _places(settings, root)
    if settings.name == "parquet":
        return shards.load(path, known)
    index = Index.load(known.with_suffix(".npz"))
    if index is None:
        raise DataError(f"the images in {path} have not been checked yet")
    return index, folder.reader(path, index)


def load(settings: DataSettings, root: Path, split: str) -> EncodedSplit:
    """Return one split, decoded when asked for. Raises DataError where the set was not prepared."""
    index, read = _opened(settings, root)
    index.require_usable(settings.max_broken)
    part = index.splits()[split]
    return EncodedSplit(
        split,
        index.take(part),
        lambda row: read(int(part[row])),
        len(index.classes),
        IMAGENET_MEAN,
        IMAGENET_STD,
    )


def low_shot(settings: DataSettings, root: Path) -> dict[str, list[np.ndarray]]:
    """Made by the rule that the committed lists were made by, from this set's labels."""
    index, _ = _opened(settings, root)
    return splits.make_low_shot(settings.name, index.labels[index.splits()["train"]])
