"""How long what is left will take, from what the store's records say of like stages."""

from __future__ import annotations

import math
from bisect import bisect_left
from collections import defaultdict
from collections.abc import Iterable
from statistics import median

from bench.plan import Plan, Stage


def rates(stages: Iterable[Stage]) -> dict[str, float]:
    """Median FLOP/s (training, features) or 1/s (evaluations) of each kind with a record."""
    seen: dict[str, list[float]] = {}
    for stage in stages:
        if stage.record is None:
            continue
        wall = stage.record["cost"]["wall_s"]
        seen.setdefault(stage.kind, []).append((stage.flops or 1.0) / max(wall, 1e-3))
    return {kind: median(values) for kind, values in seen.items()}


def seconds(stage: Stage, known: dict[str, float]) -> float | None:
    """Expected wall time of one stage; None where no like stage has run."""
    rate = known.get(stage.kind)
    return None if rate is None else (stage.flops or 1.0) / rate


def remaining(plan: Plan, left: list[Stage], slots: int) -> float | None:
    """Expected wall time of the stages left on `slots` places; None until all kinds have run.

    Kinds of evaluations that have not run yet count nothing: they take a second or so.
    """
    known = rates(plan.stages.values())
    total = 0.0
    for stage in left:
        expected = seconds(stage, known)
        if expected is None:
            if stage.trains:
                return None
            continue
        total += expected
    return total / max(slots, 1)


# ------------------------------------------------------------------------------------ device-hours

#: device-hours: expected, and at the fast and slow ends of the middle 80 % of rates
Interval = tuple[float, float, float]
_MIDDLE, _SLOW, _FAST = 0.5, 0.1, 0.9


def _device_rates(stages: Iterable[Stage]) -> dict[tuple[str, str], list[float]]:
    """FLOPs (or evaluations) per device-second of every record, in order, by kind and device."""
    found: dict[tuple[str, str], list[float]] = defaultdict(list)
    for stage in stages:
        if stage.record is not None:
            found[stage.kind, stage.record["cost"]["device_kind"]].append(_rate(stage))
    return {key: sorted(values) for key, values in found.items()}


def _rate(stage: Stage) -> float:
    assert stage.record is not None
    cost = stage.record["cost"]
    return (stage.flops or 1.0) / max(cost["devices"] * cost["wall_s"], 1e-3)


def _interval(stage: Stage, ordered: list[float], without: int | None = None) -> Interval:
    """Device-hours at rates in order, the one at place `without` left out."""
    count = len(ordered) - (without is not None)

    def at(share: float) -> float:
        place = round(share * (count - 1))
        place += without is not None and place >= without
        return (stage.flops or 1.0) / ordered[place] / 3600

    return at(_MIDDLE), at(_FAST), at(_SLOW)


def in_hindsight(stages: Iterable[Stage]) -> dict[str, Interval]:
    """What each complete stage would have been expected to cost from the other records alone."""
    stages = list(stages)
    known, found = _device_rates(stages), {}
    for stage in stages:
        if stage.record is None:
            continue
        ordered = known[stage.kind, stage.record["cost"]["device_kind"]]
        if len(ordered) > 1:
            found[stage.key] = _interval(stage, ordered, bisect_left(ordered, _rate(stage)))
    return found


def device_hours(plan: Plan, todo: list[Stage]) -> tuple[str, Interval, list[str]] | None:
    """Expected device-hours of `todo` on the device that ran last: its kind, and the hours.

    Also the kinds of stages that have not run on it, which are not counted. None without records.
    """
    records = [stage.record for stage in plan.stages.values() if stage.record is not None]
    if not records:
        return None
    device = max(records, key=lambda record: str(record["started"]))["cost"]["device_kind"]
    known = _device_rates(plan.stages.values())
    counted = [stage for stage in todo if (stage.kind, device) in known]
    each = [_interval(stage, known[stage.kind, device]) for stage in counted]
    unknown = sorted({stage.kind for stage in todo} - {stage.kind for stage in counted})
    hours, low, high = (math.fsum(one[i] for one in each) for i in range(3))
    return device, (hours, low, high), unknown
