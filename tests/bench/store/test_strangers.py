"""Stores from strangers and in odd places: nothing is believed, followed or lost."""

from __future__ import annotations

import errno
import json
import os
import re
import shutil
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from bench_helpers import SMOKE, Bench, forge, taken_over, write_record, write_run
from soak_helpers import limited, unchanged

from bench.errors import UserError
from bench.plan.planner import make_plan
from bench.plan.stage import Plan, Stage
from bench.report.frames import build_view
from bench.store.files import write_atomic
from bench.store.resume import StageCheckpoints
from bench.store.store import Store
from bench.suite.load import load_suite

CHOSEN = ("--seeds", 1, "--only", "MAE")


@pytest.fixture
def store(tmp_path: Path) -> Store:
    """A store with one stage of the smoke suite."""
    store = Store(tmp_path / "store")
    store.create()
    write_run(store, "run", suite="smoke", profile="tiny")
    record = write_record(store, mae_of(store))
    store.checkpoints(record.key).mkdir()
    return store


def plan_of(store: Store) -> Plan:
    return make_plan(load_suite(SMOKE, seeds=1), store, only="MAE")


def mae_of(store: Store) -> Stage:
    return next(stage for stage in plan_of(store).stages.values() if stage.kind == "mae")


def prepare(root: Path) -> None:
    """What a run does to a store before it starts Ray."""
    store = Store(root)
    store.create()
    taken_over(plan_of(store), store)


# ------------------------------------------------------------------- what a record says of itself

DEEP: Any = json.loads("[" * 300 + "]" * 300)


@pytest.mark.parametrize(
    ("place", "value"),
    [
        (("run",), "../../outside"),
        (("run",), "/outside"),
        (("run",), ""),
        (("files",), {"../../../outside/file": {"sha256": "ab", "bytes": 1}}),
        (("files",), {"/outside/file": {"sha256": "ab", "bytes": 1}}),
        (("files",), {"attempts/1": {"sha256": "ab", "bytes": 1}}),
        (("files",), {"..": {"sha256": "ab", "bytes": 1}}),
        (("files", "artifact.bin", "bytes"), -1),
        (("inputs",), {"encoder": {"key": "../..", "files": {}}}),
        (("inputs",), {"encoder": {"key": "f00d", "files": {"../file": "ab"}}}),
        (("status",), "running"),
        (("started",), "2026-01-01T00:00:00"),
        (("started_s",), 1e300),
        (("started_s",), float("nan")),
        (("pid",), -1),
        (("cost", "devices"), 10**30),
        (("cost", "wall_s"), float("inf")),
        (("env", "host"), ["here"]),
        (("env", "workers"), "many"),
        (("settings", "seed"), DEEP),
        (("summary",), {"deep": DEEP}),
    ],
    ids=lambda value: str(value)[:40],
)
def test_what_a_record_cannot_say_is_not_believed(
    place: tuple[str, ...], value: object, store: Store, bench: Bench, tmp_path: Path
) -> None:
    """Its checksum fits; it is damaged all the same, named, and leads nowhere."""
    key = mae_of(store).key
    content = store.state(key).attempts[0].plain()
    inner: Any = content
    for step in place[:-1]:
        inner = inner[step]
    inner[place[-1]] = value
    path = forge(store, content)
    outside = tmp_path / "outside"
    outside.mkdir()
    (outside / "file").write_text("x")
    with unchanged(outside):
        for command in (["ls"], ["show", key[:10]], ["report", SMOKE, *CHOSEN]):
            done = bench(*command, "--store", store.root)
            assert done.code == 0, done.err
            assert f"{path.relative_to(store.root)} is damaged" in done.out.replace("\n", " ")
        assert bench("verify", SMOKE, *CHOSEN, "--store", store.root).code == 3
        prepare(store.root)
    (artifact,) = store.folder(key).rglob("artifact.bin")
    assert artifact.read_bytes() == b"weights"


