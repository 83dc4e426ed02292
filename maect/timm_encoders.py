"""timm's ViTs as encoders: `VisionTransformer` and `Eva`, whatever is in their blocks.

Registers, LayerScale, SwiGLU, `fc_norm`, pooling without a class token, and rotary positions
(DINOv3, EVA-02) are timm's own code. Any of timm's architectures of these two classes can be
made; of weights that name none, DINOv2's and DINOv3's are recognised by their tensors.
"""

from __future__ import annotations

import math
import re
from collections.abc import Mapping, Sequence
from contextlib import nullcontext
from typing import Any

import timm
import torch
from timm.models.eva import Eva
from timm.models.vision_transformer import VisionTransformer
from torch import Tensor, nn

from maect.hub import CheckpointError
from maect.models import VisionEncoder

#: arguments of timm's models that a file may state, all plain values; no other is passed on
_ARGS = re.compile(
    "embed_dim|depth|num_heads|mlp_ratio|patch_size|in_chans|img_size|class_token|reg_tokens|"
    "num_reg_tokens|no_embed_class|qkv_bias|qk_norm|init_values|pre_norm|fc_norm|use_fc_norm|"
    "final_norm|global_pool|rope_temperature|swiglu_mlp|swiglu_align_to|act_layer|"
    "dynamic_img_size|num_classes"
)


class TimmEncoder(VisionEncoder):
    """What makes one of timm's networks an encoder; positions are a buffer, and so not trained."""

    # of timm's classes
    num_prefix_tokens: int
    cls_token: nn.Parameter | None
    forward_features: Any
    forward_intermediates: Any
    set_grad_checkpointing: Any

    def adopt(self, architecture: str, args: dict[str, Any], sizes: Mapping[str, Any]) -> None:
        """Take over a network that timm has made; `sizes` are those that its file shows."""
        network: Any = self
        norm = "use_fc_norm" if isinstance(self, Eva) else "fc_norm"
        pooled = not isinstance(self.fc_norm, nn.Identity)
        self.architecture, self.model_args = architecture, {**args, norm: pooled}
        self.stated, self.notes = {}, []
        self.image_size, self.grid = args["img_size"], network.patch_embed.grid_size
        self.patch_size, self.in_chans = sizes["patch_size"], sizes["in_chans"]
        self.dim, self.depth = network.embed_dim, len(network.blocks)
        self.mlp_ratio, self.heads = sizes["mlp_ratio"], network.blocks[0].attn.num_heads
        if network.pos_embed is not None:
            positions = network.pos_embed.detach()
            del network.pos_embed
            network.register_buffer("pos_embed", positions)
        for module in network.modules():
            if module._non_persistent_buffers_set & module._buffers.keys():
                module.to_empty(device="cpu", recurse=False)
                module.reset_parameters()

    @property
    def pools(self) -> tuple[str, ...]:
        pooled = self.cls_token is None or not isinstance(self.fc_norm, nn.Identity)
        return ("mean",) if pooled else ("cls", "mean", "both")

    def forward(self, images: Tensor, keep: Tensor | None = None, frozen_blocks: int = 0) -> Tensor:
        """Return tokens after the final norm without registers: [B, C, H, W] -> [B, 1+N, D].

        NaN stands for a class token that there is none of. Of frozen parts no activations are
        stored because their parameters want no gradient. Raises ValueError where patches are
        to be left out.
        """
        if keep is not None:
            raise ValueError("timm's networks see all patches; pretrain a plain ViT encoder")
        with torch.no_grad() if frozen_blocks >= self.depth else nullcontext():
            return self._of_patches(self.forward_features(images))

    def recompute(self, wanted: bool) -> None:
        self.set_grad_checkpointing(wanted)

    def features_by_depth(
        self, images: Tensor, blocks: Sequence[int], norm: bool = False, frozen_blocks: int = 0
    ) -> list[Tensor]:
        self.require_blocks(blocks)
        with torch.no_grad() if frozen_blocks >= self.depth else nullcontext():
            found = self.forward_intermediates(
                images,
                indices=sorted(blocks),
                return_prefix_tokens=self.num_prefix_tokens > 0,
                norm=norm,
                stop_early=True,
                output_fmt="NLC",
                intermediates_only=True,
            )
        if self.num_prefix_tokens:
            found = [torch.cat([prefix, patches], dim=1) for patches, prefix in found]
        outputs = dict(zip(sorted(blocks), map(self._of_patches, found), strict=True))
        return [outputs[index] for index in blocks]

    def _of_patches(self, tokens: Tensor) -> Tensor:
        """Return class token and patches: [B, P+N, D] -> [B, 1+N, D]."""
        first = tokens[:, :1]
        if self.cls_token is None:
            first = torch.full_like(first, math.nan)
        return torch.cat([first, tokens[:, self.num_prefix_tokens :]], dim=1)


