"""Sets too large to be held decoded, `image_folder` and `parquet`: what they are, and their splits,
whose images are decoded by threads ahead of whoever asks for them."""

from __future__ import annotations

import hashlib
import os
import shlex
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from maect.datasets import folder, lists, shards
from maect.datasets.base import DataError, DataInfo, Split, decode_threads, listed
from maect.datasets.image_index import Index
from maect.datasets.images import decode
from maect.datasets.named import IMAGENET_MEAN, IMAGENET_STD
from maect.datasets.splits import make_low_shot
from maect.settings import DataSettings

if TYPE_CHECKING:
    import torch

#: decoded images held beyond the batch that is asked for, bytes
AHEAD_BYTES = 1 << 30
_ASSUMED = (
    "assumed: classes in the order of their names or numbers, pixels normalised by ImageNet's mean "
    "and deviation"
)


@dataclass(eq=False)
class EncodedSplit(Split):
    """One split whose images are decoded when asked for; they keep their sizes."""

    rows: Index
    #: row of the split -> encoded bytes
    read: Callable[[int], bytes]

    def __post_init__(self) -> None:
        self._bytes = 3 * self.rows.sizes.astype(np.int64).prod(axis=1)
        self.expect([])

    @cached_property
    def _threads(self) -> ThreadPoolExecutor:
        return ThreadPoolExecutor(decode_threads())

    def _decode(self, row: int) -> np.ndarray:
        """Return pixels uint8 [h, w, 3] of one image."""
        try:
            return decode(self.read(row))[0]
        except (OSError, ValueError) as error:
            raise DataError(
                f"{self.rows.name(row)} could be read when the set was checked and cannot now: "
                f"{getattr(error, 'strerror', None) or error}. Restore it, or check the set again"
            ) from None

    def expect(self, batches: Iterable[np.ndarray]) -> None:
        """Announce the batches to come: they are decoded ahead, as far as memory allows."""
        self._ahead: deque[tuple[int, Future[np.ndarray]]] = deque()
        self._held = 0
        self._expected: Iterator[int] = (int(row) for rows in batches for row in rows)

    def _fill(self, least: int) -> None:
        """Start decoding what comes next: `least` images, more while memory allows."""
        while len(self._ahead) < least or self._held < AHEAD_BYTES:
            row = next(self._expected, None)
            if row is None:
                return
            self._ahead.append((row, self._threads.submit(self._decode, row)))
            self._held += int(self._bytes[row])

    def batch(self, indices: np.ndarray) -> list[torch.Tensor]:
        """Return images of the given samples: int64 [B] -> B of uint8 [3, h, w] on the CPU.

        Raises DataError where a file can no longer be read; ValueError where batches were
        announced and this is not the next.
        """
        import torch

        rows = [int(row) for row in indices]
        self._fill(len(rows))
        if not self._ahead:  # nothing was announced, or all of it was taken
            self._expected = iter(rows)
            self._fill(len(rows))
        taken = [self._ahead.popleft() for _ in rows if self._ahead]
        if [row for row, _ in taken] != rows:
            raise ValueError("these samples are not the batch that was announced next")
        self._held -= sum(int(self._bytes[row]) for row in rows)
        self._fill(0)
        return [torch.from_numpy(future.result()).permute(2, 0, 1) for _, future in taken]


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
        message = f"there is no folder {settings.path}; name another with --set data.path=DIR"
        raise DataError(message)
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
) -> tuple[Index, dict[str, np.ndarray], list[str], Callable[[int], bytes]]:
    """Return the index of a set, the rows of its splits, the classes without a training image, and
    what reads a row's encoded bytes. Raises DataError where the set cannot be used."""
    raw, read = _reader(settings).load(*_places(settings, root))
    raw.require_usable(settings.max_broken, settings.selection)
    index, empty = raw.counted()
    return index, index.splits(settings.selection), empty, read


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


def load(settings: DataSettings, root: Path, split: str) -> EncodedSplit:
    """Return one split, decoded when asked for. Raises DataError where the set was not prepared."""
    index, splits, _, read = _usable(settings, root)
    part, classes = splits[split], len(index.classes)
    rows = index.take(part)
    return EncodedSplit(
        split,
        rows.labels,
        classes,
        IMAGENET_MEAN,
        IMAGENET_STD,
        rows,
        lambda row: read(int(part[row])),
    )


def low_shot(settings: DataSettings, root: Path) -> dict[str, list[np.ndarray]]:
    """Published lists, else made by the rule that the committed lists were made by."""
    index, splits, *_ = _usable(settings, root)
    train = index.take(splits["train"])
    if settings.low_shot is not None:
        return lists.read(settings.low_shot, train)
    return make_low_shot(settings.name, train.labels)
