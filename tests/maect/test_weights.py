"""Encoders in and out, on files made here with the names and shapes of released ones."""

from __future__ import annotations

import argparse
import json
import os
import pickle
import re
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import safetensors.torch
import timm
import torch
import torch.nn.functional as F
from PIL import Image
from timm.models.vision_transformer import VisionTransformer
from torch import Tensor

from maect import datasets, evals
from maect.augment import evaluation_transform
from maect.models import Encoder, build_encoder, pool, sincos_positions
from maect.settings import DataSettings
from maect.stages.encoder import encoder_document
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


def wrapped(state: State) -> Any:
    """As torch.compile, activation checkpointing and FSDP name modules, around and inside."""
    inner = {"blocks.0": "blocks.0._checkpoint_wrapped_module", "attn": "attn._orig_mod"}
    names = {}
    for name, value in state.items():
        for part, with_wrapper in inner.items():
            name = name.replace(f"{part}.", f"{with_wrapper}.")
        names[f"module._orig_mod._fsdp_wrapped_module.{name}"] = value
    return {"model": names}


def chunked(state: State) -> Any:
    """As DINOv2 stores blocks: those of a chunk keep their number."""
    return {re.sub(r"^blocks\.(\d)\.", r"blocks.\1.\1.", name): v for name, v in state.items()}


