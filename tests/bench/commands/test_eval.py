"""`bench eval`: checkpoints of each format, without a suite."""

from __future__ import annotations

import argparse
import json
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from bench_helpers import Bench
from PIL import Image
from safetensors.numpy import load_file
from safetensors.torch import save_file
from torch import Tensor

from maect import datasets, evals
from maect.augment import evaluation_transform
from maect.models import Encoder, pool
from maect.settings import DataSettings
from maect.weights import save_encoder

NAMES = (
    (r"^(cls_token|patch_embed)", r"vit.embeddings.\1"),
    (r"^pos_embed", "vit.embeddings.position_embeddings"),
    (r"patch_embed\.proj", "patch_embeddings.projection"),
    (r"^norm\.", "vit.layernorm."),
    (r"^blocks\.", "vit.encoder.layer."),
    (r"norm1", "layernorm_before"),
    (r"norm2", "layernorm_after"),
    (r"attn\.proj", "attention.output.dense"),
    (r"mlp\.fc1", "intermediate.dense"),
    (r"mlp\.fc2", "output.dense"),
)


@pytest.fixture
def empty_data(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A data directory of the test's own."""
    monkeypatch.setenv("MAECT_DATA", str(tmp_path / "data"))


@pytest.fixture(scope="module")
def encoder() -> Encoder:
    made = Encoder(8, 2, 1, dim=32, depth=2, heads=2, mlp_ratio=2.0)
    draws = np.random.default_rng(0)
    with torch.no_grad():
        for name, value in made.named_parameters():
            value.copy_(torch.from_numpy(0.2 * draws.standard_normal(value.shape)))
            if "norm" in name and name.endswith("weight"):
                value.add_(1.0)
    return made


def with_a_row(encoder: Encoder) -> dict[str, Tensor]:
    state = dict(encoder.state_dict())
    zero = torch.zeros_like(state["pos_embed"][:, :1])
    return state | {"pos_embed": torch.cat([zero, state["pos_embed"]], 1)}


def maect_official(encoder: Encoder, folder: Path) -> Path:
    torch.save({"state_dict": dict(encoder.state_dict())}, folder / "encoder.th")
    return folder / "encoder.th"


def facebook(encoder: Encoder, folder: Path) -> Path:
    content = {"model": with_a_row(encoder), "args": argparse.Namespace(lr=1.0), "epoch": 3}
    torch.save(content, folder / "checkpoint.pth")
    return folder / "checkpoint.pth"


def timm(encoder: Encoder, folder: Path) -> Path:
    save_encoder(encoder, folder)
    return folder


def hugging_face(encoder: Encoder, folder: Path) -> Path:
    tensors = {}
    for name, value in with_a_row(encoder).items():
        for ours, theirs in NAMES:
            name = re.sub(ours, theirs, name)
        name = name.replace("embeddings.patch_embed.", "embeddings.")
        if ".attn.qkv." in name:
            for part, rows in zip(("query", "key", "value"), value.chunk(3), strict=True):
                own = name.replace(".attn.qkv.", f".attention.attention.{part}.")
                tensors[own] = rows.clone()
        else:
            tensors[name.replace("embed.proj", "embeddings.projection")] = value
    save_file(tensors, folder / "model.safetensors")
    config = {"num_attention_heads": 2, "image_size": 8, "model_type": "vit_mae"}
    (folder / "config.json").write_text(json.dumps(config))
    return folder / "model.safetensors"


def evaluated(bench: Bench, options: str) -> dict[str, Any]:
    done = bench("eval", "--json", *options.split())
    assert done.code == 0, done
    return json.loads(done.out)


@pytest.mark.parametrize("form", [maect_official, facebook, timm, hugging_face])
def test_a_checkpoint_of_each_format(
    form: Callable[[Encoder, Path], Path], encoder: Encoder, bench: Bench, tmp_path: Path
) -> None:
    weights = form(encoder, tmp_path)
    kept = tmp_path / "predictions.safetensors"
    options = f"--weights {weights} --data digits --evaluate knn --heads 2 --predictions {kept}"
    found = evaluated(bench, options)
    sizes = {"image_size": [8, 8], "patch_size": 2, "in_chans": 1}
    assert found["encoder"] == sizes | {"dim": 32, "depth": 2, "heads": 2}
    values = {m["name"]: m["value"] for m in found["evaluations"]["knn"]["metrics"]}
    x, y = {}, {}
    for name in ("train", "test"):
        split = datasets.load(DataSettings(name="digits", image_size=8), None, name)
        images = evaluation_transform(
            split.batch(np.arange(len(split))), image_size=8, mean=split.mean, std=split.std
        )
        with torch.inference_mode():
            x[name], y[name] = pool(encoder(images), "mean"), split.labels
    right = evals.knn(x["train"], y["train"], x["test"], y["test"], k=[10, 20])
    for k, share in right.items():
        assert values[f"accuracy_k{k}"] == pytest.approx(100 * share, abs=0.41)
    predictions = load_file(kept)
    own = {key[4:]: array for key, array in predictions.items() if key.startswith("knn.")}
    assert evals.get("knn").derive(own, predictions["labels"]) == values


def test_settings_tokens_and_text(encoder: Encoder, bench: Bench, tmp_path: Path) -> None:
    options = f"--weights {timm(encoder, tmp_path)} --data digits --block [0,1] --pool both"
    options += " --evaluate probe,low_shot --set probe.epochs=1 --set low_shot.budgets=['1']"
    found = evaluated(bench, options)["evaluations"]
    assert found["probe"]["protocol"]["epochs"] == 1
    assert found["probe"]["protocol"]["tokens"] == {"block": [0, 1], "pool": "both"}
    names = {metric["name"] for metric in found["low_shot"]["metrics"]}
    assert names == {"accuracy_1_block0", "accuracy_1_block1"}
    told = bench("eval", *options.split()).out
    assert "ViT, dim 32, depth 2, 2 heads, patch 2, image 8x8" in told
    assert "1-shot, block 1, class token and mean" in told


def test_a_folder_of_images(bench: Bench, tmp_path: Path, empty_data: None) -> None:
    draws = np.random.default_rng(0)
    for split, count in (("train", 30), ("val", 6)):
        for shade, label in ((0, "dark"), (128, "light")):
            place = tmp_path / "images" / split / label
            place.mkdir(parents=True)
            for number in range(count):
                pixels = shade + draws.integers(0, 128, (20, 24, 3))
                Image.fromarray(pixels.astype(np.uint8)).save(place / f"{number}.png")
    coloured = Encoder(16, 8, 3, dim=32, depth=1, heads=2)
    weights = maect_official(coloured, tmp_path)
    options = f"--weights {weights} --data {tmp_path / 'images'} --heads 2"
    found = evaluated(bench, f"{options} --evaluate knn --set knn.k=[1]")
    assert found["data"]["images"]["test"] == 12
    assert 0 <= found["evaluations"]["knn"]["metrics"][0]["value"] <= 100


@pytest.mark.parametrize(
    ("options", "says"),
    [
        (["--evaluate", "knn,prob"], "there is no evaluation 'prob'; did you mean 'probe'?"),
        (["--set", "probe.epoch=1"], "did you mean 'epochs'?"),
        (["--set", "low_shot.c=1"], "'low_shot' is not evaluated"),
        (["--block", "2"], "block 2 is none of the encoder's 2; write 0 to 1"),
        (["--data", "dgits"], "did you mean 'digits'?"),
        (["--data", "cifar10"], "python -m bench data fetch cifar10"),
        (["--image-size", "7"], "patches of 2 do not tile images of 7x7"),
        (["--weights", "nowhere.pt"], "no such file"),
        (["--evaluate", "knn", "--set", "knn.k=[5000]"], "knn: "),
    ],
)
def test_mistakes_are_told(
    options: list[str], says: str, encoder: Encoder, bench: Bench, tmp_path: Path, empty_data: None
) -> None:
    if "--weights" not in options:
        options = ["--weights", str(timm(encoder, tmp_path)), *options]
    if "--data" not in options:
        options = ["--data", "digits", *options]
    done = bench("eval", *options)
    assert done.code == 2
    assert says in done.err
    assert "Traceback" not in done.err


def test_names_may_have_spaces_between(encoder: Encoder, bench: Bench, tmp_path: Path) -> None:
    options = ["--weights", timm(encoder, tmp_path), "--data", "digits", "--block", "0", "--json"]
    done = bench("eval", *options, "--evaluate", "knn, cluster", "--set", "knn.k=[1]")
    assert done.code == 0, done
    assert [*json.loads(done.out)["evaluations"]] == ["knn", "cluster"]
