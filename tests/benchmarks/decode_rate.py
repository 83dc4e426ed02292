"""Rate of the data path: JPEGs of 500 x 375, about 75 kB, to crops of 224 x 224, images a second.

`OMP_NUM_THREADS=1 python tests/benchmarks/decode_rate.py 1 2` for one and for two processes (0: the
calling process). The rate is of a steady state; CPU time an image is theirs and the caller's own.
"""

from __future__ import annotations

import sys
import tempfile
import time
from pathlib import Path

import numpy as np
import torch
from PIL import Image

from maect import datasets
from maect.augment import Augment
from maect.datasets import decoders
from maect.settings import DataSettings, ViewSettings

IMAGES, BATCH, STEPS, AHEAD = 256, 128, 48, 16


def make(folder: Path) -> DataSettings:
    draws = np.random.default_rng(0)
    for number in range(IMAGES):
        coarse = Image.fromarray(draws.integers(0, 256, (25, 33, 3), dtype=np.uint8))
        smooth = np.asarray(coarse.resize((500, 375), Image.Resampling.BICUBIC))
        noisy = smooth + draws.normal(0, 12, smooth.shape)
        file = folder / ("val" if number < 8 else "train") / "class" / f"{number}.jpg"
        file.parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(noisy.clip(0, 255).astype(np.uint8)).save(file, quality=90)
    return DataSettings(name="image_folder", path=str(folder), image_size=224)


def main() -> None:
    torch.set_num_threads(1)
    decoders.ALONE, decoders.AHEAD_BYTES = 0, AHEAD * (1 << 22)
    with tempfile.TemporaryDirectory() as place:
        settings = make(Path(place) / "set")
        datasets.prepare(settings, Path(place))
        split = datasets.load(settings, Path(place))
        views = [ViewSettings(crop_scale=(0.2, 1.0))]
        augment = Augment(views, image_size=224, mean=split.mean, std=split.std, seed=0, role="mae")
        rows = np.random.default_rng(0).integers(0, len(split), (STEPS, BATCH))
        for processes in map(int, sys.argv[1:]):
            decoders._wanted = lambda gpu, count=processes: count
            split.expect(augment.request(split, 0, batch) for batch in rows)
            for step, batch in enumerate(rows):
                if step == 8:  # what was made ahead while processes started is used up
                    began_s, own_s, theirs_s = time.time(), time.process_time(), decoders.used_s
                augment.images(split, 0, batch)
            count = (STEPS - 8) * BATCH
            rate = count / (time.time() - began_s)
            own_ms, theirs_ms = (
                1000 * spent / count
                for spent in (time.process_time() - own_s, decoders.used_s - theirs_s)
            )
            print(f"{processes}: {rate:.0f} images/s; {theirs_ms:.2f} + {own_ms:.2f} ms an image")


if __name__ == "__main__":
    main()
