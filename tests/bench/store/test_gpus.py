"""What NVML says of a GPU, through the real binding, against a stand-in of the driver's library.

Expected values are computed by hand from the script's history: 100 W idle for 10 s, then 300 W at
80 % for 10 s, then 200 W at 40 % for 10 s; 1, 3 and 2 GiB used.
"""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
from bench_helpers import SMOKE, Bench, write_record, write_run

from bench.plan.planner import make_plan
from bench.run.recovery import close_running
from bench.store.record import Cost, noted, together
from bench.store.store import Store
from bench.suite.load import load_suite
from reports.display import amount

GIB = 2**30
DEVICE = "device GPU-aaaa Stand-in-1\n"
HISTORY = f"at 0 100000 0 {GIB} 1\nat 10 300000 80 {3 * GIB} 1\nat 20 200000 40 {2 * GIB} 1\n"
JOULES = 100 * 10 + 300 * 10 + 200 * 10
SECONDS = 30
#: NVML's codes, from nvml.h
NOT_SUPPORTED, NO_PERMISSION, FUNCTION_NOT_FOUND, GPU_IS_LOST = 3, 4, 13, 15

pytestmark = pytest.mark.needs("gcc")

#: one sample a second of the script's time, then the reading
DRIVE = """
import ctypes, json, sys
from pathlib import Path
from bench.store.gpu_meter import Meter
library, now = ctypes.CDLL("libnvidia-ml.so.1"), 0.0
library.standin_set_time.argtypes = [ctypes.c_double]
library.standin_set_time(0.0)
meter = Meter(sys.argv[1], Path("."), clock=lambda: now)
meter.open()
for second in range(int(sys.argv[2]) + 1):
    now = float(second)
    library.standin_set_time(now)
    meter.sample()
meter.close()
print(meter.reading().model_dump_json())
"""

#: one stage as a worker runs it; only what torch would say of its device is put in its mouth
STAGE = """
import sys, time
from pathlib import Path
import torch
from bench.run import worker
from bench.plan.planner import make_plan
from bench.store.store import Store
from bench.suite.load import load_suite
from maect.stages import features
worker.device_of = lambda gpus: torch.device("cpu")
worker._uuid = lambda device: "aaaa"
torch.cuda.get_device_name = lambda device: "Stand-in-1"
if sys.argv[3] == "fail":
    def broken(*given):
        time.sleep(0.5)
        raise ValueError("planted")
    features.run = broken
store = Store(Path(sys.argv[2]))
store.create()
stages = make_plan(load_suite(Path(sys.argv[1]), seeds=1), store).stages.values()
stage = next(s for s in stages if s.kind == "features" and not s.inputs)
try:
    worker.run_stage(stage, store, "run", lambda event: None, float((sys.argv + ["1"])[4]))
except worker.StageFailed:
    assert sys.argv[3] == "fail"
"""


@dataclass
class StandIn:
    """A driver whose library and script lie in a folder."""

    folder: Path

    def run(self, script: str, program: str, *arguments: object) -> str:
        """Run a Python program that finds the stand-in as it would find the driver's library."""
        (self.folder / "script").write_text(script)
        done = subprocess.run(
            [sys.executable, "-c", program, *map(str, arguments)],
            cwd=self.folder,
            env=os.environ
            | {"LD_LIBRARY_PATH": str(self.folder), "NVML_SCRIPT": str(self.folder / "script")},
            capture_output=True,
            text=True,
            timeout=120,
        )
        assert done.returncode == 0, done.stderr
        return done.stdout

    def reading(self, script: str, uuid: str = "GPU-aaaa", seconds: int = SECONDS) -> Any:
        return json.loads(self.run(script, DRIVE, uuid, seconds))


