"""What is known of a large set: each image's label, checksum, size, kind and state.

Making it reads and decodes every image once; it is kept under the data directory and brought up
to date by path, size and modification time, so that only what changed is read again.
"""

from __future__ import annotations

import hashlib
import os
import zipfile
import zlib
from dataclasses import dataclass, fields, replace
from pathlib import Path

import numpy as np

from maect.datasets.base import DataError, listed, shown
from maect.datasets.images import Inspection

#: share of the training images that are set apart to choose settings on
SELECTION_SHARE = 0.04
#: fields that are not a row an image
_TABLES = ("classes", "kind_names", "reason_names", "left_out")


@dataclass(frozen=True)
class Files:
    """Images before they are read, training images first, each pool by name; see `Index`."""

    names: list[str]
    test: list[bool]
    labels: list[int]
    stamps: list[tuple[int, int]]
    classes: list[str]
    left_out: list[str]


@dataclass(frozen=True)
class Index:
    """One row an image, training images first, each pool in the order of its names."""

    #: names relative to the set's folder, as bytes; "shard.parquet:12" for row 12 of a shard
    names: np.ndarray
    #: whether the image is one of the official test images
    test: np.ndarray
    labels: np.ndarray
    #: SHA-256 of the encoded bytes, [N, 32] uint8
    digests: np.ndarray
    #: height and width, [N, 2]
    sizes: np.ndarray
    #: what kind of image it is, a number in `kind_names`
    kinds: np.ndarray
    #: why it cannot be used, a number in `reason_names`; 0 where it can
    reasons: np.ndarray
    #: [N, 2]: size and modification time of a file; of an encoded image in a shard, first byte
    #: and length in the unpacked shard
    stamps: np.ndarray
    classes: np.ndarray
    kind_names: np.ndarray
    reason_names: np.ndarray
    #: names of files that are no images by their names, as bytes
    left_out: np.ndarray

    def __len__(self) -> int:
        return len(self.names)

    def name(self, row: int) -> str:
        return os.fsdecode(self.names[row])

    def reason(self, row: int) -> str:
        return str(self.reason_names[self.reasons[row]])

    def save(self, path: Path) -> None:
        path.parent.mkdir(parents=True, exist_ok=True)
        temporary = path.with_name(f".{path.name}.{os.getpid()}.npz")
        try:
            np.savez(temporary, **{field.name: getattr(self, field.name) for field in fields(self)})
            temporary.replace(path)
        finally:
            temporary.unlink(missing_ok=True)

    @classmethod
    def load(cls, path: Path) -> Index | None:
        """Return the index in a file; None where there is none or it is damaged."""
        try:
            with np.load(path, allow_pickle=False) as arrays:
                return cls(**{field.name: arrays[field.name] for field in fields(cls)})
        except (OSError, ValueError, KeyError, EOFError, zipfile.BadZipFile, zlib.error):
            return None

    @classmethod
    def build(cls, files: Files, found: list[Inspection]) -> Index:
        kinds, reasons = {"": 0}, {"": 0}
        for one in found:
            kinds.setdefault(one.kind, len(kinds))
            reasons.setdefault(one.reason, len(reasons))
        return cls(
            names=_encoded(files.names),
            test=np.array(files.test, dtype=bool),
            labels=np.array(files.labels, dtype=np.int64),
            digests=np.frombuffer(b"".join(f.sha256 for f in found), np.uint8).reshape(-1, 32),
            sizes=np.array([(f.height, f.width) for f in found], np.int32).reshape(-1, 2),
            kinds=np.array([kinds[f.kind] for f in found], dtype=np.int32),
            reasons=np.array([reasons[f.reason] for f in found], dtype=np.int32),
            stamps=np.array(files.stamps, dtype=np.int64).reshape(-1, 2),
            classes=np.array(files.classes, dtype=np.str_),
            kind_names=np.array(list(kinds), dtype=np.str_),
            reason_names=np.array(list(reasons), dtype=np.str_),
            left_out=_encoded(files.left_out),
        )

    @classmethod
    def join(cls, parts: list[Index], classes: list[str], left_out: list[str]) -> Index:
        """Return the rows of all parts in turn."""
        rows = [field.name for field in fields(cls) if field.name not in _TABLES]
        joined = {name: np.concatenate([getattr(part, name) for part in parts]) for name in rows}
        for codes, table in (("kinds", "kind_names"), ("reasons", "reason_names")):
            tables = [getattr(part, table) for part in parts]
            # "" is in each and comes first
            joined[table], numbers = np.unique(np.concatenate(tables), return_inverse=True)
            starts = np.repeat(np.cumsum([0, *map(len, tables[:-1])]), list(map(len, parts)))
            joined[codes] = numbers[starts + joined[codes]].astype(np.int32)
        joined |= {"classes": np.array(classes, np.str_), "left_out": _encoded(left_out)}
        return cls(**joined)

    def is_of(self, files: Files) -> bool:
        """Return whether it was made from these very files."""
        return (
            np.array_equal(self.names, _encoded(files.names))
            and self.labels.tolist() == files.labels
            and self.classes.tolist() == files.classes
            and np.array_equal(self.left_out, _encoded(files.left_out))
            and np.array_equal(self.stamps, np.array(files.stamps))
        )

    def take(self, rows: np.ndarray) -> Index:
        """Return the same for some of the rows."""
        kept = [field.name for field in fields(self) if field.name not in _TABLES]
        return replace(self, **{name: getattr(self, name)[rows] for name in kept})

    def fingerprint(self) -> str:
        """SHA-256 of names, labels and bytes; where the set lies and its times do not matter."""
        digest = hashlib.sha256(f"selection {SELECTION_SHARE}".encode())
        digest.update("\n".join(self.classes).encode("utf-8", "surrogateescape"))
        for test in (False, True):
            rows = np.flatnonzero(self.test == test)
            digest.update(b"\n".join(self.names[rows].tolist()))
            digest.update(self.labels[rows].astype("<i8").tobytes())
            digest.update(self.digests[rows].tobytes())
        return digest.hexdigest()

    def splits(self) -> dict[str, np.ndarray]:
        """Return rows of each split, the unusable training images left out.

        A training image is in the selection split by its checksum, so that copies of one image
        are on the same side and a set's files can come in any order.
        """
        usable = self.reasons == 0
        share = self.digests[:, :4].copy().view(">u4")[:, 0] / 2.0**32
        chosen = share < SELECTION_SHARE
        return {
            "train": np.flatnonzero(~self.test & usable & ~chosen),
            "selection": np.flatnonzero(~self.test & usable & chosen),
            "test": np.flatnonzero(self.test),
        }

    def counted(self) -> tuple[Index, list[str]]:
        """Return the index without classes that no usable training image has, and their names.

        Raises DataError where test images are of such a class.
        """
        present = np.unique(self.labels[~self.test & (self.reasons == 0)])
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
        rows = np.flatnonzero(self.reasons).tolist()
        return [(shown(self.name(row)), shown(self.reason(row))) for row in rows]

    def converted(self) -> dict[str, tuple[str, ...]]:
        """Return names of the images that are not RGB, by kind."""
        found = {}
        for number in np.unique(self.kinds):
            kind = str(self.kind_names[number])
            if kind not in ("", "RGB"):
                rows = np.flatnonzero(self.kinds == number).tolist()
                found[kind] = tuple(shown(self.name(row)) for row in rows)
        return found

    def notes(self) -> list[str]:
        """Return sentences on what is left out, and on classes that a split lacks."""
        notes = []
        if len(self.left_out):
            names = listed(map(os.fsdecode, self.left_out.tolist()))
            notes.append(f"{len(self.left_out)} files are left out for their names: {names}")
        for split, rows in self.splits().items():
            lacking = np.delete(self.classes, np.unique(self.labels[rows])).tolist()
            if lacking:
                told = f"{len(lacking)} of {len(self.classes)} classes: {listed(lacking)}"
                notes.append(f"the {split} split has no images of {told}")
        return notes

    def require_usable(self, max_broken: float) -> None:
        """Raises DataError where a test image is unusable, too many training images are, or none
        is left to train on."""
        bad = self.reasons > 0
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
        if not len(self.splits()["train"]):
            raise DataError(f"none of {train} training images is left for the train split")

    def _named(self, chosen: np.ndarray) -> str:
        rows = np.flatnonzero(chosen).tolist()
        return listed(f"{self.name(row)} ({self.reason(row)})" for row in rows)


def _encoded(names: list[str]) -> np.ndarray:
    return np.array([os.fsencode(name) for name in names], dtype=np.bytes_)
