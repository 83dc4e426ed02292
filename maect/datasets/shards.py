"""Sets in Parquet shards, as Hugging Face stores them: columns image {bytes, path} and label.

Parquet cannot give a single image without reading the hundred around it, so the encoded images of
each shard are copied, once, to a flat file under the data directory, which is memory-mapped.
"""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np

from maect.datasets import cache
from maect.datasets.base import DataError, decode_threads
from maect.datasets.image_index import Index
from maect.datasets.images import inspect

TEST_PREFIXES = ("val", "validation", "test")
_ROWS = 64


def listing(path: Path) -> list[tuple[Path, bool]]:
    """Return the shards, training shards first, and whether they hold test images.

    Shards are told apart by the beginning of their names: train-..., validation-..., test-...
    Raises DataError where either kind is missing.
    """
    shards = sorted(path.rglob("*.parquet")) if path.is_dir() else []

    def starting(prefix: str) -> list[Path]:
        return [s for s in shards if s.name.removesuffix(".parquet").split("-")[0] == prefix]

    train = starting("train")
    test = next((found for prefix in TEST_PREFIXES if (found := starting(prefix))), [])
    if not train or not test:
        raise DataError(
            f"{path} lacks {'test' if train else 'training'} shards: expected files named "
            f"train-*.parquet and validation-*.parquet (or test-*.parquet)"
        )
    return [(shard, False) for shard in train] + [(shard, True) for shard in test]


def _stamp(shard: Path) -> list[int]:
    status = shard.stat()
    return [status.st_size, status.st_mtime_ns]


def _unpacked(path: Path, shard: Path, known: Path) -> Path:
    name = hashlib.sha256(str(shard.relative_to(path)).encode()).hexdigest()[:16]
    return known / name


def _is_current(shard: Path, unpacked: Path) -> bool:
    try:
        seen = json.loads(unpacked.with_suffix(".json").read_text())
        return bool(seen["stamp"] == _stamp(shard) and unpacked.with_suffix(".npz").is_file())
    except (OSError, ValueError, KeyError, TypeError):
        return False


def is_current(path: Path, known: Path) -> bool:
    """Return whether every shard has been unpacked as it is now."""
    return all(_is_current(shard, _unpacked(path, shard, known)) for shard, _ in listing(path))


def _class_names(schema: Any) -> list[str]:
    """Return names of the classes from Hugging Face's note in the file, where there is one."""
    try:
        note = json.loads(schema.metadata[b"huggingface"])
        return [str(name) for name in note["info"]["features"]["label"]["names"]]
    except (KeyError, TypeError, ValueError):
        return []


def _unpack(path: Path, shard: Path, test: bool, unpacked: Path) -> None:
    """Copy a shard's encoded images to `unpacked`.bin and look at each once."""
    import pyarrow
    import pyarrow.parquet

    relative = shard.relative_to(path).as_posix()
    stamp = _stamp(shard)
    labels: list[int] = []
    found, places = [], []
    unpacked.parent.mkdir(parents=True, exist_ok=True)
    temporary = unpacked.with_name(f".{unpacked.name}.{os.getpid()}")
    try:
        with pyarrow.parquet.ParquetFile(shard) as table, temporary.open("wb") as flat:
            for batch in table.iter_batches(_ROWS, columns=["image", "label"]):
                for row in batch.to_pylist():
                    data = (row["image"] or {}).get("bytes") or b""
                    places.append((flat.tell(), len(data)))
                    labels.append(-1 if row["label"] is None else int(row["label"]))
                    found.append(inspect(data))
                    flat.write(data)
            classes = _class_names(table.schema_arrow)
        if min(labels, default=0) < 0:
            raise DataError(f"{shard} has images without a label")
        temporary.replace(unpacked.with_suffix(".bin"))
    except (pyarrow.ArrowException, KeyError, AttributeError, TypeError) as error:
        raise DataError(
            f"{shard} could not be read as a shard with columns image and label: {error}"
        ) from None
    finally:
        temporary.unlink(missing_ok=True)
    names = [f"{relative}:{row}" for row in range(len(labels))]
    part = Index.build(names, [test] * len(names), labels, found, places, classes)
    part.save(unpacked.with_suffix(".npz"))
    cache.write_json(unpacked.with_suffix(".json"), {"shard": relative, "stamp": stamp})


def update(path: Path, known: Path, progress: Callable[[str], None]) -> None:
    """Unpack the shards that are new or have changed."""
    shards = listing(path)

    def one(item: tuple[Path, bool]) -> None:
        shard, test = item
        unpacked = _unpacked(path, shard, known)
        if not _is_current(shard, unpacked):
            _unpack(path, shard, test, unpacked)

    with ThreadPoolExecutor(decode_threads()) as threads:
        for count, _ in enumerate(threads.map(one, shards), start=1):
            progress(f"unpacked {count} of {len(shards)} shards")


def load(path: Path, known: Path) -> tuple[Index, Callable[[int], bytes]]:
    """Return the index of all shards together, and what reads the encoded bytes of a row of it."""
    parts, files = [], []
    for shard, _ in listing(path):
        unpacked = _unpacked(path, shard, known)
        part = Index.load(unpacked.with_suffix(".npz"))
        if part is None:
            raise DataError(f"{shard} has not been unpacked, or its copy is damaged")
        parts.append(part)
        empty = not part.stamps[:, 1].sum()
        flat = unpacked.with_suffix(".bin")
        files.append(np.empty(0, np.uint8) if empty else np.memmap(flat, np.uint8, mode="r"))
    names = max((part.classes.tolist() for part in parts), key=len)
    count = max(int(part.labels.max(initial=0)) for part in parts) + 1
    index = Index.join(parts, names if len(names) >= count else [str(n) for n in range(count)])
    in_file = np.repeat(np.arange(len(parts)), [len(part) for part in parts])

    def read(row: int) -> bytes:
        first, length = index.stamps[row].tolist()
        return files[in_file[row]][first : first + length].tobytes()

    return index, read
