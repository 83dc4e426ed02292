"""What the GPUs of an attempt do and draw, through NVML. Imports neither torch nor Ray.

Every worker process meters the one device it holds: it alone knows which that is, so no device is
counted twice, none that belongs to others is read, and no worker waits for another. What a meter
knows it writes into the attempt's folder now and then, so that a worker that dies leaves it there.

    stages/<key>/attempts/<n>/gpu-<worker>.json

What was not measured for the whole attempt is blank, with the reason; never zero, never a part.
"""

from __future__ import annotations

import math
import platform
import threading
import time
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import Any

from bench.store.files import write_json
from bench.store.record import Gpu

#: seconds between two samples, and between two notes in the attempt's folder
EVERY_S = 1.0
NOTE_S = 10.0
#: how long a stage waits for a meter's first sample and for its last
PATIENCE_S = 2.0

ENERGY, UTILISATION, MEMORY = "energy_kwh", "utilisation_percent", "peak_memory_mib"
QUANTITIES = (ENERGY, UTILISATION, MEMORY)
_MIG = "MIG: the driver counts for the whole GPU, not for an instance"


def names() -> list[str]:
    """Return names of this machine's GPUs; none where there is no driver."""
    import pynvml

    try:
        pynvml.nvmlInit()
    except pynvml.NVMLError:
        return []
    try:
        count = pynvml.nvmlDeviceGetCount()
        handles = [pynvml.nvmlDeviceGetHandleByIndex(index) for index in range(count)]
        return [str(pynvml.nvmlDeviceGetName(handle)) for handle in handles]
    except pynvml.NVMLError:
        return []
    finally:
        pynvml.nvmlShutdown()


def meter(uuid: str | None, folder: Path, worker: int) -> Callable[[], None]:
    """Begin to meter the device a worker holds, if it is a GPU; returns what ends it."""
    if uuid is None:
        return lambda: None
    started = Meter(uuid, folder, worker)
    started.start()
    return started.stop


class Meter:
    """Samples one device from `start` to `stop`, in a thread that harms nothing when it fails.

    `uuid` is the device's, with or without "GPU-" or "MIG-"; `clock` gives seconds.
    """

    def __init__(
        self, uuid: str, folder: Path, worker: int = 0, clock: Callable[[], float] = time.monotonic
    ) -> None:
        self.uuid, self.path, self.worker = uuid, folder / f"gpu-{worker}.json", worker
        self.clock = clock
        self.model: str | None = None
        #: quantity -> why it is blank
        self.blank: dict[str, str] = {}
        self.samples = 0
        #: of the first and the newest sample, seconds
        self.times = (clock(), clock())
        self._handle: Any = None
        self._initialised = False
        #: whether there is a counter of energy; else power is integrated
        self._counts = True
        self._counter = (0, 0)
        self._joules = self._power = self._busy = self._memory = 0.0
        self._crowded = 0
        self._ready, self._done = threading.Event(), threading.Event()
        self._thread = threading.Thread(target=self._run, daemon=True, name=f"meter {uuid}")

    # ------------------------------------------------------------------------------ the thread

    def start(self) -> None:
        """Begin; returns when the first sample is taken, or soon if NVML does not answer."""
        self._thread.start()
        self._ready.wait(PATIENCE_S)

    def stop(self) -> None:
        """Take the last sample and leave the final note."""
        self._done.set()
        if self._thread.is_alive():
            self._thread.join(PATIENCE_S)

    def _run(self) -> None:
        try:
            noted = self.clock()
            self.open()
            self.sample()
            self._ready.set()
            while not self._done.wait(EVERY_S):
                self.sample()
                if self.clock() - noted >= NOTE_S:
                    noted = self.clock()
                    self._note(final=False)
            self.sample()
        except Exception as error:  # nothing that goes wrong here may reach the training
            self._give_up(str(error) or type(error).__name__)
        finally:
            with suppress(Exception):
                self._note(final=True)
            self.close()
            self._ready.set()

    def _note(self, *, final: bool) -> None:
        write_json(self.path, self.reading().model_copy(update={"final": final}).model_dump())

    # ------------------------------------------------------------------------------ NVML

    def open(self) -> None:
        """Find the device; what cannot be measured on it is blank from the start."""
        import pynvml

        try:
            pynvml.nvmlInit()
            self._initialised = True
            self._handle = _handle(self.uuid)
            self.model = str(pynvml.nvmlDeviceGetName(self._handle))
            self.uuid = str(pynvml.nvmlDeviceGetUUID(self._handle))
        except pynvml.NVMLError as error:
            self._give_up(f"NVML: {error}")
            return
        instance = _asks(pynvml.nvmlDeviceIsMigDeviceHandle, self._handle)
        if instance or _asks(lambda h: pynvml.nvmlDeviceGetMigMode(h)[0], self._handle):
            self.blank |= {ENERGY: _MIG, UTILISATION: _MIG}
            if not instance:
                self.blank[MEMORY] = _MIG

    def close(self) -> None:
        if self._initialised:
            import pynvml

            with suppress(pynvml.NVMLError):
                pynvml.nvmlShutdown()

    def sample(self) -> None:
        """Read everything that is not blank yet, once."""
        import pynvml

        first, last = self.times
        now = self.clock()
        if self.samples == 0:
            first = last = now
        if self._handle is not None:
            self._look_around()
        for name, read in (
            (ENERGY, self._read_energy),
            (UTILISATION, self._read_utilisation),
            (MEMORY, self._read_memory),
        ):
            if name in self.blank:
                continue
            try:
                read(now - last)
            except pynvml.NVMLError as error:
                when = f", {now - first:.0f} s into the attempt" if self.samples else ""
                self.blank[name] = f"NVML: {error}{when}"
        self.times = first, now
        self.samples += 1

    def _look_around(self) -> None:
        """A device that others use as well says nothing about this attempt."""
        import pynvml

        with suppress(pynvml.NVMLError):  # not every driver tells
            others = len(pynvml.nvmlDeviceGetComputeRunningProcesses(self._handle)) - 1
            # one that is just ending is seen once
            self._crowded = self._crowded + 1 if others > 0 else 0
            if self._crowded > 1:
                self._give_up(f"shared: {others + 1} processes compute on the device")

    def _read_energy(self, passed: float) -> None:
        import pynvml

        if self._counts:
            try:
                counted = pynvml.nvmlDeviceGetTotalEnergyConsumption(self._handle)
            except pynvml.NVMLError:
                if self.samples:
                    raise
                self._counts = False
            else:
                if counted < self._counter[1]:
                    self.blank[ENERGY] = "the device's counter of energy went back"
                self._counter = (self._counter[0] if self.samples else counted), counted
                return
        power = pynvml.nvmlDeviceGetPowerUsage(self._handle) / 1000
        self._joules += passed * (power + self._power) / 2
        self._power = power

    def _read_utilisation(self, passed: float) -> None:
        import pynvml

        busy = pynvml.nvmlDeviceGetUtilizationRates(self._handle).gpu
        self._busy += passed * busy  # NVML's figure is of the time before

    def _read_memory(self, passed: float) -> None:
        import pynvml

        used = pynvml.nvmlDeviceGetMemoryInfo(self._handle).used / 2**20
        self._memory = max(self._memory, used)

    def _give_up(self, why: str) -> None:
        self.blank = dict.fromkeys(QUANTITIES, why) | self.blank

    def reading(self) -> Gpu:
        """Return what is known by now."""
        seconds = self.times[1] - self.times[0]
        counted = (self._counter[1] - self._counter[0]) / 1000
        joules = counted if self._counts else self._joules
        short = None if seconds > 0 else "the attempt was too short for two samples"
        values = {
            ENERGY: joules / 3.6e6,
            UTILISATION: self._busy / seconds if seconds > 0 else 0.0,
            MEMORY: self._memory,
        }
        blank = {name: self.blank.get(name) or short for name in (ENERGY, UTILISATION)}
        blank[MEMORY] = self.blank.get(MEMORY)
        return Gpu(
            uuid=self.uuid,
            model=self.model,
            host=platform.node(),
            worker=self.worker,
            seconds=seconds,
            samples=self.samples,
            final=False,
            energy_from=None if blank[ENERGY] else "counter" if self._counts else "power",
            reasons={name: why for name, why in blank.items() if why},
            **{name: None if blank[name] else value for name, value in values.items()},
        )


