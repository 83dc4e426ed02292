"""The records section of the page: for each stage what it was, from what, and how it went."""

from __future__ import annotations

import json
from collections.abc import Iterator
from typing import Any

import yaml

from reports.display import amount, duration, held, short, slug, tail
from reports.frames import SuiteView, lookup
from reports.tables.costs import CPU_TIME, ENERGY, MEMORY, UTILISATION, Quantity, integrated

_Dumper = getattr(yaml, "CSafeDumper", yaml.SafeDumper)

#: stages beyond which complete ones are printed without settings, files and log
FULL = 400


def anchor(key: str) -> str:
    """Return the id of a stage's entry in the page."""
    return f"r-{slug(key)}"


def entries(view: SuiteView) -> Iterator[dict[str, Any]]:
    """Yield an entry for each distinct stage as the page prints it, in the plan's order."""
    in_order = view.attempts.sort("attempt", nulls_last=True)
    attempts = in_order.rows_by_key("key", named=True, include_key=True)
    for key, stage in view.by_key.items():
        record = view.record(key)
        full = len(view.by_key) <= FULL or stage["status"] in ("failed", "interrupted")
        yield stage | {
            "anchor": anchor(key),
            "users": _users(stage),
            "facts": _facts(stage, record),
            "inputs": _inputs(view, record),
            "attempts": [tried | {"cost": _cost(tried)} for tried in attempts.get(key, [])],
            "files": record.get("files") or {} if full else {},
            "blocks": _blocks(record) if full else [],
        }


def _users(stage: dict[str, Any]) -> str:
    """Return the rows and seeds that rest on a stage: "MAE, MAE-CT: seed 0"."""
    rows = list(dict.fromkeys(stage["variants"]))
    seeds = sorted(set(stage["seeds"]))
    names = ", ".join(short(variant, 30) for variant in rows[:8])
    more = f" and {len(rows) - 8} more" if len(rows) > 8 else ""
    listed = ", ".join(map(str, seeds[:10])) + (" …" if len(seeds) > 10 else "")
    return f"{names}{more}: seed {listed}"


def _cost(attempt: dict[str, Any]) -> str:
    """Return wall time, device time of GPUs, and energy of an attempt."""
    hours = attempt["device_hours"]
    on_gpu = hours is not None and attempt["device_kind"] == "gpu"
    energy = attempt[ENERGY.name] is not None
    told = [
        duration(attempt["wall_s"]),
        f"{amount(hours)} GPU-h" if on_gpu else None,
        _energy(attempt) if energy else None,
    ]
    return ", ".join(filter(None, told))


def _facts(stage: dict[str, Any], record: dict[str, Any]) -> list[tuple[str, str]]:
    """Return the lines at the head of an entry; what is not known has no line."""
    hours, devices = stage["device_hours"], stage["devices"]
    reserved = stage["reserved_memory_mib"]
    gpus = [f"{g['uuid']} ({g['model']}, {g['host']})" for g in json.loads(stage["gpus"] or "[]")]
    found = {
        "began": stage["started"],
        "ended": stage["ended"],
        "wall time": duration(stage["wall_s"]) if stage["wall_s"] is not None else None,
        "held": devices and held(devices, stage["device_kind"], stage["device_model"]),
        "device time": duration(hours * 3600) if hours and devices != 1 else None,
        "CPU time": _metered(stage, CPU_TIME),
        "peak memory": _metered(stage, MEMORY),
        "held by torch": reserved and f"{amount(reserved)} MiB of it",
        "energy": _energy(stage),
        "GPU utilisation": _metered(stage, UTILISATION),
        "GPUs": ", ".join(gpus) or None,
        "worker": stage["worker"],
        "steps": stage["steps"],
        "protocol": record.get("protocol_fingerprint"),
        "code": lookup(record, "code", "hash"),
    }
    return [(name, short(value, 200)) for name, value in found.items() if value is not None]


def _metered(stage: dict[str, Any], quantity: Quantity) -> str | None:
    """Return a value with its unit, or why there is none."""
    if stage[quantity.name] is not None:
        return quantity.text(stage[quantity.name])
    reason = stage[quantity.reason] if quantity.reason else None
    return f"not measured: {reason}" if reason else None


def _energy(stage: dict[str, Any]) -> str | None:
    """Return the energy, and its origin where it is not the device's own counter."""
    found = _metered(stage, ENERGY)
    return f"{found}, integrated from the power drawn" if integrated(stage) else found


def _inputs(view: SuiteView, record: dict[str, Any]) -> Iterator[tuple[str, str, str]]:
    """Yield (name, stage, anchor or "") of each input."""
    for name, given in (record.get("inputs") or {}).items():
        key = given["key"]
        stage = view.by_key.get(key)
        label = short(f"{stage['name']} {key[:12]}" if stage else key, 100)
        yield short(name, 40), label, anchor(key) if stage else ""


def _blocks(record: dict[str, Any]) -> list[tuple[str, str]]:
    """Return (heading, text) of what is printed as it stands: settings, metrics, log ..."""
    metrics = {
        f"{m.get('name')}": f"{m.get('value')} {m.get('unit', '')}".strip()
        for m in record.get("metrics") or []
    }
    parts = {
        "Settings": record.get("settings"),
        "Protocol": record.get("protocol"),
        "Metrics": metrics,
        "Summary": record.get("summary"),
        "Data": record.get("data"),
        "Environment": record.get("env"),
        "Code": lookup(record, "code", "modules"),
        "Error": record.get("error"),
    }
    found = [(name, tail(outline(data), 8000)) for name, data in parts.items() if data]
    log = record.get("log_tail")
    return [*found, ("Log, its end", tail(log))] if log else found


def outline(data: Any) -> str:
    """Return nested data as YAML, without the last line's end."""
    text: str = yaml.dump(data, Dumper=_Dumper, sort_keys=False, allow_unicode=True, width=1000)
    return text.rstrip()
