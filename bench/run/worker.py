"""Running stages on the workers of a group. The first worker writes each attempt down.

Imports torch; knows nothing of Ray.
"""

from __future__ import annotations

import gc
import importlib
import json
import os
import platform
import re
import resource
import time
import traceback
from collections.abc import Callable
from contextlib import nullcontext, suppress
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from safetensors.torch import save

from bench import environment
from bench.errors import MachineError
from bench.plan.identity import code
from bench.plan.stage import Stage, entry_modules
from bench.run.mailbox import Began, Ended, Stepped, Tell
from bench.store.files import iso
from bench.store.gpu_meter import Meter, driver_version
from bench.store.record import Cost, Data, Failure, Gpu, Input, Record, Status
from bench.store.resume import StageCheckpoints
from bench.store.store import Store
from bench.suite.evaluations import Evaluation
from maect import evals, memory
from maect.datasets import decoders
from maect.files import digest
from maect.parallel import Group
from maect.stages.job import Job, Output, Progress
from maect.stages.loop import train
from maect.stages.rung import measure

#: seconds between two lines of an attempt's log
LOG_EVERY_S = 5.0
#: how a record names the error of a stage for which there was not enough memory
OUT_OF_MEMORY = "OutOfMemory"
#: why nothing of a stage is published
_TAKEN = "another run has taken its lease, as this one gave no sign of life"
#: what CUDA says where torch has no class for it
_NO_MEMORY = re.compile("CUDA error: out of memory|CUBLAS_STATUS_ALLOC_FAILED")
#: what torch and numpy say was asked for, what the device has, what of it was free
_MEMORY = tuple(
    re.compile(f"{before} ([0-9.]+ [A-Za-z]+)")
    for before in ("(?:tried|Tried|Unable) to allocate", "total capacity of", "of which")
)


class StageFailed(Exception):
    """A stage failed and its record says why."""


def serve(
    take: Callable[[], Stage | None], tell: Tell, store: Store, run_id: str, gpus: float
) -> None:
    """Run stage after stage until `take` gives none. Every worker of a group calls this.

    `gpus` is what each worker was given of them. Raises `StageFailed` where the group must not go
    on after a stage that failed, `MachineError` where torch cannot use the GPU that was given.
    """
    if gpus:
        require_gpu()
    group = Group()
    while (stage := group.share(take() if group.rank == 0 else None)) is not None:
        try:
            run_stage(stage, store, run_id, tell, gpus, leased=True)
        except StageFailed:
            if group.size > 1:  # the others may hang in a collective call
                raise
            if torch.cuda.is_initialized():  # everything may fail from now on in its context
                return


def _cpu_s() -> float:
    """Return the CPU time of this process and of those that decode for it, seconds."""
    return time.process_time() + decoders.used_s


def require_gpu() -> None:
    """Raise `MachineError` where torch cannot use the GPU that this process was given.

    It would compute on the CPU, and nobody would notice but for the time.
    """
    if not torch.cuda.is_available():
        wheel = f"for CUDA {torch.version.cuda}" if torch.version.cuda else "for CPUs only"
        raise MachineError(
            f"Ray gave a worker a GPU that its torch cannot use: torch {torch.__version__} is "
            f"built {wheel}, the driver is {driver_version()} on {platform.node()}. Run on the CPU "
            "with --cpu, or install a torch that is built for this driver"
        )


