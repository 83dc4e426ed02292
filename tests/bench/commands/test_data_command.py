"""`bench data`: a set from a folder at hand, listed, checked, damaged, got again."""

from __future__ import annotations

import io
import json
from dataclasses import replace
from pathlib import Path

import numpy as np
import pyarrow
import pyarrow.parquet
import pytest
from bench_helpers import Bench
from PIL import Image

from maect.datasets import CATALOG, describe, named, splits
from maect.datasets.named import Source
from maect.settings import DataSettings


@pytest.fixture
def files(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder in Fashion-MNIST's format with 60 and 20 images, which is then what is published."""
    random = np.random.default_rng(0)
    pools, folder = {}, tmp_path / "files"
    folder.mkdir()
    for pool, part, count in (("train", "train", 60), ("test", "t10k", 20)):
        images = random.integers(0, 256, (count, 1, 28, 28), np.uint8)
        labels = np.arange(count, dtype=np.uint8) % 10
        pools[pool] = (images, labels.astype(np.int64))
        for kind, array in (("images-idx3", images[:, 0]), ("labels-idx1", labels)):
            header = bytes([0, 0, 8, array.ndim]) + np.array(array.shape, ">i4").tobytes()
            (folder / f"{part}-{kind}-ubyte").write_bytes(header + array.tobytes())
    entry = replace(
        CATALOG["fashion_mnist"],
        pools={"train": 60, "test": 20},
        content=named.content_hash(pools),
        sources=(Source("url", "http://localhost:9/", {"a": "md5:0"}),),
    )
    monkeypatch.setitem(CATALOG, "fashion_mnist", entry)
    monkeypatch.setitem(splits.SIZES, "fashion_mnist", {"selection": 10})
    monkeypatch.setattr(splits, "committed", lambda name: None)
    monkeypatch.setenv("MAECT_DATA", str(tmp_path / "data"))
    return folder


def state(bench: Bench) -> dict[str, object]:
    listed = json.loads(bench("data", "ls", "fashion_mnist", "--json").out)
    return {name: listed[0][name] for name in ("images", "fingerprint", "hint")}


def test_a_set_is_fetched_listed_and_checked(files: Path, bench: Bench, tmp_path: Path):
    assert state(bench)["fingerprint"] is None
    assert "bench data fetch fashion_mnist" in bench("data", "ls").out
    done = bench("data", "fetch", "fashion_mnist")
    assert done.code == 2
    assert "http://localhost:9/: not reachable" in done.err
    assert done.err.strip().endswith("bench data fetch fashion_mnist --from PATH")

    done = bench("data", "fetch", "fashion_mnist", "--from", files)
    assert done.code == 0, done.err
    here = state(bench)
    assert here["images"] == {"train": 50, "selection": 10, "test": 20}
    assert str(here["fingerprint"])[:12] in done.out
    assert bench("data", "fetch", "fashion_mnist").out.startswith("fashion_mnist: here, from cache")

    done = bench("data", "check")
    assert done.code == 0
    assert [line.split(": ")[:2] for line in done.out.splitlines()] == [
        ["digits", f"ok, content {(CATALOG['digits'].content or '')[:12]}"],
        ["fashion_mnist", f"ok, content {(CATALOG['fashion_mnist'].content or '')[:12]}"],
    ]
    file = tmp_path / "data" / "fashion_mnist" / "test_images.npy"
    data = bytearray(file.read_bytes())
    data[-1] ^= 1
    file.write_bytes(data)
    done = bench("data", "check")  # names none, finds it all the same
    assert done.code == 3
    assert "do not match their checksum; run: python -m bench data fetch" in done.err
    assert state(bench)["fingerprint"] is None
    assert bench("data", "fetch", "fashion_mnist", "--from", files).code == 0
    assert state(bench) == here


def test_files_of_other_images_are_refused(files: Path, bench: Bench, tmp_path: Path):
    file = files / "train-images-idx3-ubyte"
    data = bytearray(file.read_bytes())
    data[-1] ^= 1
    file.write_bytes(data)
    done = bench("data", "fetch", "fashion_mnist", "--from", files)
    assert done.code == 2
    assert "does not hold the published images of fashion_mnist" in done.err
    assert not (tmp_path / "data" / "fashion_mnist").exists()


def test_a_data_directory_that_cannot_be_written_is_named(
    files: Path, bench: Bench, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    (tmp_path / "taken").write_text("")
    monkeypatch.setenv("MAECT_DATA", str(tmp_path / "taken"))
    for more in ([], ["--from", files]):
        done = bench("data", "fetch", "fashion_mnist", *more)
        assert done.code == 2
        assert f"could not be kept in {tmp_path / 'taken'}" in done.err
        assert len(done.err.splitlines()) == 1


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        (["fetch", "cifar1"], "did you mean 'cifar10'?"),
        (["fetch"], "say which"),
        (["fetch", "cifar10", "cifar100", "--from", "x"], "one data set at a time"),
        (["fetch", "cifar10", "--from", "nothing"], "there is no nothing"),
        (["check", "cifar100"], "python -m bench data fetch cifar100"),
        (["check", "nowhere"], "neither a data set nor a folder"),
        (["check", "x" * 5000], "neither a data set nor a folder"),
        (["fetch", "."], "there is no data set '.'"),
    ],
)
def test_mistakes_are_told_in_a_sentence(
    arguments: list[str], says: str, bench: Bench, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.setenv("MAECT_DATA", str(tmp_path))
    done = bench("data", *arguments)
    assert done.code == (3 if arguments == ["check", "cifar100"] else 2)
    assert says in done.err + done.out
    assert len((done.err + done.out).splitlines()) == 1


@pytest.mark.parametrize("kind", ["image_folder", "parquet"])
def test_a_folder_of_images_or_shards_is_checked(
    kind: str, bench: Bench, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    """And is then known to a suite that names it."""
    monkeypatch.setenv("MAECT_DATA", str(tmp_path / "data"))
    path, image = tmp_path / "a set", io.BytesIO()
    Image.new("RGB", (8, 8)).save(image, "PNG")
    if kind == "parquet":
        path.mkdir()
        cells = pyarrow.array([{"bytes": image.getvalue(), "path": None}] * 20)
        table = pyarrow.table({"image": cells, "label": ["cat", "dog"] * 10})
        for name in ("train-0.parquet", "test-0.parquet"):
            pyarrow.parquet.write_table(table, path / name)
    else:
        for number in range(40):
            file = path / ("train", "val")[number % 2] / f"class{number // 20}" / f"{number}.png"
            file.parent.mkdir(parents=True, exist_ok=True)
            file.write_bytes(image.getvalue())
        (path / "metadata.parquet").write_bytes(b"")
    settings = DataSettings(name=kind, path=str(path))  # type: ignore[arg-type]
    assert f"not been checked yet; run: python -m bench data check '{path}'" in (
        describe(settings).hint or ""
    )
    done = bench("data", "check", path)
    assert done.code == 0, done.err
    print_ = str(describe(settings).fingerprint)[:12]
    line = f"2 classes, 20 train, 0 selection, 20 test: here, fingerprint {print_}"
    assert line in done.out
    assert line in bench("data", "ls", path).out
    assert "note: the selection split has no images of 2 of 2 classes" in done.out
    file = path / ("test-0.parquet" if kind == "parquet" else "val/class0/1.png")
    file.write_bytes(file.read_bytes()[:20])
    done = bench("data", "check", path)
    assert done.code == 3
    assert file.name in done.err
    assert len(done.err.splitlines()) == 1
