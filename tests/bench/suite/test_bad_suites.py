"""Mistakes in suites and arguments: exit code 2, one or two sentences, the line, what to write."""

from __future__ import annotations

import copy
import math
import os
import random
import subprocess
from contextlib import suppress
from pathlib import Path
from typing import Any

import pytest
import yaml
from _pytest.mark import ParameterSet
from bench_helpers import PAPER, SMOKE, SWEEP, Bench, Done, run_bench

from bench.errors import UserError
from bench.store.store import Store
from bench.suite.load import faults_of, load_suite

TEXT = SMOKE.read_text(encoding="utf-8")


def case(old: str, new: str, *says: str, at: str | None = None) -> ParameterSet:
    """`old` of smoke.yaml replaced by `new`: the message says all of `says`.

    `at`: the line it names holds this; by default it is the first line that was changed.
    """
    return pytest.param(old, new, says, at, id=new[:40])


#: as they stand in smoke.yaml
PROBE = "probe: {epochs: 5, batch_size: 256}"
NAMED = "{metric: knn"
NUMERICS = "    numerics: {precision: fp32, threads: 1, shards: 4, isa: avx2}"
TUNE = "    tune: {steps: 20, batch_size: 64, lr: 4.0e-3, warmup: 0.2, topk: 5, frozen: 0.5}\n"

