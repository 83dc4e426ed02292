"""What the GPUs of an attempt do and draw, through NVML. Imports neither torch nor Ray.

Every worker process meters the one device it holds: it alone knows which that is, so no device is
counted twice, none that belongs to others is read, and no worker waits for another. What a meter
knows it writes into the attempt's folder now and then, so that a worker that dies leaves it there.
At the end of an attempt the first worker asks all of them, whatever it sees of the folder.

    stages/<key>/attempts/<n>/gpu-<worker>.json

What was not measured for the whole attempt is blank, with the reason; never zero, never a part.
"""

from __future__ import annotations

import platform
import threading
import time
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import Any

import pynvml

from bench.store.files import write_json
from bench.store.record import ENERGY, MEMORY, QUANTITIES, UTILISATION, Gpu

#: seconds between two samples, and between two notes in the attempt's folder
EVERY_S = 1.0
NOTE_S = 10.0
#: how long a stage waits for a meter's first sample and for its last
PATIENCE_S = 2.0

_MIG = "MIG: the driver counts for the whole GPU, not for an instance"


def names() -> list[str]:
    """Return the names of this machine's GPUs; none where there is no driver."""
    try:
        pynvml.nvmlInit()
        handles = map(pynvml.nvmlDeviceGetHandleByIndex, range(pynvml.nvmlDeviceGetCount()))
        return [str(pynvml.nvmlDeviceGetName(handle)) for handle in handles]
    except pynvml.NVMLError:
        return []
    finally:
        with suppress(pynvml.NVMLError):
            pynvml.nvmlShutdown()


def driver_version() -> str:
    """Return the version of the GPUs' driver, or why NVML does not tell it."""
    try:
        pynvml.nvmlInit()
        return str(pynvml.nvmlSystemGetDriverVersion())
    except pynvml.NVMLError as error:
        return f"unknown (NVML: {error})"
    finally:
        with suppress(pynvml.NVMLError):
            pynvml.nvmlShutdown()


