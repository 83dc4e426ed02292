"""The devices that a run is given: used or told why not, held by whom, and for how long."""

from __future__ import annotations

import json
import os
import shutil
import sys
import time
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any
from unittest.mock import MagicMock

import psutil
import pytest
import torch
from bench_helpers import SMOKE, Done, gone, records, run_bench, write_record

from bench.errors import MachineError, UserError
from bench.plan.stage import Plan
from bench.run import cluster, driver, mailbox, worker
from bench.run.cluster import Cluster
from bench.run.scheduler import Group as SchedulerGroup
from bench.run.scheduler import RunState
from bench.store.record import Cost, Failure
from bench.store.store import Store
from bench.suite.schema import DeviceSettings
from maect.parallel import Group
from reports.display import held


@pytest.mark.parametrize(
    ("cuda", "built"), [("13.2", "for CUDA 13.2"), (None, "for CPUs only")], ids=["driver", "wheel"]
)
def test_a_gpu_that_torch_cannot_use_is_an_error(
    cuda: str | None, built: str, store: Store, monkeypatch: pytest.MonkeyPatch
):
    """As where the driver is older than the wheel needs: Ray counts the GPU all the same."""
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.setattr(torch.version, "cuda", cuda)
    monkeypatch.setattr(worker, "driver_version", lambda: "535.104")
    with pytest.raises(MachineError) as told:
        worker.serve(lambda: None, lambda event: None, store, "run", 1.0)
    assert f"torch {torch.__version__} is built {built}, the driver is 535.104 on " in str(
        told.value
    )
    assert "with --cpu, or install a torch that is built for this driver" in str(told.value)
    assert "\n" not in str(told.value)


def test_a_worker_without_a_gpu_computes_on_the_cpu(store: Store, monkeypatch: pytest.MonkeyPatch):
    """Also where torch sees one: `--cpu` holds none."""
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    worker.serve(lambda: None, lambda event: None, store, "run", 0.0)
    assert worker.device_of(0.0) == torch.device("cpu")


# ----------------------------------------------------------------- who is given what, without a Ray


def cluster_of(
    *nodes: dict[str, float],
    monkeypatch: pytest.MonkeyPatch,
    workers: int = 1,
    address: str | None = None,
    wait_s: float | None = None,
    **asked: Any,
) -> Cluster:
    """What a run would make of a cluster with these nodes, whose workers have two threads."""
    monkeypatch.setattr(cluster, "_start", lambda *_: False)
    monkeypatch.setattr(cluster.ray, "remote", lambda _: MagicMock())
    me = MagicMock(gcs_address="here:1", **{"get_node_id.return_value": f"{1:056x}"})
    monkeypatch.setattr(cluster.ray, "get_runtime_context", lambda: me)
    listed = [
        {"NodeID": f"{number:056x}", "Alive": True, "Resources": node}
        | {"NodeManagerAddress": "here", "NodeManagerPort": 2}
        for number, node in enumerate(nodes, 1)
    ]
    monkeypatch.setattr(cluster.ray, "nodes", lambda: listed)
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "")
    devices = None if asked.pop("cpu", False) else DeviceSettings(**asked)
    made = Cluster(address, workers, 2, lambda seconds: None, devices, wait_s)
    made._parts = {}
    return made


A100: dict[str, float] = {"CPU": 16, "GPU": 8, "accelerator_type:A100": 1}
L4: dict[str, float] = {"CPU": 16, "GPU": 2, "accelerator_type:L4": 1}
HEAD: dict[str, float] = {"CPU": 4}


@pytest.mark.parametrize(
    ("nodes", "options", "each", "room"),
    [
        ([HEAD], {}, {"CPU": 2}, 2),
        ([HEAD, A100, L4], {}, {"CPU": 2, "GPU": 1}, 10),
        ([HEAD, A100, L4], {"accelerator_type": "L4"}, {"CPU": 2, "GPU": 1}, 2),
        ([HEAD, L4], {"gpu_share": 0.4}, {"CPU": 2, "GPU": 0.4}, 4),  # not 5: none lies on two GPUs
        ([HEAD, L4], {"gpu_share": 0.3333}, {"CPU": 2, "GPU": 0.3333}, 6),
        ([HEAD, L4], {"gpu_share": 0.1}, {"CPU": 2, "GPU": 0.1}, 8),  # as cores go
        ([HEAD, A100], {"cpu": True}, {"CPU": 2}, 10),
        ([HEAD], {"gpu_share": 0.5}, {"CPU": 2}, 2),
        ([HEAD], {"gpu_share": 0.5, "workers": 2}, {"CPU": 2}, 2),
        ([A100], {"gpu_share": 0.5, "workers": 0}, {"CPU": 2, "GPU": 1}, 1),
    ],
)
def test_what_each_worker_holds_and_how_many_there_is_room_for(
    nodes: list[dict[str, float]],
    options: dict[str, Any],
    each: dict[str, float],
    room: int,
    monkeypatch: pytest.MonkeyPatch,
):
    made = cluster_of(*nodes, monkeypatch=monkeypatch, **options)
    made.check_room()
    assert (made.each, made.room()) == (each, room)


