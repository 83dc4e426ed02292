"""Batched augmentation against torchvision's per-image pipeline: one core, same run, same images.

Both sides begin with decoded images (uint8 tensors here, PIL images there) and end with a
normalised float32 batch. Rates are medians of CPU time over rounds that alternate between the two.
The bounds leave room for a busy machine; the aims are 10 times at 32 x 32 and 1 at 224 x 224.
Measured on an AMD EPYC (AVX-512), torch 2.15, torchvision 0.29, Pillow 13, both cores busy with
other work: 11.0 (min) and 11.2 (aug) at 32 x 32, 2.8 and 2.6 at 224 x 224 from 500 x 375.
"""

from __future__ import annotations

import random
import time
from collections.abc import Iterator

import numpy as np
import pytest
import torch
from PIL import Image, ImageFilter
from torchvision import transforms
from torchvision.transforms import InterpolationMode

from maect.augment import Augment
from maect.settings import AugmentSettings, ViewSettings

ROUNDS = 11
MEAN, STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)
MIN = AugmentSettings()
#: (height, width) of the images, size of the views, images, largest blur, least ratio
CASES = {"32": ((32, 32), 32, 256, 1.0, 8.0), "224": ((375, 500), 224, 16, 2.0, 1.0)}


def aug(largest_blur: float) -> AugmentSettings:
    common = {"jitter": 0.8, "grey": 0.2, "blur_sigma": (0.05 * largest_blur, largest_blur)}
    return AugmentSettings(
        view0=ViewSettings(blur=1.0, **common),
        view1=ViewSettings(blur=0.1, solarise=0.2, **common),
    )


def per_image(settings: AugmentSettings, size: int) -> list[transforms.Compose]:
    """Both views as torchvision's transforms of a PIL image."""
    result = []
    for view in settings.views(2):
        sigma = view.blur_sigma

        def blur(image: Image.Image, sigma: tuple[float, float] = sigma) -> Image.Image:
            return image.filter(ImageFilter.GaussianBlur(random.uniform(*sigma)))

        steps = [
            transforms.RandomResizedCrop(
                size, view.crop_scale, view.crop_ratio, InterpolationMode.BICUBIC
            ),
            transforms.RandomHorizontalFlip(view.flip),
        ]
        if view.jitter:
            strengths = (view.brightness, view.contrast, view.saturation, view.hue)
            jitter = transforms.ColorJitter(*strengths)
            steps.append(transforms.RandomApply([jitter], p=view.jitter))
        if view.blur:
            steps.append(transforms.RandomApply([transforms.Lambda(blur)], p=view.blur))
        if view.grey:
            steps.append(transforms.RandomGrayscale(view.grey))
        if view.solarise:
            steps.append(transforms.RandomSolarize(view.solarise_threshold, view.solarise))
        steps += [transforms.ToTensor(), transforms.Normalize(MEAN, STD)]
        result.append(transforms.Compose(steps))
    return result


@pytest.fixture(autouse=True)
def _one_core() -> Iterator[None]:
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@pytest.mark.benchmark(timer=time.thread_time)
@pytest.mark.parametrize("pipeline", ["min", "aug"])
@pytest.mark.parametrize("case", list(CASES))
def test_views_per_second(case, pipeline, benchmark, capsys):
    sides, size, count, largest_blur, least = CASES[case]
    settings = MIN if pipeline == "min" else aug(largest_blur)
    coarse = np.random.default_rng(0).integers(0, 256, (count, 12, 16, 3), np.uint8)
    pictures = [Image.fromarray(image).resize(sides[::-1], Image.BICUBIC) for image in coarse]
    images = [torch.from_numpy(np.array(image)).permute(2, 0, 1) for image in pictures]
    if size == 32:
        images = torch.stack(images)
    augment = Augment(settings.views(2), image_size=size, mean=MEAN, std=STD, seed=0, role="mae")
    views = per_image(settings, size)
    indices = np.arange(count)
    theirs = []

    def in_turn() -> None:
        began = time.thread_time()
        for view in views:
            torch.stack([view(picture) for picture in pictures])
        theirs.append(time.thread_time() - began)

    def both_views() -> None:
        for view in (0, 1):
            augment(images, len(theirs), indices, view)

    benchmark.pedantic(both_views, setup=in_turn, rounds=ROUNDS, warmup_rounds=2)
    ours = 2 * count / benchmark.stats.stats.median
    peer = 2 * count / float(np.median(theirs))
    benchmark.extra_info |= {"views per second": round(ours), "torchvision": round(peer)}
    with capsys.disabled():
        print(
            f"\n{pipeline} {case}: {ours:,.0f} views/s, {ours / peer:.1f} x torchvision {peer:,.0f}"
        )
    assert ours / peer >= least
