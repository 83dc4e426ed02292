"""Encoders in and out: released checkpoints of several origins, and files that timm loads.

Recognised by the names of their tensors: the official MAE-CT release (positions without a row for
the class token), facebookresearch/mae (with a zero row) and timm (with a learned row), all three
with the same names otherwise, and Hugging Face's ViT-MAE and ViT. Tensors may lie in nested
dicts and under a prefix. No code from a file is ever run. LayerNorm's eps is 1e-6, with which all
of them were trained (Hugging Face's configuration of ViT-MAE says 1e-12).
"""

from __future__ import annotations

import argparse
import json
import math
import pickle
import re
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, Literal

import safetensors.torch
import torch
from safetensors import SafetensorError
from timm.layers import resample_abs_pos_embed
from torch import Tensor

from maect.models import Encoder, sincos_positions
from maect.settings import SIZES, ModelSettings

_WEIGHTS, _CONFIG = "model.safetensors", "config.json"
_IN_FOLDER = (_WEIGHTS, "pytorch_model.bin", "encoder.safetensors")
#: parts beside the encoder, which its features do not depend on
_OTHER_PARTS = ("mask_token", "embeddings.mask_token", "decoder", "head.", "pooler.", "classifier.")
_HUGGING_FACE = (
    (r"^embeddings\.cls_token$", "cls_token"),
    (r"^embeddings\.position_embeddings$", "pos_embed"),
    (r"^embeddings\.patch_embeddings\.projection\.", "patch_embed.proj."),
    (r"^encoder\.layer\.(\d+)\.layernorm_before\.", r"blocks.\1.norm1."),
    (r"^encoder\.layer\.(\d+)\.layernorm_after\.", r"blocks.\1.norm2."),
    (r"^encoder\.layer\.(\d+)\.attention\.attention\.", r"blocks.\1.attn."),
    (r"^encoder\.layer\.(\d+)\.attention\.output\.dense\.", r"blocks.\1.attn.proj."),
    (r"^encoder\.layer\.(\d+)\.intermediate\.dense\.", r"blocks.\1.mlp.fc1."),
    (r"^encoder\.layer\.(\d+)\.output\.dense\.", r"blocks.\1.mlp.fc2."),
    (r"^layernorm\.", "norm."),
)


class CheckpointError(ValueError):
    """A file that cannot be loaded as an encoder; the message says what was expected."""


def load_encoder(
    path: str | Path,
    *,
    image_size: int | tuple[int, int] | None = None,
    heads: int | None = None,
) -> Encoder:
    """Return the encoder in a checkpoint file, or in a folder that holds one, in float32.

    Sizes are read off the tensors. `heads`: where not given, from a `config.json` beside the
    weights, else those of the known size, else one for each 64 channels. `image_size`: by default
    the one the positions are for; for another one sin-cos positions are computed anew and others
    resized (bicubic). Positions are fixed either way; a position of the class token is added to
    it. CheckpointError if the file cannot be read, or lacks tensors, or has others or wrong ones.
    """
    return _load(_weights_file(Path(path)), image_size, heads)


def load_for(
    path: str | Path, model: ModelSettings, *, image_size: int | tuple[int, int], in_chans: int
) -> Encoder:
    """`load_encoder` for a stage of these settings, whose number of heads it takes.

    CheckpointError also where the file's sizes are not the settings'.
    """
    assert model.dim
    expected = {name: getattr(model, name) for name in ("dim", "depth", "heads", "patch_size")}
    expected |= {"in_chans": in_chans, "mlp width": int(model.dim * model.mlp_ratio)}
    return _load(_weights_file(Path(path)), image_size, model.heads, expected)


