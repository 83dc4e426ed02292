"""The quality gate: smoke.yaml's loss curves and metrics against the committed golden ones.

`python tests/benchmarks/golden.py` (`make golden`) renews golden.json and shows what changed.

Where processor, versions and threads are those of golden.json, every loss and every metric has to
have its bits. Elsewhere rounding differs, and with it soon which neighbour is drawn, so there
- the first losses of each stage, but of tuning after a head, are the golden ones but for
  `TOLERANCE`;
- the mean loss of each quarter of a curve, and an evaluation's first metric, an accuracy, lie
  inside the 95 % prediction interval of the golden 20 seeds (Student's t, Holm over all of them).
  An accuracy beyond the upper end warns.
"""

from __future__ import annotations

import json
import re
import sys
import tempfile
from dataclasses import dataclass, field
from pathlib import Path
from statistics import fmean, stdev
from typing import Any

from bench import environment

if __name__ == "__main__":
    environment.use("avx2")  # before numpy and torch are imported

import numpy as np

from bench.plan.planner import make_plan
from bench.run.worker import run_stage
from bench.store.store import Store
from bench.suite.load import load_suite
from maect.files import write_atomic
from reports.tables.model import Cell, Column, Value
from reports.tables.statistics import ALPHA, judged, predicted

GOLDEN = Path(__file__).with_name("golden.json")
SUITE = Path(environment.__file__).parents[1] / "suites" / "smoke.yaml"
#: seeds whose noise is measured, and those of which every bit is kept
SEEDS, KEPT = 20, 2
#: how many first losses are held to which relative difference. AVX-512 and one shard in the place
#: of AVX2 and four change them by 1e-6 (heads 5e-6, as their MAE differs, tuning after it by 4e-3)
FIRST, TOLERANCE = 4, 1e-3
#: what decides the bits, as far as it is known
_KIND = ("cpu", "vendor", "isa", "python", "torch", "numpy", "scikit-learn", "timm")

#: "MAE-CT tuning, seed 0" -> its losses; "MAE knn, seed 0/accuracy_k10" -> its one value
Found = dict[str, list[float]]


def kind() -> dict[str, Any]:
    """Return of which kind this environment is; equal kinds give equal bits."""
    here = environment.describe()
    return {name: here[name] for name in _KIND} | {"threads": 1}


def measure(root: Path, seeds: int, only: str = "*", sets: tuple[str, ...] = ()) -> Found:
    """Run the suite in this process, into an empty store. Return losses and metrics."""
    store = Store(root)
    store.create()
    plan = make_plan(load_suite(SUITE, seeds=seeds, sets=list(sets)), store, only=only)
    found: Found = {}
    for stage in plan.stages.values():
        run_stage(stage, store, "golden", lambda event: None)
        if stage.trains:
            curves = json.loads((store.fetch(stage.key) / "curves.json").read_text())
            found[stage.title] = curves["loss"]
        record = store.state(stage.key).record
        assert record is not None
        found |= {f"{stage.title}/{m.name}": [m.value] for m in record.metrics}
    return found


def cells(found: Found) -> dict[str, dict[int, float]]:
    """Return by seed what is compared by its noise: accuracies, and means of a curve's quarters."""
    table: dict[str, dict[int, float]] = {}
    seen = ""
    for name, values in found.items():
        title, _, metric = name.partition("/")
        row, _, seed = title.partition(", seed ")
        parts = {f"/{metric}": values} if metric and title != seen else {}
        seen = title
        for number, part in enumerate([] if metric else np.array_split(values, 4)):
            parts[f", loss of quarter {number + 1}"] = part.tolist()
        for part, numbers in parts.items():
            table.setdefault(f"{row}{part}", {})[int(seed or 0)] = fmean(numbers)
    return table


@dataclass
class Verdict:
    """What a comparison found, in sentences."""

    exact: bool
    compared: int
    fails: list[str] = field(default_factory=list)
    warns: list[str] = field(default_factory=list)