@pytest.fixture(scope="module")
def library(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The stand-in, compiled."""
    path = tmp_path_factory.mktemp("nvml") / "libnvidia-ml.so.1"
    source = Path(__file__).parent / "nvml_stand_in.c"
    subprocess.run(["gcc", "-shared", "-fPIC", "-o", path, source], check=True)
    return path


@pytest.fixture
def driver(library: Path, tmp_path: Path) -> StandIn:
    shutil.copy(library, tmp_path)
    return StandIn(tmp_path)


def joules(reading: dict[str, Any]) -> float:
    return float(reading["energy_kwh"]) * 3.6e6


def test_the_device_history_gives_the_computed_cost(driver: StandIn) -> None:
    found = driver.reading(DEVICE + HISTORY)
    assert joules(found) == pytest.approx(JOULES, rel=0.01)
    assert found["energy_from"] == "counter"
    assert found["utilisation_percent"] == pytest.approx((0 + 80 + 40) / 3, rel=0.01)
    assert found["peak_memory_mib"] == 3 * 1024
    assert (found["uuid"], found["model"]) == ("GPU-aaaa", "Stand-in-1")
    assert (found["seconds"], found["reasons"]) == (SECONDS, {})


@pytest.mark.parametrize("code", [NOT_SUPPORTED, FUNCTION_NOT_FOUND])
def test_without_a_counter_power_is_integrated_and_marked(driver: StandIn, code: int) -> None:
    script = f"{DEVICE}{HISTORY}fail nvmlDeviceGetTotalEnergyConsumption {code}\n"
    found = driver.reading(script)
    assert joules(found) == pytest.approx(JOULES, rel=0.01)
    assert found["energy_from"] == "power"


def fails(functions: str, code: int, at: str = "") -> str:
    return "".join(f"fail nvml{name} {code} {at}\n" for name in functions.split())


METERS = "DeviceGetTotalEnergyConsumption DeviceGetPowerUsage"
ALL = f"{METERS} DeviceGetUtilizationRates DeviceGetMemoryInfo DeviceGetComputeRunningProcesses_v3"
EVERY = ("energy_kwh", "utilisation_percent", "peak_memory_mib")
MIG = "MIG: the driver counts for the whole GPU, not for an instance"
SHARED = f"at 25 200000 40 {GIB} 2\n"


@pytest.mark.parametrize(
    ("script", "options", "blank", "why"),
    [
        (fails(METERS, NOT_SUPPORTED), {}, EVERY[:1], "NVML: Not Supported"),
        (fails(ALL, GPU_IS_LOST, "12"), {}, EVERY, "NVML: GPU is lost, 12 s into the attempt"),
        (fails("InitWithFlags", NO_PERMISSION), {}, EVERY, "NVML: Insufficient Permissions"),
        ("", {"uuid": "GPU-bbbb"}, EVERY, "NVML: Not Found"),
        ("mig 1\n", {}, EVERY, MIG),
        ("device MIG-aaaa Slice\n", {}, EVERY[:2], MIG),
        (SHARED, {}, EVERY, "shared: 2 processes compute on the device"),
        # a process that is gone a second later was only ending
        (f"{SHARED}at 25.5 200000 40 {GIB} 1\n", {}, (), ""),
        ("", {"seconds": 0}, EVERY[:2], "the attempt was too short for two samples"),
    ],
    ids=["no meter", "lost on the way", "not permitted", "not there", "MIG", "an instance of MIG",
         "shared", "shared for a moment", "too short"],
)  # fmt: skip
def test_what_was_not_measured_for_all_of_the_attempt_is_blank_and_says_why(
    script: str, options: dict[str, Any], blank: tuple[str, ...], why: str, driver: StandIn
) -> None:
    device = "" if script.startswith("device") else DEVICE
    found = driver.reading(device + HISTORY + script, **options)
    assert found["reasons"] == dict.fromkeys(blank, why)
    assert tuple(name for name in EVERY if found[name] is None) == blank
    assert (found["energy_from"] is None) == ("energy_kwh" in blank)


def only_record(root: Path) -> dict[str, Any]:
    store = Store(root)
    ((key,), (record,)) = store.stage_keys(), store.state(store.stage_keys()[0]).attempts
    assert record.key == key
    return record.plain()


STEADY = DEVICE + f"at 0 250000 60 {GIB} 1\n"


def test_a_stage_records_its_devices_and_their_cost(
    driver: StandIn, tmp_path: Path, bench: Bench
) -> None:
    driver.run(STEADY, STAGE, SMOKE, tmp_path / "store", "run")
    record = only_record(tmp_path / "store")
    cost = record["cost"]
    (gpu,) = cost["gpus"]
    assert record["status"] == "complete"
    assert (gpu["uuid"], gpu["model"], gpu["worker"]) == ("GPU-aaaa", "Stand-in-1", 0)
    assert cost["device_hours"] == pytest.approx(cost["wall_s"] / 3600)
    assert cost["energy_kwh"] * 3.6e6 == pytest.approx(250 * gpu["seconds"], rel=0.01)
    assert gpu["seconds"] <= cost["wall_s"]
    assert cost["utilisation_percent"] == pytest.approx(60)
    assert cost["peak_memory_mib"] == 1024
    assert (cost["energy_from"], cost["energy_reason"]) == ("counter", None)
    done = bench("report", SMOKE, "--seeds", 1, "--store", tmp_path / "store")
    page = (tmp_path / "store" / "reports" / "smoke-tiny.html").read_text(encoding="utf-8")
    assert f"Energy: {amount(cost['energy_kwh'])} kWh." in done.out
    assert f"GPU-aaaa (Stand-in-1, {gpu['host']})" in page
    for shown in ("60.0 %", "1,024 MiB", '<code>GPU-aaaa</code></th><td class="row">Stand-in-1'):
        assert shown in page, shown


def test_a_share_of_a_device_is_counted_exactly_and_the_rest_is_blank(
    driver: StandIn, tmp_path: Path, bench: Bench
) -> None:
    """The device's meters tell of all who share it."""
    driver.run(STEADY, STAGE, SMOKE, tmp_path / "store", "run", 0.25)
    cost = only_record(tmp_path / "store")["cost"]
    assert cost["devices"] == 0.25
    assert cost["device_hours"] == 0.25 * cost["wall_s"] / 3600
    assert [cost[name] for name in EVERY] == [None, None, None]
    assert cost["energy_reason"] == "shared: the worker held 0.25 of the device"
    bench("report", SMOKE, "--seeds", 1, "--store", tmp_path / "store")
    page = (tmp_path / "store" / "reports" / "smoke-tiny.html").read_text(encoding="utf-8")
    assert "shared: the worker held 0.25 of the device" in page
    assert "0.25 GPU (Stand-in-1)" in page
    write_run(Store(tmp_path / "store"), "run")
    assert bench("verify", SMOKE, "--seeds", 1, "--store", tmp_path / "store").code == 0


def test_a_failed_stage_has_its_cost_too(driver: StandIn, tmp_path: Path) -> None:
    driver.run(STEADY, STAGE, SMOKE, tmp_path / "store", "fail")
    record = only_record(tmp_path / "store")
    assert (record["status"], record["error"]["message"]) == ("failed", "planted")
    assert record["cost"]["energy_kwh"] * 3.6e6 == pytest.approx(
        250 * record["cost"]["gpus"][0]["seconds"], rel=0.01
    )


def test_nvml_that_fails_leaves_the_stage_unharmed(driver: StandIn, tmp_path: Path) -> None:
    script = f"{STEADY}fail nvmlDeviceGetHandleByUUID {GPU_IS_LOST}\n"
    driver.run(script, STAGE, SMOKE, tmp_path / "store", "run")
    record = only_record(tmp_path / "store")
    cost = record["cost"]
    assert record["status"] == "complete"
    assert cost["device_hours"] == pytest.approx(cost["wall_s"] / 3600)
    assert (cost["energy_kwh"], cost["energy_reason"]) == (None, "NVML: GPU is lost")
    assert (cost["peak_memory_mib"], cost["peak_memory_reason"]) == (None, "NVML: GPU is lost")


def note(folder: Path, worker: int, **changes: Any) -> None:
    """What the meter of a worker's device left."""
    reading: dict[str, Any] = {"uuid": f"GPU-{worker}", "model": "G", "host": "h", "worker": worker}
    reading |= {"seconds": 10.0, "samples": 11, "reasons": {}, "final": True}
    reading |= {"energy_kwh": 0.5, "energy_from": "counter"}
    reading |= {"utilisation_percent": 50.0, "peak_memory_mib": 100.0}
    (folder / f"gpu-{worker}.json").write_text(json.dumps(reading | changes))


def test_the_devices_of_an_attempt_together(tmp_path: Path) -> None:
    note(tmp_path, 0)
    note(tmp_path, 1, utilisation_percent=80.0, peak_memory_mib=300.0, energy_from="power")
    cost = together(noted(tmp_path), 2)
    assert [gpu.uuid for gpu in cost["gpus"]] == ["GPU-0", "GPU-1"]
    assert (cost["energy_kwh"], cost["energy_from"]) == (1.0, "counter+power")
    assert (cost["utilisation_percent"], cost["peak_memory_mib"]) == (65.0, 300.0)


def test_what_workers_tell_counts_whatever_the_folder_shows(tmp_path: Path) -> None:
    """A listing of a network's file system may be stale."""
    note(tmp_path, 0)
    note(tmp_path, 1, reserved_memory_mib=90.0)
    held = Cost(devices=2, device_kind="gpu", device_model="G", gpus=noted(tmp_path))
    cost = held.after(3600.0, tmp_path / "empty")
    assert (cost.energy_kwh, cost.energy_reason) == (1.0, None)
    assert (cost.reserved_memory_mib, cost.device_hours) == (90.0, 2.0)


def test_a_device_without_a_word_makes_the_sum_blank(tmp_path: Path) -> None:
    note(tmp_path, 0)
    cost = together(noted(tmp_path), 4)
    assert cost["energy_kwh"] is None
    assert cost["energy_reason"] == "3 of 4 devices left no word"


def test_a_killed_worker_leaves_what_it_had_noted(tmp_path: Path) -> None:
    store = Store(tmp_path / "store")
    store.create()
    stage = next(iter(make_plan(load_suite(SMOKE, seeds=1), store).stages.values()))
    held = Cost(devices=1, device_kind="gpu", device_model="G")
    write_record(store, stage, status="running", cost=held)
    note(store.folder(stage.key) / "attempts" / "1", 0, final=False)
    close_running(store, stage.key, "lost", "killed")
    cost = store.state(stage.key).attempts[0].cost
    assert cost.gpus is not None and cost.gpus[0].energy_kwh == 0.5
    assert cost.energy_kwh is None
    assert cost.energy_reason == ("its worker ended without a word, some 10 s into the attempt")
