"""One global batch over 1, 2 and 4 workers (gloo): the same gradients, the same queue.

Every worker count computes one step of each stage of smoke.yaml in fp32 and in fp64, cut by
workers, and in fp32 with four logical shards.
"""

from __future__ import annotations

import multiprocessing
import weakref
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from stage_helpers import (
    TRAININGS,
    Cutting,
    Kept,
    chain,
    successor_kinds,
    successor_stage,
    trained_inputs,
    training_of,
)
from torch import Tensor
from torch.testing._internal.distributed.fake_pg import FakeStore
from torch.utils._python_dispatch import TorchDispatchMode

from bench.store.store import Store
from maect.parallel import GradientSum, Group
from maect.stages.job import State
from maect.stages.loop import copies, parameters_of, train

CASES = {
    "fp32": ["numerics.shards=1"],
    "fp32 again": ["numerics.shards=1"],
    "fp64": ["numerics.shards=1", "numerics.precision=fp64"],
    "exact": ["numerics.shards=4"],
}
WORKERS = (1, 2, 4)
Found = dict[str, Tensor]


def one_step(kind: str, case: str, inputs: dict[str, Path]) -> Found:
    """Gradient and loss of the first step, and what the step leaves."""
    if inputs:
        stage = next(s for s in chain(Store(Path("none")), CASES[case]) if s.kind == kind)
    else:  # which has four logical shards, too
        stage = successor_stage(kind, steps=8)
    training = training_of(stage, inputs)
    epoch, indices = training.batches.at(0)
    loss = training.gradients(epoch, indices)["loss"]
    trained = [p for optimizer in training.optimizers for p in parameters_of(optimizer)]
    found = {
        "loss": torch.as_tensor(loss),
        "gradient": torch.cat([p.grad.reshape(-1) for p in trained if p.grad is not None]),
    }
    for optimizer in training.optimizers:
        optimizer.step()
    training.after_step()
    found["weights"] = torch.cat([p.detach().reshape(-1) for p in trained])
    for name, tensor in training.state().items():
        if "queue" in name:
            found[name.rpartition("/")[2]] = tensor
        elif not inputs:  # averages, the teacher, its centre
            found[name] = tensor.detach()
    return found


def resumed(rank: int, inputs: dict[str, Path]) -> Found:
    """A training's end, of which this worker alone sees the checkpoint, or does not see it."""
    stage = next(s for s in chain(Store(Path("none")), CASES["fp32"]) if s.kind == "mae")
    before = training_of(stage, inputs)
    for number in range(5):
        before.step(number)
    state = State(5, copies(before.state()), {})
    training = training_of(stage, inputs)
    training.job.checkpoints = Kept(state) if rank == 0 else Cutting(at=-1)
    output = train(training)
    assert output.summary["resumed_at"] == 5
    return output.tensors["encoder"]


def worker(rank: int, workers: int, folder: Path, inputs: dict[str, Path]) -> None:
    torch.set_num_threads(1)
    if workers > 1:
        dist.init_process_group(
            "gloo", init_method=f"file://{folder}/meet{workers}", rank=rank, world_size=workers
        )
    assert Group().share({"told by": rank}) == {"told by": 0}
    cases = [case for case in CASES if workers < 4 or case == "exact"]
    found = {(case, kind): one_step(kind, case, inputs) for case in cases for kind in TRAININGS}
    if workers < 4:
        found |= {("exact", kind): one_step(kind, "exact", {}) for kind in successor_kinds()}
    if workers == 2:
        found["resumed", "mae"] = resumed(rank, inputs)
    torch.save(found, folder / f"{workers}-{rank}.pt")
    if workers > 1:
        dist.destroy_process_group()


