"""Hand-made `SuiteView`s: six rows of three seeds as a finished digits suite leaves them."""

from __future__ import annotations

import hashlib
import json
from datetime import datetime, timedelta
from itertools import product
from pathlib import Path
from typing import Any

import numpy as np
import polars as pl

from reports.frames import ATTEMPTS, FAILURES, METRICS, STAGES, SuiteView

START = datetime(2026, 3, 1, 12, 0, 0)
#: k-NN and probe accuracy in percent of seeds 0, 1, 2
ACCURACY = {
    "raw pixels": ([96.6] * 3, [96.4] * 3),
    "random encoder": ([58.0, 59.4, 57.8], [86.2, 86.6, 86.1]),
    "MAE": ([94.6, 91.4, 94.2], [94.8, 93.4, 94.7]),
    "compute-matched MAE": ([93.4, 93.4, 95.4], [95.2, 95.4, 95.9]),
    "MAE-CT": ([97.8, 98.2, 97.2], [97.4, 97.6, 96.9]),
    "MAE-CT_aug": ([97.0, 97.4, 97.4], [96.8, 97.0, 97.1]),
}
#: (kind, seconds) of the training chain
CHAINS: dict[str, list[tuple[str, float]]] = {
    "raw pixels": [],
    "random encoder": [],
    "MAE": [("mae", 45.0)],
    "compute-matched MAE": [("mae", 72.0)],
    "MAE-CT": [("mae", 45.0), ("head", 3.0), ("tune", 24.0)],
    "MAE-CT_aug": [("mae", 45.0), ("head", 4.0), ("tune", 26.0)],
}
STEPS = {"mae": 1500, "head": 100, "tune": 330}
RESOLVED = "suite: paper_table\nprofile: digits\nmodel: {size: custom, patch_size: 2}\n"


#: the primary comparison that a suite names, and a further one with a row without seeds
NAMED = [
    {"metric": "knn", "row": "MAE-CT", "against": "compute-matched MAE", "primary": True},
    {"metric": "knn", "row": "MAE-CT", "against": "raw pixels", "primary": False},
]


def key_of(*parts: object) -> str:
    return hashlib.sha256("/".join(map(str, parts)).encode()).hexdigest()[:16]


def stage(key: str, kind: str, variant: str, seed: int, **changes: Any) -> dict[str, Any]:
    """One row of `stages`, complete unless told otherwise."""
    seconds = float(changes.get("wall_s") or 2.0)
    row: dict[str, Any] = dict.fromkeys(STAGES)
    row |= {
        "key": key, "kind": kind, "name": kind, "variant": variant, "seed": seed, "own": True,
        "group": "train" if kind in STEPS else "evaluate", "status": "complete", "attempt": 1,
        "steps": STEPS.get(kind), "wall_s": seconds, "cpu_s": seconds / 2, "devices": 1,
        "device_kind": "cpu", "device_model": "Xeon", "device_hours": seconds / 3600,
        "energy_reason": "no GPU", "started": START.isoformat(),
        "ended": (START + timedelta(seconds=seconds)).isoformat(), "worker": "w0",
    }  # fmt: skip
    return row | changes


def record(row: dict[str, Any], **changes: Any) -> dict[str, Any]:
    """The record behind a row of `stages`."""
    return {
        "schema": 1, "key": row["key"], "kind": row["kind"], "name": row["name"], "attempt": 1,
        "status": "complete",
        "settings": {"steps": row["steps"], "batch_size": 128, "numerics": {"threads": 1}},
        "inputs": {},
        "data": {"name": "digits", "fingerprint": "f00d", "counts": {"train": 997, "test": 500}},
        "code": {"hash": f"code-{row['kind']}", "modules": {"maect.losses": "aa"}},
        "env": {"python": "3.12.1", "torch": "2.11", "device": "Xeon", "isa": "avx512"},
        "protocol": {"k": 10, "split": "test"}, "protocol_fingerprint": "p1",
        "summary": {"final_loss": 0.42}, "files": {"out.json": {"sha256": "ab" * 32, "bytes": 12}},
        "error": None, "log_tail": "epoch 1 loss 0.5\nepoch 2 loss 0.42",
    } | changes  # fmt: skip


