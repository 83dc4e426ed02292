"""Encoders in and out, on files made here with the names and shapes of released ones."""

from __future__ import annotations

import argparse
import json
import os
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import safetensors.torch
import timm
import torch
import torch.nn.functional as F
from timm.models.vision_transformer import VisionTransformer
from torch import Tensor

from maect.models import Encoder, build_encoder, pool, sincos_positions
from maect.weights import CheckpointError, load_encoder, save_encoder

SIZES: dict[str, Any] = {
    "img_size": 32,
    "patch_size": 8,
    "embed_dim": 128,
    "depth": 2,
    "num_heads": 2,
}
State = dict[str, Tensor]


def numbers(*shape: int, seed: int = 0) -> Tensor:
    return torch.from_numpy(np.random.default_rng(seed).normal(size=shape).astype(np.float32))


def reference(**sizes: Any) -> VisionTransformer:
    """timm's model with random weights everywhere, learned positions included."""
    model = VisionTransformer(num_classes=0, **{**SIZES, **sizes}).eval()
    with torch.no_grad():
        for seed, (name, parameter) in enumerate(model.named_parameters()):
            scale = 0.5 if name.endswith("_embed") or name == "cls_token" else 0.05
            parameter.copy_(scale * numbers(*parameter.shape, seed=seed))
            if "norm" in name and name.endswith("weight"):
                parameter.add_(1.0)
    return model


def with_fixed_positions(model: VisionTransformer) -> State:
    """The model's state, its positions changed to sin-cos with a zero row, as in MAE."""
    _, rows, dim = model.pos_embed.shape
    fixed = sincos_positions(round((rows - 1) ** 0.5), dim)
    with torch.no_grad():
        model.pos_embed.copy_(torch.cat([torch.zeros(1, dim), fixed])[None])
    return dict(model.state_dict())


def official(state: State) -> State:
    return {**state, "pos_embed": state["pos_embed"][:, 1:]}


def hugging_face(state: State, prefix: str = "vit.") -> State:
    """timm's names to those of Hugging Face, query, key and value apart."""
    names = {
        "cls_token": "embeddings.cls_token",
        "pos_embed": "embeddings.position_embeddings",
        "patch_embed.proj": "embeddings.patch_embeddings.projection",
        "norm1": "layernorm_before",
        "norm2": "layernorm_after",
        "attn.proj": "attention.output.dense",
        "mlp.fc1": "intermediate.dense",
        "mlp.fc2": "output.dense",
        "norm": "layernorm",
    }
    result = {}
    for name, tensor in state.items():
        stem, _, kind = (
            name.rpartition(".") if name.endswith(("weight", "bias")) else (name, "", "")
        )
        if stem.startswith("blocks."):
            _, index, part = stem.split(".", 2)
            layer = f"{prefix}encoder.layer.{index}"
            if part == "attn.qkv":
                for which, rows in zip(("query", "key", "value"), tensor.chunk(3), strict=True):
                    result[f"{layer}.attention.attention.{which}.{kind}"] = rows.clone()
            else:
                result[f"{layer}.{names[part]}.{kind}"] = tensor
        else:
            result[f"{prefix}{names[stem]}" + (f".{kind}" if kind else "")] = tensor
    return result


def hugging_face_features(state: State, images: Tensor, patch: int, heads: int) -> Tensor:
    """Forward pass written from Hugging Face's names alone, with a convolution for the patches."""
    p = {name.removeprefix("vit."): value for name, value in state.items()}

    def linear(name: str, x: Tensor) -> Tensor:
        return F.linear(x, p[f"{name}.weight"], p[f"{name}.bias"])

    def norm(name: str, x: Tensor) -> Tensor:
        return F.layer_norm(x, x.shape[-1:], p[f"{name}.weight"], p[f"{name}.bias"], 1e-6)

    projection = "embeddings.patch_embeddings.projection"
    x = F.conv2d(images, p[f"{projection}.weight"], p[f"{projection}.bias"], stride=patch)
    x = x.flatten(2).transpose(1, 2)
    x = torch.cat([p["embeddings.cls_token"].expand(len(x), -1, -1), x], dim=1)
    x = x + p["embeddings.position_embeddings"]
    for index in range(sum("layernorm_before.weight" in name for name in p)):
        layer = f"encoder.layer.{index}"
        y = norm(f"{layer}.layernorm_before", x)
        q, k, v = (
            linear(f"{layer}.attention.attention.{which}", y)
            .unflatten(2, (heads, -1))
            .transpose(1, 2)
            for which in ("query", "key", "value")
        )
        weights = (q @ k.transpose(2, 3) / q.shape[-1] ** 0.5).softmax(dim=-1)
        y = (weights @ v).transpose(1, 2).flatten(2)
        x = x + linear(f"{layer}.attention.output.dense", y)
        y = F.gelu(linear(f"{layer}.intermediate.dense", norm(f"{layer}.layernorm_after", x)))
        x = x + linear(f"{layer}.output.dense", y)
    return norm("layernorm", x)


