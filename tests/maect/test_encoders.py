"""Encoders of others: each format's tensors give the features of the network that they are of."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import safetensors.torch
import timm
import torch
from timm.models import eva, vision_transformer
from torch import Tensor, nn

from maect.hub import find
from maect.models import Encoder
from maect.timm_encoders import TimmEncoder
from maect.weights import CheckpointError, load_encoder, save_encoder

State = dict[str, Tensor]
VIT: dict[str, Any] = {"img_size": 32, "patch_size": 8, "embed_dim": 64, "depth": 3, "num_heads": 2}


def close(actual: Tensor, expected: Tensor) -> None:
    torch.testing.assert_close(actual, expected, atol=1e-5, rtol=0)


def images(seed: int = 0, side: int = 32) -> Tensor:
    draws = np.random.default_rng(seed).normal(size=(2, 3, side, side))
    return torch.from_numpy(draws.astype(np.float32))


@torch.no_grad()
def randomised(model: nn.Module) -> Any:
    """The model with other numbers in all of its parameters."""
    for seed, (name, parameter) in enumerate(model.named_parameters()):
        random = np.random.default_rng(seed).normal(size=tuple(parameter.shape))
        parameter.copy_(0.1 * torch.from_numpy(random.astype(np.float32)))
        if ("norm" in name and name.endswith("weight")) or "gamma" in name or "lambda" in name:
            parameter.add_(1.0)
    return model.eval()


def of_timm(architecture: str, **args: Any) -> Any:
    return randomised(timm.create_model(architecture, num_classes=0, **{**VIT, **args}))


def write(folder: Path, state: State, **config: Any) -> Path:
    safetensors.torch.save_file(
        {n: t.contiguous() for n, t in state.items()}, folder / "w.safetensors"
    )
    if config:
        (folder / "config.json").write_text(json.dumps(config))
    return folder / "w.safetensors"


@torch.no_grad()
def same(encoder: Any, tokens: Tensor, prefix: int, has_class: bool = True) -> None:
    """The encoder's tokens are those of a network whose first `prefix` ones are no patches."""
    found = encoder(images())
    close(found[:, 1:], tokens[:, prefix:])
    if has_class:
        close(found[:, 0], tokens[:, 0])
        if "cls" in encoder.pools:
            close(encoder.features(images(), "cls"), tokens[:, 0])
    close(encoder.features(images(), "mean"), encoder.fc_norm(tokens[:, prefix:].mean(1)))


def dinov2(state: State, chunks: bool = False) -> State:
    """timm's names to those of DINOv2's authors; registers have no position there."""
    found = {}
    for name, tensor in state.items():
        for theirs, timms in (("w12", "fc1"), ("w3", "fc2")):
            if (
                state["blocks.0.mlp.fc1.bias"].numel()
                == 2 * state["blocks.0.mlp.fc2.weight"].shape[1]
            ):
                name = name.replace(timms, theirs)
        name = name.replace("reg_token", "register_tokens")
        found[name.replace("blocks.", "blocks.0.") if chunks else name] = tensor
    found["mask_token"] = torch.zeros(1, 64)
    if "register_tokens" in found:
        row = torch.full_like(found["cls_token"], 0.3)
        found["pos_embed"] = torch.cat([row, found["pos_embed"]], dim=1)
        found["cls_token"] = found["cls_token"] - row
    return found


