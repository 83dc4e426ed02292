"""Losses of masked autoencoding and of NNCLR.

Formulas: He et al. 2022 (arXiv 2111.06377), Dwibedi et al. 2021 (arXiv 2104.14548), and MAE-CT,
which combines them (arXiv 2304.10520).
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor


def patchify(images: Tensor, patch_size: int, *, channels_first: bool = False) -> Tensor:
    """Return images cut into patches: [B, C, H, W] -> [B, N, P], P by (row, column, channel).

    With `channels_first` P is by (channel, row, column), as a convolution has its weights, which is
    quicker. Patches run along the rows of the image. Raises ValueError if a side is no multiple of
    `patch_size`.
    """
    batch, channels, height, width = images.shape
    if height % patch_size or width % patch_size:
        raise ValueError(f"images of {height}x{width} cannot be cut into patches of {patch_size}")
    rows, columns = height // patch_size, width // patch_size
    grid = images.reshape(batch, channels, rows, patch_size, columns, patch_size)
    inside = (1, 3, 5) if channels_first else (3, 5, 1)
    return grid.permute(0, 2, 4, *inside).reshape(batch, rows * columns, -1)


def unpatchify(patches: Tensor, patch_size: int, grid: tuple[int, int]) -> Tensor:
    """Return the images of patches, the inverse of `patchify`: [B, N, P] -> [B, C, H, W].

    `grid` is (rows, columns) of the N patches.
    """
    pixels = patches.reshape(len(patches), *grid, patch_size, patch_size, -1)
    return pixels.permute(0, 5, 1, 3, 2, 4).flatten(4, 5).flatten(2, 3)


def mae_loss_per_image(
    pred: Tensor, images: Tensor, mask: Tensor, patch_size: int, norm_pix: bool = True
) -> Tensor:
    """Return each image's sum over masked patches of the patch's mean squared error: [B].

    Shares of a global batch add up: its loss is the sum of these values over all images, divided
    by the number of masked patches of all images. Arguments as in `mae_loss`.
    """
    target = patchify(images, patch_size)
    if norm_pix:
        # in two passes: on a CPU `Tensor.var` takes ten times as long
        target = target - target.mean(dim=-1, keepdim=True)
        variance = target.square().sum(dim=-1, keepdim=True) / (target.shape[-1] - 1)
        target = target / torch.sqrt(variance + 1e-6)
    error = (pred.to(target.dtype) - target).square().mean(dim=-1)
    return (error * mask).sum(dim=-1)


def mae_loss(
    pred: Tensor, images: Tensor, mask: Tensor, patch_size: int, norm_pix: bool = True
) -> Tensor:
    """Return the masked autoencoder's loss, a scalar: mean squared error over masked patches.

    `pred` [B, N, P] as `patchify` orders it, `images` [B, C, H, W], `mask` [B, N] with 1 where a
    patch was removed. `norm_pix`: the target is `(x - mean) / sqrt(var + 1e-6)` by each patch's
    own mean and unbiased variance (arXiv 2111.06377, section 3). The error is computed in the
    images' precision, whatever the prediction's.
    """
    return mae_loss_per_image(pred, images, mask, patch_size, norm_pix).sum() / mask.sum()


def full_precision(x: Tensor) -> torch.autocast:
    """Return the context in which products on the device of `x` are not rounded to 16 bits."""
    return torch.autocast(x.device.type, enabled=False)


def in_full(x: Tensor) -> Tensor:
    """Return `x` in at least float32."""
    return x.float() if x.dtype in (torch.bfloat16, torch.float16) else x


def nnclr_loss(predicted: Tensor, neighbors: Tensor, temperature: float) -> Tensor:
    """Return NNCLR's loss in one direction, a scalar.

    Mean cross entropy over the rows of `neighbors @ predicted.T / temperature` [B, B], with the
    diagonal as the positives: a row is the neighbour of one image in one view, the columns are the
    predictions of all images in the other view. Both [B, D], of the *global* batch. Predictions
    are L2-normalised here; neighbours are taken as they are, unit-norm rows of a queue. Computed
    in at least float32.

    The published code computes, on each of R ranks, the rows of its own samples against the
    predictions gathered from all ranks with a gather that sums gradients over ranks; then
    DistributedDataParallel averages. Its ranks' losses average to the loss here, and each rank's
    gradient before averaging is R times its share of the gradient here, so the averages are equal.
    """
    with full_precision(predicted):
        predicted = F.normalize(in_full(predicted), dim=-1)
        similarities = neighbors.to(predicted.dtype) @ predicted.T / temperature  # [B, B]
        return F.cross_entropy(similarities, torch.arange(len(predicted), device=predicted.device))
