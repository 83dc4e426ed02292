"""What is known of a large set: each image's label, checksum, size, kind and state.

Making it reads and decodes every image once; it is kept under the data directory and brought up
to date by path, size and modification time, so that only what changed is read again.
"""

from __future__ import annotations

import hashlib
import os
import zipfile
import zlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, fields, replace
from pathlib import Path
from typing import Any, Self

import numpy as np

from maect.datasets.base import DataError, listed, shown
from maect.datasets.images import Inspection

#: share of the training images that are set apart to choose settings on
SELECTION_SHARE = 0.04
#: fields that are not a row an image
_TABLES = ("classes", "left_out")


@dataclass(frozen=True)
class Files:
    """Images before they are read, a row each: training images first, each pool by name."""

    #: names relative to the set's folder, as bytes; "shard.parquet:12" for row 12 of a shard
    names: np.ndarray
    #: whether the image is one of the official test images
    test: np.ndarray
    labels: np.ndarray
    #: [N, 2]: size and modification time of a file; of an encoded image in a shard, first byte
    #: and length in the unpacked shard
    stamps: np.ndarray
    classes: np.ndarray
    #: names of files that are no images by their names, as bytes
    left_out: np.ndarray

    @classmethod
    def of(
        cls,
        rows: Sequence[tuple[str, bool, int, tuple[int, int]]],
        classes: Sequence[str],
        left_out: Sequence[str],
    ) -> Self:
        """Return the images of `rows`, each with its name, test, label and stamp."""
        names, test, labels, stamps = zip(*rows, strict=True) if rows else ([], [], [], [])
        return cls(
            names=_encoded(names),
            test=np.array(test, bool),
            labels=np.array(labels, np.int64),
            stamps=np.array(stamps, np.int64).reshape(-1, 2),
            classes=np.array(classes, np.str_),
            left_out=_encoded(left_out),
        )

    def __len__(self) -> int:
        return len(self.names)

    def name(self, row: int) -> str:
        return os.fsdecode(self.names[row])


