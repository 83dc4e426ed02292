"""Memory that a training step holds for its backward pass, calculated from the settings.

Counted: what autograd keeps of the blocks, and of an MAE's targets. Not counted: weights, gradients
and moments (16 bytes a trained weight), the NNCLR head, what a kernel needs for itself.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from maect import methods
from maect.flops import patches
from maect.settings import MAESettings, ModelSettings, NumericsSettings, TuningSettings


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
    model: ModelSettings, mae: Any, numerics: NumericsSettings, image_size: int, images: int
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
    tune: TuningSettings,
    numerics: NumericsSettings,
    image_size: int,
    views: int,
) -> float:
    """Return bytes held of `views` views, both of all images of a worker; `tune` is resolved."""
    assert model.depth
    trained = model.depth - (tune.frozen_blocks or 0)
    return _encoder(model, trained, views * (patches(model, image_size) + 1.0), numerics)


def held(kind: str, settings: Mapping[str, Any], workers: int) -> float | None:
    """Return the bytes that each of a stage's workers holds; None where no encoder is trained.

    Of local views nothing is counted.
    """
    method = methods.get(kind) if kind in methods.names() else None
    if method is None or method.part == "head":
        return None
    model, train = ModelSettings.parse(settings["model"]), method.settings.parse(settings["train"])
    numerics, size = NumericsSettings.parse(settings["numerics"]), settings["data"]["image_size"]
    views = 2 * train.batch_size // workers
    if isinstance(train, MAESettings):  # piece after piece; tuning holds all of a worker's at once
        return of_mae(
            model, train, numerics, size, train.batch_size // max(workers, numerics.shards)
        )
    if method.part == "pretraining":
        return of_mae(model, train, numerics, size, views)
    assert isinstance(train, TuningSettings)
    return of_tuning(model, train, numerics, size, views)