CASES = [
    case("evaluate:", "devices: {gpu_share: 0}\nevaluate:", "devices.gpu_share", "greater than 0"),
    case("evaluate:", "devices: {gpu_share: 2}\nevaluate:", "devices.gpu_share", "equal to 1"),
    case(
        "evaluate:",
        "devices: {gpu_share: 0.33333}\nevaluate:",
        "devices.gpu_share",
        "Ray counts GPUs in ten-thousandths; write 0.3333",
    ),
    case("evaluate:", "devices: {accelerator_type: '?'}\nevaluate:", "devices.accelerator_type"),
    # ---------------------------------------------------------------------------- unknown names
    case("evaluate:", "evalute:", "'evalute'", "did you mean 'evaluate'?"),
    case("], augment: min", "], augmnet: min", "MAE-CT.augmnet'; did you mean 'augment'?"),
    case("baseline: MAE", "base_line: MAE", "did you mean 'baseline'?"),
    case("    numerics:", "    numeric:", "did you mean 'numerics'?"),
    case("patch_size: 2", "patchsize: 2", "did you mean 'patch_size'?"),
    case("lr: 3.0e-3", "learning_rate: 3.0e-3", "'mae.learning_rate'", "lr,"),
    case("{crop_scale", "{crop_scal", "'augment.mae.view0.crop_scal'; did you mean 'crop_scale'?"),
    case("{epochs: 5", "{rows: [MAEE], epochs: 5", "no variant 'MAEE'; did you mean 'MAE'?"),
    case("{epochs: 5", "{data: digit, epochs: 5", "'evaluations.probe.data.name'", "'digits'"),
    case("{epochs: 5", "{epoch: 5", "'evaluations.probe.epoch'; did you mean 'epochs'?"),
    case("profile: tiny", "profile: tinny", "did you mean 'tiny'?"),
    case("[knn, probe]\n\nvar", "[knn, prob]\n\nvar", "did you mean 'probe'?"),
    case("      probe:", "      prob:", "did you mean 'probe'?"),
    case("MAE: {stages: [mae]}", "MAE: {stages: [mea]}", "mae"),
    case("augment: aug}", "augment: agu}", "did you mean 'aug'?"),
    case("baseline: MAE", "baseline: MEA", "did you mean 'MAE'?"),
    case("columns: [knn", "rows: [MAE, MAE_CT]\n    columns: [knn", "did you mean 'MAE-CT'?"),
    case("probe, cost]", "probe, costs]", "did you mean 'cost'?"),
    case("probe, cost]", "knn.acuracy_k20]", "did you mean 'knn.accuracy_k20'?"),
    case("baseline: MAE", "groups: {all: [MAE, knn, nobody]}", "'nobody'"),
    case("name: digits", "name: digit", "did you mean 'digits'?"),
    case(NUMERICS, "    variants:\n      MAE-TC: {}", "did you mean 'MAE-CT'?", at="MAE-TC"),
    case("evaluate: [", "gallery: [MAE, MAE_CT]\nevaluate: [", "did you mean 'MAE-CT'?"),
    case("evaluate: [", "gallery: [MAE]\nevaluate: [", "two rows"),
    case("evaluate: [", "gallery: [raw pixels, random encoder]\nevaluate: [", "a stage 'mae'"),
    case("evaluate: [", f"primary: {NAMED}, row: MAE-TC, against: MAE}}\nevaluate: [", "'MAE-CT'?"),
    case("evaluate: [", f"primary: {NAMED}, row: MAE, against: MEA}}\nevaluate: [", "'MAE'?"),
    case("evaluate: [", f"secondary: [{NAMED}, row: MAE, against: MAE}}]\nevaluate: [", "two rows"),
    case("evaluate: [", "primary: {metric: cost}\nevaluate: [", "row"),
    case("match_compute: MAE-CT", "match_compute: MAE-TC", "did you mean 'MAE-CT'?"),
    case("match_compute: MAE-CT", "match_compute: MAE", "tunes"),
    case("compute: MAE-CT", "compute: NNCLR without MAE", "no match_compute of its own"),
    case("{init: random}", "{init: weights/none.pth}", "nor a checkpoint file here"),
    case("MAE: {stages: [mae]}", "MAE: {stages: [mae], init: pixels}", "'random'"),
    # --------------------------------------------------------------------------- types and values
    case("mae: {steps: 40", "mae: {steps: forty", "whole number", '"forty"'),
    case("lr: 3.0e-3", 'lr: "3.0e-3"', "write 0.003 without quotes"),
    case("mae: {steps: 40", "mae: {steps: 40.5", "whole number", "40.5"),
    case("mae: {steps: 40", "mae: {steps: 4e1", "write 40"),
    case("title: Smoke test", "title: 3.10", 'in quotes: "3.1"'),
    case(PROBE, "knn: {standardize: on}", "true or false", "write true"),
    case("mae: {steps: 40", "mae: {steps: 10:30", '"10:30"'),
    case(NUMERICS, "    numerics: 5", "'numerics' should be a mapping", "{name: value}"),
    case(NUMERICS, "    numerics:", "'numerics' should be a mapping", "null"),
    case("seeds: [0, 1]", "seeds: 0", "'seeds' should be a list"),
    case("[0.5, 1.0]", "[0.5, [1.0]]", "'augment.mae.view0.crop_scale[1]'", "number"),
    case("[0.5, 1.0]", "[0.5, 0.7, 1.0]", "write 2"),
    case("[0.5, 1.0]", "[0.5]", "too few values; write 2"),
    case("[0.5, 1.0]", "[0.5, 0.1]", "low first"),
    case("lr: 3.0e-3", "lr: -3.0e-3", "greater than 0"),
    case("lr: 3.0e-3", "lr: .nan", ".nan", "finite"),
    case("lr: 3.0e-3", "lr: 1e999", "1e999", "finite"),
    case("mae: {steps: 40", f"mae: {{steps: {'9' * 5000}", "smaller"),
    case("mlp_ratio: 2.0", "mlp_ratio: 1e308", "smaller"),
    case("pool: mean", "pool: men", "did you mean 'mean'?"),
    case(TUNE, "", "'tune' is missing; add it", at="  tiny:"),
    case("      dim: 32\n", "", "needs dim", at="size: custom"),
    case("name: digits, image_size: 8", "image_size: 8", "'data.name' is missing"),
    # --------------------------------------------------------------------- what cannot go together
    case("queue_size: 256", "queue_size: 250", "write 256", at="    head:"),
    case(TUNE, TUNE.replace("64", "96"), "head.queue_size 256", "write 288", at="queue_size"),
    case("patch_size: 2", "patch_size: 3", "write 2 or 4"),
    case("patch_size: 2", "patch_size: 16", "write 8"),
    case("topk: 5", "topk: 257", "queue of 256"),
    case(PROBE, "knn: {k: [5000]}", "1097 training images"),
    case("batch_size: 64", "batch_size: 2048", "1097 training images", "at most 1097"),
    case("      heads: 2", "      heads: 3", "dim 32", "3 heads", at="      dim: 32"),
    case("mae: {steps: 40", "mae: {mask_ratio: 0.99, steps: 40", "lower"),
    case("mae: {steps: 40", "mae: {mask_ratio: 1e-20, steps: 40", "raise"),
    case("frozen: 0.5}", "frozen_blocks: 3}", "at most 2"),
    case("mlp_ratio: 2.0", "mlp_ratio: 0.01", "raise it"),
    case("shards: 4,", "shards: 128,", "numerics.shards", at="mae: {steps"),
    case("shards: 4,", "shards: 3,", "power of two"),
    case("shards: 4,", "shards: 4, processors: avx2 Intel,", "take it out", at="shards: 4"),
    case("mae: {steps: 40", "mae: {epochs: 4, steps: 40", "exactly one of steps and epochs"),
    case("lr: 3.0e-3, ", "", "exactly one of lr and base_lr"),
    case("[mae, head, tune]", "[tune, mae]", "e.g. mae, head, tune"),
    case("MAE: {stages: [mae]}", "MAE: {stages: [mae, mae]}", "each once"),
    case("      mae: {view0", "      other: {view0", "pipeline 'mae'", at="  MAE: {stages"),
    # -------------------------------------------------------------------------------- dotted paths
    case("[mae]}", "[mae], set: {mae.step: 3}}", "'mae.step'; did you mean 'steps'?"),
    case("[mae]}", "[mae], set: {mae.steps: 3, mae: {steps: 4}}}", "'mae' stands twice"),
    case("[mae]}", "[mae], set: {mae: {steps: 4}, mae.steps: 4}}", "'mae.steps' stands twice"),
    case("[mae]}", "[mae], set: {mae: 4, mae.steps: 4}}", "'mae.steps' stands twice"),
    case("[mae]}", "[mae], set: {mae..steps: 4}}", "a part without a name"),
    case("[mae]}", f"[mae], set: {{{'a.' * 90}b: 4}}}}", "too many parts"),
    # ------------------------------------------------------------------------------- seeds, names
    case("seeds: [0, 1]", "seeds: [0, 1, 0]", "0 stands twice"),
    case("seeds: [0, 1]", "seeds: []", "'seeds' is empty"),
    case("seeds: [0, 1]", "seeds: [0, -1]", "'seeds[1]'", "equal to 0"),
    case("[knn, probe]\n\nvar", "[knn, knn]\n\nvar", "'knn' stands twice"),
    case("suite: smoke", "suite: ../smoke", "letters, digits"),
    # --------------------------------------------------------------------------------------- YAML
    case("notes:", "seeds: [3]\nnotes:", "'seeds' stands twice", "keep one", at="seeds: [0, 1]"),
    case("title: Smoke test", "title: !!python/object/apply:os.system [ls]", "tag", "plain values"),
    case("title: Smoke test", "title: !!str 5", "tag", "plain values"),
    case("  MAE: {stages: [mae]}", "  MAE:\n    <<: {stages: [mae]}", "merge keys", at="<<"),
    case("title: Smoke test", "title: *nothing", "(&name)"),
    case("title: Smoke test", "title: &a [*a]", "fewer aliases"),
    case("  MAE: {stages: [mae]}", "\tMAE: {stages: [mae]}", "indent with spaces"),
    case("title: Smoke test", "title: Smoke: test", "quotes"),
    case("seeds: [0, 1]", "seeds: [0, 1", "bracket is not closed"),
    case("title: Smoke test", 'title: "Smoke test', "quote"),
    case("title: Smoke test", "---\ntitle: Smoke test", "one suite"),
    case("title: Smoke test", "title: Smoke\x00test", "U+0000"),
    case("title: Smoke test", 'title: "\\ud800"', "no character"),
]


