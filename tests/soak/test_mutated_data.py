"""Mutated image folders and Parquet shards: told by name or worked with, in bounded memory."""

from __future__ import annotations

import io
import os
import random
import re
import struct
import zlib
from hashlib import sha256
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow
import pyarrow.parquet
import pytest
from PIL import Image
from soak_helpers import cases, draw, told, unchanged

from maect import datasets
from maect.datasets import DataError
from maect.settings import DataSettings

#: MiB by which the process may grow while pictures are decoded, whatever they claim: six copies of
#: the largest picture's pixels, some of them this test's own; 1,254 is the most that was seen
MEMORY_MIB = 1536
FORMATS = ("PNG", "JPEG", "BMP", "PPM", "TIFF", "WEBP")
SHARDS = ("train-0", "train-1", "validation-0")
KIND = pyarrow.struct([("bytes", pyarrow.binary()), ("path", pyarrow.string())])
TRAIN, TEST = 36, 6
#: beginnings of files of other formats, and of none
OTHERS = (
    b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 9 9\n%%EOF\n",
    b"%PDF-1.7\n",
    b"<svg/>",
    b"\0\0\1\0\1\0\x10\x10\0\0\1\0\x20\0",
    b"SIMPLE  =                    T",
    b"\x1f\x8b\x08",
    b"\x0a\x05\x01\x08",
    b"8BPS\0\1",
    b"II*\0\xff\xff\xff\x7f",
    b"GIF89a\xff\xff\xff\xff",
    b"",
)


def picture(number: int) -> bytes:
    pixels = np.random.default_rng(number).integers(0, 256, (9, 12, 3), np.uint8)
    file = io.BytesIO()
    Image.fromarray(pixels).save(file, FORMATS[number % len(FORMATS)])
    return file.getvalue()


def png(width: int, height: int, compressed: bytes, kind: int = 0) -> bytes:
    """A PNG of 8-bit grey values, or of `kind` 2 RGB, that claims a size."""

    def chunk(name: bytes, data: bytes) -> bytes:
        return (
            struct.pack(">I", len(data)) + name + data + struct.pack(">I", zlib.crc32(name + data))
        )

    header = struct.pack(">IIBBBBB", width, height, 8, kind, 0, 0, 0)
    body = chunk(b"IHDR", header) + chunk(b"IDAT", compressed) + chunk(b"IEND", b"")
    return b"\x89PNG\r\n\x1a\n" + body


# ------------------------------------------------------------------------- what is done to bytes


def flipped(data: bytes, random: random.Random) -> bytes:
    found = bytearray(data)
    most = random.choice((40, len(found)))  # headers more often than the rest
    for _ in range(random.randint(1, 8)):
        found[random.randrange(min(most, len(found)))] ^= 1 << random.randrange(8)
    return bytes(found)


def cut(data: bytes, random: random.Random) -> bytes:
    return data[: random.randrange(len(data))]


def stretched(data: bytes, random: random.Random) -> bytes:
    at = random.randrange(len(data))
    return data[:at] + random.randbytes(random.randint(1, 300)) + data[at:]


def other(data: bytes, random: random.Random) -> bytes:
    return random.choice(OTHERS) + random.randbytes(random.choice((0, 50)))


def claiming(data: bytes, random: random.Random) -> bytes:
    """A picture whose header claims to be larger than its data."""
    side = random.choice((5000, 9400, 9500, 30_000, 2**16 - 1, 2**31 - 1))
    words = struct.pack(">I", side), struct.pack("<I", side), struct.pack(">H", side & 0xFFFF)
    choice = random.choice(("PNG", "BMP", "JPEG", "PPM", "GIF"))
    if choice == "PNG":
        return png(side, side, zlib.compress(bytes(1000)), random.choice((0, 2)))
    if choice == "PPM":
        return f"P6 {side} {side} 255\n".encode() + bytes(1000)
    if choice == "GIF":
        return b"GIF89a" + 2 * struct.pack("<H", side & 0xFFFF) + bytes(50)
    found = bytearray(picture(FORMATS.index(choice)))
    if choice == "BMP":
        found[18:26] = 2 * words[1]
    else:
        at = found.index(b"\xff\xc0") + 5
        found[at : at + 4] = 2 * words[2]
    return bytes(found)


