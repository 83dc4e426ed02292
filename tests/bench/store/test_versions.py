"""Stores of other versions: refused and untouched; stores since version 0.2.0: readable."""

from __future__ import annotations

import hashlib
import json
import shutil
from pathlib import Path

import pytest
from bench_helpers import SMOKE, Bench

from bench.store.record import SCHEMA
from bench.store.store import Store

#: a store of each version since records are typed, as that version wrote it
FIXTURES = sorted((Path(__file__).parent / "fixtures").iterdir())


def content(root: Path) -> dict[str, str]:
    """SHA-256 of every file below a folder."""
    return {
        str(path.relative_to(root)): hashlib.sha256(path.read_bytes()).hexdigest()
        for path in sorted(root.rglob("*"))
        if path.is_file()
    }


def marked(root: Path, schema: int | None) -> Path:
    """A store with one stage, written by another version."""
    record = root / "stages" / "0123456789" / "attempts" / "1" / "record.json"
    record.parent.mkdir(parents=True)
    record.write_text(json.dumps({"schema": schema or 1, "key": "0123456789"}))
    if schema is not None:
        (root / "store.json").write_text(json.dumps({"schema": schema, "version": "9.0.0"}))
    return root


@pytest.mark.parametrize(
    "command",
    [
        ["run", SMOKE],
        ["sweep", SMOKE.with_name("sweep_queue.yaml")],
        ["plan", SMOKE],
        ["report", SMOKE],
        ["verify", SMOKE],
        ["ls"],
        ["show", "0123"],
        ["diff", SMOKE, SMOKE],
    ],
    ids=lambda command: str(command[0]),
)
@pytest.mark.parametrize(("schema", "wrote"), [(None, "0.1"), (SCHEMA + 1, "9.0.0")])
def test_a_store_of_another_version_is_refused_and_untouched(
    command: list[object], schema: int | None, wrote: str, tmp_path: Path, bench: Bench
) -> None:
    root = marked(tmp_path / "store", schema)
    before = content(root)
    done = bench(*command, "--store", root)
    assert (done.code, done.out) == (2, "")
    assert f"was written by maect-bench {wrote}" in done.err
    assert "choose another --store" in done.err
    assert done.err.count("\n") == 1
    assert content(root) == before


def test_a_marker_that_cannot_be_read_is_told(tmp_path: Path, bench: Bench) -> None:
    root = marked(tmp_path / "store", SCHEMA)
    (root / "store.json").write_text("{")
    done = bench("ls", "--store", root)
    assert done.code == 2
    assert "store.json cannot be read" in done.err


def test_a_store_cut_short_while_it_was_made_is_not_taken_for_an_old_one(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def killed(path: Path, value: object) -> None:
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr("bench.store.store.write_json", killed)
        with pytest.raises(KeyboardInterrupt):
            Store(tmp_path / "store").create()
    Store(tmp_path / "store").create()
    assert Store(tmp_path / "store").stage_keys() == []


def test_there_is_a_fixture_of_this_version() -> None:
    assert [path.name for path in FIXTURES][-1] == f"schema_{SCHEMA}"


@pytest.mark.parametrize("fixture", FIXTURES, ids=lambda path: path.name)
def test_stores_since_then_stay_readable(fixture: Path, tmp_path: Path, bench: Bench) -> None:
    root = Path(shutil.copytree(fixture, tmp_path / "store"))
    store = Store(root)
    states = [store.state(key) for key in store.stage_keys()]
    assert [state.problems for state in states] == [[]] * len(states)
    attempts = [attempt for state in states for attempt in state.attempts]
    assert {attempt.status for attempt in attempts} == {"complete", "failed"}
    for state in states:
        assert state.record is None or not any(store.damages(state.record))
    listed = bench("ls", "--store", root)
    assert listed.code == 0
    assert len(listed.out.splitlines()) == len(attempts)
    for attempt in attempts:
        shown = bench("show", attempt.key, "--store", root)
        assert shown.code == 0
        assert f"{attempt.name}, {attempt.status}" in shown.out
    (run,) = store.runs()
    assert run.status == "failed"
