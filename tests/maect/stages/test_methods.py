"""Every tuning method but NNCLR: resumed to the bit, counted, and its loss as others compute it."""

from __future__ import annotations

import json
import subprocess
import sys
from functools import cache
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from stage_helpers import (
    SUCCESSORS,
    CutOff,
    Cutting,
    Kept,
    successor_kinds,
    successor_stage,
    training_of,
)
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

from bench.plan.planner import make_plan
from bench.suite.load import load_suite
from maect import methods
from maect.methods import byol, dino, refiner, simclr, vicreg
from maect.stages.contrastive import TuneTraining
from maect.stages.job import Job, Output
from maect.stages.loop import train
from maect.streams import generator

KINDS = successor_kinds()
#: without a stage before: the head starts at random, and so does the encoder
ALONE = [kind for kind in KINDS if not kind.endswith("_head")] + ["byol_head"]


def output_of(kind: str, checkpoints: object = None) -> Output:
    training = training_of(successor_stage(kind, steps=8), {})
    training.job.checkpoints = checkpoints  # type: ignore[assignment]
    return train(training)


@cache
def whole(kind: str) -> Output:
    return output_of(kind)


@pytest.mark.parametrize("kind", ALONE)
def test_a_method_cut_off_and_resumed_ends_bitwise_as_if_never_cut(kind: str) -> None:
    cutting = Cutting(at=5)
    with pytest.raises(CutOff):
        output_of(kind, cutting)
    resumed, expected = output_of(kind, Kept(cutting.kept)), whole(kind)
    assert resumed.curves == expected.curves
    assert resumed.tensors.keys() == expected.tensors.keys()
    for file, tensors in expected.tensors.items():
        assert all(torch.equal(resumed.tensors[file][n], t) for n, t in tensors.items()), file


@pytest.mark.parametrize("kind", ALONE)
def test_what_a_step_costs_is_counted(kind: str) -> None:
    stage = successor_stage(kind, steps=8)
    training = training_of(stage, {})
    with FlopCounterMode(display=False) as counter, sdpa_kernel(SDPBackend.MATH):
        training.gradients(*training.batches.at(0))
    counted = counter.get_total_flops()
    assert stage.flops / (stage.steps or 1) == pytest.approx(counted, rel=0.06)


def test_a_head_stage_leaves_the_encoder_alone_and_tuning_goes_on_with_its_head() -> None:
    output = whole("byol_head")
    parts = {name.split(".")[0] for name in output.tensors["head"]}
    assert parts == {"projector", "predictor", "target_projector"}
    stage = successor_stage("byol", steps=8, inputs=True)
    assert stage.inputs["head"].kind == "byol_head"
    assert stage.inputs["encoder"].kind == "mae"
    assert stage.settings.get("head") is None


def test_a_teacher_follows_and_is_evaluated_where_wanted() -> None:
    assert set(whole("byol").tensors) == {"encoder", "head"}
    found = whole("dino").tensors
    assert set(found) == {"encoder", "head", "encoder_ema"}
    name = "blocks.1.mlp.fc1.weight"
    assert not torch.equal(found["encoder"][name], found["encoder_ema"][name])


def test_heads_below_the_last_one_lose_their_weight_where_it_decays() -> None:
    options = methods.options_of(
        refiner.RefinerSettings(steps=100, lr=1.0, head_weights="decay", warmup_steps=20), {}
    )
    weights = [refiner.weight_at(step / 100, options) for step in (0, 20, 60, 100)]
    assert weights == pytest.approx([1.0, 1.0, 0.5, 0.0])
    options.head_weights = "constant"
    assert refiner.weight_at(0.9, options) == 1.0


def test_local_crops_are_smaller_and_for_the_student_alone() -> None:
    training = training_of(successor_stage("dino", steps=8), {})
    assert isinstance(training, TuneTraining)
    sizes: list[tuple[int, ...]] = []
    read = training.read

    def watched(encoder: object, images: Tensor, frozen: int) -> Tensor:
        sizes.append((encoder is training.teacher, *images.shape))
        return read(encoder, images, frozen)  # type: ignore[arg-type]

    training.read = watched  # type: ignore[method-assign,assignment]
    training.gradients(*training.batches.at(0))
    assert set(sizes) == {(False, 32, 1, 8, 8), (False, 16, 1, 4, 4), (True, 32, 1, 8, 8)}


def test_bf16_of_every_method_is_fp32_up_to_rounding() -> None:
    for kind in ALONE:
        stage = successor_stage(kind, steps=8)
        stage.settings["numerics"]["precision"] = "bf16"
        half = float(training_of(stage, {}).step(0)["loss"])
        assert half == pytest.approx(whole(kind).curves["loss"][0], rel=0.05), kind


# ------------------------------------------------------------------- losses, as others compute them


