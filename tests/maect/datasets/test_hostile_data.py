"""Folders and shards from a stranger: told by name or worked with, and never in silence.

A new case is a line of `FOLDERS`, `LABELS`, `SHARDS` or `TAILS`.
"""

from __future__ import annotations

import io
import os
import re
import struct
import zlib
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow
import pyarrow.parquet
import pytest
from PIL import Image

from maect import datasets, evals
from maect.datasets import DataError, images, splits
from maect.settings import DataSettings

EPS = b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 9 9\n%%EndComments\nshowpage\n%%EOF\n"


def encode(pixels: np.ndarray, form: str = "PNG", **options: Any) -> bytes:
    file = io.BytesIO()
    Image.fromarray(pixels).save(file, form, **options)
    return file.getvalue()


def picture(number: int) -> bytes:
    return encode(np.random.default_rng(number).integers(0, 256, (6, 5, 3), np.uint8))


def claiming(width: int, height: int) -> bytes:
    """A PNG whose header claims a size."""
    data = bytearray(picture(0))
    data[16:24] = struct.pack(">II", width, height)
    data[29:33] = struct.pack(">I", zlib.crc32(data[12:29]))
    return bytes(data)


def tiled(side: int) -> bytes:
    """A grey TIFF of 16 x 16 pixels, compressed, whose tile claims to be larger."""
    data = zlib.compress(bytes(side))
    tags = {256: 16, 257: 16, 258: 8, 259: 8, 262: 1, 277: 1, 322: side, 323: side}
    tags |= {324: 10 + 12 * 10 + 4, 325: len(data)}  # where the tile is, and its length
    entries = b"".join(struct.pack("<HHII", tag, 4, 1, value) for tag, value in tags.items())
    return struct.pack("<2sHIH", b"II", 42, 8, len(tags)) + entries + bytes(4) + data


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """40 training and 4 test images of two classes."""
    path = tmp_path / "set"
    for pool, count in (("train", 40), ("val", 4)):
        for number in range(count):
            file = path / pool / f"c{number % 2}" / f"{number:02}.png"
            file.parent.mkdir(parents=True, exist_ok=True)
            file.write_bytes(picture(number + 100 * (pool == "val")))
    return path


def told(settings: DataSettings, root: Path) -> str:
    """What is said of a set: an error, or its notes and the images left out of it."""
    try:
        info = datasets.prepare(settings, root)
        assert info == datasets.describe(settings, root)
    except DataError as error:
        text = str(error)
    else:
        text = "; ".join([*info.notes, *(f"{file}: {reason}" for file, reason in info.broken)])
        for split in datasets.SPLITS:  # all of it can be used
            loaded = datasets.load(settings, root, split)
            assert len(loaded.batch(np.arange(len(loaded)))) == info.counts[split]
    assert text.isprintable(), text
    return text


def write(name: str | bytes, data: bytes) -> Callable[[Path], None]:
    def change(path: Path) -> None:
        file = path / os.fsdecode(name)
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_bytes(data)

    return change


def link(name: str, to: str) -> Callable[[Path], None]:
    return lambda path: (path / name).symlink_to(to)


def sparse(name: str, size: int) -> Callable[[Path], None]:
    def change(path: Path) -> None:
        with (path / name).open("wb") as file:
            file.truncate(size)

    return change


def fifo_behind_a_link(path: Path) -> None:
    os.mkfifo(path / "pipe")
    (path / "train/c0/x.png").symlink_to(path / "pipe")


