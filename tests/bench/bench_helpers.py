"""The suite runner's tests: suites, and the real command line."""

from __future__ import annotations

import json
import os
import re
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import psutil

from bench.environment import AVX2, describe
from bench.plan.planner import make_plan
from bench.plan.stage import Plan, Stage
from bench.run.recovery import take_over
from bench.run.worker import run_stage
from bench.store.client import Objects
from bench.store.files import iso
from bench.store.record import Cost, Data, Failure, File, Input, Record, Run, Status, sealed
from bench.store.store import Store
from bench.suite.evaluations import Evaluation
from bench.suite.load import load_suite
from maect import evals
from maect.files import digest

ROOT = Path(__file__).parents[2]
SMOKE = ROOT / "suites" / "smoke.yaml"
SWEEP = ROOT / "suites" / "sweep_queue.yaml"
PAPER = ROOT / "suites" / "paper_table.yaml"
#: longest time that a disturbed run may take, in seconds
LIMIT_S = 400.0


@dataclass(frozen=True)
class Done:
    """What a command left."""

    code: int
    out: str
    err: str


Bench = Callable[..., Done]


def command(*arguments: object) -> list[str]:
    return [sys.executable, "-m", "bench", *map(str, arguments)]


def environment() -> dict[str, str]:
    return os.environ | {"OMP_NUM_THREADS": "1", "PYTHONUNBUFFERED": "1"}


def run_bench(*arguments: object, timeout_s: float = 600, **options: object) -> Done:
    """The real command line, in a process of its own."""
    done = subprocess.run(
        command(*arguments),
        cwd=ROOT,
        env=environment(),
        capture_output=True,
        text=True,
        timeout=timeout_s,
        **options,  # type: ignore[call-overload]
    )
    return Done(done.returncode, done.stdout, done.stderr)


def write_record(
    store: Store,
    stage: Stage,
    *,
    status: Status = "complete",
    content: bytes = b"weights",
    wall_s: float = 1.0,
    **changes: Any,
) -> Record:
    """An attempt at a stage as a worker leaves it, its artifact one small file."""
    inputs = {}
    for name, source in stage.inputs.items():
        record = store.state(source.key).record
        inputs[name] = Input(key=source.key, files=record.file_hashes if record else {})
    began = time.time() - wall_s
    start = Record(
        key=stage.key,
        kind=stage.kind,
        name=stage.title,
        attempt=0,
        run="run",
        settings=stage.settings,
        inputs=inputs,
        data=Data(name="digits", fingerprint=stage.data.fingerprint, counts=stage.data.counts),
        code=stage.code,
        env={"host": "here"},
        started=iso(began),
        started_s=began,
        pid=1,
        cost=Cost(devices=1, device_kind="cpu", device_model="a CPU"),
    )
    record = store.begin(start.model_copy(update=changes))
    if status == "running":
        return record
    end: dict[str, Any] = {"status": status}
    if status == "complete":
        end["files"] = {"artifact.bin": store.put_file(record, "artifact.bin", content)}
    else:
        end["error"] = Failure(kind="ValueError", message="it went wrong")
    store.close_attempt(record.model_copy(update=end), began + wall_s)
    return record


def write_run(store: Store, name: str, **changes: Any) -> None:
    """The record of a run that has ended."""
    said: dict[str, Any] = {"suite": "s", "profile": "p", "command": "c", "started": ""}
    said |= {"source": {}, "env": {}, "workers": 1, "stages": 1, "cached": 0, "status": "complete"}
    store.write_run(Run(id=name, **said | changes))


def stored(root: Path, name: str) -> tuple[Store, dict[str, Any]]:
    """The newest complete record of a stage, as its JSON has it but for the checksum."""
    store = Store(root)
    for key in store.stage_keys():
        record = store.state(key).record
        if record is not None and record.name == name:
            return store, record.plain()
    raise AssertionError(f"no stage is called {name}")


def taken_over(plan: Plan, store: Store) -> list[str]:
    """What a run does to a store before it starts Ray; what was damaged, in words."""
    with store.leases.driving():
        store.close_runs()
        return take_over(plan, store)


def forge(store: Store, content: dict[str, Any]) -> Path:
    """Write a changed record with a checksum that fits it."""
    path = store.folder(content["key"]) / "attempts" / str(content["attempt"]) / "record.json"
    path.write_text(json.dumps(content | {"checksum": digest(content)}))
    return path


# ---------------------------------------------------------------------------- runs to be disturbed


#: `sitecustomize` of every process of a run: checkpoints all the time, a lease of some seconds
HASTY = """
import sys, threading, time
WANTED = {
    "bench.store.resume": ("StageCheckpoints", {"EVERY_S": 0.1, "SHARE": 1e9}),
    "bench.store.bucket_leases": ("BucketLeases", {"BEAT_S": 0.5, "LAPSES_S": 5.0}),
}
def change():
    while WANTED:
        for name, (last, values) in list(WANTED.items()):
            if hasattr(sys.modules.get(name), last):
                vars(sys.modules[name]).update(values)
                del WANTED[name]
        time.sleep(0.1)
threading.Thread(target=change, daemon=True).start()
"""


