"""Encoders in and out: released checkpoints of several origins, and files that timm loads.

Recognised by the names of their tensors: the official MAE-CT release (positions without a row for
the class token), facebookresearch/mae (with a zero row) and timm (with a learned row), all three
with the same names otherwise; MIM-Refiner; DINOv2 and DINOv3; Hugging Face's ViT-MAE, ViT, DINOv2
and DINOv3. Tensors may lie in nested dicts, under a prefix and in wrappers of modules; blocks may
be cut into DINOv2's chunks. A plain ViT becomes an `Encoder`, whose LayerNorm's eps is 1e-6, with
which all of them were trained (Hugging Face's configuration of ViT-MAE says 1e-12); others, and
what names an architecture of timm, become timm's own network (`maect.timm_encoders`).

A file is data from a stranger: no code from it is ever run, and no memory is taken for what it
only claims to hold. Facts that it states twice are compared; what it does not state is assumed,
and told in `Encoder.notes`.
"""

from __future__ import annotations

import argparse
import glob
import itertools
import json
import math
import pickle
import re
import warnings
import zipfile
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import suppress
from pathlib import Path
from typing import Annotated, Any, Literal

import safetensors.torch
import torch
from pydantic import ConfigDict, Field, PositiveInt, TypeAdapter, ValidationError
from timm.layers import resample_abs_pos_embed
from torch import Tensor, nn

from maect import hub, timm_encoders
from maect.files import write_atomic
from maect.finite import first_not_finite
from maect.hub import CheckpointError
from maect.models import Encoder, VisionEncoder, sincos_positions
from maect.settings import SIZES, ModelSettings, Positive
from maect.timm_encoders import TimmEncoder

