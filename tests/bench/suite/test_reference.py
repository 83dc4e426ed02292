"""What documentation and editors are told of a suite's keys is what the settings say."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import yaml
from bench_helpers import ROOT, SMOKE
from jsonschema import Draft202012Validator

from bench.cli import main
from bench.plan.planner import make_plan
from bench.suite import reference, yamlfile
from bench.suite.load import load_suite
from bench.suite.schema import Suite
from maect import evals


@pytest.mark.parametrize(
    ("option", "file"), [("--reference", "suite.md"), ("--schema", "suite.schema.json")]
)
def test_the_committed_documents_are_what_the_settings_say(
    option: str, file: str, capsys: pytest.CaptureFixture[str]
):
    assert main(["validate", option]) == 0
    committed = (ROOT / "docs" / file).read_text(encoding="utf-8")
    again = f"python -m bench validate {option} > docs/{file}"
    assert capsys.readouterr().out == committed, f"make it anew: {again}"


def test_every_key_is_told():
    kinds = [kind for _, kind, _ in reference.SECTIONS]
    kinds += [reference.declarable(name) for name in evals.names()]
    silent = {
        f"{k.__name__}.{n}" for k in kinds for n, text in reference.told(k).items() if not text
    }
    assert silent == set()


def plain(path: Path) -> Any:
    return json.loads(json.dumps(yamlfile.load(path)))


of_every_suite = pytest.mark.parametrize(
    "path", sorted((ROOT / "suites").glob("*.yaml")), ids=lambda p: p.stem
)


@of_every_suite
def test_a_resolved_suite_is_a_suite_with_the_same_rows_and_keys(path: Path, tmp_path: Path):
    """As a page holds it; where a row's rate has a factor and a search makes the rows, too."""

    def keys(suite: Suite) -> dict[tuple[str, int], list[str]]:
        rows = make_plan(suite, None).rows
        return {(row.variant.name, row.seed): [s.key for s in row.stages()] for row in rows}

    suite = load_suite(path)
    again = tmp_path / "suite.yaml"
    again.write_text(yaml.safe_dump(suite.resolved(), sort_keys=False, allow_unicode=True))
    Draft202012Validator(reference.schema()).validate(plain(again))
    assert keys(load_suite(again)) == keys(suite)


@of_every_suite
def test_editors_find_no_fault_in_our_suites(path: Path):
    Draft202012Validator(reference.schema()).validate(plain(path))


@pytest.mark.parametrize(
    ("place", "value"),
    [
        (("titel",), "x"),
        (("seeds",), []),
        (("variants", "MAE", "stages"), ["mea"]),
        (("variants", "MAE", "set"), {"mae": {"step": 9}}),
        (("tables", 0, "columsn"), ["knn"]),
        (("profiles", "tiny", "mae", "batch_sise"), 64),
        (("profiles", "tiny", "mae", "steps"), "40"),
        (("profiles", "tiny", "augment", "min", "view0", "flip"), 2.0),
        (("profiles", "tiny", "evaluations", "probe", "epoch"), 5),
        (("profiles", "tiny", "evaluations", "mine"), {"evaluation": "knn", "kk": [1]}),
        (("profiles", "tiny", "variants"), {"MAE": {"mae": {"steps": "many"}}}),
    ],
    ids=lambda at: ".".join(map(str, at)) if isinstance(at, tuple) else "",
)
def test_editors_mark_what_a_suite_must_not_say(place: tuple[Any, ...], value: Any):
    suite = plain(SMOKE)
    section = suite
    for step in place[:-1]:
        section = section[step]
    section[place[-1]] = value
    assert not Draft202012Validator(reference.schema()).is_valid(suite)


TRAINED = {"mae", "head", "tune"}
MEASURED = {"features", "knn", "probe"}


@pytest.mark.parametrize(
    ("change", "kinds"),
    [
        ("data.train_images=9", set()),
        ("data.classes=7", set()),
        ("numerics.checkpoint_activations=true", set()),
        ("about=other", set()),
        ("devices.gpu_share=0.5", set()),
        ("data.selection=100", TRAINED | MEASURED),
        ("numerics.threads=2", TRAINED | MEASURED),
        ("model.decoder_dim=32", TRAINED | MEASURED),
        ("head.temperature=0.2", {"head", "tune"} | MEASURED),
        ("tune.temperature=0.2", {"tune"} | MEASURED),
        ("augment.min.view0.flip=0.5", {"head", "tune"} | MEASURED),
        ("evaluations.probe.epochs=6", {"probe"}),
        ("evaluations.probe.seeds=1", set()),
    ],
)
def test_keys_change_as_the_reference_says(change: str, kinds: set[str]):
    def keys(*sets: str) -> dict[str, set[str]]:
        plan = make_plan(load_suite(SMOKE, seeds=1, sets=[*sets]), None, only="MAE-CT")
        found: dict[str, set[str]] = {}
        for stage in plan.stages.values():
            found.setdefault(stage.kind, set()).add(stage.key)
        return found

    before, after = keys(), keys(change)
    assert {kind for kind in before if before[kind] != after[kind]} == kinds