@pytest.mark.parametrize("gated", [False, True])
@pytest.mark.parametrize("registers", [0, 2])
@torch.no_grad()
def test_dinov2(tmp_path: Path, gated: bool, registers: int) -> None:
    architecture = "vit_giant_patch14_dinov2" if gated else "vit_small_patch14_dinov2"
    args = {"mlp_ratio": 4.0, "reg_tokens": registers, "no_embed_class": registers > 0}
    model = of_timm(architecture, **args)
    state = dinov2(model.state_dict(), chunks=gated)
    encoder = load_encoder(write(tmp_path, state), heads=2)
    assert isinstance(encoder, TimmEncoder)
    same(encoder, model.forward_features(images()), 1 + registers)
    # timm's own reading of the same file
    read = timm.create_model(architecture, num_classes=0, **{**VIT, **args})
    read.load_state_dict(vision_transformer.checkpoint_filter_fn(dinov2(model.state_dict()), read))
    close(encoder(images())[:, 0], read.eval().forward_features(images())[:, 0])
    layers = model.get_intermediate_layers(images(), [0, 2], return_prefix_tokens=True, norm=True)
    for found, (patches, prefix) in zip(
        encoder.features_by_depth(images(), [2, 0], norm=True)[::-1], layers, strict=True
    ):
        close(found, torch.cat([prefix[:, :1], patches], dim=1))


def dinov3(state: State, heads: int, periods: Tensor) -> State:
    """timm's names to those of DINOv3's authors, with a masked bias of the keys."""
    found = {}
    for name, tensor in state.items():
        for timms, theirs in (
            ("reg_token", "storage_tokens"), (".gamma_1", ".ls1.gamma"), (".gamma_2", ".ls2.gamma"),
            ("fc1_g", "w1"), ("fc1_x", "w2"),
        ):  # fmt: skip
            name = name.replace(timms, theirs)
        if "blocks.0.mlp.fc1_g.bias" in state:
            name = name.replace("mlp.fc2", "mlp.w3")
        if name.endswith("q_bias"):
            name = name.replace("q_bias", "qkv.bias")
            value = state[name.replace("qkv.bias", "v_bias")]
            found[f"{name}_mask"] = torch.cat([torch.ones(64), torch.zeros(64), torch.ones(64)])
            tensor = torch.cat([tensor, torch.full_like(tensor, 0.7), value])
        if not name.endswith("v_bias"):
            found[name] = tensor
    found["rope_embed.periods"] = periods
    found |= {name: torch.zeros(1, 64) for name in ("local_cls_norm.weight", "mask_token")}
    return found


@pytest.mark.parametrize("gated", [False, True])
@pytest.mark.parametrize("bias", [False, True])
@torch.no_grad()
def test_dinov3(tmp_path: Path, gated: bool, bias: bool) -> None:
    args = {"num_reg_tokens": 3, "qkv_bias": bias, "swiglu_mlp": gated, "swiglu_align_to": 8}
    model = of_timm("vit_small_patch16_dinov3", **args)
    periods = model.rope.periods.clone()
    encoder = load_encoder(write(tmp_path, dinov3(model.state_dict(), 2, periods)), image_size=32)
    assert encoder.heads == 2
    assert "those of its file, in float32" in encoder.notes[-1]
    same(encoder, model.forward_features(images()), 4)
    # as its authors keep them
    rounded = periods.bfloat16()
    encoder = load_encoder(write(tmp_path, dinov3(model.state_dict(), 2, rounded)), image_size=32)
    assert "in bfloat16" in encoder.notes[-1]
    before = model.forward_features(images())
    model.rope.periods.copy_(rounded)
    after = model.forward_features(images())
    assert (before - after).abs().max() > 1e-5
    same(encoder, after, 4)
    # timm's own reading of the same names
    read = timm.create_model("vit_small_patch16_dinov3", num_classes=0, **{**VIT, **args}).eval()
    named = dinov3(model.state_dict(), 2, rounded)
    read.load_state_dict(eva.checkpoint_filter_fn(named, read))
    close(read.forward_features(images()), before)


@torch.no_grad()
def test_mim_refiner(tmp_path: Path) -> None:
    model = of_timm("vit_base_patch16_224")
    state = dict(model.state_dict())
    positions = state.pop("pos_embed")
    state["cls_tokens.tokens"] = state.pop("cls_token") + positions[:, :1]
    state["pos_embed.embed"] = positions[:, 1:].unflatten(1, (4, 4))
    torch.save({"state_dict": state, "ctor_kwargs": {"kind": "vit"}}, tmp_path / "refined.th")
    encoder = load_encoder(tmp_path / "refined.th", heads=2)
    assert isinstance(encoder, Encoder)
    same(encoder, model.forward_features(images()), 1)