#: what is done to a folder, and what is then said
FOLDERS: dict[str, tuple[Callable[[Path], Any], str]] = {
    "another format": (write("train/c0/x.jpg", EPS), r"train/c0/x\.jpg: not an image of these"),
    "a pipe": (lambda p: os.mkfifo(p / "train/c0/x.png"), r"c0/x\.png: .*is no regular file"),
    "a link to a pipe": (fifo_behind_a_link, r"c0/x\.png: .*is no regular file"),
    "a broken test image": (write("val/c1/x.png", b""), r"never cut: val/c1/x\.png \(empty file\)"),
    "a link to nothing": (link("train/c0/x.png", "gone"), r"c0/x\.png: cannot be opened: No such"),
    "a folder for an image": (
        lambda p: (p / "val/c1/x.png").mkdir(),
        r"val/c1/x\.png is a folder",
    ),
    "no training images": (lambda p: (p / "train").rename(p / "other"), "expected train/<class>"),
    "no test images": (lambda p: (p / "val").rename(p / "other"), "expected train/<class>"),
    "a device": (link("train/c0/x.png", "/dev/zero"), r"c0/x\.png: .*is no regular file"),
    "a loop": (link("train/c0/x.png", "x.png"), r"c0/x\.png: .*[Tt]oo many levels"),
    "a loop for a test image": (link("val/c0/x.png", "x.png"), r"val/c0/x\.png \(.*levels"),
    "a loop for a class": (link("train/c2", "c2"), r"left out.*: train/c2"),
    "a large file": (sparse("train/c0/x.png", 2**30), r"c0/x\.png: .*1,073,741,824 bytes"),
    "a large picture": (write("train/c0/x.png", claiming(10_000, 10_000)), "more than 89,478,485"),
    "a huge picture": (write("train/c0/x.png", claiming(2**30, 2**30)), "more than 89,478,485"),
    "a large tile": (write("train/c0/x.tif", tiled(2**15)), r"x\.tif: more than 89,478,485"),
    "a name that is no UTF-8": (write(b"train/c0/\xff.png", b""), r"train/c0/\\xff\.png: empty"),
    "a class that is no UTF-8": (write(b"train/\xfe/x.png", picture(7)), r"test split.*: \\xfe"),
    "an escape code": (write("train/c0/\x1b[2J.png", b""), r"c0/\\x1b\[2J\.png: empty file"),
    "an empty class": (lambda p: (p / "train/b").mkdir(), "count nowhere: b$"),
    "two empty classes": (
        lambda p: [(p / pool / "c00").mkdir() for pool in ("train", "val")],
        "count nowhere: c00$",
    ),
    "a class of broken images": (write("train/b/x.png", b""), "count nowhere: b;"),
    "a class of other files": (write("train/b/x.txt", b""), "train/b/x.txt.*count nowhere: b$"),
    "a class without test images": (
        lambda p: [file.unlink() for file in (p / "val/c1").iterdir()],
        "the test split has no images of 1 of 2 classes: c1",
    ),
    "a class without training images": (
        write("val/other/x.png", picture(7)),
        "test images are of classes that no usable training image has: other",
    ),
    "images in no class": (write("val/x.JPEG", picture(7)), r"val/x\.JPEG.* val/<class>/<file>"),
    "what desktops leave": (
        lambda p: [
            write(name, b"")(p)
            for name in ("train/Thumbs.db", "train/c0/desktop.ini", "train/c0/._x.jpg",
                         "val/c0/.DS_Store", "val/README.txt", "train/@eaDir/c0/y.jpg",
                         "train/c0/@eaDir/x.jpg/SYNO_THUMB.jpg", "train/c1/metadata.parquet")
        ],
        r"^assumed.*files left out for their names \(8\): train/@eaDir, train/Thumbs\.db",
    ),
    "two test folders": (
        write("test/c0/x.png", picture(7)), r"files left out for their names \(1\): test$"
    ),
}  # fmt: skip


@pytest.mark.parametrize("case", FOLDERS)
def test_a_folder_from_a_stranger(case: str, folder: Path, tmp_path: Path) -> None:
    change, expected = FOLDERS[case]
    change(folder)
    settings = DataSettings(name="image_folder", path=str(folder), max_broken=0.5)
    assert datasets.kind_of(folder) == "image_folder"
    assert re.search(expected, told(settings, tmp_path / "root"))


