"""What the gate times: each case is a piece of our work, and a reference that never changes.

References are others' code (timm's, scikit-learn's, torchvision's) or a few plain lines here. A
case is built from the `bench` and `maect` that are imported, which may be another commit's.
"""

from __future__ import annotations

import hashlib
import importlib
import io
import json
import os
import random
import subprocess
import sys
import tempfile
from collections.abc import Callable
from contextlib import redirect_stdout
from dataclasses import dataclass
from functools import partial
from itertools import count, cycle
from pathlib import Path
from typing import Any

import numpy as np
import torch
import yaml
from PIL import Image, ImageFilter
from sklearn.cluster import KMeans
from sklearn.linear_model import LogisticRegression
from sklearn.neighbors import NearestNeighbors
from threadpoolctl import threadpool_limits
from timm.models.vision_transformer import VisionTransformer
from torch import Tensor, nn
from torch.nn import functional as F
from torchvision import transforms
from torchvision.transforms import InterpolationMode

import bench
from bench.plan.planner import make_plan
from bench.plan.stage import Stage, entry_modules
from bench.run.worker import job_of
from bench.suite.load import load_suite
from maect import datasets, evals
from maect.augment import Augment
from maect.evals.neighbors import normalize_rows
from maect.heads import NeighborQueue
from maect.settings import AugmentSettings, DataSettings, ViewSettings

Call = Callable[[], object]
ROOT = Path(bench.__file__).parents[1]
PAPER, SMOKE = ROOT / "suites" / "paper_table.yaml", ROOT / "suites" / "smoke.yaml"
CPU = torch.device("cpu")


@dataclass(frozen=True)
class Case:
    """Our work, and what it is compared with; each call does the same again."""

    ours: Call
    reference: Call


def build(name: str, folder: Path) -> Case:
    """Return a case, on one thread; `folder` is an empty one for its files."""
    torch.set_num_threads(1)
    threadpool_limits(1)
    return CASES[name](folder)


# ------------------------------------------------------------------------------- training steps

#: the default table's model, and one of CIFAR-10's sizes on the digits, enlarged
SIZES: dict[str, list[str]] = {
    "digits": [],
    "cifar10": ["data.image_size=32", "model.patch_size=8", "model.dim=96", "model.heads=3"]
    + [f"{kind}.batch_size=256" for kind in ("mae", "head", "tune")]
    + ["head.queue_size=4096"],
}
TRAININGS = {"mae": "MAETraining", "head": "HeadTraining", "tune": "TuneTraining"}


def stage_of(kind: str, suite: Path, sets: list[str]) -> Stage:
    """Return a stage of MAE-CT, planned without a store."""
    plan = make_plan(load_suite(suite, seeds=1, sets=sets), None, only="MAE-CT")
    return next(stage for stage in plan.stages.values() if stage.kind == kind)


def training_of(kind: str, suite: Path, sets: list[str]) -> Any:
    """Return a training of random weights, ready to take its steps."""
    job = job_of(stage_of(kind, suite, sets), None, CPU)
    module: Any = importlib.import_module(entry_modules(kind)[0])
    if hasattr(module, "training"):
        return module.training(job)
    return getattr(module, TRAININGS[kind])(job)  # of a commit from before there were methods


def step(kind: str, size: str, folder: Path) -> Case:
    training = training_of(kind, PAPER, SIZES[size])
    numbers = cycle(range(training.steps))
    return Case(lambda: training.step(next(numbers)), plain_pass(size))


def plain_pass(size: str, times: int = 1) -> Call:
    """Return steps of AdamW of timm's ViT of that size on a batch at hand."""
    torch.manual_seed(0)
    small = size == "digits"
    sizes = dict(zip(("img_size", "patch_size", "embed_dim", "num_heads"),
                     (8, 2, 64, 4) if small else (32, 8, 96, 3), strict=True))  # fmt: skip
    model = VisionTransformer(in_chans=1, num_classes=10, depth=4, mlp_ratio=2.0, **sizes)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3)
    batch = 128 if small else 256
    images, labels = torch.rand(batch, 1, *2 * (sizes["img_size"],)), torch.arange(batch) % 10

    def once() -> None:
        for _ in range(times):
            optimizer.zero_grad(set_to_none=True)
            F.cross_entropy(model(images), labels).backward()
            optimizer.step()

    return once


