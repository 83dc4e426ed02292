"""The index of a store: faster to read, never believed against the records."""

from __future__ import annotations

import errno
import hashlib
import inspect
import json
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import polars as pl
import pytest
from bench_helpers import ROOT, SMOKE, Bench, fill_store

from bench import cli
from bench.store import index
from bench.store.index import IndexedStore
from bench.store.store import Store, record_checksum, sealed


@pytest.fixture
def store(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Store:
    """A store with the evaluations of raw pixels, run for real."""
    monkeypatch.setattr(index, "SETTLED_S", -1.0)
    return fill_store(tmp_path / "store", only="raw pixels")


@pytest.fixture
def indexed(store: Store) -> Store:
    """The same, with an index of all of its records."""
    fresh = IndexedStore(store.root)
    states(fresh)
    fresh.save()
    assert len(files(store)) == 1
    return store


def states(store: Store) -> dict[str, Any]:
    return {key: vars(store.state(key)) for key in store.stage_keys()}


def files(store: Store) -> list[Path]:
    return sorted(store.root.glob("index*"))


def record_paths(store: Store) -> list[Path]:
    return sorted(store.root.glob("stages/*/attempts/1/record.json"))


def parsed(monkeypatch: pytest.MonkeyPatch) -> list[Path]:
    """The records that are read from now on, not taken from the index."""
    seen: list[Path] = []
    read = Store.read

    def note(self: Store, path: Path, key: str) -> dict[str, Any]:
        seen.append(path)
        return read(self, path, key)

    monkeypatch.setattr(Store, "read", note)
    return seen


def test_an_index_has_what_the_records_say(indexed: Store, monkeypatch: pytest.MonkeyPatch):
    plain = states(indexed)
    seen = parsed(monkeypatch)
    again = IndexedStore(indexed.root)
    assert states(again) == plain
    assert seen == []
    states(IndexedStore(indexed.root, rebuild=True))
    assert seen == record_paths(indexed)


def in_place(path: Path) -> None:
    """Another metric in as many bytes, the time of the change put back."""
    before = path.stat()
    record = json.loads(path.read_text())
    record["pid"] += 1 if str(record["pid"])[-1] != "9" else -1
    text = json.dumps(sealed(record), indent=1, ensure_ascii=False) + "\n"
    path.write_text(text)
    os.utime(path, ns=(before.st_atime_ns, before.st_mtime_ns))
    assert path.stat().st_size == before.st_size
    assert path.stat().st_mtime_ns == before.st_mtime_ns


def new_attempt(path: Path) -> None:
    record = json.loads(path.read_text()) | {"attempt": 2, "log_tail": "anew"}
    second = path.parents[1] / "2" / "record.json"
    second.parent.mkdir()
    second.write_text(json.dumps(sealed(record)))


@pytest.mark.parametrize(
    "change",
    [
        in_place,
        new_attempt,
        Path.unlink,
        lambda path: path.write_text(path.read_text()[:900]),
        lambda path: path.write_text(path.read_text().replace('"devices": 1', '"devices": 2')),
        lambda path: path.rename(path.with_name("started.json")),
    ],
    ids=["same size and time", "new attempt", "deleted", "cut", "edited", "open again"],
)
def test_what_changed_since_is_read_itself(
    change: Callable[[Path], object], indexed: Store, monkeypatch: pytest.MonkeyPatch
):
    before = states(indexed)
    path = record_paths(indexed)[0]
    change(path)
    after = states(indexed)
    assert after != before
    seen = parsed(monkeypatch)
    again = IndexedStore(indexed.root)
    assert states(again) == after
    assert len(seen) <= 1
    again.save()
    assert states(IndexedStore(indexed.root)) == after


def test_a_record_replaced_while_it_is_read_is_read_again(
    store: Store, monkeypatch: pytest.MonkeyPatch
):
    path = record_paths(store)[0]
    key = path.parents[2].name
    fresh, read = IndexedStore(store.root), Store.read

    def replaced(self: Store, path: Path, key: str) -> dict[str, Any]:
        found = read(self, path, key)
        store.write_record(found | {"log_tail": "another"})
        return found

    with monkeypatch.context() as patch:
        patch.setattr(Store, "read", replaced)
        fresh.state(key)
    fresh.save()
    record = IndexedStore(store.root).state(key).record
    assert record is not None
    assert record["log_tail"] == "another"


def test_a_record_just_written_is_not_taken_in(store: Store, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(index, "SETTLED_S", 3600.0)
    fresh = IndexedStore(store.root)
    states(fresh)
    fresh.save()
    assert files(store) == []


def flipped(path: Path) -> None:
    data = bytearray(path.read_bytes())
    data[len(data) // 3] ^= 1
    path.write_bytes(data)


@pytest.mark.parametrize(
    "damage",
    [
        flipped,
        Path.unlink,
        lambda path: path.write_bytes(b""),
        lambda path: path.write_bytes(path.read_bytes()[:-100]),
        lambda path: path.rename(path.with_name(path.name.replace("-1-", "-0-"))),
        lambda path: path.rename(path.with_name("index-1-.parquet")),
    ],
    ids=["a bit", "deleted", "empty", "cut", "another version", "another name"],
)
def test_an_index_that_is_not_whole_is_made_anew(
    damage: Callable[[Path], object], indexed: Store, monkeypatch: pytest.MonkeyPatch
):
    plain, (path,) = states(indexed), files(indexed)
    damage(path)
    again = IndexedStore(indexed.root)
    assert states(again) == plain
    again.save()
    assert files(indexed) == [path]
    seen = parsed(monkeypatch)
    assert states(IndexedStore(indexed.root)) == plain
    assert seen == []


def test_two_who_write_at_once_leave_one_sound_index(store: Store):
    first, second = IndexedStore(store.root), IndexedStore(store.root)
    states(first)
    second.state(store.stage_keys()[0])
    plain = states(store)
    first.save()
    second.save()
    assert len(files(store)) == 1
    again = IndexedStore(store.root)
    assert states(again) == plain
    again.save()
    assert len(files(store)) == 1


def test_a_store_that_cannot_be_written_is_read_all_the_same(
    store: Store, bench: Bench, monkeypatch: pytest.MonkeyPatch
):
    def refuse(descriptor: int) -> None:
        raise OSError(errno.EROFS, "Read-only file system")

    monkeypatch.setattr(os, "fsync", refuse)
    listed = bench("ls", "--store", store.root)
    assert (listed.code, listed.err) == (0, "")
    assert files(store) == []


def forge(store: Store) -> None:
    """An index in order in all but what it says: other metrics, other code, other files."""
    (path,) = files(store)
    frame = pl.read_parquet(path)
    changed = []
    for row in frame.to_dicts():
        record = {name: json.loads(text) for name, text in row.items() if text and name[0] != "_"}
        for metric in record["metrics"]:
            metric["value"] = 12.5
        record["code"] = {"hash": "forged", "modules": {}}
        record["files"] = {}
        record["checksum"] = record_checksum(record)
        changed.append(row | {name: json.dumps(value) for name, value in record.items()})
    path.unlink()
    forged = store.root / "forged.parquet"
    pl.DataFrame(changed, schema=frame.schema).write_parquet(forged)
    digest = hashlib.sha256(forged.read_bytes()).hexdigest()
    forged.rename(path.with_name(f"index-1-{digest}.parquet"))


def test_a_forged_index_decides_nothing(indexed: Store, bench: Bench):
    rows = ("--only", "raw pixels", "--seeds", 1, "--store", indexed.root)
    asked = [("plan", SMOKE, *rows, "--json"), ("verify", SMOKE, *rows, "--json"),
             ("report", SMOKE, *rows, "--check"), ("run", SMOKE, *rows)]  # fmt: skip
    before = [bench(*command) for command in asked[:3]]
    listed = bench("ls", "--store", indexed.root).out
    forge(indexed)
    assert "12.5" in bench("ls", "--store", indexed.root).out  # the index is looked into
    assert [bench(*command) for command in asked[:2]] == before[:2]
    assert [stage["status"] for stage in json.loads(before[0].out)["stages"]] == ["cached"] * 3
    assert "3 cached, 0 to run" in bench(*asked[3]).out
    assert bench(*asked[2]) == before[2]
    forge(indexed)
    assert "12.5" not in bench("ls", "--store", indexed.root, "--reindex").out
    assert bench("ls", "--store", indexed.root).out == listed


def test_only_ls_and_report_look_into_an_index():
    modules = [path for path in (ROOT / "bench").glob("*.py") if path.name != "index.py"]
    assert [path.name for path in modules if "IndexedStore" in path.read_text()] == ["cli.py"]
    functions = inspect.getmembers(cli, inspect.isfunction)
    users = [name for name, code in functions if "IndexedStore" in inspect.getsource(code)]
    assert users == ["_compare", "_report", "ls_store"]
