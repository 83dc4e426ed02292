"""A run's budget of device time, counted as the ledger counts: devices held × wall time."""

from __future__ import annotations

import time

from bench.store.store import Store


class Spent:
    """Device-hours of one run's attempts: failed, lost and unfinished ones too."""

    def __init__(self, store: Store, run_id: str) -> None:
        self.store, self.run_id = store, run_id
        #: key -> hours of its attempts, once none is going on
        self._ended: dict[str, float] = {}

    def hours(self, begun: set[str], running: set[str]) -> float:
        """Return the hours of all stages that the run has `begun`; it works on `running` now."""
        for key in running:
            self._ended.pop(key, None)
        total = 0.0
        for key in begun:
            if key not in self._ended:
                hours = self._hours(key)
                if key in running:
                    total += hours
                    continue
                self._ended[key] = hours
            total += self._ended[key]
        return total

    def _hours(self, key: str) -> float:
        total = 0.0
        for attempt in self.store.state(key).attempts:
            if attempt.run != self.run_id:
                continue
            if attempt.status == "running":
                wall = max(0.0, time.time() - attempt.started_s)
                total += attempt.cost.devices * wall / 3600
            else:
                total += attempt.cost.device_hours or 0.0
        return total
