"""What a data set is to the rest of the program: its description, its splits, its errors."""

from __future__ import annotations

import os
import platform
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

if TYPE_CHECKING:
    import torch

    from maect.datasets.decoders import Crops, Request

SPLITS = ("train", "selection", "test")
#: how many names a message lists
NAMED = 20


class DataError(ValueError):
    """Data that are absent, damaged or not what was asked for; says what to do."""

    def __init__(self, message: str) -> None:
        super().__init__(shown(message))


@contextmanager
def readable() -> Iterator[None]:
    """Raise DataError that names the file or folder which the system refuses, and why."""
    try:
        yield
    except OSError as error:
        raise DataError(f"{error.filename} cannot be read: {error.strerror}") from None


@dataclass(frozen=True)
class DataInfo:
    """A data set as the planner sees it; made without decoding anything."""

    name: str
    #: channels, height, width; the images of `image_folder` and `parquet` vary, so this is what
    #: the encoder is given
    image_shape: tuple[int, int, int]
    classes: int
    #: images in each split; a split of unknown size is left out
    counts: dict[str, int]
    #: SHA-256 of the pixels, labels and split lists; null when the data are not here or have not
    #: been indexed
    fingerprint: str | None
    #: where the data are or would be
    where: str
    mean: tuple[float, ...]
    std: tuple[float, ...]
    #: what to do when there is no fingerprint
    hint: str | None = None
    #: unreadable training files, which no split holds: (file, reason)
    broken: tuple[tuple[str, str], ...] = ()
    #: files that were not RGB and are converted, by kind
    converted: dict[str, tuple[str, ...]] = field(default_factory=dict)
    #: sentences: what is assumed, left out or missing
    notes: tuple[str, ...] = ()

    @property
    def channels(self) -> int:
        return self.image_shape[0]


@dataclass(eq=False)
class Split(ABC):
    """One split: labels at hand, images on request.

    Random streams, orders and queues know a sample by its row in the split.
    """

    name: str
    #: int64 [N]
    labels: np.ndarray
    classes: int
    #: channel statistics to normalise by, for values in [0, 1]
    mean: tuple[float, ...]
    std: tuple[float, ...]

    def __len__(self) -> int:
        return len(self.labels)

    @abstractmethod
    def batch(self, indices: np.ndarray) -> torch.Tensor | list[torch.Tensor]:
        """Return images of the given samples, on the CPU: int64 [B] -> uint8 [B, C, H, W], or where
        their sizes differ B of [C, h, w]."""

    @property
    def sizes(self) -> np.ndarray | None:
        """Height and width of each image [N, 2] where they differ; such images are decoded when
        `crops` asks for them."""
        return None

    def expect(self, requests: Iterable[Request]) -> None:  # noqa: B027 - nothing to do by default
        """Announce the crops to come, so that they can be made ahead."""

    def crops(self, rows: np.ndarray, request: Callable[[], Request]) -> Crops:
        """Return crops of images `rows` [B]: of the request announced next, else of `request`."""
        raise NotImplementedError


@dataclass(eq=False)
class ArraySplit(Split):
    """A split held decoded, in memory or in a memory map."""

    #: all images of the file that this split is a part of, uint8 [M, C, H, W], and its rows
    pool: np.ndarray
    rows: np.ndarray

    def batch(self, indices: np.ndarray) -> torch.Tensor:
        """Return images of the given samples, on the CPU: int64 [B] -> uint8 [B, C, H, W]."""
        import torch

        return torch.from_numpy(self.pool[self.rows[np.asarray(indices)]])


def require_planned(name: str, found: str, planned: str | None) -> None:
    """Raise DataError where a set's fingerprint is not the planned one, if there is a plan."""
    if planned not in (None, found):
        told = f"{name} on {platform.node()} is not what the run was planned with"
        raise DataError(f"{told}: there are other images, or other splits of them")


def workers_here() -> int:
    """Workers of a group that share this machine."""
    return int(os.environ.get("LOCAL_WORLD_SIZE") or 1)


def decode_threads() -> int:
    """Threads or processes that decode for this one: its share of the cores that affinity and
    control group allow. The number changes no result."""
    from joblib import cpu_count

    return max(1, cpu_count() // workers_here())


def shown(text: str) -> str:
    """Return text as it can be printed: bytes that are no UTF-8 and control characters escaped."""
    text = text.encode("utf-8", "surrogateescape").decode("utf-8", "backslashreplace")
    return "".join(c if c.isprintable() else c.encode("unicode_escape").decode() for c in text)


def listed(names: Iterable[str]) -> str:
    """Return the first names of many, as they can be printed, and how many more there are."""
    every = list(names)
    text = ", ".join(shown(name) for name in every[:NAMED])
    return text + (f" and {len(every) - NAMED} more" if len(every) > NAMED else "")


def data_root() -> Path:
    """Return the data directory: `$MAECT_DATA`, or `~/.cache/maect-bench/data`."""
    return _folder("MAECT_DATA", "~/.cache/maect-bench/data")


def local_root() -> Path:
    """Return the folder of local copies: `$MAECT_LOCAL`, or `~/.cache/maect-bench/local`."""
    return _folder("MAECT_LOCAL", "~/.cache/maect-bench/local")


def _folder(variable: str, default: str) -> Path:
    given = os.environ.get(variable) or default
    if (found := os.path.expanduser(given)).startswith("~"):
        raise DataError(f"there is no home folder for {given}; set HOME, or {variable} to a folder")
    return Path(found)
