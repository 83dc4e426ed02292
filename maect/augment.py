"""Augmented views of a batch: parameters from per-sample streams, operators on the device.

Operators in the published order: random resized crop, flip, colour jitter, blur, grey, solarise.
What an image becomes depends on the seed, the role (the stage), the view, the epoch and the
image's index alone: not on the batch around it, the worker or the device.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from maect import image_ops as ops
from maect.settings import AugmentSettings, ViewSettings
from maect.streams import Stream

#: pixel values worked on together on a CPU: more leave its caches, fewer cost more calls each
_CPU_PIECE = 3 << 18
_CROP_TRIES = 10


@dataclass(frozen=True)
class ViewParameters:
    """What is done to each of B images; NumPy arrays of length B."""

    #: top, left, height, width [B, 4]; null: resize and centre crop
    boxes: np.ndarray | None
    flip: np.ndarray
    #: whether to jitter; the order of its four parts and their factors, both [B, 4]
    jitter: np.ndarray
    order: np.ndarray
    factors: np.ndarray
    blur: np.ndarray
    sigma: np.ndarray
    grey: np.ndarray
    solarise: np.ndarray

    def piece(self, part: slice) -> ViewParameters:
        fields = {name: value for name, value in vars(self).items() if value is not None}
        return ViewParameters(**{"boxes": None} | {n: value[part] for n, value in fields.items()})


def _uniform(draws: np.ndarray, low: float, high: float) -> np.ndarray:
    return low + (high - low) * draws.astype(np.float64)


def _tries(
    settings: ViewSettings, draws: np.ndarray, heights: np.ndarray, widths: np.ndarray
) -> tuple[np.ndarray, np.ndarray]:
    """Boxes int64 [B, T, 4] from draws [B, T, 4] in [0, 1), and which of them fit [B, T]."""
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
    """Boxes (top, left, height, width) int64 [B, 4], distributed as torchvision's
    `RandomResizedCrop.get_params`: ten tries, then the largest central crop of a fair ratio.

    `draw(rows, count)` gives the first `count` numbers in [0, 1) of each of the given rows.
    """
    everyone = np.arange(len(heights))
    tried, fits = _tries(settings, draw(everyone, 4)[:, None], heights, widths)
    boxes, rest = tried[:, 0], np.flatnonzero(~fits[:, 0])
    if not len(rest):
        return boxes
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
    """Makes augmented, normalised views of uint8 images.

    `seed` and `role` (the stage, say "mae") select the random streams. `mean` and `std` are the
    channel statistics to normalise by, for values in [0, 1].
    """

    def __init__(
        self,
        settings: AugmentSettings,
        *,
        image_size: int,
        mean: Sequence[float],
        std: Sequence[float],
        seed: int,
        role: str,
    ) -> None:
        self.views = (settings.view0, settings.view1 or settings.view0)
        self.image_size = image_size
        self.mean, self.std = tuple(mean), tuple(std)
        self.purpose = (seed, role)

    def __call__(
        self,
        images: Tensor | Sequence[Tensor],
        epoch: int,
        indices: np.ndarray,
        view: int = 0,
        *,
        device: torch.device | str | None = None,
        dtype: torch.dtype = torch.float32,
    ) -> Tensor:
        """View 0 or 1 of the images: uint8 [B, C, H, W], or B of [C, h, w] -> [B, C, S, S].

        `indices` int64 [B] are the samples' rows in their split. Work is done on `device`, by
        default the images'.
        """
        if isinstance(images, Tensor):
            sizes = np.tile(images.shape[2:], (len(images), 1))
        else:
            sizes = np.array([image.shape[1:] for image in images])
        parameters = self.sample_parameters(epoch, indices, view, sizes[:, 0], sizes[:, 1])
        place = torch.device(device) if device is not None else images[0].device
        side = self.image_size
        result = torch.empty(len(images), len(self.mean), side, side, dtype=dtype, device=place)
        for part, piece in self._pieces(images, parameters, view, place):
            normalise(piece, self.mean, self.std, out=result[part])
        return result

    def sample_parameters(
        self, epoch: int, indices: np.ndarray, view: int, heights: np.ndarray, widths: np.ndarray
    ) -> ViewParameters:
        """Parameters of one view of images of the given sizes (all arrays [B])."""
        settings = self.views[view]
        indices = np.asarray(indices)

        def draw(purpose: str, count: int, rows: np.ndarray | None = None) -> np.ndarray:
            chosen = indices if rows is None else indices[rows]
            return Stream(*self.purpose, purpose, view).uniform(epoch, chosen, count)

        boxes = None
        if settings.crop_scale is not None:
            boxes = sample_boxes(
                settings, lambda rows, count: draw("crop", count, rows), heights, widths
            )
        none = np.zeros(len(indices), dtype=bool)
        jitter = draw("jitter", 9) if settings.jitter else np.ones((len(indices), 9), np.float32)
        strengths = (settings.brightness, settings.contrast, settings.saturation)
        ranges = [(max(0.0, 1 - s), 1 + s) for s in strengths] + [(-settings.hue, settings.hue)]
        factors = [_uniform(jitter[:, 5 + i], *span) for i, span in enumerate(ranges)]
        blur = draw("blur", 2) if settings.blur else np.ones((len(indices), 2), np.float32)
        return ViewParameters(
            boxes=boxes,
            flip=draw("flip", 1)[:, 0] < settings.flip if settings.flip else none,
            jitter=jitter[:, 0] < settings.jitter,
            order=np.argsort(jitter[:, 1:5], axis=1, kind="stable"),
            factors=np.stack(factors, axis=1).astype(np.float32),
            blur=blur[:, 0] < settings.blur,
            sigma=_uniform(blur[:, 1], *settings.blur_sigma).astype(np.float32),
            grey=draw("grey", 1)[:, 0] < settings.grey if settings.grey else none,
            solarise=draw("solarise", 1)[:, 0] < settings.solarise if settings.solarise else none,
        )

    def apply(
        self,
        images: Tensor | Sequence[Tensor],
        parameters: ViewParameters,
        view: int = 0,
        *,
        device: torch.device | str | None = None,
    ) -> Tensor:
        """The operators alone, given parameters: float32 [B, C, S, S] on the scale 0-255."""
        place = torch.device(device) if device is not None else images[0].device
        return torch.cat([piece for _, piece in self._pieces(images, parameters, view, place)])

    @torch.no_grad()
    def _pieces(
        self,
        images: Tensor | Sequence[Tensor],
        parameters: ViewParameters,
        view: int,
        place: torch.device,
    ) -> Iterator[tuple[slice, Tensor]]:
        """Views of consecutive parts of the batch, small enough for a CPU's cache."""
        threshold = self.views[view].solarise_threshold
        step = len(images)
        if place.type == "cpu":
            step = max(1, _CPU_PIECE // (len(self.mean) * self.image_size**2))
        for start in range(0, len(images), step):
            part = slice(start, start + step)
            chosen = parameters.piece(part)
            with torch.autocast(place.type, enabled=False):
                piece = _cropped(images[part], chosen, self.image_size, place)
                yield part, _colors(piece, chosen, threshold)


def _cropped(
    images: Tensor | Sequence[Tensor], parameters: ViewParameters, size: int, place: torch.device
) -> Tensor:
    """Crop, resize and flip: float32 [B, C, S, S]."""
    if parameters.boxes is not None:
        return ops.crop_resize(images, parameters.boxes, parameters.flip, size, place)
    result = ops.center_crop_resize(images, size, place)
    mirrored = torch.from_numpy(parameters.flip).to(place)[:, None, None, None]
    return torch.where(mirrored, result.flip(3), result)


def _colors(images: Tensor, parameters: ViewParameters, threshold: int) -> Tensor:
    """Jitter, blur, grey, solarise, each on the images chosen for it."""
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
    """Offset and factor [C, 1, 1] that normalise values on the scale 0-255."""
    spread = 255 * torch.tensor(std, device=device)[:, None, None]
    return -255 * torch.tensor(mean, device=device)[:, None, None] / spread, 1 / spread


def normalise(
    images: Tensor, mean: Sequence[float], std: Sequence[float], out: Tensor | None = None
) -> Tensor:
    """(x / 255 - mean) / std by channel: [B, C, H, W] on the scale 0-255 -> the same shape."""
    offset, factor = _statistics(tuple(mean), tuple(std), images.device)
    return torch.addcmul(offset, images, factor, out=out)


@torch.no_grad()
def evaluation_transform(
    images: Tensor | Sequence[Tensor],
    *,
    image_size: int,
    mean: Sequence[float],
    std: Sequence[float],
    device: torch.device | str | None = None,
    dtype: torch.dtype = torch.float32,
) -> Tensor:
    """Views for evaluation: uint8 [B, C, H, W], or B of [C, h, w] -> [B, C, S, S], normalised.

    Shorter side to 256/224 of the image size, then centre crop; images of the right size already
    are only normalised.
    """
    place = torch.device(device) if device is not None else images[0].device
    return normalise(ops.center_crop_resize(images, image_size, place), mean, std).to(dtype)
