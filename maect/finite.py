"""What is not finite is refused: one rule for weights, features, losses and logits."""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Mapping

    import torch
    from torch import Tensor


def is_finite(numbers: Tensor) -> bool:
    """Return whether a tensor holds neither NaN nor infinite values."""
    return first_not_finite({"it": numbers}) is None


def first_not_finite(tensors: Mapping[str, Tensor]) -> str | None:
    """Return the name of the first tensor that holds NaN or infinite values; None if none does.

    A GPU is waited for once, not for each tensor: other processes on it may take a turn each time.
    """
    import torch  # not above: commands that compute nothing read this module, too

    ends: dict[torch.device, dict[str, Tensor]] = {}
    for name, tensor in tensors.items():
        if tensor.numel():
            least_and_most = torch.stack(tensor.aminmax()).double()
            ends.setdefault(tensor.device, {})[name] = least_and_most
    finite: dict[str, bool] = {}
    for found in ends.values():
        flags = torch.stack(list(found.values())).isfinite().all(1).tolist()
        finite.update(zip(found, flags, strict=True))
    return next((name for name in tensors if not finite.get(name, True)), None)


def require_finite(what: str, numbers: Tensor) -> None:
    """Raise ValueError that names `what` unless a tensor is finite."""
    if not is_finite(numbers):
        raise ValueError(f"{what} hold NaN or infinite values")
