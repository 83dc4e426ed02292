"""`python -m bench run suites/smoke.yaml` from beginning to end, as a user has it."""

from __future__ import annotations

import json
import re
import resource
import shutil
import subprocess
import sys
import time
from pathlib import Path

import psutil
import pytest
from bench_helpers import (
    ROOT,
    SMOKE,
    Bench,
    artifacts,
    completed,
    environment,
    measured,
    printed_metrics,
    ray_processes,
    records,
    run_bench,
)

from bench.environment import processors
from bench.store.store import Store

ROWS = [
    "raw pixels", "random encoder", "MAE", "MAE, compute-matched", "NNCLR without MAE", "MAE-CT",
    "MAE-CT_aug",
]  # fmt: skip
STAGES = 54
RECORD = {
    "schema", "key", "kind", "name", "attempt", "status", "settings", "inputs", "data", "code",
    "env", "started", "ended", "cost", "metrics", "protocol", "protocol_fingerprint", "summary",
    "files", "error", "log_tail",
}  # fmt: skip
COST = {
    "wall_s", "devices", "device_kind", "device_model", "device_hours", "cpu_s",
    "peak_memory_mib", "energy_kwh", "energy_reason",
}  # fmt: skip
ENV = {"python", "torch", "timm", "ray", "platform", "cpu", "isa", "device", "workers"}


@pytest.fixture
def copy(smoke, tmp_path: Path) -> Path:
    """A copy of the finished store."""
    return Path(shutil.copytree(smoke.store, tmp_path / "store"))


def test_a_run_succeeds_and_prints_its_table(smoke):
    assert smoke.done.code == 0, smoke.done
    assert smoke.done.err == ""
    out = smoke.done.out
    assert f"0 cached, {STAGES} to run" in out
    assert f"[{STAGES}/{STAGES}] " in out
    assert list(printed_metrics(out)) == ROWS
    assert "Traceback" not in out
    report = smoke.store / "reports" / "smoke-tiny.html"
    assert out.rstrip().endswith(f"report: {report}")
    html = report.read_text(encoding="utf-8")
    assert all(row in html for row in ROWS)


def test_every_stage_leaves_a_whole_record(smoke):
    attempts = records(smoke.store)
    assert len(attempts) == STAGES
    for key, (record,) in attempts.items():
        assert record.keys() >= RECORD, record["name"]
        assert record["cost"].keys() >= COST
        assert record["env"].keys() >= ENV
        assert (record["key"], record["schema"], record["attempt"]) == (key, 3, 1)
        assert (record["status"], record["error"]) == ("complete", None)
        assert record["started"] < record["ended"]
        assert record["settings"]["numerics"] == {
            "precision": "fp32", "threads": 1, "shards": 4, "compile": False,
            "checkpoint_activations": False, "isa": "avx2", "tf32": False,
            "processors": processors("avx2"),
        }  # fmt: skip
        cost = record["cost"]
        assert cost["devices"] == 1
        assert cost["wall_s"] > 0
        assert cost["device_hours"] == pytest.approx(cost["wall_s"] / 3600)
        assert cost["energy_kwh"] is None
        assert cost["energy_reason"]
        assert record["files"]
        assert record["data"]["counts"] == {"train": 1097, "selection": 200, "test": 500}
        assert "is complete" in record["log_tail"]
        for source in record["inputs"].values():
            made = attempts[source["key"]][0]["files"]
            assert source["files"] == {file: entry["sha256"] for file, entry in made.items()}


def test_evaluations_keep_metrics_protocol_and_predictions(smoke):
    from safetensors.numpy import load_file

    found = {r["name"]: r for r in completed(smoke.store).values() if r["kind"] in ("knn", "probe")}
    assert len(found) == 27
    for record in found.values():
        primary = [m for m in record["metrics"] if m["primary"]]
        assert len(primary) == 1
        assert 0 <= primary[0]["value"] <= 100
        assert record["protocol"]["evaluation"] == record["kind"]
        assert record["protocol"]["split"] == "test"
        folder = Store(smoke.store).fetch(record["key"])
        predictions = load_file(folder / "predictions.safetensors")
        assert len(predictions["labels"]) == 500
    record = found["MAE-CT knn, seed 0"]
    predictions = load_file(Store(smoke.store).fetch(record["key"]) / "predictions.safetensors")
    right = (predictions["class_k10"] == predictions["labels"]).mean()
    assert next(m["value"] for m in record["metrics"] if m["primary"]) == pytest.approx(100 * right)


def test_training_leaves_its_curves(smoke):
    for record in completed(smoke.store).values():
        if record["kind"] not in ("mae", "head", "tune"):
            continue
        path = Store(smoke.store).fetch(record["key"]) / "curves.json"
        curves = json.loads(path.read_text())
        assert curves["step"][:20] == list(range(20))
        assert curves["loss"][-1] == record["summary"]["final_loss"]
        assert len(curves["lr"]) == record["summary"]["steps"]


