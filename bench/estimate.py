"""How long what is left will take, from what the store's records say of like stages."""

from __future__ import annotations

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
