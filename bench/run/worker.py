"""Running one stage on a worker: attempt, artifact, record. Knows nothing of Ray."""

from __future__ import annotations

import gc
import importlib
import json
import os
import platform
import resource
import time
import traceback
from collections.abc import Callable, Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from bench import environment
from bench.plan.identity import code
from bench.plan.stage import ENTRY, Stage, entry_modules, unusual
from bench.run import parts
from bench.store import gpu_meter
from bench.store.store import Store, iso, tail
from maect.files import digest

#: seconds between two lines of an attempt's log
LOG_EVERY_S = 5.0


@dataclass(frozen=True)
class Task:
    """A stage in the form that travels to a worker."""

    kind: str
    key: str
    title: str
    settings: dict[str, Any]
    #: input name -> key of the stage it comes from
    inputs: dict[str, str]
    data: dict[str, Any]
    places: dict[str, str | None]
    code: dict[str, Any]
    flops: float
    steps: int | None

    @classmethod
    def of(cls, stage: Stage) -> Task:
        data = {
            "name": stage.data.name,
            "fingerprint": stage.data.fingerprint,
            "counts": stage.data.counts,
            **unusual(stage.data),
        }
        inputs = {name: source.key for name, source in stage.inputs.items()}
        return cls(
            stage.kind, stage.key, stage.title, stage.settings, inputs, data, stage.places,
            stage.code, stage.flops, stage.steps,
        )  # fmt: skip


class StageFailed(Exception):
    """A stage failed and its record says why."""


Report = Callable[[str, dict[str, Any]], None]


def run_task(
    task: Task,
    root: Path,
    run_id: str,
    report: Report,
    workers: int = 1,
    spread: parts.Spread | None = None,
) -> None:
    """Run a stage in this process, leaving its artifact and record.

    In a group of workers every one calls this; the first one writes. With `spread` an evaluation
    is computed on as many `workers`, where it can be cut. Raises `StageFailed`.
    """
    for module in entry_modules(task.kind):
        importlib.import_module(module)  # not part of the stage's time
    _forget_memory()
    store = Store(root)
    writer = Attempt(task, store, run_id, report) if _rank() == 0 else None
    folder = from_first(writer.folder if writer is not None else None)
    stop_meter = gpu_meter.meter(_gpu(), folder, _rank())
    if writer is not None:
        writer.stop_meter = stop_meter
    try:
        check_code(task)
        if task.kind in ENTRY:
            output = _train(task, store, writer)
        else:
            output = _evaluate(task, store, writer, workers, spread)
        if writer is None:
            stop_meter()
        from_first(None)  # now all other workers' meters have told what they know
        if writer is not None:
            writer.complete(output)
            store.clear_checkpoints(task.key)
    except KeyboardInterrupt:
        raise
    except Exception as error:
        if writer is not None:
            writer.fail(error)
        raise StageFailed(f"{task.title}: {error}") from error
    finally:
        stop_meter()


def from_first(value: Any) -> Any:
    """The first worker's value, on every worker; returns when all have come here."""
    import torch.distributed as dist

    if _workers() == 1:
        return value
    box = [value]
    dist.broadcast_object_list(box, src=0)
    dist.barrier()
    return box[0]


def _gpu() -> str | None:
    """UUID of the GPU that this process computes on."""
    device = _device()
    if device.type != "cuda":
        return None
    import torch

    return str(torch.cuda.get_device_properties(device).uuid)


def check_code(task: Task) -> None:
    """The code on disk must be the planned one, or the record would name another than ran."""
    if code(*entry_modules(task.kind))["hash"] != task.code["hash"]:
        raise RuntimeError("the code was edited since the run began; start the run again")


def _rank() -> int:
    import torch.distributed as dist

    return dist.get_rank() if dist.is_available() and dist.is_initialized() else 0


def _device() -> Any:
    import torch

    if not torch.cuda.is_available():
        return torch.device("cpu")
    return torch.device("cuda", torch.cuda.current_device())