def close(actual: Tensor, expected: Tensor) -> None:
    torch.testing.assert_close(actual, expected, atol=1e-5, rtol=0)


@pytest.mark.parametrize("origin", ["official", "facebookresearch"])
@torch.no_grad()
def test_base_size_gives_the_reference_features(tmp_path: Path, origin: str) -> None:
    model = reference(img_size=224, patch_size=16, embed_dim=768, depth=12, num_heads=12)
    state = with_fixed_positions(model)
    golden = np.load(Path(__file__).parent / "golden" / "official_a.npz")
    columns = [golden[f"sd/masked_encoder_b16/{part}"].tolist() for part in ("names", "shapes")]
    stored = official(state)
    shapes = {name: str(list(value.shape)) for name, value in stored.items()}
    assert shapes == dict(zip(*columns, strict=True))
    file = tmp_path / "encoder.pth"
    torch.save({"state_dict": stored} if origin == "official" else {"model": state}, file)
    encoder = load_encoder(file)
    assert (encoder.dim, encoder.depth, encoder.heads) == (768, 12, 12)
    images = numbers(1, 3, 224, 224)
    close(encoder.forward_features(images), model.forward_features(images))


def official_release(state: State) -> Any:
    return {"state_dict": official(state), "ctor_kwargs": {"patch_size": 8, "kind": "encoder"}}


def official_training(state: State) -> Any:
    decoder = {"mask_token": torch.zeros(1, 1, 4), "pos_embed": torch.zeros(1, 16, 4)}
    return {"model": {"encoder": official(state), "decoder": decoder}, "trainer": {"epoch": 3}}


def facebookresearch(state: State) -> Any:
    decoder = {"mask_token": torch.zeros(1, 1, 4), "decoder_embed.weight": torch.zeros(4, 128)}
    return {"model": {**state, **decoder}, "epoch": 1, "args": argparse.Namespace(lr=1e-3)}


def distributed(state: State) -> Any:
    return {"state_dict": {f"module.{name}": value for name, value in state.items()}}


def classifier(state: State) -> Any:
    return {**state, "head.weight": torch.zeros(10, 128), "head.bias": torch.zeros(10)}


def vit_mae(state: State) -> Any:
    decoder = {
        "decoder.mask_token": torch.zeros(1, 1, 4),
        "decoder.decoder_norm.weight": torch.ones(4),
    }
    return {**hugging_face(state), **decoder}


def vit(state: State) -> Any:
    return {**hugging_face(state, ""), "pooler.dense.weight": torch.zeros(128, 128)}


@pytest.mark.parametrize(
    "layout",
    [official_release, official_training, facebookresearch, distributed, classifier, vit_mae, vit],
)
@torch.no_grad()
def test_layouts(tmp_path: Path, layout: Callable[[State], Any]) -> None:
    model = reference()
    stored = layout(with_fixed_positions(model))
    torch.save(stored, tmp_path / "weights.pt")
    images = numbers(2, 3, 32, 32)
    expected = model.forward_features(images)
    encoder = load_encoder(tmp_path / "weights.pt")
    close(encoder.forward_features(images), expected)
    assert torch.equal(encoder.pos_embed[0], sincos_positions(4, 128))
    if all(isinstance(value, Tensor) for value in stored.values()):
        safetensors.torch.save_file(
            {name: value.contiguous() for name, value in stored.items()},
            tmp_path / "model.safetensors",
        )
        close(load_encoder(tmp_path).forward_features(images), expected)


