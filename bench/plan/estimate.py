"""How long what is left will take, by the store's records of like stages, else its calibration."""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Collection, Iterable, Mapping
from statistics import median_low
from typing import NamedTuple

from bench.plan.stage import Plan, Stage
from bench.plan.status import UNTRIED

#: Where no record tells a rate: a device, its peak FLOP/s in dense bf16, and the share of it that
#: training is taken to reach, low, middle and high. Of the published costs, 40 A100-hours for
#: tuning ViT-L/16 are 43 % of the peak; 2,688 V100-hours for its MAE are 10 % of a V100's.
ASSUMED_DEVICE, ASSUMED_PEAK = "A100", 312e12
ASSUMED_SHARES = (0.1, 0.3, 0.45)
#: encoders narrower than this, or not in bf16, are far from that peak: nothing is assumed of them
ASSUMED_DIM = 384


class Hours(NamedTuple):
    """Device-hours: expected, and the least and the most that are likely."""

    hours: float
    low: float
    high: float

    def __str__(self) -> str:
        middle, low, high = (f"{h:,.0f}" if h >= 10 else f"{h:.1f}" for h in self)
        return f"{middle} GPU-hours ({low} to {high})"


def assumption() -> str:
    """Return in words what `assumed` assumes."""
    low, middle, high = (f"{share:.0%}" for share in ASSUMED_SHARES)
    return (
        f"{middle} ({low} to {high}) of the {ASSUMED_PEAK / 1e12:.0f} TFLOP/s in bf16 of an "
        f"{ASSUMED_DEVICE}"
    )


def assumed(stages: Iterable[Stage], known: Mapping[str, Rates]) -> Hours | None:
    """Return the GPU-hours of stages that have no measured rate in `known`, or None.

    Evaluations of stored features are not counted, those that run the encoder are.
    """
    operations = sum(
        stage.flops for stage in stages if _of(stage, known) is None and _fills_a_gpu(stage)
    )
    if not operations:
        return None
    low, middle, high = (operations / share / ASSUMED_PEAK / 3600 for share in ASSUMED_SHARES)
    return Hours(middle, high, low)  # the lowest rate takes the longest


def _fills_a_gpu(stage: Stage) -> bool:
    """Return whether a stage's encoder comes near the assumed share of the peak."""
    dim = stage.settings.get("model", {}).get("dim", 0)
    return bool(stage.settings["numerics"]["precision"] == "bf16" and dim >= ASSUMED_DIM)


# ------------------------------------------------------------- by the store's records, calibration


class Rates(NamedTuple):
    """What is known of a kind of stage on one kind of device."""

    #: per device-second, in order: FLOPs, or of evaluations of stored features, evaluations
    speeds: list[float]
    #: the median of how many a stage held
    devices: float
    #: device-seconds before the first step, where the speeds leave them out
    start_s: float = 0.0


def last_device(stages: Collection[Stage]) -> str | None:
    """Return the kind of device that ran last, or None where none has."""
    records = [stage.record for stage in stages if stage.record is not None]
    newest = max(records, key=lambda record: record.started, default=None)
    return newest.cost.device_kind if newest else None


def rates(plan: Plan) -> dict[str, Rates]:
    """Return the rates on the kind of device last used: by kind of stage, from the records; from
    the calibration also by `Stage.like`, for stages of a kind without a record."""
    device, given = _device(plan), plan.calibration
    speeds, held = defaultdict(list), defaultdict(list)
    start_s: defaultdict[str, float] = defaultdict(float)
    for stage in plan.stages.values():
        if stage.record is not None and stage.record.cost.device_kind == device:
            cost = stage.record.cost
            spent_s = max(cost.devices * (cost.wall_s or 0.0), 1e-3)
            # of a stage that went on from a checkpoint, what its last attempt did
            left = 1 - stage.steps_at("resumed_at", stage.record) / (stage.steps or 1)
            speeds[stage.kind].append((stage.flops * left or 1.0) / spent_s)
            held[stage.kind].append(cost.devices)
    recorded = set(speeds)
    if given is not None and given.device_kind == device:
        for pace in given.paces:
            for name in (pace.like, pace.kind) if pace.kind not in recorded else ():
                speeds[name] += pace.speeds
                held[name].append(given.devices)
                start_s[name] = max(start_s[name], given.devices * pace.start_s)
    return {n: Rates(sorted(speeds[n]), median_low(held[n]), start_s[n]) for n in speeds}


