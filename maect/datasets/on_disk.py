"""Sets too large to be held decoded, `image_folder` and `parquet`: what they are, and their
splits."""

from __future__ import annotations

import hashlib
import os
import shlex
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np

from maect.datasets import folder, lists, local, shards
from maect.datasets.base import DataError, DataInfo, listed, require_planned
from maect.datasets.decoders import EncodedSplit
from maect.datasets.image_index import Index
from maect.datasets.images import Place
from maect.datasets.named import IMAGENET_MEAN, IMAGENET_STD
from maect.datasets.splits import make_low_shot
from maect.settings import DataSettings

_ASSUMED = (
    "assumed: classes in the order of their names or numbers, pixels normalised by ImageNet's mean "
    "and deviation"
)


def kind_of(path: Path) -> str:
    """Return how a folder is read: `parquet` where it has training shards, else `image_folder`.

    A table that lies beside folders of classes does not make them shards.
    """
    classes = any(entry.is_dir() for entry in path.glob("train/*"))
    return "parquet" if shards.by_pool(path)[0] and not classes else "image_folder"


def _is_folder(settings: DataSettings) -> bool:
    """Return False also for a link that loops, a name no file can have, or a lack of rights."""
    return os.path.isdir(os.path.expanduser(settings.path or ""))


def _places(settings: DataSettings, root: Path) -> tuple[Path, Path]:
    """Return the set's folder, and where what is known of it is kept.

    Raises DataError where there is no such folder.
    """
    if not _is_folder(settings):
        raise DataError(
            f"there is no folder {settings.path}; name another with --set data.path=DIR"
        )
    path = Path(os.path.realpath(os.path.expanduser(str(settings.path))))
    known = hashlib.sha256(os.fsencode(f"{settings.name}:{path}")).hexdigest()[:16]
    return path, root / "index" / known


def _reader(settings: DataSettings) -> Any:
    """Return the module that has `is_current`, `update` and `load` for such a set."""
    return shards if settings.name == "parquet" else folder


def _planned(settings: DataSettings, hint: str) -> DataInfo:
    """Return a set as far as its settings tell: enough to plan with where they say how many
    training images there are, else enough to look at it; never enough to run.
    """
    counts = {} if settings.train_images is None else {"train": settings.train_images}
    if not counts and not _is_folder(settings):
        raise DataError(f"{hint}. To plan without the data, write train_images: N")
    return DataInfo(
        settings.name,
        (3, settings.image_size, settings.image_size),
        settings.classes or 0,
        counts,
        None,
        str(settings.path),
        IMAGENET_MEAN,
        IMAGENET_STD,
        hint,
    )


def _usable(
    settings: DataSettings, root: Path
) -> tuple[Index, dict[str, np.ndarray], list[str], Callable[[int], Place]]:
    """Return the index of a set, the rows of its splits, the classes without a training image, and
    where a row's encoded bytes are. Raises DataError where the set cannot be used."""
    raw, place = _reader(settings).load(*_places(settings, root))
    raw.require_usable(settings.max_broken, settings.selection)
    index, empty = raw.counted()
    return index, index.splits(settings.selection), empty, place


def _info(settings: DataSettings, root: Path) -> DataInfo:
    index, splits, empty, _ = _usable(settings, root)
    counts = {name: len(rows) for name, rows in splits.items()}
    if settings.selection == 0:
        del splits["selection"]  # it is to have no images
    notes = [_ASSUMED, *index.notes(splits)]
    if empty:
        notes.append(f"classes without a training image, which count nowhere: {listed(empty)}")
    if settings.classes not in (None, len(index.classes)):
        raise DataError(
            f"{settings.path} has {len(index.classes)} classes, the suite says {settings.classes}"
            + (f"; without a training image are {listed(empty)}" if empty else "")
        )
    total = int(np.count_nonzero(~index.test))
    if settings.train_images not in (None, counts["train"], total):
        notes.append(f"train_images says {settings.train_images}, there are {total}")
    told = settings.model_copy(update={"train_images": total, "classes": len(index.classes)})
    return replace(
        _planned(told, ""),
        counts=counts,
        fingerprint=index.fingerprint(settings.selection),
        hint=None,
        broken=tuple(index.broken()),
        converted=index.converted(),
        notes=tuple(notes),
    )


def describe(settings: DataSettings, root: Path) -> DataInfo:
    """From the index where it is up to date, else from the settings; reads no image."""
    try:
        path, known = _places(settings, root)
        if _reader(settings).is_current(path, known):
            return _info(settings, root)
        hint = f"the images in {settings.path} have not been checked yet; run: python -m bench "
        hint += f"data check {shlex.quote(str(settings.path))} (`bench run` begins with it)"
    except DataError as error:
        hint = str(error)
    return _planned(settings, hint)


def prepare(settings: DataSettings, root: Path, progress: Callable[[str], None]) -> DataInfo:
    """Read and decode every image that is new or changed, once, and say what was found.

    Raises DataError where the layout is wrong, a test image cannot be read, or more training
    images than `max_broken` allows.
    """
    path, known = _places(settings, root)
    try:
        _reader(settings).update(path, known, progress)
    except OSError as error:  # of the data themselves it would be a DataError
        raise DataError(
            f"what is found in {settings.path} could not be kept in {root}: {error}. MAECT_DATA "
            f"names another data directory"
        ) from None
    return _info(settings, root)


def load(
    settings: DataSettings,
    root: Path,
    split: str,
    progress: Callable[[str], None],
    planned: str | None = None,
) -> EncodedSplit:
    """Return one split, decoded when asked for. Raises DataError where the set was not prepared, is
    not the planned one, or cannot be copied as its settings want."""
    index, splits, _, place = _usable(settings, root)
    require_planned(settings.name, index.fingerprint(settings.selection), planned)
    if settings.stage == "local":
        place = local.copied(index, place, progress)
    part, classes = splits[split], len(index.classes)
    rows = index.take(part)
    return EncodedSplit(
        split,
        rows.labels,
        classes,
        IMAGENET_MEAN,
        IMAGENET_STD,
        rows,
        lambda row: place(int(part[row])),
    )


def low_shot(settings: DataSettings, root: Path) -> dict[str, list[np.ndarray]]:
    """Published lists, else made by the rule that the committed lists were made by."""
    index, splits, *_ = _usable(settings, root)
    train = index.take(splits["train"])
    if settings.low_shot is not None:
        return lists.read(settings.low_shot, train)
    return make_low_shot(settings.name, train.labels)