#: of a stage's two encoders the average comes first: suites evaluate it
_IN_FOLDER = (hub.WEIGHTS, "pytorch_model.bin", "encoder_ema.safetensors", "encoder.safetensors")
#: parts beside the encoder, which its features do not depend on
_OTHER_PARTS = (
    *("mask_token", "embeddings.mask_token", "decoder", "head.", "pooler.", "classifier."),
    "local_cls_norm.",
)
#: where a part of a name begins
_PART = r"(?:(?<=^)|(?<=\.))"
#: modules around a module: of DistributedDataParallel, torch.compile, checkpointing and FSDP
_WRAPPERS = re.compile(
    rf"{_PART}(?:module|_orig_mod|_checkpoint_wrapped_module|_fsdp_wrapped_module)\."
)
#: names inside an encoder -> timm's, in this order: of DINOv2's chunks of blocks, of MIM-Refiner,
#: DINOv2 and DINOv3, and of Hugging Face
_RENAMES = (
    (r"^blocks\.\d+\.(?=\d+\.)", "blocks."),
    (r"^cls_tokens\.tokens$", "cls_token"),
    (r"^pos_embed\.embed$", "pos_embed"),
    (r"^(?:embeddings\.)?(?:register_tokens|storage_tokens)$", "reg_token"),
    (r"^rope_embed\.periods$", "rope.periods"),
    (r"^embeddings\.cls_token$", "cls_token"),
    (r"^embeddings\.position_embeddings$", "pos_embed"),
    (r"^embeddings\.patch_embeddings\.(?:projection\.)?", "patch_embed.proj."),
    (r"^(?:encoder\.|model\.)?layers?\.(?=\d+\.)", "blocks."),
    (r"^(blocks\.\d+)\.layernorm_before\.", r"\1.norm1."),
    (r"^(blocks\.\d+)\.layernorm_after\.", r"\1.norm2."),
    (r"^(blocks\.\d+)\.layer_scale([12])\.lambda1$", r"\1.ls\2.gamma"),
    (r"^(blocks\.\d+)\.attention\.(?:output\.dense|o_proj)\.", r"\1.attn.proj."),
    (r"^(blocks\.\d+)\.attention\.(?:attention\.query|q_proj)\.", r"\1.attn.query."),
    (r"^(blocks\.\d+)\.attention\.(?:attention\.key|k_proj)\.", r"\1.attn.key."),
    (r"^(blocks\.\d+)\.attention\.(?:attention\.value|v_proj)\.", r"\1.attn.value."),
    (r"^(blocks\.\d+)\.(?:intermediate\.dense|mlp\.weights_in|mlp\.w12)\.", r"\1.mlp.fc1."),
    (r"^(blocks\.\d+)\.(?:output\.dense|mlp\.weights_out|mlp\.w3)\.", r"\1.mlp.fc2."),
    (r"^(blocks\.\d+)\.mlp\.(?:gate_proj|w1)\.", r"\1.mlp.fc1_g."),
    (r"^(blocks\.\d+)\.mlp\.(?:up_proj|w2)\.", r"\1.mlp.fc1_x."),
    (r"^(blocks\.\d+)\.mlp\.down_proj\.", r"\1.mlp.fc2."),
    (r"^layernorm\.", "norm."),
)
#: class tokens by whose names an encoder is found, and what stands for them where it has none
_CLASS_TOKEN = re.compile(rf"{_PART}(?:embeddings\.)?(?:cls_token|cls_tokens\.tokens)$")
_CLASSLESS = re.compile(rf"{_PART}patch_embed\.proj\.weight$")
#: names of rotary positions as DINOv3 has them, of its authors, of Hugging Face and of our stages
_ROTARY = ("storage_tokens", "rope_embed.periods", "embeddings.patch_embeddings.weight")
#: all names of a plain ViT
_PLAIN = re.compile(
    r"cls_token|pos_embed|(?:patch_embed\.proj|norm|fc_norm)\.(?:weight|bias)|"
    r"blocks\.\d+\.(?:norm[12]|attn\.qkv|attn\.proj|mlp\.fc[12])\.(?:weight|bias)"
)
_Side = PositiveInt | Annotated[list[PositiveInt], Field(min_length=2, max_length=2)]
_InputSize = Annotated[list[PositiveInt], Field(min_length=3, max_length=3)]
#: what a `config.json` of Hugging Face, timm or `save_encoder`, or a stage's `encoder.json`, may
#: state: our name of the fact, its type, and where it stands; what stands last decides
_FACTS: tuple[tuple[str, Any, tuple[str, ...]], ...] = (
    ("dim", PositiveInt, ("hidden_size", "num_features", "model_args.embed_dim", "dim")),
    ("depth", PositiveInt, ("num_hidden_layers", "model_args.depth", "depth")),
    ("heads", PositiveInt, ("num_attention_heads", "model_args.num_heads", "heads")),
    ("input_size", _InputSize, ("input_size", "pretrained_cfg.input_size")),
    ("in_chans", PositiveInt, ("num_channels", "model_args.in_chans", "in_chans")),
    ("patch_size", _Side, ("model_args.patch_size", "patch_size")),
    ("mlp width", PositiveInt, ("intermediate_size",)),
    ("mlp_ratio", Positive, ("model_args.mlp_ratio", "mlp_ratio")),
    ("activation", str, ("model_args.act_layer", "hidden_act")),
    ("image_size", _Side, ("model_args.img_size", "image_size")),
    ("mean", list[float], ("mean", "pretrained_cfg.mean")),
    ("std", list[Positive], ("std", "pretrained_cfg.std")),
    ("interpolation", str, ("interpolation", "pretrained_cfg.interpolation")),
    ("crop_pct", Positive, ("crop_pct", "pretrained_cfg.crop_pct")),
    ("pool", str, ("model_args.global_pool", "global_pool", "pool")),
)
#: how facts are read: no number from a word, none that is not finite
_STRICT = ConfigDict(strict=True, allow_inf_nan=False)
#: facts that say how images are prepared, and what is read of them
_OF_IMAGES = ("mean", "std", "interpolation", "crop_pct", "pool")
_POOLS = {"token": "cls", "cls": "cls", "avg": "mean", "mean": "mean"}
_FLOATS = (torch.float16, torch.bfloat16, torch.float32, torch.float64)
_IMAGENET = {"mean": [0.485, 0.456, 0.406], "std": [0.229, 0.224, 0.225]}
#: more than any file or image of a ViT has: entries, levels of nesting, blocks, patches
_ENTRIES, _LEVELS, _BLOCKS, _PATCHES = 10**6, 32, 1000, 2**20


