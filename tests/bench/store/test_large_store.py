"""A report over ten thousand records, of which one in a hundred is damaged."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from bench_helpers import ROOT, SMOKE, environment

from bench.environment import describe
from bench.plan.planner import make_plan
from bench.plan.stage import Plan, Stage
from bench.store.record import Cost, Data, File, Input, Record, sealed
from bench.store.store import Store
from bench.suite.evaluations import Evaluation
from bench.suite.load import load_suite
from maect import evals

SEEDS = 386
LOG = "2026-03-01T12:00:00.000Z step 20/40 epoch 1 loss 0.4321 1234 images/s\n" * 30


def record_of(stage: Stage, number: int, env: dict[str, Any]) -> Record:
    """A complete record of a usual size, without its artifact."""
    file, wall_s = File(sha256="ab" * 32, bytes=12), 1 + number % 10 / 10
    inputs = {
        name: Input(key=source.key, files={"artifact.bin": file.sha256})
        for name, source in stage.inputs.items()
    }
    metrics = []
    if stage.kind in evals.names():
        evaluation = Evaluation.of(stage.kind, stage.settings)
        value = 90 + number * 7 % 100 / 20
        metrics = evaluation.measured({m.name: value for m in evaluation.metrics()})
    cost = Cost(
        devices=1,
        device_kind="cpu",
        device_model="a CPU",
        wall_s=wall_s,
        device_hours=wall_s / 3600,
        energy_reason="no GPU",
    )
    return Record(
        key=stage.key,
        kind=stage.kind,
        name=stage.title,
        attempt=1,
        run="r",
        status="complete",
        settings=stage.settings,
        inputs=inputs,
        data=Data(name="digits", fingerprint="f00d", counts={"test": 500}),
        code=stage.code,
        env=env,
        started="2026-03-01T12:00:00.000Z",
        started_s=1.77e9,
        pid=1,
        ended="2026-03-01T12:00:02.000Z",
        metrics=metrics,
        protocol={"k": 10},
        protocol_fingerprint=stage.kind,
        summary={"flops": stage.flops},
        files={"artifact.bin": file},
        log_tail=LOG,
        cost=cost,
    )


def fill(store: Store, plan: Plan) -> int:
    """A record for every stage; returns how many are damaged: cut short, or changed."""
    env, damaged = describe() | {"host": "here"}, 0
    for number, stage in enumerate(plan.stages.values()):
        text = json.dumps(sealed(record_of(stage, number, env)), indent=1)
        if number % 100 == 50:
            damaged += 1
            text = text.replace('"devices": 1', '"devices": 2') if damaged % 2 else text[:900]
        folder = store.folder(stage.key) / "attempts" / "1"
        folder.mkdir(parents=True)
        (folder / "record.json").write_text(text, encoding="utf-8")
    return damaged


#: `ru_maxrss` of a child begins with what the parent, all of pytest, held when it was started
RUN = """
import sys
from pathlib import Path
from bench.cli import main
code = main(sys.argv[2:])
Path(sys.argv[1]).write_text(Path("/proc/self/status").read_text().split("VmHWM:")[1].split()[0])
sys.exit(code)
"""


def report(store: Store) -> tuple[float, float, str, str]:
    """Processor's seconds, MiB at the most, what the command printed and the page."""
    out, peak = store.root / "out.txt", store.root / "peak.txt"
    arguments = ["report", str(SMOKE), "--seeds", str(SEEDS), "--store", str(store.root)]
    with out.open("w") as file:
        where: dict[str, Any] = {"cwd": ROOT, "env": environment(), "stdout": file}
        command = [sys.executable, "-c", RUN, str(peak), *arguments]
        process = subprocess.Popen(command, stderr=subprocess.STDOUT, **where)
        _, status, used = os.wait4(process.pid, 0)
        process.returncode = os.waitstatus_to_exitcode(status)
    text = out.read_text(encoding="utf-8")
    assert process.returncode == 0, text[-2000:]
    page = (store.root / "reports" / "smoke-tiny.html").read_text(encoding="utf-8")
    # of the processor's time, since others may be using it too; alone it is the wall time
    return used.ru_utime + used.ru_stime, int(peak.read_text()) / 1024, text, page


@pytest.mark.slow
def test_ten_thousand_records_render_in_a_gibibyte(tmp_path: Path) -> None:
    """The time is printed: 6 s on a Xeon with 2 cores, the files in its cache."""
    store = Store(tmp_path / "store")
    store.create()
    plan = make_plan(load_suite(SMOKE, seeds=SEEDS), store)
    assert len(plan.stages) >= 10_000
    damaged = fill(store, plan)
    assert damaged >= 100
    seconds, mib, text, page = report(store)
    print(f"{seconds:.1f} s, {mib:.0f} MiB")
    assert mib < 1024
    assert f"{damaged} problems in the store" in text
    assert page.count("its checksum does not fit") == (damaged + 1) // 2
