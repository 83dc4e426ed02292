"""A training step of each stage, against a bound: what `pytest --benchmark` guards.

Absolute times mean nothing across machines, so each step is compared with a plain forward and
backward pass of timm's VisionTransformer of the same sizes on the same batch, timed in turn with
it, in CPU time. The bounds are 1.2 times the ratios measured on an AMD EPYC (AVX2), torch 2.15,
one thread, medians of 40 steps, both cores busy with other work: 0.56 and 0.57 (mae, three runs),
0.85 (head), 1.39 (tune). A step that takes 1.3 times as long is beyond them: a change that makes
steps quicker lowers these bounds in the same commit, or the check no longer sees a slowdown.
"""

from __future__ import annotations

import importlib
import time
from itertools import count
from pathlib import Path
from statistics import median

import pytest
import torch
from timm.models.vision_transformer import VisionTransformer

from bench.plan.planner import Stage, make_plan
from bench.run.worker import run_stage
from bench.store.store import Store
from bench.suite.load import load_suite
from maect import methods
from maect.stages.job import Job

SUITE = Path(__file__).parents[2] / "suites" / "paper_table.yaml"
ROUNDS = 40
#: stage -> largest ratio of its step to the plain pass
BOUNDS = {"mae": 0.68, "head": 1.02, "tune": 1.67}


@pytest.fixture(scope="module")
def stages(tmp_path_factory: pytest.TempPathFactory) -> tuple[dict[str, Stage], Store]:
    """The digits profile's stages of one seed, the inputs of the later ones trained briefly."""
    suite = load_suite(SUITE, seeds=1, sets=["mae.steps=5", "head.steps=5"])
    store = Store(tmp_path_factory.mktemp("store"))
    store.create()
    plan = make_plan(suite, store)
    row = next(row for row in plan.rows if row.variant.name == "MAE-CT")
    for stage in row.chain[:2]:
        run_stage(stage, store, "benchmark", lambda event: None)
    return {stage.kind: stage for stage in row.chain}, store


@pytest.fixture(scope="module")
def plain_pass():
    """One optimizer step of a plain ViT on a fixed batch: what everything is compared with."""
    torch.manual_seed(0)
    sizes = {"embed_dim": 64, "depth": 4, "num_heads": 4, "mlp_ratio": 2.0}
    model = VisionTransformer(img_size=8, patch_size=2, in_chans=1, num_classes=10, **sizes)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3)
    images, labels = torch.rand(128, 1, 8, 8), torch.arange(128) % 10

    def step() -> None:
        optimizer.zero_grad(set_to_none=True)
        torch.nn.functional.cross_entropy(model(images), labels).backward()
        optimizer.step()

    return step


@pytest.mark.benchmark(timer=time.process_time)
@pytest.mark.parametrize("kind", list(BOUNDS))
def test_a_step_is_not_slower_than_its_bound(kind, stages, plain_pass, benchmark):
    chain, store = stages
    stage = chain[kind]
    job = Job(
        settings=stage.settings,
        inputs={name: store.fetch(source.key) for name, source in stage.inputs.items()},
        data_root=Path(stage.places["data_root"]),
        kind=kind,
    )
    stage.settings["train"]["steps"] = 100  # the inputs above took 5
    training = importlib.import_module(methods.get(kind).entry).training(job)
    numbers = count()
    plain: list[float] = []

    def in_turn() -> None:
        began = time.process_time()
        plain_pass()
        plain.append(time.process_time() - began)

    benchmark.pedantic(
        lambda: training.step(next(numbers)), setup=in_turn, rounds=ROUNDS, warmup_rounds=5
    )
    taken = benchmark.stats.stats.data
    ratio = median(step / other for step, other in zip(taken, plain[-ROUNDS:], strict=True))
    benchmark.extra_info["ratio to a plain pass"] = round(ratio, 3)
    print(f"\n{kind}: {ratio:.2f} times a plain pass (bound {BOUNDS[kind]:.2f})")
    assert ratio <= BOUNDS[kind], (
        f"a step of '{kind}' takes {ratio:.2f} times a plain ViT pass; its bound is "
        f"{BOUNDS[kind]:.2f}: something has become slower"
    )
