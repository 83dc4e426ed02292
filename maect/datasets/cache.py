"""Decoded sets on disk: a memory-mapped .npy for each array, and meta.json, put there at once."""

from __future__ import annotations

import hashlib
import json
import os
import shutil
import tempfile
from pathlib import Path
from typing import Any

import numpy as np

from maect.datasets.base import DataError
from maect.files import write_atomic

#: images uint8 [N, C, H, W] and labels int64 [N] of "train" and "test"
Pools = dict[str, tuple[np.ndarray, np.ndarray]]


def content_hash(pools: Pools) -> str:
    """SHA-256 of shapes, pixels (uint8) and labels (int64, little-endian), train before test.

    It is a property of the images, not of the file format they came in.
    """
    digest = hashlib.sha256()
    for name in sorted(pools, key=("train", "test").index):
        images, labels = pools[name]
        digest.update(f"{name}:{images.shape}".encode())
        digest.update(np.ascontiguousarray(images, dtype=np.uint8).data)
        digest.update(np.ascontiguousarray(labels, dtype="<i8").data)
    return digest.hexdigest()


def write(name: str, root: Path, pools: Pools, source: str) -> None:
    """Put a decoded set into the cache, replacing what is there."""
    root.mkdir(parents=True, exist_ok=True)
    temporary = Path(tempfile.mkdtemp(dir=root, prefix=f".{name}."))
    try:
        for pool, arrays in pools.items():
            for kind, array in zip(("images", "labels"), arrays, strict=True):
                np.save(temporary / f"{pool}_{kind}.npy", array)
        meta = {
            "schema": 1,
            "name": name,
            "content": content_hash(pools),
            "source": source,
            "stamps": _stamps(temporary),
        }
        write_atomic(temporary / "meta.json", json.dumps(meta).encode())
        temporary.chmod(0o755)
        shutil.rmtree(root / name, ignore_errors=True)
        os.replace(temporary, root / name)
    except BaseException:
        shutil.rmtree(temporary, ignore_errors=True)
        raise


def _stamps(folder: Path) -> dict[str, list[int]]:
    """Return the size and modification time of each array: what tells that nothing has changed."""
    files = {file.name: file.stat() for file in sorted(folder.glob("*.npy"))}
    return {name: [status.st_size, status.st_mtime_ns] for name, status in files.items()}


def read(name: str, root: Path, verify: bool = False) -> tuple[Pools, dict[str, Any]]:
    """Return memory-mapped images and labels of a set, and its meta.json.

    The checksum is computed where `verify` says so, or where size or time of a file have changed
    since it was last right. Raises DataError where the set is absent or damaged.
    """
    folder = root / name
    again = f"run: python -m bench data fetch {name}"
    try:
        meta = json.loads((folder / "meta.json").read_text())
        pools = {
            pool: (
                np.load(folder / f"{pool}_images.npy", mmap_mode="r"),
                np.load(folder / f"{pool}_labels.npy"),
            )
            for pool in ("train", "test")
        }
        content, stamps = meta["content"], meta["stamps"]
    except FileNotFoundError:
        raise DataError(f"{name} is not in {root}; {again}") from None
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise DataError(f"{folder} is damaged ({error}); {again}") from None
    current = _stamps(folder)
    if verify or stamps != current:
        if content_hash(pools) != content:
            raise DataError(f"the images in {folder} do not match their checksum; {again}")
        meta["stamps"] = current
        if stamps != current and os.access(folder, os.W_OK):
            write_atomic(folder / "meta.json", json.dumps(meta).encode())
    return pools, meta