# ------------------------------------------------------------------------- queue, augmentation


def queue(topk: int, folder: Path) -> Case:
    """128 queries to a queue of the published size, 65,536 x 256."""
    held, draws = NeighborQueue(65_536, 256), torch.Generator().manual_seed(0)
    queries, ids = torch.randn(128, 256, generator=draws), torch.arange(128)
    stored, owners = held.embeddings.clone(), held.ids.clone()

    def plain() -> Tensor:
        found = F.normalize(queries, dim=1) @ stored.T
        return found.masked_fill(ids[:, None] == owners, -1.0).topk(topk, dim=1)[1]

    return Case(lambda: held.lookup(queries, ids, topk), plain)


MEAN, STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)


def torchvision_views(settings: AugmentSettings, size: int) -> list[transforms.Compose]:
    """Return both views as torchvision's transforms of a PIL image."""

    def blur(image: Image.Image, sigma: tuple[float, float]) -> Image.Image:
        return image.filter(ImageFilter.GaussianBlur(random.uniform(*sigma)))

    result = []
    for view in settings.views(2):
        bicubic = InterpolationMode.BICUBIC
        crop = transforms.RandomResizedCrop(size, view.crop_scale, view.crop_ratio, bicubic)
        steps: list[Any] = [crop, transforms.RandomHorizontalFlip(view.flip)]
        if view.jitter:
            strengths = (view.brightness, view.contrast, view.saturation, view.hue)
            steps.append(transforms.RandomApply([transforms.ColorJitter(*strengths)], view.jitter))
        if view.blur:
            blurred = transforms.Lambda(partial(blur, sigma=view.blur_sigma))
            steps.append(transforms.RandomApply([blurred], view.blur))
        if view.grey:
            steps.append(transforms.RandomGrayscale(view.grey))
        if view.solarise:
            steps.append(transforms.RandomSolarize(view.solarise_threshold, view.solarise))
        steps += [transforms.ToTensor(), transforms.Normalize(MEAN, STD)]
        result.append(transforms.Compose(steps))
    return result


def pictures(number: int, sides: tuple[int, int]) -> list[Image.Image]:
    """Return smooth images of these (width, height)."""
    coarse = np.random.default_rng(0).integers(0, 256, (number, 12, 16, 3), np.uint8)
    return [Image.fromarray(image).resize(sides, Image.Resampling.BICUBIC) for image in coarse]


def augment(pipeline: str, size: int, folder: Path) -> Case:
    """Both views of 256 images of 32 x 32, or of 8 of 500 x 375, from pixels at hand."""
    common = {"jitter": 0.8, "grey": 0.2, "blur_sigma": (0.05, 1.0 if size == 32 else 2.0)}
    settings = AugmentSettings()
    if pipeline == "aug":
        settings = AugmentSettings(
            view0=ViewSettings(blur=1.0, **common),
            view1=ViewSettings(blur=0.1, solarise=0.2, **common),
        )
    given = pictures(256, (32, 32)) if size == 32 else pictures(8, (500, 375))
    images: Any = [torch.from_numpy(np.array(image)).permute(2, 0, 1) for image in given]
    images = torch.stack(images) if size == 32 else images
    ours = Augment(settings.views(2), image_size=size, mean=MEAN, std=STD, seed=0, role="mae")
    views, epochs, rows = torchvision_views(settings, size), count(), np.arange(len(given))

    def both() -> None:
        epoch = next(epochs)
        for view in (0, 1):
            ours(images, epoch, rows, view)

    def theirs() -> None:
        for view in views:
            torch.stack([view(image) for image in given])

    return Case(both, theirs)


