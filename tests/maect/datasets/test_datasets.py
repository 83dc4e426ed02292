"""The named sets: splits, fingerprints, cache, published formats."""

from __future__ import annotations

import gzip
import io
import json
import os
import pickle
import subprocess
import sys
import tarfile
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from maect import datasets
from maect.datasets import DataError, fetch, named, splits
from maect.datasets.named import CATALOG
from maect.settings import DataSettings

DIGITS = DataSettings(name="digits", image_size=8)
CIFAR10 = DataSettings(name="cifar10", image_size=32)


def test_describing_digits_is_quick_and_imports_no_framework() -> None:
    code = (
        "import sys, time\n"
        "from maect import datasets\n"
        "from maect.settings import DataSettings\n"
        "settings = DataSettings(name='digits', image_size=8)\n"
        "began = time.process_time()\n"
        "info = datasets.describe(settings)\n"
        "took = time.process_time() - began\n"
        "assert info.fingerprint, info\n"
        "found = {'torch', 'torchvision', 'sklearn', 'pyarrow', 'PIL'} & set(sys.modules)\n"
        "assert not found, found\n"
        "assert took < 0.2, took\n"
    )
    subprocess.run([sys.executable, "-c", code], check=True)


def test_digits_are_scikit_learns() -> None:
    load_digits = pytest.importorskip("sklearn.datasets").load_digits
    published = load_digits()
    info = datasets.describe(DIGITS)
    assert info.counts == {"train": 1097, "selection": 200, "test": 500}
    assert info.image_shape == (1, 8, 8)
    manifest = splits.committed("digits")
    assert manifest is not None
    for name, rows in manifest.splits.items():
        split = datasets.load(DIGITS, split=name)
        expected = np.rint(published.images[rows] * 255 / 16)
        assert np.abs(split.batch(np.arange(len(split))).numpy()[:, 0] - expected).max() <= 1
        assert split.batch(np.arange(len(split))).numpy().max() == 255
        assert np.array_equal(split.labels, published.target[rows])


def test_channel_statistics_are_those_of_the_training_split() -> None:
    images = datasets.load(DIGITS, split="train").batch(np.arange(1097)).numpy() / 255
    info = datasets.describe(DIGITS)
    assert info.mean == pytest.approx([images.mean()], abs=1e-4)
    assert info.std == pytest.approx([images.std()], abs=1e-4)


@pytest.mark.parametrize("name", ["digits", "cifar10", "fashion_mnist"])
def test_splits_cover_their_images_once(name: str) -> None:
    manifest = splits.committed(name)
    assert manifest is not None
    rows = np.concatenate(list(manifest.splits.values()))
    assert np.array_equal(np.sort(rows), np.arange(CATALOG[name].pools["train"]))
    train = len(manifest.splits["train"])
    for shots in (1, 2, 5):
        draws = manifest.low_shot[str(shots)]
        assert [len(draw) for draw in draws] == [shots * 10] * 3
        assert len({tuple(draw) for draw in draws}) == 3
    assert [len(draw) for draw in manifest.low_shot["1%"]] == [round(0.01 * train)]
    assert [len(draw) for draw in manifest.low_shot["10%"]] == [round(0.1 * train)]
    assert all(draw.max() < train for draws in manifest.low_shot.values() for draw in draws)


def test_committed_digits_lists_are_what_the_rule_makes() -> None:
    labels = pytest.importorskip("sklearn.datasets").load_digits().target
    made = splits.make_split("digits", labels)
    path = Path(splits.__file__).parents[1] / "splits" / "digits.json"
    assert made == json.loads(path.read_text())


def test_splits_and_low_shot_lists_are_stratified() -> None:
    for name in datasets.SPLITS:
        counts = np.bincount(datasets.load(DIGITS, split=name).labels) / 10
        assert counts.max() - counts.min() < 0.12 * counts.mean()
    labels = datasets.load(DIGITS, split="train").labels
    for shots in (1, 2, 5):
        for draw in datasets.low_shot(DIGITS)[str(shots)]:
            assert np.array_equal(np.bincount(labels[draw]), [shots] * 10)


def test_a_selection_split_of_another_size_leaves_the_test_split_alone() -> None:
    usual, prints = datasets.load(DIGITS, split="test"), {datasets.describe(DIGITS).fingerprint}
    for count in (0, 50):
        settings = DIGITS.model_copy(update={"selection": count})
        info = datasets.describe(settings)
        assert info.counts == {"train": 1297 - count, "selection": count, "test": 500}
        assert np.array_equal(datasets.load(settings, split="test").labels, usual.labels)
        assert len(datasets.load(settings, split="selection")) == count
        assert max(map(max, datasets.low_shot(settings)["10%"])) < 1297 - count
        prints.add(info.fingerprint)
    assert len(prints) == 3
    same = DIGITS.model_copy(update={"selection": 200})
    assert datasets.describe(same).fingerprint in prints
    with pytest.raises(DataError, match="leaves no image of digits"):
        datasets.describe(DIGITS.model_copy(update={"selection": 1297}))


