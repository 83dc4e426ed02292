"""What is not finite is refused: one rule for weights, features, losses and logits."""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from torch import Tensor


def is_finite(numbers: Tensor) -> bool:
    """Return whether a tensor holds neither NaN nor infinite values."""
    return not numbers.numel() or all(end.isfinite() for end in numbers.aminmax())


def require_finite(what: str, numbers: Tensor) -> None:
    """Raise ValueError that names `what` unless a tensor is finite."""
    if not is_finite(numbers):
        raise ValueError(f"{what} hold NaN or infinite values")
