"""`data.stage: local`: a copy of an image folder on a disk of this machine."""

from __future__ import annotations

import os
import shutil
import signal
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from PIL import Image
from pydantic import ValidationError

from maect import datasets
from maect.augment import Augment
from maect.datasets import DataError, Split, decoders, local
from maect.settings import DataSettings, ViewSettings

#: of a large file here; an image has some 800
BYTES = 10_000


@pytest.fixture
def copies(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The folder of copies, which have several large files."""
    monkeypatch.setenv("MAECT_LOCAL", str(tmp_path / "copies"))
    monkeypatch.setattr(local, "_BYTES", BYTES)
    return tmp_path / "copies"


@pytest.fixture
def settings(tmp_path: Path) -> DataSettings:
    """60 training images, three of them broken each in its way, and 10 for testing; indexed."""
    for pool, count in (("train", 60), ("val", 10)):
        for number in range(count):
            file = tmp_path / "set" / pool / f"class{number % 2}" / f"{number:03}.jpg"
            file.parent.mkdir(parents=True, exist_ok=True)
            shape = (20 + number % 7, 17 + number % 11, 3)
            pixels = np.random.default_rng(number).integers(0, 256, shape, np.uint8)
            Image.fromarray(pixels).save(file)
    broken = tmp_path / "set" / "train" / "class0"
    (broken / "004.jpg").write_bytes(b"")
    (broken / "010.jpg").write_bytes((broken / "010.jpg").read_bytes()[:90])
    (broken / "016.jpg").unlink()
    (broken / "016.jpg").symlink_to("nowhere")
    found = DataSettings(
        name="image_folder", path=str(tmp_path / "set"), image_size=16, max_broken=0.05
    )
    datasets.prepare(found, tmp_path / "root")
    return found


@pytest.fixture
def load(
    copies: Path, settings: DataSettings, tmp_path: Path
) -> Callable[..., tuple[Split, list[str]]]:
    """Load a split from the copy; return it with what was told meanwhile."""

    def loaded(name: str = "train") -> tuple[Split, list[str]]:
        told: list[str] = []
        staged = settings.model_copy(update={"stage": "local"})
        return datasets.load(staged, tmp_path / "root", name, told.append), told

    return loaded


def pixels(split: Split) -> list[bytes]:
    return [image.numpy().tobytes() for image in split.batch(np.arange(len(split)))]


def large_files(copies: Path) -> list[Path]:
    return sorted(copies.glob("*/*.bin"))


def contents(copies: Path) -> dict[str, bytes]:
    return {file.name: file.read_bytes() for file in large_files(copies)}


def test_images_are_those_of_the_original_and_broken_ones_are_left_out_alike(
    load: Callable[..., tuple[Split, list[str]]],
    settings: DataSettings,
    copies: Path,
    tmp_path: Path,
):
    for name in datasets.SPLITS:
        original, (copy, _) = datasets.load(settings, tmp_path / "root", name), load(name)
        assert pixels(copy) == pixels(original)
        assert np.array_equal(copy.labels, original.labels)
    info = datasets.describe(settings, tmp_path / "root")
    assert len(info.broken) == 3
    (folder,) = copies.iterdir()
    assert info.fingerprint is not None and info.fingerprint.startswith(folder.name)
    assert len(large_files(copies)) > 3
    sizes = [file.stat().st_size for file in (tmp_path / "set").rglob("*.jpg") if file.exists()]
    assert sum(map(len, contents(copies).values())) == sum(sizes)
    staged = settings.model_copy(update={"stage": "local"})
    assert datasets.describe(staged, tmp_path / "root") == info
    for one in (settings, staged):
        with pytest.raises(DataError, match="3 of 60 training images cannot be read"):
            datasets.load(one.model_copy(update={"max_broken": 0.01}), tmp_path / "root")


def test_processes_that_decode_read_the_copy(
    load: Callable[..., tuple[Split, list[str]]],
    settings: DataSettings,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
):
    monkeypatch.setattr(decoders, "ALONE", 0)
    monkeypatch.setenv("MAECT_DECODE_PROCESSES", "1")
    views = [ViewSettings(crop_scale=(0.2, 1.0))]

    def cut(split: Split) -> torch.Tensor:
        augment = Augment(views, image_size=16, mean=split.mean, std=split.std, seed=0, role="mae")
        crops = split.crops(np.arange(20), lambda: augment.request(split, 0, np.arange(20)))
        return crops.view(0, torch.device("cpu"))

    original = cut(datasets.load(settings, tmp_path / "root"))
    split, _ = load()
    shutil.rmtree(tmp_path / "set")
    assert torch.equal(cut(split), original)
    assert decoders._pool is not None and decoders._pool._loader.num_workers == 1


def test_another_split_of_the_same_images_reads_the_same_copy(
    load: Callable[..., tuple[Split, list[str]]], settings: DataSettings, tmp_path: Path
):
    load()
    all_images = settings.model_copy(update={"stage": "local", "selection": 0})
    shutil.rmtree(tmp_path / "set" / "train")
    assert len(pixels(datasets.load(all_images, tmp_path / "root"))) == 57


ONE_COPY = """
import sys
from pathlib import Path
from maect import datasets
from maect.datasets import local
from maect.datasets.images import read_file
from maect.settings import DataSettings

local._BYTES = int(sys.argv[3])
settings = DataSettings.parse({"name": "image_folder", "path": sys.argv[1], "stage": "local",
                               "max_broken": 0.05})
split = datasets.load(settings, Path(sys.argv[2]), progress=lambda text: print(text, flush=True))
print("loaded", sum(len(read_file(*split.place(row))) for row in range(len(split))))
"""


def start(tmp_path: Path, program: str = ONE_COPY) -> subprocess.Popen[str]:
    """Start a process that loads the set from its copy."""
    arguments = [str(tmp_path / "set"), str(tmp_path / "root"), str(BYTES)]
    return subprocess.Popen(
        [sys.executable, "-c", program, *arguments], stdout=subprocess.PIPE, text=True
    )


def test_of_two_processes_one_copies_and_both_read(
    copies: Path, settings: DataSettings, tmp_path: Path
):
    both = [start(tmp_path), start(tmp_path)]
    told = [process.communicate(timeout=300)[0] for process in both]
    assert all(process.returncode == 0 for process in both)
    assert all("loaded" in text for text in told)
    assert sorted("copied" in text for text in told) == [False, True]


def test_a_process_waits_for_the_one_that_copies(
    load: Callable[..., tuple[Split, list[str]]], copies: Path, tmp_path: Path
):
    """Killed after its second large file, it leaves the rest, and the lock, to the other."""
    slow = ONE_COPY.replace(
        "split =",
        """
import time
write = local.write_atomic
def slowly(path, data):
    if path.name == "00002.bin":
        print("at the third", flush=True)
        time.sleep(300)
    write(path, data)
local.write_atomic = slowly
split =""",
    )
    first = start(tmp_path, slow)
    assert first.stdout is not None
    while "at the third" not in first.stdout.readline():
        assert first.poll() is None
    before = {file: file.stat().st_mtime_ns for file in large_files(copies)}
    assert len(before) == 2
    other = start(tmp_path)
    assert other.stdout is not None
    assert "waiting for it" in other.stdout.readline()
    os.kill(first.pid, signal.SIGKILL)
    first.wait()
    first.stdout.close()
    assert "loaded" in other.communicate(timeout=300)[0]
    assert {file: file.stat().st_mtime_ns for file in before} == before
    assert not load()[1]


def test_a_copy_cut_short_goes_on_where_it_was(
    load: Callable[..., tuple[Split, list[str]]], copies: Path, monkeypatch: pytest.MonkeyPatch
):
    """In the middle of a large file: what was written of it is not taken for one."""
    asked, read_file = 0, local.read_file

    def failing(*place: object) -> bytes:
        nonlocal asked
        asked += 1
        if asked > 30:
            raise KeyboardInterrupt
        return read_file(*place)  # type: ignore[arg-type]

    monkeypatch.setattr(local, "_THREADS", 1)
    monkeypatch.setattr(local, "read_file", failing)
    with pytest.raises(KeyboardInterrupt):
        load()
    kept = contents(copies)
    assert 1 <= len(kept) < 5
    (copies / next(copies.iterdir()).name / ".00004.bin.1.tmp").write_bytes(b"of one killed")
    asked = -1000
    load()
    assert 0 < asked + 1000 < 69 - 10
    assert kept.items() <= contents(copies).items()
    assert not [*copies.glob("*/.*")]


def damage(file: Path) -> None:
    data = bytearray(file.read_bytes())
    data[len(data) // 2] ^= 1
    file.write_bytes(data)


@pytest.mark.parametrize(
    "harm",
    [damage, lambda file: os.truncate(file, 500), lambda file: file.write_bytes(b"")],
    ids=["a bit", "truncated", "empty"],
)
def test_a_damaged_copy_is_told_and_made_anew(
    harm: Callable[[Path], object], load: Callable[..., tuple[Split, list[str]]], copies: Path
):
    load()
    whole, times = contents(copies), [f.stat().st_mtime_ns for f in large_files(copies)]
    harm(large_files(copies)[1])
    _, told = load()
    (sentence,) = [text for text in told if "made anew" in text]
    assert sentence.endswith("is damaged and made anew: 00001.bin")
    assert contents(copies) == whole
    now = [file.stat().st_mtime_ns for file in large_files(copies)]
    assert [a == b for a, b in zip(times, now, strict=True)] == [n != 1 for n in range(len(times))]
    assert not load()[1]


def test_a_lost_file_is_written_and_a_copy_moved_here_is_kept(
    load: Callable[..., tuple[Split, list[str]]], copies: Path, monkeypatch: pytest.MonkeyPatch
):
    load()
    whole = contents(copies)
    large_files(copies)[0].unlink()
    (copies / next(copies.iterdir()).name / "stamps.json").write_text("[3]")
    assert "made anew" not in "".join(load()[1])
    assert contents(copies) == whole
    for file in large_files(copies):
        os.utime(file, ns=(5, 5))
    assert load()[1] == []
    monkeypatch.setattr(local, "_BYTES", BYTES // 2)  # as another version might have it
    assert len(pixels(load()[0])) == load()[0].labels.size
    assert len(large_files(copies)) > len(whole)


def test_too_little_space_is_told_before_anything_is_copied(
    load: Callable[..., tuple[Split, list[str]]], copies: Path, monkeypatch: pytest.MonkeyPatch
):
    full = SimpleNamespace(free=20_000)
    monkeypatch.setattr(local.shutil, "disk_usage", lambda path: full)
    with pytest.raises(DataError, match=r"takes 0\.\d MB in .*, where 0\.0 MB are free") as raised:
        load()
    assert "MAECT_LOCAL" in str(raised.value)
    assert not large_files(copies)


def test_a_place_that_cannot_be_written_and_an_image_that_changed_are_told(
    load: Callable[..., tuple[Split, list[str]]], copies: Path, tmp_path: Path
):
    copies.write_text("a file")
    with pytest.raises(DataError, match=r"could not be copied to .*MAECT_LOCAL names another"):
        load()
    copies.unlink()
    file = tmp_path / "set" / "train" / "class0" / "000.jpg"
    file.write_bytes(file.read_bytes() + b"more")
    with pytest.raises(DataError, match=r"train/class0/000\.jpg could be read when .* something"):
        load()
    assert not [*copies.glob("*/*.bin"), *copies.glob("*/.*")]


@pytest.mark.parametrize("name", ["digits", "cifar10", "fashion_mnist", "parquet"])
def test_other_sets_refuse_to_be_copied(name: str):
    place = {"path": "x"} if name == "parquet" else {}
    with pytest.raises(ValidationError, match="stage 'local' goes with data 'image_folder' only"):
        DataSettings.parse({"name": name, "stage": "local"} | place)
