"""Checkpoints changed at random: the numbers of the sound file, or the fault named."""

from __future__ import annotations

import argparse
import json
import os
import random
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import safetensors.torch
import torch
from soak_helpers import cases, draw, limited, told, unchanged

from maect.models import Encoder
from maect.weights import CheckpointError, load_encoder, save_encoder

State = dict[str, torch.Tensor]
#: what may change a number without a word: it makes another, finite network of the same shapes
LEGITIMATE = {"flipped byte", "half precision"}


def small() -> Encoder:
    made = Encoder(8, 4, 1, dim=16, depth=2, heads=2, mlp_ratio=2.0)
    draws = np.random.default_rng(0)
    with torch.no_grad():
        for name, value in made.named_parameters():
            value.copy_(torch.from_numpy(0.3 * draws.standard_normal(value.shape)))
            if "norm" in name and name.endswith("weight"):
                value.add_(1.0)
    return made


def with_a_row(encoder: Encoder) -> State:
    state = dict(encoder.state_dict())
    zero = torch.zeros_like(state["pos_embed"][:, :1])
    return state | {"pos_embed": torch.cat([zero, state["pos_embed"]], 1)}


def timm(folder: Path) -> Path:
    save_encoder(small(), folder, mean=[0.3055], std=[0.3758])
    return folder / "model.safetensors"


def mae(folder: Path) -> Path:
    decoder = {"decoder_embed.weight": torch.ones(4, 16), "mask_token": torch.ones(1, 1, 4)}
    content = {"model": with_a_row(small()) | decoder, "args": argparse.Namespace(lr=1.0)}
    torch.save(content, folder / "checkpoint.pth")
    return folder / "checkpoint.pth"


def dino(folder: Path) -> Path:
    teacher = {f"module.backbone.{name}": value for name, value in with_a_row(small()).items()}
    torch.save({"teacher": teacher | {"head.mlp.weight": torch.ones(3, 3)}}, folder / "dino.pth")
    return folder / "dino.pth"


def own(folder: Path) -> Path:
    encoder = small()
    safetensors.torch.save_file(encoder.state_dict(), folder / "encoder.safetensors")
    names = ("image_size", "patch_size", "in_chans", "dim", "depth", "heads", "mlp_ratio")
    document = {name: getattr(encoder, name) for name in names}
    document |= {"mean": [0.3055], "std": [0.3758], "crop_pct": 1.0, "pool": "mean"}
    (folder / "encoder.json").write_text(json.dumps(document))
    return folder / "encoder.safetensors"


FORMS: list[Callable[[Path], Path]] = [timm, mae, dino, own]


# ------------------------------------------------------------------------------- mutations


def flipped_byte(file: Path, choose: random.Random) -> None:
    data = bytearray(file.read_bytes())
    # headers are as likely as numbers
    places = [choose.randrange(len(data)), choose.randrange(min(len(data), 1500))]
    data[choose.choice(places)] ^= 1 << choose.randrange(8)
    file.write_bytes(data)


def truncated(file: Path, choose: random.Random) -> None:
    os.truncate(file, choose.randrange(file.stat().st_size))


def changed(file: Path, change: Callable[[State], None]) -> None:
    """Change the tensors of a file's encoder, whatever the dicts around them."""
    if file.suffix == ".safetensors":
        tensors = safetensors.torch.load_file(file)
        change(tensors)
        safetensors.torch.save_file({n: t.contiguous() for n, t in tensors.items()}, file)
        return
    with torch.serialization.safe_globals([argparse.Namespace]):
        content = torch.load(file, weights_only=True)
    change(content["model"] if "model" in content else content["teacher"])
    torch.save(content, file)


def of_a_tensor(change: Callable[[State, str, random.Random], None]) -> Any:
    def mutate(file: Path, choose: random.Random) -> None:
        changed(file, lambda tensors: change(tensors, choose.choice(sorted(tensors)), choose))

    return mutate


def renamed(tensors: State, name: str, choose: random.Random) -> None:
    other = [f"x.{name}", f"{name}.x", name.replace("blocks.1", "blocks.99999999"), "", "é\x1b[2J"]
    tensors[choose.choice(other)] = tensors.pop(name)


def removed(tensors: State, name: str, choose: random.Random) -> None:
    del tensors[name]


def reshaped(tensors: State, name: str, choose: random.Random) -> None:
    value = tensors[name]
    shapes = [value.flatten(), value[None], value[..., :0].clone(), torch.cat([value, value])]
    tensors[name] = choose.choice(shapes)


