"""Crops made by other processes: the same pixels, in order, bounded, whatever ends a process."""

from __future__ import annotations

import io
import os
import re
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import psutil
import pytest
import torch
from PIL import Image

from maect import datasets
from maect.augment import Augment, evaluation_transform
from maect.datasets import DataError, decoders, images
from maect.datasets.base import Split, decode_threads
from maect.datasets.decoders import Request
from maect.settings import DataSettings, ViewSettings

pytestmark = pytest.mark.filterwarnings("ignore:The image decoding and encoding:DeprecationWarning")

SIZE = 16
SHARED = Path("/dev/shm")


def picture(number: int, height: int = 47, width: int = 61) -> Image.Image:
    """Smooth colours with noise, as photographs have."""
    random = np.random.default_rng(number)
    coarse = random.integers(0, 256, (height // 8 + 2, width // 8 + 2, 3), np.uint8)
    smooth = np.asarray(Image.fromarray(coarse).resize((width, height))).astype(float)
    noisy = smooth + random.normal(0, 9, smooth.shape)
    return Image.fromarray(noisy.clip(0, 255).astype(np.uint8))


def jpeg(image: Image.Image, **options: object) -> bytes:
    file = io.BytesIO()
    image.save(file, "JPEG", **options)
    return file.getvalue()


def odd_files() -> dict[str, bytes]:
    turned = Image.Exif()
    turned[0x0112] = 6
    plain = jpeg(picture(0))
    files = {
        f"{height} x {width}, sampling {sampling}, progressive: {progressive}": (
            jpeg(picture(1, height, width), subsampling=sampling, progressive=progressive)
        )
        for height, width in ((1, 1), (7, 5), (16, 16), (47, 61))
        for sampling in (0, 1, 2)
        for progressive in (False, True)
    }
    return files | {
        "lossy": jpeg(picture(2, 120, 90), quality=4),
        "restart markers": jpeg(picture(2, 120, 90), restart_marker_rows=1),
        "RGB kept": jpeg(picture(3), keep_rgb=True),
        "turned by EXIF": jpeg(picture(4), exif=turned),
        "CMYK": jpeg(picture(5).convert("CMYK")),
        "grey": jpeg(picture(6).convert("L")),
        "huge": jpeg(picture(7, 64, 64).resize((4100, 4100))),
        "truncated": plain[: len(plain) // 2],
        "only the end is missing": plain[:-2],
        "more after the end": plain + b"more",
        "damaged inside": plain[:900] + bytes(40) + plain[940:],
        "no image": b"\xff\xd8\xff" + bytes(100),
        "empty": b"",
    }


def decoded(data: bytes, *, fast: bool) -> np.ndarray | str:
    try:
        return images.decode(data, fast=fast)[0]
    except ValueError as error:
        return str(error)


def test_the_fast_decoder_gives_pillows_pixels_and_errors(monkeypatch: pytest.MonkeyPatch) -> None:
    assert images._decoders_agree()
    by_torchvision, fast = images._by_torchvision, []

    def counted(data: bytes) -> np.ndarray:
        found = by_torchvision(data)
        fast.append(data)
        return found

    monkeypatch.setattr(images, "_by_torchvision", counted)
    for name, data in odd_files().items():
        expected, found = decoded(data, fast=False), decoded(data, fast=True)
        assert np.array_equal(found, expected), name
        plain = name not in ("CMYK", "grey", "truncated", "only the end is missing")
        assert (data in fast) == (plain and not isinstance(expected, str)), name


def test_a_decoder_that_differs_is_not_used(monkeypatch: pytest.MonkeyPatch) -> None:
    by_torchvision = images._by_torchvision
    monkeypatch.setattr(images, "_by_torchvision", lambda data: by_torchvision(data) ^ 1)
    images._decoders_agree.cache_clear()
    data = jpeg(picture(0))
    try:
        assert np.array_equal(decoded(data, fast=True), decoded(data, fast=False))
    finally:
        images._decoders_agree.cache_clear()


# ---------------------------------------------------------------------------------- processes


def make_set(path: Path) -> DataSettings:
    """60 training and 10 test images of several sizes, JPEG and PNG."""
    for pool, count in (("train", 60), ("val", 10)):
        for number in range(count):
            file = path / pool / f"class{number % 2}" / f"{number:03}"
            file.parent.mkdir(parents=True, exist_ok=True)
            image = picture(number, 20 + number % 7, 17 + number % 11)
            image.save(file.with_suffix(".jpg" if number % 3 else ".png"))
    return DataSettings(name="image_folder", path=str(path), image_size=SIZE)


@pytest.fixture
def split(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Split:
    settings = make_set(tmp_path / "set")
    datasets.prepare(settings, tmp_path / "root")
    monkeypatch.setattr(decoders, "_TASK_IMAGES", 3)
    monkeypatch.setattr(decoders, "ALONE", 0)
    monkeypatch.setenv("MAECT_DECODE_PROCESSES", "2")
    if decoders._pool is not None:
        decoders._pool.close()
    monkeypatch.setattr(decoders, "_pool", None)
    return datasets.load(settings, tmp_path / "root")


def augment_of(split: Split, device: str = "cpu") -> Augment:
    views = [ViewSettings(crop_scale=(0.2, 1.0), jitter=0.8), ViewSettings(crop_scale=None)]
    streams = {"seed": 0, "role": "mae", "device": device}
    return Augment(views, image_size=SIZE, mean=split.mean, std=split.std, **streams)


def workers() -> list[int]:
    """Return the ids of the processes that decode now."""
    assert decoders._pool is not None
    return [worker.pid for worker in decoders._pool._loader._iterator._workers]


def test_crops_are_those_of_whole_images(split: Split) -> None:
    augment, rows = augment_of(split), np.random.default_rng(0).permutation(len(split))
    batches = [rows[:8], rows[8:9], rows[9:20], rows[:8]]
    expected = [
        [augment(split.batch(batch), 3, batch, view=v) for v in (0, 1)] for batch in batches
    ]
    split.expect(augment.request(split, 3, batch) for batch in batches)
    for announced in (True, False):
        for batch, views in zip(batches, expected, strict=True):
            crops = augment.images(split, 3, batch)
            for number, view in enumerate(views):
                assert torch.equal(augment(crops, 3, batch, view=number), view), announced
    centres = {"image_size": SIZE, "mean": split.mean, "std": split.std}
    found = split.crops(rows, lambda: Request.centres(rows, SIZE))
    whole = evaluation_transform(split.batch(rows), **centres)
    assert torch.equal(evaluation_transform(found, **centres), whole)
    assert len(workers()) == 2
    assert decoders.used_s > 0


@pytest.mark.gpu
def test_crops_reach_a_gpu_from_pinned_memory(split: Split) -> None:
    torch.zeros(1, device="cuda")  # pinned memory is its context's
    augment, rows = augment_of(split), np.arange(20)
    crops = augment.images(split, 3, rows)
    assert all(part.is_pinned() for part in crops.pixels)
    for number in (0, 1):
        view = augment_of(split, "cuda")(crops, 3, rows, view=number).cpu()
        whole = augment(split.batch(rows), 3, rows, view=number)
        torch.testing.assert_close(view, whole, rtol=0, atol=0.02)


def test_a_wrong_number_of_processes_is_told(split: Split, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("MAECT_DECODE_PROCESSES", "two")
    with pytest.raises(DataError, match="MAECT_DECODE_PROCESSES is 'two'"):
        split.crops(np.arange(2), lambda: Request.centres(np.arange(2), SIZE))


def test_the_calling_process_begins_and_others_go_on(
    tmp_path: Path, split: Split, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The order of what was announced is kept, also where another split comes between."""
    monkeypatch.setattr(decoders, "ALONE", 16)
    monkeypatch.setattr(decoders, "_asked", 0)
    batches = list(np.random.default_rng(0).permutation(len(split))[:48].reshape(12, 4))
    expected = [split.batch(batch) for batch in batches]
    split.expect(Request.centres(batch, SIZE) for batch in batches)
    settings = DataSettings(name="image_folder", path=str(tmp_path / "set"), image_size=SIZE)
    other = datasets.load(settings, tmp_path / "root", "test")
    few = np.arange(4)
    for number, batch in enumerate(batches):
        found = split.crops(batch, lambda: pytest.fail("it was announced"))
        whole = evaluation_transform(
            expected[number], image_size=SIZE, mean=split.mean, std=split.std
        )
        shown = evaluation_transform(found, image_size=SIZE, mean=split.mean, std=split.std)
        assert torch.equal(shown, whole)
        if number % 5 == 3:
            other.crops(few, lambda: Request.centres(few, SIZE))
    assert len(workers()) == 2
    split.expect(Request.centres(batch, SIZE) for batch in batches)
    with pytest.raises(ValueError, match="announced"):
        split.crops(batches[1], lambda: Request.centres(batches[1], SIZE))


def test_crops_ahead_are_bounded(split: Split, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(decoders, "AHEAD_BYTES", 6 * decoders._TASK_BYTES)  # 6 tasks, 3 a process
    drawn = []

    def requests() -> Iterator[Request]:
        for number in range(30):
            drawn.append(number)
            yield Request.centres(np.arange(3), SIZE)  # a task each

    split.expect(requests())
    for taken in range(1, 5):
        split.crops(np.arange(3), lambda: pytest.fail("it was announced"))
        assert len(drawn) == taken + 6


def test_too_little_shared_memory_does_without_processes(
    split: Split, monkeypatch: pytest.MonkeyPatch
) -> None:
    rows = np.arange(4)
    used = type("Usage", (), {"free": decoders._TASK_BYTES})
    monkeypatch.setattr(decoders.shutil, "disk_usage", lambda path: used)
    assert len(split.crops(rows, lambda: Request.centres(rows, SIZE))) == 4
    assert decoders._pool is not None
    assert decoders._pool._loader.num_workers == 0


def test_a_file_that_is_gone_is_named_and_the_next_batch_comes(split: Split) -> None:
    rows = np.arange(9)
    gone = split.place(4)[0]
    gone.rename(gone.with_suffix(".away"))
    with pytest.raises(DataError, match=rf"{gone.name} could be read .* No such file"):
        split.crops(rows, lambda: Request.centres(rows, SIZE))
    picture(0, 12, 12).save(gone)
    with pytest.raises(DataError, match=rf"{gone.name} could be read .*\(12, 12\)"):
        split.crops(rows, lambda: Request.centres(rows, SIZE))
    gone.with_suffix(".away").rename(gone)
    assert len(split.crops(rows, lambda: Request.centres(rows, SIZE))) == 9


def test_a_killed_process_is_replaced_and_told_when_it_dies_again(
    split: Split, monkeypatch: pytest.MonkeyPatch
) -> None:
    batches = list(np.arange(48).reshape(6, 8))
    expected = [split.crops(batch, lambda b=batch: Request.centres(b, SIZE)) for batch in batches]
    split.expect(Request.centres(batch, SIZE) for batch in batches)
    for number, batch in enumerate(batches):
        if number == 2:
            os.kill(workers()[0], signal.SIGKILL)
        found = split.crops(batch, lambda: pytest.fail("it was announced"))
        assert torch.equal(torch.cat(found.pixels, 1), torch.cat(expected[number].pixels, 1))

    monkeypatch.setattr(decoders, "_DEATHS", 0)
    split.expect(Request.centres(np.arange(48), SIZE) for _ in range(100))
    for pid in workers():
        os.kill(pid, signal.SIGKILL)
    with pytest.raises(RuntimeError, match="MAECT_DECODE_PROCESSES"):
        [split.crops(np.arange(48), lambda: pytest.fail("it was announced")) for _ in range(100)]


@pytest.mark.slow
@pytest.mark.skipif(decode_threads() < 2, reason="needs two cores")
def test_two_processes_are_faster_than_one(
    tmp_path: Path, split: Split, monkeypatch: pytest.MonkeyPatch
) -> None:
    """On two cores 1.8 to 1.9 times; other work on the machine hides it in some of the rounds."""
    for number in range(48):
        file = tmp_path / "large" / ("train" if number < 40 else "val") / "class" / f"{number}.jpg"
        file.parent.mkdir(parents=True, exist_ok=True)
        picture(number, 375, 500).save(file, quality=90)
    settings = DataSettings(name="image_folder", path=str(tmp_path / "large"), image_size=224)
    datasets.prepare(settings, tmp_path / "root")
    large = datasets.load(settings, tmp_path / "root")
    rows, best = np.arange(32), 0.0
    monkeypatch.setattr(decoders, "_TASK_IMAGES", 8)
    monkeypatch.setattr(decoders, "AHEAD_BYTES", 8 * decoders._TASK_BYTES)

    def seconds(processes: int) -> float:
        monkeypatch.setenv("MAECT_DECODE_PROCESSES", str(processes))
        large.expect(Request.centres(rows, 224) for _ in range(25))
        for number in range(25):
            if number == 5:  # what was made ahead while processes started is used up
                began = time.perf_counter()
            large.crops(rows, lambda: pytest.fail("it was announced"))
        return time.perf_counter() - began

    for _ in range(8):
        best = max(best, seconds(1) / seconds(2))
        if best >= 1.5:
            break
    assert best >= 1.5


PARENT = """
import sys
import time
from pathlib import Path
import numpy as np
from maect import datasets
from maect.datasets import decoders
from maect.datasets.decoders import Request
from maect.settings import DataSettings
decoders.ALONE = 0
settings = DataSettings(name="image_folder", path=sys.argv[1], image_size=224)
split = datasets.load(settings, Path(sys.argv[2]))
split.expect(Request.centres(np.arange(48), 224) for _ in range(100))
split.crops(np.arange(48), lambda: None)
print(*[worker.pid for worker in decoders._pool._loader._iterator._workers], flush=True)
time.sleep(600)
"""


def is_running(pid: int) -> bool:
    """Return False also for a process that has ended and whose new parent has yet to ask for it:
    that may be this one, where another test has made it adopt orphans."""
    try:
        return psutil.Process(pid).status() != psutil.STATUS_ZOMBIE
    except psutil.NoSuchProcess:
        return False


@pytest.mark.skipif(not SHARED.is_dir(), reason="no /dev/shm to look into")
def test_a_killed_parent_leaves_no_process_and_no_memory(tmp_path: Path, split: Split) -> None:
    parent = subprocess.Popen(
        [sys.executable, "-c", PARENT, str(tmp_path / "set"), str(tmp_path / "root")],
        stdout=subprocess.PIPE,
        text=True,
    )
    assert parent.stdout is not None
    with parent.stdout as told:
        pids = [int(pid) for pid in told.readline().split()]
        assert len(pids) == 2
        parent.kill()
        parent.wait()

    def left() -> list[str]:
        """Return what is left of the process and of those that decoded for it."""
        found = [str(pid) for pid in pids if is_running(pid)]
        whose = [str(pid) for pid in (parent.pid, *pids)]
        return found + [
            f.name for f in SHARED.iterdir() if set(whose) & {*re.split(r"\W|_", f.name)}
        ]

    deadline = time.monotonic() + 60
    while left() and time.monotonic() < deadline:
        time.sleep(0.1)
    assert left() == []
