"""Image operators on whole batches, each with its own parameters for every image.

Images are float32 [B, C, H, W] on the scale 0-255, on any device; parameters are NumPy arrays.
Each operator names the one it equals, within 2/255 given the same parameters; tests compare them.
On a CPU, `torch.where`, comparisons and scattered writes cost ten times what arithmetic does at
these sizes, so conditions are written as arithmetic and chosen images are sorted side by side.
"""

from __future__ import annotations

import functools
from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.nn.functional import interpolate

from maect.device import moved

#: largest table of crop matrices kept for a size of image, numbers
_TABLE_LIMIT = 20_000_000
_GREY = (0.299, 0.587, 0.114)
#: numbers that an operator of many passes works on at a time on a CPU, to stay in its cache
_CACHED = 1 << 18
#: Pillow's box filter works in units of 2^-24
_FIXED = 2.0**24


class Batch:
    """Images of a batch that operators change in place, each on those it was chosen for.

    They are kept sorted by what is done to them next, so that an operator works on one slice;
    `rows` says which image is where, and `restored` puts them back in order.
    """

    def __init__(self, images: Tensor) -> None:
        self.images = images
        self.rows = np.arange(len(images))

    def _reorder(self, order: np.ndarray) -> None:
        if (order[1:] < order[:-1]).any():
            at = moved(order, self.images.device)
            self.images, self.rows = self.images.index_select(0, at), self.rows[order]

    def sort(self, kinds: np.ndarray, count: int) -> list[int]:
        """Bring images of one kind together: `kinds` [B] of 0..count-1, the kinds in turn.

        Return where each kind begins, and the end: kind k lies in `images[at[k]:at[k + 1]]`.
        """
        self._reorder(np.argsort(kinds[self.rows], kind="stable"))
        return [0, *np.cumsum(np.bincount(kinds, minlength=count)).tolist()]

    def chosen(self, rows: np.ndarray) -> Tensor:
        """Return a view of the images chosen by bool [B]."""
        _, count, _ = self.sort(np.where(rows, 0, 1), 2)
        return self.images[:count]

    def restored(self) -> Tensor:
        """Return the images in the order they came in."""
        self._reorder(np.argsort(self.rows))
        return self.images


