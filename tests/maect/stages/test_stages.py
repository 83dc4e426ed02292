"""The training stages: repeatable to the bit, stopped by a loss that is not finite, and logged."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from stage_helpers import TRAININGS, chain, job_of, trained_inputs, training_of

from bench.store.store import Store
from maect import datasets
from maect.losses import mae_loss
from maect.models import random_masking
from maect.settings import DataSettings
from maect.stages import features
from maect.stages.contrastive import ContrastiveTraining
from maect.stages.encoder import encoder_of
from maect.stages.job import Output, Progress, State, TrainingError
from maect.stages.loop import FIRST_LOGGED, LOGGED_POINTS, Batches, Log, train
from maect.streams import Stream
from maect.weights import load_encoder

NOWHERE = Store(Path("none"))


@pytest.fixture(scope="module")
def inputs(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    return trained_inputs(tmp_path_factory.mktemp("store"))


def output_of(kind: str, inputs: dict[str, Path], *sets: str) -> Output:
    stage = next(s for s in chain(NOWHERE, sets) if s.kind == kind)
    return train(training_of(stage, inputs))


def tensors(output: Output) -> dict[str, torch.Tensor]:
    return {f"{f}/{name}": t for f, ts in output.tensors.items() for name, t in ts.items()}


@pytest.mark.parametrize("kind", list(TRAININGS))
def test_a_stage_is_repeatable_to_the_bit(kind: str, inputs: dict[str, Path]):
    """Whatever torch's own generators were asked in between; another seed is another training."""
    first = output_of(kind, inputs)
    torch.manual_seed(12345)
    torch.rand(3)
    second = output_of(kind, inputs)
    assert first.curves == second.curves
    before, after = tensors(first), tensors(second)
    assert before.keys() == after.keys()
    for name in before:
        assert torch.equal(before[name], after[name]), name
    stage = next(s for s in chain(NOWHERE) if s.kind == kind)
    stage.settings["seed"] = 7
    assert train(training_of(stage, inputs)).curves["loss"] != first.curves["loss"]


def test_the_loss_of_two_crops_is_over_both(inputs: dict[str, Path]):
    """Each crop with a view and a mask of its own, in shares of one mean, as of a batch of both."""
    stage = chain(NOWHERE, ["mae.views=2", "mae.steps=1"])[0]
    assert len(stage.settings["views"]) == 2
    training = training_of(stage, inputs)
    epoch, ids = training.batches.at(0)
    images = training.train.batch(ids)
    crops = torch.cat([training.augment(images, epoch, ids, view=view) for view in (0, 1)])
    noise = [Stream(0, "mae", "mask").uniform(epoch, ids, 16)]
    noise.append(Stream(0, "mae", "mask", 1).uniform(epoch, ids, 16))
    keep, restore, mask = random_masking(torch.from_numpy(np.concatenate(noise)), 0.75)
    predicted = training.modules["decoder"](training.encoder(crops, keep), restore)
    expected = mae_loss(predicted, crops, mask, 2)
    expected.backward()
    wanted = training.encoder.patch_embed.proj.weight.grad.clone()
    training.encoder.zero_grad()
    assert training.gradients(epoch, ids)["loss"] == pytest.approx(expected.item(), rel=1e-6)
    torch.testing.assert_close(training.encoder.patch_embed.proj.weight.grad, wanted)


def test_a_loss_that_is_not_finite_ends_the_stage_and_names_the_step(inputs: dict[str, Path]):
    with pytest.raises(TrainingError, match=r"the loss is (nan|inf) at step \d+ of 40; lower lr"):
        output_of("mae", inputs, "mae.lr=1e30")


class Keeper:
    """Checkpoints that are due after every step."""

    def __init__(self) -> None:
        self.kept: list[State] = []

    def load(self) -> None:
        return None

    def due(self) -> bool:
        return True

    def save(self, state: State) -> None:
        self.kept.append(state)


@pytest.mark.parametrize("bad_step", [5, 39])
def test_weights_that_are_not_finite_are_never_kept(bad_step: int, inputs: dict[str, Path]):
    """A gradient can overflow while the loss is finite, in the last step too."""
    training = training_of(chain(NOWHERE)[0], inputs)
    training.job.checkpoints = keeper = Keeper()
    step = training.step

    def overflowing(number: int) -> dict[str, torch.Tensor | float]:
        values = step(number)
        if number == bad_step:
            training.encoder.norm.bias.data[3] = torch.nan
        return values

    training.step = overflowing
    message = rf"norm\.bias is not finite after step {bad_step} of 40; lower lr"
    with pytest.raises(TrainingError, match=message):
        train(training)
    assert [state.step for state in keeper.kept] == list(range(1, bad_step + 1))


