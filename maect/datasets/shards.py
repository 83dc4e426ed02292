"""Sets in Parquet shards, as Hugging Face stores them: columns image {bytes, path} and label.

Parquet cannot give a single image without reading the hundred around it, so the encoded images of
each shard are copied, once, to a flat file under the data directory.
"""

from __future__ import annotations

import hashlib
import json
import os
import stat
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np

from maect.datasets.base import DataError, decode_threads, listed, readable
from maect.datasets.image_index import Files, Index
from maect.datasets.images import Place, inspect

TEST_PREFIXES = ("val", "validation", "test")
#: a label is a number below this, or a word
MAX_CLASSES = 1_000_000
_ROWS = 64


def _listing(path: Path, known: Path) -> list[tuple[Path, bool, Path]]:
    """Return the shards, training shards first, whether they hold test images, and where the index
    of each is kept once it is unpacked; its images lie beside it, in a file `.bin`.

    Shards are told apart by the beginning of their names: train-..., validation-..., test-...
    Raises DataError where either kind is missing.
    """
    train, test, _ = by_pool(path)
    if not train or not test:
        raise DataError(
            f"{path} lacks {'test' if train else 'training'} shards: expected files "
            f"named train-*.parquet and validation-*.parquet (or test-*.parquet)"
        )
    names = [hashlib.sha256(os.fsencode(s.relative_to(path))).hexdigest() for s in [*train, *test]]
    pools = [False] * len(train) + [True] * len(test)
    return [
        (shard, pool, known / f"{name[:16]}.npz")
        for shard, pool, name in zip([*train, *test], pools, names, strict=True)
    ]


def by_pool(path: Path) -> tuple[list[Path], list[Path], list[Path]]:
    """Return training shards, test shards and the Parquet files that are neither."""
    shards = sorted(path.rglob("*.parquet"))

    def starting(prefix: str) -> list[Path]:
        return [s for s in shards if s.name.removesuffix(".parquet").split("-")[0] == prefix]

    train = starting("train")
    test = next((found for prefix in TEST_PREFIXES if (found := starting(prefix))), [])
    return train, test, [shard for shard in shards if shard not in {*train, *test}]


@readable()
def _stamp(shard: Path) -> list[int]:
    status = shard.stat()
    if not stat.S_ISREG(status.st_mode):
        raise DataError(f"{shard} is no regular file")
    return [status.st_size, status.st_mtime_ns]


@dataclass(frozen=True)
class _Shard(Index):
    """The index of a shard that has been unpacked: beside it lies a flat file of its images."""

    #: size and modification time of the shard, and whether its labels are words
    stamp: np.ndarray
    words: np.ndarray


def _is_current(shard: Path, unpacked: Path) -> bool:
    found = _Shard.load(unpacked)
    return found is not None and found.stamp.tolist() == _stamp(shard)


def is_current(path: Path, known: Path) -> bool:
    """Return whether every shard has been unpacked as it is now."""
    return all(_is_current(shard, unpacked) for shard, _, unpacked in _listing(path, known))


def _class_names(schema: Any) -> list[str]:
    """Return names of the classes from Hugging Face's note in the file, where there is one."""
    try:
        note = json.loads(schema.metadata[b"huggingface"])
        names = note["info"]["features"]["label"]["names"]
        return [str(name).encode("utf-8", "backslashreplace").decode() for name in names]
    except (KeyError, TypeError, ValueError, RecursionError):
        return []


@contextmanager
def _opened(shard: Path) -> Iterator[Any]:
    """Give an open shard, whose pages are compared with their checksums where there are some.

    Raises DataError for whatever the reader raises, which damaged files make it do.
    """
    from pyarrow.parquet import ParquetFile

    try:
        with ParquetFile(shard, page_checksum_verification=True) as table:
            yield table
    except Exception as error:
        raise DataError(
            f"{shard} is damaged, or no shard with columns image {{bytes, path}} and "
            f"label: {str(error) or type(error).__name__}"
        ) from None


def _labels(shard: Path) -> tuple[list[int], list[str], bool]:
    """Return each row's label, the names of the classes, and whether the labels are words."""
    from pyarrow import types

    with _opened(shard) as table:
        if table.metadata.num_rows > shard.stat().st_size:
            raise ValueError(f"it claims {table.metadata.num_rows:,} rows")
        schema = table.schema_arrow
        kind = schema.field("label").type
        kind = kind.value_type if types.is_dictionary(kind) else kind
        words = types.is_string(kind) or types.is_large_string(kind) or types.is_string_view(kind)
        if not (words or types.is_integer(kind) or types.is_floating(kind) or kind == "bool"):
            raise ValueError(f"its labels are neither numbers nor words but {kind}")
        found = table.read(columns=["label"]).column("label").to_pylist()
    names = sorted(set(found) - {None}) if words else _class_names(schema)
    number = {word: label for label, word in enumerate(names)} if words else {}
    most = len(names) or MAX_CLASSES
    for row, value in enumerate(found):
        # Hugging Face writes -1 for no label
        if value is None or not (words or (0 <= value < most and value == int(value))):
            wanted = "a word" if words else f"a whole number below {most:,}"
            raise DataError(f"{shard}: the label of row {row} is {value}; expected {wanted}")
    return [number[value] if words else int(value) for value in found], names, words


