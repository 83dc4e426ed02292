"""Measures how fast the stages of a plan go on the device at hand, each for a short while."""

from __future__ import annotations

import importlib
import time
import warnings
from collections.abc import Callable
from contextlib import suppress
from dataclasses import replace
from pathlib import Path
from statistics import median
from typing import Any

import numpy as np
import torch
from safetensors.torch import save_file

from bench.plan.stage import Stage
from bench.run.worker import device_of, forget_memory, job_of, peak_memory_mib
from bench.store.calibration import Pace
from maect import memory, methods
from maect.stages import evaluate
from maect.stages.features import BATCH, SPLITS, JobImages, extract
from maect.stages.job import Job
from maect.stages.loop import FIRST_LOGGED, Log

#: steps timed together, so that a GPU is not waited for after each; steps before them
WINDOW, WARM = 4, 3
#: such windows that are timed however little time there is
_FEWEST = 3
#: of a step that takes longer a part of the batch is measured, of a shorter one the whole, seconds
LONGEST_STEP_S, SHORT_STEP_S = 10.0, 1.0
#: share of a matrix product's rate that a step is taken to reach before it is measured
_EXPECTED = 0.2
#: share of a GPU's memory that a step may hold for its backward pass
_ROOM = 0.85
#: share of a step's time above which data, or the CPU's launches, are said to limit it
_WAITS, _LAUNCHES = 0.1, 0.9


def gpus() -> float:
    """Return how many GPUs are measured: one where torch sees any."""
    return float(torch.cuda.is_available())


def matrix_product(precision: str, threads: int) -> float:
    """Return the FLOP/s of a large matrix product of this precision, the best of five."""
    torch.set_num_threads(threads)
    device = device_of(gpus())
    many = device.type == "cuda"
    dtype = {"bf16": torch.bfloat16, "fp64": torch.float64}.get(precision, torch.float32)
    side = 8192 if many else 1024
    left, right = (torch.randn(side, side, device=device).to(dtype) for _ in range(2))
    times = [_seconds(lambda: left @ right, 3 if many else 1) for _ in range(6)]
    return 2 * side**3 / min(times)


def measure(stage: Stage, steps: int | None, seconds: float, peak: float, folder: Path) -> Pace:
    """Return the pace of a stage, measured for about `seconds`.

    `steps` is how many a training stage takes of the suite's own data: few of many are logged.
    `peak` is the FLOP/s of a matrix product; `folder` keeps features from one call to the next.
    Weights are random, as no stage before it has run. Raises what the stage would.
    """
    forget_memory()
    job = job_of(stage, None, device_of(gpus()))
    if stage.trains:
        assert steps
        found = _fitting(stage, job, steps, seconds, peak)
    elif stage.kind == "features":
        found = _features(stage, job, seconds, peak)
    else:
        found = _evaluation(stage, job, folder)
    on_gpu = torch.cuda.is_available()
    peak_gib = torch.cuda.max_memory_reserved() / 2**30 if on_gpu else peak_memory_mib() / 2**10
    told = {"kind": stage.kind, "title": stage.title, "like": stage.like}
    return Pace(**told, peak_memory_gib=peak_gib, **found)


def _fitting(stage: Stage, job: Job, steps: int, seconds: float, peak: float) -> dict[str, Any]:
    """Return what steps of a training stage tell, with as much of its batch as a step of a few
    seconds and the GPU's memory allow."""
    assert stage.steps
    whole = batch = stage.settings["train"]["batch_size"]
    flops = stage.flops / stage.steps / whole
    # its first windows, with data and without, in half the time
    window, warm = _window()
    longest_s = min(LONGEST_STEP_S, max(SHORT_STEP_S, seconds / 4 / (warm + _FEWEST * window)))
    while batch % (4 * job.numerics.shards) == 0 and (
        flops * batch > longest_s * _EXPECTED * peak or not _fits(stage, job, batch)
    ):
        batch //= 2
    while True:
        with suppress(torch.cuda.OutOfMemoryError):
            return _training(stage, job, batch, steps, seconds, peak)
        if batch % 2:
            raise RuntimeError(f"a step of {batch} images of {stage.title} is more than fits")
        batch //= 2
        forget_memory()


def _fits(stage: Stage, job: Job, batch: int) -> bool:
    """Return whether a step of `batch` images fits a GPU by calculation; to find out takes long."""
    if job.device.type != "cuda":
        return True
    train = stage.settings["train"] | {"batch_size": batch}
    step = memory.held(stage.kind, stage.settings | {"train": train}, 1) or 0.0
    return step <= _ROOM * torch.cuda.get_device_properties(job.device).total_memory


