"""A stage that was cut off and goes on ends bitwise where an uninterrupted one does."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from stage_helpers import (
    TRAININGS,
    CutOff,
    Cutting,
    Kept,
    chain,
    job_of,
    trained_inputs,
    training_of,
)

from bench.store.resume import StageCheckpoints
from bench.store.store import Store
from maect import datasets
from maect.datasets import decoders
from maect.stages.job import Checkpoints, State
from maect.stages.loop import train
from maect.stages.mae import MAETraining


@pytest.fixture(scope="module")
def inputs(tmp_path_factory) -> dict[str, Path]:
    return trained_inputs(tmp_path_factory.mktemp("store"))


def output_of(kind: str, inputs: dict[str, Path], checkpoints) -> dict[str, torch.Tensor]:
    sets = ["tune.encoder_ema=0.9", "tune.clip_grad=1.0"]
    stage = next(s for s in chain(Store(Path("none")), sets) if s.kind == kind)
    training = training_of(stage, inputs)
    training.job.checkpoints = checkpoints
    output = train(training)
    tensors = {f"{f}/{n}": t for f, ts in output.tensors.items() for n, t in ts.items()}
    return tensors | {"loss curve": torch.tensor(output.curves["loss"])}


@pytest.mark.parametrize("kind", list(TRAININGS))
def test_a_stage_cut_off_and_resumed_ends_bitwise_as_if_never_cut(kind, inputs):
    whole = output_of(kind, inputs, None)
    cutting = Cutting(at=13)
    with pytest.raises(CutOff):
        output_of(kind, inputs, cutting)
    assert cutting.kept.step == 13
    resumed = output_of(kind, inputs, Kept(cutting.kept))
    assert resumed.keys() == whole.keys()
    for name, tensor in whole.items():
        assert torch.equal(resumed[name], tensor), name
    cutting.kept.curves.clear()  # a state whose curves are lost goes on all the same
    assert len(output_of(kind, inputs, Kept(cutting.kept))["loss curve"]) < len(whole["loss curve"])


@pytest.mark.filterwarnings("ignore:The image decoding and encoding:DeprecationWarning")
def test_a_training_on_files_ends_bitwise_alike_whoever_decodes_them(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """In the calling process or in others, begun there or gone over to, cut off and resumed."""
    for number in range(44):
        pool = "train" if number < 40 else "val"
        file = tmp_path / "set" / pool / f"class{number % 2}" / f"{number}.jpg"
        file.parent.mkdir(parents=True, exist_ok=True)
        pixels = np.random.default_rng(number).integers(0, 256, (20 + number % 5, 17, 3), np.uint8)
        Image.fromarray(pixels).save(file)
    stage = chain(Store(Path("none")), ["mae.views=2", "mae.steps=8", "mae.batch_size=16"])[0]
    stage.settings["data"] = {"name": "image_folder", "image_size": 8}
    monkeypatch.setenv("MAECT_DECODE_PROCESSES", "2")

    def output(alone: int, checkpoints: Checkpoints | None = None) -> dict[str, torch.Tensor]:
        monkeypatch.setattr(decoders, "ALONE", alone)
        monkeypatch.setattr(decoders, "_asked", 0)
        job = job_of(stage, {})
        job.data_path, job.data_root = str(tmp_path / "set"), tmp_path
        job.checkpoints = checkpoints
        datasets.prepare(job.data, tmp_path)
        found = train(MAETraining(job))
        return {f"{f}/{n}": t for f, ts in found.tensors.items() for n, t in ts.items()}

    expected, used_s = output(10_000), decoders.used_s
    cutting = Cutting(at=5)
    with pytest.raises(CutOff):
        output(0, cutting)
    assert decoders.used_s > used_s
    for found in (output(0), output(40), output(0, Kept(cutting.kept))):
        assert found.keys() == expected.keys()
        assert all(torch.equal(found[name], tensor) for name, tensor in expected.items())


def test_a_checkpoint_cut_short_is_passed_over_for_the_one_before(tmp_path):
    store = Store(tmp_path)
    store.create()
    keeper = StageCheckpoints(store, "key", "code")
    for step in (10, 20, 30):
        keeper._write(State(step, {"w": torch.full((4,), float(step))}, {"loss": [1.0]}))
    folder = store.checkpoints("key") / "code"
    assert sorted(p.name for p in folder.glob("*.json")) == ["20.json", "30.json"]
    newest = folder / "30.safetensors"
    newest.write_bytes(newest.read_bytes()[:-2])
    assert keeper.load().step == 20
    (folder / "20.json").write_text("{")
    assert keeper.load() is None
    assert StageCheckpoints(store, "key", "other code").load() is None
