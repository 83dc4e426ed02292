"""Memory that a training step holds for its backward pass, calculated from the settings.

Counted: what autograd keeps of the blocks, and of an MAE's targets. Not counted: weights, gradients
and moments (16 bytes a trained weight), the NNCLR head, what a kernel needs for itself.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from maect.flops import patches
from maect.settings import MAESettings, ModelSettings, NumericsSettings, TuneSettings


def _block(tokens: float, dim: int, mlp_ratio: float, numerics: NumericsSettings) -> float:
    """Return the bytes that a block keeps of `tokens` tokens of all images together."""
    # numbers a token and channel: inputs of the two norms, then what the products take and give:
    # inputs of the four linear layers, queries, keys, values, what the GELU is given
    norms, products = 2.0, 6 + 2 * mlp_ratio
    size = _number(numerics)
    if numerics.precision != "bf16":
        return tokens * dim * size * (norms + products)
    weights = (4 + 2 * mlp_ratio) * dim**2  # their copies in bf16 are kept, too
    return tokens * dim * (size * norms + 2 * products) + 2 * weights


def _number(numerics: NumericsSettings) -> float:
    """Return the bytes of a number that passes from block to block."""
    return 8.0 if numerics.precision == "fp64" else 4.0


def _encoder(model: ModelSettings, blocks: int, tokens: float, numerics: NumericsSettings) -> float:
    """Return the bytes that `blocks` trained blocks of the encoder keep."""
    assert model.dim
    if numerics.checkpoint_activations:  # each block's input alone
        return blocks * tokens * model.dim * _number(numerics)
    return blocks * _block(tokens, model.dim, model.mlp_ratio, numerics)


def of_mae(
    model: ModelSettings, mae: MAESettings, numerics: NumericsSettings, image_size: int, images: int
) -> float:
    """Return bytes held of one view of `images` colour images, those of a worker's piece."""
    assert model.depth
    count = patches(model, image_size)
    visible = int(count * (1 - mae.mask_ratio))
    encoder = _encoder(model, model.depth, images * (visible + 1), numerics)
    decoder = model.decoder_depth * _block(
        images * (count + 1), model.decoder_dim, model.mlp_ratio, numerics
    )
    # target, prediction, their difference and what normalises them, in fp32
    targets = 4.0 * 4 * images * 3 * image_size**2
    return encoder + decoder + targets


def of_tuning(
    model: ModelSettings,
    tune: TuneSettings,
    numerics: NumericsSettings,
    image_size: int,
    views: int,
) -> float:
    """Return bytes held of `views` views, both of all images of a worker; `tune` is resolved."""
    assert model.depth
    trained = model.depth - (tune.frozen_blocks or 0)
    return _encoder(model, trained, views * (patches(model, image_size) + 1.0), numerics)


def held(kind: str, settings: Mapping[str, Any], workers: int) -> float | None:
    """Return the bytes that each of a stage's workers holds; None where no encoder is trained."""
    if kind not in ("mae", "tune"):
        return None
    model, train = ModelSettings.parse(settings["model"]), settings["train"]
    numerics, size = NumericsSettings.parse(settings["numerics"]), settings["data"]["image_size"]
    if kind == "mae":  # piece after piece; tuning holds all of a worker's at once
        pieces = max(workers, numerics.shards)
        images = train["batch_size"] // pieces
        return of_mae(model, MAESettings.parse(train), numerics, size, images)
    views = 2 * train["batch_size"] // workers
    return of_tuning(model, TuneSettings.parse(train), numerics, size, views)