def test_a_start_that_says_how_it_ended_is_not_believed(store: Store):
    """Only a record has a checksum; what was written at the start is of an attempt that runs."""
    mae = mae_of(store)
    record = write_record(store, mae, status="running")
    path = store.attempt_folder(mae.key, record.attempt) / "started.json"
    path.write_text(json.dumps(record.plain() | {"status": "complete"}))
    (problem,) = store.state(mae.key).problems
    assert "attempts/2/started.json is damaged: it says that the attempt is complete" in problem


def test_a_run_that_says_it_is_another_is_named_and_skipped(store: Store, bench: Bench):
    (path,) = (store.root / "runs").glob("*.json")
    told = json.loads(path.read_text()) | {"status": "running"}
    path.write_text(json.dumps(told | {"id": "../../outside"}))
    path.with_name("list.json").write_text("[]")
    path.with_name("copy.json").write_text(json.dumps(told))
    os.mkfifo(path.with_name("pipe.json"))
    with unchanged(store.root / "runs"), limited("runs"):
        assert store.runs() == []
        store.close_runs()
    for command in (["ls"], ["report", SMOKE, *CHOSEN]):
        done = bench(*command, "--store", store.root)
        assert done.code == 0
        for name in ("run", "list", "copy", "pipe"):
            assert f"runs/{name}.json is no record of a run" in done.out.replace("\n", " ")
    assert not (store.root.parent / "outside.json").exists()


# ----------------------------------------------------------------------------- what a report reads

CURVES = json.dumps({"step": [0, 1, 2], "loss": [0.5, 0.25, 0.125]})


@pytest.mark.parametrize("place", [*range(0, len(CURVES), 20), "shorter", "longer", "gone", "link"])
def test_curves_that_do_not_fit_are_named_and_left_out(
    place: int | str, store: Store, bench: Bench, tmp_path: Path
) -> None:
    """One flipped bit is enough; the report goes on without them."""
    record = store.state(mae_of(store).key).attempts[0]
    entry = store.put_file(record, "curves.json", CURVES.encode())
    forge(store, record.model_copy(update={"files": {"curves.json": entry}}).plain())
    assert build_view(plan_of(store), store, "").curves == {record.key: json.loads(CURVES)}
    path = store.fetch(record.key) / "curves.json"
    match place:
        case "gone":
            path.unlink()
        case "link":
            path.symlink_to(path.rename(tmp_path / "elsewhere"))
        case "shorter" | "longer":
            path.write_text(CURVES[:-1] if place == "shorter" else CURVES + "\n")
        case int():
            data = bytearray(CURVES.encode())
            data[place] ^= 1
            path.write_bytes(data)
    assert build_view(plan_of(store), store, "").curves == {}
    done = bench("report", SMOKE, *CHOSEN, "--store", store.root)
    assert done.code == 0
    assert f"stages/{record.key}/attempts/1/artifact/curves.json is damaged: " in done.out.replace(
        "\n", " "
    )


@pytest.mark.parametrize(
    "content",
    [[], {"step": 1}, {"step": [1]} | {"loss": []}, {"step": ["x"]}, {"loss": [1.0]}, DEEP],
)
def test_curves_that_are_none_are_named_although_their_checksum_fits(
    content: object, store: Store, bench: Bench
) -> None:
    record = store.state(mae_of(store).key).attempts[0]
    entry = store.put_file(record, "curves.json", json.dumps(content).encode())
    forge(store, record.model_copy(update={"files": {"curves.json": entry}}).plain())
    done = bench("report", SMOKE, *CHOSEN, "--store", store.root)
    assert done.code == 0
    assert f"stages/{record.key}/attempts/1/artifact/curves.json is damaged: " in done.out.replace(
        "\n", " "
    )


# ------------------------------------------------------------------------ links and special files

PLACES = (
    "store.json",
    "damaged",
    "drivers",
    "leases",
    "reports",
    "runs",
    "stages",
    "stages/KEY",
    "stages/KEY/checkpoints",
    "stages/KEY/attempts",
    "stages/KEY/attempts/1",
    "stages/KEY/attempts/1/artifact",
    "stages/KEY/attempts/1/artifact/artifact.bin",
    "stages/KEY/attempts/1/record.json",
)


