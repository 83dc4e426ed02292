"""Floating-point operations of training, counted from the settings (no torch needed).

A multiply-accumulate counts as two operations. Counted: matrix products of linear layers, patch
projection and attention, and the neighbour queue's product; not counted: norms, activations, the
softmax, augmentation and the optimizer (together below a few percent at the sizes of the paper).
A backward pass costs twice the forward pass of what is trained; frozen blocks cost forward only.
"""

from __future__ import annotations

from typing import Any

from maect.methods import Method
from maect.settings import ModelSettings


def block_forward(tokens: int, dim: int, mlp_ratio: float) -> float:
    """Return FLOPs of one transformer block on one sample of `tokens` tokens."""
    linear = 4 * dim * dim + 2 * dim * int(dim * mlp_ratio)
    return 2.0 * tokens * linear + 4.0 * tokens * tokens * dim


def patches(model: ModelSettings, image_size: int) -> int:
    """Return the number of patches of an image."""
    return (image_size // model.patch_size) ** 2


def encoder_forward(model: ModelSettings, image_size: int, channels: int, visible: int) -> float:
    """Return FLOPs of the encoder on one image of which `visible` patches are seen."""
    assert model.dim and model.depth
    embed = 2.0 * visible * channels * model.patch_size**2 * model.dim
    return embed + model.depth * block_forward(visible + 1, model.dim, model.mlp_ratio)


def mae_step(model: ModelSettings, mae: Any, image_size: int, channels: int) -> float:
    """Return FLOPs of a step of MAE pretraining, forward and backward, over the global batch.

    `mae` tells `views`, `batch_size` and `mask_ratio`.
    """
    assert model.dim
    count = patches(model, image_size)
    visible = int(count * (1 - mae.mask_ratio))
    encoder = encoder_forward(model, image_size, channels, visible)
    decoder = model.decoder_depth * block_forward(count + 1, model.decoder_dim, model.mlp_ratio)
    decoder += 2.0 * (visible + 1) * model.dim * model.decoder_dim
    decoder += 2.0 * count * model.decoder_dim * channels * model.patch_size**2
    return 3.0 * mae.views * mae.batch_size * (encoder + decoder)


def step(
    method: Method, model: ModelSettings, options: Any, image_size: int, channels: int
) -> float:
    """Return FLOPs of a step of a training stage over the global batch.

    `options` are resolved: they tell the number of frozen blocks. A head stage runs the encoder
    forward; tuning trains the upper blocks, and runs the encoder forward once more for a teacher.
    """
    dim, depth = model.dim or 0, model.depth or 0
    heads = method.head_flops(dim, options)
    if method.part == "pretraining":
        masked = mae_step(model, options, image_size, channels)
        return masked + 2.0 * options.batch_size * heads

    def view(size: int) -> float:
        count = patches(model, size)
        encoder = encoder_forward(model, size, channels, count)
        if method.part == "head":
            return encoder + heads
        trained = depth - (options.frozen_blocks or 0)
        backward = 2.0 * trained * block_forward(count + 1, dim, model.mlp_ratio)
        return encoder + backward + heads

    taught = method.teacher and method.part == "tuning"
    whole = view(image_size) + (forward_pass(model, image_size, channels, 1) if taught else 0.0)
    local = getattr(options, "local_views", 0)  # small crops beside the two views
    return options.batch_size * (2.0 * whole + (local * view(options.local_size) if local else 0.0))


def forward_pass(model: ModelSettings, image_size: int, channels: int, images: float) -> float:
    """Return FLOPs of the features of `images` whole images."""
    return images * encoder_forward(model, image_size, channels, patches(model, image_size))
