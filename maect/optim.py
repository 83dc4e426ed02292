"""Optimisation: parameter groups, schedule, layer-wise decay, freezing, moving averages."""

from __future__ import annotations

import math
import re
from collections.abc import Iterable, Mapping
from typing import Any

import torch
from torch import Tensor, nn

_STEM = ("cls_token", "reg_token", "pos_embed", "patch_embed.", "norm_pre.")


def learning_rate(step: int, total: int, warmup: int, peak: float) -> float:
    """Return the learning rate of `step` (from 0) out of `total`, in the units of `peak`.

    Linear over the first `warmup` steps, `peak * (step + 1) / (warmup + 1)`; then half a cosine,
    `peak * (1 + cos(pi * s / (total - warmup))) / 2` with s counted from the end of the warm-up
    (the published code's schedule).
    """
    if step < warmup:
        return peak * (step + 1) / (warmup + 1)
    return peak * (1 + math.cos(math.pi * (step - warmup) / (total - warmup))) / 2


def set_learning_rate(optimizer: torch.optim.Optimizer, rate: float) -> None:
    """Give every group `rate` times its own `lr_scale`."""
    for group in optimizer.param_groups:
        group["lr"] = rate * group["lr_scale"]


def layer_decay(names: Iterable[str], depth: int, decay: float) -> dict[str, float]:
    """Return the learning-rate factor of each parameter name of an encoder of `depth` blocks.

    Stem (patch embedding, tokens) `decay ** (depth + 1)`, block b `decay ** (depth - b)`, final
    norm and anything above it 1. Raises ValueError if a block is beyond `depth`.
    """
    factors = {}
    for name in names:
        block = re.match(r"blocks\.(\d+)\.", name)
        if block:
            below = depth - int(block[1])
            if below < 1:
                raise ValueError(f"{name} is beyond an encoder of {depth} blocks")
        else:
            below = depth + 1 if name.startswith(_STEM) else 0
        factors[name] = decay**below
    return factors


def parameter_groups(
    named_params: Iterable[tuple[str, nn.Parameter]],
    weight_decay: float,
    lr_factors: Mapping[str, float] | None = None,
) -> list[dict[str, Any]]:
    """Return AdamW groups of the trainable parameters, one for each (weight decay, factor).

    Biases and 1-d parameters are not decayed; class and mask tokens are, as in the published
    code. Every group carries `names` (in the order of `params`) and `lr_scale`, its factor.
    Raises KeyError if `lr_factors` lacks a trainable parameter's name.
    """
    groups: dict[tuple[float, float], dict[str, Any]] = {}
    for name, parameter in named_params:
        if not parameter.requires_grad:
            continue
        decayed = parameter.ndim > 1 and not name.endswith(".bias")
        key = (weight_decay if decayed else 0.0, lr_factors[name] if lr_factors else 1.0)
        group = groups.setdefault(
            key, {"params": [], "names": [], "weight_decay": key[0], "lr_scale": key[1]}
        )
        group["params"].append(parameter)
        group["names"].append(name)
    return list(groups.values())


def adamw(
    groups: list[dict[str, Any]], lr: float, betas: tuple[float, float] = (0.9, 0.95)
) -> torch.optim.AdamW:
    """Return AdamW over `parameter_groups`; every group starts at `lr` times its `lr_scale`."""
    optimizer = torch.optim.AdamW(groups, lr=lr, betas=betas, fused=True)
    set_learning_rate(optimizer, lr)
    return optimizer


def freeze(encoder: nn.Module, blocks: int) -> list[str]:
    """Freeze an encoder's first `blocks` blocks, its patch embedding and its class token.

    With 0 blocks nothing is frozen. Return the names of the trainable parameters. Raises ValueError
    if the encoder has fewer blocks.
    """
    depth = len(encoder.get_submodule("blocks"))  # type: ignore[arg-type]
    if not 0 <= blocks <= depth:
        raise ValueError(f"cannot freeze {blocks} blocks of an encoder of {depth}")
    frozen = (*_STEM, *(f"blocks.{index}." for index in range(blocks))) if blocks else ()
    for name, parameter in encoder.named_parameters():
        parameter.requires_grad_(not name.startswith(frozen))
    return [name for name, parameter in encoder.named_parameters() if parameter.requires_grad]


@torch.no_grad()
def update_average(average: nn.Module, module: nn.Module, decay: float) -> None:
    """Set parameters to `decay * average + (1 - decay) * module`, and copy buffers."""
    means: list[Tensor] = list(average.parameters())
    values: list[Tensor] = list(module.parameters())
    torch._foreach_mul_(means, decay)
    torch._foreach_add_(means, values, alpha=1 - decay)
    if copied := list(average.buffers()):
        torch._foreach_copy_(copied, list(module.buffers()))
