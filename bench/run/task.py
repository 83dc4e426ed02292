"""A stage in the form that travels to a worker."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from bench.plan.stage import Stage, unusual
from bench.store.record import Code, Data
from bench.store.store import Store

if TYPE_CHECKING:
    import torch

    from maect.stages.job import Job


class StageFailed(Exception):
    """A stage failed and its record says why."""


@dataclass(frozen=True)
class Task:
    """A stage without its plan: its settings, where its inputs and data lie, what it costs."""

    kind: str
    key: str
    title: str
    settings: dict[str, Any]
    #: input name -> key of the stage it comes from
    inputs: dict[str, str]
    data: Data
    places: dict[str, str | None]
    code: Code
    flops: float
    steps: int | None

    @classmethod
    def of(cls, stage: Stage) -> Task:
        """Return the task of a planned stage."""
        data = Data(
            name=stage.data.name,
            fingerprint=stage.data.fingerprint,
            counts=stage.data.counts,
            **unusual(stage.data),
        )
        return cls(
            kind=stage.kind,
            key=stage.key,
            title=stage.title,
            settings=stage.settings,
            inputs={name: source.key for name, source in stage.inputs.items()},
            data=data,
            places=stage.places,
            code=stage.code,
            flops=stage.flops,
            steps=stage.steps,
        )

    def job(self, store: Store, device: torch.device) -> Job:
        """Return the task as maect's stages take it."""
        from maect.stages.job import Job

        weights, data_root = self.places.get("weights"), self.places["data_root"]
        assert data_root is not None
        return Job(
            kind=self.kind,
            settings=self.settings,
            inputs={name: store.folder(key) for name, key in self.inputs.items()},
            data_name=self.data.name,
            data_root=Path(data_root),
            data_path=self.places["data_path"],
            lists=self.places.get("low_shot"),
            weights=Path(weights).expanduser() if weights else None,
            device=device,
        )
