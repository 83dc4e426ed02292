"""Published lists of labelled images: SimCLRv2's 1 % and 10 % of ImageNet, MSN's 1, 2 and 5 images
a class in three draws.

A list is a file `*.txt` in a folder or below, with the name of a training image a line:
`n01440764_10026.JPEG`, or `class/file` where names alone are not unique. What a list is for is
told by what it holds, because names mislead (MSN's third draw of 5 images is `3imgs_class.txt`).
"""

from __future__ import annotations

from pathlib import Path

import numpy as np

from maect.datasets.base import DataError, listed, readable
from maect.datasets.image_index import Index
from maect.datasets.splits import SHARES, SHOTS
from maect.files import digest


def _contents(folder: str) -> dict[str, list[bytes]]:
    """Return the lines of each list by its name below the folder, in the order of the names."""
    root = Path(folder).expanduser()
    with readable():
        found = {str(f.relative_to(root)): f.read_bytes() for f in sorted(root.rglob("*.txt"))}
    if not found:
        raise DataError(f"data.low_shot: {folder} holds no lists of images (*.txt)")
    return {name: content.split() for name, content in found.items()}


def checksum(folder: str) -> str:
    """Return a digest of what the lists hold, 16 hexadecimal digits. Raises DataError."""
    return digest([[str(line) for line in lines] for lines in _contents(folder).values()], 16)


def read(folder: str, train: Index) -> dict[str, list[np.ndarray]]:
    """Return each budget's draws, rows of the train split: "1", "2", "5", "1%" and "10%".

    Raises DataError for a list that names an image that is not there, or one twice, or that fits
    no budget.
    """
    rows: dict[bytes, int] = {}
    for row, name in enumerate(train.names.tolist()):
        inside = name.removeprefix(b"train/")
        file = inside.rpartition(b"/")[2]
        rows[inside] = row
        rows[file] = -1 if file in rows else row
    draws: dict[str, list[np.ndarray]] = {}
    for name, lines in _contents(folder).items():
        found = np.array([rows.get(line, -1) for line in lines], np.int64)
        if (found < 0).any():
            lacking = listed(lines[at].decode(errors="replace") for at in np.flatnonzero(found < 0))
            raise DataError(
                f"{folder}/{name}: the train split has no image of these names, or several: "
                f"{lacking}. Lists drawn from all training images need data.selection: 0"
            )
        if len(np.unique(found)) < len(found):
            raise DataError(f"{folder}/{name} names an image twice")
        draws.setdefault(_budget(f"{folder}/{name}", train, found), []).append(np.sort(found))
    for budget in SHARES:
        if len(draws.get(budget, [])) > 1:
            raise DataError(f"{folder} holds two lists of {budget}; leave the one that is meant")
    return draws


def _budget(name: str, train: Index, rows: np.ndarray) -> str:
    """Return what a list is for: as many images of each class, or about a share of all."""
    counts = np.bincount(train.labels[rows], minlength=len(train.classes))
    if "percent" not in name and counts.min() == counts.max() and counts[0] in SHOTS:
        return str(counts[0])
    for budget, share in SHARES.items():
        if 0.9 < len(rows) / (share * len(train)) < 1.1:
            return budget
    raise DataError(
        f"{name} lists {len(rows)} images, neither 1, 2 or 5 of each of {len(train.classes)} "
        f"classes nor 1 % or 10 % of {len(train)}"
    )
