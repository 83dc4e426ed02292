"""The record of an attempt at a stage: typed, checked once where it is read, written from here.

started.json    the record as it was begun, with the status `running`
record.json     the record as it ended, with a checksum over its content
"""

from __future__ import annotations

from datetime import datetime
from typing import Annotated, Any, Literal

from pydantic import AfterValidator, BaseModel, ConfigDict, Field, ValidationError

from maect.evals.base import Measured
from maect.files import digest

#: version of the layout of records; a store of another version is refused, never changed
SCHEMA = 2


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
