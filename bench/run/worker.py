"""Running stages on the workers of a group. Knows nothing of Ray."""

from __future__ import annotations

import gc
import importlib
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import TYPE_CHECKING

from bench import environment
from bench.plan.identity import code
from bench.plan.stage import entry_modules
from bench.run.attempt import Attempt, cpu_s
from bench.run.mailbox import Tell
from bench.run.task import StageFailed, Task
from bench.store import gpu_meter
from bench.store.resume import StageCheckpoints
from bench.store.store import Store

if TYPE_CHECKING:
    import torch


def serve(take: Callable[[], Task | None], tell: Tell, store: Store, run_id: str) -> None:
    """Run stage after stage until `take` gives none. Every worker of a group calls this.

    Raises `StageFailed` where the group must not go on after a stage that failed.
    """
    from maect.parallel import Group

    group = Group()
    while (task := group.share(take() if group.rank == 0 else None)) is not None:
        try:
            run_task(task, store, run_id, tell)
        except StageFailed:
            if group.size > 1:  # the others may hang in a collective call
                raise
            if _holds_a_gpu():  # its context may be one in which everything fails from now on
                return


def run_task(task: Task, store: Store, run_id: str, tell: Tell) -> None:
    """Run a stage in this process, leaving its artifact and record. Raises `StageFailed`.

    Every worker of a group calls this; the first one writes.
    """
    modules = entry_modules(task.kind)
    for module in modules:
        importlib.import_module(module)  # not part of the stage's time
    import torch

    from maect.parallel import Group

    _forget_memory()
    group, device, began_s = Group(), _device(), cpu_s()
    attempt = Attempt(task, store, run_id, tell, device, group) if group.rank == 0 else None
    folder = group.share(attempt.folder if attempt is not None else None)
    stop_meter = gpu_meter.meter(_uuid(device), folder, group.rank)
    try:
        numerics = task.settings["numerics"]
        here = environment.processors(numerics["isa"])
        if here != numerics["processors"]:  # the key promises the bits of others
            raise RuntimeError(
                f"planned for processors of class '{numerics['processors']}'; this is '{here}'"
            )
        if code(*modules).hash != task.code.hash:  # or the record would name another code
            raise RuntimeError("the code was edited since the run began; start the run again")
        job = task.job(store, device)
        if task.steps is not None:
            job.checkpoints = StageCheckpoints(store, task.key, task.code.hash)
        if attempt is not None:
            job.on_progress = attempt.progress
        output = importlib.import_module(modules[0]).run(job)
        stop_meter()
        # of all workers, whose meters have left their last word when they come here
        used = group.gather(torch.tensor([cpu_s() - began_s], dtype=torch.float64, device=device))
        if attempt is not None:
            attempt.complete(output, float(used.sum()))
            store.clear_checkpoints(task.key)
    except Exception as error:
        stop_meter()
        if attempt is not None:
            # what the others used, nobody knows
            attempt.fail(error, cpu_s() - began_s if group.size == 1 else None)
        raise StageFailed(f"{task.title}: {error}") from error
    finally:
        stop_meter()


def _device() -> torch.device:
    """Return the device that this worker computes on."""
    import torch

    if not torch.cuda.is_available():
        return torch.device("cpu")
    return torch.device("cuda", torch.cuda.current_device())


def _uuid(device: torch.device) -> str | None:
    """Return the UUID of a GPU; None for a CPU."""
    import torch

    if device.type != "cuda":
        return None
    return str(torch.cuda.get_device_properties(device).uuid)


def _holds_a_gpu() -> bool:
    import torch

    return torch.cuda.is_initialized()


def _forget_memory() -> None:
    """Give back what earlier stages of this process left, so that peaks are of this one."""
    import torch

    if torch.cuda.is_initialized():
        gc.collect()  # takes a quarter of a second
        torch.cuda.empty_cache()
    with suppress(OSError):  # Linux: start the peak of resident memory anew
        Path("/proc/self/clear_refs").write_text("5", encoding="ascii")
