"""FLOPs counted from the settings, against what torch counts of the real modules.

What differs: torch counts the recomputation inside the fused attention's backward pass, and the
formulas count a backward product by the input of the first trained layer, which nobody needs.
"""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from stage_helpers import TRAININGS, chain, trained_inputs, training_of
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

from bench.store.store import Store
from maect import flops, methods
from maect.methods.nnclr import HeadSettings, TuneSettings
from maect.models import build_encoder
from maect.settings import MAESettings, ModelSettings


@pytest.fixture(scope="module")
def inputs(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    return trained_inputs(tmp_path_factory.mktemp("store"))


@pytest.mark.parametrize("kind", list(TRAININGS))
def test_a_training_step_costs_what_is_counted(kind: str, inputs: dict[str, Path]):
    stage = next(s for s in chain(Store(Path("none"))) if s.kind == kind)
    training = training_of(stage, inputs)
    epoch, indices = training.batches.at(0)
    with FlopCounterMode(display=False) as counter, sdpa_kernel(SDPBackend.MATH):
        training.gradients(epoch, indices)
    assert stage.steps
    assert stage.flops / stage.steps == pytest.approx(counter.get_total_flops(), rel=0.03)


@pytest.mark.parametrize("frozen", [0, 1, 2])
def test_frozen_blocks_cost_their_forward_pass_only(frozen: int, inputs: dict[str, Path]):
    sets = ["tune.frozen=null", f"tune.frozen_blocks={frozen}"]
    stage = chain(Store(Path("none")), sets)[2]
    training = training_of(stage, inputs)
    epoch, indices = training.batches.at(0)
    with FlopCounterMode(display=False) as counter, sdpa_kernel(SDPBackend.MATH):
        training.gradients(epoch, indices)
    assert stage.steps
    assert stage.flops / stage.steps == pytest.approx(counter.get_total_flops(), rel=0.05)


@pytest.mark.parametrize(("size", "patch"), [("tiny", 16), ("small", 32)])
def test_a_forward_pass_of_the_usual_sizes(size: str, patch: int):
    model = ModelSettings.parse({"size": size, "patch_size": patch})
    encoder = build_encoder(size, image_size=96, patch_size=patch)
    with (
        FlopCounterMode(display=False) as counter,
        torch.inference_mode(),
        sdpa_kernel(SDPBackend.MATH),
    ):
        encoder(torch.zeros(2, 3, 96, 96))
    assert flops.forward_pass(model, 96, 3, 2) == pytest.approx(counter.get_total_flops(), rel=0.01)


def test_a_vit_b_16_forward_pass_is_the_published_17_5_gflops():
    """17.5 GMACs at 224 pixels (timm's and torchvision's tables), so 35 GFLOPs as counted here."""
    model = ModelSettings.parse({"size": "base", "patch_size": 16})
    assert flops.forward_pass(model, 224, 3, 1) == pytest.approx(2 * 17.56e9, rel=0.01)


def test_costs_follow_batch_mask_queue_and_positives():
    model = ModelSettings.parse({"size": "tiny"})
    rate = {"steps": 1, "lr": 1.0}

    def mae(**changes: object) -> float:
        return flops.mae_step(model, MAESettings.parse(rate | changes), 224, 3)

    assert mae(batch_size=256) == 2 * mae(batch_size=128)
    assert mae(views=2) == 2 * mae()
    assert mae(mask_ratio=0.5) > mae(mask_ratio=0.75)

    def head(**changes: object) -> float:
        options = methods.options_of(HeadSettings.parse(rate | changes), {})
        return flops.step(methods.get("head"), model, options, 224, 3)

    # one more product of a batch of 1024, two views, with 65,536 embeddings of 256 numbers
    grown = head(queue_size=131072) - head(queue_size=65536)
    assert grown == pytest.approx(2 * 2 * 1024 * 65536 * 256)

    def tune(**changes: object) -> float:
        shape = HeadSettings.parse(rate).model_dump()
        options = methods.options_of(TuneSettings.parse(rate | changes), shape)
        return flops.step(methods.get("tune"), model, options, 224, 3)

    assert tune(positive="no_queue") < tune(positive="neighbor")
    assert tune(positive="neighbor") == tune(positive="no_swap") == tune(positive="oracle")
    assert tune(frozen_blocks=12) < tune(frozen_blocks=6) < tune(frozen_blocks=0)