def metric(
    variant: str, seed: int, key: str, value: float, column: str = "knn", **changes: Any
) -> dict[str, Any]:
    """One row of `metrics`: an accuracy in percent."""
    labels = {"knn": "k-NN (k=10)", "probe": "linear probe"}
    return {
        "variant": variant, "seed": seed, "key": key, "evaluation": column.split(".")[0],
        "column": column, "label": labels.get(column, column),
        "metric": "accuracy_k10" if column == "knn" else "accuracy",
        "value": value, "unit": "%", "higher_is_better": True,
        "protocol": f"{column}-p1", "primary": True, "along": "", "at": 0.0, "series": "",
    } | changes  # fmt: skip


def frame(rows: list[dict[str, Any]], schema: dict[str, Any]) -> pl.DataFrame:
    return pl.DataFrame(rows, schema=schema, orient="row")


def view_of(
    stages: list[dict[str, Any]],
    metrics: list[dict[str, Any]],
    attempts: list[dict[str, Any]] | None = None,
    **changes: Any,
) -> SuiteView:
    """A view over rows; seeds and variants as they come, one table of everything.

    A stage's record, where it has one, stands in its row as `record`.
    """
    if attempts is None:
        known = {s["key"]: s for s in stages if s["status"] in ("complete", "stale")}
        attempts = [{name: s.get(name) for name in ATTEMPTS} for s in known.values()]
    kinds = {s["kind"] for s in stages}
    values: dict[str, Any] = {
        "suite": "paper_table", "title": "The paper's table", "profile": "digits",
        "scale": "digits 8x8, ViT 0.1 M parameters, CPU", "notes": [],
        "seeds": sorted({s["seed"] for s in stages}),
        "variants": list(dict.fromkeys(s["variant"] for s in stages)),
        "tables": [], "stages": frame([_with_record(s) for s in stages], STAGES),
        "failures": frame([], FAILURES),
        "records": {s["key"]: s["record"] for s in stages if "record" in s},
        "attempts": frame([dict.fromkeys(ATTEMPTS) | a for a in attempts], ATTEMPTS),
        "metrics": frame(metrics, METRICS), "curves": {}, "provenance": {"commit": "abc123"},
        "resolved": RESOLVED, "runs": [], "problems": [],
        "columns": {k: metric("", 0, "", 0.0, k) for k in ("knn", "probe") if k in kinds},
    }  # fmt: skip
    return SuiteView(**(values | changes))


def _with_record(row: dict[str, Any]) -> dict[str, Any]:
    """A row of `stages` with the columns that come from its record."""
    told = row.get("record") or {}
    env, numerics = told.get("env", {}), told.get("settings", {}).get("numerics", {})
    return row | {
        "code": told.get("code", {}).get("hash"),
        "shards": numerics.get("shards"),
        **{name: env.get(name) for name in ("torch", "workers", "backend")},
    }


def mae_key(variant: str, seed: int) -> str:
    """Tuned rows share the MAE of the row "MAE"; the compute-matched one is its own."""
    return key_of("mae", "long" if variant == "compute-matched MAE" else "short", seed)


def full_view(seeds: tuple[int, ...] = (0, 1, 2), **changes: Any) -> SuiteView:
    """The finished suite, with curves, lineage, workers and one failed attempt."""
    stages, metrics, curves = [], [], {}
    clock = {"w0": 0.0, "w1": 0.0}
    done: dict[str, dict[str, Any]] = {}

    def add(
        key: str, kind: str, variant: str, seed: int, seconds: float, parent: str | None, own: bool
    ) -> None:
        if key not in done:
            worker = min(clock, key=lambda w: clock[w])
            begun = START + timedelta(seconds=clock[worker])
            clock[worker] += seconds
            row = stage(
                key, kind, variant, seed, wall_s=seconds, worker=worker, started=begun.isoformat(),
                ended=(begun + timedelta(seconds=seconds)).isoformat(),
            )  # fmt: skip
            inputs = (
                {"encoder": {"key": parent, "files": {"out.json": "ab" * 32}}} if parent else {}
            )
            row["record"] = record(row, inputs=inputs)
            done[key] = row
        stages.append(done[key] | {"variant": variant, "seed": seed, "own": own})

    for variant, (knn, probe) in ACCURACY.items():
        for seed in seeds:
            parent = None
            chain = CHAINS[variant]
            for kind, seconds in chain:
                key = mae_key(variant, seed) if kind == "mae" else key_of(kind, variant, seed)
                add(key, kind, variant, seed, seconds, parent, kind != "mae" or len(chain) == 1)
                curves[key] = curve(kind, seed)
                parent = key
            for column, values in (("knn", knn), ("probe", probe)):
                key = key_of(column, variant, 0 if variant == "raw pixels" else seed)
                add(key, column, variant, seed, 2.0, parent, True)
                metrics.append(metric(variant, seed, key, values[seed % 3], column))
    attempts = [
        {n: s[n] for n in ATTEMPTS if n != "error"} | {"error": None} for s in done.values()
    ]
    failed = attempts[-1] | {
        "status": "failed",
        "wall_s": 7.2,
        "device_hours": 0.002,
        "error": "OOM",
    }
    attempts[-1] = attempts[-1] | {"attempt": 2}
    for row in stages:
        if row["key"] == failed["key"]:
            row["attempt"] = 2
    tables = [
        {
            "title": "Digits: k-NN and linear probe", "rows": None, "baseline": "MAE", "digits": 1,
            "columns": ["knn", "probe", "cost"], "groups": None, "published": True,
        }
    ]  # fmt: skip
    return view_of(
        stages, metrics, [failed, *attempts],
        **({
            "curves": curves, "tables": tables, "seeds": list(seeds),
            "gallery": gallery_of(mae_key("MAE", seeds[0]), "MAE", "MAE-CT"),
        } | changes),
    )  # fmt: skip