def cached(images: Tensor, start: int, end: int) -> Iterator[slice]:
    """Yield slices from `start` to `end`, of images that fit a CPU's cache; whole elsewhere."""
    step = max(1, _CACHED // images[0].numel()) if images.device.type == "cpu" else len(images)
    for first in range(start, end, step):
        yield slice(first, min(first + step, end))


def _column(values: np.ndarray, like: Tensor) -> Tensor:
    """Return values [n] as float32 [n, 1, 1, 1] on the device of `like`."""
    return moved(values.astype(np.float32), like.device)[:, None, None, None]


def resample_weights(
    starts: np.ndarray, lengths: np.ndarray, mirror: np.ndarray, size: int, out: int
) -> Tensor:
    """Return matrices that cut an interval out of a row of pixels and resize it to `out` pixels.

    float32 [n, out, size]. Interval i is `starts[i]`, `lengths[i]` pixels long, of a row of `size`;
    pixels outside it have no part. Bicubic (a = -0.5), widened when shrinking, as in Pillow's
    Resample.c. Places are counted from the interval's start.
    """
    start, length, mirrored = (np.asarray(a)[:, None, None] for a in (starts, lengths, mirror))
    target = np.arange(out)[:, None]
    target = np.where(mirrored, out - 1 - target, target)  # [n, out, 1]
    scale = length / out
    center = (target + 0.5) * scale  # of each output pixel, in the interval
    pixel = np.arange(size) - start  # [n, 1, size]
    # ---- whole pixels that the filter reaches, two (widened) to each side
    widening = np.maximum(scale, 1.0)
    first = np.maximum(np.floor(center - 2 * widening + 0.5), 0)
    last = np.minimum(np.floor(center + 2 * widening + 0.5), length)
    # ---- the cubic at their distance, in two pieces; weights of an output pixel sum to 1
    x = np.abs(pixel - center + 0.5) / widening
    near = (1.5 * x - 2.5) * x * x + 1
    far = ((-0.5 * x + 2.5) * x - 4) * x + 2
    reached = (pixel >= first) & (pixel < last) & (x < 2)
    weights = np.where(reached, np.where(x < 1, near, far), 0.0)
    return torch.from_numpy((weights / weights.sum(2, keepdims=True)).astype(np.float32))


@functools.lru_cache(maxsize=8)
def _crop_table(size: int, out: int, device: torch.device) -> Tensor:
    """Return `resample_weights` of all intervals: by length, by start; plain, then mirrored."""
    pairs = [(start, length) for length in range(1, size + 1) for start in range(size - length + 1)]
    starts, lengths = np.tile(pairs, (2, 1)).T
    mirror = np.arange(2 * len(pairs)) >= len(pairs)
    return resample_weights(starts, lengths, mirror, size, out).to(device)


def _crop_weights(
    starts: np.ndarray, lengths: np.ndarray, mirror: np.ndarray, size: int, out: int, device: Any
) -> Tensor:
    """Return the rows of `_crop_table` for given intervals: [B, out, size]."""
    table = _crop_table(size, out, device)
    # there are size + 1 - l intervals of each length l; this many are of a smaller one
    shorter = (lengths - 1) * (size + 1) - (lengths - 1) * lengths // 2
    rows = shorter + starts + mirror * (len(table) // 2)
    return table.index_select(0, moved(rows, device))


def _resize(images: Tensor, vertical: Tensor, horizontal: Tensor) -> Tensor:
    """Return images resized by `horizontal` [B, w, W], then `vertical` [B, h, H]: [B, C, h, w].

    `images` are uint8; the result is rounded to 8-bit levels after each of the two.
    """
    batch, channels, height, width = images.shape
    result = horizontal.new_empty(batch, channels, vertical.shape[1], horizontal.shape[1])
    for part in cached(result, 0, batch):
        rows = images[part].float().reshape(-1, channels * height, width)
        rows = torch.bmm(rows, horizontal[part].mT).round_().clamp_(0, 255)  # [b, C H, w]
        columns = torch.matmul(vertical[part, None], rows.view(-1, channels, height, rows.shape[2]))
        torch.clamp(columns.round_(), 0, 255, out=result[part])
    return result


def crop_resize(
    images: Tensor | Sequence[Tensor],
    boxes: np.ndarray,
    flip: np.ndarray,
    out: int,
    device: torch.device,
) -> Tensor:
    """Return `boxes` (top, left, height, width) [B, 4] cut out, resized, some mirrored.

    uint8 [B, C, H, W], or B of [C, h, w] -> float32 [B, C, out, out] on `device`. Equals
    torchvision's `resized_crop` of uint8 tensors, bicubic with antialiasing, then `hflip`: whole
    8-bit levels, rows before columns. So did Pillow up to version 12; later versions take the
    columns of some tall boxes first, which differs where the filter overshoots 0 or 255.
    Small images are resized on the device, by matrices; large ones one by one on the CPU, where
    cut and resized they are also quicker to move.
    """
    if isinstance(images, Tensor):
        height, width = images.shape[2:]
        side = max(height, width)
        if side * (side + 1) * out * side <= _TABLE_LIMIT:
            top, left, heights, widths = boxes.T
            vertical = _crop_weights(top, heights, np.zeros_like(flip), height, out, device)
            horizontal = _crop_weights(left, widths, flip, width, out, device)
            return _resize(moved(images, device), vertical, horizontal)

    cut = [crop(image.cpu(), box, out) for image, box in zip(images, boxes, strict=True)]
    cut = [image.flip(2) if turned else image for image, turned in zip(cut, flip, strict=True)]
    return moved(torch.stack(cut), device).float()


def crop(image: Tensor, box: np.ndarray, out: int) -> Tensor:
    """Return a box (top, left, height, width), resized: uint8 [C, h, w] -> [C, out, out]."""
    top, left, height, width = box.tolist()
    return _interpolate(image[:, top : top + height, left : left + width], (out, out))


def center_crop_resize(
    images: Tensor | Sequence[Tensor], size: int, device: torch.device
) -> Tensor:
    """Return the centres of images whose shorter side is resized to 256/224 of `size`.

    uint8 [B, C, H, W], or B of [C, h, w] -> float32 [B, C, size, size] on `device`. Equals
    torchvision's `resize` of uint8 tensors, bicubic with antialiasing, and `center_crop`. Images
    of `size` x `size` stay as they are.
    """
    if isinstance(images, Tensor) and images.shape[2:] == (size, size):
        return moved(images, device).float()

    centres = torch.stack([center_crop(image.cpu(), size) for image in images])
    return moved(centres, device).float()


def center_crop(image: Tensor, size: int) -> Tensor:
    """Return the centre of one image as `center_crop_resize` does: uint8 [C, h, w] -> the same."""
    if image.shape[1:] == (size, size):
        return image
    sides, short = image.shape[1:], size * 256 // 224
    height, width = (short * side // min(sides) for side in sides)
    top, left = round((height - size) / 2), round((width - size) / 2)
    return _interpolate(image, (height, width))[:, top : top + size, left : left + size]


def _interpolate(image: Tensor, size: tuple[int, int]) -> Tensor:
    """Return uint8 [C, h, w] resized to [C, *size], bicubic with antialiasing."""
    if image.shape[1:] == size:
        return image
    return interpolate(image[None], size, mode="bicubic", antialias=True)[0]


def greyscale(images: Tensor) -> Tensor:
    """Return luminance [B, 1, H, W] of RGB images, as torchvision's `rgb_to_grayscale`."""
    red, green, blue = images.split(1, dim=1)
    return (red * _GREY[0]).add_(green, alpha=_GREY[1]).add_(blue, alpha=_GREY[2])


@functools.lru_cache(maxsize=8)
def _corners(device: torch.device) -> Tensor:
    """Return where red, green and blue lie on the hue's hexagon, from red: [3, 1, 1]."""
    return torch.tensor([0.0, 2.0, -2.0], device=device)[:, None, None]


def adjust_hue(images: Tensor, shift: np.ndarray) -> Tensor:
    """Return RGB images with their hue turned by `shift` [B] of a full circle, at most half.

    Equals torchvision's `adjust_hue` of a tensor (for a PIL image it rounds the hue to 8 bits).
    The hue is a place on a hexagon with sides of length 1. A colour lies at a distance |h| = 1 +
    (g + b - r - min) / (max - min) from red, on green's side where g > b. From a hue, a channel is
    min + (max - min) (2 - d), clipped, where d is the distance from the channel's corner.
    """
    red, green, blue = images.split(1, dim=1)
    least = images.amin(1, keepdim=True)
    spread = images.amax(1, keepdim=True).sub_(least)
    hue = (green + blue).sub_(red).sub_(least).div_(spread.clamp(min=1e-6)).add_(1)
    hue = hue.copysign_(green - blue).add_(_column(6 * shift, images))
    if np.abs(shift).max() > 1 / 6:  # less leads no further than six from any corner
        hue.sub_((hue / 6).round_(), alpha=6)
    inside = (hue - _corners(images.device)).abs_().sub_(3).abs_().clamp_(1, 2)
    return inside.mul_(spread).add_(least.sub_(spread))


def _blend(images: Tensor, factor: Tensor, contrast: int, saturation: int) -> None:
    """Blend images in place: x f + (1 - f) g.

    g is 0 for the first images (brightness), from image number `contrast` on the image's mean
    luminance, and from `saturation` on the luminance of each pixel.
    """
    toward = None
    if contrast < len(images):
        toward = images[contrast:]
        toward = greyscale(toward) if images.shape[1] == 3 else toward.clone()
        if contrast < saturation:
            flat = toward[: saturation - contrast]
            flat.copy_(flat.mean((2, 3), keepdim=True))
        toward.mul_(1 - factor[contrast:])
    images.mul_(factor)
    if toward is not None:
        images[contrast:] += toward
    images.clamp_(0, 255)


def color_jitter(batch: Batch, chosen: np.ndarray, order: np.ndarray, factors: np.ndarray) -> None:
    """Change brightness, contrast, saturation and hue, each image in an order of its own.

    `chosen` [B] bool; `order` [B, 4] holds a permutation of (0 brightness, 1 contrast,
    2 saturation, 3 hue), the first to be applied first; `factors` [B, 4] the strength of each by
    that number. Equals torchvision's `adjust_brightness`, `_contrast`, `_saturation` and `_hue`;
    on one channel the last two do nothing, as there.
    """
    parts = 4 if batch.images.shape[1] == 3 else 2
    kinds = np.where(chosen[:, None] & (order < parts), order, 4)
    for position in range(4):
        # where each part of the jitter begins among the images
        _, contrast, saturation, hue, others, _ = batch.sort(kinds[:, position], 5)
        if hue:
            rows = batch.rows[:hue]
            factor = _column(factors[rows, kinds[rows, position]], batch.images)
            _blend(batch.images[:hue], factor, contrast, saturation)
        if hue < others:
            turned = batch.images[hue:others]
            turned.copy_(adjust_hue(turned, factors[batch.rows[hue:others], 3]))


def _box_radius(sigma: np.ndarray, passes: int = 3) -> np.ndarray:
    """Return the radius [n] of the box that, applied `passes` times, blurs like a Gaussian.

    As in Pillow's BoxBlur.c, after Gwosdek et al. 2011, "Theoretical foundations of Gaussian
    convolution by extended box filtering".
    """
    variance = sigma.astype(np.float64) ** 2 / passes
    whole = np.floor((np.sqrt(12 * variance + 1) - 1) / 2)
    part = (2 * whole + 1) * (whole * (whole + 1) - 3 * variance)
    return whole + part / (6 * (variance - (whole + 1) ** 2))


def _box_weights(radius: np.ndarray) -> np.ndarray:
    """Return weights of boxes of `radius` [n]: float64 [2, n].

    The first is of each pixel wholly inside, the second of each of the two that are in part.

    Pillow cuts weights to multiples of 2^-24, and what is cut decides which way ties are rounded
    (they are common: sigma 1 gives 1/6, 4/6, 1/6). 64 times the cut makes them fall the same way
    in float32.
    """
    width = 2 * radius + 1
    whole = np.floor(radius)
    exact = np.stack([_FIXED / width, (radius - whole) * _FIXED / width])
    inner = np.floor(np.float32(_FIXED) / width.astype(np.float32)).astype(np.float64)
    outer = np.floor((_FIXED - (2 * whole + 1) * inner) / 2)
    inner, outer = (exact + 64 * (np.stack([inner, outer]) - exact)) / _FIXED
    return np.stack([inner, outer])


def _box_blur(images: Tensor, whole: int, weights: list[Tensor], dim: int) -> Tensor:
    """Return images after three boxes along `dim`, ends repeated, each rounded to 8-bit levels.

    A box reaches `whole` pixels to each side and a part of one more; `weights` as `_box_weights`
    gives them, each [B, 1, 1, 1].
    """
    inner, outer = weights
    reach, size = whole + 1, images.shape[dim]
    shape = list(images.shape)
    shape[dim] += 2 * reach
    padded = images.new_empty(shape)
    result = padded.narrow(dim, reach, size)
    result.copy_(images)
    for _ in range(3):
        padded.narrow(dim, 0, reach).copy_(result.narrow(dim, 0, 1))
        padded.narrow(dim, size + reach, reach).copy_(result.narrow(dim, size - 1, 1))
        total = padded.narrow(dim, 0, size) + padded.narrow(dim, 2 * reach, size)
        total.mul_(outer)
        for shift in range(1, 2 * reach):
            total.addcmul_(padded.narrow(dim, shift, size), inner)
        torch.round(total, out=result)
    return result


def gaussian_blur(batch: Batch, chosen: np.ndarray, sigma: np.ndarray) -> None:
    """Blur the `chosen` images [B] with standard deviation `sigma` [B] pixels.

    Equals Pillow's `ImageFilter.GaussianBlur`: three box passes along each direction, rounded
    after each.
    """
    radius = _box_radius(sigma)
    weights = _box_weights(radius)
    whole = np.floor(radius).astype(int)
    largest = int(whole.max())
    at = batch.sort(np.where(chosen, whole, largest + 1), largest + 2)
    for reach in range(largest + 1):
        for where in cached(batch.images, at[reach], at[reach + 1]):
            own = [_column(weight[batch.rows[where]], batch.images) for weight in weights]
            rows = _box_blur(batch.images[where].round(), reach, own, 3)
            batch.images[where] = _box_blur(rows, reach, own, 2)


def grey(batch: Batch, chosen: np.ndarray) -> None:
    """Make the `chosen` RGB images [B] grey, as torchvision's `rgb_to_grayscale` to 3 channels."""
    images = batch.chosen(chosen)
    if images.shape[1] == 3:
        images.copy_(greyscale(images).expand_as(images))


def solarise(batch: Batch, chosen: np.ndarray, threshold: int) -> None:
    """Invert what is at or above `threshold`, an 8-bit level, in the `chosen` images [B].

    Equals torchvision's `solarize`.
    """
    images = batch.chosen(chosen)
    invert = images.round().sub_(threshold - 1).clamp_(0, 1)
    images.copy_(torch.lerp(images, 255 - images, invert))
