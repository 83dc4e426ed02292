"""What keeps a network from learning labelled images by heart: RandAugment, erasing, mixup, CutMix
and dropped paths.

The operators are torchvision's. They draw from torch's own generator, so it is seeded for each
image, or for each batch, and put back: results depend on the seed, the image and the epoch, not on
the batch's cut, the number of workers or the device.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager

import numpy as np
import torch
from torch import Tensor, nn
from torchvision.transforms import InterpolationMode, v2

from maect.augment import normalise
from maect.device import moved
from maect.streams import hash_key

#: magnitudes 0 to 10, as the published recipes count them
_MAGNITUDES = 11


@contextmanager
def seeded(*key: int | str) -> Iterator[None]:
    """Let torch's CPU generator start from `key`, and afterwards go on as if nothing was drawn."""
    with torch.random.fork_rng(devices=[]):
        torch.default_generator.manual_seed(hash_key(*key))
        yield


def strengthen(
    views: Tensor,
    keys: Sequence[tuple[int | str, ...]],
    *,
    magnitude: int,
    erasing: float,
    mean: Sequence[float],
    std: Sequence[float],
) -> Tensor:
    """Return normalised views after RandAugment and erasing: [B, C, S, S] -> [B, C, S, S].

    Each image's draws follow its own one of the B `keys`. `magnitude` (0: none) is of two operators
    (Cubuk et al. 2020, arXiv 1909.13719); `erasing` is the probability of a rectangle of noise
    (Zhong et al. 2020, arXiv 1708.04896). Pixels are rounded to 8 bits, as RandAugment takes them.
    Work is done on the CPU.
    """
    place, dtype = views.device, views.dtype
    augment = v2.RandAugment(
        magnitude=magnitude,
        num_magnitude_bins=_MAGNITUDES,
        interpolation=InterpolationMode.BILINEAR,
        fill=[round(255 * value) for value in mean],
    )
    erase = v2.RandomErasing(p=erasing, value="random")
    spread, offset = (torch.tensor(s, dtype=dtype)[:, None, None] for s in (std, mean))
    found = []
    for view, key in zip(views.cpu(), keys, strict=True):
        with seeded(*key):
            if magnitude:
                pixels = ((view * spread + offset) * 255).round().clamp(0, 255).byte()
                view = normalise(augment(pixels).to(dtype), mean, std)
            found.append(erase(view))
    return moved(torch.stack(found), place)


def mix(
    views: Tensor,
    labels: Tensor,
    classes: int,
    key: tuple[int | str, ...],
    mixup: float,
    cutmix: float,
) -> tuple[Tensor, Tensor]:
    """Return all views but the first, each mixed with the one before it, and soft labels.

    [1+B, C, S, S], [1+B] -> [B, C, S, S], [B, classes]. mixup (arXiv 1710.09412) or CutMix (arXiv
    1905.04899), with these parameters of their Beta distributions, 0 for never; where both are
    wanted each takes half of the batches. `key` is the batch's.
    """
    kinds = [kind(alpha=a) for kind, a in ((v2.MixUp, mixup), (v2.CutMix, cutmix)) if a]
    targets = (labels[:, None] == torch.arange(classes, device=labels.device)).to(views.dtype)
    with seeded(*key):
        chosen = kinds[int(torch.randint(len(kinds), ()))]
        views, targets = chosen(views, targets)
    return views[1:], targets[1:]


class DropPath(nn.Module):
    """Stochastic depth (Huang et al. 2016, arXiv 1603.09382): a branch left out for some images.

    Which is given by `draws` [B] in [0, 1), one number an image; None: no branch is left out.
    """

    def __init__(self, rate: float) -> None:
        super().__init__()
        self.rate = rate
        self.draws: Tensor | None = None

    def forward(self, x: Tensor) -> Tensor:
        """Return the branch's output, scaled where it is kept: [B, N, D] -> [B, N, D]."""
        if self.draws is None:
            return x
        keep = (self.draws >= self.rate).to(x.dtype) / (1 - self.rate)
        return x * keep[:, None, None]


def add_drop_path(blocks: nn.ModuleList, rate: float) -> list[DropPath]:
    """Give both branches of timm's blocks a path that is dropped: from 0 in the first block to
    `rate` in the last. Return the paths, two a block."""
    paths = []
    for block, own in zip(blocks, np.linspace(0, rate, len(blocks)), strict=True):
        block.drop_path1, block.drop_path2 = DropPath(float(own)), DropPath(float(own))
        paths += [block.drop_path1, block.drop_path2]
    return paths
