"""What only a GPU shows: it agrees with the CPU, repeats and resumes to the bit, never waits."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from stage_helpers import TRAININGS, CutOff, Cutting, Kept, chain, trained_inputs, training_of
from torch import Tensor

from bench.plan.planner import Stage
from bench.store.store import Store
from maect.augment import Augment
from maect.settings import ViewSettings
from maect.stages.job import Checkpoints
from maect.stages.loop import copies, train

pytestmark = pytest.mark.gpu
KINDS = list(TRAININGS)


@pytest.fixture(scope="module")
def inputs(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    return trained_inputs(tmp_path_factory.mktemp("store"))


def stage_of(kind: str, *sets: str) -> Stage:
    return next(s for s in chain(Store(Path("none")), sets) if s.kind == kind)


def after(stage: Stage, inputs: dict[str, Path], steps: int, device: str = "cuda"):
    """State and losses after some steps."""
    training = training_of(stage, inputs, device)
    losses = [float(training.step(number)["loss"]) for number in range(steps)]
    return copies(training.state()), losses


def assert_equal(one: dict[str, Tensor], other: dict[str, Tensor]) -> None:
    assert one.keys() == other.keys()
    for name, tensor in one.items():
        assert torch.equal(tensor, other[name]), name


@pytest.mark.parametrize("kind", KINDS)
def test_a_gpu_agrees_with_the_cpu(kind: str, inputs: dict[str, Path]) -> None:
    stage = stage_of(kind, "numerics.precision=fp32", "numerics.shards=1")
    on_cpu, cpu_losses = after(stage, inputs, 3, "cpu")
    on_gpu, losses = after(stage, inputs, 3)
    assert losses == pytest.approx(cpu_losses, rel=1e-4)
    for name, tensor in on_cpu.items():
        if name.endswith(("queue.ids", "queue.labels", "queue.pointer")):
            assert torch.equal(on_gpu[name], tensor), name
        elif name.endswith("queue.embeddings"):
            torch.testing.assert_close(on_gpu[name], tensor, rtol=0, atol=2e-3)


def test_views_agree_with_those_of_the_cpu() -> None:
    """Within one of 255 levels, but for a pixel in a thousand at solarisation's threshold."""
    view = ViewSettings(
        crop_scale=(0.2, 1.0), jitter=0.8, grey=0.2, blur=0.5, blur_sigma=(0.1, 2.0), solarise=0.2
    )
    mean, std = [0.0] * 3, [1 / 255] * 3
    cpu, gpu = (
        Augment([view], image_size=32, mean=mean, std=std, seed=0, role="mae", device=device)
        for device in ("cpu", "cuda")
    )
    images = torch.randint(0, 256, (64, 3, 32, 32), generator=torch.manual_seed(0)).byte()
    rows = torch.arange(64).numpy()
    difference = gpu(images, 0, rows).cpu() - cpu(images, 0, rows)
    assert (difference.abs() > 1.01).float().mean() < 1e-3


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
@pytest.mark.parametrize("kind", KINDS)
def test_steps_repeat_to_the_bit(kind: str, precision: str, inputs: dict[str, Path]) -> None:
    stage = stage_of(kind, f"numerics.precision={precision}")
    first, second = (after(stage, inputs, 6) for _ in range(2))
    assert first[1] == second[1]
    assert_equal(first[0], second[0])


@pytest.mark.parametrize("kind", KINDS)
def test_a_stage_cut_off_and_resumed_ends_as_if_never_cut(kind: str, inputs: dict[str, Path]):
    def output(checkpoints: Checkpoints | None) -> dict[str, Tensor]:
        training = training_of(stage_of(kind, "tune.encoder_ema=0.9"), inputs, "cuda")
        training.job.checkpoints = checkpoints
        left = train(training)
        tensors = {f"{f}/{n}": t for f, ts in left.tensors.items() for n, t in ts.items()}
        return tensors | {"loss": torch.tensor(left.curves["loss"])}

    whole, cutting = output(None), Cutting(at=13)
    with pytest.raises(CutOff):
        output(cutting)
    assert cutting.kept is not None
    assert_equal(output(Kept(cutting.kept)), whole)


@pytest.mark.parametrize("kind", ["mae", "tune"])
def test_activation_checkpointing_changes_no_bit(kind: str, inputs: dict[str, Path]) -> None:
    plain, saving = (
        after(
            stage_of(kind, "numerics.precision=bf16", f"numerics.checkpoint_activations={on}"),
            inputs,
            4,
        )
        for on in ("false", "true")
    )
    assert plain[1] == saving[1]
    assert_equal(plain[0], saving[0])


@pytest.mark.parametrize("kind", KINDS)
def test_compiled_steps_train_as_plain_ones_do(kind: str, inputs: dict[str, Path]) -> None:
    plain, compiled = (
        after(stage_of(kind, "numerics.precision=bf16", f"numerics.compile={on}"), inputs, 3)
        for on in ("false", "true")
    )
    assert compiled[1] == pytest.approx(plain[1], rel=2e-2)


@pytest.mark.parametrize("kind", KINDS)
def test_a_step_that_is_not_logged_waits_for_nothing(kind: str, inputs: dict[str, Path]) -> None:
    training = training_of(stage_of(kind, f"{kind}.steps=2000"), inputs, "cuda")
    for number in range(3):
        training.step(number)
    torch.cuda.set_sync_debug_mode("error")
    try:
        training.step(1001)
    finally:
        torch.cuda.set_sync_debug_mode("default")