class TimmViT(TimmEncoder, VisionTransformer):
    """timm's `VisionTransformer` as an encoder."""


class TimmEva(TimmEncoder, Eva):
    """timm's `Eva` as an encoder."""


def build(
    architecture: str, args: Mapping[str, Any], sizes: Mapping[str, Any], where: str
) -> TimmViT | TimmEva:
    """Return an encoder of one of timm's architectures, its parameters on the meta device.

    CheckpointError, beginning with `where`, for one that is unknown, of another class, or that
    does not take these arguments.
    """
    given = {name: value for name, value in args.items() if _ARGS.fullmatch(name)}
    if odd := sorted({*args} - {*given}):
        raise CheckpointError(f"{where}: model_args {odd[0][:80]!r} is not understood; take it out")
    if not timm.is_model(architecture):
        raise CheckpointError(
            f"{where}: timm {timm.__version__} has no architecture '{architecture[:80]}'"
        )
    try:
        with torch.device("meta"):  # no memory is taken for what a file only claims
            network: Any = timm.create_model(architecture, **{**given, "num_classes": 0})
    except Exception as error:  # a stranger's arguments
        reason = (str(error) or type(error).__name__).partition("\n")[0][:200]
        raise CheckpointError(f"{where}: timm cannot make {architecture}: {reason}") from error
    kinds: dict[type, type] = {VisionTransformer: TimmViT, Eva: TimmEva}
    if type(network) not in kinds:
        raise CheckpointError(
            f"{where}: '{architecture}' is timm's {type(network).__name__}; encoders are its "
            f"VisionTransformer and Eva"
        )
    network.__class__ = kinds[type(network)]  # as torch's fully_shard does
    network.adopt(architecture, given, sizes)
    return network


def described(
    tensors: dict[str, Tensor], sizes: Mapping[str, Any], rotary: bool, theta: float | None
) -> tuple[str, dict[str, Any]]:
    """Return timm's architecture and arguments for DINOv2's or DINOv3's (`rotary`) tensors.

    Other ViTs with LayerScale, registers or SwiGLU of the same names are made alike.
    """
    args: dict[str, Any] = {
        "patch_size": sizes["patch_size"],
        "in_chans": sizes["in_chans"],
        "embed_dim": sizes["dim"],
        "depth": sizes["depth"],
        "num_heads": sizes["heads"],
        "mlp_ratio": sizes["hidden"],
        "init_values": 1.0 if "blocks.0.ls1.gamma" in tensors else None,
        "global_pool": "avg" if sizes["fc_norm"] else "token",
    }
    registers = tensors["reg_token"].shape[1] if "reg_token" in tensors else 0
    if rotary:
        args |= {
            "num_reg_tokens": registers,
            "qkv_bias": "blocks.0.attn.qkv.bias" in tensors,
            "rope_temperature": theta or 100.0,
            "use_fc_norm": sizes["fc_norm"],
        }
        # any `swiglu_align_to` makes three matrices of two, as these weights have
        gated = {"swiglu_mlp": True, "swiglu_align_to": 1} if sizes["gated"] else {}
        return "vit_small_patch16_dinov3", args | gated
    args |= {"reg_tokens": registers, "no_embed_class": True, "fc_norm": sizes["fc_norm"]}
    return "vit_giant_patch14_dinov2" if sizes["gated"] else "vit_base_patch16_224", args


def for_eva(tensors: dict[str, Tensor], file: Any) -> None:
    """Give tensors of DINOv3's names those of timm's `Eva`, in place.

    Its keys have no bias: CheckpointError where a file has one. (DINOv3's own files hold numbers
    there that a mask makes zero.)
    """
    masks = {name for name in tensors if name.endswith(".attn.qkv.bias_mask")}
    for name in [n for n in tensors if n.startswith("blocks.")]:
        block, _, part = name.partition(".attn.qkv.")
        if name in masks:
            del tensors[name]
        elif part == "bias":
            query, key, value = tensors.pop(name).tensor_split(3)
            if f"{name}_mask" not in masks and key.any():
                raise CheckpointError(f"{file}: {block} has a bias of its keys, DINOv3 has none")
            tensors[f"{block}.attn.q_bias"], tensors[f"{block}.attn.v_bias"] = query, value
        elif ".ls" in name:
            new = name.replace(".ls1.gamma", ".gamma_1").replace(".ls2.gamma", ".gamma_2")
            tensors[new] = tensors.pop(name)


def set_periods(encoder: TimmEncoder, periods: Tensor) -> None:
    """Let rotary positions have the periods that a file holds, [head dim / 4], and keep them."""
    rope: Any = encoder.rope
    rope.register_buffer("periods", periods.to(torch.float32), persistent=True)
