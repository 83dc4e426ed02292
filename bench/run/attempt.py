"""One try at a stage as its first worker writes it down: start, log, artifact, record."""

from __future__ import annotations

import json
import os
import resource
import time
import traceback
from contextlib import suppress
from pathlib import Path
from typing import TYPE_CHECKING, Any

from bench import environment
from bench.run.mailbox import Began, Completed, Failed, Stepped, Tell
from bench.run.task import StageFailed, Task
from bench.store.files import iso
from bench.store.record import Cost, Failure, File, Input, Record
from bench.store.store import Store
from bench.suite.evaluations import Evaluation
from maect import evals
from maect.files import digest

if TYPE_CHECKING:
    import torch

    from maect.parallel import Group
    from maect.stages.job import Output, Progress

#: seconds between two lines of an attempt's log
LOG_EVERY_S = 5.0


class Attempt:
    """Writes the files of one attempt and tells the driver about it.

    Raises `StageFailed` where an input is not in the store.
    """

    def __init__(
        self,
        task: Task,
        store: Store,
        run_id: str,
        tell: Tell,
        device: torch.device,
        group: Group,
    ) -> None:
        self.task, self.store, self.tell = task, store, tell
        self.clock = time.monotonic()
        self.record = store.begin(self._start(run_id, device, group))
        self.folder = store.attempt_folder(task.key, self.record.attempt)
        self._logged = 0.0
        self.log(f"{task.title} began")
        tell(Began(task.key))

    def _start(self, run_id: str, device: torch.device, group: Group) -> Record:
        task, began = self.task, time.time()
        return Record(
            key=task.key,
            kind=task.kind,
            name=task.title,
            attempt=0,  # the store counts
            run=run_id,
            settings=task.settings,
            inputs={name: self._input(key) for name, key in task.inputs.items()},
            data=task.data,
            code=task.code,
            env=environment.describe()
            | {"workers": group.size, "backend": _backend(group), "device": _model(device)},
            started=iso(began),
            started_s=began,
            pid=os.getpid(),
            process_s=environment.begun_s(os.getpid()),
            cost=_held(device, group, task.settings["numerics"]["threads"]),
        )

    def _input(self, key: str) -> Input:
        record = self.store.state(key).record
        if record is None:
            message = f"its input {key} is not in the store"
            self.tell(Failed(self.task.key, message))
            raise StageFailed(f"{self.task.title}: {message}")
        return Input(key=key, files=record.file_hashes)

    def log(self, line: str) -> None:
        """Add a line to the attempt's log."""
        with (self.folder / "log.txt").open("a", encoding="utf-8") as file:
            file.write(f"{iso(time.time())} {line}\n")
        self._logged = time.monotonic()

    def progress(self, progress: Progress) -> None:
        """Pass a stage's progress on, to the driver and now and then to the log."""
        if time.monotonic() - self._logged > LOG_EVERY_S:
            self.log(
                f"step {progress.step}/{progress.steps} epoch {progress.epoch} "
                f"loss {progress.loss:.4f} {progress.images_per_s:.0f} images/s"
            )
        self.tell(Stepped(self.task.key, **vars(progress)))

    def complete(self, output: Output, used_s: float) -> None:
        """Write the artifact, then the record. Raises `StageFailed` if it came too late.

        `used_s` is the processor time of all workers.
        """
        from safetensors.torch import save

        files = {}
        for name, tensors in output.tensors.items():
            data = save({key: value.contiguous() for key, value in tensors.items()})
            files[f"{name}.safetensors"] = self._put(f"{name}.safetensors", data)
        documents = output.documents | ({"curves": output.curves} if output.curves else {})
        for name, document in documents.items():
            text = json.dumps(document, sort_keys=True)
            files[f"{name}.json"] = self._put(f"{name}.json", text.encode())
        self.log(f"{self.task.title} is complete")
        end: dict[str, Any] = {
            "files": files,
            "summary": {"flops": self.task.flops, "steps": self.task.steps, **output.summary},
        }
        if self.task.kind in evals.names():
            evaluation = Evaluation.of(self.task.kind, self.task.settings)
            protocol = output.protocol | {"data": self.task.data.fingerprint}
            end |= {
                "metrics": evaluation.measured(output.values),
                "protocol": protocol,
                "protocol_fingerprint": digest(protocol, 16),
            }
        self._close("complete", end, used_s)
        self.tell(Completed(self.task.key))

    def _put(self, name: str, data: bytes) -> File:
        return self.store.put_file(self.task.key, name, data)

    def fail(self, error: BaseException, used_s: float | None) -> None:
        """Write the record of an attempt that ended with an error."""
        self.log(f"{self.task.title} failed\n{''.join(traceback.format_exception(error))}")
        message = str(error) or type(error).__name__
        self._close(
            "failed", {"error": Failure(kind=type(error).__name__, message=message)}, used_s
        )
        self.tell(Failed(self.task.key, message))

    def _close(self, status: str, end: dict[str, Any], used_s: float | None) -> None:
        used = {"cpu_s": used_s}
        if self.record.cost.device_kind == "cpu":
            used["peak_memory_mib"] = _peak_memory_mib()
        cost = self.record.cost.model_copy(update=used)
        record = self.record.model_copy(update={"cost": cost, "status": status, **end})
        ended_s = record.started_s + time.monotonic() - self.clock
        if not self.store.close_attempt(record, ended_s):
            raise StageFailed(f"{self.task.title}: this attempt was given up for lost")


def _backend(group: Group) -> str | None:
    """Return what carries the workers' sums, gloo or nccl; None for one alone."""
    import torch.distributed as dist

    return str(dist.get_backend()) if group.size > 1 else None


def _model(device: torch.device) -> str:
    """Return the name of the GPU, or of the processor."""
    import torch

    if device.type == "cuda":
        return torch.cuda.get_device_name(device)
    return str(environment.processor()["cpu"])


def _held(device: torch.device, group: Group, threads: int) -> Cost:
    """Return the devices that a stage holds.

    A CPU stage holds its threads' cores, or all there are where more threads share them.
    """
    if device.type == "cuda":
        return Cost(devices=group.size, device_kind="gpu", device_model=_model(device))
    here = int(os.environ.get("LOCAL_WORLD_SIZE", 1)) * threads
    share = min(1.0, environment.processor()["cores"] / here)
    return Cost(
        devices=round(group.size * threads * share),
        device_kind="cpu",
        device_model=_model(device),
        energy_reason="no GPU",
    )


def cpu_s() -> float:
    """Return the processor time of this process, in seconds."""
    usage = resource.getrusage(resource.RUSAGE_SELF)
    return usage.ru_utime + usage.ru_stime


def _peak_memory_mib() -> float:
    """Return this process's peak since the stage began; of its whole life where Linux is mute."""
    with suppress(OSError, StopIteration):
        lines = Path("/proc/self/status").read_text(encoding="ascii", errors="replace").splitlines()
        return int(next(line for line in lines if line.startswith("VmHWM:")).split()[1]) / 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024
