"""Keys: what is in them and what is not. Code: what counts as a change."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
from bench_helpers import ROOT, SMOKE, fill_store
from pydantic import BaseModel

from bench.plan.identity import stage_key
from bench.plan.stage import Plan
from maect import evals, settings

TEXT = SMOKE.read_text()
PROTOCOLS = SMOKE.with_name("protocols.yaml")


def keys(plan: Plan) -> set[str]:
    return set(plan.stages)


def row_keys(plan: Plan, variant: str, seed: int = 0) -> dict[str, str]:
    row = next(r for r in plan.rows if (r.variant.name, r.seed) == (variant, seed))
    return {stage.kind: stage.key for stage in row.stages()}


@pytest.fixture
def edited(plan_of, tmp_path: Path):
    """The plan of smoke.yaml with some of its text replaced."""

    def plan(*changes: tuple[str, str], **options: object) -> Plan:
        text = TEXT
        for old, new in changes:
            assert old in text
            text = text.replace(old, new, 1)
        path = tmp_path / "elsewhere" / "other.yaml"
        path.parent.mkdir(exist_ok=True)
        path.write_text(text)
        return plan_of(path, **options)

    return plan


def test_names_orders_paths_and_tables_are_not_in_a_key(plan_of, edited, tmp_path: Path):
    plain = keys(plan_of())
    mae_ct = "  MAE-CT: {stages: [mae, head, tune], augment: min}\n"
    assert keys(edited()) == plain
    assert keys(edited((mae_ct, ""), ("variants:\n", f"variants:\n{mae_ct}"))) == plain
    renamed = [("MAE, compute-matched:", "a longer MAE:"), ("suite: smoke", "suite: b")]
    renamed += [("title: Smoke test", "title: T"), ("baseline: MAE", "digits: 2")]
    renamed += [("about: a few", "about: some"), ("tiny:", "small:")]
    assert keys(edited(*renamed, ("profile: tiny", "profile: small"))) == plain
    for change in (
        ("[knn, probe]", "[probe, knn]"),
        ("mae: {steps: 40, batch_size: 64", "mae: {batch_size: 64, steps: 40"),
        ("isa: avx2}", "isa: avx2}\n    report_on: test"),
    ):
        assert keys(edited(change)) == plain
    assert keys(plan_of(store=tmp_path / "another")) == plain


def test_where_the_data_lie_is_not_in_a_key(plan_of, tmp_path, monkeypatch: pytest.MonkeyPatch):
    from bench.suite.load import data_info

    plain = keys(plan_of())
    monkeypatch.setenv("MAECT_DATA", str(tmp_path))
    data_info.cache_clear()
    moved = plan_of()
    data_info.cache_clear()
    assert keys(moved) == plain


def test_a_default_written_out_is_the_same_setting(edited, plan_of):
    written = edited(("frozen: 0.5", "frozen: 0.5, layer_decay: 0.65, weight_decay: 0.05"))
    assert keys(written) == keys(plan_of())


@pytest.mark.parametrize(
    ("setting", "changed", "kept"),
    [
        ("mae.lr=1e-3", {"mae", "head", "tune", "features", "knn", "probe"}, set()),
        ("model.dim=64", {"mae", "head", "tune", "features", "knn", "probe"}, set()),
        ("numerics.threads=2", {"mae", "head", "tune", "features", "knn", "probe"}, set()),
        ("numerics.precision=fp64", {"mae", "head", "tune", "features", "knn", "probe"}, set()),
        ("numerics.shards=2", {"mae", "head", "tune", "features", "knn", "probe"}, set()),
        ("head.temperature=0.2", {"head", "tune", "features", "knn", "probe"}, {"mae"}),
        ("augment.min.view0.flip=0.5", {"head", "tune", "features", "knn", "probe"}, {"mae"}),
        ("tune.topk=6", {"tune", "features", "knn", "probe"}, {"mae", "head"}),
        ("evaluations.probe.epochs=6", {"probe"}, {"mae", "head", "tune", "features", "knn"}),
        ("evaluations.knn.k=[5]", {"knn"}, {"mae", "head", "tune", "features", "probe"}),
        ("report_on=selection", {"knn", "probe"}, {"mae", "head", "tune", "features"}),
    ],
)
def test_a_setting_changes_its_stage_and_what_builds_on_it(setting, changed, kept, plan_of):
    before, after = row_keys(plan_of(), "MAE-CT"), row_keys(plan_of(sets=[setting]), "MAE-CT")
    assert {kind for kind in before if before[kind] != after[kind]} == changed
    assert {kind for kind in before if before[kind] == after[kind]} == kept


def test_frozen_blocks_are_one_setting_as_a_share_and_as_a_count(plan_of):
    share = plan_of()
    count = plan_of(sets=["tune.frozen=null", "tune.frozen_blocks=1"])
    assert row_keys(share, "MAE-CT") == row_keys(count, "MAE-CT")
    assert row_keys(share, "MAE-CT") != row_keys(plan_of(sets=["tune.frozen=1.0"]), "MAE-CT")


def test_hints_for_planning_without_data_are_not_in_a_key(plan_of):
    assert keys(plan_of(sets=["data.train_images=9", "data.classes=3"])) == keys(plan_of())
    absent = ["data.name=image_folder", "data.path=/nowhere", "data.train_images=2000"]
    plain, other = plan_of(sets=absent), plan_of(sets=[*absent[:2], "data.train_images=3000"])
    assert keys(plain) == keys(other) == keys(plan_of(sets=[*absent, "data.classes=7"]))


def test_a_worker_computes_no_number_from_settings(tmp_path, monkeypatch: pytest.MonkeyPatch):
    """`maect.settings` is not hashed as code: what it computes must stand in the key."""
    callers = set()

    def watched(function: Callable[..., object]) -> Callable[..., object]:
        def call(*given: object, **options: object) -> object:
            callers.add(sys._getframe(1).f_globals["__name__"])
            return function(*given, **options)

        return call

    own = [c for c in vars(settings).values() if isinstance(c, type) and issubclass(c, BaseModel)]
    for kind in {*own} - {BaseModel, settings.Settings}:
        for name, found in [*vars(kind).items()]:
            if callable(found) and not name.startswith("_"):
                monkeypatch.setattr(kind, name, watched(found))
    path = tmp_path / "every_kind.yaml"
    text = PROTOCOLS.read_text().replace("smoke.yaml", str(SMOKE))
    more = ", ".join({*evals.names()} - {"probe_augmented", "low_shot_finetune"})
    path.write_text(text.replace("evaluate: [", f"gallery: [MAE, MAE-CT]\nevaluate: [{more}, "))
    sets = [f"{kind}.steps=2" for kind in ("mae", "head", "tune")]
    slow = ("low_shot_finetune", "probe_dinov2", "probe_attentive")
    sets += [f"evaluations.{name}.epochs=1" for name in slow]
    store = fill_store(tmp_path / "store", suite=path, only="MAE*", sets=sets)
    ran = {store.state(key).record.kind for key in store.stage_keys()}
    assert ran == {"mae", "head", "tune", "features", "gallery", *evals.names()}
    assert "bench.plan.planner" in callers
    assert {name for name in callers if name.split(".")[0] == "maect"} == {"maect.settings"}


def test_seeds_differ_where_something_is_drawn(plan_of):
    plan = plan_of()
    for variant in ("MAE", "MAE-CT", "random encoder"):
        first, second = row_keys(plan, variant, 0), row_keys(plan, variant, 1)
        assert all(first[kind] != second[kind] for kind in first)
    first, second = row_keys(plan, "raw pixels", 0), row_keys(plan, "raw pixels", 1)
    assert {kind for kind in first if first[kind] == second[kind]} == {"features", "knn"}


def test_rows_of_different_augmentation_share_only_the_mae(plan_of):
    plan = plan_of()
    first, second = row_keys(plan, "MAE-CT"), row_keys(plan, "MAE-CT_aug")
    assert {kind for kind in first if first[kind] == second[kind]} == {"mae"}


def test_kind_inputs_and_data_are_in_a_key():
    key = stage_key("mae", {"a": 1}, {"x": "k"}, "data")
    assert key == stage_key("mae", {"a": 1}, {"x": "k"}, "data")
    assert stage_key("head", {"a": 1}, {"x": "k"}, "data") != key
    assert stage_key("mae", {"a": 1.5}, {"x": "k"}, "data") != key
    assert stage_key("mae", {"a": 1}, {"y": "k"}, "data") != key
    assert stage_key("mae", {"a": 1}, {"x": "l"}, "data") != key
    assert stage_key("mae", {"a": 1}, {"x": "k"}, "other data") != key
    assert stage_key("m", {"a": 1, "b": {"c": 2, "d": 3}}, {}, None) == stage_key(
        "m", {"b": {"d": 3, "c": 2}, "a": 1}, {}, None
    )


def test_recomputed_activations_are_in_no_key_as_they_change_no_bit(plan_of):
    def mae(*sets: str) -> str:
        return row_keys(plan_of(sets=[f"numerics.{one}" for one in sets]), "MAE")["mae"]

    assert mae() == mae("checkpoint_activations=true")
    assert mae() != mae("tf32=true")
    assert mae("compile=true") != mae("compile=true", "checkpoint_activations=true")


# ------------------------------------------------------------------------------------------ code

KINDS = ("mae", "head", "features", "knn")


def copy_sources(folder: Path) -> Path:
    ignored = shutil.ignore_patterns("__pycache__", "*.npz")
    for name in ("bench", "maect", "reports"):
        shutil.copytree(ROOT / name, folder / name, ignore=ignored)
    return folder


@pytest.fixture(scope="module")
def before(tmp_path_factory: pytest.TempPathFactory) -> dict[str, dict]:
    """The code of each kind of stage as it is."""
    return code_of(copy_sources(tmp_path_factory.mktemp("sources")))


def code_of(package: Path) -> dict[str, dict]:
    """What `bench.plan.identity.code` says of each kind of stage of a copy."""
    script = (
        "import json, sys; import maect; from bench.plan.identity import code;"
        "from bench.plan.stage import entry_modules;"
        f"assert maect.__file__.startswith({str(package)!r});"
        "print(json.dumps({k: code(*entry_modules(k)).model_dump() for k in sys.argv[1:]}))"
    )
    done = subprocess.run(
        [sys.executable, "-c", script, *KINDS],
        cwd=package,
        env=os.environ | {"PYTHONPATH": str(package), "PYTHONDONTWRITEBYTECODE": "1"},
        capture_output=True,
        text=True,
        check=True,
    )
    return json.loads(done.stdout)


@pytest.mark.parametrize(
    ("module", "old", "new", "changed"),
    [
        ("stages/loop", '"""The loop', '"""Another docstring. The loop', []),
        ("stages/loop", "class Batches:", "# a comment\n\n\nclass Batches:  # one more", []),
        ("streams", "integer of `bits` bits", "number", []),
        ("augment", "_CPU_PIECE = ", "_CPU_PIECE = 2 * ", ["mae", "head", "features"]),
        ("stages/loop", "FIRST_LOGGED = 20", "FIRST_LOGGED = 21", ["mae", "head"]),
    ],
    ids=["docstring", "comment", "inner docstring", "constant", "of training only"],
)
def test_what_counts_as_a_change_of_code_and_for_which_stages(
    module: str, old: str, new: str, changed: list[str], before: dict[str, dict], tmp_path: Path
):
    path = copy_sources(tmp_path) / "maect" / f"{module}.py"
    text = path.read_text()
    assert old in text
    path.write_text(text.replace(old, new, 1))
    after = code_of(tmp_path)
    assert [kind for kind in KINDS if after[kind]["hash"] != before[kind]["hash"]] == changed
    for kind in KINDS:
        had, has = before[kind]["modules"], after[kind]["modules"]
        differ = [name for name in has if has[name] != had[name]]
        expected = [f"maect.{module.replace('/', '.')}"] if kind in changed else []
        assert differ == expected


def test_modules_found_through_other_modules_are_code(before: dict[str, dict]):
    found = {entry: set(code["modules"]) for entry, code in before.items()}
    expected = {"mae", "loop", "job"}
    assert {f"maect.stages.{name}" for name in expected} <= found["mae"]
    expected = {"models", "parallel", "augment", "streams", "losses", "optim"}
    assert {f"maect.{name}" for name in expected} <= found["mae"]
    assert "maect.evals.neighbors" in found["knn"]
    stages = {name for name in found["knn"] if name.startswith("maect.stages.")}
    assert stages == {"maect.stages.evaluate", "maect.stages.job"}
