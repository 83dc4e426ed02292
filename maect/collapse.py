"""Signs of collapse: how many directions the features still use."""

from __future__ import annotations

from typing import Any

from maect.finite import require_finite


def effective_rank(features: Any) -> float:
    """Return the effective rank of features [N, D]: from 1 (one direction) to min(N - 1, D).

    exp(-sum p log p) with p the singular values of the centred features divided by their sum
    (Roy and Vetterli 2007, "The effective rank"). 0 if all rows are equal. Raises ValueError if
    the features are not a matrix or not finite.
    """
    import torch

    x = torch.as_tensor(features).detach().double()
    if x.ndim != 2 or len(x) == 0:
        raise ValueError(f"features of shape {list(x.shape)} are not a matrix [N, D]")
    require_finite("the features", x)
    largest = x.abs().max().item()
    x = x - x.mean(0)
    gram = x.T @ x if x.shape[1] <= len(x) else x @ x.T
    values = torch.linalg.eigvalsh(gram).clamp_min(0).sqrt()
    if values.max().item() <= 1e-13 * largest * len(x) ** 0.5:
        return 0.0  # only what subtracting the mean of equal rows leaves
    values = values[values > 1e-7 * values.max()]  # the rest is the rounding of `gram`
    share = values / values.sum()
    return float(torch.exp(-(share * share.log()).sum()))