@pytest.mark.parametrize(
    ("architecture", "args", "pools"),
    [
        ("vit_base_patch16_224", {}, 3),
        ("vit_medium_patch16_gap_240", {}, 1),  # no class token, fc_norm
        ("vit_base_patch16_siglip_224", {}, 1),  # no class token, attention pooling
        ("vit_base_patch16_clip_224", {}, 3),  # a norm before the blocks
        ("deit3_small_patch16_224", {}, 3),
        ("vit_medium_patch16_reg4_gap_256", {}, 1),
        ("flexivit_small", {}, 3),
        ("eva02_tiny_patch14_224", {}, 1),
        ("vit_small_patch16_rope_mixed_224", {}, 3),
        ("vit_small_plus_patch16_dinov3", {}, 3),
    ],
)
@torch.no_grad()
def test_architectures_of_timm(
    tmp_path: Path, architecture: str, args: dict[str, Any], pools: int
) -> None:
    model = of_timm(architecture, **args)
    size = {name: VIT[name] for name in ("embed_dim", "depth", "num_heads")}
    file = write(tmp_path, model.state_dict(), architecture=architecture, model_args=size | args)
    encoder = load_encoder(file, image_size=32)
    has_class = getattr(model, "cls_token", None) is not None
    assert len(encoder.pools) == pools or (encoder.pools == ("mean",) and pools == 1)
    same(encoder, model.forward_features(images()), model.num_prefix_tokens, has_class)
    if model.global_pool in ("token", "avg"):
        how = {"token": "cls", "avg": "mean"}[model.global_pool]
        close(encoder.features(images(), how), model(images()))
    # written as timm reads it, and read again
    save_encoder(encoder, tmp_path / "again", pool="mean", mean=[0.5] * 3, std=[0.5] * 3)
    again = load_encoder(tmp_path / "again", image_size=32)
    close(again.features(images(), "mean"), encoder.features(images(), "mean"))
    if not has_class:
        with pytest.raises(ValueError, match="has no class token"):
            encoder.features(images(), "cls")


@torch.no_grad()
def test_another_image_size_is_as_timm_resizes_it(tmp_path: Path) -> None:
    model = of_timm("vit_small_patch14_reg4_dinov2", dynamic_img_size=True)
    encoder = load_encoder(write(tmp_path, dinov2(model.state_dict())), heads=2, image_size=48)
    expected = model.forward_features(images(side=48))
    close(encoder(images(side=48))[:, 1:], expected[:, 5:])
    assert any("4x4 patches, now 6x6: its positions are resized" in n for n in encoder.notes)


def hugging_face() -> dict[str, Callable[[Any], Any]]:
    size = {"hidden_size": 64, "num_hidden_layers": 3, "num_attention_heads": 2,
            "image_size": 32, "patch_size": 8}  # fmt: skip
    wide = {"intermediate_size": 128, **size}
    # ours, with which the weights were trained, not transformers' own default of 1e-12
    eps = {"layer_norm_eps": 1e-6}
    return {
        "vit": lambda t: t.ViTModel(t.ViTConfig(**wide, **eps), add_pooling_layer=False),
        "vit_mae": lambda t: t.ViTMAEModel(t.ViTMAEConfig(**wide, **eps, mask_ratio=0.0)),
        "dinov2": lambda t: t.Dinov2Model(t.Dinov2Config(**size)),
        "dinov2_gated": lambda t: t.Dinov2Model(t.Dinov2Config(**size, use_swiglu_ffn=True)),
        "dinov2_registers": lambda t: t.Dinov2WithRegistersModel(
            t.Dinov2WithRegistersConfig(**size, num_register_tokens=3)
        ),
        "dinov3": lambda t: t.DINOv3ViTModel(t.DINOv3ViTConfig(**wide, num_register_tokens=3)),
        "dinov3_gated": lambda t: t.DINOv3ViTModel(
            t.DINOv3ViTConfig(**wide, num_register_tokens=3, use_gated_mlp=True, hidden_act="silu")
        ),
    }