def line_of(word: str, text: str) -> int:
    """The line of a text, from 1, on which a word first stands."""
    return text[: text.index(word)].count("\n") + 1


def first_change(text: str) -> int:
    """The first line of a text, from 1, that smoke.yaml does not have."""
    before, after = TEXT.splitlines(), text.splitlines()
    return next(n for n, line in enumerate(after, 1) if n > len(before) or line != before[n - 1])


def assert_refused(done: Done, *says: str) -> None:
    """Exit code 2, and one line of one or two sentences."""
    assert done.code == 2, done
    assert "Traceback" not in done.err
    assert done.err.startswith("error: ")
    assert done.err.count("\n") == 1
    assert len(done.err) < 420
    for text in says:
        assert text in done.err, done.err


@pytest.fixture
def suite_folder(tmp_path: Path) -> Path:
    """A folder with the suites that others take their profiles from."""
    for source in (PAPER, SMOKE):
        (tmp_path / source.name).write_text(source.read_text())
    return tmp_path


@pytest.mark.parametrize(("old", "new", "says", "at"), CASES)
def test_a_broken_suite_is_refused_with_its_line(old, new, says, at, bench: Bench, tmp_path: Path):
    assert old in TEXT
    path, text = tmp_path / "broken.yaml", TEXT.replace(old, new, 1)
    path.write_text(text, encoding="utf-8")
    line = line_of(at, text) if at else first_change(text)
    assert_refused(bench("plan", path), f"{path}:{line}: ", *says)


