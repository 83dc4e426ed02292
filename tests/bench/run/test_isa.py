"""`numerics.isa`: the same instructions on every x86-64 machine, in the key and checked."""

from __future__ import annotations

import json
import subprocess

import pytest
from bench_helpers import ROOT, SMOKE, command, completed, environment, stored

import bench.environment as here
from bench.plan.identity import stage_key

BITS = ROOT / "docs" / "results" / "smoke_bits.json"


def run(*arguments: object, **variables: str):
    return subprocess.run(
        command(*arguments),
        cwd=ROOT,
        env=environment() | variables,
        capture_output=True,
        text=True,
        timeout=300,
    )


@pytest.mark.parametrize(
    ("variable", "value", "told"),
    [
        ("ATEN_CPU_CAPABILITY", "default", "torch: "),
        ("ONEDNN_MAX_CPU_ISA", "SSE41", "oneDNN: SSE41"),
        ("MKL_CBWR", "COMPATIBLE", "MKL: branch 3"),
    ],
)
def test_a_library_that_does_not_comply_fails_the_stage(tmp_path, variable, value, told):
    only = ("--only", "raw pixels", "--workers", "0", "--store", tmp_path)
    done = run("run", SMOKE, *only, **{variable: value})
    assert done.returncode == 1, done.stderr
    assert f"numerics.isa is avx2, but not all libraries compute with it ({told}" in done.stderr


def test_the_class_of_processors_is_in_the_key(plan_of):
    plan = plan_of()
    for stage in plan.stages.values():
        assert stage.settings["numerics"]["processors"] == here.processors("avx2")
        other = stage.settings | {
            "numerics": stage.settings["numerics"] | {"processors": "avx2 Other"}
        }
        inputs = {name: source.key for name, source in stage.inputs.items()}
        assert stage_key(stage.kind, other, inputs, stage.data.fingerprint) != stage.key
    native = plan_of(sets=["numerics.isa=native"])
    assert native.stages.keys().isdisjoint(plan.stages)
    assert {s.settings["numerics"]["processors"] for s in native.stages.values()} == {None}


def test_a_suite_has_one_kind_of_instructions(bench, tmp_path):
    text = SMOKE.read_text().replace(
        "MAE: {stages: [mae]}", "MAE: {stages: [mae], set: {numerics: {isa: native}}}"
    )
    path = tmp_path / "suite.yaml"
    path.write_text(text)
    done = bench("plan", path, "--store", tmp_path / "store")
    assert done.code == 2
    assert "numerics.isa is not the same in all rows" in done.err


def test_a_record_says_what_was_asked_of_the_libraries(smoke):
    _, record = stored(smoke.store, "MAE, seed 0")
    assert record["env"]["switches"] == {name: here.AVX2[name] for name in here.AVX2}
    assert record["env"]["vendor"] == here.processor()["vendor"]


def test_the_smoke_suite_gives_the_committed_bits(smoke):
    """On every machine of a class that ran it, with the versions that ran then."""
    classes = json.loads(BITS.read_text())
    kind = here.processors("avx2")
    if kind not in classes:
        pytest.skip(f"no bits are committed for processors of class '{kind}'")
    known = classes[kind]
    versions = {name: here.versions()[name] for name in known["versions"]}
    if versions != known["versions"]:
        pytest.skip(f"the bits are of {known['versions']}, here are {versions}")
    found = {
        f"{record['name']}/{name}": file["sha256"][:16]
        for record in completed(smoke.store).values()
        for name, file in record["files"].items()
    }
    differ = [name for name, sha in known["files"].items() if found.get(name) != sha]
    if here.processor()["isa"] not in [ran["isa"] for ran in known["ran on"]]:
        pytest.skip(f"{len(differ)} of {len(found)} differ on {here.processor()}, the first to run")
    assert found == known["files"]
