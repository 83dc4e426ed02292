"""How long what is left will take, from what the store's records say of like stages."""

from __future__ import annotations

import math
from bisect import bisect_left
from collections import defaultdict
from collections.abc import Iterable
from dataclasses import dataclass
from statistics import median
from typing import Any

from bench.plan import Plan, Stage

#: Where no record tells a rate: a device, its peak FLOP/s in dense bf16, and the share of it that
#: training is taken to reach, low, middle and high. Of the published costs, 40 A100-hours for
#: tuning ViT-L/16 are 43 % of the peak; 2,688 V100-hours for its MAE are 10 % of a V100's.
ASSUMED_DEVICE, ASSUMED_PEAK = "A100", 312e12
ASSUMED_SHARES = (0.1, 0.3, 0.45)
#: encoders narrower than this, or not in bf16, are far from that peak: nothing is assumed of them
ASSUMED_DIM = 384


@dataclass(frozen=True)
class GpuHours:
    """GPU-hours that an assumed rate gives: the middle, and from the high to the low rate."""

    hours: float
    at_least: float
    at_most: float

    def data(self) -> dict[str, Any]:
        """As JSON data, the assumption in words."""
        return {
            "hours": self.hours,
            "at_least": self.at_least,
            "at_most": self.at_most,
            "assumed": assumption(),
        }

    def __str__(self) -> str:
        low, middle, high = (
            f"{h:,.0f}" if h >= 10 else f"{h:.1f}"
            for h in (self.at_least, self.hours, self.at_most)
        )
        return f"{middle} GPU-hours ({low} to {high})"


def assumption() -> str:
    """What `assumed` assumes, in words."""
    low, middle, high = (f"{share:.0%}" for share in ASSUMED_SHARES)
    return (
        f"{middle} ({low} to {high}) of the {ASSUMED_PEAK / 1e12:.0f} TFLOP/s in bf16 of an "
        f"{ASSUMED_DEVICE}"
    )


def assumed(stages: Iterable[Stage], known: dict[str, float]) -> GpuHours | None:
    """GPU-hours of the stages whose kind has no measured rate in `known`; None if none counts.

    Evaluations of stored features are not counted, those that run the encoder are.
    """
    operations = sum(
        stage.flops for stage in stages if stage.kind not in known and _fills_a_gpu(stage)
    )
    if not operations:
        return None
    low, middle, high = (operations / share / ASSUMED_PEAK / 3600 for share in ASSUMED_SHARES)
    return GpuHours(middle, high, low)


def _fills_a_gpu(stage: Stage) -> bool:
    dim = stage.settings.get("model", {}).get("dim", 0)
    return bool(stage.settings["numerics"]["precision"] == "bf16" and dim >= ASSUMED_DIM)


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
    if rate is None and stage.flops:  # an evaluation that runs the encoder, about as features do
        rate = known.get("features")
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