def test_numbers_and_words_are_read_as_people_mean_them(bench: Bench, tmp_path: Path):
    """PyYAML takes `3e-3` for a text, and `on`, `10:30`, `017` for something else."""
    text = TEXT.replace("lr: 3.0e-3", "lr: 3e-3").replace("title: Smoke test", "title: on")
    text = text.replace("Digits, a few steps", "10:30").replace("{steps: 40", "{steps: 040")
    path = tmp_path / "suite.yaml"
    path.write_text(text)
    done = bench("plan", path, "--json")
    assert done.code == 0
    assert done.out == bench("plan", SMOKE, "--json").out


# ------------------------------------------------------------------------ files, flags, overlays


def test_aliases_may_not_blow_a_file_up(bench: Bench, tmp_path: Path):
    bomb = "a0: &a0 [x, x, x, x, x, x, x, x, x, x]\n"
    for n in range(1, 12):
        bomb += f"a{n}: &a{n} [{', '.join([f'*a{n - 1}'] * 10)}]\n"
    path = tmp_path / "bomb.yaml"
    path.write_text(bomb + TEXT)
    assert_refused(bench("plan", path), f"{path}:1: ", "fewer aliases")
    path.write_text(f"long: &long {'x' * 500_000}\nmany: [{'*long, ' * 5000}]\n")
    assert_refused(bench("plan", path), f"{path}:", "fewer aliases")


def test_deep_nesting_is_refused(bench: Bench, tmp_path: Path):
    path = tmp_path / "deep.yaml"
    path.write_text("suite: " + "[" * 5000)
    assert_refused(bench("plan", path), str(path))
    path.write_text("suite: " + "[" * 60 + "]" * 60)
    assert_refused(bench("plan", path), f"{path}:1: ")


@pytest.mark.parametrize(
    ("content", "says"),
    [
        (b"", "should be a mapping that starts with 'suite: NAME'"),
        (b"# nothing\n", "should be a mapping"),
        (b"- suite\n- smoke\n", "should be a mapping"),
        (b"smoke\n", "should be a mapping"),
        (b"\xff\xfes\x00u\x00", "UTF-8"),
        (b"suite: a\ntitle: caf\xe9\n", ":2: is not UTF-8 text; save it as UTF-8"),
        (b"#" * 1_000_001, "larger than"),
    ],
    ids=["empty", "comment", "list", "word", "utf-16", "latin-1", "too-large"],
)
def test_what_is_no_suite_is_refused(content: bytes, says: str, bench: Bench, tmp_path: Path):
    path = tmp_path / "file.yaml"
    path.write_bytes(content)
    assert_refused(bench("plan", path), str(path), says)


def test_files_that_are_not_there(bench: Bench, tmp_path: Path):
    for word in ("smok.yaml", "smoke", "Smoke.yml", "suites/smoke.yaml"):
        done = bench("plan", SMOKE.parent / word)
        assert_refused(done, "there is no suite file", "did you mean '", "suites/smoke.yaml'?")
    assert_refused(bench("plan", tmp_path), str(tmp_path), "is no file")
    assert_refused(bench("plan", "x" * 5000), "xxx...': file name too long")
    fifo = tmp_path / "fifo.yaml"
    os.mkfifo(fifo)
    assert_refused(bench("plan", fifo), "is no file")


def test_profiles_from(bench: Bench, tmp_path: Path):
    text = SWEEP.read_text()
    path = tmp_path / "sweep.yaml"
    path.write_text(text)
    (tmp_path / SMOKE.name).write_text(SMOKE.read_text())
    line = line_of("profiles_from", text)
    done = bench("plan", path)
    assert_refused(done, f"{path}:{line}: ", "there is no suite file", "paper_table.yaml")
    # a mistake in the other file is told with that file's name and line
    other = tmp_path / "paper_table.yaml"
    broken = PAPER.read_text().replace("patch_size: 2", "patch_size: 5", 1)
    other.write_text(broken)
    line = line_of("patch_size: 5", broken)
    assert_refused(bench("plan", path), f"{other}:{line}: ", "write 4 or 8")