def test_a_changed_manifest_is_refused() -> None:
    made = splits.make_split("digits", np.arange(1797) % 10)
    made["splits"]["test"][0] += 1
    with pytest.raises(DataError, match="hash"):
        splits.parse(made)


def test_unknown_split_and_absent_data_say_what_to_do(tmp_path: Path) -> None:
    with pytest.raises(DataError, match="selection"):
        datasets.load(DIGITS, split="val")
    info = datasets.describe(CIFAR10, tmp_path)
    assert info.fingerprint is None
    assert info.counts == {"train": 45000, "selection": 5000, "test": 10000}
    with pytest.raises(DataError, match="bench data fetch cifar10"):
        datasets.load(CIFAR10, tmp_path)


# ------------------------------------------------------------------ a small CIFAR-10 stands in


@pytest.fixture
def tiny_cifar(monkeypatch: pytest.MonkeyPatch) -> named.Pools:
    """CIFAR-10 with 100 and 20 images instead of 50,000 and 10,000."""
    rng = np.random.default_rng(0)
    pools = {
        name: (rng.integers(0, 256, (count, 3, 32, 32), np.uint8), np.arange(count) % 10)
        for name, count in (("train", 100), ("test", 20))
    }
    entry = replace(
        CATALOG["cifar10"], pools={"train": 100, "test": 20}, content=named.content_hash(pools)
    )
    monkeypatch.setitem(CATALOG, "cifar10", entry)
    monkeypatch.setitem(splits.SIZES, "cifar10", {"selection": 20})
    monkeypatch.setattr(splits, "committed", lambda name: None)
    return pools


def batches(pools: named.Pools) -> dict[str, tuple[np.ndarray, np.ndarray]]:
    """The pools as the six files of the published archives."""
    images, labels = pools["train"]
    parts = {
        f"data_batch_{n + 1}": (images[20 * n : 20 * n + 20], labels[20 * n : 20 * n + 20])
        for n in range(5)
    }
    return {**parts, "test_batch": pools["test"]}


class Python2Pickler(pickle._Pickler):  # type: ignore[name-defined, misc]
    """Writes what the published archives hold: Python 2's strings and NumPy's old names."""

    dispatch = dict(pickle._Pickler.dispatch)  # type: ignore[attr-defined]

    def save_old_string(self, text: bytes | str) -> None:
        data = text.encode("latin1") if isinstance(text, str) else text
        self.write(b"T" + len(data).to_bytes(4, "little") + data)

    dispatch[bytes] = save_old_string
    dispatch[str] = save_old_string


def python2_pickle(value: object) -> bytes:
    file = io.BytesIO()
    Python2Pickler(file, protocol=2).dump(value)
    return file.getvalue().replace(b"numpy._core.multiarray", b"numpy.core.multiarray")


def python_archive(pools: named.Pools, path: Path) -> Path:
    """The layout of cifar-10-python.tar.gz."""
    with tarfile.open(path, "w:gz") as archive:
        for name, (images, labels) in batches(pools).items():
            data = {"data": images.reshape(len(images), -1), "labels": labels.tolist()}
            body = python2_pickle(data)
            member = tarfile.TarInfo(f"cifar-10-batches-py/{name}")
            member.size = len(body)
            archive.addfile(member, io.BytesIO(body))
    return path


def png_folder(pools: named.Pools, path: Path) -> Path:
    """The layout of the npm package."""
    path.mkdir()
    for name, (images, _) in batches(pools).items():
        Image.fromarray(images.transpose(0, 2, 3, 1).reshape(-1, 1024, 3)).save(
            path / f"{name}.png"
        )
    for pool in ("train", "test"):
        (path / f"{pool}_lables.json").write_text(json.dumps(pools[pool][1].tolist()))
    return path


def test_both_published_formats_give_one_fingerprint(
    tiny_cifar: named.Pools, tmp_path: Path
) -> None:
    archive = python_archive(tiny_cifar, tmp_path / "cifar.tar.gz")
    folder = png_folder(tiny_cifar, tmp_path / "sheets")
    prints = []
    for number, source in enumerate((archive, folder)):
        root = tmp_path / str(number)
        fetch.fetch("cifar10", root, from_path=source)
        info = datasets.describe(CIFAR10, root)
        prints.append(info.fingerprint)
        for pool, name in (("test", "test"), ("train", "train")):
            split = datasets.load(CIFAR10, root, name)
            expected = tiny_cifar[pool][0]
            if name == "test":
                assert np.array_equal(split.batch(np.arange(len(split))).numpy(), expected)
            assert len(split) == {"test": 20, "train": 80}[name]
    assert prints[0] is not None
    assert prints[0] == prints[1]


