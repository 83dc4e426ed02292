"""From a suite to its stages."""

from __future__ import annotations

import json
import math
import pickle
import re
from collections import Counter
from pathlib import Path

import pytest
from bench_helpers import PAPER, SMOKE, SWEEP, Bench, write_record

from bench.commands.plan import plan_data, plan_summary
from bench.errors import UserError
from bench.plan import estimate
from bench.plan.planner import make_plan
from bench.plan.stage import Plan, Row, Stage
from bench.plan.status import assess, search_identity
from bench.report.frames import build_view
from bench.run.driver import RunOptions, execute
from bench.run.tune import Search, of_cells
from bench.store.record import Code, Cost, Run
from bench.store.store import Store
from bench.suite.load import load_suite
from maect import flops, methods
from maect.methods.nnclr import TuneSettings
from maect.settings import MAESettings, ModelSettings
from reports.tables.build import build_tables


def row_of(plan: Plan, variant: str, seed: int = 0) -> Row:
    return next(r for r in plan.rows if (r.variant.name, r.seed) == (variant, seed))


def test_every_stage_stands_once(plan_of):
    plan = plan_of()
    kinds = Counter(stage.kind for stage in plan.stages.values())
    # two seeds: MAE and its longer twin; two tuned rows, one without MAE; pixels have no seed
    assert kinds == {"mae": 4, "head": 4, "tune": 6, "features": 13, "knn": 13, "probe": 14}
    for seed in (0, 1):
        chains = [row_of(plan, name, seed).chain for name in ("MAE", "MAE-CT", "MAE-CT_aug")]
        assert chains[0][0] is chains[1][0] is chains[2][0]
        assert chains[1][1] is not chains[2][1]


def test_inputs_stand_before_what_needs_them(plan_of):
    seen: set[str] = set()
    for key, stage in plan_of().stages.items():
        assert {source.key for source in stage.inputs.values()} <= seen
        seen.add(key)


def test_tuning_builds_on_the_mae_and_on_the_head(plan_of):
    mae, head, tune = row_of(plan_of(), "MAE-CT").chain
    assert head.inputs == {"encoder": mae}
    assert tune.inputs == {"encoder": mae, "head": head}
    assert row_of(plan_of(), "MAE-CT").features.inputs["encoder"].kind == "tune"


def test_more_seeds_add_only_new_stages(plan_of):
    two, three = plan_of(), plan_of(seeds=3)
    assert two.stages.keys() < three.stages.keys()
    added = [three.stages[key] for key in three.stages.keys() - two.stages.keys()]
    kinds = Counter(stage.kind for stage in added)
    assert kinds == {"mae": 2, "head": 2, "tune": 3, "features": 6, "knn": 6, "probe": 7}
    assert {stage.settings.get("seed", 2) for stage in added} == {2}
    assert [row.seed for row in plan_of(seeds=1).rows] == [0] * 7


@pytest.mark.parametrize("suite", [SMOKE, PAPER], ids=["smoke", "paper_table"])
def test_compute_matched_steps_cover_head_and_tuning(suite: Path, plan_of):
    plan = plan_of(suite)
    mae, head, tune = row_of(plan, "MAE-CT").chain
    (matched,) = row_of(plan, "MAE, compute-matched").chain
    model = ModelSettings.parse(mae.settings["model"])
    size = mae.settings["data"]["image_size"]
    cost = 0.0
    for stage in (head, tune):
        method = methods.get(stage.kind)
        train = method.settings.parse(stage.settings["train"])
        options = methods.options_of(train, stage.settings.get("head", {}))
        cost += stage.steps * flops.step(method, model, options, size, 1)
    step = flops.mae_step(model, MAESettings.parse(mae.settings["train"]), size, 1)
    assert matched.steps == mae.steps + math.ceil(cost / step)
    assert matched.flops >= mae.flops + head.flops + tune.flops
    assert matched.flops - step < mae.flops + head.flops + tune.flops
    # a schedule of its own: warm-up and decay stretch over all of its steps
    share = row_of(plan, "MAE").variant.row.mae.warmup
    assert matched.settings["train"]["steps"] == matched.steps
    assert matched.settings["train"]["warmup_steps"] == round(share * matched.steps)