def run_stage(
    stage: Stage,
    store: Store,
    run_id: str,
    tell: Tell,
    gpus: float | None = None,
    *,
    leased: bool = False,
) -> None:
    """Run a stage in this process, leaving its artifact and record. Raises `StageFailed`.

    Every worker of a group calls this; the first one writes. `gpus` is what each worker was given
    of them: 0 computes on the CPU, None on a GPU where torch has one. `leased` says that a driver
    has the stage's lease; once another run has taken it, nothing is published.
    """
    if gpus is None:
        gpus = float(torch.cuda.is_available())
    modules = entry_modules(stage.kind)
    for module in modules:
        importlib.import_module(module)  # not part of the stage's time
    forget_memory()
    group, device, began_s = Group(), device_of(gpus), _cpu_s()
    attempt = None
    if group.rank == 0:
        attempt = Attempt(stage, store, run_id, tell, device, group, gpus, leased)
    record = group.share(None if attempt is None else attempt.record)
    folder = store.attempt_folder(stage.key, record.attempt)
    folder.mkdir(parents=True, exist_ok=True)  # without a shared disk each machine has its own
    uuid = _uuid(device)
    meter = Meter(uuid, folder, group.rank, share=gpus) if uuid else None
    try:
        with meter or nullcontext():
            _check(stage, modules)
            job = job_of(stage, store, device)
            if attempt is not None:
                job.on_progress, job.on_note = attempt.progress, attempt.log
            job.stop_at = stage.rung.step if stage.rung else None
            if stage.steps:
                job.checkpoints = kept = StageCheckpoints(store, stage.key, stage.code.hash)
                kept.attempt, kept.leased_to = folder, run_id if leased else None
            entry = importlib.import_module(modules[0])
            output = train(entry.training(job)) if stage.trains else entry.run(job)
            if stage.steps:
                kept.wait()
            if stage.rung:
                evaluation = stage.rung.evaluation
                # as if their inputs were there
                following = (evaluation.inputs["features"], evaluation)
                jobs = (job_of(replace(s, inputs={}), store, device) for s in following)
                output.values = measure(output, *jobs)
        used = _of_all(group, (_cpu_s() - began_s, meter and _reading(meter, device)))
        if attempt is not None:
            attempt.complete(output, sum(s for s, _ in used), [gpu for _, gpu in used if gpu])
    except Exception as error:
        why = _why(error, stage, gpus, group.size)
        if attempt is not None:
            # what the others used, nobody knows
            alone = group.size == 1
            attempt.fail(error, why, _cpu_s() - began_s if alone else None)
        elif why.kind == OUT_OF_MEMORY:  # the first worker would wait for this one and never tell
            failed = record.model_copy(update={"status": "failed", "error": why})
            store.close_attempt(failed, time.time())
            tell(Ended(stage.key, why.message))
        raise StageFailed(f"{stage.title}: {error}") from error


def _check(stage: Stage, modules: list[str]) -> None:
    """Raise RuntimeError where this process would not compute what the stage's key promises."""
    planned = stage.settings["numerics"]["processors"]
    here = environment.processors(stage.settings["numerics"]["isa"])
    if here != planned:
        raise RuntimeError(f"planned for processors of class '{planned}'; this is '{here}'")
    if code(*modules).hash != stage.code.hash:
        raise RuntimeError("the code was edited since the run began; start the run again")


def job_of(stage: Stage, store: Store | None, device: torch.device) -> Job:
    """Return a stage as maect takes it; without a store, with random weights and no inputs."""
    places, settings, inputs = stage.places, stage.settings, {}
    if store is None:
        settings = {name: value for name, value in settings.items() if name != "weights"}
    else:
        inputs = {name: store.fetch(source.key) for name, source in stage.inputs.items()}
    return Job(
        kind=stage.kind,
        settings=settings,
        inputs=inputs,
        data_name=stage.data.name,
        data_root=Path(str(places["data_root"])),
        data_path=places["data_path"],
        data_stage=places["data_stage"],
        lists=places.get("low_shot"),
        weights=Path(str(places["weights"])) if "weights" in places else None,
        device=device,
        fingerprint=stage.data.fingerprint,
    )


def device_of(gpus: float) -> torch.device:
    """Return the device of a worker that was given `gpus` GPUs, or a share of one."""
    return torch.device("cuda", torch.cuda.current_device()) if gpus else torch.device("cpu")


def _uuid(device: torch.device) -> str | None:
    """Return the UUID of a GPU; None for a CPU."""
    return str(torch.cuda.get_device_properties(device).uuid) if device.type == "cuda" else None


def _why(error: BaseException, stage: Stage, gpus: float, workers: int) -> Failure:
    """Return what a record says of an error; where memory ran out, of how much and what helps."""
    text = str(error) or type(error).__name__
    on_host = isinstance(error, MemoryError) or "DefaultCPUAllocator" in text
    if not (on_host or isinstance(error, torch.cuda.OutOfMemoryError) or _NO_MEMORY.search(text)):
        return Failure(kind=type(error).__name__, message=text)
    asked, size, free = (found and found[1] for found in (one.search(text) for one in _MEMORY))
    told = f"{stage.title} ran out of memory on the {'machine' if on_host else 'GPU'}"
    told += f": it asked for {asked} more" if asked else ""
    told += f" of {size}, of which {free} were free" if size and free else ""
    if calculated := memory.held(stage.kind, stage.settings, workers):
        told += f"; by calculation its step holds {calculated / 1e9:.3g} GB for the backward pass"
    helps = []
    if stage.trains:
        if not stage.settings["numerics"].get("checkpoint_activations"):
            helps.append("set numerics.checkpoint_activations=true, which changes no digit")
        helps += ["share the batch among more --workers", f"lower {stage.kind}.batch_size"]
    if 0 < gpus < 1:
        helps.append("raise devices.gpu_share")
    helps = helps or [f"use a {'machine' if on_host else 'GPU'} with more memory"]
    return Failure(kind=OUT_OF_MEMORY, message=f"{told}; {', or '.join(helps)}")