def decode(folder: Path) -> Case:
    """32 JPEGs of 500 x 375, read, decoded and cut to 224 in this process."""
    os.environ["MAECT_DECODE_PROCESSES"] = "0"
    files = []
    for number, picture in enumerate(pictures(40, (500, 375))):
        file = folder / "set" / ("val" if number < 8 else "train") / "class" / f"{number}.jpg"
        file.parent.mkdir(parents=True, exist_ok=True)
        picture.save(file, quality=90)
        files.append(file)
    settings = DataSettings(name="image_folder", path=str(folder / "set"), image_size=224)
    datasets.prepare(settings, folder)
    split = datasets.load(settings, folder)
    view = ViewSettings(crop_scale=(0.2, 1.0))
    augment = Augment([view], image_size=224, mean=MEAN, std=STD, seed=0, role="mae")
    rows, epochs = np.arange(len(split)), count()
    bicubic = InterpolationMode.BICUBIC
    cut = transforms.RandomResizedCrop(224, view.crop_scale, view.crop_ratio, bicubic)

    def theirs() -> None:
        for file in files[-len(split) :]:
            np.asarray(cut(Image.open(io.BytesIO(file.read_bytes())).convert("RGB")))

    return Case(lambda: augment.images(split, next(epochs), rows), theirs)


# ---------------------------------------------------------------------------------- evaluations


def classed(rows: int, dim: int, seed: int, classes: int = 10) -> evals.Features:
    """Return overlapping Gaussian classes: x [rows, dim] float32, y [rows]."""
    means = np.random.default_rng(11).standard_normal((classes, dim))
    draws = np.random.default_rng(seed)
    y = draws.permutation(np.arange(rows) % classes)
    x = 0.3 * means[y] + draws.standard_normal((rows, dim))
    return evals.Features(torch.from_numpy(x).float(), torch.from_numpy(y))


def evaluation(name: str, folder: Path) -> Case:
    """An evaluation of 10,240 features of 192 numbers, and its peer."""
    train, selection, test = (classed(n, 192, seed) for seed, n in enumerate((10_240, 512, 2_048)))
    data = evals.EvalInput(train, selection, test, 10)
    x, y = train.x.numpy(), train.y.numpy()
    given: dict[str, Any] = {}
    if name == "knn":
        stored, queries = (normalize_rows(part.x).numpy() for part in (train, test))
        model = NearestNeighbors(n_neighbors=20, algorithm="brute", n_jobs=1).fit(stored)
        theirs: Call = lambda: model.kneighbors(queries)  # noqa: E731
    elif name == "cluster":
        given = {"runs": 3}
        theirs = KMeans(10, n_init=3, random_state=0).fit
        theirs = partial(theirs, test.x.numpy())
    elif name == "low_shot":
        given = {"budgets": ["1", "2", "5"]}
        some = {n: [[i for c in range(10) for i in np.flatnonzero(y == c)[d * n : d * n + n]]
                    for d in range(3)] for n in (1, 2, 5)}  # fmt: skip
        data.low_shot = {str(n): draws for n, draws in some.items()}
        solver = LogisticRegression(C=4000.0, fit_intercept=False, tol=1e-5, max_iter=10_000)

        def theirs() -> None:
            for draws in some.values():
                for rows in draws:
                    solver.fit(x[rows], y[rows])
    else:  # probes
        given = {"epochs": 2}
        theirs = partial(plain_probe, train, 2)
    evaluator = evals.get(name)
    settings = evaluator.settings.parse(given)
    return Case(lambda: evaluator.run(data, settings), theirs)


def plain_probe(data: evals.Features, epochs: int) -> None:
    """One probe with torch's modules, autograd and optimizer."""
    model = nn.Sequential(nn.BatchNorm1d(data.x.shape[1], affine=False), nn.Linear(192, 10))
    optimizer = torch.optim.SGD(model.parameters(), lr=0.4, momentum=0.9)
    for _ in range(epochs):
        for rows in torch.randperm(len(data.y)).split(1024):
            optimizer.zero_grad()
            F.cross_entropy(model(data.x[rows]), data.y[rows]).backward()
            optimizer.step()


#: evaluations that run the encoder, with less to do than by default
ENCODER: dict[str, dict[str, Any]] = {
    "histogram": {},
    "probe_augmented": {"epochs": 1, "batch_size": 256},
    "low_shot_finetune": {"budgets": ["10%"], "epochs": 4, "batch_size": 32},
}