def _training(
    stage: Stage, job: Job, batch: int, steps: int, seconds: float, peak: float
) -> dict[str, Any]:
    """Return what steps of a training stage tell, first with images from the disk."""
    assert stage.steps
    began, whole = time.perf_counter(), stage.settings["train"]["batch_size"]
    train = stage.settings["train"] | {"batch_size": batch, "steps": steps}
    entry = importlib.import_module(methods.get(stage.kind).entry)
    training = entry.training(replace(job, settings=job.settings | {"train": train}))
    log = Log(steps, job.device)
    number = first = min(FIRST_LOGGED, steps // 2)  # all before it are logged

    def step() -> None:
        nonlocal number
        if number == first:
            training.train.expect(training.own_crops(first))
        log.add(number, training.step(number))
        number = number + 1 if number + 1 < steps else first

    start_s = time.perf_counter() - began + _seconds(step)
    times = _windows(step, seconds / 2)
    waits = _waits(step)
    # from here on without data: the images of one batch again and again
    epoch, rows = training.batches.at(number)
    held = training.augment.images(training.train, epoch, rows[training.pieces[0]])
    training.augment.images = lambda split, epoch, ids: held
    training.train.expect = lambda requests: None
    without_s = median(_windows(step, seconds / 4))
    step_s, done = median(times), stage.flops / stage.steps * batch / whole
    waiting = max(0.0, 1 - without_s / step_s)
    limit = "data" if waiting > _WAITS else "device"
    if job.device.type == "cuda" and limit == "device":
        launched = min(_launch_seconds(step) for _ in range(3))
        limit = "launches" if launched > _LAUNCHES * without_s else limit
    return {
        "start_s": max(0.0, start_s - step_s),
        "speeds": sorted(done / one for one in times),
        "batch": batch if batch < whole else None,
        "images_per_s": batch / step_s,
        "share_of_peak": done / step_s / peak,
        "waiting": waiting,
        "waits_for_gpu": waits,
        "limit": limit,
    }


def _features(stage: Stage, job: Job, seconds: float, peak: float) -> dict[str, Any]:
    """Return what batches of images through the encoder tell."""
    began = time.perf_counter()
    job.prepare()
    images = JobImages(job)
    network = None if images.pixels else images.network().eval()
    count = len(images.split("train"))
    flops = stage.flops / sum(len(images.split(name)) for name in SPLITS)
    start = 0

    @torch.inference_mode()
    def step() -> None:
        nonlocal start
        rows = np.arange(start, min(start + BATCH, count))
        batch = images.prepared("train", rows)
        _ = batch if network is None else network(batch)
        start = (start + BATCH) % max(count - BATCH, 1)

    start_s = time.perf_counter() - began + _seconds(step)
    times = _windows(step, seconds)
    rate = min(BATCH, count) / median(times)
    return {
        "start_s": start_s,
        "speeds": sorted((flops * min(BATCH, count) or 1.0) / one for one in times),
        "images_per_s": rate,
        "share_of_peak": None if images.pixels else flops * rate / peak,
    }


def _evaluation(stage: Stage, job: Job, folder: Path) -> dict[str, Any]:
    """Return how long an evaluation of stored features takes, those of a random encoder."""
    source = stage.inputs["features"]
    kept = folder / source.key
    if not kept.exists():
        kept.mkdir()
        encoder = job_of(source, None, job.device)
        encoder.prepare()
        save_file(extract(JobImages(encoder)), kept / "features.safetensors")
    job = replace(job, inputs={"features": kept})
    wall_s = _seconds(lambda: evaluate.run(job))
    return {"start_s": 0.0, "speeds": [1 / wall_s]}


def _seconds(act: Callable[[], Any], times: int = 1) -> float:
    """Return the seconds that one of `times` calls takes, with what they make a GPU do."""
    _wait()
    began = time.perf_counter()
    for _ in range(times):
        act()
    _wait()
    return (time.perf_counter() - began) / times


def _wait() -> None:
    if torch.cuda.is_available():
        torch.cuda.synchronize()


def _window() -> tuple[int, int]:
    """Return how many steps are timed together, and how many go before the first of them."""
    return (WINDOW, WARM) if torch.cuda.is_available() else (1, 1)


def _windows(step: Callable[[], None], seconds: float) -> list[float]:
    """Return the seconds of a step in windows of a few, after a warm-up; three at least."""
    end = time.perf_counter() + seconds
    times: list[float] = []
    window, warm = _window()
    for _ in range(warm):
        step()
    while len(times) < _FEWEST or time.perf_counter() < end:
        times.append(_seconds(step, window))
    return times


def _launch_seconds(step: Callable[[], None]) -> float:
    """Return the seconds until the CPU has told a GPU all of a step."""
    _wait()
    began = time.perf_counter()
    step()
    return time.perf_counter() - began


def _waits(step: Callable[[], None]) -> int | None:
    """Return how often the CPU waits for the GPU in a step; None without a GPU.

    The fewer of two in turn: at most one of them is logged, which waits for what it logs.
    """
    if not torch.cuda.is_available():
        return None
    counts = []
    for _ in range(2):
        with warnings.catch_warnings(record=True) as told:
            warnings.simplefilter("always")
            torch.cuda.set_sync_debug_mode("warn")
            step()
            torch.cuda.set_sync_debug_mode("default")
        # beside torch's own warning that this mode is new
        counts.append(sum("called a synchronizing" in str(one.message) for one in told))
    return min(counts)
