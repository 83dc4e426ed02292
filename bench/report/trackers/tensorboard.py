"""TensorBoard: one folder of event files a row and seed, `tensorboard --logdir` shows them.

The name of a run's file tells what it holds; one with other content of the same run is replaced.
"""

from __future__ import annotations

from collections.abc import Iterator
from io import BytesIO
from pathlib import Path

from tensorboard.compat.proto.event_pb2 import Event
from tensorboard.compat.proto.summary_pb2 import Summary
from tensorboard.plugins.hparams import summary_v2 as hparams
from tensorboard.plugins.text.metadata import create_summary_metadata
from tensorboard.summary.writer.record_writer import RecordWriter
from tensorboard.util.tensor_util import make_tensor_proto

from bench.report.trackers import TrackedRun
from maect.files import write_atomic


def write(runs: list[TrackedRun], to: Path) -> Iterator[TrackedRun]:
    """Write a folder for each run below `to`. Yield those that are new or changed."""
    for run in runs:
        name = "".join(c if c.isalnum() or c in " .,=_-" else "_" for c in run.row)
        folder = to / f"{run.suite}-{run.profile}" / name.strip(". ")[:100] / f"seed-{run.seed}"
        path = folder / f"events.out.tfevents.{int(run.started_s)}.{run.id}.{run.content}"
        if path.exists():
            continue
        folder.mkdir(parents=True, exist_ok=True)
        old = [*folder.glob(f"events.out.tfevents.*.{run.id}.*")]
        write_atomic(path, _events(run))
        for other in old:
            other.unlink()
        yield run


def _events(run: TrackedRun) -> bytes:
    """Return the bytes of a run's event file."""
    file = BytesIO()
    records = RecordWriter(file)

    def add(summary: Summary, step: int = 0) -> None:
        event = Event(wall_time=run.ended_s, step=step, summary=summary)
        records.write(event.SerializeToString())

    records.write(Event(wall_time=run.started_s, file_version="brain.Event:2").SerializeToString())
    add(hparams.hparams_pb(run.settings, trial_id=run.id, start_time_secs=run.started_s))
    for tag, step, value in run.points():
        add(Summary(value=[Summary.Value(tag=tag, simple_value=value)]), step)
    for tag, value in run.metrics.items():
        add(Summary(value=[Summary.Value(tag=tag, simple_value=value)]))
    lines = ["| artifact | lies in |", "| --- | --- |"]
    lines += [f"| {name} | {place} |" for name, place in run.artifacts.items()]
    text = make_tensor_proto("\n".join(lines).encode())
    told = create_summary_metadata("artifacts", "")
    add(Summary(value=[Summary.Value(tag="artifacts", tensor=text, metadata=told)]))
    return file.getvalue()
