"""How long what is left will take, from what the store's records say of like stages."""

from __future__ import annotations

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

    Of evaluations only the features are counted, which take nearly all of their FLOPs.
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
