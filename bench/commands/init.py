"""`init`: a first suite of one's own, with comments, made for the images that it is to run on."""

from __future__ import annotations

import argparse
import json
import re
from pathlib import Path
from string import Template
from typing import Any

import numpy as np

from bench.commands import common
from bench.commands.data import settings_of
from bench.errors import OK, UserError
from bench.suite import load, reference
from maect import datasets
from maect.files import write_atomic

TEMPLATE = Path(load.__file__).with_name("first.yaml")
#: of the schema that editors read, beside the suite
SCHEMA = "suite.schema.json"
#: sides of the images that a first suite trains on, pixels
SIZES = (8, 16, 24, 32, 48, 64)
#: fewer training images make no batch
FEWEST = 32
#: images whose size is looked at
LOOKED_AT = 200


def declare(parser: argparse.ArgumentParser) -> None:
    """Add the arguments."""
    default = Path("suite.yaml")
    text = "new file (default: suite.yaml)"
    parser.add_argument("file", type=common.path, nargs="?", default=default, help=text)
    data = "folder of images, train/<class>/<file> and val/<class>/<file>, or a set's name, as "
    data += "`data ls` lists them (default: digits, which needs no download)"
    parser.add_argument("--data", default="digits", metavar="DIR", help=data)


def run(options: argparse.Namespace) -> int:
    """Write the suite, and the schema that editors complete it by. Return the exit code."""
    file: Path = options.file
    if file.exists():
        raise UserError("is there already; name another file", file=file)
    if file.suffix not in (".yaml", ".yml"):
        raise UserError("a suite's file ends in .yaml", file=file)
    text = Template(TEMPLATE.read_text(encoding="utf-8"))
    program = options.command_line.partition(" init")[0]
    name = re.sub(r"[^A-Za-z0-9_.-]", "-", file.stem)[:80].lstrip("._-") or "first"
    own = {"name": name, "run": f"{program} run {file.name}", "schema": SCHEMA}
    written = text.substitute(_chosen(options.data), **own)
    write_atomic(file.with_name(SCHEMA), reference.schema_text().encode())
    write_atomic(file, written.encode())
    print(f"{file}: a suite with comments; {SCHEMA} beside it is for editors\n")
    print(f"next: {program} plan {file}\n      {program} run {file}")
    return OK


def _chosen(given: str) -> dict[str, Any]:
    """Return what the suite says of the images, and settings that fit their size and number."""
    root = datasets.data_root()
    settings = settings_of(given)
    if settings.path is not None:  # so that the suite runs wherever it is called
        path = str(Path(settings.path).expanduser().resolve())
        settings = settings.model_copy(update={"path": path})
    info = datasets.prepare(settings, root, print)
    images = info.counts["train"]
    side, told = info.image_shape[1], f"{info.image_shape[1]} pixels a side"
    data: dict[str, str] = {"name": settings.name}
    if settings.path is not None:
        images += info.counts["selection"]
        sizes = datasets.load(settings, root, "train", print).sizes
        assert sizes is not None
        side = int(np.median(sizes[:LOOKED_AT].min(axis=1)))
        told = f"about {side} pixels on their shorter side"
        data |= {"path": json.dumps(settings.path, ensure_ascii=False)}
    if images < 2 * FEWEST:
        raise UserError(f"{given} has {images} training images, too few to train on: {2 * FEWEST}")
    size = max((s for s in SIZES if s <= side), default=SIZES[0])
    data["image_size"] = str(size)
    if settings.path is not None and images < 5000:
        apart = max(10, images // 10)
        data["selection"] = str(apart)
        images -= apart
    batch = max(b for b in (32, 64, 128) if b <= images // 2 or b == FEWEST)
    grid = 8 if size % 8 == 0 and size > 16 else 4
    mirrored = settings.name != "digits"
    steps = min(1500, max(300, 30 * images // batch))
    return {
        "about": f"{images + int(data.get('selection', 0)):,} images of {info.classes} classes",
        "title": json.dumps(f"MAE-CT on {Path(settings.path or settings.name).name}"),
        "images": f"the images have {told}; a larger image_size costs more",
        "apart": "selection: training images set apart to choose settings on, not to train on",
        "data": ", ".join(f"{name}: {value}" for name, value in data.items()),
        "patch": size // grid,
        "grid": grid,
        "dim": 64 if size < 16 else 96,
        "batch": batch,
        "queue": 4 * batch,
        "mae_steps": steps,
        "head_steps": steps // 10,
        "tune_steps": steps // 4,
        "crop": 0.2 if mirrored else 0.5,
        "flip": 0.5 if mirrored else 0.0,
        "flips": "write flip: 0.0 where mirrored images mean another thing, as with digits",
        "blur": max(0.5, round(2 * size / 224, 1)),
    }