@pytest.mark.parametrize("patience", [1, 20])
@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
def test_the_log_finds_the_first_bad_step(patience: int, bad: float):
    log = Log(100, torch.device("cpu"))
    log.patience = patience

    def fill() -> None:
        for step in range(100):
            log.add(step, {"loss": torch.tensor(bad if step >= 7 else 1.0)})

    with pytest.raises(TrainingError, match=rf"the loss is {bad} at step 7 of 100"):
        fill()


def test_the_log_holds_every_early_step_the_last_one_and_some_between():
    steps = 10 * LOGGED_POINTS + 3
    log = Log(steps, torch.device("cpu"))
    for step in range(steps):
        log.add(step, {"loss": torch.tensor(float(step)), "lr": 0.5})
    logged = log.curves["step"]
    assert logged[:FIRST_LOGGED] == list(range(FIRST_LOGGED))
    assert logged[-1] == steps - 1
    assert len(logged) < LOGGED_POINTS + FIRST_LOGGED + 2
    assert log.curves["loss"] == logged
    assert len(log.curves["lr"]) == len(logged)


@pytest.mark.parametrize("kind", list(TRAININGS))
def test_a_stage_lowers_the_loss_and_leaves_curves_and_a_summary(
    kind: str, inputs: dict[str, Path]
):
    output = output_of(kind, inputs, f"{kind}.steps=60")
    assert output.curves["step"] == list(range(60))
    assert {"loss", "lr"} <= output.curves.keys()
    losses = output.curves["loss"]
    assert sum(losses[-5:]) < sum(losses[:5])
    others = {"mae": {"encoder", "decoder"}, "head": {"head"}, "tune": {"encoder", "head"}}
    assert set(output.tensors) == others[kind]  # the head stage leaves its input's encoder alone
    assert output.summary["final_loss"] == output.curves["loss"][-1]
    assert output.summary["trained_parameters"] > 1000
    if kind != "mae":
        assert {"neighbor_accuracy", "neighbor_similarity"} <= output.curves.keys()


def test_a_stage_tells_how_far_it_is(inputs: dict[str, Path]):
    told: list[Progress] = []
    stage = chain(NOWHERE, ["mae.steps=40"])[0]
    training = training_of(stage, inputs)
    training.job.on_progress = told.append
    train(training)
    assert told[-1].step == told[-1].steps == 40
    assert told[-1].epoch == 39 // (1097 // 64)
    assert all(p.images_per_s > 0 for p in told)
    assert [p.step for p in told] == sorted({p.step for p in told})


@pytest.mark.parametrize("kind", ["head", "tune"])
def test_signs_of_collapse_are_logged_and_change_no_bit(
    kind: str, inputs: dict[str, Path], monkeypatch: pytest.MonkeyPatch
):
    watched = output_of(kind, inputs)
    curves = watched.curves
    for name in ("neighbor_accuracy", "queue_age"):
        assert all(0.0 <= value <= 1.0 for value in curves[name])
    assert all(1.0 < value <= 32.0 for value in curves["effective_rank"])
    assert {len(values) for values in curves.values()} == {len(curves["step"])}
    monkeypatch.setattr(ContrastiveTraining, "watch", lambda self: {})
    alone = output_of(kind, inputs)
    assert alone.curves == {n: v for n, v in curves.items() if n != "effective_rank"}
    assert all(torch.equal(t, tensors(alone)[n]) for n, t in tensors(watched).items())


def test_effective_rank_falls_when_the_features_collapse(inputs: dict[str, Path]):
    training = training_of(chain(NOWHERE)[2], inputs)
    training.step(0)
    before = training.watch()["effective_rank"]
    training.encoder.norm.weight.data[1:] = 0.0  # one direction is left
    training.step(1)
    assert training.watch()["effective_rank"] < before / 3


@pytest.mark.parametrize("kind", list(TRAININGS))
def test_training_never_reads_the_test_split(
    kind: str, inputs: dict[str, Path], monkeypatch: pytest.MonkeyPatch
):
    load, read = datasets.load, []

    def watched(data: DataSettings, root: Path, split: str, *more: Any) -> datasets.Split:
        read.append(split)
        return load(data, root, split, *more)

    monkeypatch.setattr(datasets, "load", watched)
    output_of(kind, inputs, f"{kind}.steps=2")
    assert set(read) == {"train"}


