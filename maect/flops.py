"""Floating-point operations of training, counted from the settings (no torch needed).

A multiply-accumulate counts as two operations. Counted: matrix products of linear layers, patch
projection and attention, and the neighbour queue's product; not counted: norms, activations, the
softmax, augmentation and the optimizer (together below a few percent at the sizes of the paper).
A backward pass costs twice the forward pass of what is trained; frozen blocks cost forward only.
"""

from __future__ import annotations

from maect.settings import HeadSettings, MAESettings, ModelSettings, TuneSettings


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


def mae_step(model: ModelSettings, mae: MAESettings, image_size: int, channels: int) -> float:
    """Return FLOPs of a step of MAE pretraining, forward and backward, over the global batch."""
    assert model.dim
    count = patches(model, image_size)
    visible = int(count * (1 - mae.mask_ratio))
    encoder = encoder_forward(model, image_size, channels, visible)
    decoder = model.decoder_depth * block_forward(count + 1, model.decoder_dim, model.mlp_ratio)
    decoder += 2.0 * (visible + 1) * model.dim * model.decoder_dim
    decoder += 2.0 * count * model.decoder_dim * channels * model.patch_size**2
    return 3.0 * mae.views * mae.batch_size * (encoder + decoder)


def _head_forward(dim: int, head: HeadSettings, *, target: bool, queued: bool) -> float:
    """Return FLOPs of one view: projector, predictor, similarities, target projector, queue."""
    projector = dim * head.hidden_dim + head.hidden_dim**2 + head.hidden_dim * head.out_dim
    predictor = 2 * head.out_dim * head.predictor_dim
    queue = head.queue_size * head.out_dim if queued else 0
    logits = head.batch_size * head.out_dim
    trained = 3 * (projector + predictor + logits)
    return 2.0 * (trained + queue + (projector if target else 0))


def head_step(model: ModelSettings, head: HeadSettings, image_size: int, channels: int) -> float:
    """Return FLOPs of a step of head initialisation: frozen encoder, trained head."""
    assert model.dim
    encoder = encoder_forward(model, image_size, channels, patches(model, image_size))
    heads = _head_forward(model.dim, head, target=False, queued=True)
    return 2.0 * head.batch_size * (encoder + heads)


def tune_step(
    model: ModelSettings, head: HeadSettings, tune: TuneSettings, image_size: int, channels: int
) -> float:
    """Return FLOPs of a step of contrastive tuning: upper blocks and head are trained.

    `tune` is resolved: it tells the number of frozen blocks.
    """
    assert model.dim and model.depth
    count = patches(model, image_size)
    encoder = encoder_forward(model, image_size, channels, count)
    trained = model.depth - (tune.frozen_blocks or 0)
    backward = 2.0 * trained * block_forward(count + 1, model.dim, model.mlp_ratio)
    queued = tune.positive != "no_queue"
    heads = _head_forward(model.dim, head, target=True, queued=queued)
    return 2.0 * tune.batch_size * (encoder + backward + heads)


def forward_pass(model: ModelSettings, image_size: int, channels: int, images: float) -> float:
    """Return FLOPs of the features of `images` whole images."""
    return images * encoder_forward(model, image_size, channels, patches(model, image_size))
