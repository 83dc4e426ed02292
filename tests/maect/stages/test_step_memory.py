"""What autograd keeps of a forward pass for the backward pass: the figures of docs/performance.md.

On fake tensors, in bf16 by the CPU's autocast, whose attention keeps what a GPU's does. A storage
counts once, weights do not (their bf16 copies do). Depths 2 and 4 stand for the real one.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode

from maect import memory
from maect.losses import mae_loss_per_image
from maect.models import Decoder, Encoder, pool, random_masking
from maect.settings import ModelSettings, NumericsSettings

SIZES: dict[str, dict[str, int]] = {
    "L/16": {"patch_size": 16, "dim": 1024, "heads": 16},
    "H/14": {"patch_size": 14, "dim": 1280, "heads": 16},
}
DEPTH = {"L/16": 24, "H/14": 32}


def saved_bytes(networks: list[nn.Module], forward: Callable[[], Any]) -> int:
    weights = {p.untyped_storage()._cdata for network in networks for p in network.parameters()}
    kept: dict[int, torch.UntypedStorage] = {}  # alive, so that no two share an address

    def pack(tensor: Tensor) -> Tensor:
        storage = tensor.untyped_storage()
        if storage._cdata not in weights:
            kept[storage._cdata] = storage
        return tensor

    with (
        torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor),
        torch.autocast("cpu", torch.bfloat16),
    ):
        held = forward()
    assert held.requires_grad
    return sum(storage.nbytes() for storage in kept.values())


def of_mae(size: str, depth: int, batch: int, recompute: bool) -> int:
    encoder = Encoder(224, in_chans=3, depth=depth, checkpoint_activations=recompute, **SIZES[size])
    patches, patch = encoder.grid[0] ** 2, encoder.patch_size
    decoder = Decoder(encoder.dim, encoder.grid, 3 * patch**2)
    images = torch.empty(batch, 3, 224, 224)
    keep, restore, mask = random_masking(torch.empty(batch, patches), 0.75)

    def forward() -> Tensor:
        predicted = decoder(encoder(images, keep), restore)
        return mae_loss_per_image(predicted, images, mask, patch)

    return saved_bytes([encoder, decoder], forward)


def of_tuning(size: str, depth: int, views: int, recompute: bool) -> int:
    encoder = Encoder(224, in_chans=3, depth=depth, checkpoint_activations=recompute, **SIZES[size])
    images, frozen = torch.empty(views, 3, 224, 224), depth // 2
    return saved_bytes([encoder], lambda: pool(encoder(images, frozen_blocks=frozen), "mean"))


@pytest.mark.parametrize(
    ("of", "size", "batch", "whole", "recomputed"),
    [
        (of_mae, "L/16", 128, 10.3, 4.6),
        (of_mae, "L/16", 512, 39.1, 18.3),
        (of_mae, "H/14", 64, 10.0, 3.3),
        (of_tuning, "L/16", 256, 22.9, 2.7),
        (of_tuning, "H/14", 128, 25.1, 2.9),
        # the published batches, of which one view of the MAE's is held at a time
        (of_mae, "L/16", 1024, 77.6, 36.6),
        (of_tuning, "L/16", 2048, 180.8, 21.5),
        (of_tuning, "H/14", 2048, 392.0, 45.8),
    ],
)
def test_saved_for_backward_is_what_the_table_says(
    of: Callable[[str, int, int, bool], int], size: str, batch: int, whole: float, recomputed: float
) -> None:
    found, calculated = [], []
    model = ModelSettings(size="large" if size == "L/16" else "huge", patch_size=int(size[2:]))
    for recompute in (False, True):
        numerics = NumericsSettings(precision="bf16", checkpoint_activations=recompute)
        settings = {"model": model.resolved(), "numerics": numerics.resolved()}
        settings["data"] = {"image_size": 224}
        if of is of_mae:
            settings["train"] = {"batch_size": batch, "mask_ratio": 0.75}
        else:  # `batch` views, two of each image
            settings["train"] = {"batch_size": batch // 2, "frozen_blocks": DEPTH[size] // 2}
        told = memory.held("mae" if of is of_mae else "tune", settings, 1)
        calculated.append((told or 0.0) / 1e9)
        with FakeTensorMode():
            two, four = (of(size, depth, batch, recompute) for depth in (2, 4))
        found.append((two + (DEPTH[size] - 2) / 2 * (four - two)) / 1e9)
    assert found == pytest.approx([whole, recomputed], rel=0.02)
    assert calculated == pytest.approx(found, rel=0.1)