def test_a_picture_starts_no_program(
    folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from PIL import EpsImagePlugin

    program = tmp_path / "bin" / "gs"
    program.parent.mkdir()
    program.write_text(f"#!/bin/sh\ntouch {tmp_path / 'started'}\n")
    program.chmod(0o755)
    monkeypatch.setenv("PATH", f"{program.parent}:{os.environ['PATH']}")
    monkeypatch.setattr(EpsImagePlugin, "gs_binary", None)
    assert images.inspect(EPS).reason
    assert not (tmp_path / "started").exists()


def test_an_empty_class_changes_no_label(folder: Path, tmp_path: Path) -> None:
    """Whether it stands before or behind the others, in the folders of one split or of both."""
    settings = DataSettings(name="image_folder", path=str(folder))
    sound = datasets.prepare(settings, tmp_path / "root")
    for name in ("a", "c00", "d"):
        (folder / "train" / name).mkdir()
    info = datasets.prepare(settings, tmp_path / "root")
    assert (info.classes, info.counts, info.fingerprint) == (2, sound.counts, sound.fingerprint)
    assert set(datasets.load(settings, tmp_path / "root", "test").labels) == {0, 1}


def test_other_counts_than_there_are_is_told(folder: Path, tmp_path: Path) -> None:
    settings = DataSettings(name="image_folder", path=str(folder), train_images=1000)
    assert "train_images says 1000, there are 40" in told(settings, tmp_path / "root")
    settings = DataSettings(name="image_folder", path=str(folder), classes=3)
    assert "has 2 classes, the suite says 3" in told(settings, tmp_path / "root")


# ----------------------------------------------------------------------------------------- shards

KIND = pyarrow.struct([("bytes", pyarrow.binary()), ("path", pyarrow.string())])
SHARD = "train-00000-of-00002.parquet"


def table(first: int, labels: Any, names: list[str] | None = None) -> pyarrow.Table:
    cells = [{"bytes": picture(first + row), "path": None} for row in range(len(labels))]
    columns = {"image": pyarrow.array(cells, KIND), "label": labels}
    if names is None:
        return pyarrow.table(columns)
    quoted = ", ".join(f'"{name}"' for name in names)
    note = f'{{"info": {{"features": {{"label": {{"names": [{quoted}]}}}}}}}}'
    return pyarrow.table(columns).replace_schema_metadata({"huggingface": note})


def put(path: Path, *tables: pyarrow.Table) -> None:
    """Write tables as two training shards and a test shard."""
    path.mkdir(exist_ok=True)
    names = (SHARD, "train-00001-of-00002.parquet", "validation-00000-of-00001.parquet")
    for name, content in zip(names, tables, strict=True):
        pyarrow.parquet.write_table(content, path / name)


def rows(*given: Any, kind: Any = None) -> pyarrow.Array:
    """30 labels: those given, in turn."""
    return pyarrow.array([given[row % len(given)] for row in range(30)], kind)


#: labels of the three shards, names of the classes in each where there are some, and what is said
LABELS: dict[str, tuple[list[Any], list[list[str] | None], str]] = {
    "numbers": ([rows(0, 1)] * 3, [None] * 3, "^assumed[^;]*$"),
    "numbers with names": ([rows(0, 1)] * 3, [["a", "b"]] * 3, "^assumed[^;]*$"),
    "names in one shard": ([rows(0, 1)] * 3, [["a", "b"], None, None], "^assumed[^;]*$"),
    "words": ([rows("dog", "cat")] * 3, [None] * 3, "^assumed[^;]*$"),
    "dictionaries": ([rows("dog", "cat").dictionary_encode()] * 3, [None] * 3, "^assumed[^;]*$"),
    "whole decimals": ([rows(0.0, 1.0)] * 3, [None] * 3, "^assumed[^;]*$"),
    "some words": ([rows("a"), rows("b"), rows("a", "b")], [None] * 3, "^assumed[^;]*$"),
    "unknown words": ([rows("a"), rows("b"), rows("a", "z")], [None] * 3, "no usable .* has: z"),
    "unknown numbers": ([rows(0), rows(1), rows(0, 2)], [None] * 3, "no usable .* has: 2"),
    "words and numbers": ([rows("a"), rows("b"), rows(0)], [None] * 3, "are words.*are numbers"),
    "gaps": ([rows(0, 7)] * 3, [None] * 3, "count nowhere: 1, 2, 3, 4, 5, 6$"),
    "more names": ([rows(0, 2)] * 3, [["a", "b", "c"]] * 3, "count nowhere: b$"),
    "fewer names": ([rows(0, 2)] * 3, [["a", "b"]] * 3, f"{SHARD}: the label of row 1 is 2"),
    "fewer names elsewhere": ([rows(0, 2)] * 3, [None, None, None], "count nowhere: 1$"),
    "fewer names than numbers": (
        [rows(0, 1), rows(0, 2), rows(0)],
        [["a", "b"], None, None],
        "a label is 2, but .* names 2 classes",
    ),
    "another order": ([rows(0, 1)] * 3, [["a", "b"]] * 2 + [["b", "a"]], "another order: a, b; b"),
    "a large number": ([rows(0, 300_000_000)] * 3, [None] * 3, f"{SHARD}: .*row 1 is 300000000"),
    "a huge number": ([rows(0, 2**64 - 1, kind="uint64")] * 3, [None] * 3, f"{SHARD}: .*row 1 is"),
    "infinity": ([rows(0.0, float("inf"))] * 3, [None] * 3, f"{SHARD}: the label of row 1 is inf"),
    "no number": ([rows(0.0, float("nan"))] * 3, [None] * 3, f"{SHARD}: the label of row 1 is nan"),
    "halves": ([rows(0.0, 0.5)] * 3, [None] * 3, f"{SHARD}: the label of row 1 is 0.5"),
    "none": ([rows(0, None)] * 3, [None] * 3, f"{SHARD}: the label of row 1 is (None|-1);"),
    "no words": ([rows("a", None)] * 3, [None] * 3, f"{SHARD}: the label of row 1 is (None|-1);"),
    "negative": ([rows(0, -1)] * 3, [None] * 3, f"{SHARD}: the label of row 1 is (None|-1);"),
    "lists": ([rows([0], [1])] * 3, [None] * 3, f"{SHARD} .*neither numbers nor words"),
}


@pytest.mark.parametrize("case", LABELS)
def test_labels_from_a_stranger(case: str, tmp_path: Path) -> None:
    labels, names, expected = LABELS[case]
    put(tmp_path / "set", *(table(40 * i, labels[i], names[i]) for i in range(3)))
    assert datasets.kind_of(tmp_path / "set") == "parquet"
    settings = DataSettings(name="parquet", path=str(tmp_path / "set"))
    assert re.search(expected, told(settings, tmp_path / "root"))


def test_words_are_classes_in_the_order_of_the_words(tmp_path: Path) -> None:
    put(tmp_path / "set", *(table(40 * i, rows(*w)) for i, w in enumerate(["ba", "cb", "ca"])))
    settings, root = DataSettings(name="parquet", path=str(tmp_path / "set")), tmp_path / "root"
    assert datasets.prepare(settings, root).classes == 3
    assert datasets.load(settings, root, "test").labels.tolist() == [2, 0] * 15


def other_column(name: str, values: Any) -> Callable[[Path], None]:
    def change(path: Path) -> None:
        content = table(0, rows(0, 1))
        place = content.schema.get_field_index(name)
        column = content.remove_column(place)
        pyarrow.parquet.write_table(
            column if values is None else column.append_column(name, values), path / SHARD
        )

    return change


def pipe(path: Path) -> None:
    (path / SHARD).unlink()
    os.mkfifo(path / SHARD)


def directory(path: Path) -> None:
    (path / SHARD).unlink()
    (path / SHARD).mkdir()


def cut(count: int) -> Callable[[Path], None]:
    return lambda path: (path / SHARD).write_bytes((path / SHARD).read_bytes()[:count])


def without_bytes(path: Path) -> None:
    cells = [None, {"bytes": None, "path": "x.png"}] * 15
    other_column("image", pyarrow.array(cells, KIND))(path)


#: what is done to shards, and what is then said
SHARDS: dict[str, tuple[Callable[[Path], None], str]] = {
    "cut": (cut(-200), f"{SHARD} is damaged"),
    "cut to nothing": (cut(0), f"{SHARD} is damaged"),
    "no Parquet": (write(SHARD, b"PAR1 nothing PAR1"), f"{SHARD} is damaged"),
    "a pipe": (pipe, f"{SHARD} is no regular file"),
    "a folder": (directory, f"{SHARD} is no regular file"),
    "a loop": (lambda p: [(p / SHARD).unlink(), link(SHARD, SHARD)(p)], f"{SHARD} cannot be read"),
    "no labels": (other_column("label", None), f"{SHARD} .*label"),
    "no images": (other_column("image", None), f"{SHARD} .*image"),
    "numbers for images": (other_column("image", rows(1)), f"{SHARD} .*no shard with columns"),
    "words for images": (other_column("image", rows("x")), f"{SHARD} .*no shard with columns"),
    "bytes for images": (other_column("image", rows(b"x")), f"{SHARD} .*no shard with columns"),
    "images without bytes": (without_bytes, f"{SHARD}:0 .empty file"),
    "no training shards": (
        lambda p: [shard.unlink() for shard in p.glob("train-*")],
        r"lacks training shards: expected files named train-\*\.parquet",
    ),
    "a stray table": (write("metadata.parquet", b""), r"left out .*: metadata\.parquet"),
    "two test sets": (write("test-0.parquet", b""), r"left out .*: test-0\.parquet"),
}


@pytest.mark.parametrize("case", SHARDS)
def test_shards_from_a_stranger(case: str, tmp_path: Path) -> None:
    change, expected = SHARDS[case]
    put(tmp_path / "set", *(table(40 * i, rows(0, 1)) for i in range(3)))
    change(tmp_path / "set")
    settings = DataSettings(name="parquet", path=str(tmp_path / "set"))
    assert re.search(expected, told(settings, tmp_path / "root"))


@pytest.mark.parametrize("path", ["nowhere", "~nobody/x", "x" * 5000, "loop", "loop/train", "a\0b"])
@pytest.mark.parametrize("name", ["image_folder", "parquet"])
def test_a_folder_that_cannot_be_is_told(
    path: str, name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    Path("loop").symlink_to("loop")
    settings = DataSettings(name=name, path=path)  # type: ignore[arg-type]
    for ask in (datasets.prepare, datasets.describe, datasets.load):
        with pytest.raises(DataError, match="there is no folder"):
            ask(settings, tmp_path)


# -------------------------------------------------------------------------------- few of a class

#: training images of each class
TAILS = {
    "balanced": [20, 20, 20],
    "one class with two": [50, 2, 30],
    "the last class with one": [50, 30, 1],
    "an empty class": [50, 0, 30],
    "first classes empty": [0, 0, 30, 4],
    "one image each": [1, 1, 1],
    "one image": [1],
    "a long tail": [500, 100, 20, 5, 2, 1, 1],
}


@pytest.mark.parametrize("case", TAILS)
def test_no_image_is_drawn_twice_and_no_class_over_its_share(case: str) -> None:
    counts = np.array(TAILS[case])
    labels = np.random.default_rng(0).permutation(np.repeat(np.arange(len(counts)), counts))
    drawn = splits.make_low_shot("x", labels)
    for budget, draws in drawn.items():
        for draw in draws:
            assert len(set(draw.tolist())) == len(draw)
            got = np.bincount(labels[draw], minlength=len(counts))
            if budget.endswith("%"):
                size = max(round(splits.SHARES[budget] * len(labels)), int((counts > 0).sum()))
                assert got.sum() == size
                assert (np.abs(got - counts * size / len(labels)) < 1).all()
            else:
                assert got.tolist() == np.minimum(counts, int(budget)).tolist()


def features(labels: list[int], seed: int) -> evals.Features:
    import torch

    x = torch.from_numpy(np.random.default_rng(seed).standard_normal((len(labels), 8))).float()
    return evals.Features(x, torch.tensor(labels))


@pytest.mark.parametrize("case", TAILS)
def test_low_shot_tells_the_classes_that_lack_images(case: str) -> None:
    counts = np.array(TAILS[case])
    labels = np.repeat(np.arange(len(counts)), counts)
    test = features(list(range(len(counts))), 1)
    draws = {k: [d.tolist() for d in ds] for k, ds in splits.make_low_shot("x", labels).items()}
    data = evals.EvalInput(
        features(labels.tolist(), 0), test, test, classes=len(counts), low_shot=draws
    )
    evaluator = evals.get("low_shot")
    result = evaluator.run(data, evaluator.settings(budgets=["1", "5", "10%"]))
    for note, budget in (("1-shot: ", 1), ("5-shot: ", 5)):
        lacking = np.flatnonzero(counts < budget)
        told = [line for line in result.notes if line.startswith(note) and "fewer" in line]
        assert len(told) == bool(len(lacking))
        for label in lacking:
            assert f"{counts[label]} of class {label}" in told[0]


@pytest.mark.parametrize("each", [1, 10])
@pytest.mark.parametrize(("present", "classes"), [([0, 1, 2], 3), ([0, 2], 3), ([1], 4)])
def test_there_are_as_many_clusters_as_the_images_have_classes(
    present: list[int], classes: int, each: int
) -> None:
    test = features(present * each, 1)
    data = evals.EvalInput(test, test, test, classes=classes)
    evaluator = evals.get("cluster")
    result = evaluator.run(data, evaluator.settings())
    assert result.protocol["clusters"] == len(present)
    assert len(np.unique(result.predictions["cluster"])) == len(present)
    assert any("classes have test images" in note for note in result.notes) == (
        len(present) < classes
    )
