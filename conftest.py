"""`pytest --benchmark`: run the gate of tests/benchmarks: speed, memory and quality.

pytest-benchmark has only `--benchmark-...` options; the bare flag is ours, and so is
`--benchmark-base REV`, which compares with another commit's code.

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
from collections.abc import Iterator
from pathlib import Path

import pytest

from bench import environment

# the small suites compute with these instructions: before a test imports numpy or torch
environment.use("avx2")

ROOT = Path(__file__).parent
BENCHMARKS = ROOT / "tests" / "benchmarks"


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption(
        "--benchmark",
        action="store_true",
        dest="regression_benchmarks",
        help="run the regression benchmarks of tests/benchmarks and nothing else",
    )
    parser.addoption(
        "--benchmark-base",
        metavar="REV",
        help="compare the benchmarks with another commit's code, too; implies --benchmark",
    )


def _git(*arguments: str) -> None:
    """Run git in this checkout. Raises `pytest.UsageError` where it fails."""
    done = subprocess.run(["git", "-C", str(ROOT), *arguments], capture_output=True, text=True)
    if done.returncode:
        said = f"git {arguments[0]} says: {done.stderr.strip()}"
        raise pytest.UsageError(f"--benchmark-base needs a commit of this repository; {said}")


@pytest.fixture(scope="session")
def benchmark_base(
    pytestconfig: pytest.Config, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[Path]:
    """A worktree of the commit that `--benchmark-base` names."""
    folder = tmp_path_factory.mktemp("base") / "worktree"
    revision = pytestconfig.getoption("benchmark_base")
    _git("worktree", "add", "--quiet", "--detach", str(folder), revision)
    yield folder
    _git("worktree", "remove", "--force", str(folder))


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    """Without the flag benchmarks stay out; with it all else does, and without a base its tests."""
    wanted, base = config.getoption("regression_benchmarks"), config.getoption("benchmark_base")
    kept = [
        item
        for item in items
        if item.path.is_relative_to(BENCHMARKS) == wanted
        and (base or "benchmark_base" not in getattr(item, "fixturenames", ()))
    ]
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
    # readline, which pytest loads, sets them for all processes that it starts: text would wrap
    for name in ("COLUMNS", "LINES"):
        os.environ.pop(name, None)
    # a job in the background ignores Ctrl-C, and the commands that tests start would inherit that
    for number in (signal.SIGHUP, signal.SIGINT, signal.SIGTERM):
        if signal.getsignal(number) is signal.SIG_IGN:
            default = number == signal.SIGINT
            signal.signal(number, signal.default_int_handler if default else signal.SIG_DFL)
    config.addinivalue_line("markers", "needs(*programs): one of these must be on the PATH")
    if base := config.getoption("benchmark_base"):
        _git("rev-parse", "--verify", f"{base}^{{commit}}")
        config.option.regression_benchmarks = True
    if not config.getoption("regression_benchmarks"):
        config.option.benchmark_disable = True
