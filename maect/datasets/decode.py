"""Published file formats of the small sets -> images and labels."""

from __future__ import annotations

import gzip
import io
import json
import pickle
import tarfile
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

import numpy as np

from maect.datasets.base import DataError
from maect.datasets.cache import Pools

#: file name -> bytes of the files a format needs
Files = dict[str, bytes]

_CIFAR10 = (*(f"data_batch_{i}" for i in range(1, 6)), "test_batch")
_CIFAR10_LABELS = ("train_lables.json", "test_lables.json")
_CIFAR100 = ("train", "test")
_IDX = tuple(
    f"{part}-{kind}-ubyte" for part in ("train", "t10k") for kind in ("images-idx3", "labels-idx1")
)


class _ArraysOnly(pickle.Unpickler):
    """Reads what the CIFAR archives hold, and nothing that could run code."""

    def find_class(self, module: str, name: str) -> Any:
        allowed = {
            ("numpy.core.multiarray", "_reconstruct"): np.empty(0).__reduce__()[0],
            ("numpy._core.multiarray", "_reconstruct"): np.empty(0).__reduce__()[0],
            ("numpy", "ndarray"): np.ndarray,
            ("numpy", "dtype"): np.dtype,
        }
        if (module, name) not in allowed:
            raise pickle.UnpicklingError(f"it refers to {module}.{name}")
        return allowed[module, name]


def _pickled(files: Files, names: Iterable[str], labels: bytes) -> tuple[Any, Any]:
    parts = [_ArraysOnly(io.BytesIO(files[name]), encoding="bytes").load() for name in names]
    images = np.concatenate([part[b"data"] for part in parts]).reshape(-1, 3, 32, 32)
    return images, np.concatenate([part[labels] for part in parts])


def _cifar10(files: Files) -> Pools:
    train, test = _CIFAR10[:5], _CIFAR10[5:]
    return {
        "train": _pickled(files, train, b"labels"),
        "test": _pickled(files, test, b"labels"),
    }


def _cifar100(files: Files) -> Pools:
    return {name: _pickled(files, [name], b"fine_labels") for name in _CIFAR100}


def _cifar10_sheets(files: Files) -> Pools:
    """Sheets of 10,000 rows: each row the 32 x 32 pixels of one image."""
    from PIL import Image

    def pool(names: Iterable[str], labels: str) -> tuple[np.ndarray, np.ndarray]:
        opened = [Image.open(io.BytesIO(files[f"{name}.png"]), formats=["PNG"]) for name in names]
        sheets = np.concatenate([np.asarray(sheet.convert("RGB")) for sheet in opened])
        return sheets.reshape(-1, 32, 32, 3).transpose(0, 3, 1, 2), json.loads(files[labels])

    train, test = _CIFAR10_LABELS
    return {"train": pool(_CIFAR10[:5], train), "test": pool(_CIFAR10[5:], test)}


def _idx(files: Files) -> Pools:
    """The format of MNIST: big-endian header of 4 bytes and one size per dimension, then bytes."""

    def array(name: str) -> np.ndarray:
        data = files[name]
        sizes = np.frombuffer(data, ">i4", count=data[3], offset=4)
        return np.frombuffer(data, np.uint8, offset=4 + 4 * data[3]).reshape(sizes)

    return {
        pool: (array(f"{part}-images-idx3-ubyte")[:, None], array(f"{part}-labels-idx1-ubyte"))
        for pool, part in (("train", "train"), ("test", "t10k"))
    }


#: formats of each set: the files, and what reads them
FORMATS: dict[str, list[tuple[tuple[str, ...], Callable[[Files], Pools]]]] = {
    "cifar10": [
        (_CIFAR10, _cifar10),
        ((*(f"{name}.png" for name in _CIFAR10), *_CIFAR10_LABELS), _cifar10_sheets),
    ],
    "cifar100": [(_CIFAR100, _cifar100)],
    "fashion_mnist": [(_IDX, _idx)],
}


def _read_files(path: Path, wanted: set[str]) -> Files:
    """The wanted files in a folder or a tar archive; a .gz is opened under its name without."""
    found: Files = {}

    def add(name: str, read: Callable[[], bytes]) -> None:
        plain = name.removesuffix(".gz")
        if plain in wanted and plain not in found:
            found[plain] = gzip.decompress(read()) if plain != name else read()

    if path.is_dir():
        for file in sorted(path.rglob("*")):
            if file.is_file():
                add(file.name, file.read_bytes)
        return found
    with tarfile.open(path) as archive:
        for member in archive:
            content = archive.extractfile(member) if member.isfile() else None
            if content is not None:
                add(Path(member.name).name, content.read)
    return found


def decode(name: str, path: Path) -> Pools:
    """Return images uint8 [N, C, H, W] and labels int64 [N] of a set from a folder or archive.

    Raises DataError where it holds none of the set's formats or is damaged.
    """
    formats = FORMATS[name]
    try:
        files = _read_files(path, {file for needed, _ in formats for file in needed})
        for needed, read in formats:
            if all(file in files for file in needed):
                return {
                    pool: (np.ascontiguousarray(images, np.uint8), np.asarray(labels, np.int64))
                    for pool, (images, labels) in read(files).items()
                }
    except Exception as error:  # a damaged file can make a decoder raise anything
        raise DataError(f"{path} could not be read as {name}: {error}") from None
    expected = " or ".join(", ".join(needed) for needed, _ in formats)
    missing = min((set(needed) - set(files) for needed, _ in formats), key=len)
    raise DataError(
        f"{path} does not hold {name}: expected {expected}; "
        f"nearest format lacks {', '.join(sorted(missing))}"
    )
