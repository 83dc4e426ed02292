"""Rows that start from released weights: every format, trained on and evaluated, and bad files."""

from __future__ import annotations

import argparse
import json
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import safetensors.torch
import timm
import torch
from bench_helpers import SMOKE, Bench, completed, run_bench
from torch import Tensor

from bench.plan.planner import make_plan
from bench.run.worker import StageFailed, run_stage
from bench.store.store import Store
from bench.suite.load import load_suite
from maect.models import build_encoder
from maect.weights import load_encoder

State = dict[str, Tensor]


def weights(**sizes: int) -> State:
    """An encoder for smoke.yaml, as the official release names its tensors."""
    given = {"image_size": 8, "patch_size": 2, "in_chans": 1, "dim": 32, "depth": 2, "heads": 2}
    encoder = build_encoder("custom", mlp_ratio=2.0, seed=7, **(given | sizes))  # type: ignore
    return dict(encoder.state_dict())


def with_row(state: State) -> State:
    """Positions with a zero row for the class token."""
    row = torch.zeros_like(state["pos_embed"][:, :1])
    return {**state, "pos_embed": torch.cat([row, state["pos_embed"]], dim=1)}


def hugging_face(state: State) -> State:
    """ViT-MAE's names, query, key and value apart."""
    found = {}
    for name, tensor in with_row(state).items():
        name = re.sub(r"^blocks\.(\d+)\.", r"vit.encoder.layer.\1.", name)
        for ours, theirs in (
            ("cls_token", "vit.embeddings.cls_token"),
            ("pos_embed", "vit.embeddings.position_embeddings"),
            ("patch_embed.proj", "vit.embeddings.patch_embeddings.projection"),
            (".norm1.", ".layernorm_before."),
            (".norm2.", ".layernorm_after."),
            (".attn.proj.", ".attention.output.dense."),
            (".mlp.fc1.", ".intermediate.dense."),
            (".mlp.fc2.", ".output.dense."),
        ):
            name = name.replace(ours, theirs)
        if name.startswith("norm."):
            name = f"vit.layernorm.{name.removeprefix('norm.')}"
        if ".attn.qkv." in name:
            for which, part in zip(("query", "key", "value"), tensor.chunk(3), strict=True):
                changed = name.replace(".attn.qkv.", f".attention.attention.{which}.")
                found[changed] = part.clone()
        else:
            found[name] = tensor
    return found


def write(folder: Path) -> dict[str, Path]:
    """The same encoder as a file of each origin."""
    state = weights()
    files = {name: folder / f"{name}.pth" for name in ("official", "facebookresearch")}
    torch.save(state, files["official"])
    training = {
        "model": {**with_row(state), "mask_token": torch.zeros(1, 1, 16),
                  "decoder_embed.weight": torch.zeros(16, 32)},
        "args": argparse.Namespace(model="mae_vit"), "epoch": 799,
    }  # fmt: skip
    torch.save(training, files["facebookresearch"])
    for name, tensors in (("timm", with_row(state)), ("hugging_face", hugging_face(state))):
        files[name] = folder / f"{name}.safetensors"
        safetensors.torch.save_file(tensors, files[name])
    return files


def suite(folder: Path, rows: dict[str, str]) -> Path:
    """smoke.yaml with other rows."""
    text = SMOKE.read_text()
    variants = "\n".join(f"  {name}: {settings}" for name, settings in rows.items())
    text = re.sub(r"variants:\n.*?\n\n", f"variants:\n{variants}\n\n", text, flags=re.DOTALL)
    path = folder / "released.yaml"
    path.write_text(text.replace("    baseline: MAE\n", ""))
    return path


def test_rows_from_released_weights_run_through_the_command_line(tmp_path: Path):
    files = write(tmp_path)
    rows = {name: f"{{init: '{file}'}}" for name, file in files.items()}
    rows["tuned"] = f"{{init: '{files['timm']}', stages: [head, tune], augment: min}}"
    path, store = suite(tmp_path, rows), tmp_path / "store"
    done = run_bench("run", path, "--store", store, "--seeds", "1", "--workers", "0",
                     "--set", "head.steps=2", "--set", "tune.steps=2")  # fmt: skip
    assert done.code == 0, done.err
    records = list(completed(store).values())
    features = {r["name"]: r for r in records if r["kind"] == "features"}
    assert len(features) == 5
    whole = [r["files"]["features.safetensors"]["sha256"] for n, r in features.items()]
    assert sorted(map(whole.count, whole)) == [1, 4, 4, 4, 4]  # the origin makes no difference
    values = {r["name"]: r["metrics"][0]["value"] for r in records if r["kind"] == "knn"}
    assert len(values) == 5 and all(value > 50 for value in values.values())
    again = run_bench("run", path, "--store", store, "--seeds", "1",
                      "--set", "head.steps=2", "--set", "tune.steps=2")  # fmt: skip
    assert again.code == 0
    assert "0 to run" in again.out


def without(name: str) -> Callable[[State], State]:
    return lambda state: {n: t for n, t in state.items() if n != name}