@pytest.mark.parametrize(
    ("nodes", "options", "told"),
    [
        ([A100], {"accelerator_type": "a100"}, "no GPU of type 'a100'; did you mean 'A100'?"),
        ([A100, L4], {"accelerator_type": "H200"}, "no GPU of type 'H200'; known: A100, L4. With"),
        ([HEAD], {"accelerator_type": "L4"}, "no GPU of type 'L4'; it has no GPU of any type. Wit"),
        ([A100], {"gpu_share": 0.5, "workers": 2}, "--workers 2: devices.gpu_share is 0.5, and NC"),
        ([HEAD, L4], {"workers": 3}, "3 workers with 2 core(s) and 1 GPU each are more than Ray h"),
        ([HEAD, L4], {"workers": 3}, "has room for: 2, with 16 CPUs and 2 GPUs. Lower --workers"),
        ([HEAD], {"workers": 3}, "3 workers with 2 core(s) each are more than Ray has room for: 2"),
    ],
)
def test_devices_that_are_not_there_are_told_in_a_sentence(
    nodes: list[dict[str, float]],
    options: dict[str, Any],
    told: str,
    monkeypatch: pytest.MonkeyPatch,
):
    with pytest.raises(UserError) as error:
        cluster_of(*nodes, monkeypatch=monkeypatch, **options).check_room()
    assert told in str(error.value)
    assert "\n" not in str(error.value)


def test_nodes_of_a_joined_cluster_come_and_go(monkeypatch: pytest.MonkeyPatch):
    nodes = [HEAD]
    asked = {"accelerator_type": "L4", "address": "there:1"}
    made = cluster_of(*nodes, monkeypatch=monkeypatch, wait_s=90.0, **asked)
    made.check_room()  # it waits for the type, where else it would be refused
    assert (made.gpus, made.wait_s, made.room()) == (1.0, 90.0, 0)
    monkeypatch.setattr(cluster, "LOOK_S", 0.0)
    for there, room in ((L4, 2), (A100, 0), (L4 | {"GPU": 1}, 1)):
        listed = [{"Alive": True, "Resources": there}, {"Alive": False, "Resources": L4}]
        monkeypatch.setattr(cluster.ray, "nodes", lambda listed=listed: listed)
        assert made.room() == room
    with pytest.raises(UserError, match="Lower --workers or wait for nodes with --wait"):
        cluster_of(HEAD, monkeypatch=monkeypatch, workers=3, address="there:1").check_room()


def test_a_share_of_a_gpu_is_counted_as_such(store: Store, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: "L4")
    cost = worker.held(torch.device("cuda"), Group(), 2, 0.25)
    assert (cost.devices, cost.device_kind) == (0.25, "gpu")
    assert cost.after(3600.0, store.root).device_hours == 0.25
    assert held(cost.devices, "gpu", "L4") == "0.25 GPU (L4)"
    whole = worker.held(torch.device("cuda"), Group(), 2, 1.0)
    assert json.dumps(whole.model_dump()["devices"]) == "1"


def test_devices_are_part_of_no_key(plan_of: Callable[..., Plan], tmp_path: Path):
    """And a profile may replace the suite's."""
    asked = "devices: {accelerator_type: L4, gpu_share: 0.25}\n"
    suite, profile = tmp_path / "suite.yaml", tmp_path / "profile.yaml"
    text = SMOKE.read_text(encoding="utf-8")
    suite.write_text(asked + text, encoding="utf-8")
    profile.write_text(text.replace("  tiny:\n", f"  tiny:\n    {asked}"), encoding="utf-8")
    plain = plan_of()
    for path in (suite, profile):
        plan = plan_of(path)
        assert plan.suite.devices == DeviceSettings(accelerator_type="L4", gpu_share=0.25)
        assert plan.stages.keys() == plain.stages.keys()


# --------------------------------------------------------------------------- what groups hold apart