def test_fingerprint_depends_on_pixels_labels_and_splits(
    tiny_cifar: named.Pools, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(CATALOG, "cifar10", replace(CATALOG["cifar10"], content=None))
    seen = set()
    for number in range(4):
        pools = {name: (x.copy(), y.copy()) for name, (x, y) in tiny_cifar.items()}
        if number == 1:
            pools["train"][0][5, 2, 31, 31] ^= 1
        if number == 2:
            pools["test"][1][3] += 1
        if number == 3:
            monkeypatch.setitem(splits.SIZES, "cifar10", {"selection": 10})
        root = tmp_path / str(number)
        named.write("cifar10", root, pools, "test")
        seen.add(datasets.describe(CIFAR10, root).fingerprint)
    assert len(seen) == 4


def test_a_flipped_byte_in_the_cache_is_caught(tiny_cifar: named.Pools, tmp_path: Path) -> None:
    named.write("cifar10", tmp_path, tiny_cifar, "test")
    assert datasets.describe(CIFAR10, tmp_path).fingerprint
    file = tmp_path / "cifar10" / "train_images.npy"
    status = file.stat()
    data = bytearray(file.read_bytes())
    data[5000] ^= 1
    file.write_bytes(data)
    assert datasets.describe(CIFAR10, tmp_path).fingerprint is None
    # even where its size and time hide it, the full check finds it
    os.utime(file, ns=(status.st_atime_ns, status.st_mtime_ns))
    with pytest.raises(DataError, match="checksum"):
        fetch.check("cifar10", tmp_path)
    data[5000] ^= 1
    file.write_bytes(data)
    assert fetch.check("cifar10", tmp_path) == CATALOG["cifar10"].content


def test_a_copied_cache_is_checked_once_and_accepted(
    tiny_cifar: named.Pools, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    named.write("cifar10", tmp_path, tiny_cifar, "test")
    for file in (tmp_path / "cifar10").glob("*.npy"):
        os.utime(file, ns=(1, 1))
    assert datasets.describe(CIFAR10, tmp_path).fingerprint
    monkeypatch.setattr(named, "content_hash", lambda pools: pytest.fail("hashed again"))
    assert datasets.describe(CIFAR10, tmp_path).fingerprint


@pytest.mark.parametrize("damage", ["meta.json", "train_images.npy", "test_labels.npy"])
def test_a_damaged_cache_is_reported_not_raised(
    damage: str, tiny_cifar: named.Pools, tmp_path: Path
) -> None:
    named.write("cifar10", tmp_path, tiny_cifar, "test")
    file = tmp_path / "cifar10" / damage
    file.write_bytes(file.read_bytes()[:40])
    info = datasets.describe(CIFAR10, tmp_path)
    assert info.fingerprint is None
    assert "bench data fetch cifar10" in (info.hint or "")


def test_fashion_mnist_idx_files(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    rng = np.random.default_rng(1)
    images, labels = rng.integers(0, 256, (30, 28, 28), np.uint8), np.arange(30, dtype=np.uint8)
    for part in ("train", "t10k"):
        header = b"\0\0\x08\x03" + np.array([30, 28, 28], ">i4").tobytes()
        (tmp_path / f"{part}-images-idx3-ubyte.gz").write_bytes(
            gzip.compress(header + images.tobytes())
        )
        header = b"\0\0\x08\x01" + np.array([30], ">i4").tobytes()
        (tmp_path / f"{part}-labels-idx1-ubyte").write_bytes(header + labels.tobytes())
    pools = fetch.decode("fashion_mnist", tmp_path)
    assert np.array_equal(pools["train"][0][:, 0], images)
    assert np.array_equal(pools["test"][1], labels)


def test_an_archive_that_would_run_code_is_refused(tiny_cifar: named.Pools, tmp_path: Path) -> None:
    class Evil:
        def __reduce__(self) -> tuple[object, tuple[str]]:
            return os.system, (f"touch {tmp_path / 'ran'}",)

    folder = tmp_path / "cifar-10-batches-py"
    folder.mkdir()
    for name in batches(tiny_cifar):
        (folder / name).write_bytes(pickle.dumps(Evil()))
    with pytest.raises(DataError, match="refers to"):
        fetch.fetch("cifar10", tmp_path / "root", from_path=folder)
    assert not (tmp_path / "ran").exists()
