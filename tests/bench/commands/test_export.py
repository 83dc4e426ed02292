"""`export --checkpoint`: an encoder of a suite as timm and transformers load it, with a card."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import timm
import torch
import yaml
from bench_helpers import SMOKE, fill_store
from PIL import Image
from safetensors.torch import load_file
from timm.data import create_transform, resolve_model_data_config

from bench.cli import main
from bench.plan.planner import make_plan
from bench.store.store import Store
from bench.suite.load import load_suite
from maect import datasets
from maect.settings import DataSettings

SETS = [f"{stage}.steps=4" for stage in ("mae", "head", "tune")]


@pytest.fixture(scope="module")
def store(tmp_path_factory: pytest.TempPathFactory) -> Store:
    root = tmp_path_factory.mktemp("store")
    return fill_store(root, only="MAE-CT", sets=SETS)


def export(store: Store, folder: Path, row: str = "MAE-CT", *more: str) -> int:
    chosen = ["export", str(SMOKE), "--seeds", "1", *(f"--set={one}" for one in SETS)]
    chosen += ["--store", str(store.root), "--checkpoint", row, "--to", str(folder), *more]
    return main(chosen)


def test_timm_and_transformers_give_the_features_that_the_table_was_measured_on(
    store: Store, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    assert export(store, tmp_path / "new" / "encoder", "MAE-CT", "--seed", "0") == 0
    folder = tmp_path / "new" / "encoder"
    plan = make_plan(load_suite(SMOKE, seeds=1, sets=SETS), store, only="MAE-CT")
    row = plan.rows[0]
    stored = load_file(store.folder(row.features.key) / "features.safetensors")["test_x"]
    split = datasets.load(DataSettings(name="digits", image_size=8), split="test")

    model = timm.create_model(f"local-dir:{folder}", pretrained=True).eval()
    told = resolve_model_data_config(model)
    assert told["mean"] == [*split.mean] and told["std"] == [*split.std] and told["crop_pct"] == 1.0
    pixels = split.batch(np.arange(len(split)))[:, 0].numpy()
    transform = create_transform(**told)
    images = torch.stack([transform(Image.fromarray(one)) for one in pixels])
    with torch.inference_mode():
        torch.testing.assert_close(model(images), stored, rtol=1e-4, atol=1e-5)
        monkeypatch.setenv("HF_HUB_OFFLINE", "1")
        transformers = pytest.importorskip("transformers")
        other = transformers.AutoModel.from_pretrained(folder).eval()
        torch.testing.assert_close(other(images).pooler_output, model(images))


def test_the_card_tells_row_protocol_data_cost_and_licence(store: Store, tmp_path: Path):
    assert export(store, tmp_path / "encoder", "MAE-CT", "--license", "cc-by-4.0") == 0
    card = (tmp_path / "encoder" / "README.md").read_text()
    _, head, body = card.split("---\n", 2)
    told = yaml.safe_load(head)
    assert told["library_name"] == "timm" and told["license"] == "cc-by-4.0"
    plan = make_plan(load_suite(SMOKE, seeds=1, sets=SETS), store, only="MAE-CT")
    record = plan.rows[0].evaluations["knn"].record
    assert record is not None and record.protocol_fingerprint is not None
    [metric] = [m for m in told["model-index"][0]["results"][0]["metrics"] if m["type"] == "knn"]
    assert metric["value"] == record.metrics[0].value
    for said in (f"{metric['value']:.1f}", record.protocol_fingerprint, "MAE-CT tuning, seed 0: 4",
                 "digits, 1097 train", "training cost, cumulative", plan.rows[0].chain[-1].key):  # fmt: skip
        assert said in body, said


@pytest.mark.parametrize(
    ("row", "more", "told"),
    [
        ("MAE-TC", (), "there is no row 'MAE-TC'; did you mean 'MAE-CT'?"),
        ("MAE-CT", ("--seed", "7"), "there is no seed 7; the suite has 0"),
        ("raw pixels", (), "row 'raw pixels' has no encoder"),
        ("random encoder", (), "trains nothing: its encoder is random"),
        ("MAE-CT_aug", (), "MAE-CT_aug tuning, seed 0 is pending"),
    ],
)
def test_what_cannot_be_exported_is_told(
    row: str, more: tuple[str, ...], told: str, store: Store, tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
):  # fmt: skip
    assert export(store, tmp_path / "encoder", row, *more) == 2
    assert told in capsys.readouterr().err
    assert [*tmp_path.iterdir()] == []


def test_no_folder_is_written_over(
    store: Store, tmp_path: Path, capsys: pytest.CaptureFixture[str]
):
    (tmp_path / "notes.txt").write_text("mine")
    assert export(store, tmp_path) == 2
    assert "is there already" in capsys.readouterr().err
    assert [path.name for path in tmp_path.iterdir()] == ["notes.txt"]


def test_a_damaged_encoder_is_not_exported(tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    damaged = fill_store(tmp_path / "store", only="MAE", sets=["mae.steps=2"])
    [file] = damaged.root.glob("stages/*/encoder.safetensors")
    file.write_bytes(file.read_bytes()[:-4] + b"\0\0\0\1")
    given = ["--set=mae.steps=2", "--only", "MAE", "--seeds", "1", "--store", str(damaged.root)]
    to = ["--checkpoint", "MAE", "--to", str(tmp_path / "encoder")]
    assert main(["export", str(SMOKE), *given, *to]) == 2
    assert "encoder.safetensors does not fit its checksum" in capsys.readouterr().err
    assert not (tmp_path / "encoder").exists()