def drawn(count: int = 2) -> list[Tensor]:
    random = generator(0, "lightly", 8)
    return [
        torch.from_numpy(random.standard_normal((16, 8))).requires_grad_() for _ in range(count)
    ]


def gradients(loss: Tensor, views: list[Tensor]) -> list[float]:
    loss.backward()
    return [float(view.grad.norm()) for view in views if view.grad is not None]


def test_losses_are_those_of_lightly() -> None:
    """Values and norms of gradients computed once with lightly 1.6.0, of these numbers in fp64."""
    views = drawn()
    loss, found = simclr.nt_xent(*views, 0.2)
    assert loss.item() == pytest.approx(4.575602272619083)
    assert gradients(loss, views) == pytest.approx([0.4362767529312753, 0.4981894547336702])
    assert 0.0 <= found <= 1.0
    views = drawn()
    loss = byol.byol_loss(*views)
    assert loss.item() == pytest.approx(1.9326870910008405)
    assert gradients(loss, views) == pytest.approx([0.17683376023269032, 0.1957787861443834])
    views = drawn()
    terms = vicreg.vicreg_terms(*views)
    loss = 25 * terms["invariance"] + 25 * terms["variance"] + terms["covariance"]
    assert loss.item() == pytest.approx(53.41793412447943)
    assert gradients(loss, views) == pytest.approx([6.2428550345888185, 5.897482252308946])
    views = drawn(5)
    loss = dino.dino_loss(views[:3], [v.detach() for v in views[3:]], torch.zeros(8), 0.1, 0.04)
    assert loss.item() == pytest.approx(16.849836533240527)
    expected = [0.8038362343256354, 0.7901493949536977, 1.4215435598565531]
    assert gradients(loss, views[:3]) == pytest.approx(expected)


def test_the_refiner_swaps_positives_and_no_negatives() -> None:
    own, near, predicted = drawn(3)
    near = F.normalize(near.detach(), dim=1)
    unit, said = F.normalize(own, dim=1), F.normalize(predicted, dim=1)
    logits = torch.stack(
        [
            torch.stack([(near[i] if i == j else unit[i]) @ said[j] for j in range(16)])
            for i in range(16)
        ]
    )
    expected = F.cross_entropy(logits / 0.2, torch.arange(16))
    torch.testing.assert_close(refiner.refiner_loss(own, near, predicted, 0.2), expected)


def test_a_refiner_whose_only_head_is_the_last_has_that_of_nnclr() -> None:
    head = refiner.head(8, methods.options_of(small_refiner(blocks=[]), {}))
    assert list(head) == ["last"]
    several = refiner.head(8, methods.options_of(small_refiner(blocks=[0, 2]), {}))
    assert list(several) == ["block0", "block2", "last"]
    queues = [several[name]["queue"].embeddings for name in several]
    assert len({queue.data_ptr() for queue in queues}) == 3


def small_refiner(**changes: object) -> refiner.RefinerSettings:
    sizes = {"hidden_dim": 8, "predictor_dim": 8, "out_dim": 4, "queue_size": 16, "topk": 2}
    return refiner.RefinerSettings(steps=1, lr=1.0, batch_size=8, **sizes | changes)  # type: ignore[arg-type]


# ----------------------------------------------------------------------------------- the registry


def test_methods_are_described_without_torch() -> None:
    code = (
        "import sys, json\nfrom maect import methods\n"
        "found = {n: methods.get(n).part for n in methods.names()}\n"
        "print(json.dumps([found, 'torch' in sys.modules]))"
    )
    found, loaded = json.loads(subprocess.check_output([sys.executable, "-c", code]))
    assert not loaded
    assert found["head"] == found["simclr_head"] == "head"
    assert [name for name, part in found.items() if part == "pretraining"] == ["joint", "mae"]
    with pytest.raises(ValueError, match="no training stage 'simcrl'; did you mean 'simclr'"):
        methods.get("simcrl")


def test_every_row_of_the_suite_costs_what_mae_ct_does() -> None:
    plan = make_plan(load_suite(SUCCESSORS, profile="digits", seeds=1), None)
    costs = {row.variant.name: sum(s.flops for s in row.chain) for row in plan.rows}
    wanted = costs.pop("MAE-CT")
    del costs["MAE"]
    steps = {row.variant.name: row.chain[-1] for row in plan.rows}
    for name, cost in costs.items():
        last = steps[name]
        assert wanted <= cost < wanted + last.flops / (last.steps or 1), name
    assert sum(stage.kind == "mae" for stage in plan.stages.values()) == 2


def test_a_job_of_an_unknown_method_names_the_nearest(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="no training stage 'byoll'; did you mean 'byol'"):
        TuneTraining(Job({}, {}, tmp_path, kind="byoll"))