def test_what_a_group_holds_outside_attempts_counts_apart_and_in_the_budget(
    plan_of: Callable[..., Plan], store: Store, monkeypatch: pytest.MonkeyPatch
):
    """Two GPUs for 100 s, of which a stage ran 60 s."""
    plan, now = plan_of(seeds=1, store=store.root), [1000.0]
    monkeypatch.setattr(time, "monotonic", lambda: now[0])
    run = SimpleNamespace(id="run", reserved_hours=None)
    options = driver.RunOptions(max_hours={"gpu": 0.055})
    joined = MagicMock(gpus=1.0, **{"devices.return_value": 2.0})
    monkeypatch.setattr(cluster, "Cluster", lambda *_: joined)
    steered = driver._Driver(plan, store, options, run)
    steered._act()  # starts a group
    now[0] += 30.0
    stage = steered.state.ready()[0]
    steered.state.wait(1, 0.0)
    steered.state.begin(1, stage.key)
    gpus = Cost(devices=2, device_kind="gpu", device_model="G")
    write_record(store, stage, cost=gpus, wall_s=60.0)
    now[0] += 60.0
    assert steered._take_if_complete(stage)
    steered._check_budget()
    now[0] += 10.0
    assert steered._hours() == (pytest.approx(2 * 60 / 3600), pytest.approx(2 * 40 / 3600))
    with pytest.raises(driver.Interrupted) as stopped:
        steered._check_budget()
    assert str(stopped.value) == (
        "the budget of 0.055 GPU-hours is spent (0.05556, of it 0.02222 while groups started, "
        "waited and ended)"
    )
    steered._hear(mailbox.GroupEnded(1, None))
    now[0] += 1000.0
    steered.close()
    assert run.reserved_hours == {"gpu": pytest.approx(2 * 40 / 3600)}


# ---------------------------------------------------------------------- a real Ray, stand-in GPUs


def run_with_gpus(
    folder: Path,
    monkeypatch: pytest.MonkeyPatch,
    suite: Path,
    *given: object,
    gpus: int | None = 2,
    fake: bool = True,
) -> tuple[Done, list[dict[str, Any]]]:
    """A run whose Ray has four cores and so many GPUs, and what its workers noted.

    The GPUs compute if `fake`. None: those that Ray finds.
    """
    if fake:
        shutil.copy(Path(__file__).with_name("stand_in_gpus.py"), folder / "sitecustomize.py")
        monkeypatch.setenv("PYTHONPATH", os.pathsep.join([str(folder), *sys.path]))
    monkeypatch.setenv("STAND_IN_NOTES", str(folder / "notes"))
    monkeypatch.setenv(
        "RAY_OVERRIDE_RESOURCES", json.dumps({"CPU": 4} | ({"GPU": gpus} if gpus else {}))
    )
    done = run_bench("run", suite, "--store", folder / "store", "--seeds", 1, *given)
    notes = folder / "notes"
    lines = notes.read_text().splitlines() if notes.exists() else []
    return done, [json.loads(line) for line in lines]