@pytest.mark.parametrize(
    ("given", "says"),
    [
        ("mae.step=5", "unknown setting 'mae.step'; did you mean 'steps'?"),
        ("mea.steps=5", "unknown setting 'mea'; did you mean 'mae'?"),
        ("mae.steps=many", "'mae.steps' should be a whole number, not \"many\""),
        ("mae.steps=0", "'mae.steps' should be greater than 0, not 0"),
        ("mae.steps=", "exactly one of steps and epochs"),
        ("mae=5", "'mae' should be a mapping"),
        ("mae.steps", "write it as path=value"),
        ("=5", "a part without a name"),
        ("mae..steps=5", "a part without a name"),
        (f"{'a.' * 3000}b=5", "too many parts"),
        ("mae.steps=[1", "bracket is not closed"),
        ("mae.steps=!!int 5", "plain values"),
        ("mae.steps=*a", "(&name)"),
        ("mae.epochs=5", "exactly one of steps and epochs"),
        ("head.queue_size=100", "write 128"),
        ("tune.batch_size=96", "head.queue_size 256 is not a multiple"),
        ("model.patch_size=3", "write 2 or 4"),
        ("evaluations.probe.epochs=no", "'evaluations.probe.epochs'"),
        ("evaluations.probes.epochs=5", "did you mean 'probe'?"),
        ("seeds=[1]", "unknown setting 'seeds'"),
        ("devices.gpu_share=2", "'devices.gpu_share' should be less than or equal to 1, not 2"),
        ("devices=3", "'devices' should be a mapping"),
    ],
)
def test_a_bad_set_is_told_with_the_argument(given: str, says: str, bench: Bench):
    done = bench("plan", SMOKE, "--set", given)
    assert_refused(done, "error: --set ", given[:40], says)


@pytest.mark.parametrize(
    ("given", "says"),
    [
        ("stages=[mae, head, simclr]", "simclr does not go on with head; write simclr_head"),
        ("stages=[mae, simclr, tune]", "a head, its tuning, each once"),
        ("stages=[mae, joint]", "a head, its tuning, each once"),
        ("stages=[mae, simcrl]", "did you mean 'simclr'?"),
        ("simclr=null", "'simclr' is missing; add it"),
        ("refiner.blocks=[1]", "blocks below the last of 2, each once; write 0 to 0"),
        ("refiner.topk=300", "topk 300 is more than the queue of 256 holds"),
        ("dino.local_size=3", "a multiple of patch_size 2, not 3"),
        ("dino.encoder_ema=0.9", "keep one"),
        ("joint.mask_ratio=0.99", "leaves none of the 16 patches to see"),
        ("vicreg.temperature=0.1", "unknown setting 'vicreg.temperature'"),
        ("simclr_head.steps=5000", "cost as many FLOPs as all of 'MAE-CT'"),
    ],
)
def test_bad_settings_of_methods_are_told(given: str, says: str, bench: Bench):
    successors = SMOKE.with_name("successors.yaml")
    done = bench("plan", successors, "--profile", "tiny", "--only", "SimCLR", "--set", given)
    assert_refused(done, says)


def test_set_changes_the_devices_of_a_suite(plan_of):
    plan = plan_of(sets=["devices.gpu_share=0.5", "devices.accelerator_type=H100"])
    assert (plan.suite.devices.gpu_share, plan.suite.devices.accelerator_type) == (0.5, "H100")
    assert plan.stages.keys() == plan_of().stages.keys()


def test_set_reads_values_as_the_file_does(bench: Bench):
    plain = bench("plan", SMOKE, "--json").out
    same = bench("plan", SMOKE, "--json", "--set", "augment.min.view0.crop_scale=[5e-1, 1.0]")
    assert (same.code, same.out) == (0, plain)
    other = bench("plan", SMOKE, "--json", "--set", "augment.min.view0.crop_scale=[0.4, 1.0]")
    assert other.code == 0
    assert other.out != plain


def test_overlays_keep_their_lines(bench: Bench, tmp_path: Path):
    """A row's own settings, the profile's for that row, and what neither of them changed."""
    path = tmp_path / "suite.yaml"
    own = "MAE:\n    stages: [mae]\n    set:\n      mae: {lr: x}"
    text = TEXT.replace("MAE: {stages: [mae]}", own)
    path.write_text(text)
    line = line_of("lr: x", text)
    assert_refused(bench("plan", path), f"{path}:{line}: 'mae.lr' should be a number")
    text = TEXT + "    variants:\n      MAE-CT:\n        tune:\n          topk: 0\n"
    path.write_text(text)
    line = line_of("topk: 0", text)
    assert_refused(bench("plan", path), f"{path}:{line}: 'tune.topk' should be greater than")
    text = text.replace("topk: 0", "topk: 3").replace("frozen: 0.5", "frozen: 5")
    path.write_text(text)
    line = line_of("frozen: 5", text)
    assert_refused(bench("plan", path), f"{path}:{line}: 'tune.frozen'")
    path.write_text(TEXT + "    variants: [MAE]\n")
    assert_refused(bench("plan", path), "'profiles.tiny.variants' should be a mapping")
    path.write_text(TEXT + "    variants: {MAE: 3}\n")
    assert_refused(bench("plan", path), "'profiles.tiny.variants.MAE' should be a mapping")