def wait_for(
    what: Callable[[], object], *processes: subprocess.Popen[str], every_s: float = 0.01
) -> None:
    """Until `what` holds. Fails if a process ends first, or it takes too long."""
    end = time.monotonic() + LIMIT_S
    while not what():
        for process in processes:
            assert process.poll() is None, process.communicate()
        assert time.monotonic() < end, "waited too long"
        time.sleep(every_s)


@contextmanager
def started(*arguments: object) -> Iterator[subprocess.Popen[str]]:
    """A run in a process group of its own; nothing of it is left when the block ends."""
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE}
    where: dict[str, Any] = {"cwd": ROOT, "env": environment(), "start_new_session": True}
    process = subprocess.Popen(command(*arguments), text=True, **pipes, **where)
    try:
        yield process
    finally:
        if process.poll() is None:
            for child in psutil.Process(process.pid).children(recursive=True):
                child.kill()
            process.kill()
        process.communicate()


def gone(processes: list[psutil.Process], within_s: float = 60.0) -> list[psutil.Process]:
    """Those of the processes that outlive the time given."""
    return psutil.wait_procs(processes, timeout=within_s)[1]


def free_port() -> int:
    with socket.socket() as chosen:
        chosen.bind(("127.0.0.1", 0))
        return int(chosen.getsockname()[1])


@contextmanager
def running_cluster(*options: str) -> Iterator[int]:
    """A Ray cluster of one node with two cores, without variables of ours; its port."""
    port = free_port()
    ray = Path(sys.executable).with_name("ray")
    own = {k: v for k, v in environment().items() if k not in AVX2}
    own["PATH"] = f"{ray.parent}:{own['PATH']}"
    with tempfile.TemporaryDirectory(prefix="ray") as folder:
        head = subprocess.Popen(
            [ray, "start", "--head", "--block", "--num-cpus=2", f"--port={port}",
             f"--temp-dir={folder}", *options],
            env=own, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL,
        )  # fmt: skip
        try:
            end = time.monotonic() + 120
            while not any(Path(folder).glob("session_latest/sockets/raylet*")):
                assert head.poll() is None and time.monotonic() < end
                time.sleep(0.2)
            yield port
        finally:
            parts = psutil.Process(head.pid).children(recursive=True)
            head.terminate()
            psutil.wait_procs([*parts, psutil.Process(head.pid)], timeout=5)  # it would take 30 s
            for part in (*parts, head):
                with suppress(psutil.Error):
                    part.kill()


# ------------------------------------------------------------------------------ object storage


#: moto's server with a bucket that is there before the first request
_SERVER = """
import sys
from moto.core import DEFAULT_ACCOUNT_ID
from moto.s3.models import s3_backends
from moto.server import main
s3_backends[DEFAULT_ACCOUNT_ID]["aws"].create_bucket("maect", "us-east-1")
main(["-H", "127.0.0.1", "-p", sys.argv[1]])
"""


@contextmanager
def s3_server(log: Path, port: int = 0, *, auth: int | None = None) -> Iterator[str]:
    """An S3 server with the bucket `maect`, in a process of its own; gives its address.

    With `auth` it asks for credentials after so many requests, and knows none but those it made.
    """
    port = port or free_port()
    env = os.environ | ({} if auth is None else {"INITIAL_NO_AUTH_ACTION_COUNT": str(auth)})
    script = [sys.executable, "-c", _SERVER, str(port)]
    with log.open("ab") as file:
        server = subprocess.Popen(script, stdout=file, stderr=file, env=env)
    try:
        end = time.monotonic() + 120
        while True:
            assert server.poll() is None and time.monotonic() < end, log.read_text()
            with suppress(OSError), socket.create_connection(("127.0.0.1", port), 1):
                break
            time.sleep(0.1)
        yield f"http://127.0.0.1:{port}"
    finally:
        server.kill()
        server.wait()


def s3_environment(address: str, cache: Path) -> dict[str, str]:
    """What processes need in their environment to use that server, and a folder for copies."""
    return {
        "AWS_ACCESS_KEY_ID": "test",
        "AWS_SECRET_ACCESS_KEY": "test",
        "AWS_REGION": "us-east-1",
        "AWS_ENDPOINT_URL": address,
        "MAECT_CACHE": str(cache),
    }


def upload(root: Path, url: str) -> None:
    """Copy a local store into a bucket, object by object."""
    objects = Objects(url)
    for path in root.rglob("*"):
        if path.is_file() and path.relative_to(root).parts[0] in ("stages", "runs", "store.json"):
            objects.put(path.relative_to(root).as_posix(), path)


# ------------------------------------------------------------------------------ what a run leaves


