"""The README's Python runs as it is printed, without Ray."""

from __future__ import annotations

import re
import subprocess
import sys
from pathlib import Path

README = (Path(__file__).parents[1] / "README.md").read_text(encoding="utf-8")


def test_the_python_example_runs_as_printed(tmp_path: Path):
    blocks = re.findall(r"```python\n(.*?)```", README, re.DOTALL)
    assert len(blocks) == 1
    check = (
        "\nimport sys\nassert 'ray' not in sys.modules\n"
        "assert features.shape == (8, 192) and out.loss.isfinite()\n"
    )
    done = subprocess.run(
        [sys.executable, "-W", "error", "-c", blocks[0] + check],
        cwd=tmp_path, capture_output=True, text=True, timeout=300,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