@pytest.mark.parametrize("name", hugging_face())
@pytest.mark.parametrize("saved", [True, False])
@torch.no_grad()
def test_hugging_face(tmp_path: Path, name: str, saved: bool) -> None:
    transformers = pytest.importorskip("transformers")
    model = randomised(hugging_face()[name](transformers))
    file = tmp_path / "model.safetensors"
    model.save_pretrained(tmp_path)
    if not saved:  # the names of a running network differ from those of files
        state = {n: t.contiguous() for n, t in model.state_dict().items()}
        safetensors.torch.save_file(state, file)
    encoder = load_encoder(file)
    options = {"noise": torch.arange(16.0).expand(2, -1)} if name == "vit_mae" else {}
    expected = model(images(), **options).last_hidden_state
    same(encoder, expected, 1 + getattr(model.config, "num_register_tokens", 0))
    assert isinstance(encoder, Encoder) == name.startswith("vit")
    assert ("computed in float32" in " ".join(encoder.notes)) == name.startswith("dinov3")


def cached(root: Path, repository: str, source: Path, *names: str) -> Path:
    """A hub's cache that holds files of a repository, as huggingface_hub lays it out."""
    folder = root / f"models--{repository.replace('/', '--')}"
    commit = "0123456789abcdef0123456789abcdef01234567"
    for place in (folder / "refs", folder / "blobs", folder / "snapshots" / commit):
        place.mkdir(parents=True)
    (folder / "refs" / "main").write_text(commit)
    for number, name in enumerate(names):
        (folder / "blobs" / str(number)).write_bytes((source / name).read_bytes())
        (folder / "snapshots" / commit / name).symlink_to(folder / "blobs" / str(number))
    return folder / "snapshots" / commit


@torch.no_grad()
def test_names_of_a_hub_are_found_in_its_cache(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from huggingface_hub import constants

    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path))
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    model = randomised(timm.create_model("test_vit2", num_classes=0))
    safetensors.torch.save_file(model.state_dict(), tmp_path / "model.safetensors")
    # timm's own download leaves no config.json: the repository's name tells the architecture
    folder = cached(tmp_path, "timm/test_vit2.r160_in1k", tmp_path, "model.safetensors")
    assert find("timm:test_vit2.r160_in1k") == folder / "model.safetensors"
    encoder = load_encoder("timm:test_vit2.r160_in1k")
    side = encoder.image_size[0]
    close(encoder.features(images(side=side), "mean"), model(images(side=side)))
    assert encoder.stated["pool"] == "mean"
    for name, reason in (
        ("hf:nobody/nothing", "is not in Hugging Face's cache and cannot be fetched"),
        ("hf:a/b/c", "hf:a/b/c: Repo id must be"),
    ):
        with pytest.raises(CheckpointError, match=reason):
            load_encoder(name)


DAMAGED: dict[str, tuple[dict[str, Any], str]] = {
    "unknown": ({"architecture": "vit_of_mine"}, "has no architecture 'vit_of_mine'"),
    "class": (
        {"architecture": "deit_tiny_distilled_patch16_224"},
        "is timm's VisionTransformerDistilled",
    ),
    "argument": ({"model_args": {"checkpoint_path": "x"}}, "model_args 'checkpoint_path' is not"),
    "value": ({"model_args": {"num_heads": 2, "depth": 3, "act_layer": "no"}}, "timm cannot make"),
    "shape": ({"model_args": {"reg_tokens": 7}}, r"does not fit timm's deit3_small_patch16_224"),
}


@pytest.mark.parametrize("fault", DAMAGED)
def test_what_timm_cannot_make_is_told(tmp_path: Path, fault: str) -> None:
    config = {"architecture": "deit3_small_patch16_224", **DAMAGED[fault][0]}
    file = write(tmp_path, of_timm("deit3_small_patch16_224").state_dict(), **config)
    with pytest.raises(CheckpointError, match=DAMAGED[fault][1]):
        load_encoder(file)
