"""Steps of ViT-L/16 on a GPU beside plain ones of timm's own modules: `pytest --benchmark -m gpu`.

Each is timed in the same process on images at hand, without data or augmentation, in bf16. A plain
step masks by random numbers of the device and repeats no bits; ours draws each mask by image and
runs deterministic kernels. A tuning step of ours holds the NNCLR head and its queue, of which the
plain one has nothing. The lines that are printed are JSON.
"""

from __future__ import annotations

import json
from collections.abc import Callable
from functools import cache
from pathlib import Path
from statistics import median
from typing import Any

import pytest
import torch
from timm.models.vision_transformer import Block, VisionTransformer
from torch import Tensor, nn

from bench.commands.calibrate import photographs
from bench.plan.planner import make_plan
from bench.run import calibrate
from bench.run.worker import job_of
from bench.suite.load import data_info, load_suite
from maect.datasets import prepare
from maect.stages.contrastive import TuneTraining
from maect.stages.loop import Training
from maect.stages.mae import MAETraining

pytestmark = pytest.mark.gpu
SUITE = Path(__file__).parents[2] / "suites" / "paper_table.yaml"
#: images of a step, of which MAE sees one view and tuning two
BATCH = {"mae": 256, "tune": 64}
STEPS = 12


@cache
def peak() -> float:
    return calibrate.matrix_product("bf16", threads=8)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    place = tmp_path_factory.mktemp("images")
    photographs(place / "images", 512)
    return place


def training_of(kind: str, folder: Path, monkeypatch: pytest.MonkeyPatch, *sets: str) -> Any:
    """A training of the imagenet profile that sees the same views at each step, and its FLOPs."""
    monkeypatch.setenv("MAECT_DATA", str(folder))
    given = [f"data.path={folder / 'images'}", "data.classes=2", "mae.views=1", *sets]
    given += [f"{name}.batch_size={BATCH['tune']}" for name in ("head", "tune")]
    given.append(f"mae.batch_size={BATCH['mae']}")
    options: dict[str, Any] = {"profile": "imagenet", "seeds": 1, "sets": given}
    prepare(next(iter(load_suite(SUITE, **options).variants.values())).row.data, folder, print)
    data_info.cache_clear()
    plan = make_plan(load_suite(SUITE, **options), None, only="MAE-CT")
    stage = next(one for one in plan.stages.values() if one.kind == kind)
    job = job_of(stage, None, torch.device("cuda"))
    training: Training = {"mae": MAETraining, "tune": TuneTraining}[kind](job)
    epoch, rows = training.batches.at(0)
    images = training.augment.images(training.train, epoch, rows)
    views = training.augment.batch(training.train, epoch, rows)
    training.augment.images = lambda *given: images  # type: ignore[method-assign]
    training.augment = Held(training.augment, views)  # type: ignore[assignment]
    assert stage.steps
    return training, stage.flops / stage.steps


class Held:
    """In the place of the augmentation."""

    def __init__(self, augment: Any, views: list[Tensor]) -> None:
        self.views, self.images = views, augment.images

    def __call__(self, images: Any, epoch: int, ids: Any, view: int) -> Tensor:
        return self.views[view]

    def batch(self, *given: Any) -> list[Tensor]:
        return self.views