@pytest.mark.parametrize(
    ("old", "new"),
    [
        ("[mae]}", "[mae], set: {mae.steps: 30}}"),
        ("[mae]}", "[mae], set: {mae: {steps: 30}}}"),
        ("    mae: {steps: 40,", "    mae.steps: 30\n    mae: {"),
        ("    numerics:", "    variants: {MAE: {mae.steps: 30}}\n    numerics:"),
        ("    numerics:", "    variants: {MAE: {mae: {steps: 30}}}\n    numerics:"),
    ],
)
def test_dotted_paths_work_wherever_settings_stand(old: str, new: str, plan_of, tmp_path: Path):
    path = tmp_path / "suite.yaml"
    path.write_text(TEXT.replace(old, new, 1))
    here, same = (
        next(row.chain[0].settings for row in plan.rows if row.variant.name == "MAE")
        for plan in (plan_of(path), plan_of(sets=["mae.steps=30"]))
    )
    assert here == same


@pytest.mark.parametrize(
    ("suite", "given", "says"),
    [
        (SWEEP, "tune.topk=3", ""),
        (SWEEP, "head.queue_size=128", "'head.queue_size' is varied by the search"),
        (SWEEP, "head={queue_size: 128}", "'head.queue_size' is varied by the search"),
        (SMOKE, "tune={frozen_blocks: 1}", ""),
        (SMOKE, "tune.layer_decay=0.9", "note: --set replaces settings that the suite gives row"),
        (PAPER, "tune.frozen=0.25", "'tune.frozen' counts for nothing beside frozen_blocks 12"),
    ],
)
def test_what_contradicts_is_told(suite: Path, given: str, says: str, bench: Bench):
    """A row that says one thing and does another would be a wrong number in silence."""
    done = bench("plan", suite, "--set", given, *(("--profile=imagenet",) * (suite == PAPER)))
    if not says or says.startswith("note"):
        assert done.code == 0, done.err
        assert says in done.out
    else:
        assert_refused(done, f"error: --set {given}: {says}")


@pytest.mark.parametrize(
    ("old", "new", "says", "at"),
    [
        ("variant: MAE-CT", "variant: [MAE-CT, MAE-CT]", "stands twice", "variant: [MAE-CT"),
        ("augment: [min, aug]", "variant: [MAE]", "'search: {variant", "variant: [MAE]"),
        ("variant: MAE-CT", "variant: MAE-TC", "did you mean 'MAE-CT'?", "MAE-TC"),
        ("head.queue_size: [128", "head.queue: [128", "unknown setting 'head.queue'", "head.queue"),
        ("[128, 256,", "[128, 100,", "write 128", "head.queue_size"),
        ("[128, 256,", "[128, many,", "'head.queue_size' should be a whole", "head.queue_size"),
        ("[128, 256,", "[128, 128,", "128 stands twice", "head.queue_size"),
        ("augment: [min, aug]", "augment: [min, agu]", "did you mean 'aug'?", "augment: [min"),
        ("augment: [min, aug]", "augment: [min, [aug]]", "names of pipelines", "augment: [min"),
        ("augment: [min, aug]", "augment: []", "list values", "augment: []"),
        ("augment: [min, aug]", "augment: aug", "list values", "augment: aug"),
        ("augment: [min, aug]", "tune.topk: [{a: 1}]", "needs a name", "tune.topk"),
        ("augment: [min, aug]", "tune: {a: {topk: x}}", "'tune.topk' should be a whole", "tune:"),
        (
            "augment: [min, aug]",
            "stages: [mae]",
            "'stages' should be a list",
            "stages: [mae]\n\ntables",
        ),
        ("augment: [min, aug]", "stages: [[tune, mae]]", "form no chain", "stages: [[tune"),
        ("  grid:", "  method: ranodm\n  grid:", "did you mean 'random'?", "method"),
        ("  grid:", "  method: random\n  grid:", "needs samples", "method"),
        ("  grid:", "  samples: 3\n  grid:", "take it out", "samples"),
        ("  grid:", "  asha: true\n  metric: knm\n  grid:", "did you mean 'knn'?", "metric"),
        ("  grid:", "  method: random\n  samples: 9\n  grid:", "than the 8 cells", "samples"),
        ("augment: [min, aug]", "head..lr: [1]", "should name a setting", "head..lr"),
        (
            "augment: [min, aug]",
            "tune.lr: {loguniform: [1e-4, 1]}",
            "by method 'random'; list values for 'grid'",
            "tune.lr",
        ),
        (
            "  grid:",
            "  method: random\n  samples: 2\n  grid:\n    tune.lr: {loguniform: [1, 1]}",
            "two numbers above 0",
            "tune.lr",
        ),
        ("  grid:", "  gird:", "did you mean 'grid'?", "gird"),
        ("augment: [min, aug]", f"tune.lr: {list(range(1, 2000))}", "1000 cells", "grid:"),
        ("MAE:", "MAE-CT queue_size=128 augment=min:", "rename this variant", "queue_size=128"),
    ],
)
def test_a_broken_search(old: str, new: str, says: str, at: str, bench: Bench, suite_folder: Path):
    text = SWEEP.read_text().replace(old, new, 1)
    assert text != SWEEP.read_text()
    path = suite_folder / "sweep.yaml"
    path.write_text(text)
    line = line_of(at, text)
    assert_refused(bench("plan", path), f"{path}:{line}: ", says)


