"""The published ImageNet recipes as suite data, and what planning them says of their cost."""

from __future__ import annotations

import json
from collections import Counter
from pathlib import Path
from typing import Any

import pytest
from bench_helpers import PAPER, ROOT, Bench

from bench.plan import estimate
from bench.plan.planner import Plan, Row, make_plan
from bench.report.frames import build_view
from bench.store.store import Store
from bench.suite.load import load_suite
from reports.tables.build import build_tables

IMAGENET = ROOT / "suites" / "imagenet.yaml"
IMAGES = 1_281_167
JITTER = {"brightness": 0.4, "contrast": 0.4, "saturation": 0.2, "hue": 0.1}


def plan_of(profile: str, store: Path, suite: Path = IMAGENET) -> Plan:
    return make_plan(load_suite(suite, profile=profile), Store(store))


def rows_of(plan: Plan) -> dict[str, Row]:
    return {row.variant.name: row for row in plan.rows if row.seed == 0}


#: profile -> dim, depth, patch, pool, batch, frozen blocks, EMA of the projector; then for each of
#: min and aug: epochs, temperature, top-k of tuning (arXiv 2304.10520 and its published code)
RECIPES: dict[str, Any] = {
    "base": (768, 12, 16, "mean", 1024, 6, 0.99, {"min": (20, 0.15, 20), "aug": (80, 0.15, 10)}),
    "large": (1024, 24, 16, "cls", 1024, 12, 0.99, {"min": (20, 0.2, 20), "aug": (40, 0.15, 10)}),
    "huge16": (1280, 32, 16, "cls", 512, 16, 0.995, {"min": (30, 0.3, 20), "aug": (40, 0.35, 20)}),
    "huge14": (1280, 32, 14, "cls", 512, 16, 0.995, {"min": (30, 0.3, 20), "aug": (40, 0.35, 20)}),
}


@pytest.mark.parametrize("profile", RECIPES)
def test_the_recipes_are_the_published_ones(profile: str, tmp_path: Path):
    dim, depth, patch, pool, batch, frozen, target_ema, tuning = RECIPES[profile]
    rows = rows_of(plan_of(profile, tmp_path))
    epoch = IMAGES // batch
    features = {name: row.features.settings["pool"] for name, row in rows.items()}
    # the published B/16 MAE is known by its class token, its MAE-CT by the mean of patches
    assert (features["MAE"], features["MAE-CT"], features["MAE-CT_aug"]) == ("cls", pool, pool)
    for variant, augment in (("MAE-CT", "min"), ("MAE-CT_aug", "aug")):
        *maes, head, tune = rows[variant].chain
        assert len(maes) == (profile != "huge14")  # which starts from released weights
        for stage in (*maes, head, tune):
            model = stage.settings["model"]
            assert (model["dim"], model["depth"], model["patch_size"]) == (dim, depth, patch)
            assert stage.settings["numerics"]["precision"] == "bf16"
            train = stage.settings["train"]
            assert (train["batch_size"], train["clip_grad"]) == (batch, None)
            assert tuple(train["betas"]) == (0.9, 0.95)
            assert not stage.settings["numerics"]["checkpoint_activations"]
        assert {head.settings["pool"], tune.settings["pool"]} == {pool}
        for mae in maes:
            model = mae.settings["model"]
            decoder = [model[f"decoder_{what}"] for what in ("dim", "depth", "heads")]
            assert decoder == [512, 8, 16]
            train = mae.settings["train"]
            assert (train["steps"], train["warmup_steps"]) == (800 * epoch, 20 * epoch)
            assert train["lr"] == pytest.approx(1.5e-4 * 2 * batch / 256)
            fixed = (train["weight_decay"], train["mask_ratio"], train["norm_pix"])
            assert fixed == (0.05, 0.75, True)
            # two crops of each image in a step, so the rate is of plain linear scaling
            assert (train["views"], len(mae.settings["views"])) == (2, 2)
            assert all(view["crop_scale"] == [0.2, 1.0] for view in mae.settings["views"])

        train = head.settings["train"]
        assert (train["steps"], train["warmup_steps"]) == (20 * epoch, 4 * epoch)
        assert train["lr"] == pytest.approx(1e-4 * 2 * batch / 256)
        assert (train["weight_decay"], train["topk"], train["temperature"]) == (1e-5, 1, 0.15)
        shape = {"hidden_dim": 2048, "predictor_dim": 4096, "out_dim": 256, "queue_size": 65536}
        assert tune.settings["head"] == shape
        assert {name: train[name] for name in shape} == shape

        train = tune.settings["train"]
        epochs, temperature, topk = tuning[augment]
        assert train["steps"] == epochs * epoch
        assert train["warmup_steps"] == round(0.2 * epochs * epoch)
        assert (train["temperature"], train["topk"]) == (temperature, topk)
        assert (train["target_ema"], train["encoder_ema"]) == (target_ema, 0.9999)
        assert train["frozen_blocks"] == frozen
        assert (train["layer_decay"], train["weight_decay"]) == (0.65, 0.05)
        assert train["head_weight_decay"] == 1e-5
        assert train["lr"] == pytest.approx(1e-4 * 2 * batch / 256)
        head_base = 1e-4 if augment == "min" else 5e-4
        assert train["head_lr"] == pytest.approx(head_base * 2 * batch / 256)

        views = head.settings["views"]
        assert tune.settings["views"] == views  # the head learns under its variant's own pipeline
        assert [view["crop_scale"] for view in views] == [[0.08, 1.0]] * 2
        assert [view["flip"] for view in views] == [0.5, 0.5]
        names = ("jitter", "blur", "grey", "solarise")
        shown = [tuple(view[name] for name in names) for view in views]
        if augment == "min":
            assert shown == [(0.0, 0.0, 0.0, 0.0)] * 2
        else:
            assert shown == [(0.8, 1.0, 0.2, 0.0), (0.8, 0.1, 0.2, 0.2)]
            for view in views:
                assert {name: view[name] for name in JITTER} == JITTER
                assert (view["blur_sigma"], view["solarise_threshold"]) == ([0.1, 2.0], 128)