def headed_view() -> SuiteView:
    """The finished suite of ten seeds, with the comparisons that head its report."""
    return full_view(tuple(range(10)), named=NAMED)


#: column -> label, metric, unit, place along a curve
COLUMNS = {
    "knn": ("k-NN, k=10", "accuracy_k10", "%", 0.0),
    "probe": ("linear probe", "accuracy", "%", 0.0),
    "low_shot": ("1-shot", "accuracy_1", "%", 1.0),
    "low_shot.accuracy_2": ("2-shot", "accuracy_2", "%", 2.0),
    "low_shot.accuracy_5": ("5-shot", "accuracy_5", "%", 5.0),
    "low_shot.accuracy_10pct": ("10% of labels", "accuracy_10pct", "%", 0.0),
    "cluster": ("accuracy", "accuracy", "%", 0.0),
    "cluster.nmi": ("NMI", "nmi", "%", 0.0),
}
#: what the default suite draws by depth
BY_BLOCK = [
    f"{what}, k={k}, mean of patches"
    for what in ("k-NN", "neighbours of the same class")
    for k in (10, 20)
]
RESULTS = Path(__file__).parents[2] / "docs" / "results"


def digits_view() -> SuiteView:
    """The default suite as it was measured: rows, columns and values of the committed results."""
    results = json.loads((RESULTS / "digits.json").read_text(encoding="utf-8"))
    seeds, metrics, stages, curves = range(10), [], [], {}
    rows = list(results["tables"][0]["rows"])
    chains = {"MAE": ["mae"], "MAE, compute-matched": ["mae"], "NNCLR without MAE": ["tune"]}
    chains |= {tuned: ["mae", "head", "tune"] for tuned in ("MAE-CT", "MAE-CT_aug")}
    for variant in rows:
        costs = results["tables"][0]["rows"][variant].get("cost.total", {}).get("values")
        for seed in seeds:
            for kind in (chain := chains.get(variant, [])):
                shared = kind == "mae" and variant != "MAE, compute-matched"
                key = key_of(kind, "shared" if shared else variant, seed)
                took = 60 * costs[seed] / len(chain)
                own = not shared or len(chain) == 1
                stages.append(stage(key, kind, variant, seed, wall_s=took, own=own))
                curves[key] = curve(kind, seed)
            for kind in ("knn", "probe", "low_shot", "cluster"):
                key = key_of(kind, variant, seed)
                stages.append(stage(key, kind, variant, seed))
                for column in (name for name in COLUMNS if name.split(".")[0] == kind):
                    table = next(t for t in results["tables"] if column in t["rows"][variant])
                    values = table["rows"][variant][column]["values"]
                    label, name, unit, at = COLUMNS[column]
                    along = (
                        {"along": "images a class", "at": at, "series": "low-shot"} if at else {}
                    )
                    value = values[seed % len(values)]
                    told = {"label": label, "metric": name, "unit": unit} | along
                    metrics.append(metric(variant, seed, key, value, column, **told))
            key = key_of("knn_by_block", variant, seed)
            stages.append(stage(key, "knn_by_block", variant, seed, wall_s=0.01))
            for series, block in product(BY_BLOCK, range(4)):
                told = {"along": "block", "at": float(block), "series": series, "label": series}
                column, value = f"knn_by_block.{series} {block}", 80.0 + 3 * block + seed / 4
                metrics.append(metric(variant, seed, key, value, column, **told))
    for row in stages:
        row["record"] = record(row)
    groups = {"test accuracy of logistic regression": ["low_shot"]}
    groups["k-means on the test images"] = ["cluster"]
    tables = [
        {"title": t["title"], "baseline": "MAE", "published": True, "columns": columns, "groups": g}
        for t, columns, g in (
            (results["tables"][0], ["knn", "probe", "cost"], None),
            (results["tables"][1], list(COLUMNS)[2:], groups),
        )
    ]
    matched = "MAE, compute-matched"
    note = f"{matched}: pretraining for 2,390 steps: as many FLOPs as all stages of MAE-CT."
    return view_of(
        stages, metrics, tables=tables, curves=curves,
        title="MAE-CT, contrastive tuning of a masked autoencoder",
        scale="digits at 8×8, ViT of 0.1 M parameters (patch 2, dim 64, depth 4), CPU (AMD EPYC)",
        notes=[note] * 3, named=[NAMED[0] | {"against": matched}, NAMED[1]],
        gallery=gallery_of(stages[0]["key"], "MAE", "MAE-CT"),
        provenance={
            "commit": results["commit"],
            "environment": results["environment"] | {"switches": {"MKL_CBWR": "AVX2"}},
        },
    )  # fmt: skip


