"""Patches, the masked autoencoder's loss and NNCLR's, apart from the golden values."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from maect.losses import mae_loss, mae_loss_per_image, nnclr_loss, patchify, unpatchify


def numbers(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.from_numpy(np.random.default_rng(seed).normal(size=shape).astype(np.float32))


def test_patch_values_are_row_column_channel() -> None:
    images = numbers(2, 3, 8, 12)
    patches = patchify(images, 4)
    assert patches.shape == (2, 6, 48)
    # patch 4 is in row 1, column 1; its value at pixel (2, 3), channel 1
    assert patches[1, 4, (2 * 4 + 3) * 3 + 1] == images[1, 1, 4 + 2, 4 + 3]


def test_unpatchify_inverts() -> None:
    wide, square = numbers(2, 3, 8, 12), numbers(2, 1, 8, 8)
    assert torch.equal(unpatchify(patchify(wide, 4), 4, (2, 3)), wide)
    assert torch.equal(unpatchify(patchify(square, 2), 2, (4, 4)), square)


def test_bad_shapes_are_named() -> None:
    with pytest.raises(ValueError, match="9x8 cannot be cut into patches of 4"):
        patchify(numbers(1, 1, 9, 8), 4)


def test_shares_of_a_batch_add_up() -> None:
    images, pred = numbers(6, 3, 8, 8), numbers(6, 4, 48, seed=1)
    mask = (numbers(6, 4, seed=2) > 0).float()
    parts = [
        mae_loss_per_image(pred[cut], images[cut], mask[cut], 4).sum()
        for cut in (slice(0, 2), slice(2, 6))
    ]
    whole = mae_loss(pred, images, mask, 4)
    assert whole.item() == pytest.approx((sum(parts) / mask.sum()).item(), rel=1e-6)


def test_mae_loss_computes_in_the_images_precision() -> None:
    images, pred, mask = numbers(2, 3, 8, 8), numbers(2, 4, 48, seed=1), torch.ones(2, 4)
    assert mae_loss(pred.bfloat16(), images, mask, 4).dtype == torch.float32
    assert mae_loss(pred.double(), images.double(), mask, 4).dtype == torch.float64


def test_nnclr_loss_stays_in_full_precision_under_autocast() -> None:
    predicted, neighbors = numbers(16, 8), torch.nn.functional.normalize(numbers(16, 8, seed=1))
    with torch.autocast("cpu", dtype=torch.bfloat16):
        mixed = nnclr_loss(predicted, neighbors, 0.15)
    assert torch.equal(mixed, nnclr_loss(predicted, neighbors, 0.15))
    assert nnclr_loss(predicted.bfloat16(), neighbors, 0.15).dtype == torch.float32
    assert nnclr_loss(predicted.double(), neighbors, 0.15).dtype == torch.float64