@pytest.mark.parametrize(
    "layout",
    [
        official_release,
        official_training,
        facebookresearch,
        distributed,
        classifier,
        vit_mae,
        vit,
        wrapped,
        chunked,
    ],
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


@pytest.mark.parametrize("kept", ["float16", "bfloat16", "float32 of bfloat16"])
def test_sincos_positions_of_half_precision_are_computed_anew(tmp_path: Path, kept: str) -> None:
    state = with_fixed_positions(reference())
    for kind in kept.split(" of ")[::-1]:
        state = {name: value.to(getattr(torch, kind)) for name, value in state.items()}
    torch.save(state, tmp_path / "half.pth")
    encoder = load_encoder(tmp_path / "half.pth", image_size=64)
    assert torch.equal(encoder.pos_embed[0], sincos_positions(8, 128))
    assert any("computed anew" in note for note in encoder.notes)
    state["pos_embed"] += 0.02 * numbers(*state["pos_embed"].shape).to(state["pos_embed"].dtype)
    torch.save(state, tmp_path / "learned.pth")
    assert "resized" in load_encoder(tmp_path / "learned.pth", image_size=64).notes[-1]


@torch.no_grad()
def test_a_norm_behind_the_pooling(tmp_path: Path) -> None:
    """facebookresearch/mae's classifiers, and timm's with global_pool avg."""
    model = reference(global_pool="avg", fc_norm=True)
    torch.save({"model": dict(model.state_dict())}, tmp_path / "tuned.pth")
    encoder, images = load_encoder(tmp_path / "tuned.pth"), numbers(2, 3, 32, 32)
    close(encoder.features(images, "mean"), model(images))
    with pytest.raises(ValueError, match="of the mean of patches"):
        encoder.features(images, "cls")
    save_encoder(encoder, tmp_path, mean=[0.5] * 3, std=[0.5] * 3)
    close(timm.create_model(f"local-dir:{tmp_path}", pretrained=True).eval()(images), model(images))
    close(load_encoder(tmp_path).features(images, "mean"), model(images))


def test_heads_that_no_shape_shows(tmp_path: Path) -> None:
    torch.save(dict(reference(num_heads=8).state_dict()), tmp_path / "weights.pth")
    encoder = load_encoder(tmp_path / "weights.pth")
    assert encoder.heads == 2
    (note,) = encoder.notes
    assert note.startswith("2 heads assumed, one for each 64 channels: no tensor shows them")
    assert load_encoder(tmp_path / "weights.pth", heads=8).heads == 8
    (tmp_path / "config.json").write_text(json.dumps({"num_attention_heads": 4}))
    assert load_encoder(tmp_path / "weights.pth").heads == 4
    given = load_encoder(tmp_path / "weights.pth", heads=8)
    assert (given.heads, given.notes) == (8, ["8 heads as given; config.json says 4"])
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


@pytest.mark.parametrize("how", ["cls", "mean"])
@torch.no_grad()
def test_timm_prepares_images_as_we_did(tmp_path: Path, how: Any) -> None:
    """What a stage leaves goes through `load_encoder` and `save_encoder` without a word given."""
    made, stage = (
        build_encoder("custom", image_size=8, patch_size=2, in_chans=1, dim=32, depth=2, heads=2),
        tmp_path / "stage",
    )
    splits = {
        n: datasets.load(DataSettings(name="digits", image_size=8), None, n)
        for n in ("train", "test")
    }
    stage.mkdir()
    safetensors.torch.save_file(made.state_dict(), stage / "encoder.safetensors")
    document = encoder_document(made, splits["train"], how)
    (stage / "encoder.json").write_text(json.dumps(document))
    save_encoder(load_encoder(stage), tmp_path / "out")
    model = timm.create_model(f"local-dir:{tmp_path / 'out'}", pretrained=True).eval()
    config = timm.data.resolve_model_data_config(model)
    assert {name: config[name] for name in ("interpolation", "crop_pct", "input_size")} == {
        "interpolation": "bicubic",
        "crop_pct": 1.0,
        "input_size": (1, 8, 8),
    } or list(config["input_size"]) == [1, 8, 8]
    transform = timm.data.create_transform(**config)
    features: dict[str, list[Tensor]] = {"ours": [], "timm's": []}
    for split in splits.values():
        images = split.batch(np.arange(len(split)))
        theirs = torch.stack([transform(Image.fromarray(image[0].numpy())) for image in images])
        features["timm's"].append(model(theirs))
        ours = evaluation_transform(images, image_size=8, mean=split.mean, std=split.std)
        features["ours"].append(made.features(ours, how))
    accuracy = {
        whose: evals.knn(train, splits["train"].labels, test, splits["test"].labels, k=10)
        for whose, (train, test) in features.items()
    }
    close(features["timm's"][1], features["ours"][1])
    assert accuracy["timm's"] == accuracy["ours"]


def test_what_nothing_says_of_images_is_assumed_aloud(tmp_path: Path, encoder: Encoder) -> None:
    with pytest.warns(UserWarning, match=r"mean \[0.0\], std \[1.0\] assumed"):
        save_encoder(encoder, tmp_path)
    config = timm.data.resolve_model_data_config(timm.create_model(f"local-dir:{tmp_path}"))
    assert [*config["mean"], *config["std"], config["crop_pct"]] == [0.0, 1.0, 0.875]
    with pytest.raises(ValueError, match=r"mean \[0.1, 0.2, 0.3\] for 1 channel"):
        save_encoder(encoder, tmp_path, mean=[0.1, 0.2, 0.3], std=[1.0])


def test_files_have_the_rights_that_the_umask_leaves(tmp_path: Path, encoder: Encoder) -> None:
    before = os.umask(0o027)
    try:
        save_encoder(encoder, tmp_path / "out", mean=[0.5], std=[0.5])
    finally:
        os.umask(before)
    found = {path.name: path.stat().st_mode & 0o777 for path in (tmp_path / "out").iterdir()}
    assert found == {"model.safetensors": 0o640, "config.json": 0o640}


def test_saved_encoder_comes_back_bit_for_bit(tmp_path: Path, encoder: Encoder) -> None:
    save_encoder(encoder, tmp_path, mean=[0.5], std=[0.5])
    again = load_encoder(tmp_path)
    assert again.stated == {
        "mean": [0.5],
        "std": [0.5],
        "interpolation": "bicubic",
        "crop_pct": 0.875,
        "pool": "mean",
    }
    assert again.notes == []
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
        names = hugging_face(state)
        del names["vit.encoder.layer.0.attention.attention.key.bias"]
        del names["vit.encoder.layer.1.layernorm_after.bias"]
        names["vit.encoder.layer.0.lora.gamma"] = torch.ones(128)
        names["vit.encoder.layer.0.attention.output.dense.weight"] = torch.ones(300, 128)
        return names

    message = damaged(change, tmp_path)
    assert "dim 128, depth 2 and patch size 8" in message
    assert 'Missing key(s) in state_dict: "blocks.0.attn.qkv.bias", "blocks.1.norm2.b' in message
    assert 'Unexpected key(s) in state_dict: "blocks.0.lora.gamma"' in message
    assert "size mismatch for blocks.0.attn.proj.weight" in message


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda s: {n: v for n, v in s.items() if n != "cls_token"}, "holds no ViT encoder"),
        (lambda s: {"a": s, "b": s}, "more than one encoder, under a., b."),
        (lambda s: {n: v for n, v in s.items() if n != "pos_embed"}, "lacks pos_embed"),
        (lambda s: {**s, "pos_embed": s["pos_embed"][:, :12]}, "12 rows, which is no square"),
        (lambda s: {**s, "pos_embed": s["pos_embed"][..., :64]}, "expected dim 128"),
        (lambda s: {**s, "norm.bias": torch.full((128,), torch.nan)}, "norm.bias holds NaN"),
        (
            lambda s: {**s, "norm.bias": torch.full((128,), 1e300, dtype=torch.float64)},
            "norm.bias holds NaN",
        ),
        (lambda s: {**s, "norm.bias": torch.ones(128).long()}, r"norm.bias is torch.int64"),
        (lambda s: {**s, "norm.bias": torch.ones(128).to_sparse()}, r"torch.sparse_coo"),
        (lambda s: {**s, "cls_token": torch.ones(1, 1, 0)}, "without any number"),
        (lambda s: {**s, "blocks.0.norm1.bias": torch.ones(0)}, "without any number"),
        (lambda s: {**s, "blocks.99999999.norm1.bias": torch.ones(128)}, "numbered 99999999"),
        (lambda s: {**s, "blocks.9999999999.x": torch.ones(1)}, "Unexpected key"),
        (lambda s: {**s, "dist_token": torch.ones(1, 1, 128)}, "Unexpected key.*dist_token"),
        (lambda s: {**s, "a" * 10**6: torch.ones(1)}, "Unexpected key.*a{80,1000}$"),
        (lambda s: {**s, "blocks.0._orig_mod.norm1.bias": torch.ones(128)}, "norm1.bias twice"),
        (
            lambda s: {**s, "patch_embed.proj.bias": torch.ones(1).expand(10**9, 10**9)},
            "more numbers than the file holds",
        ),
        (
            lambda s: {**s, "patch_embed.proj.weight": torch.ones(128, 3, 8, 4)},
            r"size mismatch for patch_embed.proj.weight",
        ),
        (lambda s: nested(dict(s), 100), "nested without end"),
        (lambda s: {"a": doubled(40)}, "nested without end"),
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