@pytest.mark.parametrize(
    ("command", "arguments", "says"),
    [
        ("run", "--workers -1", "whole number of at least 0"),
        ("run", "--workers two", "whole number of at least 0"),
        ("run", "--seeds 0", "whole number of at least 1"),
        ("run", "--seeds -2", "whole number of at least 1"),
        ("run", "--seeds 1000000", "--seeds 1000000: write at most"),
        ("run", "--sed 2", "there is no argument '--sed'; did you mean '--seeds'?"),
        ("run", "--addresses=x", "did you mean '--address'?"),
        ("run", "--max-cpu-hours 0", "not a number of hours above 0"),
        ("run", "--max-gpu-hours inf", "not a number of hours above 0"),
        ("run", "--profile tinny", f"{SMOKE}: there is no profile 'tinny'; did you mean 'tiny'?"),
        ("run", "--only MAE+*", "--only 'MAE+*' fits no row; did you mean 'MAE'?"),
        ("run", "--only mae-ct", "did you mean 'MAE-CT'?"),
        ("run", "--only 0", "known: MAE, MAE, compute-matched, "),
        ("sweep", "", "this suite declares no search; run: python -m bench run"),
    ],
)
def test_bad_arguments(command: str, arguments: str, says: str, bench: Bench, tmp_path: Path):
    done = bench(command, SMOKE, "--store", tmp_path / "store", *arguments.split())
    assert_refused(done, says)
    assert not (tmp_path / "store").exists()


def test_workers_must_divide_the_batch_and_a_search_is_swept(bench: Bench, tmp_path: Path):
    store = ("--store", tmp_path / "store")
    assert_refused(bench("run", SWEEP, *store), "python -m bench sweep")
    assert_refused(bench("run", SMOKE, *store, "--workers", "3"), "--workers 3: the batch of 64")


# ----------------------------------------------------------------------------------------- store


def test_a_store_below_a_file(bench: Bench, tmp_path: Path):
    (tmp_path / "file").write_text("x")
    told = {"file": "no bundle that can be read", "file/store": "cannot be read: not a directory"}
    for store, said in told.items():
        done = bench("run", SMOKE, "--store", tmp_path / store)
        assert_refused(done, said, "choose another --store")
    assert_refused(bench("ls", "--store", tmp_path / "none"), "there is no store")
    assert_refused(bench("report", SMOKE, "--store", tmp_path / "none"), "there is no store")


def test_a_full_store(tmp_path: Path):
    """A file system of 32 KiB where this may be mounted, else a limit on the size of files."""
    store = tmp_path / "small"
    store.mkdir()
    mount = ["mount", "-t", "tmpfs", "-o", "size=32k", "tmpfs", str(store)]
    if os.geteuid() == 0 and subprocess.run(mount, capture_output=True).returncode == 0:
        try:
            done = run_bench("run", SMOKE, "--store", store)
        finally:
            subprocess.run(["umount", str(store)], check=True)
    else:
        import resource

        def limit() -> None:
            resource.setrlimit(resource.RLIMIT_FSIZE, (1024, 1024))

        done = run_bench("run", SMOKE, "--store", store, preexec_fn=limit)
    assert_refused(done, "the store cannot be written", str(store), "choose another --store")


# --------------------------------------------------------------------- the real command, and more


@pytest.mark.parametrize("command", ["plan", "run", "report", "sweep"])
def test_the_real_command_shows_no_traceback(command: str, tmp_path: Path):
    path = tmp_path / "broken.yaml"
    path.write_text(TEXT.replace("patch_size: 2", "patch_size: 3"))
    store = tmp_path / "store"
    Store(store).create()
    before = [*store.rglob("*")]
    done = run_bench(command, path, "--store", store)
    assert_refused(done, f"{path}:{line_of('patch_size: 2', TEXT)}: ", "write 2 or 4")
    assert done.out == ""
    assert [*store.rglob("*")] == before