@pytest.mark.parametrize("suite", [SMOKE, PAPER], ids=["smoke", "paper_table"])
def test_contrastive_training_without_mae_costs_as_much_as_the_whole_chain(suite: Path, plan_of):
    plan = plan_of(suite)
    total = sum(stage.flops for stage in row_of(plan, "MAE-CT").chain)
    row = row_of(plan, "NNCLR without MAE")
    (scratch,) = row.chain
    settings = TuneSettings.parse(scratch.settings["train"])
    assert total <= scratch.flops < total + scratch.flops / scratch.steps
    assert scratch.steps == settings.steps > row_of(plan, "MAE-CT").chain[-1].steps
    assert settings.warmup_steps == round(row.variant.row.tune.warmup * scratch.steps)
    # every block is trained at the same rate, from random weights
    assert (settings.frozen_blocks, settings.layer_decay) == (0, 1.0)
    assert (scratch.inputs, scratch.settings["init"]) == ({}, "random")


def test_imagenet_plans_without_the_data(bench: Bench, tmp_path: Path):
    done = bench("plan", PAPER, "--profile", "imagenet", "--json", "--store", tmp_path)
    assert done.code == 0, done.err
    plan = json.loads(done.out)
    assert plan["unresolved"]
    assert {stage["key"] for stage in plan["stages"]} == {None}
    assert {stage["status"] for stage in plan["stages"]} == {"pending"}
    steps = {stage["title"]: stage["steps"] for stage in plan["stages"]}
    assert steps["MAE, seed 0"] == 800 * (1281167 // 1024)
    told = bench("plan", PAPER, "--profile", "imagenet", "--store", tmp_path).out
    assert "--set data.path=DIR" in told
    assert "assumed: 1,281,167 training images, as the suite says" in told
    done = bench("run", PAPER, "--profile", "imagenet", "--store", tmp_path / "store")
    assert done.code == 2
    assert "--set data.path=DIR" in done.err
    assert not (tmp_path / "store").exists()


def test_steps_and_epochs_are_two_ways_to_say_the_same(plan_of):
    def mae(*sets: str) -> Stage:
        return row_of(plan_of(sets=list(sets)), "MAE").chain[0]

    # 1,097 images in batches of 64: 17 steps an epoch
    epochs = mae("mae.steps=null", "mae.epochs=2")
    assert epochs.steps == 34
    assert epochs.key == mae("mae.steps=34").key != mae("mae.steps=35").key
    plain = mae()
    assert plain.key == mae("mae.lr=null", "mae.base_lr=12e-3").key
    assert plain.key == mae("mae.warmup=null", "mae.warmup_steps=4").key
    assert plain.key != mae("mae.warmup=null", "mae.warmup_steps=5").key


def test_a_search_becomes_rows_and_its_template_is_none(plan_of):
    plan = plan_of(SWEEP, profile="tiny")
    names = list(plan.suite.variants)
    assert len(names) == 9
    assert "MAE-CT" not in names
    assert names[:2] == ["MAE", "MAE-CT queue_size=128 augment=min"]
    kinds = Counter(stage.kind for stage in plan.stages.values())
    assert kinds == {"mae": 2, "head": 16, "tune": 16, "features": 18, "knn": 18}
    for size in (128, 256, 512, 1024):
        for augment in ("min", "aug"):
            head = row_of(plan, f"MAE-CT queue_size={size} augment={augment}").chain[1]
            assert head.settings["train"]["queue_size"] == size
            assert (head.settings["views"][0]["jitter"] > 0) == (augment == "aug")


SWEEPS = (
    "sweep_queue",
    "sweep_augment",
    "sweep_model",
    "sweep_cross",
    "ablations",
    "explore",
    "sweep_rungs",
)


@pytest.mark.parametrize("name", SWEEPS)
def test_every_sweep_plans_at_every_scale(name: str, plan_of):
    path = SMOKE.with_name(f"{name}.yaml")
    for profile in ("digits", "tiny", "cifar10", "imagenet"):
        plan = plan_of(path, profile=profile)
        assert plan.suite.cells.keys() <= {row.variant.name for row in plan.rows}
        kinds = Counter(stage.kind for stage in plan.stages.values())
        # the cells of a seed share what they have in common
        assert kinds["mae"] < len(plan.rows)
        if profile == "tiny":
            assert len(plan.stages) <= 220
            assert {s.steps for s in plan.stages.values() if s.trains} == {40, 20}


#: setting -> (a value other than smoke.yaml's, the first stage that it changes)
SWEEPABLE = {
    "augment": ("aug", "head"),
    "stages": ("{none: [mae, tune]}", "tune"),
    "head.queue_size": (128, "head"),
    "head.temperature": (0.3, "head"),
    "tune.topk": (1, "tune"),
    "tune.temperature": (0.3, "tune"),
    "tune.frozen": (0.0, "tune"),
    "tune.layer_decay": (0.9, "tune"),
    "tune.target_ema": (0.9, "tune"),
    "tune.encoder_ema": (0.9, "tune"),
    "tune.exclude_own": ("false", "tune"),
    "tune.positive": ("no_swap", "tune"),
    "model": ("{wide: {dim: 64}}", "mae"),
    "model.patch_size": (4, "mae"),
    "augment.min.view0.jitter": (0.5, "head"),
}


def searched(tmp_path: Path, search: str) -> Path:
    """A suite with smoke.yaml's profile and a search over MAE-CT."""
    path = tmp_path / "search.yaml"
    path.write_text(
        f"suite: search\nprofile: tiny\nprofiles_from: {SMOKE}\nprofiles: {{}}\nseeds: [0]\n"
        "evaluate: [knn]\nvariants:\n  MAE-CT: {stages: [mae, head, tune], augment: min}\n"
        f"search:\n  variant: MAE-CT\n{search}"
    )
    return path


def test_each_setting_of_the_method_can_be_swept(plan_of, tmp_path: Path):
    axes = [f"    {name}: {v if str(v)[0] == '{' else [v]}\n" for name, (v, _) in SWEEPABLE.items()]
    text = "".join(axes).replace("'", "")
    plan = plan_of(searched(tmp_path, f"  method: each\n  grid:\n{text}"), seeds=1)
    base = row_of(plan, "MAE-CT")  # stays a row: what the others are compared with
    assert "MAE-CT" not in plan.suite.cells
    assert len(plan.suite.cells) == len(SWEEPABLE)
    keys = {stage.kind: stage.key for stage in base.chain}
    for (label, cell), (name, (_, first)) in zip(
        plan.suite.cells.items(), SWEEPABLE.items(), strict=True
    ):
        assert list(cell) == [name]
        chain = row_of(plan, label).chain
        changed = [stage.kind for stage in chain if stage.key != keys[stage.kind]]
        assert changed[0] == first, label
        assert changed[-1] == "tune", label


def test_released_weights_can_be_set_and_swept(plan_of, tmp_path: Path):
    """For the rows that name no start themselves."""
    files = [tmp_path / "one.pth", tmp_path / "other.pth"]
    for file in files:
        file.write_text(file.name)
    plan = plan_of(sets=[f"init={files[0]}"])
    for name, start in (
        ("raw pixels", "init"),
        ("random encoder", "init"),
        ("NNCLR without MAE", "init"),
        ("MAE", "weights"),
        ("MAE-CT", "weights"),
    ):
        assert start in next(row_of(plan, name).stages()).settings, name
    grid = f"  grid: {{init: {{one: {files[0]}, other: {files[1]}}}}}\n"
    plan = plan_of(searched(tmp_path, grid), seeds=1)
    names = ["MAE-CT init=one", "MAE-CT init=other"]
    weights = [row_of(plan, name).chain[0].settings["weights"] for name in names]
    assert [*plan.suite.variants] == names
    assert len({*weights}) == 2


def test_a_profile_may_do_without_a_row_or_give_it_another_chain(plan_of, tmp_path: Path):
    path, text = tmp_path / "suite.yaml", SMOKE.read_text()
    own = "    variants: {MAE-CT_aug: null, MAE-CT: {stages: [mae, tune]}}\n"
    path.write_text(text.replace("    numerics:", f"{own}    numerics:"))
    plan = plan_of(path)
    assert "MAE-CT_aug" not in plan.suite.variants
    assert [stage.kind for stage in row_of(plan, "MAE-CT").chain] == ["mae", "tune"]


def test_a_named_choice_may_change_several_settings(plan_of, tmp_path: Path):
    grid = "    model: {small: {dim: 16}, deep: {depth: 3, dim: 48}}\n"
    plan = plan_of(searched(tmp_path, f"  grid:\n{grid}"), seeds=1)
    models = {row.variant.name: row.variant.row.model for row in plan.rows}
    assert models["MAE-CT model=small"].dim == 16
    assert (models["MAE-CT model=deep"].dim, models["MAE-CT model=deep"].depth) == (48, 3)
    assert "MAE-CT" not in models


@pytest.mark.parametrize("profile", ["tiny", "digits", "cifar10", "imagenet"])
def test_one_search_varies_several_rows_alike(profile: str, plan_of):
    """`lr_scale` is of a row's last stage; a row that others are matched to stays one itself."""
    plan = plan_of(SMOKE.with_name("search_lr.yaml"), profile=profile, seeds=1)
    rows = {row.variant.name: row.chain for row in plan.rows}
    varied = plan.suite.search.variants
    assert rows.keys() == {"MAE-CT", *(f"{v} lr_scale={s}" for v in varied for s in (0.5, 1, 2))}
    for name in varied:
        chains = [rows[f"{name} lr_scale={scale}"] for scale in (0.5, 1, 2)]
        rates = [chain[-1].settings["train"]["lr"] for chain in chains]
        assert rates == [0.5 * rates[1], rates[1], 2 * rates[1]]
        assert len({tuple(stage.key for stage in chain[:-1]) for chain in chains}) == 1
    # the rate that a profile has chosen is one of those tried
    assert rows["MAE-CT"] in [rows[f"MAE-CT lr_scale={scale}"] for scale in (0.5, 1, 2)]


def test_a_random_search_draws_its_cells_once_and_for_all(plan_of, tmp_path: Path):
    grid = "  grid: {head.queue_size: [128, 256, 512, 1024], tune.topk: [1, 2, 3, 4, 5]}\n"

    def drawn(text: str) -> list[str]:
        path = searched(tmp_path, f"  method: random\n{text}{grid}")
        return list(plan_of(path, seeds=1).suite.cells)

    six = drawn("  samples: 6\n")
    assert len(set(six)) == 6
    assert drawn("  samples: 6\n") == six
    assert set(drawn("  samples: 8\n")) > set(six)  # more samples keep those there are
    assert drawn("  samples: 6\n  seed: 1\n") != six
    assert len(drawn("  samples: 20\n")) == 20


def test_a_random_search_draws_from_a_range(plan_of, tmp_path: Path):
    grid = "  grid: {tune.lr: {loguniform: [1e-4, 1e-1]}, tune.topk: [1, 2]}\n"

    def drawn(samples: int) -> list[tuple[float, int]]:
        path = searched(tmp_path, f"  method: random\n  samples: {samples}\n{grid}")
        tunes = [row.variant.row.tune for row in plan_of(path, seeds=1).rows]
        return [(tune.lr, tune.topk) for tune in tunes]

    many = drawn(40)
    rates = sorted(rate for rate, _ in many)
    assert len(set(rates)) == 40
    assert 1e-4 <= rates[0] < 5e-4
    assert 1e-3 < rates[20] < 1e-2
    assert [sum(topk == k for _, topk in many) for k in (1, 2)] == [20, 20]
    assert drawn(6) == many[:6]  # more samples keep those there are


# --------------------------------------------------------------------------- searches that explore


def explored(tmp_path: Path, plan_of) -> Plan:
    path = searched(tmp_path, "  asha: true\n  grid: {tune.topk: [1, 2, 3]}\n")
    return plan_of(path, seeds=2)


def test_what_a_search_left_out_stays_out(plan_of, tmp_path: Path):
    plan = explored(tmp_path, plan_of)
    store = Store(tmp_path / "store")
    store.create()
    assert of_cells(plan).keys() == plan.stages.keys()  # no row but the cells
    stopped = row_of(plan, "MAE-CT topk=2", 1)
    untried = [row_of(plan, "MAE-CT topk=3", seed) for seed in (0, 1)]
    run_to_its_end = [row_of(plan, "MAE-CT topk=1", seed) for seed in (0, 1)]
    kept = {stage.key for row in run_to_its_end for stage in row.stages()}
    search = Search(plan, 1, store, "1", None)
    search._seeds = {"MAE-CT topk=1": 2, "MAE-CT topk=2": 1}
    pruned = {
        stage.key: search.why_left_out(stage.key)
        for row in (stopped, *untried)
        for stage in row.stages()
        if stage.key not in kept
    }
    for stage in plan.stages.values():
        if stage.key not in pruned:
            write_record(store, stage, pid=1)
    about = {"suite": "search", "profile": "tiny", "command": "", "started": "", "source": {}}
    counts = {"env": {}, "workers": 1, "stages": len(plan.stages), "cached": 0}
    same = search_identity(plan.suite)
    store.write_run(Run(id="1", search=same, pruned=pruned, **about, **counts))
    again = make_plan(plan.suite, store)
    assert {stage.key for stage in again.with_status("pruned")} == pruned.keys()
    assert "0 to run, " in plan_summary(again)
    # what was left out costs nothing, however wide its encoder
    wide = make_plan(plan.suite, store)
    for stage in wide.stages.values():
        stage.settings |= {"model": {"dim": 1024}, "numerics": {"precision": "bf16"}}
        stage.state.record = None  # so that no rate is measured
    assert estimate.assumed(wide.with_status("pruned"), {}) is not None
    told = plan_data(wide)
    assert told["assumed_gpu_hours"] is None
    assert {stage["assumed_gpu_hours"] for stage in told["stages"]} == {None}
    assert execute(again, store, RunOptions()) == {}  # starts nothing
    view = build_view(again, store, "")
    assert view.variants == ["MAE-CT topk=1", "MAE-CT topk=2"]
    assert "2 of 3 cells were tried, 1 of them stopped early" in view.notes[-1]
    reasons = {s["reason"] for s in view.stages.to_dicts() if s["status"] == "pruned"}
    assert reasons == {"stopped after 1 of 2 seeds by ASHA, others did better"}
    # another search, even one with a seed more, decides for itself
    other = load_suite(plan.suite.path, seeds=3)
    assert make_plan(other, store).with_status("pruned") == []


def splits(plan: Plan) -> set[str]:
    return {s.settings["split"] for s in plan.stages.values() if s.kind == "knn"}


def test_a_search_compares_on_the_selection_split_unless_told_otherwise(plan_of, tmp_path: Path):
    """One that goes by results must not be told otherwise."""
    assert splits(plan_of()) == {"test"}
    assert splits(plan_of(SWEEP, profile="tiny")) == {"selection"}
    assert splits(plan_of(SWEEP, profile="tiny", sets=["report_on=test"])) == {"test"}
    store = Store(tmp_path / "none")
    for split, said in (
        ("selection", "compared on the selection split"),
        ("test", "printed on the test split, so 8 cells were looked at there"),
    ):
        plan = plan_of(SWEEP, profile="tiny", sets=[f"report_on={split}"])
        assert said in build_view(plan, store, "").notes[-1]
    plan = explored(tmp_path, plan_of)
    assert splits(plan) == {"selection"}
    with pytest.raises(UserError, match="must not see the test split"):
        load_suite(plan.suite.path, sets=["report_on=test"])


# ------------------------------------------------------------------- what the store already has


@pytest.fixture
def chain(plan_of, store: Store) -> list[Stage]:
    """MAE, head and tuning of one row, all complete in the store."""
    stages = row_of(plan_of(), "MAE-CT").chain
    for stage in stages:
        write_record(store, stage, content=stage.kind.encode())
    return stages


def test_a_stage_travels_without_what_the_store_holds_of_it(chain, store):
    assessed(chain, store)
    tune = pickle.loads(pickle.dumps(chain[2]))
    assert chain[2].record is not None and tune.record is None
    assert (tune.key, tune.settings) == (chain[2].key, chain[2].settings)
    assert tune.inputs["encoder"].key == tune.inputs["head"].inputs["encoder"].key == chain[0].key


def assessed(stages: list[Stage], store: Store, **options: bool) -> list[tuple[str, str | None]]:
    for stage in stages:
        assess(stage, store, **options)
    return [(stage.status, stage.reason) for stage in stages]


def test_complete_stages_are_cached(chain, store):
    assert assessed(chain, store) == [("cached", None)] * 3


def test_what_was_never_tried_is_pending(plan_of, store):
    stages = row_of(plan_of(), "MAE-CT").chain
    assert assessed(stages, store) == [("pending", None)] * 3


def test_a_failure_is_remembered_and_tried_again(plan_of, store):
    (mae,) = row_of(plan_of(), "MAE").chain
    write_record(store, mae, status="failed")
    assert assessed([mae], store) == [("pending", "failed before: it went wrong")]


def test_changed_code_is_stale_and_names_the_modules(chain, store):
    head = chain[1]
    modules = head.code.modules | {"maect.heads": "another"}
    write_record(store, head, content=b"head", code=Code(hash="another", modules=modules))
    states = assessed(chain, store)
    assert states[0] == ("cached", None)
    assert states[1] == ("stale", "code changed: maect.heads")
    assert states[2] == ("pending", f"its input is redone: {head.title}")
    assert assessed(chain, store, keep_stale=True)[1:] == [
        ("cached", "code changed: maect.heads"),
        ("cached", None),
    ]


def test_a_changed_input_makes_its_descendants_stale(chain, store):
    write_record(store, chain[0], content=b"other weights")
    assert assessed(chain, store) == [
        ("cached", None),
        ("stale", "input 'encoder' has other content than before"),
        ("pending", f"its input is redone: {chain[1].title}"),
    ]


def test_a_missing_input_leaves_what_builds_on_it_pending(chain, store):
    state = store.state(chain[0].key)
    store.set_aside(state, "it does not fit its checksum")
    states = assessed(chain, store)
    assert states[0][0] == "pending"
    assert states[1] == ("pending", f"its input is redone: {chain[0].title}")
    # the same weights again: nothing else needs to be redone
    write_record(store, chain[0], content=b"mae")
    assert assessed(chain, store) == [("cached", None)] * 3


def test_an_earlier_success_outlives_a_later_failure(chain, store):
    write_record(store, chain[2], status="failed")
    assert assessed(chain, store)[2] == ("cached", None)


def test_a_finished_plan_is_all_cached_and_told_in_a_few_lines(store, bench: Bench):
    plan = make_plan(load_suite(SMOKE), store)
    for stage in plan.stages.values():
        write_record(store, stage)
    plan = make_plan(load_suite(SMOKE), store)
    assert len(plan.with_status("cached")) == len(plan.stages)
    done = bench("plan", SMOKE, "--store", store.root)
    assert "54 cached, 0 to run" in done.out
    assert done.out.count("\n") < 6
    # a screenful; of stages that no row above has
    told = bench("plan", SMOKE, "--store", store.root, "--seeds", 10).out.splitlines()
    assert len(told) < 24
    assert re.search(r"^MAE-CT +40 of 50 +\S+ m?s  head 20, tune 20$", "\n".join(told), re.M)
    lines = bench("plan", SMOKE, "--store", store.root, "--seeds", 10, "--stages").out.splitlines()
    assert len([line for line in lines if ", seed 9" in line]) == 26


def test_columns_have_their_names_before_anything_is_measured(plan_of, store):
    table, other = build_tables(build_view(plan_of(PAPER), store, ""))
    metrics = [column for column in table.columns if column.kind == "metric"]
    assert [(c.label, c.unit) for c in metrics] == [("k-NN, k=10", "%"), ("linear probe", "%")]
    assert other.columns[0].label == "1-shot"
    assert table.cells["MAE", "knn"].state == "pending"


def test_only_takes_the_rows_that_fit(plan_of, store):
    suite = load_suite(SMOKE)
    whole = make_plan(suite, store)
    some = make_plan(suite, store, only="MAE-CT*")
    assert {row.variant.name for row in some.rows} == {"MAE-CT", "MAE-CT_aug"}
    assert some.stages.keys() < whole.stages.keys()
    assert Counter(s.kind for s in some.stages.values())["mae"] == 2
    # the length of a compute-matched row does not depend on which others are run
    matched = make_plan(suite, store, only="*matched")
    assert matched.stages.keys() < whole.stages.keys()


def test_device_hours_are_predicted_from_the_rates_of_like_stages(bench: Bench, plan_of, store):
    maes = [row_of(plan_of(store=store.root), "MAE", seed).chain[0] for seed in (0, 1)]
    for stage, wall_s in zip(maes, (1.0, 3.0), strict=True):
        write_record(store, stage, wall_s=wall_s)
    plan = plan_of(store=store.root)
    longer = row_of(plan, "MAE, compute-matched").chain[0]
    device, hours, unknown = estimate.device_hours(plan, [longer, row_of(plan, "MAE").features])
    times = longer.flops / maes[0].flops / 3600
    assert hours == pytest.approx((3 * times, 1 * times, 3 * times))
    assert (device, unknown) == ("cpu", ["features"])
    out = bench("plan", SMOKE, "--store", store.root).out
    assert "core-s (" in out
    assert "by the middle 80 % of the rates in the store)" in out
    assert "not counted, as none has run: features, head, knn, probe, tune" in out
    data = json.loads(bench("plan", SMOKE, "--store", store.root, "--json").out)
    assert data["predicted_device_hours"]["low"] <= data["predicted_device_hours"]["hours"]


def test_times_are_of_as_many_devices_as_like_stages_held(plan_of, store):
    """And of the kind of device that ran last: a CPU tells nothing of a GPU."""
    first, second, third = (
        row_of(plan_of(store=store.root, seeds=3), "MAE", seed).chain[0] for seed in range(3)
    )
    write_record(store, first, wall_s=30.0)  # began long before the other
    two = Cost(devices=2, device_kind="gpu", device_model="a GPU")
    write_record(store, second, wall_s=4.0, cost=two)
    plan = plan_of(store=store.root, seeds=3)
    known = estimate.rates(plan)
    assert estimate.seconds(third, known) == pytest.approx(4.0)
    assert estimate.device_hours(plan, [third]) == ("gpu", pytest.approx((8 / 3600,) * 3), [])


def test_an_evaluation_may_be_of_some_rows_and_of_the_first_seeds(plan_of):
    told = ["evaluations.probe.rows=[MAE]", "evaluations.probe.seeds=1"]
    have = [
        (row.variant.name, row.seed)
        for row in plan_of(sets=told).rows
        if "probe" in row.evaluations
    ]
    assert have == [("MAE", 0)]