FAULTS: dict[str, tuple[Callable[[State], State], str]] = {
    "missing": (without("blocks.1.norm2.bias"), 'Missing key(s) in state_dict: "blocks.1.norm2.b'),
    "extra": (
        lambda state: {**state, "blocks.0.lora.gamma": torch.ones(32)},
        'Unexpected key(s) in state_dict: "blocks.0.lora.gamma"',
    ),
    "misshaped": (
        lambda state: {**state, "blocks.0.attn.qkv.weight": torch.ones(90, 32)},
        "size mismatch for blocks.0.attn.qkv.weight",
    ),
    "other-size": (
        lambda state: weights(dim=48, depth=3),
        "holds an encoder of dim 48, depth 3, mlp width 96, expected dim 32, depth 2, mlp width 64",
    ),
    "other-patch": (lambda state: weights(patch_size=4), "of patch_size 4, expected patch_size 2"),
    "other-channels": (lambda state: weights(in_chans=3), "of in_chans 3, expected in_chans 1"),
    "no-encoder": (lambda state: {"fc.weight": torch.ones(2, 2)}, "holds no ViT encoder"),
}


@pytest.mark.parametrize("fault", [*FAULTS, "other-heads", "no-checkpoint"])
def test_weights_that_do_not_fit_end_the_run_before_anything_trains(
    fault: str, tmp_path: Path, bench: Bench
):
    file = tmp_path / "weights.pth"
    if fault == "other-heads":  # stated beside the weights
        file, message = write(tmp_path)["hugging_face"], "of heads 4, expected heads 2"
        (tmp_path / "config.json").write_text(json.dumps({"num_attention_heads": 4}))
    elif fault == "no-checkpoint":
        file.write_bytes(b"no weights")
        message = "is no weights file"
    else:
        change, message = FAULTS[fault]
        torch.save(change(weights()), file)
    row = f"{{init: '{file}', stages: [head, tune], augment: min}}"
    path = suite(tmp_path, {"MAE": "{stages: [mae]}", "tuned": row})
    done = bench("run", path, "--store", tmp_path / "store")
    assert done.code == 2
    assert done.err.startswith(f"error: {path}: ")
    assert str(file) in done.err and message in done.err
    assert done.err.count("\n") == 1
    assert not list((tmp_path / "store" / "stages").glob("*"))


def dinov2(folder: Path) -> Path:
    """Weights as DINOv2's authors write them: registers, LayerScale, learned positions."""
    args = {"img_size": 8, "patch_size": 2, "in_chans": 1, "embed_dim": 32, "depth": 2}
    made: Any = timm.create_model(
        "vit_small_patch14_reg4_dinov2", num_heads=2, mlp_ratio=2.0, num_classes=0, **args
    )
    state = {name: 0.1 * torch.randn_like(tensor) for name, tensor in made.state_dict().items()}
    state["register_tokens"] = state.pop("reg_token")
    torch.save(with_row(state), folder / "dinov2.pth")
    return folder / "dinov2.pth"


def test_a_row_of_other_blocks_is_tuned_and_evaluated(tmp_path: Path):
    file = dinov2(tmp_path)
    path = suite(tmp_path, {"tuned": f"{{init: '{file}', stages: [head, tune], augment: min}}"})
    store = Store(tmp_path / "store")
    store.create()
    sets = ["head.steps=2", "tune.steps=2", "tune.encoder_ema=0.9"]
    row = make_plan(load_suite(path, seeds=1, sets=sets), store).rows[0]
    for stage in (*row.chain, row.features, row.evaluations["knn"]):
        run_stage(stage, store, "test", lambda event: None)
    before = load_encoder(file, heads=2)
    tuned = [load_encoder(store.fetch(s.key) / "encoder.safetensors") for s in row.chain]
    assert type(tuned[-1]) is type(before)
    changed = {
        name.partition(".")[2].partition(".")[0] if "blocks" in name else name
        for name, tensor in tuned[-1].state_dict().items()
        if not torch.equal(tensor, before.state_dict()[name])
    }
    assert changed == {"1", "norm.weight", "norm.bias"}  # half of two blocks is frozen
    (record,) = [r for r in completed(tmp_path / "store").values() if r["kind"] == "knn"]
    assert record["metrics"][0]["value"] > 20


@pytest.mark.parametrize("stages", ["[mae]", "[]"])
def test_what_other_blocks_cannot_do_is_told_before_anything_trains(
    stages: str, tmp_path: Path, bench: Bench
):
    file = dinov2(tmp_path)
    settings = "" if stages == "[mae]" else ", set: {model: {depth: 3}}"
    path = suite(tmp_path, {"row": f"{{init: '{file}', stages: {stages}{settings}}}"})
    done = bench("run", path, "--store", tmp_path / "store")
    told = "no plain ViT encoder, and only such ones learn from masked" if stages == "[mae]" else (
        "holds an encoder of depth 2, expected depth 3"
    )  # fmt: skip
    assert done.code == 2 and told in done.err


def test_weights_changed_after_planning_are_refused(tmp_path: Path):
    files = write(tmp_path)
    path = suite(tmp_path, {"released": f"{{init: '{files['official']}'}}"})
    store = Store(tmp_path / "store")
    store.create()
    plan = make_plan(load_suite(path, seeds=1), store)
    torch.save(weights() | {"cls_token": torch.ones(1, 1, 32)}, files["official"])
    with pytest.raises(StageFailed, match="its checksum differs"):
        run_stage(plan.rows[0].features, store, "test", lambda event: None)
