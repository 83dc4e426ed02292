"""`bench calibrate`: paces of a suite's stages on this machine, and predictions by them."""

from __future__ import annotations

import json
import os
from pathlib import Path

import numpy as np
import pytest
from bench_helpers import SMOKE, Bench
from PIL import Image

from bench.store.calibration import FILE, read

PAPER = SMOKE.with_name("paper_table.yaml")


def test_every_kind_of_stage_is_measured_and_the_plan_predicted(bench: Bench, store):
    given = [SMOKE, "--store", store.root, "--seeds", 1]
    out = bench("calibrate", *given, "--minutes", 0.01).out
    # what costs most comes first, and is measured however short the time is
    assert "\nMAE, seed 0: " in out
    assert "the time is up; not measured: " in out
    out = bench("calibrate", *given, "--minutes", 0.5).out
    assert "matrix product in fp32: " in out
    assert "MAE-CT_aug tuning, seed 0: " in out
    assert "raw pixels probe, seed 0: " in out
    found = read(store.root)
    assert found is not None
    assert found.device_kind == "cpu"
    assert all(0 < pace.share_of_peak < 1 for pace in found.paces if pace.share_of_peak)
    plan = bench("plan", SMOKE, "--store", store.root, "--seeds", 1).out
    assert "of the rates that `calibrate` measured" in plan


def test_images_that_are_not_here_are_replaced_by_photographs(
    bench: Bench, store, monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.setenv("MAECT_DATA", os.environ.get("MAECT_DATA", "data"))  # is set meanwhile
    small = {
        "data.image_size": 32, "numerics.threads": 1, "numerics.precision": "fp32",
        "model.size": "custom", "model.dim": 16, "model.depth": 2, "model.heads": 2,
        "model.decoder_dim": 16, "model.decoder_depth": 1, "model.decoder_heads": 2,
        "mae.batch_size": 16, "head.batch_size": 16, "tune.batch_size": 16,
        "head.queue_size": 64, "tune.frozen_blocks": 1,
    }  # fmt: skip
    sets = [part for name, value in small.items() for part in ("--set", f"{name}={value}")]
    given = [PAPER, "--profile", "imagenet", "--only", "MAE", "--store", store.root, *sets]
    asked: set[int] = set()
    monkeypatch.setattr("maect.stages.loop.is_logged", lambda step, steps: asked.add(steps))
    told = json.loads(bench("calibrate", *given, "--minutes", 0.02, "--json").out)
    assert told["images"].startswith("synthetic JPEGs, 500x375")
    assert [pace["kind"] for pace in told["paces"]] == ["mae"]
    assert 0 <= told["paces"][0]["waiting"] < 1
    assert told["paces"][0]["limit"] in ("data", "device")
    # as seldom logged as in 800 epochs of ImageNet, not of the few photographs
    assert asked == {800 * (1_281_167 // 16)}


def test_json_stands_alone_whatever_is_said_of_the_images(bench: Bench, store, tmp_path: Path):
    random = np.random.default_rng(0)
    for number in range(84):
        file = tmp_path / "images" / ("train" if number < 80 else "val") / "ab"[number % 2]
        file.mkdir(parents=True, exist_ok=True)
        grey = random.integers(0, 256, (8, 8), np.uint8)
        Image.fromarray(grey).save(file / f"{number}.png")
    suite = tmp_path / "mine.yaml"
    assert bench("init", suite, "--data", tmp_path / "images").code == 0
    given = [suite, "--only", "MAE", "--minutes", 0.01, "--store", store.root, "--json"]
    done = bench("calibrate", *given)
    assert json.loads(done.out)["paces"] and "converted to RGB: " in done.err, done.err


def test_a_calibration_that_is_damaged_predicts_nothing(bench: Bench, store):
    (store.root / FILE).write_text('{"device_kind": "abacus"}')
    assert "predicted" not in bench("plan", SMOKE, "--store", store.root).out


@pytest.mark.parametrize("minutes", ["0", "-1", "soon", "nan"])
def test_minutes_that_are_none_are_told(bench: Bench, minutes: str, tmp_path: Path):
    done = bench("calibrate", SMOKE, f"--minutes={minutes}", "--store", tmp_path / "s")
    assert done.code == 2
    assert "is not a number of minutes above 0" in done.err
