"""The record of an attempt at a stage: typed, checked once where it is read, written from here.

started.json    the record as it was begun, with the status `running`
record.json     the record as it ended, with a checksum over its content
"""

from __future__ import annotations

import math
import statistics
from collections.abc import Callable
from contextlib import suppress
from datetime import datetime
from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import AfterValidator, BaseModel, ConfigDict, Field, ValidationError

from bench.store.files import read_json
from maect.datasets import DataInfo
from maect.evals.base import Measured
from maect.files import digest

#: version of the layout of stores and records, and those that are read; a store of another version
#: is refused, never changed
SCHEMA, READ = 3, (2, 3)

#: how many unreadable files a record names
NAMED_FILES = 100
#: what the meter of a GPU tells
ENERGY, UTILISATION, MEMORY = "energy_kwh", "utilisation_percent", "peak_memory_mib"
QUANTITIES = (ENERGY, UTILISATION, MEMORY)


def _time(text: str) -> str:
    if datetime.fromisoformat(text).utcoffset() is None:
        raise ValueError("it names no time zone")
    return text


def _name(text: str) -> str:
    if text in (".", "..") or any(c in text for c in "/\\\0") or not 0 < len(text) < 256:
        raise ValueError(f"'{text}' is no name of a file")
    return text


def _env(env: dict[str, Any]) -> dict[str, Any]:
    _Environment.model_validate(env, strict=True)
    return {"host": "", **env}


#: UTC, ISO 8601
Time = Annotated[str, AfterValidator(_time)]
#: of a file or folder of the store: no way out of it
Name = Annotated[str, AfterValidator(_name)]
#: what can be counted exactly
Count = Annotated[int, Field(ge=0, lt=2**53)]
Curves = dict[str, list[Count | float]]
Env = Annotated[dict[str, Any], AfterValidator(_env)]

Status = Literal["running", "complete", "failed", "interrupted", "lost", "damaged", "stopped"]


class _Part(BaseModel):
    """Read-only; fields that a later version adds are passed over."""

    model_config = ConfigDict(
        frozen=True, extra="ignore", populate_by_name=True, allow_inf_nan=False
    )


class _Environment(_Part):
    """Of what is known of an environment, what is read by name."""

    host: str = ""
    torch: str | None = None
    workers: Count = 1
    backend: str | None = None


class File(_Part):
    """A file of the artifact."""

    sha256: str
    bytes: Count


class Input(_Part):
    """What an input held when it was read: SHA-256 by file name."""

    key: Name
    files: dict[Name, str]


class Code(_Part):
    """The maect modules that a stage runs: a hash over all, and one a module."""

    hash: str
    modules: dict[str, str]


class Data(_Part):
    """The data set: images by split, and what was left out or converted."""

    name: str
    fingerprint: str | None
    counts: dict[str, Count]
    broken: Count = 0
    #: the first of them, as "file: reason"
    broken_files: list[str] = []
    converted: dict[str, Count] = {}
    #: sentences: what is assumed, left out or missing
    notes: list[str] = []

    @classmethod
    def of(cls, info: DataInfo) -> Data:
        """Return what records and reports say of a data set."""
        names = [f"{file}: {reason}" for file, reason in info.broken]
        return cls(
            name=info.name,
            fingerprint=info.fingerprint,
            counts=info.counts,
            broken=len(names),
            broken_files=names[:NAMED_FILES],
            converted={kind: len(files) for kind, files in info.converted.items()},
            notes=list(info.notes),
        )


class Failure(_Part):
    """Why an attempt did not complete."""

    kind: str = Field(alias="class")
    message: str


class Gpu(_Part):
    """What the meter of one device read; see `bench.store.gpu_meter`."""

    uuid: str
    model: str | None
    host: str
    worker: Count
    seconds: float
    samples: Count
    final: bool
    energy_kwh: float | None
    energy_from: str | None
    utilisation_percent: float | None
    peak_memory_mib: float | None
    #: the most that torch held of the device's memory for the stage
    reserved_memory_mib: float | None = None
    #: quantity -> why it is blank
    reasons: dict[str, str]

    def why_blank(self, name: str) -> str | None:
        """Return why the device did not tell a quantity, or None."""
        if not self.final:
            return f"its worker ended without a word, some {self.seconds:.0f} s into the attempt"
        return self.reasons.get(name)


class Cost(_Part):
    """Devices held and what they did; None where it was not measured, with the reason."""

    #: GPUs or cores; below 1 a share of a GPU
    devices: Count | Annotated[float, Field(gt=0, lt=1)]
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
    reserved_memory_mib: float | None = None
    #: what the meters told when the attempt ended; None: look for what they noted in its folder
    gpus: list[Gpu] | None = None

    def after(self, wall_s: float, folder: Path) -> Cost:
        """Return the cost of an attempt that took `wall_s`, with what its GPUs' meters told."""
        used = {"wall_s": wall_s, "device_hours": self.devices * wall_s / 3600}
        if self.device_kind == "gpu":
            used |= together(self.gpus or noted(folder), self.devices)
        return self.model_copy(update=used)


