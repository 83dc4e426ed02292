"""A report over ten thousand records, of which one in a hundred is damaged."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from bench_helpers import ROOT, SMOKE, environment, fill

from bench.plan.planner import make_plan
from bench.store.store import Store
from bench.suite.load import load_suite

SEEDS = 386

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
