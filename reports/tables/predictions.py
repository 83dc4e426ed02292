"""What the stages of a suite were predicted to cost, against what they did."""

from __future__ import annotations

import math
from collections import defaultdict
from dataclasses import dataclass
from typing import Any

from reports.display import short
from reports.facts import DONE, Facts

_WORDS = {"gpu": "GPU", "cpu": "CPU"}


@dataclass(frozen=True)
class Prediction:
    """Device-hours of the stages of one kind that can be predicted, together."""

    kind: str
    device: str
    count: int
    hours: float
    low: float
    high: float
    actual: float

    @property
    def off(self) -> float:
        """Actual over predicted, less one, in percent."""
        return 100 * (self.actual / self.hours - 1)


def predictions(facts: Facts) -> list[Prediction]:
    """A line a kind of stage and device, then one of all kinds of each device."""
    groups: dict[tuple[str, str], list[dict[str, Any]]] = defaultdict(list)
    for key, row in facts.stages.items():
        if key in facts.view.predicted and row["status"] in DONE and row["device_hours"]:
            groups[row["device_kind"], row["kind"]].append(row)
    found = []
    for device in dict.fromkeys(device for device, _ in groups):
        mine = {kind: rows for (held, kind), rows in groups.items() if held == device}
        found += [_line(facts, kind, device, rows) for kind, rows in mine.items()]
        if len(mine) > 1:
            every = [row for rows in mine.values() for row in rows]
            found.append(_line(facts, "together", device, every))
    return found


def _line(facts: Facts, kind: str, device: str, rows: list[dict[str, Any]]) -> Prediction:
    expected = [facts.view.predicted[row["key"]] for row in rows]
    hours, low, high = (math.fsum(values) for values in zip(*expected, strict=True))
    actual = math.fsum(row["device_hours"] for row in rows)
    return Prediction(
        short(kind, 30), _WORDS.get(device, "device"), len(rows), hours, low, high, actual
    )