#: profile -> FLOPs of head and tuning as a share of the MAE's, for min; the paper says about 10 %
SHARES = {"base": 0.045, "large": 0.075, "huge16": 0.114}


@pytest.mark.parametrize("profile", SHARES)
def test_tuning_costs_a_small_share_of_the_mae(profile: str, tmp_path: Path):
    """And each tuned row is compared with an MAE that cost as much; the MAE itself is shared."""
    rows = rows_of(plan_of(profile, tmp_path))
    mae, head, tune = rows["MAE-CT"].chain
    assert (head.flops + tune.flops) / mae.flops == pytest.approx(SHARES[profile], abs=0.002)
    for name, matched in (
        ("MAE-CT", "MAE, compute-matched"),
        ("MAE-CT_aug", "MAE, matched to MAE-CT_aug"),
    ):
        total, (longer,) = sum(stage.flops for stage in rows[name].chain), rows[matched].chain
        assert total <= longer.flops < total + longer.flops / longer.steps
        assert rows[name].chain[0] is mae is rows["MAE"].chain[0]
    assert head.key != rows["MAE-CT_aug"].chain[1].key


def test_the_largest_starts_from_released_weights(tmp_path: Path):
    """Which need not be here for a plan; no row trains an MAE."""
    plan = plan_of("huge14", tmp_path)
    assert [*rows_of(plan)] == ["MAE", "MAE-CT", "MAE-CT_aug"]
    kinds = Counter(stage.kind for stage in plan.stages.values() if stage.trains)
    assert kinds == {"head": 2, "tune": 2}
    for row in plan.rows:
        assert "weights" in next(row.stages()).settings
        assert row.variant.init == "~/weights/mae_pretrain_vit_huge.pth"
    other = load_suite(IMAGENET, profile="huge14", sets=["init=elsewhere.pth"])
    assert {variant.init for variant in other.variants.values()} == {"elsewhere.pth"}


