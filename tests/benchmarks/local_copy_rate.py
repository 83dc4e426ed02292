"""Cost of a local copy of an image folder, and the rate of reading from it, no image decoded.

`python tests/benchmarks/local_copy_rate.py [IMAGES]`: small synthetic JPEGs, all read in an order
drawn at random, from the original and from the copy in turn, the pages of both in memory; medians
of nine rounds, CPU time.
"""

from __future__ import annotations

import os
import sys
import tempfile
import time
from pathlib import Path
from statistics import median

import numpy as np
from PIL import Image

from maect import datasets
from maect.datasets import Split
from maect.datasets.images import read_file
from maect.settings import DataSettings

ROUNDS = 9


def make(folder: Path, count: int) -> DataSettings:
    draws = np.random.default_rng(0)
    for number in range(count):
        file = folder / ("val" if number < 8 else "train") / f"{number % 8}" / f"{number}.jpg"
        file.parent.mkdir(parents=True, exist_ok=True)
        pixels = draws.integers(0, 256, (96, 96, 3), dtype=np.uint8)
        Image.fromarray(pixels).save(file, quality=75)
    return DataSettings(name="image_folder", path=str(folder))


def seconds(split: Split, rows: np.ndarray) -> float:
    began = time.process_time()  # all pages are in memory, and other work counts for nothing
    for row in rows.tolist():
        read_file(*split.place(row))  # type: ignore[attr-defined]
    return time.process_time() - began


def main() -> None:
    count = int(sys.argv[1]) if len(sys.argv) > 1 else 4000
    with tempfile.TemporaryDirectory() as place:
        os.environ["MAECT_LOCAL"] = f"{place}/copies"
        settings = make(Path(place) / "set", count)
        datasets.prepare(settings, Path(place))
        began = time.perf_counter()
        original = datasets.load(settings, Path(place))
        plain_s = time.perf_counter() - began
        staged = settings.model_copy(update={"stage": "local"})
        began, used = time.perf_counter(), time.process_time()
        copy = datasets.load(staged, Path(place))
        made_s, made_cpu_s = time.perf_counter() - began, time.process_time() - used
        began = time.perf_counter()
        datasets.load(staged, Path(place))
        found_s = time.perf_counter() - began
        size = sum(file.stat().st_size for file in Path(place, "copies").rglob("*.bin"))
        rows = np.random.default_rng(1).permutation(len(original))
        times = [(seconds(original, rows), seconds(copy, rows)) for _ in range(ROUNDS)]
        print(
            f"{count} images, {size / 1e6:.1f} MB; a split opened in {plain_s:.3f} s, from a copy"
        )
        print(f"made in {made_s:.3f} s ({made_cpu_s:.3f} s CPU), found in {found_s:.3f} s")
        for name, spent in zip(("original", "copy"), zip(*times, strict=True), strict=True):
            each = 1e6 * median(spent) / len(rows)
            print(f"{name}: {each:.1f} us of CPU time an image")
    print(f"copy {median(a / b for a, b in times):.2f} times as fast, median of pairs")


if __name__ == "__main__":
    main()
