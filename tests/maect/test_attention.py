"""Attention of short sequences against timm's."""

from __future__ import annotations

import pytest
import torch
from timm.layers import Attention
from torch import Tensor

from maect.attention import SHORT, SelfAttention


def both(tokens: int, dtype: torch.dtype) -> list[list[Tensor]]:
    """Outputs and all gradients of timm's attention and of ours, of the same weights and input."""
    torch.manual_seed(0)
    plain, ours = Attention(12, 3, qkv_bias=True), SelfAttention(12, 3, qkv_bias=True)
    ours.load_state_dict(plain.state_dict())
    given, weights = torch.randn(4, tokens, 12, dtype=dtype), torch.randn(4, tokens, 12)
    found = []
    for module in (plain.to(dtype), ours.to(dtype)):
        values = (5 * given).requires_grad_()  # far from uniform attention
        output = module(values)
        (output * weights).sum().backward()
        gradients = [p.grad for p in module.parameters() if p.grad is not None]
        assert values.grad is not None
        assert len(gradients) == 4
        found.append([output.detach(), values.grad, *gradients])
    return found


@pytest.mark.parametrize("tokens", [1, 5, 17, SHORT, SHORT + 1])
@pytest.mark.parametrize(("dtype", "within"), [(torch.float64, 1e-12), (torch.float32, 1e-5)])
def test_it_gives_what_timms_gives(tokens: int, dtype: torch.dtype, within: float) -> None:
    for plain, ours in zip(*both(tokens, dtype), strict=True):
        assert (ours - plain).abs().max() <= within * plain.abs().max()


def test_large_scores_do_not_overflow() -> None:
    module = SelfAttention(8, 2)
    values = torch.full((2, 3, 8), 1e4, requires_grad=True)
    module(values).sum().backward()
    assert values.grad is not None
    assert torch.isfinite(values.grad).all()


def test_under_autocast_and_without_gradients_it_is_timms_to_the_precision() -> None:
    torch.manual_seed(0)
    module, values = SelfAttention(12, 3, qkv_bias=True), torch.randn(4, 17, 12)
    with torch.no_grad():
        exact = module(values)
        with torch.autocast("cpu", torch.bfloat16):
            rounded = module(values)
    assert rounded.dtype == torch.bfloat16
    assert torch.allclose(exact, rounded.float(), atol=0.02)