def _reading(meter: Meter, device: torch.device) -> Gpu:
    """Return what a meter that has ended told, with what torch held of the device's memory."""
    held = torch.cuda.max_memory_reserved(device) / 2**20
    return meter.reading().model_copy(update={"reserved_memory_mib": held})


def _of_all(group: Group, value: Any) -> list[Any]:
    """Return the values of all workers, in their order."""
    found = [value] * group.size
    if group.size > 1:
        dist.all_gather_object(found, value)
    return found


def forget_memory() -> None:
    """Give back what earlier stages of this process left, so that peaks are of this one."""
    if torch.cuda.is_initialized():
        gc.collect()  # takes a quarter of a second
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats()
    with suppress(OSError):  # Linux: start the peak of resident memory anew
        Path("/proc/self/clear_refs").write_text("5", encoding="ascii")


# -------------------------------------------------------------------- what the first worker writes


class Attempt:
    """Writes the files of one attempt and tells the driver about it.

    Raises `StageFailed` where another run has the stage's lease.
    """

    def __init__(
        self,
        stage: Stage,
        store: Store,
        run_id: str,
        tell: Tell,
        device: torch.device,
        group: Group,
        gpus: float,
        leased: bool,
    ) -> None:
        self.stage, self.store, self.tell = stage, store, tell
        #: the run that must have the stage's lease
        self.leased_to = run_id if leased else None
        if not self._ours():
            tell(Ended(stage.key, _TAKEN))
            raise StageFailed(f"{stage.title}: {_TAKEN}")
        self.clock, began = time.monotonic(), time.time()
        cost = held(device, group, stage.settings["numerics"]["threads"], gpus)
        here = {
            "workers": group.size,
            "backend": str(dist.get_backend()) if group.size > 1 else None,
            "device": cost.device_model,
        }
        inputs = {}
        for name, source in stage.inputs.items():
            record = store.state(source.key).record  # none: `job_of` tells
            inputs[name] = Input(key=source.key, files=record.file_hashes if record else {})
        start = Record(
            key=stage.key,
            kind=stage.kind,
            name=stage.title,
            attempt=0,  # the store counts
            run=run_id,
            settings=stage.settings,
            inputs=inputs,
            data=Data.of(stage.data),
            code=stage.code,
            env=environment.describe() | here,
            started=iso(began),
            started_s=began,
            pid=os.getpid(),
            process_s=environment.begun_s(os.getpid()),
            cost=cost,
        )
        self.record = store.begin(start)
        self.folder = store.attempt_folder(stage.key, self.record.attempt)
        self._logged = 0.0
        self.log(f"{stage.title} began")
        tell(Began(stage.key))

    def _ours(self) -> bool:
        """Return whether the attempt may still be published."""
        run = self.leased_to
        return run is None or self.store.leases.still_ours(self.stage.key, run)

    def log(self, line: str) -> None:
        """Add a line to the attempt's log."""
        with (self.folder / "log.txt").open("a", encoding="utf-8") as file:
            file.write(f"{iso(time.time())} {line}\n")
        self._logged = time.monotonic()

    def progress(self, progress: Progress) -> None:
        """Pass a stage's progress on, to the driver and now and then to the log."""
        told = Stepped(self.stage.key, **vars(progress))
        if time.monotonic() - self._logged > LOG_EVERY_S:
            self.log(f"step {told}")
        self.tell(told)

    def complete(self, output: Output, used_s: float, gpus: list[Gpu]) -> None:
        """Write the artifact, then the record. Raises `StageFailed` if it came too late.

        Of a stage that stopped at a rung there is no artifact: its checkpoint is kept.
        `used_s` is the processor time of all workers, `gpus` what their meters told.
        """
        stage, content = self.stage, {}
        if stage.rung:
            measured = stage.rung.evaluation
            metrics = Evaluation.of(measured.kind, measured.settings).measured(output.values)
            told = f"at step {output.summary['stopped_at']} of {stage.steps}, {metrics[0].label} "
            told += f"{metrics[0].value:.1f} {metrics[0].unit}"
            self.log(f"{stage.title} stopped {told}")
            end: dict[str, Any] = {"metrics": metrics}
            end["summary"] = {"rung": measured.key, **output.summary}
            end["error"] = Failure(kind="Stopped", message=told)
            self._close("stopped", end, used_s, gpus)
            return
        for name, tensors in output.tensors.items():
            whole = {key: value.contiguous() for key, value in tensors.items()}
            content[f"{name}.safetensors"] = save(whole)
        documents = output.documents | ({"curves": output.curves} if output.curves else {})
        for name, document in documents.items():
            content[f"{name}.json"] = json.dumps(document, sort_keys=True).encode()
        end = {
            "files": {n: self.store.put_file(self.record, n, data) for n, data in content.items()},
            "summary": {"flops": stage.flops, "steps": stage.steps, **output.summary},
        }
        if stage.kind in evals.names():
            evaluation = Evaluation.of(stage.kind, stage.settings)
            protocol = output.protocol | {"data": stage.data.fingerprint}
            end |= {
                "metrics": evaluation.measured(output.values),
                "protocol": protocol,
                "protocol_fingerprint": digest(protocol, 16),
            }
        self.log(f"{stage.title} is complete")
        self._close("complete", end, used_s, gpus)

    def fail(self, error: BaseException, why: Failure, used_s: float | None) -> None:
        """Write the record of an attempt that ended with an error."""
        self.log(f"{self.stage.title} failed\n{''.join(traceback.format_exception(error))}")
        self._close("failed", {"error": why}, used_s)

    def _close(
        self,
        status: Status,
        end: dict[str, Any],
        used_s: float | None,
        gpus: list[Gpu] | None = None,
    ) -> None:
        """Write the record and tell the driver."""
        used: dict[str, Any] = {"cpu_s": used_s, "gpus": gpus or None}
        if self.record.cost.device_kind == "cpu":
            used["peak_memory_mib"] = peak_memory_mib()
        cost = self.record.cost.model_copy(update=used)
        ended_s = self.record.started_s + time.monotonic() - self.clock
        if status in ("complete", "stopped") and not self._ours():
            status, end = "lost", {"error": Failure(kind="Lost", message=_TAKEN)}
        record = self.record.model_copy(update={"cost": cost, "status": status, **end})
        first = self.store.close_attempt(record, ended_s)
        if status == "lost":
            self.tell(Ended(self.stage.key, _TAKEN))
        if not first or status == "lost":
            raise StageFailed(f"{self.stage.title}: this attempt was given up for lost")
        if status == "complete" and self.stage.steps:
            # before the end is told: the run may end then, and this process with it
            self.store.discard(self.store.checkpoints(self.stage.key))
        rung = self.stage.until if status == "stopped" else 0
        problem = record.error.message if record.error and not rung else None
        self.tell(Ended(self.stage.key, problem, rung))


def held(device: torch.device, group: Group, threads: int, gpus: float) -> Cost:
    """Return the devices that a stage holds, whose workers were given `gpus` each.

    A CPU stage holds its threads' cores, or all there are where more threads share them.
    """
    if gpus:
        model = torch.cuda.get_device_name(device)
        return Cost(devices=gpus if gpus < 1 else group.size, device_kind="gpu", device_model=model)
    processor = environment.processor()
    here = int(os.environ.get("LOCAL_WORLD_SIZE", 1)) * threads
    return Cost(
        devices=round(group.size * threads * min(1.0, processor["cores"] / here)),
        device_kind="cpu",
        device_model=processor["cpu"],
        energy_reason="no GPU",
    )


def peak_memory_mib() -> float:
    """Return this process's peak since the stage began; of its whole life where Linux is mute."""
    with suppress(OSError, StopIteration):
        lines = Path("/proc/self/status").read_text(encoding="ascii", errors="replace").splitlines()
        return int(next(line for line in lines if line.startswith("VmHWM:")).split()[1]) / 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024