def records(root: Path) -> dict[str, list[dict[str, Any]]]:
    """Every attempt of a store by key, oldest first, as its JSON has it."""
    store = Store(root)
    return {key: [a.plain() for a in store.state(key).attempts] for key in store.stage_keys()}


def completed(root: Path) -> dict[str, dict[str, Any]]:
    """The newest complete record of each stage."""
    newest = {}
    for key, attempts in records(root).items():
        for attempt in attempts:
            if attempt["status"] == "complete":
                newest[key] = attempt
    return newest


def artifacts(root: Path) -> dict[str, str]:
    """SHA-256 of every artifact file as its record has it, by stage and file."""
    return {
        f"{record['name']}/{file}": entry["sha256"]
        for record in completed(root).values()
        for file, entry in record["files"].items()
    }


def measured(root: Path) -> dict[str, float]:
    """Every metric of every stage."""
    return {
        f"{record['name']}/{metric['name']}": metric["value"]
        for record in completed(root).values()
        for metric in record["metrics"]
    }


def printed_metrics(out: str) -> dict[str, tuple[str, ...]]:
    """Row -> its k-NN and probe cells, as the terminal's table has them; costs left out."""
    row = re.compile(r"^(\S[^\[]*?)((?:\s{2,}\d+\.\d(?: ± \d+\.\d)?){2})(?:\s{2,}[\d.–]+)+$")
    return {
        found[1]: tuple(re.split(r"\s{2,}", found[2].strip()))
        for line in out.splitlines()
        if (found := row.match(line))
    }


def ray_processes(root: psutil.Process) -> list[psutil.Process]:
    """Processes of Ray below a process."""
    found = []
    for child in root.children(recursive=True):
        try:
            line = " ".join(child.cmdline())
        except psutil.Error:
            continue
        if "raylet" in line or "gcs_server" in line or line.startswith("ray::"):
            found.append(child)
    return found


def fill_store(
    root: Path,
    *,
    suite: Path = SMOKE,
    only: str = "*",
    sets: Sequence[str] = (),
    seeds: int = 1,
    profile: str | None = None,
) -> Store:
    """A store with the stages of a suite's first seeds, run for real in this process."""
    store = Store(root)
    store.create()
    loaded = load_suite(suite, seeds=seeds, sets=list(sets), profile=profile)
    write_run(store, "in-process", suite=loaded.name, profile=loaded.profile)
    for stage in make_plan(loaded, store, only=only).stages.values():
        if stage.status != "cached":
            run_stage(stage, store, "in-process", lambda event: None)
    return store


# --------------------------------------------------------------------------- many made-up records


_LOG = "2026-03-01T12:00:00.000Z step 20/40 epoch 1 loss 0.4321 1234 images/s\n" * 30


def record_of(stage: Stage, number: int, env: dict[str, Any]) -> Record:
    """A complete record of a usual size, without its artifact."""
    file, wall_s = File(sha256="ab" * 32, bytes=12), 1 + number % 10 / 10
    inputs = {
        name: Input(key=source.key, files={"artifact.bin": file.sha256})
        for name, source in stage.inputs.items()
    }
    metrics = []
    if stage.kind in evals.names():
        evaluation = Evaluation.of(stage.kind, stage.settings)
        value = 90 + number * 7 % 100 / 20
        metrics = evaluation.measured({m.name: value for m in evaluation.metrics()})
    cost = Cost(
        devices=1,
        device_kind="cpu",
        device_model="a CPU",
        wall_s=wall_s,
        device_hours=wall_s / 3600,
        energy_reason="no GPU",
    )
    return Record(
        key=stage.key,
        kind=stage.kind,
        name=stage.title,
        attempt=1,
        run="r",
        status="complete",
        settings=stage.settings,
        inputs=inputs,
        data=Data(name="digits", fingerprint="f00d", counts={"test": 500}),
        code=stage.code,
        env=env,
        started="2026-03-01T12:00:00.000Z",
        started_s=1.77e9,
        pid=1,
        ended="2026-03-01T12:00:02.000Z",
        metrics=metrics,
        protocol={"k": 10},
        protocol_fingerprint=stage.kind,
        summary={"flops": stage.flops},
        files={"artifact.bin": file},
        log_tail=_LOG,
        cost=cost,
    )


def fill(store: Store, plan: Plan) -> int:
    """A record for every stage; returns how many are damaged: cut short, or changed."""
    env, damaged = describe() | {"host": "here"}, 0
    for number, stage in enumerate(plan.stages.values()):
        text = json.dumps(sealed(record_of(stage, number, env)), indent=1)
        if number % 100 == 50:
            damaged += 1
            text = text.replace('"devices": 1', '"devices": 2') if damaged % 2 else text[:900]
        folder = store.folder(stage.key) / "attempts" / "1"
        folder.mkdir(parents=True)
        (folder / "record.json").write_text(text, encoding="utf-8")
    return damaged
