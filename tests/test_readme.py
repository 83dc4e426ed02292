"""The README's Python runs as it is printed, without Ray; its figures are the measured ones."""

from __future__ import annotations

import json
import re
import subprocess
import sys
from pathlib import Path
from statistics import fmean, stdev
from typing import Any

import pytest
import yaml
from scipy import stats

from bench.cli import main

ROOT = Path(__file__).parents[1]
README = (ROOT / "README.md").read_text(encoding="utf-8")
CONTRIBUTING = (ROOT / "CONTRIBUTING.md").read_text(encoding="utf-8")
#: the suites that it tells to run, with their options
SUITES = re.findall(r"python -m bench (?:run|sweep|plan) (suites/[^`#\n]*)", README)
#: what the columns of a printed table are in the tables of the results
COLUMNS = ("knn", "probe", "low_shot.accuracy_5", "cost.cpu")


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


@pytest.mark.parametrize(
    ("page", "file", "place", "count"),
    [
        ("README.md", "digits", 0, 7),
        ("README.md", "cifar10", 1, 7),
        ("docs/methods.md", "successors", 0, 9),
    ],
)
def test_the_tables_are_of_the_measured_results(page: str, file: str, place: int, count: int):
    results = json.loads((ROOT / f"docs/results/{file}.json").read_text(encoding="utf-8"))
    text = (ROOT / page).read_text(encoding="utf-8")
    body = text.split("| --- | ---: |")[place + 1].partition("\n\n")[0]
    rows = [re.split(r" *\| *", line.strip("| ")) for line in body.splitlines()[1:]]
    names = list(results["tables"][0]["rows"])
    assert len(rows) == len(names) == count
    for name, (_, *cells) in zip(names, rows, strict=True):
        found = {
            key: cell for table in results["tables"] for key, cell in table["rows"][name].items()
        }
        for cell, column in zip(cells, COLUMNS, strict=False):
            values = found[column]["values"]
            mean, _, sd = cell.partition(" ± ")
            last = 10.0 ** -len(mean.partition(".")[2])
            assert float(mean) == pytest.approx(fmean(values), abs=0.51 * last), name
            assert not sd or float(sd) == pytest.approx(stdev(values), abs=0.051), name


def test_links_between_pages_lead_somewhere():
    for page in (ROOT / "README.md", ROOT / "CONTRIBUTING.md", *ROOT.glob("docs/**/*.md")):
        prose = re.sub(
            r"```.*?```|`[^`\n]*`", "", page.read_text(encoding="utf-8"), flags=re.DOTALL
        )
        for link in re.findall(r"\]\(([^)\s]+)\)", prose):
            path, _, anchor = link.partition("#")
            if "://" in link:
                continue
            target = (page.parent / path) if path else page
            assert target.exists(), f"{page.name}: {link}"
            if anchor:
                heads = re.findall(r"^#+ (.*)$", target.read_text(encoding="utf-8"), re.MULTILINE)
                slugs = [re.sub(r"[^\w -]", "", h.lower()).replace(" ", "-") for h in heads]
                assert anchor in slugs, f"{page.name}: {link}"


def primary_effect(results: dict[str, Any]) -> tuple[int, float, float, float]:
    """Return n, mean and 95 % interval of the primary comparison of the paper's table."""
    named = yaml.safe_load((ROOT / "suites/paper_table.yaml").read_text("utf-8"))["primary"]
    columns = (t["rows"] for t in results["tables"])
    rows = next(rows for rows in columns if named["metric"] in rows[named["row"]])
    ours, theirs = (rows[named[r]][named["metric"]]["values"] for r in ("row", "against"))
    test = stats.ttest_rel(ours, theirs)
    low, high = test.confidence_interval(0.95)
    return len(ours), fmean(ours) - fmean(theirs), float(low), float(high)


@pytest.mark.parametrize(("file", "place"), [("digits", 0), ("cifar10", 1)])
def test_the_primary_comparison_is_told_as_measured(file: str, place: int):
    """As the report tells it: "+1.3 points, 95 % confidence interval −0.2 to +2.8"."""
    results = json.loads((ROOT / f"docs/results/{file}.json").read_text(encoding="utf-8"))
    number = r"([+−]?[\d.]+)"
    told = rf"{number} points, 95 % confidence interval {number} to {number}"
    found = re.findall(told, " ".join(README.split()))[place]
    for text, value in zip(found, primary_effect(results)[1:], strict=True):
        assert float(text.replace("−", "-")) == pytest.approx(value, abs=0.051)


def test_fine_tuning_is_told_as_measured():
    told = (ROOT / "docs/results/README.md").read_text(encoding="utf-8")
    results = json.loads((ROOT / "docs/results/cifar10.json").read_text(encoding="utf-8"))
    rows = results["tables"][2]["rows"]
    for columns in ("low_shot_finetune", "low_shot_finetune.accuracy_10pct"):
        cells = [rows[name][columns]["values"] for name in rows if columns in rows[name]]
        line = [f"{fmean(cell):.1f} ± {stdev(cell):.1f}" for cell in cells]
        told = re.sub(r"(compute-matched )?MAE(-CT(_aug)?)? (?=\d)", "", told)
        assert ", ".join(line) + " %" in told


@pytest.mark.parametrize("suite", [line.strip() for line in dict.fromkeys(SUITES)])
def test_the_suites_that_it_tells_to_run_can_be_planned(
    suite: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.chdir(ROOT)
    assert main(["plan", *suite.split(), "--store", str(tmp_path)]) == 0


def test_the_targets_it_names_exist_and_continuous_integration_runs_its_tests():
    named = set(re.findall(r"(?:`|^ *)make ([a-z-]+)", README + CONTRIBUTING, re.MULTILINE))
    defined = re.findall(r"^([a-z-]+):", (ROOT / "Makefile").read_text(encoding="utf-8"), re.M)
    assert {"run", "test", "test-soak", "test-oldest"} <= named <= set(defined)
    steps = re.findall(r"^step .* (make .+)$", (ROOT / ".ci/run").read_text(encoding="utf-8"), re.M)
    assert "make test" in steps and "make lint" in steps
