"""`bench eval`: checkpoints of each format, without a suite."""

from __future__ import annotations

import argparse
import itertools
import json
import re
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import safetensors.torch
import torch
from bench_helpers import SMOKE, Bench
from PIL import Image
from safetensors.numpy import load_file
from safetensors.torch import save_file
from torch import Tensor

from bench.cli import main
from bench.plan.planner import make_plan
from bench.run.worker import run_stage
from bench.store.record import Record
from bench.store.store import Store
from bench.suite.load import load_suite
from maect import datasets, evals
from maect.augment import evaluation_transform
from maect.models import Encoder, pool
from maect.settings import DataSettings, ModelSettings
from maect.weights import CheckpointError, load_encoder, load_for, save_encoder

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
    for k, accuracy in right.items():
        assert values[f"accuracy_k{k}"] == pytest.approx(accuracy, abs=0.41)
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


# ------------------------------------------------------------------------- as a suite does it

#: what makes the evaluations short, in a suite and on the command line alike
SHORT = {
    "probe": {"epochs": 2, "batch_size": 256},
    "probe_restricted": {"epochs": 2, "batch_size": 256},
    "probe_augmented": {"epochs": 1, "batch_size": 256},
    "probe_dinov2": {"epochs": 1, "batch_size": 256},
    "probe_attentive": {"epochs": 1, "batch_size": 256},
    "low_shot_finetune": {"epochs": 1, "budgets": ["1%"]},
    "cluster": {"runs": 2},
}
TOKENS = {
    "knn_by_block": ["--evaluate", "knn", "--block", "all"],
    "knn_both": ["--evaluate", "knn", "--pool", "both"],
    "knn_cls": ["--evaluate", "knn", "--set", "knn.pool=cls"],
}


@pytest.fixture(scope="module")
def row(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, dict[str, Record]]:
    """The folder of a pretrained encoder of smoke.yaml, and the records of all evaluations."""
    root = tmp_path_factory.mktemp("suite")
    suite = (SMOKE.read_text().split("\ntables:")[0]).replace("suite: smoke", "suite: all")
    suite += f"\nprofiles_from: {SMOKE}\nprofiles:\n  tiny:\n    evaluations:\n"
    declared = {name: SHORT.get(name, {}) for name in evals.names()}
    declared |= {"knn_by_block": {"evaluation": "knn", "block": "all"}}
    declared |= {f"knn_{pool}": {"evaluation": "knn", "pool": pool} for pool in ("both", "cls")}
    suite += "".join(f"      {name}: {json.dumps(given)}\n" for name, given in declared.items())
    suite = suite.replace("evaluate: [knn, probe]", f"evaluate: {json.dumps([*declared])}")
    (root / "all.yaml").write_text(suite)
    store = Store(root / "store")
    store.create()
    sets = ["mae.steps=5", "evaluations.probe.epochs=2"]
    plan = make_plan(load_suite(root / "all.yaml", seeds=1, sets=sets), store, only="MAE")
    for stage in plan.stages.values():
        if stage.kind != "gallery":
            run_stage(stage, store, "test", lambda event: None)
    records = {n: store.state(s.key).record for n, s in plan.rows[0].evaluations.items()}
    return store.fetch(plan.rows[0].chain[0].key), records


@pytest.mark.parametrize("name", [*evals.names(), *TOKENS])
def test_eval_and_a_suite_agree(
    name: str, row: tuple[Path, dict[str, Record]], capsys: pytest.CaptureFixture[str]
) -> None:
    """Protocol, fingerprint and numbers; what neither sets has the same default."""
    folder, records = row
    options = TOKENS.get(name, ["--evaluate", name])
    for setting, value in SHORT.get(name, {}).items():
        options = [*options, "--set", f"{name}.{setting}={json.dumps(value)}"]
    assert main(["eval", "--weights", str(folder), "--data", "digits", "--json", *options]) == 0
    found = json.loads(capsys.readouterr().out)
    (result,) = found["evaluations"].values()
    record = records[name]
    assert result["protocol"] == json.loads(json.dumps(record.protocol))
    assert result["protocol_fingerprint"] == record.protocol_fingerprint
    measured = {metric["name"]: metric["value"] for metric in result["metrics"]}
    assert measured == {metric.name: metric.value for metric in record.metrics}