def _device(plan: Plan) -> str | None:
    """Return the kind of device that ran last, else the one that was measured."""
    measured = None if plan.calibration is None else plan.calibration.device_kind
    return last_device(plan.stages.values()) or measured


def _of(stage: Stage, known: Mapping[str, Rates]) -> Rates | None:
    """Return the rates of stages like this one, else of its kind, or None."""
    return known.get(stage.like) or known.get(stage.kind)


def _hours(stage: Stage, rates: Rates) -> Hours:
    """Return the device-hours of a stage at the middle 80 % of speeds in order."""
    speeds = rates.speeds

    def at(share: float) -> float:
        speed = speeds[round(share * (len(speeds) - 1))]
        return ((stage.flops or 1.0) / speed + rates.start_s) / 3600

    return Hours(at(0.5), at(0.9), at(0.1))


def seconds(stage: Stage, known: Mapping[str, Rates]) -> float | None:
    """Return the expected wall time of one stage, or None where no like stage has run."""
    rates = _of(stage, known)
    if rates is None and stage.flops:  # an evaluation that runs the encoder, about as features do
        rates = known.get("features")
    return None if rates is None else 3600 * _hours(stage, rates).hours / rates.devices


def spared(plan: Plan) -> str | None:
    """Return in words the training that a search did without by stopping cells, or None."""
    operations, hours, known = 0.0, 0.0, rates(plan)
    stopped = [s for s in plan.with_status("pruned") if s.trains and s.reason != UNTRIED]
    for stage in stopped:
        taken = max((stage.steps_at("stopped_at", a) for a in stage.state.attempts), default=0)
        left = 1 - taken / (stage.steps or 1)
        operations += stage.flops * left
        own = _of(stage, known)
        hours += left * _hours(stage, own).hours if own else math.nan
    if not stopped:
        return None
    text = f"Stopping early spared {operations:.3g} FLOPs of training"
    device = "GPU" if _device(plan) == "gpu" else "core"
    return text + ("" if math.isnan(hours) else f", about {hours:.3g} {device}-hours") + "."


def remaining(plan: Plan, left: list[Stage], slots: int, going_s: float = 0.0) -> float | None:
    """Return the expected wall time of stages on `slots` places, in seconds.

    `going_s` is what those that run now still take, one after the other.

    None where a kind of training has not run yet. Kinds of evaluations that have not run yet count
    nothing: they take a second or so.
    """
    known = rates(plan)
    expected = {stage.key: seconds(stage, known) for stage in left}
    if any(stage.trains and expected[stage.key] is None for stage in left):
        return None
    return (going_s + sum(wall_s or 0.0 for wall_s in expected.values())) / max(slots, 1)


def device_hours(plan: Plan, todo: list[Stage]) -> tuple[str, Hours, list[str]] | None:
    """Return the kind of device that ran last or was measured, and the expected device-hours of
    `todo` on it.

    Third come the kinds of stages of which nothing is known on it, which are not counted. None
    without records and calibration.
    """
    device = _device(plan)
    if device is None:
        return None
    known = rates(plan)
    found = [(stage, _of(stage, known)) for stage in todo]
    each = [_hours(stage, own) for stage, own in found if own is not None]
    unknown = sorted({stage.kind for stage, own in found if own is None})
    return device, Hours(*(math.fsum(one[i] for one in each) for i in range(3))), unknown