@pytest.mark.parametrize("place", PLACES)
def test_a_link_is_refused_and_what_it_leads_to_is_left_alone(
    place: str, store: Store, bench: Bench, tmp_path: Path
) -> None:
    key = mae_of(store).key
    prepare(store.root)
    path, target = store.root / place.replace("KEY", key), tmp_path / "outside"
    if path.exists():
        path.rename(target)
    else:
        target.mkdir()
        (target / "file").write_text("x")
    path.symlink_to(target)
    keep = tmp_path / "keep"
    shutil.copytree(target, keep) if target.is_dir() else shutil.copy(target, keep)
    with unchanged(tmp_path):
        with pytest.raises(
            UserError, match=f"{path.name} (is a link|cannot be read: it is a link)"
        ):
            prepare(store.root)
        for command in (["ls"], ["show", key], ["diff", store.root, store.root]):
            done = bench(*command, "--store", store.root)
            assert done.code in (0, 2)
        done = bench("verify", SMOKE, *CHOSEN, "--store", store.root)
        assert "link" in done.err or place.endswith("checkpoints")


@pytest.mark.parametrize("place", ["store.json", "drivers/other", "leases/KEY", *PLACES[-2:]])
def test_a_fifo_hangs_no_command(place: str, store: Store, bench: Bench) -> None:
    key = mae_of(store).key
    path = store.root / place.replace("KEY", key)
    path.parent.mkdir(exist_ok=True)
    path.unlink(missing_ok=True)
    os.mkfifo(path)
    with limited(place):
        for command in (["ls"], ["show", key], ["report", SMOKE, *CHOSEN]):
            assert bench(*command, "--store", store.root).code in (0, 2)
        found = bench("verify", SMOKE, *CHOSEN, "--store", store.root)
        assert "it is no file" in found.err or place.startswith(("drivers", "leases"))
        if place == "store.json":
            with pytest.raises(UserError, match=r"it is no file|cannot be written"):
                prepare(store.root)
        else:
            prepare(store.root)


@pytest.mark.parametrize("place", ["stages/KEY", "stages/KEY/attempts", "damaged"])
def test_a_file_in_place_of_a_folder_is_told_before_a_run(place: str, store: Store):
    key = mae_of(store).key
    (store.fetch(key) / "artifact.bin").write_bytes(b"damaged")
    path = store.root / place.replace("KEY", key)
    if path.exists():
        shutil.rmtree(path)
    path.write_text("x")
    with pytest.raises(UserError, match=r"cannot be (read|written)"):
        prepare(store.root)
    if place != "damaged":
        with pytest.raises(UserError, match="cannot be written"):
            write_record(store, mae_of(store))


def test_a_file_under_a_temporary_name_is_not_written_through(tmp_path: Path):
    """The name can be guessed: a link may wait there."""
    outside = tmp_path / "outside"
    outside.write_text("mine")
    path = tmp_path / "record.json"
    path.with_name(f".record.json.{os.getpid()}.tmp").symlink_to(outside)
    write_atomic(path, b"new")
    assert (outside.read_text(), path.read_bytes()) == ("mine", b"new")


@pytest.mark.parametrize(
    ("name", "note"), [("7", "[]"), ("7", "1"), ("7", "[" * 10**5), ("²", "{}"), ("9" * 240, "[]")]
)
def test_a_checkpoint_that_is_none_is_passed_over(name: str, note: str, store: Store):
    kept = StageCheckpoints(store, mae_of(store).key, "code")
    kept.folder.mkdir(parents=True)
    (kept.folder / f"{name}.json").write_text(note)
    (kept.folder / f"{name}.safetensors").write_bytes(b"x")
    assert kept.load() is None


# ------------------------------------------------------------------------------------ odd places


COMMANDS = ("ls", "show", "plan", "report", "verify", "diff", "run", "gc")