@torch.no_grad()
def test_hugging_face_names_mean_what_they_say(tmp_path: Path) -> None:
    state = hugging_face(dict(reference().state_dict()))
    torch.save(state, tmp_path / "pytorch_model.bin")
    images = numbers(2, 3, 32, 32)
    expected = hugging_face_features(state, images, patch=8, heads=2)
    close(load_encoder(tmp_path).forward_features(images), expected)


@torch.no_grad()
def test_learned_positions_and_half_precision(tmp_path: Path) -> None:
    model = reference()
    torch.save(dict(model.state_dict()), tmp_path / "timm.pth")
    images = numbers(2, 3, 32, 32)
    close(load_encoder(tmp_path / "timm.pth")(images), model.forward_features(images))
    torch.save({n: v.bfloat16() for n, v in model.state_dict().items()}, tmp_path / "half.pth")
    encoder = load_encoder(tmp_path / "half.pth")
    assert {value.dtype for value in encoder.state_dict().values()} == {torch.float32}


@torch.no_grad()
def test_other_image_size(tmp_path: Path) -> None:
    model = reference()
    torch.save(dict(model.state_dict()), tmp_path / "learned.pth")
    images = numbers(2, 3, 48, 32)
    encoder = load_encoder(tmp_path / "learned.pth", image_size=(48, 32))
    assert encoder.grid == (6, 4)
    bigger = reference(img_size=(48, 32))
    grid = model.pos_embed[:, 1:].reshape(1, 4, 4, 128).permute(0, 3, 1, 2)
    resized = F.interpolate(grid, size=(6, 4), mode="bicubic", antialias=True)
    positions = torch.cat([model.pos_embed[:, :1], resized.flatten(2).transpose(1, 2)], dim=1)
    bigger.load_state_dict({**model.state_dict(), "pos_embed": positions})
    close(encoder(images), bigger.forward_features(images))

    torch.save(with_fixed_positions(model), tmp_path / "fixed.pth")
    fixed = load_encoder(tmp_path / "fixed.pth", image_size=64)
    assert torch.equal(fixed.pos_embed[0], sincos_positions(8, 128))
    with pytest.raises(CheckpointError, match="patches of 8 do not tile images of 30x30"):
        load_encoder(tmp_path / "fixed.pth", image_size=30)


def test_heads_that_no_shape_shows(tmp_path: Path) -> None:
    torch.save(dict(reference(num_heads=8).state_dict()), tmp_path / "weights.pth")
    assert load_encoder(tmp_path / "weights.pth").heads == 2  # one for each 64 channels
    assert load_encoder(tmp_path / "weights.pth", heads=8).heads == 8
    (tmp_path / "config.json").write_text(json.dumps({"num_attention_heads": 4}))
    assert load_encoder(tmp_path / "weights.pth").heads == 4
    with pytest.raises(CheckpointError, match="no multiple of 3 heads"):
        load_encoder(tmp_path / "weights.pth", heads=3)


# ------------------------------------------------------------------------------------- saving


@pytest.fixture
def encoder() -> Encoder:
    return build_encoder(
        "custom",
        image_size=(16, 24),
        patch_size=4,
        in_chans=1,
        dim=24,
        depth=2,
        heads=4,
        mlp_ratio=2.5,
    )


@pytest.mark.parametrize("how", ["cls", "mean"])
@torch.no_grad()
def test_timm_loads_what_is_saved(tmp_path: Path, encoder: Encoder, how: Any) -> None:
    save_encoder(encoder, tmp_path / "out", pool=how, mean=[0.5], std=[0.25])
    model = timm.create_model(f"local-dir:{tmp_path / 'out'}", pretrained=True).eval()
    images = numbers(2, 1, 16, 24)
    close(model.forward_features(images), encoder(images))
    close(model(images), pool(encoder(images), how))
    data = timm.data.resolve_model_data_config(model)
    assert [list(data[name]) for name in ("mean", "std", "input_size")] == [
        [0.5],
        [0.25],
        [1, 16, 24],
    ]


def test_saved_encoder_comes_back_bit_for_bit(tmp_path: Path, encoder: Encoder) -> None:
    save_encoder(encoder, tmp_path)
    again = load_encoder(tmp_path)
    assert (again.heads, again.image_size, again.mlp_ratio) == (4, (16, 24), 2.5)
    for name, value in encoder.state_dict().items():
        assert torch.equal(again.state_dict()[name], value), name
    assert all(parameter.requires_grad for parameter in again.parameters())