def search_view() -> SuiteView:
    """A search of eight cells with long names, whose stages are in every state."""
    rows, metrics = [], []
    states = ("complete", "pending", "running", "failed", "interrupted", "stale", "pruned")
    cells = [
        f"MAE-CT queue_size={q} augment={a} head.hidden_dim={d}"
        for q in (128, 1024) for a in ("min", "aug") for d in (1024, 2048)
    ]  # fmt: skip
    for i, cell in enumerate(cells):
        for seed in (0, 1):
            status = states[i % 7] if seed else "complete"
            reason = None if status == "complete" else "out of memory on a worker of another node"
            row = stage(key_of(cell, seed), "knn", cell, seed, status=status, reason=reason)
            row["record"] = record(row)
            rows.append(row)
            if status in ("complete", "stale"):
                metrics.append(metric(cell, seed, row["key"], 90.0 + i + seed))
    tables = [{"title": "T", "columns": ["knn", "cost"], "baseline": cells[0]}]
    settings = {cell: dict(part.split("=") for part in cell.split()[1:]) for cell in cells}
    return view_of(rows, metrics, tables=tables, cells=settings)


def gallery_of(key: str, *rows: str, channels: int = 1) -> dict[str, Any]:
    """Pictures of noise as a gallery stage leaves them; of 6 strips 2 came right, 1 went wrong."""
    random = np.random.default_rng(0)

    def images(*shape: int) -> np.ndarray:
        return random.integers(0, 256, (*shape, channels, 8, 8), dtype=np.uint8)

    labels = np.arange(6)
    near = np.tile(labels[:, None], (2, 1, 5))
    near[0, :2, 0] = near[1, 2, 0] = near[1, 3, 4] = 9
    arrays = {
        "original": images(8), "masked": images(8), "reconstructed": images(8),
        "query": images(6), "query_row": labels, "query_label": labels,
        "neighbor": images(2, 6, 5), "neighbor_row": near, "neighbor_label": near,
        "map": random.normal(size=(2, 60, 2)).astype(np.float32), "map_label": np.arange(60) % 10,
    }  # fmt: skip
    summary = {"images": 60, "gained": 2, "lost": 1, "right": 50}
    return {
        "key": key, "rows": list(rows), "seed": 0, "split": "test", "mask_ratio": 0.75,
        "norm_pix": True, "summary": summary, "arrays": arrays,
    }  # fmt: skip


def curve(kind: str, seed: int) -> dict[str, list[float]]:
    steps = list(range(0, STEPS[kind] + 1, max(1, STEPS[kind] // 60)))
    columns = {
        "step": [float(s) for s in steps],
        "loss": [0.4 + 0.6 / (1 + s / 100) + 0.01 * ((s * 7 + seed * 3) % 5) for s in steps],
        "lr": [1e-3 * (1 - s / STEPS[kind]) for s in steps],
    }
    if kind != "mae":
        columns["neighbor_accuracy"] = [60 + 25 * s / STEPS[kind] + seed for s in steps]
    return columns
