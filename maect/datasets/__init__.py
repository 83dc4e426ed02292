"""Image sets with fixed splits: what the planner needs to know of them, and their images.

Importing this package imports neither torch nor scikit-learn. Getting and checking the named
sets is in `maect.datasets.fetch`.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np

from maect.datasets import named, on_disk
from maect.datasets.base import SPLITS, DataError, DataInfo, Split, data_root
from maect.datasets.named import CATALOG
from maect.datasets.on_disk import kind_of
from maect.settings import DataSettings

__all__ = [
    "CATALOG",
    "SPLITS",
    "DataError",
    "DataInfo",
    "Split",
    "data_root",
    "describe",
    "kind_of",
    "load",
    "low_shot",
    "prepare",
]


def _home(settings: DataSettings) -> Any:
    """Return the module that knows such a set."""
    return named if settings.name in CATALOG else on_disk


def describe(settings: DataSettings, root: Path | None = None) -> DataInfo:
    """Return what the planner needs: shape, classes, counts, fingerprint. Decodes no image.

    Without a fingerprint the data are not here, are damaged, or were not `prepare`d; `hint` says
    which; where the settings do not tell either, the number of training images is missing. Raises
    DataError where there is no folder and no such number.
    """
    return _home(settings).describe(settings, root or data_root())


def prepare(
    settings: DataSettings,
    root: Path | None = None,
    progress: Callable[[str], None] = lambda text: None,
) -> DataInfo:
    """`describe`, after reading once every image of a folder or of shards that is new or changed.

    It finds what cannot be read before anything trains on it. Raises DataError where a test image
    cannot be read, more training images than `max_broken` allows, or the set is absent.
    """
    return _home(settings).prepare(settings, root or data_root(), progress)


def load(
    settings: DataSettings,
    root: Path | None = None,
    split: str = "train",
    progress: Callable[[str], None] = lambda text: None,
    planned: str | None = None,
) -> Split:
    """Return images and labels of one split: "train", "selection" or "test".

    Where the settings say `stage: local`, this machine's copy of the images is made first, unless
    it is there; `progress` is told. `planned` is the fingerprint that the data are to have. Raises
    DataError where the data are absent, damaged, not `prepare`d or not the planned ones, or cannot
    be copied.
    """
    if split not in SPLITS:
        raise DataError(f"no split {split!r}; write one of {', '.join(SPLITS)}")
    return _home(settings).load(settings, root or data_root(), split, progress, planned)


def low_shot(settings: DataSettings, root: Path | None = None) -> dict[str, list[np.ndarray]]:
    """Rows of the train split that are labelled, by "1", "2", "5" (images a class, three draws),
    "1%" and "10%" (one draw each): int64 arrays. Of published lists, what they hold of these."""
    return _home(settings).low_shot(settings, root or data_root())