def _load(
    file: Path,
    image_size: int | tuple[int, int] | None,
    heads: int | None,
    expected: Mapping[str, int] | None = None,
) -> Encoder:
    tensors = _rename(_encoder_part(dict(_flatten(_read(file))), file))
    sizes = _sizes(tensors, file)
    config = _config(file)
    if expected is not None:
        _compare(sizes, config["heads"], expected, file)
    sizes["heads"] = heads or config["heads"] or _known_heads(sizes["dim"], sizes["depth"])
    if sizes["dim"] % sizes["heads"]:
        raise CheckpointError(
            f"{file}: its dim {sizes['dim']} is no multiple of {sizes['heads']} heads; give heads"
        )
    patch = sizes["patch_size"]
    stored = _grid(config["image_size"], patch, file)
    grid = _place_positions(tensors, stored, _grid(image_size, patch, file), file)
    with torch.device("meta"):
        encoder = Encoder((grid[0] * patch, grid[1] * patch), **sizes)
    _check(tensors, encoder.state_dict(), sizes, file)
    copies = {name: value.to(torch.float32, copy=True) for name, value in tensors.items()}
    encoder.load_state_dict(copies, assign=True)
    return encoder


def save_encoder(
    encoder: Encoder,
    folder: str | Path,
    *,
    pool: Literal["cls", "mean"] = "mean",
    mean: Sequence[float] | None = None,
    std: Sequence[float] | None = None,
) -> None:
    """Write `model.safetensors` and `config.json`, from which timm makes the same model.

    `timm.create_model("local-dir:FOLDER", pretrained=True)` gives tokens by `forward_features`
    and, called, the features that `pool` names; `mean` and `std` are the pixel statistics that
    images were normalised by. Positions get a zero row for the class token, as timm expects.
    """
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    tensors = {name: value.detach().cpu() for name, value in encoder.state_dict().items()}
    positions = tensors["pos_embed"]
    tensors["pos_embed"] = torch.cat([torch.zeros_like(positions[:, :1]), positions], dim=1)
    tensors = {name: value.contiguous() for name, value in tensors.items()}
    safetensors.torch.save_file(tensors, folder / _WEIGHTS, metadata={"format": "pt"})
    statistics = {"mean": mean, "std": std}
    config = {
        "architecture": "vit_base_patch16_224",
        "num_classes": 0,
        "num_features": encoder.dim,
        "model_args": {
            "img_size": list(encoder.image_size),
            "patch_size": encoder.patch_size,
            "in_chans": encoder.in_chans,
            "embed_dim": encoder.dim,
            "depth": encoder.depth,
            "num_heads": encoder.heads,
            "mlp_ratio": encoder.mlp_ratio,
            "global_pool": {"cls": "token", "mean": "avg"}[pool],
            "fc_norm": False,
        },
        "pretrained_cfg": {
            "input_size": [encoder.in_chans, *encoder.image_size],
            "fixed_input_size": True,
            "num_classes": 0,
            "first_conv": "patch_embed.proj",
            "classifier": "head",
            **{name: list(value) for name, value in statistics.items() if value is not None},
        },
    }
    (folder / _CONFIG).write_text(json.dumps(config, indent=2) + "\n", encoding="utf-8")


def _weights_file(path: Path) -> Path:
    if path.is_file():
        return path
    if not path.is_dir():
        raise CheckpointError(f"{path}: no such file or folder")
    for name in _IN_FOLDER:
        if (path / name).is_file():
            return path / name
    raise CheckpointError(f"{path}: the folder holds neither {' nor '.join(_IN_FOLDER)}")


def _read(file: Path) -> Any:
    """Return what a file holds, without running code from it."""
    try:
        if file.suffix == ".safetensors":
            return safetensors.torch.load_file(file)
        # facebookresearch/mae's training checkpoints hold their arguments: a bare container
        with torch.serialization.safe_globals([argparse.Namespace]):
            return torch.load(file, map_location="cpu", weights_only=True)
    except pickle.UnpicklingError as error:
        raise CheckpointError(
            f"{file} is no checkpoint of tensors and plain values alone. What else it holds could "
            f"run code, so it was not loaded; save only its state dict, best as safetensors."
        ) from error
    except (OSError, RuntimeError, EOFError, ValueError, KeyError, SafetensorError) as error:
        raise CheckpointError(f"{file} cannot be read, it may be incomplete: {error!r}") from error


def _flatten(value: Any, prefix: str = "") -> Iterator[tuple[str, Tensor]]:
    """All tensors in nested dicts, named by their dotted paths."""
    if isinstance(value, Tensor):
        yield prefix.removesuffix("."), value
    elif isinstance(value, Mapping):
        for key, inner in value.items():
            yield from _flatten(inner, f"{prefix}{key}.")