@pytest.mark.parametrize(
    ("command", "place"),
    [
        *((command, "~nobody-of-that-name/store") for command in COMMANDS),
        *((command, "loop") for command in COMMANDS),
        ("plan", "file"),
        ("plan", "file/store"),
    ],
)
def test_a_store_in_an_odd_place_is_told(
    command: str, place: str, bench: Bench, tmp_path: Path
) -> None:
    (tmp_path / "file").write_text("x")
    (tmp_path / "loop").symlink_to(tmp_path / "loop")
    words = {"show": ["f00d"], "diff": ["f00d", "f00d"], "ls": []}.get(command, [SMOKE])
    with unchanged(tmp_path):
        done = bench(command, *words, "--store", place if place[0] == "~" else tmp_path / place)
    assert done.code == 2
    assert re.fullmatch(r"error: (the store|argument --store:) \S+ [^\n]+\n", done.err)


@pytest.mark.parametrize("place", ["~nobody-of-that-name/store", "loop", "x" * 300])
def test_doctor_is_told_of_a_store_in_an_odd_place(place: str, bench: Bench, tmp_path: Path):
    (tmp_path / "loop").symlink_to(tmp_path / "loop")
    done = bench("doctor", "--store", place if place[0] == "~" else tmp_path / place)
    assert done.code == 2
    assert re.fullmatch(r"error: argument --store: \S+ [^\n]+\n", done.err)


@pytest.mark.parametrize("sides", [("a", "b"), ("no/store", "b"), ("x" * 5000, "b"), ("f00d", "b")])
def test_diff_says_what_it_was_not_given(sides: tuple[str, str], bench: Bench, tmp_path: Path):
    done = bench("diff", *sides, "--store", tmp_path / "none")
    assert done.code == 2
    assert "is neither a store's folder nor a suite file" in done.err
    assert f"{tmp_path / 'none'} has no such run or key" in done.err


def test_show_takes_the_beginning_of_a_key_and_names_the_folder(store: Store, bench: Bench):
    key = mae_of(store).key
    other = store.folder(key).with_name(key[:6] + "f" * 14)
    other.mkdir()
    listed = bench("ls", "--store", store.root).out.split()[0]
    done = bench("show", listed, "--store", store.root)
    assert done.code == 0
    assert f"folder {store.folder(key)}" in done.out
    done = bench("show", key[:6], "--store", store.root)
    assert done.code == 2
    assert f"2 stages have a key that begins with '{key[:6]}'" in done.err
    assert key in done.err
    assert other.name in done.err


def test_control_characters_never_reach_a_terminal(store: Store, bench: Bench):
    key = mae_of(store).key
    bad = "\x1b[2J\u202e\nbad"
    content = store.state(key).attempts[0].plain() | {"name": bad, "log_tail": bad}
    content["error"] = {"class": bad, "message": bad}
    content["env"] |= {"host": bad}
    content["cost"] |= {"device_model": bad, "energy_reason": bad}
    content["files"][bad] = {"sha256": bad, "bytes": 1}
    forge(store, content)
    (store.root / "stages" / "\x1b[2J").mkdir()
    (store.root / "stages" / "\x1b[2J" / "attempts").write_text("x")
    (store.root / "runs" / "\x1b[2J.json").write_text("x")
    other = Path(shutil.copytree(store.root, store.root.with_name("other")))
    write_record(Store(other), mae_of(store), name=bad, content=b"other")
    for command in (
        ["ls"],
        ["show", key],
        ["show", "\x1b"],
        ["diff", store.root, other],
        ["diff", "\x1b[2J", other],
        ["verify", SMOKE, *CHOSEN],
        ["report", SMOKE, *CHOSEN],
        ["plan", SMOKE, *CHOSEN],
    ):
        done = bench(*command, "--store", store.root)
        assert (done.out + done.err).replace("\n", "").isprintable(), command


# ----------------------------------------------------------------------------- whose the store is


@pytest.fixture
def stranger() -> Iterator[Callable[[], None]]:
    """A call that makes this process another user's, whom permissions bind."""

    def become() -> None:
        if os.geteuid() == 0:
            os.seteuid(65534)

    yield become
    os.seteuid(os.getuid())