def load_encoder(
    path: str | Path,
    *,
    image_size: int | tuple[int, int] | None = None,
    heads: int | None = None,
    expected: Mapping[str, int] | None = None,
) -> Encoder | TimmEncoder:
    """Return the encoder in a checkpoint file, or in a folder that holds one, in float32.

    `timm:NAME` and `hf:OWNER/NAME` are files of a hub (`maect.hub`). Of a stage's folder the
    beginning of its name (of its key) will do. Sizes are read off the tensors. `heads`: where not
    given, from a `config.json` beside the weights, else those of the known size, else one for each
    64 channels. `image_size`: by default the one the positions are for; for another one sin-cos
    positions are computed anew and others resized (bicubic, antialiased). Positions are fixed
    either way; a position of the class token or of registers is added to it. The encoder's `notes`
    say what was assumed. CheckpointError if the file cannot be read, lacks tensors, has others or
    wrong ones, or if what is beside it, or the sizes `expected`, say otherwise.
    """
    file = weights_file(path)
    network = hub.network(file)
    named = isinstance(network.get("architecture"), str)
    tensors, rotary = _encoder_tensors(_read(file), file, classless=named)
    sizes = _sizes(tensors, file, rotary or named)
    beside, stated = _stated(file)
    notes: list[str] = []
    patch, dim, gated = sizes["patch_size"], sizes["dim"], sizes["gated"]
    # an architecture's name decides where a plain ViT has not all that there is
    named &= not all(map(_PLAIN.fullmatch, tensors)) or "cls_token" not in tensors
    extras = {"reg_token", "blocks.0.ls1.gamma"} & tensors.keys()
    as_timm = bool(named or rotary or gated or extras)
    found = {**sizes, "mlp width": int(dim * sizes["mlp_ratio"])}
    comparable = dict(found)
    if gated or named:  # what is stated is of one of three matrices, and of any activation
        del comparable["mlp width"]
    if not named and (rotary or not gated):
        comparable["activation"] = "silu" if gated else "gelu"
    _compare(stated, comparable, beside)
    facts = dict(stated)
    if expected is not None:
        _expect(facts | found, expected, file)
    if not named:
        if "rope.periods" in tensors:  # one for each four channels of a head
            heads = max(1, dim // (4 * tensors["rope.periods"].numel()))
        said = {value for name, value in stated if name == "heads"}
        sizes["heads"] = _heads(heads, said, sizes, beside, notes)
        if dim % sizes["heads"]:
            raise CheckpointError(
                f"{file}: its dim {dim} is no multiple of {sizes['heads']} heads; give heads"
            )
    told, wanted = _grid(facts.get("image_size"), patch, beside), _grid(image_size, patch, file)
    if "pos_embed" in tensors:
        grid = _place_positions(tensors, told, wanted, file, beside, notes)
    else:
        grid = wanted or told or (max(1, 224 // patch),) * 2
        if not (wanted or told):
            notes.append(f"images of {grid[0] * patch} pixels a side assumed: nothing says")
    size = (grid[0] * patch, grid[1] * patch)
    encoder: Encoder | TimmEncoder
    if as_timm:
        encoder = _made_by_timm(tensors, sizes, network if named else {}, rotary, size, file)
        if heads not in (None, encoder.heads):
            raise CheckpointError(f"{file}: {encoder.architecture} has {encoder.heads} heads")
    else:
        names = ("patch_size", "in_chans", "dim", "depth", "heads", "mlp_ratio", "fc_norm")
        with torch.device("meta"):  # no memory is taken for what the shapes claim
            encoder = Encoder(size, **{name: sizes[name] for name in names})
    periods = tensors.pop("rope.periods", None)
    copies = {name: value.to(torch.float32, copy=True) for name, value in tensors.items()}
    try:
        encoder.load_state_dict(copies, assign=True)
    except RuntimeError as error:  # names what is missing, unexpected and of another shape
        what = f"timm's {encoder.architecture}" if as_timm else "a plain ViT encoder"
        reason = " ".join(str(error).split()[6:])
        raise CheckpointError(
            f"{file} does not fit {what} of dim {dim}, depth {sizes['depth']} and patch size "
            f"{patch}: {reason[:1000]}"
        ) from None
    if isinstance(encoder, TimmEncoder) and hasattr(getattr(encoder, "rope", None), "periods"):
        precision = "computed in float32; DINOv3's authors keep them in bfloat16"
        if periods is not None:
            if periods.shape != (dim // encoder.heads // 4,):
                raise CheckpointError(f"{file}: its rotary periods are {list(periods.shape)}")
            precision = f"those of its file, in {str(periods.dtype).removeprefix('torch.')}"
            timm_encoders.set_periods(encoder, periods)
        notes.append(f"the periods of its rotary positions are {precision}")
    bad = first_not_finite(encoder.state_dict())
    if bad is not None:
        raise CheckpointError(f"{file}: {bad} holds NaN or infinite values; take sound weights")
    encoder.stated = {name: facts[name] for name in _OF_IMAGES if name in facts}
    if as_timm and (pool := _POOLS.get(getattr(encoder, "global_pool", ""))) and named:
        encoder.stated.setdefault("pool", pool)
    if encoder.pools == ("mean",):
        classifier = not isinstance(encoder.fc_norm, nn.Identity)
        notes.append(
            "a classifier fine-tuned on the mean of patches: fc_norm follows the pooling"
            if classifier
            else "it has no class token: the mean of patches is read, no attention pools them"
        )
        encoder.stated["pool"] = "mean"
    encoder.notes = notes
    return encoder


def load_for(
    path: str | Path,
    model: ModelSettings,
    *,
    image_size: int | tuple[int, int],
    in_chans: int,
    kind: str = "features",
    pool: str | None = None,
) -> Encoder | TimmEncoder:
    """`load_encoder` for a stage of this kind and these settings, whose number of heads it takes.

    `pool`: the features that the stage reads; None where it reads none. CheckpointError also where
    the file's sizes are not the settings', or the stage cannot use the encoder.
    """
    assert model.dim
    expected = {name: getattr(model, name) for name in ("dim", "depth", "heads", "patch_size")}
    expected |= {"in_chans": in_chans, "mlp width": int(model.dim * model.mlp_ratio)}
    encoder = load_encoder(path, image_size=image_size, heads=model.heads, expected=expected)
    if kind == "mae" and isinstance(encoder, TimmEncoder):
        raise CheckpointError(
            f"{path} is no plain ViT encoder, and only such ones learn from masked patches; take "
            f"'mae' out of the stages"
        )
    if kind in ("mae", "head", "tune") and not isinstance(encoder.fc_norm, nn.Identity):
        raise CheckpointError(
            f"{path} is a classifier fine-tuned on the mean of patches (fc_norm), which no "
            f"stage starts from; evaluate it with: python -m bench eval"
        )
    if pool is not None and pool not in encoder.pools:
        raise CheckpointError(f"{path} has no class token to read; set model.pool to mean")
    return encoder


def _made_by_timm(
    tensors: dict[str, Tensor],
    sizes: dict[str, Any],
    network: Mapping[str, Any],
    rotary: bool,
    size: tuple[int, int],
    file: Path,
) -> TimmEncoder:
    """Return timm's network for tensors, which get its names in place; it holds none of them."""
    args = {**network.get("model_args", {})}
    if network:
        architecture = network["architecture"]
        if pooling := [name for name in tensors if name.startswith("attn_pool.")]:
            for name in pooling:  # it reads tokens, as others do not
                del tensors[name]
            token = {"global_pool": "token"}
            args |= token if "cls_token" in tensors else {"global_pool": "avg", "fc_norm": False}
        args |= {"patch_size": sizes["patch_size"], "in_chans": sizes["in_chans"]}
        if "pos_embed" in tensors:
            args |= {"no_embed_class": True}
    else:
        theta = hub.network(file).get("rope_theta")
        architecture, args = timm_encoders.described(tensors, sizes, rotary, theta)
        if rotary:
            timm_encoders.for_eva(tensors, file)
    return timm_encoders.build(architecture, args | {"img_size": size}, sizes, str(file))


def save_encoder(
    encoder: VisionEncoder,
    folder: str | Path,
    *,
    pool: Literal["cls", "mean"] | None = None,
    mean: Sequence[float] | None = None,
    std: Sequence[float] | None = None,
    crop_pct: float | None = None,
) -> None:
    """Write `model.safetensors` and `config.json`, from which timm makes the same model.

    `timm.create_model("local-dir:FOLDER", pretrained=True)` gives tokens by `forward_features`
    and, called, the features that `pool` names; `timm.data.resolve_model_data_config` gives back
    how images were prepared: `mean` and `std` of the pixels, and `crop_pct`, the side of the image
    over the one it is cut from (1: images of the right size, which are not cut). What is not given
    is what the encoder's own file states. Without any statement `pool` is "mean", `crop_pct` that
    of evaluation, and `mean` and `std` are ImageNet's, or 0 and 1 where there are not three
    channels; a warning says so. Positions get a zero row for the class token, as timm expects.
    Raises ValueError for statistics that are not one for each channel.
    """
    assumed = _IMAGENET
    if encoder.in_chans != 3:
        assumed = {"mean": [0.0] * encoder.in_chans, "std": [1.0] * encoder.in_chans}
    given = {"pool": pool, "mean": mean, "std": std, "crop_pct": crop_pct}
    told = {**encoder.stated, **{name: v for name, v in given.items() if v is not None}}
    if missing := [name for name in assumed if name not in told]:
        values = ", ".join(f"{name} {assumed[name]}" for name in missing)
        warnings.warn(f"nothing says how images were normalised; {values} assumed", stacklevel=2)
    told = {"pool": "mean", "interpolation": "bicubic", "crop_pct": 224 / 256, **assumed, **told}
    if told["pool"] not in encoder.pools:
        raise ValueError("its final norm (fc_norm) is of the mean of patches; pool 'mean'")
    for name in assumed:
        told[name] = [float(value) for value in told[name]]
        if len(told[name]) != encoder.in_chans:
            raise ValueError(
                f"{name} {told[name]} for {encoder.in_chans} channel(s); give one each"
            )
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    tensors = {name: value.detach().cpu() for name, value in encoder.state_dict().items()}
    pooling = {"cls": "token", "mean": "avg"}[told["pool"]]
    if isinstance(encoder, TimmEncoder):
        architecture, args = encoder.architecture, {**encoder.model_args, "global_pool": pooling}
    else:
        architecture = "vit_base_patch16_224"
        args = {
            "img_size": list(encoder.image_size),
            "patch_size": encoder.patch_size,
            "in_chans": encoder.in_chans,
            "embed_dim": encoder.dim,
            "depth": encoder.depth,
            "num_heads": encoder.heads,
            "mlp_ratio": encoder.mlp_ratio,
            "global_pool": pooling,
            "fc_norm": not isinstance(encoder.fc_norm, nn.Identity),
        }
        positions = tensors["pos_embed"]
        tensors["pos_embed"] = torch.cat([torch.zeros_like(positions[:, :1]), positions], dim=1)
    tensors = {name: value.contiguous() for name, value in tensors.items()}
    config = {
        "architecture": architecture,
        "num_classes": 0,
        "num_features": encoder.dim,
        "model_args": args,
        "pretrained_cfg": {
            "input_size": [encoder.in_chans, *encoder.image_size],
            "fixed_input_size": True,
            "num_classes": 0,
            "first_conv": "patch_embed.proj",
            "classifier": "head",
            **{name: told[name] for name in ("mean", "std", "interpolation", "crop_pct")},
        },
    }
    write_atomic(folder / hub.WEIGHTS, safetensors.torch.save(tensors, metadata={"format": "pt"}))
    write_atomic(folder / hub.CONFIG, json.dumps(config, indent=2).encode() + b"\n")


# -------------------------------------------------------------------------------- what a file holds


def weights_file(path: str | Path) -> Path:
    """Return the file of weights at a path: a file, or in a folder; CheckpointError if none.

    The beginning of a folder's name will do where it is the only one, as of a stage's key. Also the
    file of a hub that `timm:NAME` or `hf:OWNER/NAME` means.
    """
    if hub.is_name(str(path)):
        return hub.find(str(path))
    path = Path(path).expanduser()
    if len(path.parts) == 1 and not path.exists():
        path = Path("store/stages") / path
    if path.is_file():
        return path
    if path.exists() and not path.is_dir():
        raise CheckpointError(f"{path} is neither a file nor a folder")
    if not path.exists():
        near = [p for p in path.parent.glob(f"{glob.escape(path.name)}*") if p.is_dir()]
        if len(path.name) < 4 or not near:
            raise CheckpointError(f"{path}: no such file or folder")
        if len(near) > 1:
            names = ", ".join(sorted(p.name for p in near)[:3])
            raise CheckpointError(f"{path}: several folders begin so ({names}); give more of it")
        path = near[0]
    path = _artifact(path)
    for name in _IN_FOLDER:
        if (path / name).is_file():
            return path / name
    raise CheckpointError(f"{path}: the folder holds neither {' nor '.join(_IN_FOLDER)}")


def _artifact(folder: Path) -> Path:
    """Return where the newest artifact of a stage lies whose folder of a store this is.

    Of other folders that is the folder itself.
    """
    found = [p for p in folder.glob("attempts/*/artifact") if p.parent.name.isdecimal()]
    for path in sorted(found, key=lambda path: int(path.parent.name), reverse=True):
        with suppress(OSError, ValueError, KeyError, TypeError):
            if json.loads((path.parent / "record.json").read_bytes())["status"] == "complete":
                return path
    return folder


def _read(file: Path) -> Any:
    """Return what a file holds, without running code from it."""
    try:
        size = file.stat().st_size
        with file.open("rb") as opened:
            start = opened.read(64)
        if file.suffix == ".safetensors" or 0 < int.from_bytes(start[:8], "little") < size:
            return safetensors.torch.load_file(file)
        if start.startswith(b"PK"):
            _check_archive(file)
        elif start and not start.startswith(b"\x80"):
            what = "a Git LFS pointer" if b"git-lfs" in start else "something else"
            raise CheckpointError(
                f"{file} is no weights file: it is neither safetensors nor what torch.save writes, "
                f"but {what}"
            )
        # facebookresearch/mae's training checkpoints hold their arguments: a bare container
        with torch.serialization.safe_globals([argparse.Namespace]), warnings.catch_warnings():
            warnings.simplefilter("ignore")
            return torch.load(file, map_location="cpu", weights_only=True)
    except CheckpointError:
        raise
    except pickle.UnpicklingError as error:
        raise CheckpointError(
            f"{file} is no checkpoint of tensors and plain values alone, or is damaged. What else "
            f"it holds could run code, so it was not loaded; save only its state dict, best as "
            f"safetensors."
        ) from error
    except Exception as error:  # what a damaged file makes of its reader is without limit
        reason = str(error).partition("\n")[0][:200] or type(error).__name__
        raise CheckpointError(f"{file} cannot be read, it may be incomplete: {reason}") from error


def _check_archive(file: Path) -> None:
    """Raise ValueError or zipfile's error for an archive that is damaged or unpacks to more.

    torch compresses nothing, and does not look at the checksums (0 where it wrote none).
    """
    with zipfile.ZipFile(file) as archive:
        entries = archive.infolist()
        if sum(entry.file_size for entry in entries) > file.stat().st_size:
            raise ValueError("its archive unpacks to more than the file holds")
        for entry in entries:
            with archive.open(entry) as content:
                while entry.CRC and content.read(2**24):
                    pass


def _flatten(content: Any, file: Path) -> Iterator[tuple[str, Tensor]]:
    """Yield the tensors in nested dicts with their dotted paths without wrappers, in order."""
    waiting, visited = [("", 0, content)], 0
    while waiting:
        name, level, value = waiting.pop()
        visited += 1
        if visited > _ENTRIES or level > _LEVELS:
            raise CheckpointError(f"{file} is no checkpoint: its dicts are nested without end")
        if isinstance(value, Tensor):
            yield _WRAPPERS.sub("", name), value
        elif isinstance(value, Mapping):
            prefix = f"{name}." if name else ""
            inner = [(f"{prefix}{key}", level + 1, one) for key, one in value.items()]
            waiting.extend(reversed(inner))


def _encoder_tensors(content: Any, file: Path, classless: bool) -> tuple[dict[str, Tensor], bool]:
    """Return the tensors of the one encoder in a file by timm's names, and whether its positions
    are rotary as DINOv3's.

    Hugging Face's queries, keys and values are joined. `classless`: it may have no class token.
    """
    named = list(_flatten(content, file))
    for token in (_CLASS_TOKEN, _CLASSLESS) if classless else (_CLASS_TOKEN,):
        prefixes = {name[: at.start()] for name, _ in named if (at := token.search(name))}
        if prefixes:
            break
    else:
        raise CheckpointError(
            f"{file} holds no ViT encoder: none of its {len(named)} tensors is a class token "
            f"(the first ones: {_listed(name for name, _ in named) or 'none'})"
        )
    if len(prefixes) > 1:
        raise CheckpointError(
            f"{file} holds more than one encoder, under {_listed(sorted(prefixes))}; "
            f"save the one that is meant by itself"
        )
    prefix, found, rotary = prefixes.pop(), dict[str, Tensor](), False
    for name, tensor in named:
        ours = name.removeprefix(prefix)
        if not name.startswith(prefix) or ours.startswith(_OTHER_PARTS):
            continue
        rotary |= ours in (*_ROTARY, "rope.periods")
        for pattern, new in _RENAMES:
            ours = re.sub(pattern, new, ours)
        if ours in found:
            raise CheckpointError(f"{file} holds {_listed([ours])} twice")
        if fault := _fault(tensor):
            raise CheckpointError(f"{file}: {_listed([ours])} {fault}")
        found[ours] = tensor
    if found.get("pos_embed", torch.empty(0)).ndim == 4:  # MIM-Refiner's: [1, rows, columns, D]
        found["pos_embed"] = found["pos_embed"].flatten(1, 2)
    if not any(".mlp.fc1_g." in name for name in found):  # of a plain MLP Hugging Face says so, too
        found = {name.replace(".mlp.fc1_x.", ".mlp.fc1."): t for name, t in found.items()}
    for gate in [n for n in found if ".fc1_g." in n and not (rotary or classless)]:
        if (value := gate.replace(".fc1_g.", ".fc1_x.")) in found:  # DINOv2's, in one matrix
            found[gate.replace(".fc1_g.", ".fc1.")] = torch.cat([found.pop(gate), found.pop(value)])
    for query in [name for name in found if ".attn.query." in name]:
        names = [query.replace(".query.", f".{part}.") for part in ("query", "key", "value")]
        if rotary and names[1] not in found and query.endswith("bias"):
            found[names[1]] = torch.zeros_like(found[query])  # DINOv3's keys have none
        if all(name in found for name in names):
            parts = [found.pop(name) for name in names]
            if len({part.shape for part in parts}) > 1:
                raise CheckpointError(f"{file}: {_listed(names)} differ in their shapes")
            found[query.replace(".query.", ".qkv.")] = torch.cat(parts)
    return found, rotary


def _fault(tensor: Tensor) -> str | None:
    """Return why a tensor is none of an encoder's whatever its name, or None."""
    if tensor.layout != torch.strided or tensor.dtype not in _FLOATS:
        return f"is {tensor.dtype} ({tensor.layout}); expected plain numbers with a fraction"
    if not tensor.numel():
        return f"is {list(tensor.shape)}, without any number"
    if tensor.numel() * tensor.element_size() > tensor.untyped_storage().nbytes():
        return f"claims to be {list(tensor.shape)}, more numbers than the file holds"
    return None


def _listed(names: Iterable[str], most: int = 3) -> str:
    """Return the first of some names, cut where they are long."""
    return ", ".join(name[:80] for name in itertools.islice(names, most))


def _sizes(tensors: dict[str, Tensor], file: Path, lenient: bool) -> dict[str, Any]:
    """Return what the tensors' shapes show, image size and heads apart.

    `lenient`: it may lack a class token and positions. `hidden` is the width of a block's first
    matrix over `dim`; `gated` says whether its MLP is a SwiGLU.
    """
    shapes = {}
    for name, meaning in (
        ("cls_token", "[1, 1, dim]"),
        ("patch_embed.proj.weight", "[dim, channels, patch, patch]"),
        ("pos_embed", "[1, patches, dim] or [1, 1 + patches, dim]"),
    ):
        if name not in tensors:
            if lenient and name != "patch_embed.proj.weight":
                continue
            raise CheckpointError(f"{file} lacks {name}, expected as {meaning}")
        shapes[name] = list(tensors[name].shape)
        if len(shapes[name]) != meaning.split(" or ")[0].count(",") + 1:
            raise CheckpointError(f"{file}: {name} is {shapes[name]}, expected {meaning}")
    dim = shapes.get("cls_token", shapes["patch_embed.proj.weight"][:1])[-1]
    if dim % 4:
        raise CheckpointError(f"{file}: its dim {dim} is no multiple of 4, as every ViT's is")
    if "pos_embed" in shapes and shapes["pos_embed"][::2] != [1, dim]:
        raise CheckpointError(f"{file}: pos_embed is {shapes['pos_embed']}, expected dim {dim}")
    blocks = sorted({int(i[1]) for n in tensors if (i := re.match(r"blocks\.(\d{1,9})\.", n))})
    depth = max(blocks, default=0) + 1
    if depth > _BLOCKS:
        raise CheckpointError(f"{file}: a block is numbered {depth - 1}, which no ViT has")
    first = [
        tensors[n]
        for n in (f"blocks.0.mlp.fc1{x}.{p}" for p in ("bias", "weight") for x in ("", "_g"))
        if n in tensors
    ]
    hidden = len(first[0]) if first and first[0].ndim else 4 * dim
    last = tensors.get("blocks.0.mlp.fc2.weight", first[0] if first else torch.empty(0))
    inner = last.shape[1] if last.ndim == 2 else hidden
    gated = "blocks.0.mlp.fc1_g.weight" in tensors or hidden == 2 * inner
    return {
        "dim": dim,
        "depth": depth,
        "patch_size": shapes["patch_embed.proj.weight"][-1],
        "in_chans": shapes["patch_embed.proj.weight"][1],
        # three matrices of a SwiGLU multiply as often as two that are half as wide again
        "mlp_ratio": _ratio(inner * 3 // 2 if gated else hidden, dim),
        "hidden": _ratio(hidden, dim),
        "gated": gated,
        "fc_norm": "fc_norm.weight" in tensors and "norm.weight" not in tensors,
    }


def _ratio(width: int, dim: int) -> float:
    """Return the ratio of which timm makes a width again, whatever the division rounds."""
    ratio = width / dim
    return math.nextafter(ratio, math.inf) if int(dim * ratio) < width else ratio


# ------------------------------------------------------------------------------ what stands beside


def _stated(file: Path) -> tuple[Path, list[tuple[str, Any]]]:
    """Return the JSON file beside the weights, and the `_FACTS` it states; of no file, nothing.

    CheckpointError where it cannot be read.
    """
    beside, content = hub.beside(file)
    place = ""
    try:
        config = {"": content}
        for place in ("model_args", "pretrained_cfg"):
            config[place] = content.get(place) or {}
            if not isinstance(config[place], dict):
                raise ValueError("Input should be an object")
        facts = []
        for name, kind, places in _FACTS:
            fact: TypeAdapter[Any] = TypeAdapter(kind, config=_STRICT)
            for place in places:
                outer, _, inner = place.rpartition(".")
                if (value := config[outer].get(inner)) is not None:
                    facts.append((name, fact.validate_python(value)))
    except ValueError as error:
        told = error.errors()[0]["msg"] if isinstance(error, ValidationError) else error
        raise CheckpointError(f"{beside} cannot be read: {place}: {told}") from error
    return beside, [one for name, value in facts for one in _in_our_words(name, value)]


def _in_our_words(name: str, value: Any) -> list[tuple[str, Any]]:
    """Return a fact as `_compare` and `load_encoder` read it; nothing of an unknown pooling."""
    if name == "input_size":
        return [("in_chans", value[0]), ("image_size", value[1:])]
    if name == "patch_size" and isinstance(value, list) and value[0] == value[1]:
        return [(name, value[0])]
    if name == "pool":
        return [(name, _POOLS[value])] if value in _POOLS else []
    return [(name, value)]


def _compare(stated: Sequence[tuple[str, Any]], found: Mapping[str, Any], beside: Path) -> None:
    """CheckpointError where a file states what the tensors beside it are not."""
    for name, value in stated:
        expected = found.get(name)
        if name == "mlp_ratio":
            value, expected = int(found["dim"] * value), found.get("mlp width")
        elif name in ("mean", "std"):
            name, value, expected = f"channels of {name}", len(value), found["in_chans"]
        if expected is not None and value != expected:
            raise CheckpointError(
                f"{beside} says {name} {value}, the weights beside it have {expected}; it is of "
                f"other weights or of another network, take it away or mend it"
            )


def _expect(found: Mapping[str, Any], expected: Mapping[str, int], file: Path) -> None:
    """CheckpointError that names the sizes in which a file differs from what is expected."""
    other = [name for name, size in expected.items() if found.get(name, size) != size]
    if other:
        raise CheckpointError(
            f"{file} holds an encoder of {', '.join(f'{n} {found[n]}' for n in other)}, expected "
            f"{', '.join(f'{n} {expected[n]}' for n in other)}; change the model's settings, or "
            f"take other weights"
        )


def _heads(
    given: int | None, stated: set[int], sizes: Mapping[str, Any], beside: Path, notes: list[str]
) -> int:
    """Return the number of heads, which no tensor shows; notes what was assumed or differs."""
    dim = sizes["dim"]
    said = " and ".join(map(str, sorted(stated)))
    if given:
        notes += [f"{given} heads as given; {beside.name} says {said}"] if stated - {given} else []
        return given
    if len(stated) > 1:
        raise CheckpointError(f"{beside} says {said} heads; mend it, or give heads")
    if stated:
        return stated.pop()
    known = {(width, blocks): heads for width, blocks, heads in SIZES.values()}
    heads, why = known.get((dim, sizes["depth"])), "as ViTs of this size have"
    if heads is None:
        heads, why = max(1, dim // 64), "one for each 64 channels"
    notes.append(
        f"{heads} heads assumed, {why}: no tensor shows them, and no config.json says them"
    )
    return heads


# ------------------------------------------------------------------------------------ positions


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
    if height * width > _PATCHES * patch_size**2:
        raise CheckpointError(f"{file}: images of {height}x{width} have too many patches")
    return height // patch_size, width // patch_size


def _place_positions(
    tensors: dict[str, Tensor],
    told: tuple[int, int] | None,
    wanted: tuple[int, int] | None,
    file: Path,
    beside: Path,
    notes: list[str],
) -> tuple[int, int]:
    """Bring positions to [1, N, D] for the grid wanted, in place; returns that grid.

    They are for the grid that is told where that fits, else for the one wanted where that fits,
    else for a square.
    """
    positions = tensors["pos_embed"].to(torch.float32)
    rows = positions.shape[1]
    names = [name for name in ("cls_token", "reg_token") if name in tensors]
    counts = [sum(tensors[n].shape[1] for n in names[:many]) for many in range(len(names) + 1)]
    squares = [(math.isqrt(max(0, rows - count)),) * 2 for count in counts]
    grids = [told, wanted, *squares]
    stored = next((g for g in grids if g and rows - g[0] * g[1] in counts), None)
    if stored is None:
        raise CheckpointError(
            f"{file}: pos_embed has {rows} rows, which is no square grid; a config.json beside it "
            f'can say of which images they are: {{"image_size": [height, width]}}'
        )
    if told not in (None, stored):
        notes.append(
            f"{beside.name} says {told[0]}x{told[1]} patches, which its {rows} positions are not: "
            f"{stored[0]}x{stored[1]} taken"
        )
    for name in names[: counts.index(rows - stored[0] * stored[1])]:
        own, positions = positions.tensor_split([tensors[name].shape[1]], dim=1)
        tensors[name] = tensors[name] + own
    grid = wanted or stored
    if grid != stored:
        fixed = _is_sincos(positions[0], stored)
        if fixed:
            positions = sincos_positions(grid, positions.shape[2])[None]
        else:
            positions = resample_abs_pos_embed(positions, list(grid), list(stored), 0)
        notes.append(
            f"made for {stored[0]}x{stored[1]} patches, now {grid[0]}x{grid[1]}: "
            + ("its sin-cos positions are computed anew" if fixed else "its positions are resized")
        )
    tensors["pos_embed"] = positions
    return grid


def _is_sincos(positions: Tensor, grid: tuple[int, int]) -> bool:
    """Return whether positions [N, D] are sin-cos, within the precision that they were kept in.

    Halves may lie in a file of float32: all numbers are halves then.
    """
    halves = [
        t
        for t in (torch.bfloat16, torch.float16)
        if torch.equal(positions.to(t).float(), positions)
    ]
    allowed = max([1e-4, *(torch.finfo(kind).eps for kind in halves)])
    table = sincos_positions(grid, positions.shape[1])
    return torch.allclose(positions, table, rtol=0.0, atol=allowed)
