"""The record of an attempt at a stage: typed, checked once where it is read, written from here.

started.json    the record as it was begun, with the status `running`
record.json     the record as it ended, with a checksum over its content
"""

from __future__ import annotations

import math
from contextlib import suppress
from datetime import datetime
from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import AfterValidator, BaseModel, ConfigDict, Field, ValidationError

from maect.evals.base import Measured
from maect.files import digest

#: version of the layout of records; a store of another version is refused, never changed
SCHEMA = 2

#: what the meter of a GPU tells
ENERGY, UTILISATION, MEMORY = "energy_kwh", "utilisation_percent", "peak_memory_mib"
QUANTITIES = (ENERGY, UTILISATION, MEMORY)


def _time(text: str) -> str:
    datetime.fromisoformat(text)  # raises ValueError
    return text


#: UTC, ISO 8601
Time = Annotated[str, AfterValidator(_time)]

Status = Literal["running", "complete", "failed", "interrupted", "lost", "damaged"]


class _Part(BaseModel):
    """Read-only; fields that a later version adds are passed over."""

    model_config = ConfigDict(frozen=True, extra="ignore", populate_by_name=True)


class File(_Part):
    """A file of the artifact."""

    sha256: str
    bytes: int


class Input(_Part):
    """What an input held when it was read: SHA-256 by file name."""

    key: str
    files: dict[str, str]


class Code(_Part):
    """The maect modules that a stage runs: a hash over all, and one a module."""

    hash: str
    modules: dict[str, str]


class Data(_Part):
    """The data set: images by split, and what was left out or converted."""

    name: str
    fingerprint: str | None
    counts: dict[str, int]
    broken: int = 0
    #: the first of them, as "file: reason"
    broken_files: list[str] = []
    converted: dict[str, int] = {}


class Failure(_Part):
    """Why an attempt did not complete."""

    kind: str = Field(alias="class")
    message: str


class Gpu(_Part):
    """What the meter of one device read; see `bench.store.gpu_meter`."""

    uuid: str
    model: str | None
    host: str
    worker: int
    seconds: float
    samples: int
    final: bool
    energy_kwh: float | None
    energy_from: str | None
    utilisation_percent: float | None
    peak_memory_mib: float | None
    #: quantity -> why it is blank
    reasons: dict[str, str]


class Cost(_Part):
    """Devices held and what they did; None where it was not measured, with the reason."""

    devices: int
    device_kind: Literal["cpu", "gpu"]
    device_model: str
    wall_s: float | None = None
    #: devices × wall time
    device_hours: float | None = None
    #: processor time of the processes, seconds
    cpu_s: float | None = None
    energy_kwh: float | None = None
    energy_reason: str | None = None
    #: "counter", "power" (integrated), or both joined by "+"
    energy_from: str | None = None
    utilisation_percent: float | None = None
    utilisation_reason: str | None = None
    peak_memory_mib: float | None = None
    peak_memory_reason: str | None = None
    gpus: list[Gpu] | None = None

    def after(self, wall_s: float, folder: Path) -> Cost:
        """Return the cost of an attempt that took `wall_s`, with what its GPUs' meters noted."""
        used = {"wall_s": wall_s, "device_hours": self.devices * wall_s / 3600}
        metered = collect(folder, self.devices) if self.device_kind == "gpu" else {}
        return self.model_copy(update=used | metered)


class Record(_Part):
    """One attempt: what it was of, where and when it ran, how it ended."""

    schema_: int = Field(SCHEMA, alias="schema")
    key: str
    kind: str
    #: for people: "MAE-CT tuning, seed 0"
    name: str
    attempt: int
    run: str
    settings: dict[str, Any]
    inputs: dict[str, Input]
    data: Data
    code: Code
    env: dict[str, Any]
    started: Time
    #: seconds since the epoch
    started_s: float
    pid: int
    #: when that process began, in seconds since its machine did
    process_s: float | None = None
    cost: Cost

    status: Status = "running"
    ended: Time | None = None
    files: dict[str, File] = {}
    metrics: list[Measured] = []
    protocol: dict[str, Any] = {}
    protocol_fingerprint: str | None = None
    summary: dict[str, Any] = {}
    error: Failure | None = None
    #: the end of the attempt's log
    log_tail: str = ""

    @property
    def file_hashes(self) -> dict[str, str]:
        """SHA-256 by file name, as the stages built on this one keep it."""
        return {name: file.sha256 for name, file in self.files.items()}

    @property
    def primary(self) -> Measured | None:
        """The metric that the stage is known by, if it measures one."""
        return next((metric for metric in self.metrics if metric.primary), None)

    def plain(self) -> dict[str, Any]:
        """Return the record as JSON data, as it is written."""
        return self.model_dump(by_alias=True)


class Run(BaseModel):
    """One call of `run` or `sweep`: written at its start, and again at its end."""

    model_config = ConfigDict(extra="ignore")

    id: str
    suite: str
    profile: str
    command: str
    #: UTC, ISO 8601
    started: str
    #: commit, and whether files differed from it
    source: dict[str, Any]
    env: dict[str, Any]
    workers: int
    #: of the plan, and how many of them were cached
    stages: int
    cached: int
    status: Literal["running", "complete", "failed", "interrupted", "lost"] = "running"
    ended: str | None = None
    wall_s: float | None = None
    #: key -> why
    failed: dict[str, str] = {}
    #: of a search that explores: its identity, and key -> why it did without the stage
    search: str | None = None
    pruned: dict[str, str] | None = None


def sealed(record: Record) -> dict[str, Any]:
    """Return a record as JSON data with the checksum of its content."""
    content = record.plain()
    return content | {"checksum": digest(content)}


def unsealed(content: Any, key: str) -> Record:
    """Return the record in JSON data. Raises ValueError where it is not a sound one of `key`."""
    if not isinstance(content, dict):
        raise ValueError("it is no mapping")
    told = content.pop("checksum", None)
    if content.get("key") != key or told != digest(content):
        raise ValueError("its checksum does not fit")
    return parsed(content)


def parsed(content: dict[str, Any]) -> Record:
    """Return the record in JSON data without its checksum. Raises ValueError."""
    try:
        return Record.model_validate(content)
    except ValidationError as error:
        first = error.errors()[0]
        place = ".".join(map(str, first["loc"]))
        raise ValueError(f"its '{place}' is not as records have it: {first['msg']}") from None


# ------------------------------------------------------------------------ the cost of an attempt


def collect(folder: Path, held: int) -> dict[str, Any]:
    """Return what the meters of an attempt's GPUs left in its folder, as fields of `Cost`.

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
    """Return why a device did not tell a quantity, or None."""
    if not gpu.final:
        return f"its worker ended without a word, some {gpu.seconds:.0f} s into the attempt"
    return gpu.reasons.get(name)


def _together(name: str, gpus: list[Gpu]) -> float:
    """Return a quantity that all devices told, of all of them."""
    values = [getattr(gpu, name) for gpu in gpus]
    if name == ENERGY:
        return math.fsum(values)
    if name == MEMORY:
        return float(max(values))
    seconds = [gpu.seconds for gpu in gpus]
    return math.fsum(v * s for v, s in zip(values, seconds, strict=True)) / math.fsum(seconds)
