"""Augmented views of a batch: parameters from per-sample streams, operators on the device.

Operators in the published order: random resized crop, flip, colour jitter, blur, grey, solarise.
What an image becomes depends on the seed, the role (the stage), the view, the epoch and the
image's index alone: not on the batch around it, the worker or the device.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import cast

import numpy as np
import torch
from torch import Tensor

from maect import image_ops as ops
from maect.datasets.base import Split
from maect.datasets.decoders import Crops, Cut, Request
from maect.device import moved
from maect.settings import ViewSettings
from maect.streams import Stream

#: pixel values worked on together on a CPU: more leave its caches, fewer cost more calls each
_CPU_PIECE = 3 << 18
_CROP_TRIES = 10

#: of one size, uint8 [B, C, H, W]; or B of [C, h, w]; or cut out already
Images = Tensor | Sequence[Tensor] | Crops


@dataclass(frozen=True)
class ViewParameters(Cut):
    """What is done to each of B images; NumPy arrays of length B."""

    #: whether to jitter; the order of its four parts and their factors, both [B, 4]
    jitter: np.ndarray
    order: np.ndarray
    factors: np.ndarray
    blur: np.ndarray
    sigma: np.ndarray
    grey: np.ndarray
    solarise: np.ndarray


def _uniform(draws: np.ndarray, low: float, high: float) -> np.ndarray:
    """Return draws in [0, 1) stretched to [low, high), float64."""
    return low + (high - low) * draws.astype(np.float64)


def _tries(
    settings: ViewSettings, draws: np.ndarray, heights: np.ndarray, widths: np.ndarray
) -> tuple[np.ndarray, np.ndarray]:
    """Return boxes int64 [B, T, 4] from draws [B, T, 4] in [0, 1), and which fit [B, T]."""
    assert settings.crop_scale is not None
    full_h, full_w = heights[:, None], widths[:, None]
    area = full_h * full_w * _uniform(draws[..., 0], *settings.crop_scale)
    ratio = np.exp(_uniform(draws[..., 1], *np.log(settings.crop_ratio)))
    width = np.rint(np.sqrt(area * ratio)).astype(np.int64)
    height = np.rint(np.sqrt(area / ratio)).astype(np.int64)
    top = np.floor(draws[..., 2] * (full_h - height + 1.0)).astype(np.int64)
    left = np.floor(draws[..., 3] * (full_w - width + 1.0)).astype(np.int64)
    fits = (width > 0) & (width <= full_w) & (height > 0) & (height <= full_h)
    return np.stack([top, left, height, width], axis=-1), fits


def sample_boxes(
    settings: ViewSettings,
    draw: Callable[[np.ndarray, int], np.ndarray],
    heights: np.ndarray,
    widths: np.ndarray,
) -> np.ndarray:
    """Return boxes (top, left, height, width) int64 [B, 4], drawn as torchvision draws them.

    `RandomResizedCrop.get_params`: ten tries, then the largest central crop of a fair ratio.
    `draw(rows, count)` gives the first `count` numbers in [0, 1) of each of the given rows.
    """
    # ---- the first try fits most images
    tried, fits = _tries(settings, draw(np.arange(len(heights)), 4)[:, None], heights, widths)
    boxes, rest = tried[:, 0], np.flatnonzero(~fits[:, 0])
    if not len(rest):
        return boxes

    # ---- of the others: the first of ten tries that fits, or the central crop
    full_h, full_w = heights[rest], widths[rest]
    draws = draw(rest, 4 * _CROP_TRIES).reshape(-1, _CROP_TRIES, 4)
    tried, fits = _tries(settings, draws, full_h, full_w)
    low, high = settings.crop_ratio
    height = np.where(full_w / full_h < low, np.rint(full_w / low).astype(np.int64), full_h)
    width = np.where(full_w / full_h > high, np.rint(full_h * high).astype(np.int64), full_w)
    central = np.stack([(full_h - height) // 2, (full_w - width) // 2, height, width], axis=1)
    first = tried[np.arange(len(rest)), fits.argmax(axis=1)]
    boxes[rest] = np.where(fits.any(axis=1, keepdims=True), first, central)
    return boxes


class Augment:
    """Makes augmented, normalised views of uint8 images, view i as `views[i]` says.

    `seed` and `role` (the stage, say "mae") select the random streams. `mean` and `std` are the
    channel statistics to normalise by, for values in [0, 1]. Work is done on `device`, and views
    are of `dtype`.
    """

    def __init__(
        self,
        views: Sequence[ViewSettings],
        *,
        image_size: int,
        mean: Sequence[float],
        std: Sequence[float],
        seed: int,
        role: str,
        device: torch.device | str = "cpu",
        dtype: torch.dtype = torch.float32,
    ) -> None:
        self.views, self.image_size, self.purpose = views, image_size, (seed, role)
        self.mean, self.std = tuple(mean), tuple(std)
        self.device, self.dtype = torch.device(device), dtype

    def __call__(self, images: Images, epoch: int, indices: np.ndarray, view: int = 0) -> Tensor:
        """Return a view: uint8 [B, C, H, W], or B of [C, h, w], or crops -> [B, C, S, S].

        `indices` int64 [B] are the samples' rows in their split.
        """
        place, cut = self.device, isinstance(images, Crops)
        if isinstance(images, Crops):
            parameters = cast(ViewParameters, images.cuts[view])
            images = images.view(view, place)
        else:
            if isinstance(images, Tensor):
                sizes = np.tile(images.shape[2:], (len(images), 1))
            else:
                sizes = np.array([image.shape[1:] for image in images])
            parameters = self.sample_parameters(epoch, indices, view, sizes[:, 0], sizes[:, 1])
        threshold = self.views[view].solarise_threshold
        shape = (len(self.mean), self.image_size, self.image_size)
        result = torch.empty(len(images), *shape, dtype=self.dtype, device=place)
        step = max(1, _CPU_PIECE // math.prod(shape)) if place.type == "cpu" else len(images)
        for start in range(0, len(images), step):
            part = slice(start, start + step)
            chosen = parameters.piece(part)
            with torch.no_grad(), torch.autocast(place.type, enabled=False):
                if cut:
                    piece = cast(Tensor, images)[part].float()
                else:
                    piece = _cropped(images[part], chosen, self.image_size, place)
                piece = _colors(piece, chosen, threshold)
                normalise(piece, self.mean, self.std, out=result[part])
        return result

    def images(self, split: Split, epoch: int, indices: np.ndarray) -> Images:
        """Return images of a split as a call takes them: whole where the split holds them decoded,
        else cut out for all views."""
        if split.sizes is None:
            return split.batch(indices)
        return split.crops(indices, lambda: self.request(split, epoch, indices))

    def batch(self, split: Split, epoch: int, indices: np.ndarray) -> list[Tensor]:
        """Return all views of images of a split, each [B, C, S, S]."""
        images = self.images(split, epoch, indices)
        return [self(images, epoch, indices, view) for view in range(len(self.views))]

    def request(self, split: Split, epoch: int, indices: np.ndarray) -> Request:
        """Return the crops of all views of images of a split."""
        assert split.sizes is not None
        heights, widths = split.sizes[indices].T
        views = range(len(self.views))
        cuts = [self.sample_parameters(epoch, indices, v, heights, widths) for v in views]
        return Request(indices, cuts, self.image_size)

    def sample_parameters(
        self, epoch: int, indices: np.ndarray, view: int, heights: np.ndarray, widths: np.ndarray
    ) -> ViewParameters:
        """Return parameters of one view of images of the given sizes (all arrays [B])."""
        settings = self.views[view]

        def draw(purpose: str, count: int, rows: np.ndarray | slice = slice(None)) -> np.ndarray:
            """Return numbers in [0, 1): [B, count]; of an operator that is off, 1: never chosen."""
            if purpose != "crop" and getattr(settings, purpose) == 0.0:
                return np.ones((len(indices), count), np.float32)
            return Stream(*self.purpose, purpose, view).uniform(epoch, indices[rows], count)

        boxes = None
        if settings.crop_scale is not None:
            boxes = sample_boxes(settings, lambda r, n: draw("crop", n, r), heights, widths)
        jitter, blur = draw("jitter", 9), draw("blur", 2)
        strengths = (settings.brightness, settings.contrast, settings.saturation)
        ranges = [(max(0.0, 1 - s), 1 + s) for s in strengths] + [(-settings.hue, settings.hue)]
        factors = [_uniform(jitter[:, 5 + i], *span) for i, span in enumerate(ranges)]
        return ViewParameters(
            boxes=boxes,
            flip=draw("flip", 1)[:, 0] < settings.flip,
            jitter=jitter[:, 0] < settings.jitter,
            order=np.argsort(jitter[:, 1:5], axis=1, kind="stable"),
            factors=np.stack(factors, axis=1).astype(np.float32),
            blur=blur[:, 0] < settings.blur,
            sigma=_uniform(blur[:, 1], *settings.blur_sigma).astype(np.float32),
            grey=draw("grey", 1)[:, 0] < settings.grey,
            solarise=draw("solarise", 1)[:, 0] < settings.solarise,
        )


def _cropped(
    images: Tensor | Sequence[Tensor], parameters: ViewParameters, size: int, place: torch.device
) -> Tensor:
    """Return the images cropped, resized and flipped: float32 [B, C, S, S]."""
    if parameters.boxes is not None:
        return ops.crop_resize(images, parameters.boxes, parameters.flip, size, place)
    result = ops.center_crop_resize(images, size, place)
    mirrored = moved(parameters.flip, place)[:, None, None, None]
    return torch.where(mirrored, result.flip(3), result)


def _colors(images: Tensor, parameters: ViewParameters, threshold: int) -> Tensor:
    """Return the images after jitter, blur, grey, solarise, each on those chosen for it."""
    p, batch = parameters, ops.Batch(images)
    if p.jitter.any():
        ops.color_jitter(batch, p.jitter, p.order, p.factors)
    if p.blur.any():
        ops.gaussian_blur(batch, p.blur, p.sigma)
    if p.grey.any():
        ops.grey(batch, p.grey)
    if p.solarise.any():
        ops.solarise(batch, p.solarise, threshold)
    return batch.restored()


@functools.lru_cache(maxsize=8)
def _statistics(
    mean: tuple[float, ...], std: tuple[float, ...], device: torch.device
) -> tuple[Tensor, Tensor]:
    """Return offset and factor [C, 1, 1] that normalise values on the scale 0-255."""
    spread = 255 * torch.tensor(std, device=device)[:, None, None]
    return -255 * torch.tensor(mean, device=device)[:, None, None] / spread, 1 / spread


def normalise(
    images: Tensor, mean: Sequence[float], std: Sequence[float], out: Tensor | None = None
) -> Tensor:
    """Return (x / 255 - mean) / std by channel: [B, C, H, W] on the scale 0-255 -> [B, C, H, W]."""
    offset, factor = _statistics(tuple(mean), tuple(std), images.device)
    return torch.addcmul(offset, images, factor, out=out)


@torch.no_grad()
def evaluation_transform(
    images: Images,
    *,
    image_size: int,
    mean: Sequence[float],
    std: Sequence[float],
    device: torch.device | str = "cpu",
    dtype: torch.dtype = torch.float32,
) -> Tensor:
    """Return evaluation's views, normalised: [B, C, S, S].

    Of uint8 [B, C, H, W], of B of [C, h, w], or of crops made by `Request.centres`.

    Shorter side to 256/224 of the image size, then centre crop; images of the right size already
    are only normalised.
    """
    place = torch.device(device)
    if isinstance(images, Crops):
        crops = images.view(0, place).float()
    else:
        crops = ops.center_crop_resize(images, image_size, place)
    return normalise(crops, mean, std).to(dtype)
