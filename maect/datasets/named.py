"""Sets small enough to be held decoded: digits from the wheel, the others from the cache."""

from __future__ import annotations

import gzip
import hashlib
import importlib.util
from pathlib import Path

import numpy as np

from maect.datasets import cache, splits
from maect.datasets.base import ArraySplit, DataError, DataInfo
from maect.datasets.catalog import CATALOG


def digits_file() -> Path:
    """scikit-learn's copy of the digits, found without importing scikit-learn."""
    spec = importlib.util.find_spec("sklearn")
    if spec is None or spec.origin is None:
        raise DataError("digits come with scikit-learn, which is not installed")
    return Path(spec.origin).parent / "datasets" / "data" / "digits.csv.gz"


def read_digits() -> cache.Pools:
    """Pixels uint8 [1797, 1, 8, 8], their values 0..16 scaled to 0..255; labels int64 [1797].

    Raises DataError where the file is not the one that scikit-learn ships.
    """
    path = digits_file()
    try:
        with gzip.open(path, "rt") as file:
            table = np.loadtxt(file, delimiter=",")
        values = table[:, :64].astype(np.uint16)
        images = ((values * 255 + 8) // 16).astype(np.uint8).reshape(-1, 1, 8, 8)
        pools = {"train": (images, table[:, 64].astype(np.int64))}
    except (OSError, EOFError, ValueError, IndexError) as error:
        raise DataError(f"{path} could not be read ({error}); reinstall scikit-learn") from None
    if cache.content_hash(pools) != CATALOG["digits"].content:
        raise DataError(f"{path} is not the file that scikit-learn ships; reinstall scikit-learn")
    return pools


def _read(name: str, root: Path) -> tuple[cache.Pools, str]:
    """Return images and labels of a named set, and the SHA-256 of both."""
    if name == "digits":
        return read_digits(), CATALOG[name].content or ""
    pools, meta = cache.read(name, root)
    content, published = str(meta["content"]), CATALOG[name].content
    if published is not None and content != published:
        raise DataError(
            f"{root / name} does not hold the published images of {name}; "
            f"run: python -m bench data fetch {name}"
        )
    return pools, content


def _manifest(name: str, pools: cache.Pools) -> splits.Manifest:
    """The committed manifest, or for a set without one the same lists made from its labels."""
    found = splits.committed(name)
    return found or splits.parse(splits.make_split(name, np.asarray(pools["train"][1])))


def _counts(name: str) -> dict[str, int]:
    pools, drawn = CATALOG[name].pools, splits.SIZES[name]
    return {
        "train": pools["train"] - sum(drawn.values()),
        "selection": drawn["selection"],
        "test": drawn.get("test") or pools["test"],
    }


def describe(name: str, root: Path) -> DataInfo:
    entry = CATALOG[name]
    fingerprint, hint = None, None
    try:
        pools, content = _read(name, root)
        both = f"{content}:{_manifest(name, pools).sha256}"
        fingerprint = hashlib.sha256(both.encode()).hexdigest()
    except DataError as error:
        hint = str(error)
    return DataInfo(
        name,
        entry.shape,
        entry.classes,
        _counts(name),
        fingerprint,
        str(digits_file() if name == "digits" else root / name),
        entry.mean,
        entry.std,
        hint,
    )


def load(name: str, root: Path, split: str) -> ArraySplit:
    entry = CATALOG[name]
    pools, _ = _read(name, root)
    lists = _manifest(name, pools).splits
    images, labels = pools["train" if split in lists else "test"]
    rows = lists.get(split, np.arange(len(labels), dtype=np.int64))
    return ArraySplit(split, images, rows, labels[rows], entry.classes, entry.mean, entry.std)


def low_shot(name: str, root: Path) -> dict[str, list[np.ndarray]]:
    found = splits.committed(name)
    return found.low_shot if found else _manifest(name, _read(name, root)[0]).low_shot