def _train(task: Task, store: Store, writer: Attempt | None) -> Any:
    """A stage of `maect.stages`."""
    job = parts.job_of(task, store, _device())
    if writer is not None:
        job.on_progress = writer.progress
    if task.steps is not None:
        from bench.store.resume import StageCheckpoints

        job.checkpoints = StageCheckpoints(store, task.key, task.code["hash"])
    return importlib.import_module(ENTRY[task.kind]).run(job)


def _evaluate(
    task: Task, store: Store, writer: Attempt | None, workers: int, spread: parts.Spread | None
) -> parts.Evaluated:
    """An evaluation of `maect.evals`."""
    found = parts.run_all(task, store, _device(), workers, spread)
    if writer is not None:
        writer.elsewhere = found[1:]
    return parts.join(task, store, found)


class Attempt:
    """One try at a stage: its start, its log, its record."""

    #: parts of an evaluation that other workers computed
    elsewhere: Sequence[parts.Part] = ()
    #: ends the measurement of the first worker's device
    stop_meter: Callable[[], None] = staticmethod(lambda: None)

    def __init__(self, task: Task, store: Store, run_id: str, report: Report) -> None:
        self.task, self.store, self.report = task, store, report
        self.began, self.cpu = time.time(), _cpu_s()
        self.start = self._start(run_id)
        self.folder = store.begin(task.key, self.start)
        self.start["attempt"] = int(self.folder.name)
        self._logged = 0.0
        self.log(f"{task.title} began")
        report(task.key, {"state": "began", "steps": task.steps})

    def _start(self, run_id: str) -> dict[str, Any]:
        inputs = {}
        for name, key in self.task.inputs.items():
            record = self.store.state(key).record
            if record is None:
                message = f"its input {key} is not in the store"
                self.report(self.task.key, {"state": "failed", "message": message})
                raise StageFailed(f"{self.task.title}: {message}")
            files = {file: entry["sha256"] for file, entry in record["files"].items()}
            inputs[name] = {"key": key, "files": files}
        devices, kind, model = _devices(self.task.settings["numerics"]["threads"])
        return {
            "schema": 1,
            "key": self.task.key,
            "kind": self.task.kind,
            "name": self.task.title,
            "run": run_id,
            "settings": self.task.settings,
            "inputs": inputs,
            "data": self.task.data,
            "code": self.task.code,
            "env": environment.describe() | _group() | {"device": model},
            "started": iso(self.began),
            "started_s": self.began,
            "pid": os.getpid(),
            "cost": {
                "devices": devices,
                "device_kind": kind,
                "device_model": model,
                "energy_kwh": None,
                "energy_reason": "no GPU" if kind == "cpu" else "not measured",
            },
        }

    def log(self, line: str) -> None:
        with (self.folder / "log.txt").open("a", encoding="utf-8") as file:
            file.write(f"{iso(time.time())} {line}\n")
        self._logged = time.monotonic()

    def progress(self, progress: Any) -> None:
        """Passes a stage's progress on, to the driver and now and then to the log."""
        if time.monotonic() - self._logged > LOG_EVERY_S:
            self.log(
                f"step {progress.step}/{progress.steps} epoch {progress.epoch} "
                f"loss {progress.loss:.4f} {progress.images_per_s:.0f} images/s"
            )
        self.report(self.task.key, {"state": "step", **vars(progress)})

    def complete(self, output: Any) -> None:
        from safetensors.torch import save

        files = {}
        for name, tensors in output.tensors.items():
            data = save({key: value.contiguous() for key, value in tensors.items()})
            files[f"{name}.safetensors"] = self._put(f"{name}.safetensors", data)
        documents = dict(output.documents)
        if output.curves:
            documents["curves"] = output.curves
        for name, document in documents.items():
            text = json.dumps(document, sort_keys=True)
            files[f"{name}.json"] = self._put(f"{name}.json", text.encode())
        self.log(f"{self.task.title} is complete")
        summary = {"flops": self.task.flops, "steps": self.task.steps, **output.summary}
        protocol = getattr(output, "protocol", {})
        self._close(
            {
                "status": "complete",
                "files": files,
                "metrics": getattr(output, "metrics", []),
                "protocol": protocol,
                "protocol_fingerprint": digest(protocol, 16) if protocol else None,
                "summary": summary,
                "error": None,
            }
        )
        self.report(self.task.key, {"state": "complete"})

    def _put(self, name: str, data: bytes) -> dict[str, Any]:
        return self.store.put_file(self.task.key, name, data)

    def fail(self, error: BaseException) -> None:
        self.log(f"{self.task.title} failed\n{''.join(traceback.format_exception(error))}")
        message = str(error) or type(error).__name__
        self._close(
            {
                "status": "failed",
                "files": {},
                "metrics": [],
                "error": {"class": type(error).__name__, "message": message},
            }
        )
        self.report(self.task.key, {"state": "failed", "message": message})

    def _close(self, end: dict[str, Any]) -> None:
        self.stop_meter()
        ended = time.time()
        wall, cost = ended - self.began, self.start["cost"]
        if cost["device_kind"] == "cpu":  # parts elsewhere hold cores, never a GPU
            cost["devices"] += _cores_elsewhere(
                cost["devices"], self.task.settings["numerics"]["threads"], self.elsewhere
            )
        cost |= {
            "wall_s": wall,
            "device_hours": cost["devices"] * wall / 3600,
            "cpu_s": _cpu_s() - self.cpu + sum(part.cpu_s for part in self.elsewhere),
        }
        if cost["device_kind"] == "gpu":
            cost |= gpu_meter.collect(self.folder, cost["devices"])
        else:
            cost["peak_memory_mib"] = _peak_memory_mib()
        log_tail = tail(self.folder / "log.txt")
        record = self.start | {"ended": iso(ended), "cost": cost, "log_tail": log_tail} | end
        if not self.store.close_attempt(record):
            raise StageFailed(f"{self.task.title}: this attempt was given up for lost")


