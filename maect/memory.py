"""Memory that a training step holds for its backward pass, calculated from the settings.

Counted: what autograd keeps of the blocks, and of an MAE's targets. Not counted: weights, gradients
and moments (16 bytes a trained weight), the NNCLR head, what a kernel needs for itself.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from maect import methods
from maect.flops import patches
from maect.settings import ModelSettings, NumericsSettings


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


def held(kind: str, settings: Mapping[str, Any], workers: int) -> float | None:
    """Return the bytes that each of a stage's workers holds; None where no encoder is trained.

    Of local views nothing is counted.
    """
    method = methods.get(kind) if kind in methods.names() else None
    if method is None or method.part == "head":
        return None
    model, train = ModelSettings.parse(settings["model"]), settings["train"]
    numerics, size = NumericsSettings.parse(settings["numerics"]), settings["data"]["image_size"]
    assert model.dim and model.depth
    count, masked = patches(model, size), method.part == "pretraining"
    views = 2 * train["batch_size"] // workers
    if kind == "mae":  # piece after piece, view after view; others hold all of a worker's at once
        views = train["batch_size"] // max(workers, numerics.shards)
    tokens = views * ((int(count * (1 - train["mask_ratio"])) if masked else count) + 1)
    block = _block(tokens, model.dim, model.mlp_ratio, numerics)
    if numerics.checkpoint_activations:  # each block's input alone
        block = tokens * model.dim * _number(numerics)
    if not masked:
        return (model.depth - train["frozen_blocks"]) * block
    decoder = _block(views * (count + 1), model.decoder_dim, model.mlp_ratio, numerics)
    # target, prediction, their difference and what normalises them, in fp32; of colour images
    targets = 4.0 * 4 * views * 3 * size**2
    return model.depth * block + model.decoder_depth * decoder + targets