def nested(value: Any, levels: int) -> Any:
    for _ in range(levels):
        value = {"model": value}
    return value


def doubled(levels: int) -> Any:
    """2 ** levels paths through as many dicts."""
    value: dict[str, Any] = {}
    for _ in range(levels):
        value = {"a": value, "b": value}
    return value


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
    save_encoder(encoder, tmp_path, mean=[0.5], std=[0.5])
    torch.save(encoder.state_dict(), tmp_path / "weights.pth")
    file = tmp_path / name
    file.write_bytes(file.read_bytes()[:size])
    with pytest.raises(CheckpointError, match=f"{name} cannot be read, it may be incomplete"):
        load_encoder(file)


def zip_bomb(file: Path) -> None:
    with zipfile.ZipFile(file, "w", zipfile.ZIP_DEFLATED) as archive:
        archive.writestr("archive/data.pkl", b"\0" * 10**7)


def lying_archive(file: Path) -> None:
    """Its pickle claims more numbers than lie in the archive."""
    state = dict(reference().state_dict())
    torch.save({"model": state}, file)
    with zipfile.ZipFile(file) as archive:
        content = {entry.filename: archive.read(entry) for entry in archive.infolist()}
    with zipfile.ZipFile(file, "w") as archive:
        for name, data in content.items():
            short = data[:64] if name.endswith("data/0") else data
            archive.writestr(name, short)


def flipped(file: Path) -> None:
    state = dict(reference().state_dict())
    torch.save(state, file)
    data = bytearray(file.read_bytes())
    data[data.find(state["norm.weight"].numpy().tobytes())] ^= 1
    file.write_bytes(data)


def header(file: Path, **claims: Any) -> None:
    entry = {"dtype": "F32", "shape": [10**12], "data_offsets": [0, 4 * 10**12]} | claims
    text = json.dumps({"cls_token": entry}).encode()
    file.write_bytes(len(text).to_bytes(8, "little") + text + b"\0" * 64)


def shared_numbers(file: Path) -> None:
    header(file.with_suffix(".safetensors"))
    file.with_suffix(".safetensors").rename(file)