def bomb(data: bytes, random: random.Random) -> bytes:
    """A picture that is as large as it claims, in few bytes."""
    side, kind = random.choice((4000, 9459, 9500)), random.choice((0, 2))
    packer = zlib.compressobj(1)
    row = bytes(1 + side * (1 + kind))
    return png(
        side, side, b"".join(packer.compress(row) for _ in range(side)) + packer.flush(), kind
    )


BYTES = (flipped, flipped, cut, stretched, other, claiming, bomb)

# ------------------------------------------------------------------- what is done to a data set


def folder_of(path: Path) -> None:
    for pool, count in (("train", TRAIN), ("val", TEST)):
        for number in range(count):
            end = FORMATS[number % len(FORMATS)].lower()
            file = path / pool / f"class{number % 3}" / f"{number:02}.{end}"
            file.parent.mkdir(parents=True, exist_ok=True)
            file.write_bytes(picture(number + 1000 * (pool == "val")))


def changed_folder(path: Path, random: random.Random) -> str:
    """Change one file. Return the name that a message has to have, if there is a message."""
    file = random.choice(sorted(path.rglob("*.*")))
    how = random.choice((*BYTES, *BYTES, "pipe", "device", "loop", "folder", "name", "class"))
    if callable(how):
        file.write_bytes(how(file.read_bytes(), random))
        return file.name
    if how == "class":
        file.parent.rename(file.parent.with_name(os.fsdecode(b"\xffother")))
        return "of classes"
    content = file.read_bytes()
    file.unlink()
    if how == "pipe":
        os.mkfifo(file)
    elif how == "folder":
        file.mkdir()
    elif how == "name":
        file.with_name(os.fsdecode(b"\xfe\x1b" + random.randbytes(1).hex().encode() + b".PNG")
                       ).write_bytes(content)  # fmt: skip
        return r"\xfe\x1b"
    else:
        file.symlink_to("/dev/zero" if how == "device" else file.name)
    return file.name


def table(shard: str, random: random.Random | None = None) -> pyarrow.Table:
    """The images and labels of a shard; with `random`, one column of another kind."""
    first = 100 * SHARDS.index(shard)
    count = TEST if shard == "validation-0" else TRAIN // 2
    cells: Any = [{"bytes": picture(first + row), "path": None} for row in range(count)]
    labels: Any = [row % 3 for row in range(count)]
    note = b'{"info": {"features": {"label": {"names": ["a", "b", "c"]}}}}'
    images = pyarrow.array(cells, KIND)
    if random is not None:
        row, what = random.randrange(count), random.randrange(5)
        if what == 0:  # of one row
            labels[row] = random.choice((None, -1, 3, 300_000_000, 2**62))
        elif what == 1:  # of all
            kind = random.choice((float, str, lambda n: [n], lambda n: {"a": n}, lambda n: b"x"))
            labels = [kind(label) for label in labels]
        elif what == 2:
            labels = [float(label) for label in labels]
            labels[row] = random.choice((float("nan"), float("inf"), 0.5, -1.0))
        elif what == 3:
            images = random.choice((pyarrow.array(labels), images.field(0), images.field(1),
                                    pyarrow.array([["x"]] * count)))  # fmt: skip
        else:
            note = random.choice((b"{", b"[]", b"[" * 100_000, note.replace(b'"b"', b'"d"'),
                                  b'{"info": {"features": {"label": {"names": 7}}}}'))  # fmt: skip
    names = ["image", "label"] if random is None or random.random() < 0.9 else ["picture", "label"]
    return pyarrow.table([images, labels], names).replace_schema_metadata({b"huggingface": note})