def _images(shard: Path) -> Iterator[bytes]:
    """Give each row's encoded image in turn, empty where it has none."""
    with _opened(shard) as table:
        for batch in table.iter_batches(_ROWS, columns=["image"]):
            for cell in batch.column("image").to_pylist():
                yield memoryview((cell or {"bytes": None})["bytes"] or b"").tobytes()


def _unpack(path: Path, shard: Path, test: bool, unpacked: Path) -> None:
    """Copy a shard's encoded images to a flat file and look at each once."""
    stamp = _stamp(shard)
    labels, classes, words = _labels(shard)
    relative = shard.relative_to(path).as_posix()
    found, places = [], []
    unpacked.parent.mkdir(parents=True, exist_ok=True)
    temporary = unpacked.with_name(f".{unpacked.name}.{os.getpid()}")
    try:
        with temporary.open("wb") as flat:
            for data in _images(shard):
                places.append((flat.tell(), len(data)))
                found.append(inspect(data))
                flat.write(data)
        if len(found) != len(labels):
            raise DataError(f"{shard} is damaged: {len(found)} images, {len(labels)} labels")
        temporary.replace(unpacked.with_suffix(".bin"))
    finally:
        temporary.unlink(missing_ok=True)
    both = zip(labels, places, strict=True)
    rows = [(f"{relative}:{row}", test, *one) for row, one in enumerate(both)]
    files = Files.of(rows, classes, [])
    more = {"stamp": np.array(stamp), "words": np.array(words)}
    _Shard.build(files, found, **more).save(unpacked)


def update(path: Path, known: Path, progress: Callable[[str], None]) -> None:
    """Unpack the shards that are new or have changed."""
    shards = _listing(path, known)

    def one(item: tuple[Path, bool, Path]) -> None:
        shard, test, unpacked = item
        if not _is_current(shard, unpacked):
            _unpack(path, shard, test, unpacked)

    with ThreadPoolExecutor(decode_threads()) as threads:
        for count, _ in enumerate(threads.map(one, shards), start=1):
            progress(f"unpacked {count} of {len(shards)} shards")


def load(path: Path, known: Path) -> tuple[Index, Callable[[int], Place]]:
    """Return the index of all shards together, and where the encoded bytes of a row of it are."""
    shards, parts, files = [], [], []
    for shard, _, unpacked in _listing(path, known):
        part = _Shard.load(unpacked)
        if part is None:
            raise DataError(f"{shard} has not been unpacked, or its copy is damaged")
        shards.append(shard)
        parts.append(part)
        files.append(unpacked.with_suffix(".bin"))
    classes = _common_classes(shards, parts)
    if parts[0].words:
        parts = [replace(p, labels=np.searchsorted(classes, p.classes)[p.labels]) for p in parts]
    left_out = [str(shard.relative_to(path)) for shard in by_pool(path)[2]]
    index = Index.join(parts, classes, left_out)
    in_file = np.repeat(np.arange(len(parts)), [len(part) for part in parts])

    def place(row: int) -> Place:
        first, length = index.stamps[row].tolist()
        return files[in_file[row]], first, length

    return index, place


def _common_classes(shards: list[Path], parts: list[_Shard]) -> list[str]:
    """Return the classes of all shards together. Raises DataError where shards contradict."""
    words = [bool(part.words) for part in parts]
    if len(set(words)) > 1:
        raise DataError(
            f"the labels of {shards[words.index(True)]} are words, those of "
            f"{shards[words.index(False)]} are numbers"
        )
    if words[0]:
        return sorted({word for part in parts for word in part.classes.tolist()})
    named = {tuple(part.classes.tolist()): shard for shard, part in zip(shards, parts, strict=True)}
    named.pop((), None)
    if len(named) > 1:
        (names, shard), (others, other) = list(named.items())[:2]
        raise DataError(
            f"{shard} and {other} name different classes, or the same in another order: "
            f"{listed(names)}; {listed(others)}"
        )
    count = max(int(part.labels.max(initial=0)) for part in parts) + 1
    for names, shard in named.items():
        if count > len(names):
            raise DataError(f"a label is {count - 1}, but {shard} names {len(names)} classes")
        return list(names)
    return [str(number) for number in range(count)]
