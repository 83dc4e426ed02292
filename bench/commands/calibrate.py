"""`calibrate`: how fast a suite's stages go on this machine, for predictions and to see limits."""

from __future__ import annotations

import argparse
import os
import sys
import tempfile
import time
from contextlib import redirect_stdout
from pathlib import Path

from bench import environment
from bench.commands import common
from bench.commands.data import prepare_data
from bench.errors import OK, UserError
from bench.plan.planner import make_plan
from bench.plan.stage import Plan, Stage
from bench.store.calibration import FILE, Calibration, Pace
from bench.store.files import iso, write_json
from bench.store.place import open_store
from bench.store.store import Store
from bench.suite.load import data_info
from bench.suite.schema import Suite
from maect.datasets import load, prepare

#: stored features of more training images are not evaluated: that takes too long for a look
SMALL = 100_000
#: different synthetic photographs, and files of them beyond a batch
_DIFFERENT, _FILES = 64, 512
_WIDTH, _HEIGHT = 500, 375  # as most of ImageNet's


def declare(parser: argparse.ArgumentParser) -> None:
    """Add the arguments."""
    common.suite_arguments(parser)
    minutes, what = common.amount_of("minutes"), "time to take (default 5)"
    parser.add_argument("--minutes", type=minutes, default=5.0, metavar="M", help=what)
    common.json_argument(parser)


def run(options: argparse.Namespace) -> int:
    """Measure, print and keep each pace as it is found. Return the exit code."""
    end = time.monotonic() + 60 * options.minutes
    suite = common.load(options)
    environment.use(suite.isa)
    own = make_plan(suite, None, only=options.only)
    steps = {stage.title: stage.steps for stage in own.stages.values()}
    store = open_store(options.store)
    scratch = tempfile.TemporaryDirectory(prefix="maect-calibrate-")
    with scratch as folder, redirect_stdout(sys.stderr if options.json else sys.stdout):
        suite, images = _with_images(options, suite, Path(folder))
        plan = make_plan(suite, None, only=options.only)
        if plan.unresolved:
            raise UserError(f"nothing can be measured without the data: {plan.unresolved}")
        store.create()
        with store.leases.driving(alone=True):
            found = _measure(plan, steps, store, options.command_line, images, end, Path(folder))
    if options.json:
        print(found.model_dump_json(indent=1))
    else:
        print(f"kept in {store.name}/{FILE}; `bench plan` predicts by it")
    return OK


def _measure(
    plan: Plan,
    steps: dict[str, int | None],
    store: Store,
    command: str,
    images: str,
    end: float,
    folder: Path,
) -> Calibration:
    """Return what was measured until the time `end`, written after each stage."""
    from bench.run import calibrate
    from bench.run.worker import device_of, held
    from maect.parallel import Group

    numerics = next(iter(plan.stages.values())).settings["numerics"]
    threads, precision = numerics["threads"], numerics["precision"]
    peak = calibrate.matrix_product(precision, threads)
    cost = held(device_of(calibrate.gpus()), Group(), threads, calibrate.gpus())
    found = Calibration(
        device_kind=cost.device_kind,
        device_model=cost.device_model,
        devices=cost.devices,
        made=iso(time.time()),
        command=command,
        env=environment.describe(),
        matrix_product={precision: peak},
        images=images,
    )
    print(f"{found.device_model}, images: {images}", flush=True)
    print(f"matrix product in {precision}: {_flops(peak)}", flush=True)
    stages = _worth(plan)
    for index, stage in enumerate(stages):
        left_s = end - time.monotonic()
        if left_s <= 0 and found.paces:
            print(f"the time is up; not measured: {', '.join(s.title for s in stages[index:])}")
            break
        share_s = max(0.0, left_s) / (len(stages) - index)
        known = steps.get(stage.title) or stage.steps  # a set that is not yet fetched tells none
        # half of the time is for its start
        pace = calibrate.measure(stage, known, share_s / 2, peak, folder)
        found.paces.append(pace)
        write_json(store.root / FILE, found.model_dump())
        store.publish(store.root / FILE)
        print(_line(pace, peak), flush=True)
    return found