def with_encoder(name: str, folder: Path) -> Case:
    """An evaluation of a random encoder on the digits, against plain passes of its size."""
    from bench.run.worker import run_stage
    from bench.store.store import Store

    tree = yaml.safe_load(PAPER.read_text())
    profile = tree["profiles"]["digits"]
    for key in ("evaluate", "variants"):
        profile.pop(key, None)
    profile["evaluations"] = {name: ENCODER[name]}
    row = {"random encoder": {"init": "random"}}
    tables = [{"title": name, "columns": [name]}]
    tree = {"suite": "one", "profile": "digits", "seeds": [0], "variants": row, "tables": tables}
    tree |= {"evaluate": [name], "profiles": {"digits": profile}}
    (folder / "suite.yaml").write_text(yaml.safe_dump(tree))
    store = Store(folder / "store")
    store.create()
    plan = make_plan(load_suite(folder / "suite.yaml"), store)
    *before, last = plan.stages.values()
    for stage in before:
        run_stage(stage, store, "benchmark", lambda event: None)
    job = job_of(last, store, CPU)
    module = importlib.import_module("maect.stages.evaluate_encoder")
    return Case(lambda: module.run(job), plain_pass("digits", 4))


# ----------------------------------------------------------------------- suites of 1,000 stages

#: seeds of smoke.yaml that make 1,000 stages
MANY = 39


def suite(what: str, folder: Path) -> Case:
    """Plan, look up or report a suite of 1,000 stages; against reading all records as JSON."""
    from bench_helpers import fill

    from bench.cli import main
    from bench.store.store import Store

    store = Store(folder / "store")
    store.create()
    fill(store, make_plan(load_suite(SMOKE, seeds=MANY), store))
    records = list((folder / "store").rglob("record.json"))

    def plain() -> None:
        for record in records:
            text = record.read_bytes()
            hashlib.sha256(text).digest()
            try:
                json.dumps(json.loads(text))
            except ValueError:  # one in a hundred is damaged
                pass

    def report() -> None:
        arguments = ["report", str(SMOKE), "--seeds", str(MANY), "--store", str(store.root)]
        with redirect_stdout(io.StringIO()):
            assert main(arguments) == 0

    looked_up = store if what == "look-up" else None
    planned = partial(lambda: make_plan(load_suite(SMOKE, seeds=MANY), looked_up))
    return Case(report if what == "report" else planned, plain)


# ------------------------------------------------------------------------------------------- Ray

_BARE = """
import sys, ray
from ray.train import RunConfig, ScalingConfig
from ray.train.torch import TorchTrainer
ray.init(num_cpus=2, include_dashboard=False, log_to_driver=False)
scaling, kept = ScalingConfig(num_workers=1), RunConfig(storage_path=sys.argv[1])
TorchTrainer(lambda: None, scaling_config=scaling, run_config=kept).fit()
"""


def ray(folder: Path) -> Case:
    """A run of three small stages, against Ray Train that starts a worker which does nothing."""

    def call(*arguments: object) -> None:
        command = [sys.executable, *map(str, arguments)]
        subprocess.run(command, cwd=ROOT, check=True, capture_output=True, timeout=400)

    def ours() -> None:
        with tempfile.TemporaryDirectory(dir=folder) as place:
            call("-m", "bench", "run", SMOKE, "--only", "raw pixels", "--store", f"{place}/store")

    return Case(ours, lambda: call("-c", _BARE, folder / "ray"))


CASES: dict[str, Callable[[Path], Case]] = {
    **{f"step-{kind}-{size}": partial(step, kind, size) for size in SIZES for kind in TRAININGS},
    **{f"queue-top{topk}": partial(queue, topk) for topk in (1, 20)},
    "augment-min-32": partial(augment, "min", 32),
    "augment-aug-32": partial(augment, "aug", 32),
    "augment-aug-224": partial(augment, "aug", 224),
    "decode-224": decode,
    **{
        f"eval-{name}": partial(evaluation, name)
        for name in ("knn", "probe", "probe_restricted", "low_shot", "cluster")
    },
    **{f"eval-{name}": partial(with_encoder, name) for name in ENCODER},
    **{f"suite-{what}": partial(suite, what) for what in ("plan", "look-up", "report")},
    "ray-run": ray,
}
