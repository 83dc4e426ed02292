"""Runs of the gate's quicker half on code without a regression: how often does it raise an alarm?

    python tests/benchmarks/clean_runs.py 20 docs/results/gate_runs.json

Goes on where the file ends, which is written after each run; other work on the machine is welcome.
"""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
import time
from pathlib import Path

from bench import environment
from bench.store.files import iso, write_json

ROOT = Path(__file__).parents[2]
CHOSEN = "(test_speed and step and not base) or memory or quality"
COMMAND = ["-m", "pytest", "--benchmark", "-k", CHOSEN, "tests/benchmarks/test_gate.py"]
FIGURE = re.compile(r"^  ([\w-]+): ([-+.\d]+) (times|MiB) .*\(bound ([.\d]+)\)", re.MULTILINE)


def run() -> dict[str, object]:
    """Return what one run found; of each figure its share of the bound."""
    began, load = time.time(), os.getloadavg()[0]
    done = subprocess.run([sys.executable, *COMMAND], cwd=ROOT, capture_output=True, text=True)
    found = FIGURE.findall(done.stdout)
    return {
        "date": iso(began),
        "seconds": round(time.time() - began),
        "load_before_and_after": [round(load, 1), round(os.getloadavg()[0], 1)],
        "exit_code": done.returncode,
        "of_bound": {
            f"{name} {unit}": round(float(value) / float(bound), 3)
            for name, value, unit, bound in found
        },
        "quality": re.findall(r"\d+ losses and metrics compared .*: \d+ differ", done.stdout),
        "failed": re.findall(r"^FAILED (\S+)", done.stdout, re.MULTILINE),
    }


def main(number: int, path: Path) -> None:
    commit = subprocess.run(["git", "rev-parse", "HEAD"], cwd=ROOT, capture_output=True, text=True)
    results = {
        "command": f"pytest --benchmark -k '{CHOSEN}' tests/benchmarks/test_gate.py",
        "commit": commit.stdout.strip(),
        "processor": environment.processor(),
        "versions": environment.versions(),
        "runs": [],
    }
    if path.exists():
        results = json.loads(path.read_text())
    while len(results["runs"]) < number:
        results["runs"].append(run())
        write_json(path, results)


if __name__ == "__main__":
    main(int(sys.argv[1]), Path(sys.argv[2]))