def test_tuning_changes_the_upper_blocks_only(inputs: dict[str, Path]):
    stage = chain(NOWHERE)[2]
    training = training_of(stage, inputs)
    before = {name: t.clone() for name, t in training.encoder.state_dict().items()}
    after = train(training).tensors["encoder"]
    changed = {name for name in before if not torch.equal(before[name], after[name])}
    # two blocks, the lower half frozen with the patch embedding and the class token
    assert changed
    assert all(name.startswith(("blocks.1.", "norm.")) for name in changed)
    assert {name for name in before if name.startswith("blocks.1.")} <= changed | {
        name for name in before if before[name].numel() == 0
    }


@pytest.mark.parametrize("kind", ["mae", "tune"])
def test_recomputed_activations_change_no_bit(kind: str, inputs: dict[str, Path]):
    whole = output_of(kind, inputs)
    again = output_of(kind, inputs, "numerics.checkpoint_activations=true")
    assert again.curves == whole.curves
    assert all(torch.equal(t, tensors(again)[n]) for n, t in tensors(whole).items())


@pytest.mark.parametrize("kind", list(TRAININGS))
def test_bf16_trains_as_fp32_does_up_to_rounding(kind: str, inputs: dict[str, Path]):
    whole = output_of(kind, inputs, f"{kind}.steps=10")
    half = output_of(kind, inputs, f"{kind}.steps=10", "numerics.precision=bf16")
    assert half.curves["loss"] != whole.curves["loss"]
    assert half.curves["loss"] == pytest.approx(whole.curves["loss"], rel=0.05)
    assert all(t.dtype != torch.bfloat16 for t in tensors(half).values())


@pytest.mark.slow
@pytest.mark.needs("g++")  # for torch.compile
def test_compiled_stages_train_as_plain_ones_do(inputs: dict[str, Path]):
    # of tuning fewer: in the end another rounding chooses another neighbour
    for kind, steps in (("mae", 5), ("tune", 3)):
        plain = output_of(kind, inputs, f"{kind}.steps={steps}")
        sets = ("numerics.compile=true", "numerics.checkpoint_activations=true")
        compiled = output_of(kind, inputs, f"{kind}.steps={steps}", *sets)
        assert compiled.curves["loss"] == pytest.approx(plain.curves["loss"], rel=1e-4)
        assert tensors(compiled).keys() == tensors(plain).keys()


def test_an_encoder_that_a_stage_left_is_loaded_by_its_path(inputs: dict[str, Path]):
    images = torch.rand(2, 1, 8, 8)
    expected = encoder_of(job_of(chain(NOWHERE)[1], inputs), 1)
    for path in (inputs["encoder"], inputs["encoder"] / "encoder.safetensors"):
        encoder = load_encoder(path)
        assert encoder.heads == 2  # which no shape shows
        assert torch.equal(encoder.forward_features(images), expected.forward_features(images))


def test_features_are_those_of_the_encoder_given(inputs: dict[str, Path]):
    plan_stage = chain(NOWHERE)[0]
    settings = {k: plan_stage.settings[k] for k in ("data", "model", "numerics", "seed")}
    plan_stage.settings = settings | {"pool": "mean"}
    plan_stage.inputs = {"encoder": plan_stage}
    first = features.run(job_of(plan_stage, inputs)).tensors["features"]
    assert first["train_x"].shape == (1097, 32)
    assert first["train_x"].dtype == torch.float32
    assert len(first["test_x"]) == len(first["test_y"])
    plan_stage.inputs = {}
    random = features.run(job_of(plan_stage, inputs)).tensors["features"]
    assert not torch.equal(first["test_x"], random["test_x"])
    plan_stage.settings = {k: settings[k] for k in ("data", "numerics")} | {"init": "pixels"}
    pixels = features.run(job_of(plan_stage, inputs)).tensors["features"]
    assert pixels["train_x"].shape == (1097, 64)
    assert 0.0 <= pixels["train_x"].min() < pixels["train_x"].max() <= 1.0


def test_an_epoch_takes_every_image_once_and_drops_the_rest():
    batches = Batches(images=23, batch_size=5, seed=0, role="mae")
    epochs = [[batches.at(step) for step in range(4 * e, 4 * e + 4)] for e in range(2)]
    for number, epoch in enumerate(epochs):
        assert {e for e, _ in epoch} == {number}
        seen = [int(i) for _, indices in epoch for i in indices]
        assert len(seen) == len(set(seen)) == 20
    assert [i.tolist() for _, i in epochs[0]] != [i.tolist() for _, i in epochs[1]]
    # any step can be asked for at any time
    assert batches.at(1)[1].tolist() == epochs[0][1][1].tolist()
    with pytest.raises(TrainingError, match="a batch of 24 is larger than the 23 images"):
        Batches(images=23, batch_size=24, seed=0, role="mae")
