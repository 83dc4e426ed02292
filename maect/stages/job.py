"""What a stage takes and gives back."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any, Protocol

import torch
from safetensors.torch import load_file
from torch import Tensor

from maect import datasets
from maect.datasets import Split
from maect.device import keep_freed_memory
from maect.parallel import Group, make_deterministic, require_avx2
from maect.settings import DataSettings, ModelSettings, NumericsSettings


class TrainingError(RuntimeError):
    """Training cannot go on; the message says at which step and what to try."""


@dataclass(frozen=True)
class Progress:
    """How far a stage is."""

    step: int
    steps: int
    epoch: int
    loss: float
    images_per_s: float


@dataclass
class Output:
    """What a stage leaves: files of tensors, JSON files, curves, and figures for its record."""

    tensors: dict[str, dict[str, Tensor]] = field(default_factory=dict)
    documents: dict[str, Any] = field(default_factory=dict)
    curves: dict[str, list[float]] = field(default_factory=dict)
    summary: dict[str, Any] = field(default_factory=dict)
    #: of an evaluation: metric name -> value, and all that defines the numbers
    values: dict[str, float] = field(default_factory=dict)
    protocol: dict[str, Any] = field(default_factory=dict)


@dataclass
class State:
    """A training stage between two steps: everything that the next step depends on."""

    #: steps taken
    step: int
    tensors: dict[str, Tensor]
    curves: dict[str, list[float]]


class Checkpoints(Protocol):
    """Where a stage keeps its state, so that it can go on after its process has died."""

    def load(self) -> State | None:
        """Return the newest whole state; None without one. Asked on the first worker only."""

    def due(self) -> bool:
        """Return whether it is time to save. Asked on the first worker only."""

    def save(self, state: State) -> None:
        """Keep a state. Its tensors are copies, which stay as they are until `due` says yes."""

    def save_now(self, state: State) -> None:
        """Keep a state, written when this returns. Raises OSError where it cannot be written."""


@dataclass
class Job:
    """One stage to run. `settings` are the resolved ones of its key."""

    settings: dict[str, Any]
    #: folder of each input's artifact
    inputs: dict[str, Path]
    data_root: Path
    data_path: str | None = None
    #: "local": read the images from a copy on this machine
    data_stage: str | None = None
    #: folder of published lists of labelled images
    lists: str | None = None
    #: "mae", "features", or an evaluation's name
    kind: str = ""
    #: of the data set, also where `settings` say nothing of the data
    data_name: str = ""
    #: released weights, where the settings name their checksum
    weights: Path | None = None
    device: torch.device = field(default_factory=lambda: torch.device("cpu"))
    #: told now and then how far the stage is, on the first worker only
    on_progress: Callable[[Progress], None] = lambda progress: None
    #: told in sentences what is done before the first step, on the first worker only
    on_note: Callable[[str], None] = lambda note: None
    checkpoints: Checkpoints | None = None
    #: stop at a checkpoint once so many steps are taken, and leave what there is; None: take all
    stop_at: int | None = None
    #: of the data that the run was planned with; None: whatever lies here
    fingerprint: str | None = None

    @property
    def seed(self) -> int:
        """Seed of the stage's random streams; 0 for a stage that has none."""
        return int(self.settings.get("seed", 0))

    @cached_property
    def numerics(self) -> NumericsSettings:
        """Precision, threads and logical shards."""
        return NumericsSettings.parse(self.settings["numerics"])

    @cached_property
    def model(self) -> ModelSettings:
        """Sizes of encoder and decoder."""
        return ModelSettings.parse(self.settings["model"])

    @cached_property
    def data(self) -> DataSettings:
        """The data set, with the place where it lies on this machine."""
        place = {"path": self.data_path, "stage": self.data_stage}
        return DataSettings.parse(self.settings["data"] | place)

    @property
    def dtype(self) -> torch.dtype:
        """Precision of the weights; bf16 is autocast over fp32 weights."""
        return torch.float64 if self.numerics.precision == "fp64" else torch.float32

    def prepare(self) -> Group:
        """Set the process up for these numerics, deterministically. Return its group.

        Raises RuntimeError where a library computes with other instructions than those asked for.
        """
        make_deterministic(self.numerics.threads, tf32=self.numerics.tf32)
        keep_freed_memory()
        processors = self.numerics.processors or ""
        if processors.startswith("avx2"):
            require_avx2(intel=processors.endswith("GenuineIntel"))
        return Group(self.numerics.shards)

    def autocast(self) -> AbstractContextManager[Any]:
        """Return the context in which networks run forward."""
        if self.numerics.precision == "bf16":
            return torch.autocast(self.device.type, torch.bfloat16)
        return nullcontext()

    def split(self, name: str) -> Split:
        """Return a split of the data. Raises DataError, also where it is not what was planned."""
        return datasets.load(self.data, self.data_root, name, self.on_note, self.fingerprint)

    def tensors(self, input_name: str, file: str) -> dict[str, Tensor]:
        """Return the tensors of a file of an input's artifact."""
        return load_file(self.inputs[input_name] / f"{file}.safetensors")