def _encoder_part(tensors: dict[str, Tensor], file: Path) -> dict[str, Tensor]:
    """Return the tensors of the one encoder in a file, without their common prefix."""
    prefixes = {
        re.sub(r"(embeddings\.)?cls_token$", "", name)
        for name in tensors
        if re.search(r"(^|\.)cls_token$", name)
    }
    if not prefixes:
        some = ", ".join(list(tensors)[:3]) or "none"
        raise CheckpointError(
            f"{file} holds no ViT encoder: none of its {len(tensors)} tensors is a class token "
            f"(the first ones: {some})"
        )
    if len(prefixes) > 1:
        raise CheckpointError(
            f"{file} holds more than one encoder, under {', '.join(sorted(prefixes))}; "
            f"save the one that is meant by itself"
        )
    prefix = prefixes.pop()
    inside = {n.removeprefix(prefix): t for n, t in tensors.items() if n.startswith(prefix)}
    return {name: tensor for name, tensor in inside.items() if not name.startswith(_OTHER_PARTS)}


def _rename(tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    """Return tensors under our names, Hugging Face's query, key and value joined."""
    if "embeddings.cls_token" not in tensors:
        return tensors
    renamed = {}
    for name, tensor in tensors.items():
        for pattern, ours in _HUGGING_FACE:
            name = re.sub(pattern, ours, name)
        renamed[name] = tensor
    for query in [name for name in renamed if ".attn.query." in name]:
        names = [query.replace(".query.", f".{part}.") for part in ("query", "key", "value")]
        if all(name in renamed for name in names):
            parts = [renamed.pop(name) for name in names]
            renamed[query.replace(".query.", ".qkv.")] = torch.cat(parts)
    return renamed


def _sizes(tensors: dict[str, Tensor], file: Path) -> dict[str, Any]:
    """Return arguments of `Encoder` that the tensors' shapes show, image size and heads apart."""
    shapes = {}
    for name, meaning in (
        ("cls_token", "[1, 1, dim]"),
        ("patch_embed.proj.weight", "[dim, channels, patch, patch]"),
        ("pos_embed", "[1, patches, dim] or [1, 1 + patches, dim]"),
    ):
        if name not in tensors:
            raise CheckpointError(f"{file} lacks {name}, expected as {meaning}")
        shapes[name] = list(tensors[name].shape)
        if len(shapes[name]) != meaning.split(" or ")[0].count(",") + 1:
            raise CheckpointError(f"{file}: {name} is {shapes[name]}, expected {meaning}")
    blocks = [int(found[1]) for n in tensors if (found := re.match(r"blocks\.(\d+)\.", n))]
    dim = shapes["cls_token"][-1]
    if shapes["pos_embed"][-1] != dim:
        raise CheckpointError(f"{file}: pos_embed is {shapes['pos_embed']}, expected dim {dim}")
    first = [
        tensors[n] for n in (f"blocks.0.mlp.fc1.{p}" for p in ("bias", "weight")) if n in tensors
    ]
    hidden = len(first[0]) if first else 4 * dim
    ratio = hidden / dim
    if int(dim * ratio) < hidden:  # rounding of the division
        ratio = math.nextafter(ratio, math.inf)
    return {
        "dim": dim,
        "depth": max(blocks, default=0) + 1,
        "patch_size": shapes["patch_embed.proj.weight"][-1],
        "in_chans": shapes["patch_embed.proj.weight"][1],
        "mlp_ratio": ratio,
    }


def _compare(
    sizes: Mapping[str, Any], heads: int | None, expected: Mapping[str, int], file: Path
) -> None:
    """CheckpointError that names the sizes in which a file differs from what is expected."""
    found = {**sizes, "mlp width": int(sizes["dim"] * sizes["mlp_ratio"])}
    if heads is not None:
        found["heads"] = heads
    other = [name for name, size in expected.items() if found.get(name, size) != size]
    if other:
        raise CheckpointError(
            f"{file} holds an encoder of {', '.join(f'{n} {found[n]}' for n in other)}, expected "
            f"{', '.join(f'{n} {expected[n]}' for n in other)}; change the model's settings, or "
            f"take other weights"
        )


def _config(file: Path) -> dict[str, Any]:
    """`heads` and `image_size` by the JSON file beside the weights, None where unknown.

    Reads the `config.json` of Hugging Face, timm and `save_encoder`, and a stage's `encoder.json`.
    """
    names = (_CONFIG, "encoder.json")
    config = next((c for name in names if (c := file.parent / name).is_file()), None)
    if config is None:
        return {"heads": None, "image_size": None}
    try:
        values = json.loads(config.read_text(encoding="utf-8"))
        sizes = values.get("model_args", {})
        return {
            "heads": values.get("num_attention_heads")
            or sizes.get("num_heads")
            or values.get("heads"),
            "image_size": values.get("image_size") or sizes.get("img_size"),
        }
    except (ValueError, AttributeError) as error:
        raise CheckpointError(f"{config} cannot be read: {error!r}") from error


def _known_heads(dim: int, depth: int) -> int:
    known = {(width, blocks): heads for width, blocks, heads in SIZES.values()}
    return known.get((dim, depth)) or max(1, dim // 64)


def _grid(
    image_size: int | Sequence[int] | None, patch_size: int, file: Path
) -> tuple[int, int] | None:
    """(rows, columns) of patches of an image size."""
    if image_size is None:
        return None
    height, width = (image_size, image_size) if isinstance(image_size, int) else image_size
    if height % patch_size or width % patch_size:
        raise CheckpointError(
            f"{file}: its patches of {patch_size} do not tile images of {height}x{width}"
        )
    return height // patch_size, width // patch_size


def _place_positions(
    tensors: dict[str, Tensor],
    stored: tuple[int, int] | None,
    wanted: tuple[int, int] | None,
    file: Path,
) -> tuple[int, int]:
    """Bring positions to [1, N, D] for the grid wanted, in place; returns that grid.

    They are for the grid `stored` where that is known and fits, else for the one wanted where
    that fits, else for a square.
    """
    positions = tensors["pos_embed"].to(torch.float32)
    rows, dim = positions.shape[1:]
    squares = [(math.isqrt(count), math.isqrt(count)) for count in (rows, rows - 1)]
    stored = next((g for g in [stored, wanted, *squares] if g and _fits(g, rows)), None)
    if stored is None:
        raise CheckpointError(
            f"{file}: pos_embed has {rows} rows, which is no square grid; give image_size"
        )
    if rows > stored[0] * stored[1]:
        tensors["cls_token"] = tensors["cls_token"] + positions[:, :1]
        positions = positions[:, 1:]
    grid = wanted or stored
    if grid != stored:
        if dim % 4 == 0 and torch.allclose(positions[0], sincos_positions(stored, dim), atol=1e-4):
            positions = sincos_positions(grid, dim)[None]
        else:
            positions = resample_abs_pos_embed(positions, list(grid), list(stored), 0)
    tensors["pos_embed"] = positions
    return grid


def _fits(grid: tuple[int, int], rows: int) -> bool:
    return rows - grid[0] * grid[1] in (0, 1)


def _check(
    tensors: Mapping[str, Tensor], expected: Mapping[str, Tensor], sizes: Any, file: Path
) -> None:
    """CheckpointError that names missing, unexpected and misshaped tensors."""
    shape = {name: list(value.shape) for name, value in expected.items()}
    faults = [f"{name} is missing, expected {shape[name]}" for name in shape if name not in tensors]
    faults += [f"{name} is not expected" for name in tensors if name not in shape]
    faults += [
        f"{name} is {list(value.shape)}, expected {shape[name]}"
        for name, value in tensors.items()
        if name in shape and list(value.shape) != shape[name]
    ]
    if not faults:
        return
    more = f"; and {len(faults) - 8} more" if len(faults) > 8 else ""
    raise CheckpointError(
        f"{file} does not fit a ViT encoder of dim {sizes['dim']}, depth {sizes['depth']} and "
        f"patch size {sizes['patch_size']}: {'; '.join(faults[:8])}{more}"
    )