@pytest.mark.parametrize(
    ("write", "message"),
    [
        (lambda f: f.write_text("# A readme\n" * 20), "is no weights file"),
        (lambda f: f.write_bytes(b"version https://git-lfs.github.com/spec/v1"), "Git LFS pointer"),
        (lambda f: f.write_bytes(os.urandom(5000)), "is no weights file|cannot be read"),
        (lambda f: f.write_bytes(pickle.dumps({"a": 1})), "cannot be read|could run code"),
        (zip_bomb, "unpacks to more than the file holds"),
        (lying_archive, "cannot be read"),
        (flipped, "Bad CRC"),
        (shared_numbers, "cannot be read"),
        (os.mkfifo, "neither a file nor a folder"),
    ],
)
def test_other_files_say_what_they_are(
    tmp_path: Path, write: Callable[[Path], Any], message: str
) -> None:
    """At once, and without the memory that they claim."""
    file = tmp_path / "weights.pth"
    write(file)
    with pytest.raises(CheckpointError, match=message):
        load_encoder(file)


TIMM = {"model_args": {"embed_dim": 128, "depth": 2, "num_heads": 2, "mlp_ratio": 4.0}}


@pytest.mark.parametrize(
    ("config", "message"),
    [
        ("[1, 2", "config.json cannot be read"),
        ("[" * 10**5, "config.json cannot be read"),
        (b"\xff\xfe{}", "config.json cannot be read"),
        ([], "config.json cannot be read"),
        ({"num_attention_heads": "two"}, "num_attention_heads: Input should be a valid integer"),
        ({"num_attention_heads": True}, "num_attention_heads: Input should be"),
        ({"num_attention_heads": -2}, "num_attention_heads: Input should be greater than 0"),
        ({"model_args": [1]}, "model_args: Input should be"),
        ({"image_size": {"height": 32}}, "image_size"),
        ('{"mean": [NaN, 0, 0]}', "mean"),
        ('{"num_attention_heads": NaN}', "num_attention_heads"),
        ({"pretrained_cfg": {"std": [0, 1, 1]}}, "pretrained_cfg.std"),
        ({"num_attention_heads": 4, **TIMM}, "says 2 and 4 heads"),
        ({"hidden_size": 64}, "says dim 64, the weights beside it have 128"),
        ({"num_hidden_layers": 10**9}, "says depth 1000000000, the weights beside it have 2"),
        ({"patch_size": [16, 16]}, "says patch_size 16, the weights beside it have 8"),
        ({"num_channels": 1}, "says in_chans 1, the weights beside it have 3"),
        ({"intermediate_size": 1}, "says mlp width 1, the weights beside it have 512"),
        ({"hidden_act": "relu"}, "says activation relu, the weights beside it have gelu"),
        ({"image_size": 10**9 * 8}, "too many patches"),
        ({"image_size": 30}, "do not tile"),
        ({"pretrained_cfg": {"mean": [0.5]}}, "says channels of mean 1"),
        (TIMM | {"architecture": 3}, None),
        ({"image_size": 32, "hidden_act": "gelu", "layer_norm_eps": 1e-12}, None),
    ],
)
def test_what_stands_beside_the_weights_is_compared(
    tmp_path: Path, config: Any, message: str | None
) -> None:
    torch.save(dict(reference().state_dict()), tmp_path / "weights.pth")
    text = config if isinstance(config, str | bytes) else json.dumps(config)
    place = tmp_path / "config.json"
    place.write_bytes(text.encode() if isinstance(text, str) else text)
    if message is None:
        assert load_encoder(tmp_path / "weights.pth").heads == 2
    else:
        with pytest.raises(CheckpointError, match=re.escape(message)):
            load_encoder(tmp_path / "weights.pth")


def test_an_image_size_that_the_positions_are_not_for_is_told(tmp_path: Path) -> None:
    torch.save(dict(reference().state_dict()), tmp_path / "weights.pth")
    (tmp_path / "config.json").write_text('{"image_size": 64, "num_attention_heads": 2}')
    encoder = load_encoder(tmp_path / "weights.pth")
    assert encoder.image_size == (32, 32)
    assert "says 8x8 patches, which its 17 positions are not: 4x4 taken" in encoder.notes[0]


def test_missing_files_are_named(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match=r"nothing.pth: no such file or folder"):
        load_encoder(tmp_path / "nothing.pth")
    with pytest.raises(CheckpointError, match=r"neither model.safetensors nor pytorch_model.bin"):
        load_encoder(tmp_path)