@dataclass(frozen=True)
class Index(Files):
    """The same images, looked at."""

    #: SHA-256 of the encoded bytes, [N, 32] uint8
    digests: np.ndarray
    #: height and width, [N, 2]
    sizes: np.ndarray
    #: what kind of image it is, and why it cannot be used (empty where it can), as bytes
    kinds: np.ndarray
    reasons: np.ndarray

    @classmethod
    def build(cls, files: Files, found: list[Inspection], **more: Any) -> Self:
        """Return the index of `files` by what was found in each."""
        return cls(
            **vars(files),
            digests=np.frombuffer(b"".join(f.sha256 for f in found), np.uint8).reshape(-1, 32),
            sizes=np.array([(f.height, f.width) for f in found], np.int32).reshape(-1, 2),
            kinds=_encoded([f.kind for f in found]),
            reasons=_encoded([f.reason for f in found]),
            **more,
        )

    def save(self, path: Path) -> None:
        path.parent.mkdir(parents=True, exist_ok=True)
        temporary = path.with_name(f".{path.name}.{os.getpid()}.npz")
        try:
            np.savez(temporary, **vars(self))
            temporary.replace(path)
        finally:
            temporary.unlink(missing_ok=True)

    @classmethod
    def load(cls, path: Path) -> Self | None:
        """Return the index in a file; None where there is none or it is damaged."""
        try:
            with np.load(path, allow_pickle=False) as arrays:
                return cls(**{field.name: arrays[field.name] for field in fields(cls)})
        except (OSError, ValueError, KeyError, EOFError, zipfile.BadZipFile, zlib.error):
            return None

    @classmethod
    def join(cls, parts: Sequence[Index], classes: list[str], left_out: list[str]) -> Self:
        """Return the rows of all parts in turn."""
        rows = [field.name for field in fields(cls) if field.name not in _TABLES]
        joined = {name: np.concatenate([getattr(part, name) for part in parts]) for name in rows}
        return cls(**joined, classes=np.array(classes, np.str_), left_out=_encoded(left_out))

    def is_of(self, files: Files) -> bool:
        """Return whether it was made from these very files."""
        return all(np.array_equal(getattr(self, name), of) for name, of in vars(files).items())

    def take(self, rows: np.ndarray) -> Self:
        """Return the same for some of the rows."""
        kept = {name: array[rows] for name, array in vars(self).items() if name not in _TABLES}
        return replace(self, **kept)

    def inspection(self, row: int) -> Inspection:
        """Return what was found in one image."""
        kind, reason = (os.fsdecode(of[row]) for of in (self.kinds, self.reasons))
        height, width = self.sizes[row].tolist()
        return Inspection(self.digests[row].tobytes(), height, width, kind, reason)

    def fingerprint(self, selection: int | None) -> str:
        """SHA-256 of names, labels and bytes; where the set lies and its times do not matter."""
        drawn = f"selection {SELECTION_SHARE}" if selection is None else f"{selection} to select"
        digest = hashlib.sha256(drawn.encode())
        digest.update("\n".join(self.classes).encode("utf-8", "surrogateescape"))
        for test in (False, True):
            rows = np.flatnonzero(self.test == test)
            digest.update(b"\n".join(self.names[rows].tolist()))
            digest.update(self.labels[rows].astype("<i8").tobytes())
            digest.update(self.digests[rows].tobytes())
        return digest.hexdigest()

    def splits(self, selection: int | None) -> dict[str, np.ndarray]:
        """Return rows of each split, the unusable training images left out.

        A training image is in the selection split by its checksum, so that copies of one image
        are on the same side and a set's files can come in any order. The split has a share of the
        images, or those of the lowest checksums, at most `selection` of them.
        """
        usable = ~self.test & (self.reasons == b"")
        lowest = self.digests[:, :8].copy().view(">u8")[:, 0]
        if selection is None:
            chosen = (lowest >> 32) / 2.0**32 < SELECTION_SHARE
        else:
            ranked = np.sort(lowest[usable])
            chosen = lowest < ranked[selection] if selection < len(ranked) else usable
        return {
            "train": np.flatnonzero(usable & ~chosen),
            "selection": np.flatnonzero(usable & chosen),
            "test": np.flatnonzero(self.test),
        }

    def counted(self) -> tuple[Self, list[str]]:
        """Return the index without classes that no usable training image has, and their names.

        Raises DataError where test images are of such a class.
        """
        present = np.unique(self.labels[~self.test & (self.reasons == b"")])
        unknown = np.setdiff1d(self.labels[self.test], present).tolist()
        if unknown:
            raise DataError(
                f"test images are of classes that no usable training image has: "
                f"{listed(str(self.classes[label]) for label in unknown)}"
            )
        numbers = np.full(len(self.classes), -1)
        numbers[present] = np.arange(len(present))
        empty = self.classes[numbers < 0].tolist()
        return replace(self, labels=numbers[self.labels], classes=self.classes[present]), empty

    def broken(self) -> list[tuple[str, str]]:
        """Return the name and reason of every image that cannot be used."""
        rows = np.flatnonzero(self.reasons != b"").tolist()
        return [(shown(self.name(row)), shown(self.inspection(row).reason)) for row in rows]

    def converted(self) -> dict[str, tuple[str, ...]]:
        """Return names of the images that are not RGB, by kind."""
        return {
            kind.decode(): tuple(shown(os.fsdecode(n)) for n in self.names[self.kinds == kind])
            for kind in np.unique(self.kinds).tolist()
            if kind not in (b"", b"RGB")
        }

    def notes(self, splits: Mapping[str, np.ndarray]) -> list[str]:
        """Return sentences on what is left out, and on classes that a split lacks."""
        notes = []
        if len(self.left_out):
            names = listed(map(os.fsdecode, self.left_out.tolist()))
            notes.append(f"files left out for their names ({len(self.left_out)}): {names}")
        for split, rows in splits.items():
            lacking = np.delete(self.classes, np.unique(self.labels[rows])).tolist()
            if lacking:
                told = f"{len(lacking)} of {len(self.classes)} classes: {listed(lacking)}"
                notes.append(f"the {split} split has no images of {told}")
        return notes

    def require_usable(self, max_broken: float, selection: int | None) -> None:
        """Raises DataError where a test image is unusable, too many training images are, or none
        is left to train on."""
        bad = self.reasons != b""
        if (bad & self.test).any():
            raise DataError(
                f"{np.count_nonzero(bad & self.test)} test images cannot be read, and a test split "
                f"is never cut: {self._named(bad & self.test)}. Restore these files"
            )
        train = np.count_nonzero(~self.test)
        if np.count_nonzero(bad) > max_broken * train:
            raise DataError(
                f"{np.count_nonzero(bad)} of {train} training images cannot be read, more than the "
                f"share of {max_broken:g} that max_broken allows: {self._named(bad)}. Restore "
                f"these files, or raise max_broken to leave them out"
            )
        if not len(self.splits(selection)["train"]):
            raise DataError(f"none of {train} training images is left for the train split")

    def _named(self, chosen: np.ndarray) -> str:
        rows = np.flatnonzero(chosen).tolist()
        return listed(f"{self.name(row)} ({self.inspection(row).reason})" for row in rows)


def _encoded(names: Sequence[str]) -> np.ndarray:
    return np.array([os.fsencode(name) for name in names], dtype=np.bytes_)