class Meter:
    """Samples one device while its block runs, in a thread that harms nothing when it fails.

    `uuid` is the device's, with or without "GPU-" or "MIG-"; `clock` gives seconds. Of a device
    that the worker was given a `share` of, nothing can be told.
    """

    def __init__(
        self,
        uuid: str,
        folder: Path,
        worker: int = 0,
        clock: Callable[[], float] = time.monotonic,
        share: float = 1.0,
    ) -> None:
        self.uuid, self.path, self.worker = uuid, folder / f"gpu-{worker}.json", worker
        self.clock = clock
        self.model: str | None = None
        #: quantity -> why it is blank
        why = f"shared: the worker held {share:g} of the device"
        self.blank: dict[str, str] = dict.fromkeys(QUANTITIES, why) if share < 1 else {}
        self.samples = 0
        #: of the first and the newest sample, seconds
        self.times = (clock(), clock())
        self._handle: Any = None
        #: millijoules at the first and the newest sample; None where power is integrated
        self._counter: tuple[int, int] | None = None
        self._joules = self._power = self._busy = self._memory = 0.0
        #: samples in a row at which others computed on the device
        self._crowded = 0
        #: whether the last sample is taken
        self._final = False
        self._ready, self._done = threading.Event(), threading.Event()
        self._thread = threading.Thread(target=self._run, daemon=True, name=f"meter {uuid}")

    # ------------------------------------------------------------------------------ the thread

    def __enter__(self) -> None:
        """Begin. Return when the first sample is taken, or soon if NVML does not answer."""
        self._thread.start()
        self._ready.wait(PATIENCE_S)

    def __exit__(self, *_: object) -> None:
        """Take the last sample and leave the final note."""
        self._done.set()
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
                    self._note()
            self.sample()
        except Exception as error:  # nothing that goes wrong here may reach the training
            self._give_up(str(error) or type(error).__name__)
        self._final = True
        with suppress(Exception):
            self._note()
        self.close()
        self._ready.set()

    def _note(self) -> None:
        write_json(self.path, self.reading().model_dump())

    # ------------------------------------------------------------------------------ NVML

    def open(self) -> None:
        """Find the device; what cannot be measured on it is blank from the start."""
        try:
            pynvml.nvmlInit()
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
        """Let go of NVML."""
        with suppress(pynvml.NVMLError):
            pynvml.nvmlShutdown()

    def sample(self) -> None:
        """Read everything that is not blank yet, once."""
        now = self.clock()
        first, last = self.times if self.samples else (now, now)
        if self._handle is not None:
            self._look_around()
        readers = {
            ENERGY: self._read_energy,
            UTILISATION: self._read_utilisation,
            MEMORY: self._read_memory,
        }
        for name in readers.keys() - self.blank.keys():
            try:
                readers[name](now - last)
            except pynvml.NVMLError as error:
                when = f", {now - first:.0f} s into the attempt" if self.samples else ""
                self.blank[name] = f"NVML: {error}{when}"
        self.times = first, now
        self.samples += 1

    def _look_around(self) -> None:
        """Give up on a device that others use as well: it says nothing about this attempt."""
        with suppress(pynvml.NVMLError):  # not every driver tells
            others = len(pynvml.nvmlDeviceGetComputeRunningProcesses(self._handle)) - 1
            # one that is just ending is seen once
            self._crowded = self._crowded + 1 if others > 0 else 0
            if self._crowded > 1:
                self._give_up(f"shared: {others + 1} processes compute on the device")

    def _read_energy(self, passed_s: float) -> None:
        if self._counter is not None or not self.samples:
            try:
                counted = pynvml.nvmlDeviceGetTotalEnergyConsumption(self._handle)
            except pynvml.NVMLError:  # at first: there is no counter
                if self.samples:
                    raise
            else:
                first, last = self._counter or (counted, counted)
                if counted < last:
                    self.blank[ENERGY] = "the device's counter of energy went back"
                self._counter = first, counted
                return
        power_w = pynvml.nvmlDeviceGetPowerUsage(self._handle) / 1000
        self._joules += passed_s * (power_w + self._power) / 2
        self._power = power_w

    def _read_utilisation(self, passed_s: float) -> None:
        # NVML's figure is of the time before
        self._busy += passed_s * pynvml.nvmlDeviceGetUtilizationRates(self._handle).gpu

    def _read_memory(self, passed_s: float) -> None:
        used_mib = pynvml.nvmlDeviceGetMemoryInfo(self._handle).used / 2**20
        self._memory = max(self._memory, used_mib)

    def _give_up(self, why: str) -> None:
        self.blank = dict.fromkeys(QUANTITIES, why) | self.blank

    def reading(self) -> Gpu:
        """Return what is known by now."""
        seconds = self.times[1] - self.times[0]
        short = "the attempt was too short for two samples"
        blank = ({} if seconds > 0 else {ENERGY: short, UTILISATION: short}) | self.blank
        joules, source = self._joules, "power"
        if self._counter is not None:
            joules, source = (self._counter[1] - self._counter[0]) / 1000, "counter"
        return Gpu(
            uuid=self.uuid,
            model=self.model,
            host=platform.node(),
            worker=self.worker,
            seconds=seconds,
            samples=self.samples,
            final=self._final,
            energy_kwh=None if ENERGY in blank else joules / 3.6e6,
            energy_from=None if ENERGY in blank else source,
            utilisation_percent=None if UTILISATION in blank else self._busy / seconds,
            peak_memory_mib=None if MEMORY in blank else self._memory,
            reasons=blank,
        )


def _handle(uuid: str) -> Any:
    """Return NVML's handle of a device. Raises `NVMLError`."""
    bare = uuid.removeprefix("GPU-").removeprefix("MIG-")
    try:
        return pynvml.nvmlDeviceGetHandleByUUID(f"GPU-{bare}")
    except pynvml.NVMLError:
        with suppress(pynvml.NVMLError):
            return pynvml.nvmlDeviceGetHandleByUUID(f"MIG-{bare}")
        raise


def _asks(question: Callable[[Any], Any], handle: Any) -> bool:
    """Return the answer to a yes or no; no where the driver or the device does not know it."""
    try:
        return bool(question(handle))
    except pynvml.NVMLError:
        return False