@pytest.fixture
def open_store(store: Store) -> Iterator[Path]:
    """The store where every user can reach it, nobody's own."""
    folder = Path(tempfile.mkdtemp())
    folder.chmod(0o755)
    root = Path(shutil.copytree(store.root, folder / "store"))
    for path in [root, *root.rglob("*")]:
        path.chmod(0o755 if path.is_dir() else 0o644)
        if os.geteuid() == 0:
            os.chown(path, 65534, 65534)
    yield root
    for path in [root, *root.rglob("*")]:
        path.chmod(0o755)
    shutil.rmtree(folder)


def closed(root: Path, place: str, mode: int) -> None:
    """Take permissions from a file or folder of a store, or from all of it."""
    key = next(path.name for path in (root / "stages").iterdir())
    top = root / place.replace("KEY", key)
    top.parent.mkdir(exist_ok=True)
    if place == "drivers/other":
        top.touch()
    for path in [top, *top.rglob("*")] if place == "" else [top]:
        path.chmod(mode | (0o111 if path.is_dir() and mode else 0))


READING = (["ls"], ["show", "KEY"], ["verify", SMOKE, *CHOSEN], ["diff", "STORE", "STORE"])


@pytest.mark.parametrize("command", READING, ids=lambda command: command[0])
def test_a_store_that_cannot_be_written_is_read(
    command: list[str], open_store: Path, bench: Bench, stranger: Callable[[], None]
) -> None:
    key = mae_of(Store(open_store)).key
    words = [{"KEY": key, "STORE": open_store}.get(str(word), word) for word in command]
    before = bench(*words, "--store", open_store)
    closed(open_store, "", 0o444)
    stranger()
    with unchanged(open_store):
        assert bench(*words, "--store", open_store) == before


@pytest.mark.parametrize(
    ("place", "mode", "listed", "verified"),
    [
        ("drivers/other", 0, 0, 0),
        ("stages", 0o555, 0, 0),
        ("stages", 0, 2, 3),
        ("stages/KEY", 0o555, 0, 0),
        ("stages/KEY", 0, 0, 3),
        ("stages/KEY/attempts/1/artifact/artifact.bin", 0, 0, 3),
        ("stages/KEY/attempts", 0o555, 0, 0),
        ("stages/KEY/attempts", 0, 0, 3),
        ("stages/KEY/attempts/1", 0, 0, 3),
        ("stages/KEY/attempts/1/record.json", 0, 0, 3),
    ],
)
def test_a_store_of_another_user_is_told_and_nothing_is_lost(
    place: str,
    mode: int,
    listed: int,
    verified: int,
    open_store: Path,
    bench: Bench,
    stranger: Callable[[], None],
) -> None:
    """A run stops before it computes; reading goes on with what can be read, and names the rest."""
    for command in READING[:3]:
        bench(*command, "--store", open_store)  # so that everything is imported
    before = {p: p.read_bytes() for p in open_store.rglob("*") if p.is_file()}
    closed(open_store, place, mode)
    stranger()
    with pytest.raises(UserError) as told:
        prepare(open_store)
    assert "\n" not in str(told.value)
    codes = [bench(*command, "--store", open_store).code for command in (READING[0], READING[2])]
    assert codes == [listed, verified]
    os.seteuid(os.getuid())
    for path in [open_store, *open_store.rglob("*")]:
        path.chmod(0o755)
    there = {p: p.read_bytes() for p in open_store.rglob("*") if p.is_file()}
    assert {p: data for p, data in there.items() if p in before} == before


def test_a_full_disk_is_told_before_anything_runs(
    store: Store, monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(*_: object) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    for name in ("fsync", "mkdir"):
        with monkeypatch.context() as patch:
            patch.setattr(os, name, full)
            with pytest.raises(UserError, match="no space left on device"):
                prepare(store.root) if name != "mkdir" else Store(store.root / "new").create()