def _handle(uuid: str) -> Any:
    """Return NVML's handle of a device. Raises `NVMLError`."""
    import pynvml

    bare = uuid.removeprefix("GPU-").removeprefix("MIG-")
    try:
        return pynvml.nvmlDeviceGetHandleByUUID(f"GPU-{bare}")
    except pynvml.NVMLError:
        with suppress(pynvml.NVMLError):
            return pynvml.nvmlDeviceGetHandleByUUID(f"MIG-{bare}")
        raise


def _asks(question: Callable[[Any], Any], handle: Any) -> bool:
    """Return a yes or no that old drivers and old devices do not know."""
    import pynvml

    try:
        return bool(question(handle))
    except pynvml.NVMLError:
        return False


# ------------------------------------------------------------------------------ the attempt's cost


def collect(folder: Path, held: int) -> dict[str, Any]:
    """Return what the meters of an attempt left, as fields of `bench.store.record.Cost`.

    Energy is the devices' sum, utilisation their mean over time, memory the largest peak. Each is
    blank, with its reason, unless all of the `held` devices have it.
    """
    gpus = []
    for path in folder.glob("gpu-*.json"):
        with suppress(OSError, ValueError):
            gpus.append(Gpu.model_validate_json(path.read_bytes()))
    gpus.sort(key=lambda gpu: gpu.worker)
    cost: dict[str, Any] = {"gpus": gpus}
    for name in QUANTITIES:
        why = [_reason(gpu, name) for gpu in gpus]
        if len(gpus) < held:
            why.append(f"{held - len(gpus)} of {held} devices left no word")
        reasons = list(dict.fromkeys(reason for reason in why if reason))
        cost[name] = None if reasons else _together(name, gpus)
        cost[name.rpartition("_")[0] + "_reason"] = "; ".join(reasons) or None
    sources = {gpu.energy_from for gpu in gpus if gpu.energy_from}
    cost["energy_from"] = None if cost[ENERGY] is None else "+".join(sorted(sources))
    return cost


def _reason(gpu: Gpu, name: str) -> str | None:
    """Return why a device did not tell a quantity."""
    if not gpu.final:
        return f"its worker ended without a word, some {gpu.seconds:.0f} s into the attempt"
    return gpu.reasons.get(name)


def _together(name: str, gpus: list[Gpu]) -> float:
    values = [getattr(gpu, name) for gpu in gpus]
    if name == ENERGY:
        return math.fsum(values)
    if name == MEMORY:
        return float(max(values))
    seconds = [gpu.seconds for gpu in gpus]
    return math.fsum(v * s for v, s in zip(values, seconds, strict=True)) / math.fsum(seconds)