def judge(found: Found, golden: dict[str, Any], exact: bool | None = None) -> Verdict:
    """Return how `found` compares; bit for bit where the kinds are equal, or as `exact` says."""
    if exact is None:
        exact = golden["kind"] == kind()
    kept = {name: values for name, values in found.items() if name in golden["kept"]}
    verdict = Verdict(exact, len(kept))
    for name in found.keys() - golden["kept"].keys():
        verdict.fails.append(f"{name}: not in golden.json")
    for name, values in kept.items():
        known = golden["kept"][name]
        pairs = list(zip(values, known, strict=False))
        if not exact:
            drifted = name.replace(" tuning,", " head,") in golden["kept"].keys() - {name}
            pairs = pairs[:FIRST] if "/" not in name and not drifted else []
        bound = 0.0 if exact else TOLERANCE
        apart = [i for i, (a, b) in enumerate(pairs) if not abs(a - b) <= bound * abs(b)]
        if apart or (exact and len(values) != len(known)):
            step = apart[0] if apart else len(pairs)
            what = "value" if "/" in name else f"loss of step {step}"
            here, there = (f"{v[step]:.9g}" if step < len(v) else "none" for v in (values, known))
            verdict.fails.append(f"{name}: its {what} is {here}, golden {there}")
    if not exact:
        _by_noise(cells(found), golden["noise"], verdict)
    return verdict


def _by_noise(here: dict[str, dict[int, float]], noise: dict[str, Any], verdict: Verdict) -> None:
    tests = {}
    for name in here.keys() & noise.keys():
        column = Column(name, name, "", "metric")
        ours, reference = _cell(here[name]), _cell(dict(enumerate(noise[name])))
        if reference.sd:
            tests[name] = predicted(name, column, ours, reference)
        elif not np.isclose(ours.mean or 0.0, reference.mean or 0.0, rtol=TOLERANCE):
            verdict.fails.append(f"{name}: {ours.mean:.6g}, golden {reference.mean:.6g} always")
    for name, test in zip(tests, judged(tests.values()).values(), strict=True):
        verdict.compared += 1
        if test.p_holm is not None and test.p_holm < ALPHA:
            sds = test.mean / stdev(noise[name])
            said = f"{name}: {sds:+.1f} sd of seed noise from golden (p {test.p_holm:.2g}, Holm)"
            better = "/" in name and test.better
            (verdict.warns if better else verdict.fails).append(said)


def _cell(values: dict[int, float]) -> Cell:
    numbers = list(values.values())
    spread = stdev(numbers) if len(set(numbers)) > 1 else None
    found = tuple(Value((seed,), value, ()) for seed, value in values.items())
    return Cell("ok", found, fmean(numbers), spread)


def read() -> dict[str, Any]:
    """Return what golden.json holds."""
    return dict(json.loads(GOLDEN.read_text()))


def difference(old: dict[str, Any], new: dict[str, Any]) -> list[str]:
    """Return what has changed, in lines; the cells by how many sd of the old seeds."""
    lines = [f"{k}: {old['kind'].get(k)} -> {v}" for k, v in new["kind"].items()
             if v != old["kind"].get(k)]  # fmt: skip
    apart = [name for name, values in new["kept"].items() if values != old["kept"].get(name)]
    lines.append(f"{len(apart)} of {len(new['kept'])} curves and metrics have other bits")
    moved = []
    for name, values in new["noise"].items():
        before = old["noise"].get(name)
        if before is None:
            lines.append(f"{name}: new, {fmean(values):.4g}")
        elif (by := fmean(values) - fmean(before)) and values != before:
            moved.append((by / (stdev(before) or 1.0), name, fmean(before), fmean(values)))
    moved.sort(key=lambda one: -abs(one[0]))
    lines += [f"{name}: {a:.4g} -> {b:.4g} ({sds:+.2f} sd)" for sds, name, a, b in moved]
    return lines + [f"{name}: gone" for name in old["noise"].keys() - new["noise"].keys()]


def main() -> None:
    with tempfile.TemporaryDirectory() as place:
        found = measure(Path(place), SEEDS)
    new = {
        "command": "make golden",
        "kind": kind(),
        "noise": {
            name: [float(f"{value:.6g}") for value in by_seed.values()]
            for name, by_seed in cells(found).items()
        },
        "kept": {
            name: values
            for name, values in found.items()
            if int(name.partition("/")[0].partition(", seed ")[2] or 0) < KEPT
        },
    }
    if GOLDEN.exists():
        print("\n".join(difference(read(), new)))
    write(new)


def write(content: dict[str, Any]) -> None:
    """Write golden.json, a curve a line."""
    text = json.dumps(content, indent=1)
    text = re.sub(r"\[[^\[\]]*\]", lambda found: " ".join(found[0].split()), text)
    write_atomic(GOLDEN, f"{text}\n".encode())


if __name__ == "__main__":
    sys.exit(main())
