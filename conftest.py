"""`pytest --benchmark`: run the regression benchmarks under tests/benchmarks.

pytest-benchmark has only `--benchmark-...` options; the bare flag is ours. With it only the
benchmarks run, and a step that has become slower than its committed bound fails the run.

`@pytest.mark.gpu`: what only a GPU shows; `pytest -m gpu` runs it, elsewhere it is skipped.

`@pytest.mark.needs("gcc", "cc")`: the test needs one of these programs, or packages of LaTeX
("siunitx.sty"). Without any it is skipped, or fails where MAECT_REQUIRE_PROGRAMS is set: where
continuous integration has installed them.
"""

from __future__ import annotations

import os
import shutil
import signal
import subprocess
from pathlib import Path

import pytest

from bench import environment

# the small suites compute with these instructions: before a test imports numpy or torch
environment.use("avx2")

BENCHMARKS = Path(__file__).parent / "tests" / "benchmarks"


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption(
        "--benchmark",
        action="store_true",
        dest="regression_benchmarks",
        help="run the regression benchmarks of tests/benchmarks and nothing else",
    )


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    """Without the flag benchmarks stay out; with it all else does."""
    wanted = config.getoption("regression_benchmarks")
    kept = [item for item in items if item.path.is_relative_to(BENCHMARKS) == wanted]
    if len(kept) < len(items):
        config.hook.pytest_deselected(items=[item for item in items if item not in kept])
        items[:] = kept


def pytest_runtest_setup(item: pytest.Item) -> None:
    """Skip a test whose program or GPU is missing; fail it where the program must be there."""
    if item.get_closest_marker("gpu"):
        import torch

        if not torch.cuda.is_available():
            pytest.skip("torch sees no GPU")
    for mark in item.iter_markers("needs"):
        if not any(map(_has, mark.args)):
            message = f"needs {' or '.join(mark.args)}"
            if os.environ.get("MAECT_REQUIRE_PROGRAMS"):
                pytest.fail(message, pytrace=False)
            pytest.skip(message)


def _has(name: str) -> bool:
    """Return whether a program is on the PATH, or LaTeX has a package."""
    if not name.endswith(".sty") or not shutil.which("kpsewhich"):
        return shutil.which(name) is not None
    return subprocess.run(["kpsewhich", name], capture_output=True, check=False).returncode == 0


def pytest_configure(config: pytest.Config) -> None:
    # a job in the background ignores Ctrl-C, and the commands that tests start would inherit that
    for number in (signal.SIGHUP, signal.SIGINT, signal.SIGTERM):
        if signal.getsignal(number) is signal.SIG_IGN:
            default = number == signal.SIGINT
            signal.signal(number, signal.default_int_handler if default else signal.SIG_DFL)
    config.addinivalue_line("markers", "needs(*programs): one of these must be on the PATH")
    if not config.getoption("regression_benchmarks"):
        config.option.benchmark_disable = True
