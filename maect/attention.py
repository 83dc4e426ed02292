"""Self-attention that is quick for the short sequences of small images on a CPU."""

from __future__ import annotations

from typing import Any

import torch
from timm.layers import Attention
from torch import Tensor

#: tokens of a sequence; of longer ones torch's own kernel is as quick, and holds less for the
#: backward pass
SHORT = 48


class _ShortAttention(torch.autograd.Function):
    """softmax(q kᵀ / √d) v of all heads, from tokens' queries, keys and values side by side.

    torch's kernel works on one head of one image after the other, which at 17 tokens costs more
    than the arithmetic. Here batches of matrices are multiplied. Their scores stand with the keys
    down the columns, because torch's softmax is faster along columns so short.
    """

    @staticmethod
    def forward(ctx: Any, qkv: Tensor, heads: int) -> Tensor:
        """Return what heads see: [B, N, 3 D] -> [B, N, D]."""
        images, tokens, width = qkv.shape
        per_head = width // (3 * heads)
        split = qkv.view(images, tokens, 3, heads, per_head).permute(2, 0, 3, 1, 4)
        parts = split.reshape(3, images * heads, tokens, per_head)
        query, key, value = parts
        scores = torch.baddbmm(key.new_empty(1), key, query.mT, beta=0, alpha=per_head**-0.5)
        weights = scores.softmax(1)  # [B heads, keys, queries]
        ctx.save_for_backward(parts, weights)
        seen = torch.bmm(weights.mT, value)  # [B heads, N, d]
        return seen.unflatten(0, (-1, heads)).transpose(1, 2).flatten(2)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor, None]:
        parts, weights = ctx.saved_tensors
        query, key, value = parts
        _, heads_of_all, tokens, per_head = parts.shape
        images, scale = len(gradients[0]), per_head**-0.5
        heads = heads_of_all // images
        seen = gradients[0].reshape(images, tokens, heads, per_head).transpose(1, 2)
        seen = seen.reshape(heads_of_all, tokens, per_head)
        of_weights = torch.bmm(value, seen.mT)
        scores = torch._softmax_backward_data(of_weights, weights, 1, weights.dtype)
        result = torch.empty_like(parts)
        torch.baddbmm(result[0], scores.mT, key, beta=0, alpha=scale, out=result[0])
        torch.baddbmm(result[1], scores, query, beta=0, alpha=scale, out=result[1])
        torch.bmm(weights, seen, out=result[2])
        result = result.view(3, images, heads, tokens, per_head).permute(1, 3, 0, 2, 4)
        return result.reshape(images, tokens, 3 * heads * per_head), None


class SelfAttention(Attention):
    """timm's attention with the same parameters, quicker for short sequences on a CPU.

    Without normalised queries and keys, dropout, gate or mask, which no block here has.
    """

    def forward(self, x: Tensor, *args: Any, **options: Any) -> Tensor:
        """Return tokens after attention and projection: [B, N, D] -> [B, N, D]."""
        quick = x.device.type == "cpu" and x.shape[1] <= SHORT
        if not quick or torch.is_autocast_enabled("cpu") or torch.compiler.is_compiling():
            return super().forward(x, *args, **options)
        return self.proj(_ShortAttention.apply(self.qkv(x), self.num_heads))