def test_messages_hold_no_escape_codes(bench: Bench, tmp_path: Path):
    path = tmp_path / "broken.yaml"
    path.write_text(TEXT.replace("profile: tiny", 'profile: "\\e[31mred\\n"'))
    assert_refused(bench("plan", path), "\\x1b[31mred\\n")


VALUES: list[Any] = [None, True, 0, -1, 3, 2**31, 10**30, 0.5, -0.5, 1e308, math.inf, math.nan, ""]
VALUES += ["x", "on", "mae", "~nouser/x", "a" * 5000, "\x1b", "é\n", [], [1], ["a", ["b"]], {}]
VALUES += [{"a": 1}, {"mae": {}}, [None], "random", "knn", ["mae", "mae"], "../../x", "MAE-CT"]
VALUES += [[0.5, 0.1], "cost"]


def places(node: Any, at: tuple[Any, ...] = ()) -> list[tuple[Any, ...]]:
    children = [*node.items()] if isinstance(node, dict) else []
    children += [*enumerate(node)] if isinstance(node, list) else []
    return [at] * bool(at) + [p for step, child in children for p in places(child, (*at, step))]


def mutated(tree: Any, rng: random.Random) -> Any:
    """The suite with one value taken out, replaced, renamed, or put in another's place."""
    tree = copy.deepcopy(tree)
    every = places(tree)
    at, other = rng.choice(every), rng.choice(every)

    def parent(place: tuple[Any, ...]) -> Any:
        node = tree
        for step in place[:-1]:
            node = node[step]
        return node

    holder, last = parent(at), at[-1]
    match rng.randrange(5):
        case 0:
            del holder[last]
        case 1 if isinstance(holder, dict):
            holder[rng.choice(["", "set", "variants", "steps", f"{last}s"])] = holder.pop(last)
        case 2:
            holder[last] = copy.deepcopy(parent(other)[other[-1]])
        case _:
            holder[last] = copy.deepcopy(rng.choice(VALUES))
    return tree


@pytest.mark.parametrize("path", [SMOKE, SWEEP], ids=["smoke", "sweep"])
def test_no_mutation_of_a_suite_crashes(path: Path, bench: Bench, suite_folder: Path):
    """Whatever stands in a suite, it is planned or refused; never is there a traceback."""
    original = yaml.safe_load(path.read_text())
    rng = random.Random(20260)
    file, refused = suite_folder / "suite.yaml", 0
    for _ in range(100):
        tree = mutated(original, rng)
        file.write_text(yaml.safe_dump(tree, allow_unicode=True, sort_keys=False))
        done = bench("plan", file)
        assert done.code in (0, 2), (tree, done)
        if done.code == 2:
            assert_refused(done)
            refused += 1
    assert 40 < refused < 100


@pytest.mark.parametrize("path", [SMOKE, SWEEP], ids=["smoke", "sweep"])
def test_all_faults_are_those_of_the_loader_and_more(path: Path, suite_folder: Path):
    original, rng = yaml.safe_load(path.read_text()), random.Random(7)
    file, several = suite_folder / "suite.yaml", 0
    for _ in range(15):
        tree = mutated(mutated(original, rng), rng)
        file.write_text(yaml.safe_dump(tree, allow_unicode=True, sort_keys=False))
        faults = [*map(str, faults_of(file)[0])]
        first = None
        with suppress(UserError):
            first = load_suite(file)
        # the suite's own profile is sound where it loads
        assert faults if first is None else not faults or len(tree["profiles"]) > 1, tree
        several += len(faults) > 1
    assert several > 2


@pytest.mark.parametrize("path", [SMOKE, SWEEP], ids=["smoke", "sweep"])
def test_no_damage_to_the_text_crashes(path: Path, bench: Bench, suite_folder: Path):
    parts = [b"\t", b"- ", b": ", b"{", b"]", b'"', b"&a ", b"*a ", b"!!x ", b"\xff", b"\n"]
    parts += [b"? ", b"<<", b"|", b'"\\ud800"', b'"\\UFFFFFFFF"', b"\0", b"---\n", b"%"]
    rng = random.Random(20261)
    file = suite_folder / "suite.yaml"
    for _ in range(80):
        text = bytearray(path.read_bytes())
        for _ in range(rng.randint(1, 3)):
            at = rng.randrange(len(text))
            if rng.random() < 0.5:
                text[at:at] = rng.choice(parts)
            else:
                del text[at : at + rng.randint(1, 40)]
        file.write_bytes(text)
        done = bench("plan", file)
        assert done.code in (0, 2), (bytes(text), done)
        if done.code == 2:
            assert_refused(done)
