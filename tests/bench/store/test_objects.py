"""Stores on object storage, against a real S3 server on this machine."""

from __future__ import annotations

import json
import os
import pickle
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import threading
import time
from pathlib import Path
from typing import Any

import boto3
import psutil
import pytest
import torch
from bench_helpers import (
    HASTY,
    PAPER,
    ROOT,
    SMOKE,
    SWEEP,
    Bench,
    artifacts,
    completed,
    environment,
    fill_store,
    run_bench,
    s3_server,
    started,
    taken_over,
    upload,
    wait_for,
    write_record,
    write_run,
)

from bench.plan.planner import make_plan
from bench.plan.stage import Stage
from bench.run.recovery import close_running
from bench.run.worker import run_stage
from bench.store import client
from bench.store.client import Objects, StoreGone
from bench.store.objects import ObjectStore
from bench.store.resume import StageCheckpoints
from bench.store.store import Store
from bench.suite.load import load_suite
from maect.stages.job import State

CHOSEN = ("--seeds", 1, "--only", "MAE")


@pytest.fixture
def remote(bucket: str) -> ObjectStore:
    """An empty store in a bucket."""
    store = ObjectStore(bucket)
    store.create()
    return store


def mae_of(store: Store) -> Stage:
    plan = make_plan(load_suite(SMOKE, seeds=1), store, only="MAE")
    return next(stage for stage in plan.stages.values() if stage.kind == "mae")


def elsewhere(monkeypatch: pytest.MonkeyPatch, tmp_path: Path, url: str) -> ObjectStore:
    """The same store, opened on another machine: one whose cache is empty."""
    monkeypatch.setenv("MAECT_CACHE", str(tmp_path / f"cache-{time.time_ns()}"))
    return ObjectStore(url)


# ---------------------------------------------------------------------------------------- reading