def test_features_are_those_that_the_file_states(
    row: tuple[Path, dict[str, Record]], capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    """The option wins, and what differs or is assumed is told."""
    folder = tmp_path / "encoder"
    shutil.copytree(row[0], folder)
    told = json.loads((folder / "encoder.json").read_text())
    arguments = ["eval", "--weights", str(folder), "--data", "digits", "--evaluate", "knn"]

    def run(*options: str) -> str:
        assert main([*arguments, *options]) == 0
        return capsys.readouterr().out

    assert "mean of patches: the file says nothing" in run()
    values = {pool: re.findall(r"\d+\.\d+ %", run("--pool", pool)) for pool in ("cls", "mean")}
    assert values["cls"] != values["mean"]
    (folder / "encoder.json").write_text(json.dumps(told | {"pool": "cls", "mean": [0.25]}))
    stated = run()
    assert re.findall(r"\d+\.\d+ %", stated) == values["cls"]
    assert "mean [0.3055] is used, its file says [0.25]" in stated
    given = run("--pool", "mean", "--heads", "4")
    assert "pool mean is used, its file says cls" in given
    assert "4 heads as given; encoder.json says 2" in given


@pytest.mark.parametrize(
    ("predictions", "says"),
    [
        ("nowhere/p.safetensors", "no such file or directory"),
        (".", "it is a folder"),
        ("encoder/encoder.safetensors", "is read and would be lost"),
    ],
)
def test_where_predictions_go_is_checked_first(
    predictions: str,
    says: str,
    row: tuple[Path, dict[str, Record]],
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    shutil.copytree(row[0], tmp_path / "encoder")
    monkeypatch.setattr("bench.commands.eval._evaluated", None)  # nothing is computed
    weights = tmp_path / "encoder" / "encoder.safetensors"
    arguments = ["eval", "--weights", weights, "--data", "digits"]
    assert main([*map(str, arguments), "--predictions", str(tmp_path / predictions)]) == 2
    err = capsys.readouterr().err
    assert says in err
    assert "--predictions" in err
    assert "--store" not in err


def test_a_key_cut_short_names_its_encoder(
    row: tuple[Path, dict[str, Record]], monkeypatch: pytest.MonkeyPatch
) -> None:
    artifact, _ = row
    folder, whole = artifact.parents[2], load_encoder(artifact).state_dict()
    monkeypatch.chdir(folder.parents[2])
    for path in (folder.with_name(folder.name[:10]), folder.name[:10], folder.name):
        for name, value in load_encoder(path).state_dict().items():
            assert torch.equal(value, whole[name])
    with pytest.raises(CheckpointError, match="no such file"):
        load_encoder(folder.with_name("zzzzzzzzzz"))
    folder.with_name(f"{folder.name[:10]}other").mkdir()
    with pytest.raises(CheckpointError, match="several folders begin so"):
        load_encoder(folder.name[:10])
    folder.with_name(f"{folder.name[:10]}other").rmdir()


#: of each evaluation that trains a classifier: a rate at which it diverges
DIVERGING = {
    "probe": ["--set", "probe.base_lrs=[3e38]", "--set", "probe.epochs=3"],
    "probe_augmented": [
        *("--set", "probe_augmented.base_lrs=[3e38]"),
        *("--set", "probe_augmented.epochs=3"),
    ],
    "low_shot_finetune": ["--set", "low_shot_finetune.lrs=[1e30]"],
    "probe_dinov2": ["--set", "probe_dinov2.base_lrs=[3e38]", "--set", "probe_dinov2.epochs=3"],
    "probe_attentive": ["--set", "probe_attentive.base_lrs=[1e30]"],
}


@pytest.mark.parametrize(
    ("name", "fault"),
    [
        *itertools.product(evals.names(), ["weights", "features"]),
        *((name, "classifier") for name in DIVERGING),
    ],
)
def test_no_evaluation_takes_what_is_not_finite(
    name: str,
    fault: str,
    row: tuple[Path, dict[str, Record]],
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    shutil.copytree(row[0], tmp_path / "encoder")
    weights = tmp_path / "encoder" / "encoder.safetensors"
    tensors, options = safetensors.torch.load_file(weights), []
    if fault == "weights":
        tensors["blocks.1.mlp.fc1.weight"][3, 2] = torch.nan
    elif fault == "features":  # finite weights that overflow
        tensors["norm.weight"][:] = 3e38
        tensors["norm.bias"][:] = 3e38
        for block in (0, 1):  # before the final norm, too
            tensors[f"blocks.{block}.mlp.fc2.bias"][:] = 3e38
    else:
        options = DIVERGING[name]
    save_file(tensors, weights)
    for setting, value in SHORT.get(name, {}).items():
        if f"{name}.{setting}" not in " ".join(options):
            options = [*options, "--set", f"{name}.{setting}={json.dumps(value)}"]
    arguments = ["eval", "--weights", str(weights), "--data", "digits", "--evaluate", name]
    assert main([*arguments, *options]) == 2
    told = capsys.readouterr()
    assert not told.out
    assert re.search("NaN or infinite|not finite", told.err)


def test_a_classifier_fine_tuned_on_the_mean_of_patches(
    row: tuple[Path, dict[str, Record]], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """facebookresearch/mae's layout: told, evaluated on the mean only, and no stage's start."""
    tensors = safetensors.torch.load_file(row[0] / "encoder.safetensors")
    names = {"norm.weight": "fc_norm.weight", "norm.bias": "fc_norm.bias"}
    model = {names.get(name, name): value for name, value in tensors.items()}
    torch.save({"model": model | {"head.weight": torch.ones(10, 32)}}, tmp_path / "tuned.pth")
    arguments = ["eval", "--weights", str(tmp_path / "tuned.pth"), "--data", "digits", "--heads=2"]
    assert main([*arguments, "--evaluate", "knn"]) == 0
    assert "a classifier fine-tuned on the mean of patches" in capsys.readouterr().out
    assert main([*arguments, "--evaluate", "knn", "--pool", "cls"]) == 2
    assert "of the mean of patches" in capsys.readouterr().err
    settings = ModelSettings(size="custom", patch_size=2, dim=32, depth=2, heads=2, mlp_ratio=2.0)
    with pytest.raises(CheckpointError, match="no stage starts from"):
        load_for(tmp_path / "tuned.pth", settings, image_size=8, in_chans=1, kind="tune")