def shards_of(path: Path) -> None:
    path.mkdir()
    for shard in SHARDS:
        pyarrow.parquet.write_table(
            table(shard), path / f"{shard}.parquet", row_group_size=5, write_page_checksum=True
        )


def changed_shards(path: Path, random: random.Random) -> str:
    shard = random.choice(SHARDS)
    file, how = path / f"{shard}.parquet", random.randrange(4)
    if how == 0:
        content = table(shard, random)
    elif how == 1:
        content = table(shard)
        cells = content.column("image").to_pylist()
        row = random.randrange(len(cells))
        cells[row]["bytes"] = random.choice(BYTES)(cells[row]["bytes"], random)
        content = content.set_column(0, "image", pyarrow.array(cells, KIND))
    else:
        data = file.read_bytes()
        if how == 2:  # the note at the end, which says where all the rest is
            end = random.randint(100, 2000)
            data = data[:-end] + flipped(data[-end:], random)
        file.write_bytes(
            data if how == 2 else random.choice((flipped, cut, stretched))(data, random)
        )
        return file.name
    pyarrow.parquet.write_table(content, file)
    return file.name


# --------------------------------------------------------------------------------------- the test


def peak_mib(reset: bool = False) -> float:
    """Return the most memory this process has held since the last reset."""
    if reset:
        Path("/proc/self/clear_refs").write_text("5")
    text = Path("/proc/self/status").read_text()
    return int(re.search(r"VmHWM:\s+(\d+)", text)[1]) / 1024  # type: ignore[index]


def content(settings: DataSettings, root: Path) -> dict[str, dict[bytes, int]]:
    """Return digest of the pixels -> label of each split's images; these are what is said."""
    info, found = datasets.prepare(settings, root), {}
    for name in datasets.SPLITS:
        split = datasets.load(settings, root, name)
        assert len(split) == info.counts[name]
        assert len(split) == 0 or 0 <= split.labels.min() <= split.labels.max() < info.classes
        pixels = split.batch(np.arange(len(split)))
        found[name] = {
            sha256(str(p.shape).encode() + p.numpy().tobytes()).digest(): int(label)
            for p, label in zip(pixels, split.labels, strict=True)
        }
    train = datasets.load(settings, root).labels
    for draws in datasets.low_shot(settings, root).values():
        assert all(len(set(rows)) == len(rows) and max(rows) < len(train) for rows in draws)
    return found


@pytest.mark.slow
@cases(100)
def test_mutated_data(
    case: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    rng = draw("data", case)
    monkeypatch.setenv("MAECT_DATA", str(tmp_path / "data"))
    kind, make, change = rng.choice(
        (
            ("image_folder", folder_of, changed_folder),
            ("parquet", shards_of, changed_shards),
        )
    )
    path, root = tmp_path / "set", tmp_path / "root"
    make(path)
    settings = DataSettings(name=kind, path=str(path), max_broken=1.0)
    sound = content(settings, root)
    said = told(capsys, "data", "check", path).out
    assert "3 classes" in said
    name = change(path, rng)

    with unchanged(path):
        before = peak_mib(reset=True)
        done = told(capsys, "data", "check", path)
        try:
            found: dict[str, dict[bytes, int]] | None = content(settings, root)
        except DataError:
            found = None
        grown = peak_mib() - before
    assert grown < MEMORY_MIB, f"{name}: {grown:.0f} MiB"
    if done.code:
        assert name in done.err, done
    else:
        counts = [
            int(n)
            for n in re.search(r"(\d+) train, (\d+) selection, (\d+) test", done.out).groups()
        ]  # type: ignore[union-attr]
        assert sum(counts) == TRAIN + TEST or name in done.out, done
    if found is not None:  # all other images are where they were, with the labels they had
        moved = max(
            sum(label != found[split].get(image) for image, label in images.items())
            for split, images in sound.items()
        )
        other = f"fingerprint {str(datasets.describe(settings, root).fingerprint)[:12]}" not in said
        assert moved == 0 or other  # what no checksum covers makes another set, which says so