def told(name: str, kind: str, step: Callable[[int], Any], flops: float, capsys: Any) -> None:
    """Time steps after a warm-up, in windows, and print what came of it."""
    torch.cuda.reset_peak_memory_stats()
    numbers = iter(range(10**6))
    for _ in range(3):
        step(next(numbers))
    times = [calibrate._seconds(lambda: step(next(numbers)), 4) for _ in range(STEPS // 4)]
    found = {
        "step": f"{kind} of ViT-L/16, {BATCH[kind]} images",
        "by": name,
        "device": torch.cuda.get_device_name(),
        "torch": torch.__version__,
        "ms": round(1000 * median(times), 1),
        "tflops": round(flops / median(times) / 1e12, 1),
        "share_of_matrix_product": round(flops / median(times) / peak(), 3),
        "peak_gib": round(torch.cuda.max_memory_allocated() / 2**30, 1),
    }
    with capsys.disabled():
        print("\n" + json.dumps(found))


@pytest.mark.parametrize("how", ["eager", "compiled", "checkpointed"])
@pytest.mark.parametrize("kind", ["mae", "tune"])
def test_our_step(kind: str, how: str, folder: Path, monkeypatch: Any, capsys: Any) -> None:
    sets = {
        "eager": [],
        "compiled": ["numerics.compile=true"],
        "checkpointed": ["numerics.checkpoint_activations=true"],
    }[how]
    training, flops = training_of(kind, folder, monkeypatch, *sets)
    monkeypatch.setattr("maect.stages.loop.is_logged", lambda step, steps: False)
    told(f"maect, {how}", kind, training.step, flops, capsys)


class PlainMAE(nn.Module):
    """timm's ViT-L/16 over a quarter of the patches, and a decoder of its blocks."""

    def __init__(self) -> None:
        super().__init__()
        self.vit = VisionTransformer(embed_dim=1024, depth=24, num_heads=16, num_classes=0)
        self.embed, self.pred = nn.Linear(1024, 512), nn.Linear(512, 768)
        self.mask = nn.Parameter(torch.zeros(1, 1, 512))
        self.decoder = nn.Sequential(*(Block(512, 16, qkv_bias=True) for _ in range(8)))
        self.norm = nn.LayerNorm(512)

    def forward(self, images: Tensor) -> Tensor:
        tokens = self.vit.patch_embed(images)
        count, width = len(images), tokens.shape[2]
        order = torch.rand(count, 196, device=images.device).argsort(1)
        seen = tokens.gather(1, order[:, :49, None].expand(-1, -1, width))
        tokens = torch.cat([self.vit.cls_token.expand(count, -1, -1), seen], 1)
        latent = self.embed(self.vit.norm(self.vit.blocks(tokens)))
        hidden = self.mask.expand(count, 147, -1).to(latent.dtype)
        whole = torch.cat([latent[:, 1:], hidden], 1)
        restored = whole.gather(1, order.argsort(1)[..., None].expand(-1, -1, 512))
        decoded = self.decoder(torch.cat([latent[:, :1], restored], 1))
        target = images.unfold(2, 16, 16).unfold(3, 16, 16).permute(0, 2, 3, 4, 5, 1)
        error = (self.pred(self.norm(decoded))[:, 1:] - target.reshape(count, 196, 768)) ** 2
        return error.mean(2).gather(1, order[:, 49:]).mean()


class PlainTuning(nn.Module):
    """timm's ViT-L/16 over two views, its lower half frozen."""

    def __init__(self) -> None:
        super().__init__()
        self.vit = VisionTransformer(embed_dim=1024, depth=24, num_heads=16, num_classes=0)

    def forward(self, images: Tensor) -> Tensor:
        with torch.no_grad():
            tokens = self.vit._pos_embed(self.vit.patch_embed(images))
            tokens = self.vit.blocks[:12](tokens)
        features = self.vit.norm(self.vit.blocks[12:](tokens))[:, 0].float()
        return (features @ features.T).mean()


@pytest.mark.parametrize("kind", ["mae", "tune"])
def test_a_plain_step(kind: str, folder: Path, monkeypatch: Any, capsys: Any) -> None:
    _, flops = training_of(kind, folder, monkeypatch)
    torch.use_deterministic_algorithms(False)
    model = (PlainMAE() if kind == "mae" else PlainTuning()).cuda()
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-4, fused=True)
    images = torch.randn(BATCH[kind] * (1 if kind == "mae" else 2), 3, 224, 224, device="cuda")

    def step(number: int) -> None:
        optimizer.zero_grad()
        with torch.autocast("cuda", torch.bfloat16):
            loss = model(images)
        loss.backward()
        optimizer.step()

    told("timm, eager", kind, step, flops, capsys)