@pytest.fixture(scope="module")
def local(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A local store with a row of the smoke suite, run for real."""
    root = tmp_path_factory.mktemp("local") / "store"
    fill_store(root, only="MAE")
    return root


def said(bench: Bench, *arguments: object) -> tuple[int, str, str]:
    done = bench(*arguments)
    return done.code, done.out, done.err


def test_commands_say_of_a_store_in_a_bucket_what_they_say_of_a_folder(
    local: Path, bucket: str, bench: Bench, tmp_path: Path
):
    upload(local, bucket)
    key = Store(local).stage_keys()[0]
    page, beside = tmp_path / "page.html", tmp_path / "beside"
    shutil.copytree(local, beside)
    for words in (
        ("ls", "--json"),
        ("ls",),
        ("show", key, "--json"),
        ("plan", SMOKE, *CHOSEN, "--json"),
        ("report", SMOKE, *CHOSEN, "--json", "--output", page),
        ("report", SMOKE, *CHOSEN, "--against", beside),
        ("verify", SMOKE, *CHOSEN, "--json"),
        ("verify", SMOKE, *CHOSEN, "--rerun", "features"),
    ):
        here, there = (said(bench, *words, "--store", store) for store in (local, bucket))
        assert there[1].replace(bucket, str(local)) == here[1]
        assert there[::2] == here[::2]
        assert here[0] == 0
    tars = [tmp_path / "here.tar", tmp_path / "there.tar"]
    for store, tar in zip((local, bucket), tars, strict=True):
        done = said(bench, "export", SMOKE, *CHOSEN, "--bundle", tar, "--store", store)
        assert done[0] == 0, done
    assert tars[0].read_bytes() == tars[1].read_bytes()
    found = said(bench, "diff", local, bucket)
    assert found[0] == 0, found
    assert said(bench, "diff", f"file://{local}", bucket)[0] == 0


def test_what_is_in_the_cache_is_not_fetched_again(
    local: Path, bucket: str, bench: Bench, monkeypatch: pytest.MonkeyPatch
):
    upload(local, bucket)
    first = said(bench, "verify", SMOKE, *CHOSEN, "--store", bucket)
    fetched: list[str] = []
    download = Objects.download
    monkeypatch.setattr(
        Objects, "download", lambda self, name, to: fetched.append(name) or download(self, name, to)
    )
    assert said(bench, "verify", SMOKE, *CHOSEN, "--store", bucket) == first
    assert fetched == []
    (copy,) = Path(os.environ["MAECT_CACHE"]).glob("stores/*")
    damaged = next(copy.glob("stages/*/attempts/*/artifact/encoder.safetensors"))
    damaged.write_bytes(b"x" * damaged.stat().st_size)
    assert said(bench, "verify", SMOKE, *CHOSEN, "--store", bucket) == first
    assert fetched == [damaged.relative_to(copy).as_posix()]


def test_the_bucket_is_the_authority_and_not_the_cache(local: Path, bucket: str, bench: Bench):
    upload(local, bucket)
    assert bench("verify", SMOKE, *CHOSEN, "--store", bucket).code == 0
    store, reader = Objects(bucket), ("verify", SMOKE, *CHOSEN, "--store", bucket)
    weights = next(n for n in store.listing() if n.endswith("encoder.safetensors"))
    content = store.get(weights)[0]
    store.put(weights, b"x" * len(content))
    assert "encoder.safetensors does not fit its checksum" in bench(*reader).err
    store.delete([weights])
    assert "encoder.safetensors is missing" in bench(*reader).err
    store.put(weights, content)
    assert bench(*reader).code == 0
    record = next(n for n in store.listing() if n.endswith("record.json"))
    store.put(record, store.get(record)[0].replace(b'"wall_s"', b'"wall_t"'))
    assert "is damaged" in bench("ls", "--store", bucket).out
    store.delete(list(store.listing()))
    gone = bench("ls", "--store", bucket)
    assert (gone.code, gone.out) == (2, "")
    assert gone.err.startswith(f"error: there is no store at {bucket}")


# ---------------------------------------------------------------------------------------- writing


def test_a_local_store_and_one_in_a_bucket_hold_the_same(remote: ObjectStore, store: Store):
    for one in (remote, store):
        write_record(one, mae_of(one), content=b"weights", status="failed")
        write_record(one, mae_of(one), content=b"weights")
        write_run(one, "run")
    theirs = {name: Objects(remote.name).get(name)[0] for name in Objects(remote.name).listing()}
    ours = {
        path.relative_to(store.root).as_posix(): path.read_bytes()
        for path in store.root.rglob("*")
        if path.is_file()
    }
    assert theirs.keys() == ours.keys()
    assert theirs["store.json"] == ours["store.json"]


def test_a_put_on_a_condition_tells_whether_it_was_done(bucket: str):
    objects = Objects(bucket)
    first = objects.put_over("one", b"1", None)
    assert first is not None and objects.put_over("one", b"2", None) is None
    assert objects.put_over("one", b"1", None) is not None  # tried again, as its answer was lost
    second = objects.put_over("one", b"2", first)
    assert second is not None and objects.put_over("one", b"3", first) is None
    assert objects.put_over("one", b"2", first) is not None
    assert objects.get("one")[0] == b"2"
    objects.delete(["one"])
    assert objects.put_over("one", b"4", second) is None and objects.listing() == {}


def test_attempts_of_two_writers_never_share_a_number(remote: ObjectStore, bucket: str):
    stage, found = mae_of(remote), []
    stores = [pickle.loads(pickle.dumps(remote)) for _ in range(4)]
    threads = [
        threading.Thread(
            target=lambda one=one: found.append(write_record(one, stage, status="running").attempt)
        )
        for one in stores
    ]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert sorted(found) == [1, 2, 3, 4]
    assert [a.attempt for a in ObjectStore(bucket).state(stage.key).attempts] == [1, 2, 3, 4]


def test_an_attempt_given_up_for_lost_on_another_machine_cannot_be_closed_again(
    remote: ObjectStore, bucket: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    stage = mae_of(remote)
    record = write_record(remote, stage, status="running", wall_s=100.0)
    folder = remote.attempt_folder(stage.key, record.attempt)
    (folder / "log.txt").write_text("the last words\n")
    remote.publish(folder)
    other = elsewhere(monkeypatch, tmp_path, bucket)
    close_running(other, stage.key, "lost", "its run ended without a word")
    assert not remote.close_attempt(record.model_copy(update={"status": "complete"}), time.time())
    for one in (remote, other, ObjectStore(bucket)):
        (attempt,) = one.state(stage.key).attempts
        assert (attempt.status, attempt.log_tail) == ("lost", "the last words\n")
        assert attempt.cost.wall_s == pytest.approx(100, abs=10)


def test_an_input_that_was_changed_in_the_bucket_is_set_aside_when_it_is_read(
    remote: ObjectStore, bucket: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    stage = mae_of(remote)
    write_record(remote, stage, content=b"weights")
    assert (remote.fetch(stage.key) / "artifact.bin").read_bytes() == b"weights"
    remote.objects.put(f"stages/{stage.key}/attempts/1/artifact/artifact.bin", b"weighte")
    other = elsewhere(monkeypatch, tmp_path, bucket)
    with pytest.raises(ValueError, match=r"artifact.bin does not fit its checksum: it is of MAE"):
        other.fetch(stage.key)
    assert [a.status for a in remote.state(stage.key).attempts] == ["damaged"]
    (aside,) = Objects(bucket).listing("damaged")
    assert Objects(bucket).get(aside)[0] == b"weighte"


def test_an_artifact_that_is_gone_is_seen_before_a_run_computes(remote: ObjectStore):
    plan = make_plan(load_suite(SMOKE, seeds=1), remote, only="MAE")
    stage = next(stage for stage in plan.stages.values() if stage.kind == "mae")
    write_record(remote, stage)
    remote.objects.delete([f"stages/{stage.key}/attempts/1/artifact/artifact.bin"])
    (line,) = taken_over(plan, remote)
    assert line == "MAE, seed 0: artifact.bin is missing; set aside, it is made again"
    assert plan.stages[stage.key].status == "pending"


# ------------------------------------------------------------------------------------ checkpoints


def state(step: int) -> State:
    return State(step, {"weights": torch.full((3,), float(step))}, {"step": [step]})


def test_another_machine_goes_on_from_the_newest_whole_checkpoint(
    remote: ObjectStore, bucket: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    kept = StageCheckpoints(remote, "k" * 20, "code")
    for step in (1, 2, 3):
        kept.save(state(step))
        kept.wait()
    names = sorted(Path(name).name for name in Objects(bucket).listing("stages"))
    assert names == ["2.json", "2.safetensors", "3.json", "3.safetensors"]

    def newest() -> int:
        found = StageCheckpoints(elsewhere(monkeypatch, tmp_path, bucket), "k" * 20, "code").load()
        assert found is not None
        assert found.tensors["weights"].tolist() == [found.step] * 3
        return found.step

    assert newest() == 3
    top = f"stages/{'k' * 20}/checkpoints/code"
    remote.objects.put(f"{top}/3.safetensors", b"cut short")
    assert newest() == 2
    remote.objects.delete([f"{top}/3.json"])
    assert newest() == 2
    remote.discard(remote.checkpoints("k" * 20))
    assert Objects(bucket).listing("stages") == {}


# -------------------------------------------------------------------------------- what goes wrong


def test_a_store_that_cannot_be_opened_is_told_in_a_sentence(
    bucket: str, bench: Bench, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
):
    def told(url: str, *words: object) -> str:
        done = bench(*(words or ("ls",)), "--store", url)
        assert (done.code, done.out) == (2, "")
        assert done.err.count("\n") == 1 and "Traceback" not in done.err
        return done.err

    for words in (("ls",), ("plan", SMOKE), ("run", SMOKE), ("verify", SMOKE)):
        assert f"the store s3://nix-{'x' * 8}: there is no such bucket" in told(
            f"s3://nix-{'x' * 8}", *words
        )
    assert "is no place of a store" in told("http://127.0.0.1/bucket")
    assert "is no place of a store" in told("s3://")
    assert f"there is no store at {bucket}" in told(bucket)
    Objects(bucket).put("store.json", b'{"schema": 99, "version": "9.9"}')
    assert f"the store {bucket} was written by maect-bench 9.9" in told(bucket)
    Objects(bucket).put("store.json", b"\xff")
    assert "store.json cannot be read" in told(bucket)
    monkeypatch.setattr(client, "FIRST_S", 1.0)
    monkeypatch.setenv("AWS_ENDPOINT_URL", "http://127.0.0.1:9")
    assert "http://127.0.0.1:9 does not answer" in told(bucket)
    with socket.create_server(("127.0.0.1", 0)) as mute:
        address = f"http://127.0.0.1:{mute.getsockname()[1]}"
        monkeypatch.setenv("AWS_ENDPOINT_URL", address)
        began = time.monotonic()
        assert f"{address} does not answer" in told(bucket, "run", SMOKE)
        assert time.monotonic() - began < 20
    monkeypatch.setenv("MAECT_CACHE", str(SMOKE))
    assert "MAECT_CACHE" in told(bucket)


def test_credentials_that_are_wrong_or_missing_are_told(
    bucket: str, bench: Bench, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
):
    with s3_server(tmp_path / "log.txt", auth=2) as address:
        monkeypatch.setenv("AWS_ENDPOINT_URL", address)
        iam = boto3.client("iam", "us-east-1", endpoint_url=address)
        iam.create_user(UserName="someone")
        key = iam.create_access_key(UserName="someone")["AccessKey"]
        done = bench("run", SMOKE, "--store", bucket)
        assert (done.code, done.err.count("\n")) == (2, 1)
        assert "the credentials are not known there" in done.err
        monkeypatch.setenv("AWS_ACCESS_KEY_ID", key["AccessKeyId"])
        monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", key["SecretAccessKey"])
        done = bench("ls", "--store", bucket)
        assert (done.code, done.err.count("\n")) == (2, 1)
        assert "the credentials do not allow it" in done.err
        monkeypatch.delenv("AWS_ACCESS_KEY_ID")
        monkeypatch.delenv("AWS_SECRET_ACCESS_KEY")
        monkeypatch.setenv("AWS_SHARED_CREDENTIALS_FILE", str(tmp_path / "credentials"))
        monkeypatch.setenv("AWS_METADATA_ENDPOINT", "http://127.0.0.1:9")
        done = bench("ls", "--store", bucket)
        assert (done.code, done.err.count("\n")) == (2, 1)
        assert "no credentials are set" in done.err
        (tmp_path / "credentials").write_text(
            "[default]\naws_access_key_id = file\naws_secret_access_key = secret\n"
        )
        assert "the credentials are not known there" in bench("ls", "--store", bucket).err


def test_a_server_that_is_away_for_a_moment_is_waited_for_and_then_told_of(
    bucket: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    with s3_server(tmp_path / "log.txt") as address:
        monkeypatch.setenv("AWS_ENDPOINT_URL", address)
        store = ObjectStore(bucket)
        store.create()
        record = write_record(store, mae_of(store), status="running")
    put = threading.Thread(target=store.put_file, args=(record, "name", b"data"))
    put.start()
    time.sleep(1.0)
    assert put.is_alive()
    with s3_server(tmp_path / "log.txt", int(address.rpartition(":")[2])):
        put.join(60)
        assert store.objects.get(store._name(store.artifact(record) / "name"))[0] == b"data"
    monkeypatch.setattr(client, "PATIENCE_S", 1.0)
    store = pickle.loads(pickle.dumps(store))
    with pytest.raises(StoreGone, match=f"the store {bucket}: http://127.0.0.1:.* does not"):
        store.put_file(record, "name", b"data")


KILLED = """
import os, sys
from bench.plan.planner import make_plan
from bench.run.worker import run_stage
from bench.store import resume
from bench.store.objects import ObjectStore
from bench.suite.load import load_suite
from bench_helpers import SMOKE
resume.EVERY_S, resume.SHARE = 0.0, 1e9
save = resume.StageCheckpoints._write
def killed(self, state):
    save(self, state)
    if state.step > 10:
        os._exit(9)
resume.StageCheckpoints._write = killed
store = ObjectStore(sys.argv[1])
store.create()
stages = make_plan(load_suite(SMOKE, seeds=1), store, only="MAE").stages.values()
run_stage(next(s for s in stages if s.kind == "mae"), store, "run", lambda event: None)
"""


def test_a_stage_killed_in_its_training_goes_on_on_another_machine(
    local: Path, bucket: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    path = os.pathsep.join([str(Path(__file__).parents[1]), *sys.path])
    done = subprocess.run(
        [sys.executable, "-c", KILLED, bucket], env=os.environ | {"PYTHONPATH": path}
    )
    assert done.returncode == 9
    store = elsewhere(monkeypatch, tmp_path, bucket)
    stage = mae_of(store)
    run_stage(stage, store, "run", lambda event: None)
    record = store.state(stage.key).record
    assert record is not None
    assert record.summary["resumed_at"] > 10
    whole = Store(local).state(stage.key).record
    assert whole is not None
    assert record.file_hashes == whole.file_hashes
    assert not any("checkpoints" in name for name in Objects(bucket).listing())


# ----------------------------------------------------------------------------------- whole runs


@pytest.mark.slow
def test_a_search_over_a_bucket_gives_what_it_gives_over_a_folder(bucket: str, tmp_path: Path):
    text = SWEEP.read_text().replace("[paper_table.yaml, smoke.yaml]", f"[{PAPER}, {SMOKE}]")
    suite = tmp_path / "sweep.yaml"
    suite.write_text(text.replace("[128, 256, 512, 1024]", "[128, 256]").replace("min, aug", "min"))
    local = fill_store(tmp_path / "local", suite=suite, profile="tiny").root
    chosen = (suite, "--profile", "tiny", "--seeds", 1)
    done = run_bench("sweep", *chosen, "--store", bucket)
    assert done.code == 0, done
    assert "Ray Tune: 2 trials" in done.out
    assert run_bench("diff", local, bucket).code == 0


#: more of `sitecustomize`, on machines of their own: a process notes what it opens of another one,
#: and the first thing of its own
WATCH = """
import json, os
here, noted = os.environ.get("MACHINE", ""), set()
top = os.path.dirname(here) + "/"
def watch(event, given):
    if (event != "open" and not event.startswith("os.")) or event == "os.putenv":
        return
    for path in given:
        if isinstance(path, (str, bytes)):
            path = os.path.abspath(os.fsdecode(path))
            other = "" if (path + "/").startswith(here + "/") else path
            if path.startswith(top) and other not in noted:
                noted.add(other)
                note = {"pid": os.getpid(), "machine": here, "other": other, "argv": sys.argv}
                with open(os.environ["NOTES"], "a") as notes:
                    notes.write(json.dumps(note) + "\\n")
if here:
    sys.addaudithook(watch)
"""

#: the command line on the node that is named first; Ray itself would take the head for this host's
AT_NODE = """
import runpy, sys
from bench.run import cluster
from ray._private import services
services.find_node_ids = lambda node=sys.argv.pop(1): {node}
runpy.run_module("bench", run_name="__main__", alter_sys=True)
"""


@pytest.mark.slow
def test_machines_that_share_nothing_but_a_bucket_give_what_one_gives(
    remote: ObjectStore, smoke, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    """A node is lost in mid-training, then the driver; a new machine goes on.

    None opens a file of another one, as far as Python tells: not of what is no code of Python's.
    """
    from ray.cluster_utils import Cluster

    top, notes = Path(tempfile.mkdtemp(prefix="m", dir="/tmp")), tmp_path / "notes"
    (tmp_path / "sitecustomize.py").write_text(HASTY + WATCH)
    monkeypatch.setenv("PYTHONPATH", f"{tmp_path}:{os.environ.get('PYTHONPATH', '')}")
    monkeypatch.setenv("NOTES", str(notes))
    plan = make_plan(load_suite(SMOKE, seeds=1), remote).stages.values()
    (key,) = (stage.key for stage in plan if stage.title == "MAE, compute-matched, seed 0")
    there, handler = Cluster(), signal.getsignal(signal.SIGTERM)

    def use(machine: str) -> None:
        """What this process starts next is on a machine with folders of its own."""
        for name in ("HOME", "TMPDIR", "MAECT_CACHE", "MAECT_DATA"):
            (folder := top / machine / name).mkdir(parents=True, exist_ok=True)
            monkeypatch.setenv(name, str(folder))
        monkeypatch.setenv("MACHINE", str(top / machine))

    def add_node(machine: str) -> Any:
        use(machine)
        own = {"temp_dir": str(top / machine / "TMPDIR" / "ray"), "include_dashboard": False}
        return there.add_node(num_cpus=int(machine != "first"), **own)

    def trainer(attempt: int) -> int | None:
        """The process that is at an attempt at the longest training, once it has a checkpoint."""
        time.sleep(0.2)
        kept = remote.objects.listing(f"stages/{key}/checkpoints/")
        running = {a.attempt: a.pid for a in remote.state(key).attempts if a.status == "running"}
        return running.get(attempt) if any(name.endswith(".json") for name in kept) else None

    try:
        nodes = {name: add_node(name) for name in ("first", "second", "third")}
        use("first")
        line = ("run", SMOKE, "--seeds", 1, "--store", remote.name, "--address", there.address)
        with started(*line) as process:
            wait_for(lambda: trainer(1), process)
            lost = Path(psutil.Process(trainer(1)).environ()["MACHINE"]).name
            there.remove_node(nodes[lost], allow_graceful=False)
            wait_for(lambda: trainer(2), process)
            process.kill()
        node = add_node("fourth")
        time.sleep(6.0)  # until the lease lapses
        again = [sys.executable, "-c", AT_NODE, node.node_id, *map(str, line)]
        done = subprocess.run(again, cwd=ROOT, env=environment(), capture_output=True, text=True)
        use("fifth")
        verified = run_bench("verify", *line[1:6])
        planted = [sys.executable, "-c", f"import os; os.listdir({str(top / 'first')!r})"]
        subprocess.run(planted, check=True)
    finally:
        there.shutdown()
        signal.signal(signal.SIGTERM, handler)  # Ray set its own
        shutil.rmtree(top)
    assert done.returncode == 0, done
    attempts = [a for k in remote.stage_keys() for a in remote.state(k).attempts]
    assert {a.status for a in attempts} == {"complete", "lost"}
    *before, last = remote.state(key).attempts
    assert [a.status for a in before] == ["lost", "lost"] and last.summary["resumed_at"] > 0
    assert len(completed(remote.root)) == 28
    assert not any("/checkpoints/" in name for name in remote.objects.listing())
    assert {run.status for run in remote.runs()} == {"lost", "complete"}
    assert verified.out.endswith("everything fits\n"), verified
    assert artifacts(remote.root).items() <= artifacts(smoke.store).items()
    noted = [json.loads(line) for line in notes.read_text().splitlines()]
    assert [note for note in noted if note["other"] not in ("", str(top / "first"))] == []
    assert [note["argv"] for note in noted if note["other"]] == [["-c"]]  # the planted one
    assert {a.pid for a in attempts} <= {note["pid"] for note in noted}
    assert {Path(note["machine"]).name for note in noted} == {*nodes, "fourth", "fifth"}