def retyped(tensors: State, name: str, choose: random.Random) -> None:
    kind = choose.choice([torch.int64, torch.bool, torch.float64, torch.complex64, torch.uint8])
    tensors[name] = tensors[name].to(kind if kind != torch.complex64 else torch.int8)


def halved(tensors: State, name: str, choose: random.Random) -> None:
    kind = choose.choice([torch.float16, torch.bfloat16])
    tensors.update({key: value.to(kind) for key, value in tensors.items()})


def not_finite(tensors: State, name: str, choose: random.Random) -> None:
    value = tensors[name].clone()
    value.view(-1)[choose.randrange(value.numel())] = choose.choice(
        [torch.nan, torch.inf, -torch.inf]
    )
    tensors[name] = value


def added(tensors: State, name: str, choose: random.Random) -> None:
    names = [
        "register_tokens",
        "blocks.0.ls1.gamma",
        "norm_pre.weight",
        "blocks.7.x",
        "a.cls_token",
    ]
    tensors[choose.choice(names)] = torch.ones(1, 1, 16)


def edited_config(file: Path, choose: random.Random) -> None:
    """Change, add or remove a value of the file beside the weights, or make one."""
    beside = next(file.parent.glob("*.json"), file.parent / "config.json")
    document = json.loads(beside.read_text()) if beside.exists() else {}
    junk: list[Any] = [
        None,
        -1,
        0,
        4,
        10**12,
        1.5,
        float("nan"),
        "two",
        [],
        {},
        [[[]]],
        True,
        "cls",
    ]
    keys = [*document, "num_attention_heads", "image_size", "hidden_act", "mean", "model_args"]
    key, part = choose.choice(keys), document
    if isinstance(document.get(key), dict) and document[key] and choose.random() < 0.8:
        part, key = document[key], choose.choice([*document[key]])
    part[key] = choose.choice(junk)
    if choose.random() < 0.2:
        del part[key]
    text = json.dumps(document)
    beside.write_text(text[: choose.randrange(len(text))] if choose.random() < 0.1 else text)


class Touch:
    """Leaves a trace when it is unpickled."""

    def __init__(self, trace: Path) -> None:
        self.trace = trace

    def __reduce__(self) -> Any:
        return os.system, (f"touch {self.trace}",)


def pickled(file: Path, choose: random.Random) -> None:
    content = {"model": with_a_row(small()), "x": Touch(file.parent / "trace")}
    new = choose.choice([True, False])
    file.unlink()
    torch.save(content, file, _use_new_zipfile_serialization=new)


MUTATIONS: dict[str, Callable[[Path, random.Random], None]] = {
    "flipped byte": flipped_byte,
    "truncated": truncated,
    "renamed": of_a_tensor(renamed),
    "removed": of_a_tensor(removed),
    "reshaped": of_a_tensor(reshaped),
    "retyped": of_a_tensor(retyped),
    "half precision": of_a_tensor(halved),
    "not finite": of_a_tensor(not_finite),
    "added": of_a_tensor(added),
    "edited config": edited_config,
    "pickled code": pickled,
}


def evaluated(capsys: pytest.CaptureFixture[str], file: Path) -> dict[str, Any] | None:
    """Return what `bench eval` prints of a checkpoint, None where it names a fault."""
    line = ("eval", "--weights", file, "--data", "digits", "--evaluate", "knn", "--json")
    done = told(capsys, *line)
    assert done.code in (0, 2)
    return json.loads(done.out) if done.code == 0 else None


@pytest.mark.slow
@cases(200)
def test_mutated_checkpoints(case: int, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    choose = draw("checkpoints", case)
    form = choose.choice(FORMS)
    what = choose.choice(sorted(MUTATIONS))
    (tmp_path / "sound").mkdir()
    sound = form(tmp_path / "sound")
    expected = evaluated(capsys, sound)
    assert expected is not None
    shutil.copytree(tmp_path / "sound", tmp_path / "mutated")
    file = tmp_path / "mutated" / sound.name
    MUTATIONS[what](file, choose)
    with unchanged(tmp_path):
        found = evaluated(capsys, file)
        with limited(what):
            try:
                load_encoder(file)
                assert found is not None
            except CheckpointError:
                assert found is None
    if found is None or what in LEGITIMATE:
        return
    values = [result["evaluations"]["knn"]["metrics"] for result in (found, expected)]
    said = [
        (result["encoder"], result["images"], result["weights"]["notes"])
        for result in (found, expected)
    ]
    assert values[0] == values[1] or said[0] != said[1], f"{form.__name__}, {what}"
