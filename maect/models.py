"""ViT encoder and MAE decoder on timm's blocks, their masking and their initial weights.

Architecture: He et al. 2022 (arXiv 2111.06377), as MAE-CT (arXiv 2304.10520) uses it.
"""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import nullcontext
from functools import partial
from typing import Any, Literal

import numpy as np
import torch
import torch.nn.functional as F
from timm.layers import PatchEmbed
from timm.models.vision_transformer import Block
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from maect.attention import SelfAttention
from maect.heads import NeighborQueue
from maect.losses import patchify
from maect.settings import ModelSettings
from maect.streams import generator


def _pair(size: int | tuple[int, int]) -> tuple[int, int]:
    """Return (height, width) of a size or of a square's side."""
    return (size, size) if isinstance(size, int) else size


def sincos_positions(grid: int | tuple[int, int], dim: int) -> Tensor:
    """Return fixed sin-cos positions of a grid of patches: [N, dim] float32, N along the rows.

    `grid` is the side or (rows, columns). The first half of the channels encodes the column, the
    second the row, each as sines, then cosines of `position / 10000 ** (i / (dim / 4))`.
    Raises ValueError if `dim` is no multiple of 4.
    """
    if dim % 4:
        raise ValueError(f"sin-cos positions need a dim that is a multiple of 4, not {dim}")
    rows, columns = _pair(grid)
    frequencies = 10000.0 ** -(np.arange(dim // 4) / (dim / 4))
    row, column = np.divmod(np.arange(rows * columns), columns)
    angles = [axis[:, None] * frequencies for axis in (column, row)]
    table = np.concatenate([f(angle) for angle in angles for f in (np.sin, np.cos)], axis=1)
    return torch.from_numpy(table.astype(np.float32))


def random_masking(noise: Tensor, mask_ratio: float) -> tuple[Tensor, Tensor, Tensor]:
    """Return which patches stay: noise [B, N] -> (keep [B, n], ids_restore [B, N], mask [B, N]).

    The `n = int(N * (1 - mask_ratio))` patches of the lowest noise stay, in that order (of equal
    noise the first patch wins). `ids_restore` gives each patch's place in the order of the noise;
    `mask` is 1 where a patch was removed. Raises ValueError if no patch would stay.
    """
    count = noise.shape[1]
    visible = int(count * (1 - mask_ratio))
    if visible < 1:
        raise ValueError(f"mask ratio {mask_ratio} leaves none of {count} patches")
    order = torch.argsort(noise, dim=1, stable=True)
    ids_restore = torch.argsort(order, dim=1)
    mask = (ids_restore >= visible).to(torch.float32)
    return order[:, :visible], ids_restore, mask


def pool(tokens: Tensor, how: Literal["cls", "mean", "both"]) -> Tensor:
    """Return features of images: tokens [B, 1+n, D] -> [B, D], class token or mean of the patches.

    "both" is the two side by side, [B, 2D].
    """
    if how == "both":
        return torch.cat([pool(tokens, "cls"), pool(tokens, "mean")], dim=1)
    return tokens[:, 0] if how == "cls" else tokens[:, 1:].mean(dim=1)


def _take(rows: Tensor, chosen: Tensor) -> Tensor:
    """Return each image's chosen rows: rows [B, N, D], chosen [B, n] -> [B, n, D]."""
    return rows.gather(1, chosen[..., None].expand(-1, -1, rows.shape[-1]))


class _Reordered(torch.autograd.Function):
    """Rows [B, N, D] in another order [B, N]; see `_take`.

    Of a plain `gather` the gradient would be a sum over rows that may be equal, which is slow where
    it has to be deterministic. Here each row is taken once, so the inverse order gives it.
    """

    @staticmethod
    def forward(ctx: Any, rows: Tensor, order: Tensor) -> Tensor:
        ctx.save_for_backward(order)
        return _take(rows, order)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor, None]:
        (order,) = ctx.saved_tensors
        return _take(gradients[0], torch.argsort(order, dim=1)), None


def _blocks(dim: int, depth: int, heads: int, mlp_ratio: float) -> nn.ModuleList:
    """Return pre-norm transformer blocks: [B, N, dim] -> [B, N, dim] each."""
    norm: Any = partial(nn.LayerNorm, eps=1e-6)
    parts: Any = {"norm_layer": norm, "attn_layer": SelfAttention}
    return nn.ModuleList(Block(dim, heads, mlp_ratio, qkv_bias=True, **parts) for _ in range(depth))


class VisionEncoder(nn.Module):
    """What stages and evaluations ask of an encoder: images in, tokens by block out.

    Tokens are [B, 1+N, D]: the class token, then the N patches along the rows. Registers are
    computed with, but are no tokens to read. `blocks` are its transformer blocks, so that the
    first ones can be frozen; `maect.optim` knows its parameters by their names, which are timm's.
    An adapter of other networks is a subclass (`maect.timm_encoders`).
    """

    image_size: tuple[int, int]
    grid: tuple[int, int]
    patch_size: int
    in_chans: int
    dim: int
    depth: int
    heads: int
    #: width of an MLP with as many multiplications and one activation, over `dim`
    mlp_ratio: float
    blocks: Any
    #: of the pooled features, where the final norm is not that of the tokens
    fc_norm: nn.Module
    #: of timm, with the arguments from which it makes the same network; "vit": an `Encoder`
    architecture: str = "vit"
    model_args: dict[str, Any] = {}
    #: what its file says of it: `mean`, `std`, `interpolation` and `crop_pct` of its images, as
    #: timm calls them, and `pool`, the features that are read; empty where it says nothing
    stated: dict[str, Any]
    #: sentences on what was assumed when it was loaded, and on what statements differ
    notes: list[str]

    @property
    def pools(self) -> tuple[str, ...]:
        """Return the features that can be read: "cls", "mean" or "both"."""
        raise NotImplementedError

    def forward(self, images: Tensor, keep: Tensor | None = None, frozen_blocks: int = 0) -> Tensor:
        """Return tokens after the final norm, class token first: [B, C, H, W] -> [B, 1+n, D]."""
        raise NotImplementedError

    def features(self, images: Tensor, how: Literal["cls", "mean", "both"]) -> Tensor:
        """Return pooled features, after the final norm: [B, C, H, W] -> [B, D], both: [B, 2D].

        Raises ValueError for a class token that there is not, or that `fc_norm` left without norm.
        """
        if how not in self.pools:
            raise ValueError(
                "its final norm (fc_norm) is of the mean of patches, or it has no class token; "
                "pool 'mean'"
            )
        return self.fc_norm(pool(self(images), how))

    def features_by_depth(
        self, images: Tensor, blocks: Sequence[int], norm: bool = False, frozen_blocks: int = 0
    ) -> list[Tensor]:
        """Return tokens after each of `blocks` (from 0): list of [B, 1+N, D].

        `norm`: after the final norm, too; `frozen_blocks` as in `forward`. Raises ValueError for a
        block that there is not.
        """
        raise NotImplementedError

    def recompute(self, wanted: bool) -> None:
        """Let the backward pass compute each block's activations again, to save memory."""
        raise NotImplementedError

    def require_blocks(self, blocks: Sequence[int]) -> None:
        """Raise ValueError for a block that the encoder does not have."""
        outside = [index for index in blocks if not 0 <= index < self.depth]
        if outside:
            raise ValueError(f"an encoder of {self.depth} blocks has no block {outside[0]}")


class Encoder(VisionEncoder):
    """ViT encoder: class token, fixed positions, pre-norm blocks, final norm.

    State dict as the published code's: `cls_token`, `pos_embed` [1, N, D] (a buffer: without a
    row for the class token, which has no position), `patch_embed.proj.*`, `blocks.i.*`, `norm.*`.
    No layer behaves differently in training and evaluation. `checkpoint_activations` recomputes
    each block in the backward pass to save memory. With `fc_norm`, as in classifiers fine-tuned on
    the mean of the patches, the final norm `fc_norm.*` is that of the pooled features, not of the
    tokens.
    """

    pos_embed: Tensor

    def __init__(
        self,
        image_size: int | tuple[int, int],
        patch_size: int,
        in_chans: int,
        dim: int,
        depth: int,
        heads: int,
        mlp_ratio: float = 4.0,
        checkpoint_activations: bool = False,
        fc_norm: bool = False,
    ) -> None:
        super().__init__()
        self.stated, self.notes = {}, []
        size = _pair(image_size)
        if any(side % patch_size for side in size):
            raise ValueError(f"images of {size[0]}x{size[1]} have no whole patches of {patch_size}")
        self.image_size, self.patch_size, self.in_chans = size, patch_size, in_chans
        self.grid = (size[0] // patch_size, size[1] // patch_size)
        self.dim, self.depth, self.heads, self.mlp_ratio = dim, depth, heads, mlp_ratio
        self.checkpoint_activations = checkpoint_activations
        self.patch_embed = PatchEmbed(size, patch_size, in_chans, dim)
        self.cls_token = nn.Parameter(torch.zeros(1, 1, dim))
        self.register_buffer("pos_embed", sincos_positions(self.grid, dim)[None])
        self.blocks = _blocks(dim, depth, heads, mlp_ratio)
        last = nn.LayerNorm(dim, eps=1e-6)
        self.norm: nn.Module = nn.Identity() if fc_norm else last
        self.fc_norm = last if fc_norm else nn.Identity()

    def forward(self, images: Tensor, keep: Tensor | None = None, frozen_blocks: int = 0) -> Tensor:
        """Return tokens after the final norm, class token first: [B, C, H, W] -> [B, 1+n, D].

        `keep` [B, n] int64: the visible patches, in the order wanted; only these are computed.
        By default all N. No gradient reaches the embedding and the first `frozen_blocks` blocks,
        and their activations are not stored; 0 freezes neither.
        """
        with torch.no_grad() if frozen_blocks else nullcontext():
            tokens = self._embed(images, keep)
        for index, block in enumerate(self.blocks):
            with torch.no_grad() if index < frozen_blocks else nullcontext():
                tokens = self._block(block, tokens)
        return self.norm(tokens)

    #: the name that timm's models know it by
    forward_features = forward

    @property
    def pools(self) -> tuple[str, ...]:
        return ("mean",) if isinstance(self.norm, nn.Identity) else ("cls", "mean", "both")

    def recompute(self, wanted: bool) -> None:
        self.checkpoint_activations = wanted

    def features_by_depth(
        self, images: Tensor, blocks: Sequence[int], norm: bool = False, frozen_blocks: int = 0
    ) -> list[Tensor]:
        self.require_blocks(blocks)
        outputs: dict[int, Tensor] = {}
        with torch.no_grad() if frozen_blocks else nullcontext():
            tokens = self._embed(images, None)
        for index, block in enumerate(self.blocks[: max(blocks, default=-1) + 1]):
            with torch.no_grad() if index < frozen_blocks else nullcontext():
                tokens = self._block(block, tokens)
                outputs[index] = self.norm(tokens) if norm else tokens
        return [outputs[index] for index in blocks]

    def _embed(self, images: Tensor, keep: Tensor | None) -> Tensor:
        """Return class token and embedded visible patches with their positions: [B, 1+n, D].

        The patch projection is stored as a convolution, and computed as a matrix product, which
        runs on the visible patches alone.
        """
        patches = patchify(images, self.patch_size, channels_first=True)  # [B, N, P]
        positions = self._positions(images)  # [1, N, D]
        if keep is not None:
            patches, positions = _take(patches, keep), positions[0][keep]  # [B, n, P], [B, n, D]
        projection = self.patch_embed.proj
        tokens = F.linear(patches, projection.weight.flatten(1), projection.bias)  # [B, n, D]
        tokens = tokens + positions
        return torch.cat([self.cls_token.expand(len(images), -1, -1), tokens], dim=1)

    def _positions(self, images: Tensor) -> Tensor:
        """Return the positions of the patches of images [B, C, H, W]: [1, N, D].

        Those of images of another size are interpolated, as DINO does for its local crops
        (arXiv 2104.14294).
        """
        grid = (images.shape[2] // self.patch_size, images.shape[3] // self.patch_size)
        if grid == self.grid:
            return self.pos_embed
        table = self.pos_embed.unflatten(1, self.grid).permute(0, 3, 1, 2)
        return F.interpolate(table, grid, mode="bicubic").flatten(2).transpose(1, 2)

    def _block(self, block: nn.Module, tokens: Tensor) -> Tensor:
        """Return the tokens [B, N, D] after a block."""
        if self.checkpoint_activations and torch.is_grad_enabled():
            return checkpoint(block, tokens, use_reentrant=False)
        return block(tokens)


class Decoder(nn.Module):
    """MAE decoder: all patches' pixels from the visible patches' latents.

    State dict as the published code's: `mask_token`, `pos_embed` (a buffer), `embed.*`,
    `blocks.i.*`, `norm.*`, `pred.*`.
    """

    pos_embed: Tensor

    def __init__(
        self,
        encoder_dim: int,
        grid: tuple[int, int],
        patch_values: int,
        dim: int = 512,
        depth: int = 8,
        heads: int = 16,
        mlp_ratio: float = 4.0,
    ) -> None:
        """`grid` is (rows, columns) of patches, `patch_values` the pixels x channels of a patch."""
        super().__init__()
        self.embed = nn.Linear(encoder_dim, dim)
        self.mask_token = nn.Parameter(torch.zeros(1, 1, dim))
        self.register_buffer("pos_embed", sincos_positions(grid, dim)[None])
        self.blocks = _blocks(dim, depth, heads, mlp_ratio)
        self.norm = nn.LayerNorm(dim, eps=1e-6)
        self.pred = nn.Linear(dim, patch_values)

    def forward(self, latent: Tensor, ids_restore: Tensor) -> Tensor:
        """Return predicted patches: latent [B, 1+n, D], ids_restore [B, N] -> [B, N, P].

        Mask tokens fill the removed places; the class token passes through and is dropped.
        """
        tokens = self.embed(latent)  # [B, 1+n, E]
        missing = ids_restore.shape[1] + 1 - tokens.shape[1]
        masks = self.mask_token.to(tokens.dtype).expand(len(tokens), missing, -1)
        shuffled = torch.cat([tokens[:, 1:], masks], dim=1)
        patches = _Reordered.apply(shuffled, ids_restore)  # [B, N, E]
        tokens = torch.cat([tokens[:, :1], patches + self.pos_embed], dim=1)
        for block in self.blocks:
            tokens = block(tokens)
        return self.pred(self.norm(tokens)[:, 1:])


def build_encoder(
    name: str | ModelSettings = "base",
    *,
    image_size: int | tuple[int, int] = 224,
    in_chans: int = 3,
    checkpoint_activations: bool = False,
    seed: int = 0,
    **sizes: Any,
) -> Encoder:
    """Return an encoder with initial weights of `seed`.

    `name` is a size of `maect.settings.SIZES`, "custom", or a model's settings. `sizes` are
    `patch_size`, `dim`, `depth`, `heads` and `mlp_ratio`; they override the size's, and "custom"
    needs all of dim, depth and heads. Raises ValueError for an unknown name, a missing or bad size,
    or an image that has no whole number of patches.
    """
    if isinstance(name, str):
        name = ModelSettings.model_validate({"size": name, **sizes})
    given = name.model_dump(include={"patch_size", "dim", "depth", "heads", "mlp_ratio"})
    given["checkpoint_activations"] = checkpoint_activations
    encoder = Encoder(image_size, in_chans=in_chans, **given)
    initialize(encoder, seed, "encoder")
    return encoder


def build_decoder(
    settings: ModelSettings, image_size: int, in_chans: int, *, seed: int = 0
) -> Decoder:
    """Return the decoder that `settings` describe, with initial weights of `seed`."""
    assert settings.dim is not None
    side = image_size // settings.patch_size
    decoder = Decoder(
        settings.dim,
        (side, side),
        in_chans * settings.patch_size**2,
        settings.decoder_dim,
        settings.decoder_depth,
        settings.decoder_heads,
        settings.mlp_ratio,
    )
    initialize(decoder, seed, "decoder")
    return decoder


@torch.no_grad()
def initialize(module: nn.Module, seed: int, role: str) -> None:
    """Draw all initial weights of an encoder, a decoder or a head, each by its own name.

    As in the published code: Linears and the patch projection Xavier uniform (the fused qkv as
    one matrix), tokens N(0, 0.02), biases 0, norms 1 and 0; with the role "head", Linears uniform
    within 1 / sqrt(inputs) (torch's own default) and a random unit-norm queue. Numbers are drawn on
    the CPU in float32, so every device and precision starts from the same numbers. Positions and
    other buffers stay.
    """
    in_head = role == "head"
    for prefix, part in module.named_modules():
        if isinstance(part, NeighborQueue):
            part.reset(generator(seed, role, "init", prefix))
        elif isinstance(part, (nn.LayerNorm, nn.BatchNorm1d)):
            part.reset_parameters()
        else:
            for name, parameter in part.named_parameters(recurse=False):
                random = generator(seed, role, "init", f"{prefix}.{name}" if prefix else name)
                parameter.copy_(torch.from_numpy(_draw(name, parameter, random, in_head)))


def _draw(
    name: str, parameter: nn.Parameter, random: np.random.Generator, in_head: bool
) -> np.ndarray:
    """Return the initial values of one parameter, float32 in its shape."""
    shape = tuple(parameter.shape)
    if name == "bias":
        return np.zeros(shape, np.float32)
    if name.endswith("_token"):
        return random.standard_normal(shape, dtype=np.float32) * np.float32(0.02)
    outputs, inputs = shape[0], int(np.prod(shape[1:]))
    bound = inputs**-0.5 if in_head else (6 / (inputs + outputs)) ** 0.5
    return (random.random(shape, dtype=np.float32) * 2 - 1) * np.float32(bound)