def test_two_stores_stand_side_by_side(smoke, tmp_path: Path, bench: Bench):
    """`--compare A B`, or B alone beside --store; the page goes into the first."""
    one, other = tmp_path / "one", tmp_path / "other"
    for store in (one, other):
        shutil.copytree(smoke.store, store)
    report = ("report", SMOKE, "--only", "MAE-CT")
    done = bench(*report, "--compare", one, other)
    assert done.code == 0, done
    assert "MAE-CT (one)" in done.out
    assert "MAE-CT (other)" in done.out
    assert (one / "reports" / "smoke-tiny-beside-other.html").exists()
    assert bench(*report, "--store", one, "--compare", other).out == done.out
    refused = bench(*report, "--compare", one, other, one)
    assert refused.code == 2
    assert "--compare sets two stores side by side; name one or two" in refused.err


def test_a_second_run_starts_no_ray_imports_no_torch_and_is_quick(smoke):
    script = (
        "import sys; from bench.cli import main; code = main(sys.argv[1:]);"
        "print('heavy:', [m for m in ('ray', 'torch', 'sklearn') if m in sys.modules]);"
        "sys.exit(code)"
    )
    arguments = ["run", str(SMOKE), "--store", str(smoke.store)]
    before = resource.getrusage(resource.RUSAGE_CHILDREN)
    process = subprocess.Popen(
        [sys.executable, "-c", script, *arguments],
        cwd=ROOT, env=environment(), stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True,
    )  # fmt: skip
    watched, seen = psutil.Process(process.pid), []
    while process.poll() is None:
        try:
            seen += ray_processes(watched)
        except psutil.NoSuchProcess:
            break
        time.sleep(0.05)
    out, _ = process.communicate()
    after = resource.getrusage(resource.RUSAGE_CHILDREN)
    assert process.returncode == 0, out
    assert f"{STAGES} cached, 0 to run" in out
    assert "heavy: []" in out
    assert seen == []
    # of the processor's time, since others may be using it too; alone it is the wall time
    spent = after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime
    assert spent < 5
    first = smoke.done.out
    table = first[first.rindex("Smoke test") : first.rindex("\nreport: ")]
    assert table in out
    assert all(len(attempts) == 1 for attempts in records(smoke.store).values())


def test_reading_commands_know_the_run(smoke, bench: Bench):
    store = ("--store", smoke.store)
    listed = json.loads(bench("ls", *store, "--json").out)
    assert len(listed) == STAGES
    key = next(row["key"] for row in listed if row["name"] == "MAE-CT tuning, seed 0")
    shown = bench("show", key[:10], *store)
    assert shown.code == 0
    assert "attempt 1: MAE-CT tuning, seed 0, complete" in shown.out
    assert "input    encoder" in shown.out
    assert "encoder.safetensors" in shown.out
    report = bench("report", SMOKE, *store)
    assert report.code == 0
    assert printed_metrics(report.out) == printed_metrics(smoke.done.out)
    quiet = bench("run", SMOKE, *store, "--quiet")
    assert printed_metrics(quiet.out) == printed_metrics(smoke.done.out)
    assert "Best k-NN, k=10 by its mean: " in quiet.out
    assert "cached" not in quiet.out and "Cost" not in quiet.out and quiet.err == ""
    missing = bench("show", "zzz", *store)
    assert (missing.code, missing.err.count("\n")) == (2, 1)


def test_more_seeds_plan_only_what_is_new(smoke, bench: Bench):
    plan = json.loads(bench("plan", SMOKE, "--seeds", 3, "--store", smoke.store, "--json").out)
    statuses = [stage["status"] for stage in plan["stages"]]
    assert statuses.count("cached") == STAGES
    new = [stage for stage in plan["stages"] if stage["status"] == "pending"]
    assert len(new) == len(statuses) - STAGES == 26
    assert all(stage["title"].endswith("seed 2") for stage in new)
    # times are known by now
    assert all(stage["expected_s"] is not None for stage in new)