@pytest.fixture(scope="module")
def found(tmp_path_factory: pytest.TempPathFactory) -> dict[tuple[int, int, str, str], Found]:
    """(workers, rank, case, stage) -> what that worker ended with."""
    folder = tmp_path_factory.mktemp("parallel")
    inputs = trained_inputs(folder / "store")
    results: dict[tuple[int, int, str, str], Found] = {}
    # the imports, which cost seconds, happen once for all workers
    multiprocessing.set_forkserver_preload(["maect.stages.mae", "maect.stages.contrastive"])
    for workers in WORKERS:
        if workers == 1:
            worker(0, 1, folder, inputs)
        else:
            arguments = (workers, folder, inputs)
            mp.start_processes(worker, arguments, nprocs=workers, start_method="forkserver")
        for rank in range(workers):
            saved: dict[Any, Found] = torch.load(folder / f"{workers}-{rank}.pt")
            results |= {(workers, rank, *at): value for at, value in saved.items()}
    return results


def distance(a: Tensor, b: Tensor) -> float:
    """Relative L2 distance."""
    return float((a.double() - b.double()).norm() / b.double().norm())


@pytest.mark.parametrize("kind", list(TRAININGS))
@pytest.mark.parametrize(("case", "bound"), [("fp32", 1e-5), ("fp64", 1e-10)])
def test_two_workers_compute_the_gradient_of_one(case: str, bound: float, kind: str, found):
    one, two = found[1, 0, case, kind], found[2, 0, case, kind]
    assert one["gradient"].numel() > 1000
    assert one["gradient"].norm() > 0
    assert distance(two["gradient"], one["gradient"]) <= bound
    assert float(two["loss"]) == pytest.approx(float(one["loss"]), rel=bound)
    if kind != "mae":
        queue = next(name for name in one if name.endswith("embeddings"))
        assert distance(two[queue], one[queue]) <= bound
        for name in ("ids", "labels", "pointer"):
            name = next(n for n in one if n.endswith(name))
            assert torch.equal(two[name], one[name])


@pytest.mark.parametrize("kind", list(TRAININGS))
@pytest.mark.parametrize("workers", [1, 2])
def test_the_same_worker_count_is_repeatable_to_the_bit(workers: int, kind: str, found):
    first, second = found[workers, 0, "fp32", kind], found[workers, 0, "fp32 again", kind]
    assert all(torch.equal(second[name], tensor) for name, tensor in first.items())


@pytest.mark.parametrize("kind", list(TRAININGS))
@pytest.mark.parametrize("workers", [2, 4])
def test_logical_shards_are_bitwise_equal_on_any_worker_count(workers: int, kind: str, found):
    one, several = found[1, 0, "exact", kind], found[workers, 0, "exact", kind]
    assert several.keys() == one.keys()
    for name, tensor in one.items():
        assert torch.equal(several[name], tensor), name


@pytest.mark.parametrize("kind", successor_kinds())
def test_every_method_trains_the_same_bits_on_two_workers(kind: str, found):
    for rank in (0, 1):
        one, two = found[1, 0, "exact", kind], found[2, rank, "exact", kind]
        assert two.keys() == one.keys()
        assert all(torch.equal(two[name], tensor) for name, tensor in one.items())


@pytest.mark.parametrize("kind", list(TRAININGS))
@pytest.mark.parametrize(("workers", "case"), [(2, "fp32"), (2, "exact"), (4, "exact")])
def test_all_workers_end_with_the_same_weights(workers: int, case: str, kind: str, found):
    first = found[workers, 0, case, kind]
    for rank in range(1, workers):
        other = found[workers, rank, case, kind]
        for name in first:
            assert torch.equal(other[name], first[name]), (rank, name)


@pytest.mark.parametrize("kind", list(TRAININGS))
def test_shards_change_no_more_than_the_order_of_summation(kind: str, found):
    plain, exact = found[1, 0, "fp32", kind], found[1, 0, "exact", kind]
    assert distance(exact["gradient"], plain["gradient"]) <= 1e-5