def test_released_encoders_are_evaluated_as_they_are_with_published_numbers_beside(tmp_path: Path):
    """Neither the files nor the images need be here; rows from different files share no stage."""
    store = Store(tmp_path / "store")
    plan = make_plan(load_suite(IMAGENET.with_name("released.yaml")), store)
    assert not any(stage.trains for stage in plan.stages.values())
    kinds = Counter(stage.kind for stage in plan.stages.values())
    assert kinds["features"] == kinds["knn"] == len(plan.rows) == 7
    published = build_tables(build_view(plan, store, ""))[0].published
    assert published is not None and "MAE-Refined" in [row.variant for row in published.rows]
    assert not any("MAE-Refined" in note for note in published.notes)


def test_a_column_says_where_its_rows_read_other_tokens(tmp_path: Path):
    base, large = (
        build_view(plan_of(profile, tmp_path), Store(tmp_path), "") for profile in ("base", "large")
    )
    assert base.columns["knn"]["label"] == "k-NN, k=10, tokens by row"
    assert "class token: MAE, MAE, compute-matched, " in base.notes[-1]
    assert "mean of patches: NNCLR without MAE, MAE-CT, MAE-CT_aug." in base.notes[-1]
    assert large.columns["knn"]["label"] == "k-NN, k=10"
    # the published probe is of fresh crops, as this one is
    published = build_tables(large)[0].published
    assert published is not None
    assert "probe_augmented.published" in {column.id for column in published.columns}


def test_the_paper_table_has_the_same_recipe(tmp_path: Path):
    ours = rows_of(plan_of("large", tmp_path))
    table = rows_of(plan_of("imagenet", tmp_path, PAPER))
    for name, row in ours.items():
        assert [s.key for s in row.chain] == [s.key for s in table[name].chain], name


@pytest.mark.parametrize("profile", RECIPES)
def test_a_plan_predicts_gpu_hours_and_says_what_it_assumes(
    profile: str, bench: Bench, tmp_path: Path
):
    done = bench("plan", IMAGENET, "--profile", profile, "--store", tmp_path)
    assert done.code == 0, done.err
    line = next(line for line in done.out.splitlines() if line.startswith("predicted"))
    assert "GPU-hours (" in line
    assert "assumes 30% (10% to 45%) of the 312 TFLOP/s in bf16 of an A100" in line
    done = bench("plan", IMAGENET, "--profile", profile, "--store", tmp_path, "--json")
    plan = json.loads(done.out)
    total, stages = plan["assumed_gpu_hours"], plan["stages"]
    counted = [s["assumed_gpu_hours"] for s in stages if s["assumed_gpu_hours"]]
    rows = len({stage["title"] for stage in stages if stage["kind"] == "features"})
    assert rows == (3 if profile == "huge14" else 6)
    # two heads and two tunings, else four more that train; features, probe, fine-tuning of each row
    assert len(counted) == (4 if profile == "huge14" else 8) + 3 * rows
    for name in ("hours", "low", "high"):
        assert total[name] == pytest.approx(sum(one[name] for one in counted))
    assert total["low"] < total["hours"] < total["high"]


def test_published_costs_lie_in_the_predicted_interval(tmp_path: Path):
    mae, head, tune = rows_of(plan_of("large", tmp_path))["MAE-CT"].chain
    tuning = estimate.assumed([head, tune], {})
    assert tuning is not None
    assert tuning.low < 40 < tuning.high  # A100-hours, abstract of arXiv 2304.10520v1
    pretraining = estimate.assumed([mae], {})
    assert pretraining is not None
    as_v100 = 312 / 125  # peaks in TFLOP/s
    hours = [h * as_v100 for h in (pretraining.low, pretraining.high)]
    assert hours[0] < 2688 < hours[1]  # 64 V100s for 42 hours, facebookresearch/mae


def test_nothing_is_assumed_of_small_models_or_of_kinds_that_have_run(tmp_path: Path):
    small = make_plan(load_suite(PAPER, profile="cifar10"), Store(tmp_path))
    assert estimate.assumed(small.stages.values(), {}) is None
    large = plan_of("large", tmp_path)
    known = {stage.kind: estimate.Rates([1.0], 1) for stage in large.stages.values()}
    assert estimate.assumed(large.stages.values(), known) is None