def flip(path: Path) -> None:
    """Change one bit in the middle of a file."""
    data = bytearray(path.read_bytes())
    data[len(data) // 2] ^= 1
    path.write_bytes(data)


@pytest.mark.slow
def test_damage_is_named_set_aside_and_made_again(smoke, copy: Path):
    found = {r["name"]: r for r in completed(copy).values()}
    mae, features = found["MAE, seed 0"], found["MAE-CT features, seed 0"]
    knn = found["MAE knn, seed 1"]
    flip(Store(copy).fetch(mae["key"]) / "encoder.safetensors")
    flip(Store(copy).fetch(features["key"]) / "features.safetensors")
    (copy / "stages" / knn["key"] / "attempts" / "1" / "record.json").write_text('{"key": ')
    done = run_bench("run", SMOKE, "--store", copy)
    assert done.code == 0, done
    for name, file in ((mae["name"], "encoder"), (features["name"], "features")):
        assert f"{name}: {file}.safetensors does not fit its checksum; set aside" in done.out
    assert "record.json is damaged" in done.out
    assert f"[{STAGES}/{STAGES}] " in done.out
    # these three again and nothing else: what builds on them found them unchanged
    again = {attempts[-1]["name"] for attempts in records(copy).values()
             if attempts[-1]["attempt"] > 1}  # fmt: skip
    assert again == {mae["name"], features["name"], knn["name"]}
    assert artifacts(copy) == artifacts(smoke.store)
    assert printed_metrics(done.out) == printed_metrics(smoke.done.out)
    aside = {path.name for path in (copy / "damaged").rglob("*.safetensors")}
    assert {"encoder.safetensors", "features.safetensors"} <= aside


@pytest.fixture(scope="module")
def failed(tmp_path_factory: pytest.TempPathFactory):
    """A run whose tuning stages end with a loss that is not finite."""
    store = tmp_path_factory.mktemp("failed") / "store"
    settings = ["--seeds", "1", "--set", "tune.lr=1e30"]
    return store, settings, run_bench("run", SMOKE, "--store", store, *settings)


def test_a_failed_stage_is_told_with_its_reason(failed):
    _, _, done = failed
    assert done.code == 1, done
    assert "Traceback" not in done.err
    for row in ("NNCLR without MAE", "MAE-CT", "MAE-CT_aug"):
        assert f"failed: {row} tuning, seed 0: the loss is nan at step " in done.err
        assert "lower lr" in done.err
        assert f"failed: {row} knn, seed 0: its input failed: {row} features, seed 0" in done.err
    told = done.err.strip().splitlines()
    assert len(told) == 12  # tuning, features, k-NN and probe of three rows


def test_a_failure_leaves_a_record_and_takes_its_descendants_only(failed):
    store, _, _ = failed
    attempts = [a for several in records(store).values() for a in several]
    # Ray may take a group for dead on a busy machine; its stage is tried again
    bad = {a["name"]: a for a in attempts if a["status"] not in ("complete", "lost")}
    assert set(bad) == {
        f"{row} tuning, seed 0" for row in ("NNCLR without MAE", "MAE-CT", "MAE-CT_aug")
    }
    for record in bad.values():
        assert record["status"] == "failed"
        assert record["error"]["class"] == "TrainingError"
        assert "the loss is nan" in record["error"]["message"]
        assert "Traceback" in record["log_tail"]
        assert record["cost"]["wall_s"] > 0
        assert record["files"] == {}
    assert len(completed(store)) == 16


def test_two_stores_hold_the_same_bits(smoke, failed):
    """What the failure left alone is equal, to the bit, to what the other store has."""
    store, _, _ = failed
    found = artifacts(store)
    assert "MAE, compute-matched, seed 0/encoder.safetensors" in found
    assert found.items() <= artifacts(smoke.store).items()
    assert measured(store).items() <= measured(smoke.store).items()


def test_a_failure_shows_in_terminal_report_page_and_exports(failed, bench: Bench):
    """With error, end of the log, and the rows that it cost; at once and in later reports."""
    store, settings, done = failed
    report = bench("report", SMOKE, "--store", store, *settings, "--export", "json")
    assert report.code == 0
    for out in (done.out, report.out):
        table = out[out.index("Digits, a few steps") :]
        assert re.search(r"^MAE-CT +failed +failed +failed", table, re.MULTILINE)
        assert "its input failed: MAE-CT tuning, seed 0" in " ".join(table.split())
        assert "pending" not in table
        assert "MAE-CT tuning, seed 0 failed: TrainingError: the loss is nan" in table
        assert "It costs the rows MAE-CT." in table
        assert "  | maect.stages.job.TrainingError: the loss is nan" in table
    html = (store / "reports" / "smoke-tiny.html").read_text(encoding="utf-8")
    alert = html[html.index('class="warn failure"') : html.index('id="tables"')]
    assert "MAE-CT tuning, seed 0</a> failed: <code>TrainingError</code>: the loss is nan" in alert
    assert "It costs the rows MAE-CT." in alert
    assert "Traceback" in alert
    cells = json.loads((store / "reports" / "smoke-tiny.json").read_text(encoding="utf-8"))
    assert "its input failed: MAE-CT tuning, seed 0" in json.dumps(cells)
    told = json.loads(bench("report", SMOKE, "--store", store, *settings, "--json").out)
    (failure,) = [f for f in told["failures"] if f["name"] == "MAE-CT tuning, seed 0"]
    assert (failure["error"], failure["rows"]) == ("TrainingError", ["MAE-CT"])
    assert "Traceback" in failure["log_tail"]
    listed = json.loads(bench("ls", "--store", store, "--json").out)
    errors = {row["name"]: row["error"] for row in listed if row["status"] == "failed"}
    assert "the loss is nan" in errors["MAE-CT tuning, seed 0"]
    plan = bench("plan", SMOKE, "--store", store, *settings)
    assert "failed before: the loss is nan" in plan.out


def test_a_run_in_this_process_gives_the_same_bits(smoke, tmp_path: Path):
    """`--workers 0`: no worker group, the same records."""
    store = tmp_path / "local"
    done = run_bench("run", SMOKE, "--store", store, "--seeds", "1", "--workers", "0")
    assert done.code == 0, done
    assert len(completed(store)) == 28
    assert artifacts(store).items() <= artifacts(smoke.store).items()
