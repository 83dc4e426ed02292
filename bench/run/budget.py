"""A run's budget of device time, counted as the ledger counts: devices held × wall time."""

from __future__ import annotations

from collections.abc import Mapping

from bench.store.store import Store


class Spent:
    """Device-hours of one run's attempts: failed, lost and unfinished ones too."""

    def __init__(self, store: Store, run_id: str) -> None:
        self.store, self.run_id = store, run_id
        #: key -> hours of its attempts, once none is going on
        self._ended: dict[str, float] = {}

    def hours(self, begun: set[str], running: Mapping[str, float]) -> float:
        """Return the hours of all stages that the run has `begun`.

        It works on `running` now: key -> for how many seconds.
        """
        for key in running:
            self._ended.pop(key, None)
        total = 0.0
        for key in begun:
            if key not in self._ended:
                hours = self._hours(key, running.get(key, 0.0))
                if key in running:
                    total += hours
                    continue
                self._ended[key] = hours
            total += self._ended[key]
        return total

    def _hours(self, key: str, wall_s: float) -> float:
        total = 0.0
        for attempt in self.store.state(key).attempts:
            if attempt.run != self.run_id:
                continue
            if attempt.status == "running":
                total += attempt.cost.devices * wall_s / 3600
            else:
                total += attempt.cost.device_hours or 0.0
        return total
