"""The command line in strange surroundings: one sentence at most, and the run's own exit code."""

from __future__ import annotations

import os
import pty
import subprocess
import sys
from contextlib import suppress
from pathlib import Path

import pytest
from bench_helpers import ROOT, SMOKE

PLAN = f"plan {SMOKE} --only MAE --seeds 1"
NOBODY = "setpriv --reuid 54321 --clear-groups --"


def nobody_runs_python() -> bool:
    """Whether root runs the tests and others may run its Python, with all of its libraries."""
    python = [*NOBODY.split(), sys.executable, "-c", ""]
    return os.geteuid() == 0 and not subprocess.run(python, capture_output=True).returncode


as_root = pytest.mark.skipif(
    not nobody_runs_python(), reason="needs root, and a Python that others may run"
)


def shell(line: str, folder: Path, **variables: str) -> subprocess.CompletedProcess[bytes]:
    """Run a line of bash in a folder, `$bench` the command line; its exit code is that of bench."""
    python = f"{sys.executable} -m bench"
    return subprocess.run(
        ["bash", "-c", f"{line}; exit ${{PIPESTATUS[0]}}"],
        cwd=folder,
        env=os.environ | {"PYTHONPATH": str(ROOT), "bench": python} | variables,
        capture_output=True,
        timeout=60,
    )


@pytest.mark.parametrize(
    ("line", "code", "out", "err"),
    [
        (f"$bench {PLAN} | head -1", 0, "smoke, profile tiny", ""),
        (f"$bench {PLAN} --json | head -c 1", 0, "{", ""),
        (f"$bench {PLAN} | true", 0, "", ""),
        ("$bench plan none.yaml | true", 2, "", "there is no suite file"),
        ("$bench --help | true", 0, "", ""),
        (f"$bench {PLAN} >&-", 0, "", ""),
        (f"$bench {PLAN} <&- >&- 2>&-", 0, "", ""),
        ("$bench plan none.yaml >&- 2>&-", 2, "", ""),
        (f"$bench {PLAN} > /dev/full", 0, "", "the output could not be written: no space left"),
        ("$bench plan none.yaml 2> /dev/full", 2, "", ""),
        (f"PYTHONIOENCODING=ascii $bench {PLAN}", 0, "digits at 8?8", ""),
        (f"PYTHONIOENCODING=latin-1 $bench {PLAN}", 0, "digits at 8\xd78", ""),
        (f"LC_ALL=C PYTHONUTF8=0 PYTHONCOERCECLOCALE=0 $bench {PLAN}", 0, "digits at 8", ""),
        (f"env -u HOME $bench {PLAN}", 0, "smoke, profile", ""),
        pytest.param(
            f"cd /; env -u HOME -u MAECT_DATA {NOBODY} $bench {PLAN}", 2, "",
            "set HOME, or MAECT_DATA", marks=as_root,
        ),
        pytest.param(
            f"cd /; env -u HOME MAECT_DATA=/none {NOBODY} $bench {PLAN}", 0, "profile", "",
            marks=as_root,
        ),
        (f"rmdir $PWD; $bench {PLAN}", 2, "", "the working directory was removed"),
        ("$bench plan /dev/zero", 2, "", "is no file"),
        ("ln -s loop loop; $bench plan loop", 2, "", "too many levels of symbolic links"),
        ("ln -s loop loop; $bench ls --store loop/s", 2, "", "too many levels of symbolic links"),
        (f"$bench {PLAN} --store ~nobody-here/x", 2, "", "there is no such home folder"),
        ("$bench ls --store $(printf %05000d 0)", 2, "", "file name too long"),
        ("$bench plan ''", 2, "", "is no path"),
        pytest.param(
            f"touch s; chmod 0 s; chmod 755 .; {NOBODY} $bench plan s --store /none", 2, "",
            "permission denied",
            marks=as_root,
        ),
        ("$bench plan $'a\\xff\\x1b[31m'", 2, "", "'a\\udcff\\x1b[31m'"),
        ("$bench plan x $'--y\\x1b[31m'", 2, "", "'--y\\x1b[31m'"),
        ("$bench $'\\x1b[31m'", 2, "", "'\\x1b[31m'"),
        ("$bench repotr x", 2, "", "did you mean 'report'?"),
        (f"$bench report {SMOKE} --export latxe", 2, "", "did you mean 'latex'?"),
        (f"cd {ROOT}; $bench plan paper_tabel", 2, "", "did you mean 'suites/paper_table.yaml'?"),
        ("mkdir -p stor/stages; $bench ls --store store", 2, "", "did you mean 'stor'?"),
    ],
)  # fmt: skip
def test_surroundings(line: str, code: int, out: str, err: str, tmp_path: Path):
    done = shell(line, tmp_path)
    told, said = done.stdout.decode("latin-1"), done.stderr.decode()
    assert done.returncode == code, said
    assert out in told
    assert err in said if err else not said
    assert said.count("\n") <= 1
    assert "Traceback" not in said
    assert "\x1b" not in told + said


def test_names_do_not_reach_a_terminal_as_codes(tmp_path: Path):
    """A row's name, a record and a note; what the program draws itself keeps its colours."""
    suite = tmp_path / "suite.yaml"
    suite.write_text(
        SMOKE.read_text().replace("  MAE: {", '  "\\e]0;owned\\a": {stages: []}\n  MAE: {')
    )
    main, other = pty.openpty()
    code = f"""
from pathlib import Path
from bench.cli import main
from bench.plan.planner import make_plan
from bench.run.progress import Display
from bench.store.store import Store
from bench.suite.load import load_suite
assert main(["plan", {str(suite)!r}, "--seeds", "1", "--only", "*owned*", "--stages"]) == 0
plan = make_plan(load_suite(Path({str(suite)!r}), seeds=1), Store(Path("none")))
stage = next(iter(plan.stages.values()))
stage.title = "a[/b]\\x1b]0;owned\\x07"
print("drawn:")
with Display(plan, lambda: None) as display:
    stage.kind, stage.steps = "mae", 1
    display.begin(stage)
    display.bars.refresh()
    display.end(stage, "failed", "\\x1b]0;owned\\x07")
"""
    environment = os.environ | {"PYTHONPATH": str(ROOT), "TERM": "xterm-256color"}
    done = subprocess.run([sys.executable, "-c", code], stdout=other, env=environment)
    os.close(other)
    told = b""
    with suppress(OSError):  # how the end of what was written shows
        while more := os.read(main, 65536):
            told += more
    assert done.returncode == 0
    planned, drawn = told.decode().split("drawn:")
    assert r"\x1b]0;owned\x07 knn" in planned
    assert "\x1b" not in planned
    assert r"a[/b]\x1b]0;owned\x07" in drawn
    assert "\x1b[" in drawn
    assert "\x1b]" not in drawn


def test_a_python_without_the_packages_is_told_how_to_get_them():
    without = "import runpy, sys; sys.modules['polars'] = None; sys.argv[1:] = ['plan', 'no.yaml']"
    program = f"{without}; runpy.run_module('bench', run_name='__main__')"
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, cwd=ROOT)
    assert done.returncode == 2, done.stderr
    assert done.stderr.startswith(
        f"error: {sys.executable} has no package 'polars'. `make install`"
    )
    assert done.stderr.count("\n") == 1
