"""What `bench calibrate` measured on a machine, kept in the store: plans are predicted by it."""

from __future__ import annotations

from pathlib import Path
from typing import Any, Literal

from pydantic import BaseModel, ConfigDict, Field, ValidationError

from bench.store.files import read_json

FILE = "calibration.json"


class Pace(BaseModel):
    """How fast one kind of stage goes on one device."""

    model_config = ConfigDict(allow_inf_nan=False)

    kind: str
    #: of the stage that was measured
    title: str
    #: equal for stages of equal steps; see `bench.plan.stage.Stage.like`
    like: str
    #: in order, per device-second: FLOPs, or of evaluations of stored features, evaluations
    speeds: list[float] = Field(min_length=1)
    #: seconds before the first step: data, networks, compilation
    start_s: float
    #: images in a step, where fewer were taken than the stage takes
    batch: int | None = None
    images_per_s: float | None = None
    #: share of the rate of a matrix product of the same precision
    share_of_peak: float | None = None
    peak_memory_gib: float | None = None
    #: share of a step's time that is waited for images
    waiting: float | None = None
    #: times in a step that the CPU waits for the GPU
    waits_for_gpu: int | None = None
    #: what limits: "data", "launches" (the CPU that starts the GPU's work) or "device"
    limit: str | None = None


class Calibration(BaseModel):
    """The paces of a suite's stages on one kind of device."""

    device_kind: Literal["cpu", "gpu"]
    device_model: str
    #: devices that a worker holds
    devices: float
    made: str
    command: str
    env: dict[str, Any]
    #: precision -> FLOP/s of a large matrix product
    matrix_product: dict[str, float]
    #: how the images were come by
    images: str
    paces: list[Pace] = []


def read(root: Path) -> Calibration | None:
    """Return what lies in a store's folder; None where nothing does, or nothing that is whole."""
    try:
        return Calibration.model_validate(read_json(root / FILE))
    except (OSError, ValueError, ValidationError):
        return None