def test_workers_resume_from_the_first_ones_checkpoint_whatever_the_others_see(found):
    first, second = (found[2, rank, "resumed", "mae"] for rank in (0, 1))
    assert all(torch.equal(first[name], second[name]) for name in first)


class Peak(TorchDispatchMode):
    """Bytes of the tensors that live at once, those of views counted with their base."""

    def __init__(self) -> None:
        super().__init__()
        self.live: dict[int, int] = {}
        self.most = 0

    def __torch_dispatch__(self, function, types, arguments=(), options=None):
        found = function(*arguments, **(options or {}))
        for tensor in found if isinstance(found, (tuple, list)) else [found]:
            if isinstance(tensor, Tensor):
                storage = tensor.untyped_storage()
                if id(storage._cdata) not in self.live:
                    self.live[storage._cdata] = storage.nbytes()
                    weakref.finalize(storage, self.live.pop, storage._cdata, None)
                self.most = max(self.most, sum(self.live.values()))
        return found


def test_the_memory_of_exact_sums_does_not_grow_with_the_workers():
    """Of eight, of which this process is one and the others do nothing."""
    dist.init_process_group("fake", rank=0, world_size=8, store=FakeStore())
    try:
        parameter = torch.nn.Parameter(torch.zeros(80_000))
        sums = GradientSum([parameter], Group(shards=8))
        sums.start()
        parameter.grad = torch.ones_like(parameter)
        with Peak() as peak:
            sums.add()
            sums.finish()
    finally:
        dist.destroy_process_group()
    assert peak.most <= 4 * parameter.nbytes  # gathered from all they were 9 times as many


@pytest.mark.parametrize("passes", [1, 2])
def test_fast_sums_begin_while_the_backward_pass_goes_on(passes: int, monkeypatch):
    """Of two workers, of which this process is one and the other does nothing."""
    layers = torch.nn.Sequential(*(torch.nn.Linear(1500, 1500) for _ in range(6)))  # 9 MB each
    sent: list[int] = []  # how many layers had their gradients when a sum began
    begin = dist.all_reduce

    def all_reduce(tensor: Tensor, **options: Any) -> Any:
        sent.append(sum(layer.weight.grad is not None for layer in layers))
        return begin(tensor, **options)

    monkeypatch.setattr(dist, "all_reduce", all_reduce)
    dist.init_process_group("fake", rank=0, world_size=2, store=FakeStore())
    try:
        sums = GradientSum(list(layers.parameters()), Group(), passes=passes)
        for _ in range(2):
            sums.start()
            for turn in range(passes):
                assert turn == 0 or not sent, "a sum began before its last pass"
                layers(torch.ones(2, 1500)).sum().backward()
            sums.add()
            sums.finish()
            assert sent == ([3, 6] if passes == 1 else [6, 6])
            sent.clear()
    finally:
        dist.destroy_process_group()


def test_a_batch_must_fall_into_equal_pieces():
    assert Group().pieces(6) == [slice(0, 6)]
    assert Group(shards=4).pieces(8) == [slice(0, 2), slice(2, 4), slice(4, 6), slice(6, 8)]
    with pytest.raises(ValueError, match="6 cannot be cut into 4 equal pieces"):
        Group(shards=4).pieces(6)


def test_the_sum_over_shards_is_a_fixed_tree():
    """((a + b) + (c + d)), not (((a + b) + c) + d): these differ in fp32."""
    values = [1e8, 1.0, -1e8, 1.0]
    parameter = torch.nn.Parameter(torch.zeros(1))
    sums = GradientSum([parameter], Group(shards=4))
    sums.start()
    for value in values:
        parameter.grad = torch.tensor([value])
        sums.add()
    sums.finish()
    a, b, c, d = (torch.tensor([value]) for value in values)
    assert parameter.grad is not None
    assert torch.equal(parameter.grad, (a + b) + (c + d))
    assert not torch.equal(parameter.grad, ((a + b) + c) + d)