def _group() -> dict[str, Any]:
    """Workers of the stage, and what carries their sums: gloo, nccl, nothing for one alone."""
    import torch.distributed as dist

    count = _workers()
    return {"workers": count, "backend": dist.get_backend() if count > 1 else None}


def _workers() -> int:
    import torch.distributed as dist

    return dist.get_world_size() if dist.is_available() and dist.is_initialized() else 1


def _devices(threads: int) -> tuple[int, str, str]:
    """Devices held by the stage, their kind and model.

    A CPU stage holds its threads' cores, or all there are where more threads share them.
    """
    device = _device()
    if device.type == "cuda":
        import torch

        return _workers(), "gpu", torch.cuda.get_device_name(device)
    here = int(os.environ.get("LOCAL_WORLD_SIZE", 1)) * threads
    processor = environment.processor()
    share = min(1.0, processor["cores"] / here)
    return round(_workers() * threads * share), "cpu", processor["cpu"]


def _cores_elsewhere(here: int, threads: int, found: Sequence[parts.Part]) -> int:
    """Cores that other workers held beside `here`, of this machine no more than it has."""
    near = sum(part.host == platform.node() for part in found)
    free = max(0, environment.processor()["cores"] - here)
    return min(near * threads, free) + (len(found) - near) * threads


def _cpu_s() -> float:
    usage = resource.getrusage(resource.RUSAGE_SELF)
    return usage.ru_utime + usage.ru_stime


def _forget_memory() -> None:
    """Give back what earlier stages of this process left, so that peaks are of this one."""
    import torch

    if torch.cuda.is_initialized():
        gc.collect()  # takes a quarter of a second
        torch.cuda.empty_cache()
    with suppress(OSError):  # Linux: start the peak of resident memory anew
        Path("/proc/self/clear_refs").write_text("5", encoding="ascii")


def _peak_memory_mib() -> float:
    """Peak of this process since the stage began; where Linux does not tell, of its whole life."""
    with suppress(OSError, StopIteration):
        lines = Path("/proc/self/status").read_text(encoding="ascii", errors="replace").splitlines()
        return int(next(line for line in lines if line.startswith("VmHWM:")).split()[1]) / 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024