@pytest.mark.slow
def test_no_process_outlives_its_devices_and_shares_are_counted(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    suite = tmp_path / "shared.yaml"
    suite.write_text("devices: {gpu_share: 0.5}\n" + SMOKE.read_text(encoding="utf-8"))
    done, notes = run_with_gpus(tmp_path, monkeypatch, suite)
    assert done.code == 0, done
    groups = [note for note in notes if note["what"] == "group"]
    pids = [note["pid"] for note in groups]
    assert len(set(pids)) == len(pids)  # each group's process is new
    assert {note["gpus"] for note in groups} == {0.5}
    seen = {pid: {note["sees"] for note in notes if note["pid"] == pid} for pid in pids}
    assert all(len(devices) == 1 for devices in seen.values())  # its devices for all of its life
    assert {device for devices in seen.values() for device in devices} == {"0", "1"}
    assert gone([process for process in psutil.process_iter() if process.pid in pids], 10.0) == []
    busy: set[int] = set()
    most = 0
    for note in notes:
        if note["what"] != "group":
            busy ^= {note["pid"]}
            most = max(most, len(busy))
            each = Counter(device for pid in busy for device in seen[pid])
            assert max(each.values(), default=0) <= 2
    assert most > 2  # so mailbox and controllers hold none
    costs = [attempt["cost"] for tries in records(tmp_path / "store").values() for attempt in tries]
    assert {(cost["devices"], cost["device_kind"]) for cost in costs} == {(0.5, "gpu")}


@pytest.mark.slow
def test_cpu_holds_no_gpu_and_counts_cores(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    arguments = (SMOKE, "--only", "raw*", "--workers", 2)
    done, _ = run_with_gpus(tmp_path, monkeypatch, *arguments, fake=False)
    assert done.code == 1
    assert done.err.startswith("\nRay gave a worker a GPU that its torch cannot use: torch "), done
    assert "Traceback" not in done.err
    assert records(tmp_path / "store") == {}
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "0,1")
    done, notes = run_with_gpus(tmp_path, monkeypatch, *arguments, "--cpu", gpus=None)
    assert done.code == 0, done
    assert {(note["sees"], note.get("gpus", 0)) for note in notes} == {("", 0)}
    costs = [attempt["cost"] for tries in records(tmp_path / "store").values() for attempt in tries]
    assert {cost["device_kind"] for cost in costs} == {"cpu"}


# ----------------------------------------------------------------------------------- out of memory

CUDA = (
    "CUDA out of memory. Tried to allocate 20.00 GiB. GPU 0 has a total capacity of 79.10 GiB of "
    "which 1.25 GiB is free."
)
OF_CUDA = (
    " on the GPU: it asked for 20.00 GiB more of 79.10 GiB, of which 1.25 GiB were free; "
    "by calculation its step holds 0.000504 GB for the backward pass; set "
    "numerics.checkpoint_activations=true, which changes no digit, or share the batch among more "
    "--workers, or lower mae.batch_size"
)
HOST = "DefaultCPUAllocator: can't allocate memory: you tried to allocate 4096 bytes. Error code 12"


@pytest.mark.parametrize(
    ("error", "title", "told"),
    [
        (
            torch.cuda.OutOfMemoryError(CUDA),
            "MAE, seed 0",
            OF_CUDA,
        ),
        (
            RuntimeError("CUDA error: CUBLAS_STATUS_ALLOC_FAILED when calling `cublasCreate`"),
            "raw pixels features",
            " on the GPU; use a GPU with more memory",
        ),
        (
            RuntimeError(HOST),
            "raw pixels features",
            " on the machine: it asked for 4096 bytes more; use a machine with more memory",
        ),
        (
            MemoryError("Unable to allocate 7.28 TiB for an array"),
            "raw pixels features",
            " on the machine: it asked for 7.28 TiB more; use a machine with more memory",
        ),
    ],
    ids=["CUDA", "cuBLAS", "host", "numpy"],
)
def test_a_stage_that_runs_out_of_memory_says_what_helps(
    error: Exception, title: str, told: str, plan_of: Callable[..., Plan], store: Store,
    monkeypatch: pytest.MonkeyPatch,
):  # fmt: skip
    plan, told = plan_of(seeds=1, store=store.root), f"{title} ran out of memory{told}"
    stage = next(s for s in plan.stages.values() if s.title == title)
    entry = f"maect.stages.{stage.kind}.{'training' if stage.trains else 'run'}"
    monkeypatch.setattr(entry, MagicMock(side_effect=error))
    events: list[Any] = []
    with pytest.raises(worker.StageFailed):
        worker.run_stage(stage, store, "run", events.append)
    (attempt,) = store.state(stage.key).attempts
    assert (attempt.status, attempt.error) == (
        "failed", Failure(kind=worker.OUT_OF_MEMORY, message=told)
    )  # fmt: skip
    assert str(error) in attempt.log_tail
    assert events[-1] == mailbox.Ended(stage.key, told)
    state = RunState(plan.stages, groups={1: SchedulerGroup(1)})
    state.begin(1, stage.key)
    state.fail(stage.key, told)
    assert stage not in state.ready()


def test_memory_that_ran_out_at_another_worker_than_the_first_is_recorded(
    plan_of: Callable[..., Plan], store: Store, monkeypatch: pytest.MonkeyPatch
):
    """The first one waits in a collective call, until it is killed."""
    stage = next(iter(plan_of(seeds=1, store=store.root).stages.values()))
    begun = write_record(store, stage, status="running")
    second = SimpleNamespace(rank=1, size=2, share=lambda _: begun)
    monkeypatch.setattr(worker, "Group", lambda: second)
    failing = MagicMock(side_effect=torch.cuda.OutOfMemoryError(CUDA))
    monkeypatch.setattr(f"maect.stages.{stage.kind}.run", failing)
    events: list[Any] = []
    with pytest.raises(worker.StageFailed):
        worker.run_stage(stage, store, "run", events.append)
    (attempt,) = store.state(stage.key).attempts
    assert attempt.status == "failed"
    assert attempt.error is not None
    assert attempt.error.kind == worker.OUT_OF_MEMORY
    assert events == [mailbox.Ended(stage.key, attempt.error.message)]