class Record(_Part):
    """One attempt: what it was of, where and when it ran, how it ended."""

    model_config = ConfigDict(allow_inf_nan=True)  # a metric may be NaN

    schema_: int = Field(SCHEMA, alias="schema")
    key: Name
    kind: str
    #: for people: "MAE-CT tuning, seed 0"
    name: str
    attempt: Count
    run: Name
    settings: dict[str, Any]
    inputs: dict[str, Input]
    data: Data
    code: Code
    env: Env
    started: Time
    #: seconds since the epoch
    started_s: Annotated[float, Field(ge=0, lt=2**35)]
    pid: Count
    #: when that process began, in seconds since its machine did
    process_s: Annotated[float, Field(ge=0, lt=2**35)] | None = None
    cost: Cost

    status: Status = "running"
    ended: Time | None = None
    files: dict[Name, File] = {}
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
    """One call of `run` or `sweep`: written at its start, now and then, and at its end."""

    model_config = ConfigDict(extra="ignore", allow_inf_nan=False)

    id: Name
    suite: str
    profile: str
    command: str
    #: UTC, ISO 8601
    started: str
    #: commit, and whether files differed from it
    source: dict[str, Any]
    env: dict[str, Any]
    workers: Count
    #: of the plan, and how many of them were cached
    stages: Count
    cached: Count
    #: device-hours by kind of device that worker groups held outside attempts, from their start to
    #: their end; None: not known
    reserved_hours: dict[Literal["cpu", "gpu"], float] | None = None
    status: Literal["running", "complete", "failed", "interrupted", "lost"] = "running"
    ended: str | None = None
    wall_s: float | None = None
    #: when it will end as it looks, while it runs; None: not known
    expected: str | None = None
    #: key -> why
    failed: dict[str, str] = {}
    #: of a search that explores: its identity, and key -> why it did without the stage
    search: str | None = None
    pruned: dict[str, str] | None = None
    #: what the store had of the plan when the run ended: key -> attempt -> status
    attempts: dict[str, dict[Count, Status]] = {}


def sealed(record: Record) -> dict[str, Any]:
    """Return a record as JSON data with the checksum of its content."""
    content = record.plain()
    return content | {"checksum": digest(content)}


def unsealed(content: Any) -> Record:
    """Return the record in JSON data. Raises ValueError where it is not a sound one."""
    if not isinstance(content, dict) or content.pop("checksum", None) != digest(content):
        raise ValueError("its checksum does not fit")
    record = parsed(content)
    if record.status == "running":
        raise ValueError("it says that the attempt runs")
    return record


def parsed(content: Any) -> Record:
    """Return the record in JSON data, whatever its checksum is. Raises ValueError."""
    try:
        return Record.model_validate(content)
    except ValidationError as error:
        first = error.errors()[0]
        place = ".".join(map(str, first["loc"]))
        raise ValueError(f"its '{place}' is not as records have it: {first['msg']}") from None


# ------------------------------------------------------------------------ the cost of an attempt


def noted(folder: Path) -> list[Gpu]:
    """Return what the meters of an attempt's GPUs left in its folder."""
    gpus = []
    for path in folder.glob("gpu-*.json"):
        with suppress(OSError, ValueError):
            gpus.append(Gpu.model_validate(read_json(path)))
    return sorted(gpus, key=lambda gpu: gpu.worker)


def together(gpus: list[Gpu], held: float) -> dict[str, Any]:
    """Return what the meters of an attempt's GPUs tell, as fields of `Cost`.

    Energy is the devices' sum, utilisation their mean over time, memory the largest peak. Each is
    blank, with its reason, unless all of the `held` devices have it.
    """
    held = math.ceil(held)
    cost: dict[str, Any] = {"gpus": gpus, "energy_from": None}
    reserved = [gpu.reserved_memory_mib for gpu in gpus if gpu.reserved_memory_mib is not None]
    cost["reserved_memory_mib"] = max(reserved, default=None)
    seconds = [gpu.seconds for gpu in gpus]
    totals: dict[str, Callable[[list[float]], float]] = {
        ENERGY: math.fsum,
        UTILISATION: lambda values: statistics.fmean(values, seconds),
        MEMORY: max,
    }
    for name, total in totals.items():
        why = [gpu.why_blank(name) for gpu in gpus]
        if len(gpus) < held:
            why.append(f"{held - len(gpus)} of {held} devices left no word")
        reasons = dict.fromkeys(reason for reason in why if reason)
        cost[name.rpartition("_")[0] + "_reason"] = "; ".join(reasons) or None
        cost[name] = None if reasons else total([getattr(gpu, name) for gpu in gpus])
    if cost[ENERGY] is not None:
        cost["energy_from"] = "+".join(sorted({str(gpu.energy_from) for gpu in gpus}))
    return cost