def _worth(plan: Plan) -> list[Stage]:
    """Return one stage of each pace: what the plan spends most on first, evaluations last."""
    groups: dict[str, list[Stage]] = {}
    for stage in plan.stages.values():
        if not stage.trains and stage.kind != "features":
            small = stage.data.counts.get("train", SMALL + 1) <= SMALL
            if stage.kind == "gallery" or stage.runs_encoder or not small:
                continue
        groups.setdefault(stage.like, []).append(stage)
    first = sorted(groups.values(), key=lambda group: -sum(stage.flops for stage in group))
    return [group[0] for group in first]


def _with_images(options: argparse.Namespace, suite: Suite, folder: Path) -> tuple[Suite, str]:
    """Return the suite with images to measure with, and how they were come by.

    A folder or shards that are not here are replaced by synthetic photographs.
    """
    settings = next(iter(suite.variants.values())).row.data
    if settings.path is None or os.path.isdir(os.path.expanduser(settings.path)):
        if prepare_data(suite):
            suite = common.load(options)
        if settings.stage is not None:  # no part of any stage's time
            load(settings, progress=print)
        return suite, f"those of {settings.name}"
    sections = [s for variant in suite.variants.values() for s in variant.row.sections.values()]
    batch = max((section.batch_size for section in sections), default=1)
    photographs(folder / "images", batch + _FILES)
    options.sets = [
        *options.sets,
        "data.name=image_folder",
        f"data.path={folder / 'images'}",
        "data.classes=2",
        "data.low_shot=null",
        "data.stage=null",
    ]
    os.environ["MAECT_DATA"] = str(folder)  # what is known of them goes with them
    released = {variant.init for variant in suite.variants.values()} - {"random", "pixels"}
    if not all(Path(init).expanduser().is_file() for init in released):
        options.sets.append("init=random")  # steps take as long from any weights
    suite = common.load(options)
    prepare(next(iter(suite.variants.values())).row.data, folder, lambda line: None)
    data_info.cache_clear()
    suite = common.load(options)
    return suite, f"synthetic JPEGs, {_WIDTH}x{_HEIGHT}, as {settings.path} is not here"


def photographs(folder: Path, count: int) -> None:
    """Make a folder of two classes with `count` training images and a few for testing: smooth
    colours under noise, as many bytes as photographs have."""
    import numpy as np
    from PIL import Image

    random = np.random.default_rng(0)
    for number in range(count + 4):
        pool = "train" if number < count else "val"
        file = folder / pool / "ab"[number % 2] / f"{number}.jpg"
        file.parent.mkdir(parents=True, exist_ok=True)
        if _DIFFERENT <= number < count:
            os.link(folder / "train" / "ab"[number % 2] / f"{number % _DIFFERENT}.jpg", file)
            continue
        smooth = Image.fromarray(random.integers(0, 256, (12, 16, 3), np.uint8))
        pixels = np.asarray(smooth.resize((_WIDTH, _HEIGHT)), np.float32)
        noisy = pixels + random.normal(0, 12, pixels.shape)
        Image.fromarray(noisy.clip(0, 255).astype(np.uint8)).save(file, quality=88)


def _flops(rate: float) -> str:
    unit, size = ("TFLOP/s", 1e12) if rate >= 1e12 else ("GFLOP/s", 1e9)
    return f"{rate / size:.3g} {unit}"


def _line(pace: Pace, peak: float) -> str:
    """Return what was found of a stage in words."""
    if pace.images_per_s is None:
        return f"{pace.title}: {1 / pace.speeds[0]:.2g} s"
    of = "" if pace.batch is None else f" in steps of {pace.batch}"
    parts = [f"{pace.images_per_s:,.0f} images/s{of}"]
    if (share := pace.share_of_peak) is not None:
        parts.append(f"{_flops(share * peak)}, {share:.0%} of the matrix product")
    if pace.peak_memory_gib is not None:
        parts.append(f"{pace.peak_memory_gib:.1f} GiB")
    if pace.waiting is not None:
        parts.append(f"waits for images {pace.waiting:.0%} of the time")
    if pace.waits_for_gpu is not None:
        parts.append(f"waits {pace.waits_for_gpu} times a step for the GPU")
    return f"{pace.title}: {', '.join(parts)}" + (f"; limit: {pace.limit}" if pace.limit else "")