# ------------------------------------------------------------------------------------- errors


def damaged(change: Callable[[State], Any], folder: Path) -> str:
    state = with_fixed_positions(reference())
    file = folder / "damaged.pth"
    torch.save(change(state), file)
    with pytest.raises(CheckpointError) as error:
        load_encoder(file)
    assert str(file) in str(error.value)
    return str(error.value)


def test_missing_extra_and_misshaped_tensors_are_named(tmp_path: Path) -> None:
    def change(state: State) -> State:
        del state["blocks.1.norm2.bias"]
        state["blocks.0.ls1.gamma"] = torch.ones(128)
        state["blocks.0.attn.qkv.weight"] = torch.ones(300, 128)
        return state

    message = damaged(change, tmp_path)
    assert "dim 128, depth 2 and patch size 8" in message
    assert "blocks.1.norm2.bias is missing, expected [128]" in message
    assert "blocks.0.ls1.gamma is not expected" in message
    assert "blocks.0.attn.qkv.weight is [300, 128], expected [384, 128]" in message


def test_many_faults_are_counted(tmp_path: Path) -> None:
    message = damaged(
        lambda state: {n: v for n, v in state.items() if not n.startswith("blocks.0")}, tmp_path
    )
    assert message.count("is missing") == 8
    assert message.endswith("and 4 more")


def test_missing_hugging_face_tensors_are_named(tmp_path: Path) -> None:
    def change(state: State) -> State:
        names = hugging_face(state)
        del names["vit.encoder.layer.0.attention.attention.key.bias"]
        return names

    assert "blocks.0.attn.qkv.bias is missing, expected [384]" in damaged(change, tmp_path)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda s: {n: v for n, v in s.items() if n != "cls_token"}, "holds no ViT encoder"),
        (lambda s: {"a": s, "b": s}, "more than one encoder, under a., b."),
        (lambda s: {n: v for n, v in s.items() if n != "pos_embed"}, "lacks pos_embed"),
        (lambda s: {**s, "pos_embed": s["pos_embed"][:, :12]}, "12 rows, which is no square"),
        (lambda s: {**s, "pos_embed": s["pos_embed"][..., :64]}, "expected dim 128"),
        (
            lambda s: {**s, "patch_embed.proj.weight": torch.ones(128, 192)},
            r"proj.weight is \[128, 192\], expected \[dim, channels, patch, patch\]",
        ),
    ],
)
def test_files_without_an_encoder_say_so(
    tmp_path: Path, change: Callable[[State], Any], message: str
) -> None:
    assert re.search(message, damaged(change, tmp_path))


class Command:
    """Runs a command when it is unpickled."""

    def __init__(self, command: str) -> None:
        self.command = command

    def __reduce__(self) -> Any:
        return os.system, (self.command,)


def test_no_code_of_a_file_is_run(tmp_path: Path) -> None:
    file, trace = tmp_path / "weights.pth", tmp_path / "trace"
    torch.save({"model": dict(reference().state_dict()), "x": Command(f"touch {trace}")}, file)
    with pytest.raises(CheckpointError, match="could run code, so it was not loaded"):
        load_encoder(file)
    assert not trace.exists()


@pytest.mark.parametrize("name", ["weights.pth", "model.safetensors"])
@pytest.mark.parametrize("size", [0, 2000])
def test_truncated_files_are_named(tmp_path: Path, encoder: Encoder, name: str, size: int) -> None:
    save_encoder(encoder, tmp_path)
    torch.save(encoder.state_dict(), tmp_path / "weights.pth")
    file = tmp_path / name
    file.write_bytes(file.read_bytes()[:size])
    with pytest.raises(CheckpointError, match=f"{name} cannot be read, it may be incomplete"):
        load_encoder(file)


def test_missing_files_are_named(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match=r"nothing.pth: no such file or folder"):
        load_encoder(tmp_path / "nothing.pth")
    with pytest.raises(CheckpointError, match=r"neither model.safetensors nor pytorch_model.bin"):
        load_encoder(tmp_path)
    torch.save(dict(reference().state_dict()), tmp_path / "weights.pth")
    (tmp_path / "config.json").write_text("[1, 2")
    with pytest.raises(CheckpointError, match=r"config.json cannot be read"):
        load_encoder(tmp_path / "weights.pth")
