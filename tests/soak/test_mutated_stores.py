"""Stores changed at random: each command ends in words, and prints no number that is not there."""

from __future__ import annotations

import hashlib
import json
import os
import random
import re
import shutil
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import Any

import pytest
from bench_helpers import SMOKE, fill_store, taken_over, write_record, write_run
from soak_helpers import cases, draw, told, unchanged

from bench.errors import UserError
from bench.plan.planner import make_plan
from bench.plan.stage import Plan
from bench.store.store import Store
from bench.suite.load import load_suite
from maect.files import digest

CHOSEN = ("--seeds", 1, "--only", "MAE")
#: what stands where something else should
STRANGE: list[Any] = [
    None, True, [], {}, "", "x", "\x1b[2J", "../../outside/file", "/etc/passwd", "..", "a/b",
    -1, 0, 1e308, -1e308, 10**400, 2**63, 2**53, 0.1, float("nan"), float("inf"), [[]], {"": None},
    "2999-01-01T00:00:00.000Z", "0001-01-01T00:00:00+14:00", "2026-01-01", "x" * 100_000,
]  # fmt: skip


@pytest.fixture(scope="session")
def example(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """An MAE with its evaluations, a failed attempt, a second run and what a run leaves behind."""
    store = fill_store(tmp_path_factory.mktemp("example") / "store", only="MAE")
    plan = plan_of(store)
    (mae,) = (stage for stage in plan.stages.values() if stage.kind == "mae")
    write_record(store, mae, status="failed", run="second")
    statuses = {key: store.state(key).statuses for key in plan.stages}
    write_run(store, "second", suite="smoke", profile="tiny", attempts=statuses)
    kept = store.checkpoints(mae.key) / mae.code.hash
    kept.mkdir(parents=True)
    (kept / "20.json").write_text(json.dumps({"step": 20, "sha256": "ab", "curves": {}}))
    (kept / "20.safetensors").write_bytes(b"weights")
    return store.root


def plan_of(store: Store) -> Plan:
    return make_plan(load_suite(SMOKE, seeds=1), store, only="MAE", keep_stale=True)


@cases(300)
@pytest.mark.slow
def test_a_mutated_store_is_told_of(
    case: int, example: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Whatever is changed in a store, nothing outside it is, and each command ends in words."""
    chance, root, outside = draw("store", case), tmp_path / "store", tmp_path / "outside"
    shutil.copytree(example, root)
    shutil.copytree(example, outside)
    (outside / "file").write_text("{}")
    mutations = chance.sample(MUTATIONS, chance.choice((1, 1, 1, 2, 4)))
    for mutate in mutations:
        with suppress(OSError, LookupError, ValueError):  # there may be nothing left of its kind
            mutate(root, outside, chance)
    keys = sorted(path.name for path in (example / "stages").iterdir())
    as_json = ["--json"] * chance.randrange(2)
    here = ("--store", root)
    with unchanged(outside):
        with unchanged(root):
            told(capsys, "ls", *here, *as_json)
            told(capsys, "show", chance.choice(keys)[: chance.randrange(21)], *here, *as_json)
            told(capsys, "plan", SMOKE, *CHOSEN, *here, *as_json)
            told(capsys, "diff", root, example, *as_json)
            verified = told(capsys, "verify", SMOKE, *CHOSEN, *here)
        reported = told(capsys, "report", SMOKE, *CHOSEN, *here)
        with suppress(UserError):  # what a run does before it starts Ray
            store = Store(root)
            store.create()
            taken_over(plan_of(store), store)
    believed = forged in mutations or fitting in mutations
    if changed(root, example, believed=believed):
        assert verified.code in (2, 3), f"{mutations}: verify finds nothing"
    if verified.code == 0:
        sound = told(capsys, "report", SMOKE, *CHOSEN, "--store", example).out
        assert cells(reported.out) == cells(sound)
    elif not believed:
        sound = told(capsys, "report", SMOKE, *CHOSEN, "--store", example).out
        assert cells(reported.out) <= cells(sound), f"{mutations}: a number from nowhere"


def cells(out: str) -> set[str]:
    """Return the numbers in the rows of a report's tables."""
    rows = [line for line in out.splitlines() if line.startswith("MAE ")]
    return set(re.findall(r"\d+\.\d+", "\n".join(rows)))


def changed(root: Path, example: Path, *, believed: bool) -> bool:
    """Return whether a record or an artifact of the example is gone or says something else.

    Of records whose checksums fit (`believed`) only what can be known without them is looked at.
    """
    files = [*example.glob("stages/*/attempts/*/record.json")]
    if not believed:
        files += example.glob("stages/*/attempts/*/artifact/*")
    named = ("metrics", "settings", "cost") if believed else None
    return any(
        _content(root / path.relative_to(example), named) != _content(path, named) for path in files
    )


def _content(path: Path, named: tuple[str, ...] | None) -> Any:
    if path.is_symlink() or not path.is_file():
        return None
    with suppress(ValueError, RecursionError):
        value = json.loads(path.read_bytes())
        if isinstance(value, dict) and named and "metrics" in value:
            value = {name: value.get(name) for name in named}
        return repr(value)
    return path.read_bytes()


# -------------------------------------------------------------------------------------- mutations


def some(root: Path, chance: random.Random, pattern: str = "**/*", *, file: bool = True) -> Path:
    """Return a file or folder of a store."""
    found = sorted(p for p in root.glob(pattern) if p.is_file() == file and not p.is_symlink())
    if not found:
        raise FileNotFoundError
    return chance.choice(found)


def flipped(root: Path, outside: Path, chance: random.Random) -> None:
    path = some(root, chance)
    data = bytearray(path.read_bytes() or b"x")
    for _ in range(chance.choice((1, 1, 20))):
        data[chance.randrange(len(data))] ^= 1 << chance.randrange(8)
    path.write_bytes(data)


def truncated(root: Path, outside: Path, chance: random.Random) -> None:
    path = some(root, chance)
    data = path.read_bytes()
    path.write_bytes(data[: chance.randrange(len(data) + 1)])


def longer(root: Path, outside: Path, chance: random.Random) -> None:
    path = some(root, chance)
    path.write_bytes(path.read_bytes() + chance.choice((b"\n", b"\0" * 1000, path.read_bytes())))


def deleted(root: Path, outside: Path, chance: random.Random) -> None:
    some(root, chance).unlink()


def deleted_folder(root: Path, outside: Path, chance: random.Random) -> None:
    shutil.rmtree(some(root, chance, file=False))


def duplicated(root: Path, outside: Path, chance: random.Random) -> None:
    path, other = some(root, chance), some(root, chance)
    if chance.random() < 0.5:
        other = path.with_name(chance.choice(("copy", "1.json", "record.json", "artifact.bin")))
    if path != other:
        shutil.copy(path, other)


def duplicated_folder(root: Path, outside: Path, chance: random.Random) -> None:
    pattern = chance.choice(("stages/*", "stages/*/attempts/*", "**/*"))
    path = some(root, chance, pattern, file=False)
    names = ("7", "0", "007", "f" * 20, "²", "\x1b[2J", "99999999999999", path.name[:-1] + "0")
    copied = shutil.copytree(path, path.parent.parent / f"copy-{chance.randrange(9**9)}")
    copied.rename(path.with_name(chance.choice(names)))


def swapped(root: Path, outside: Path, chance: random.Random) -> None:
    one, other = (some(root, chance, "stages/*/attempts/*/record.json") for _ in range(2))
    data = one.read_bytes()
    one.write_bytes(other.read_bytes())
    other.write_bytes(data)


def retyped(root: Path, outside: Path, chance: random.Random) -> None:
    some(root, chance, "**/*.json").write_text(json.dumps(chance.choice(STRANGE)))


def nested(root: Path, outside: Path, chance: random.Random) -> None:
    depth = chance.choice((50, 300, 100_000))
    text = chance.choice(("[" * depth + "]" * depth, '{"a":' * depth + "1" + "}" * depth))
    path = some(root, chance, "**/*.json")
    if chance.random() < 0.5:
        path.write_text(text)
    else:
        path.write_text(re.sub(r"\{\}|null|\[\]", lambda _: text, path.read_text(), count=1))


def linked(root: Path, outside: Path, chance: random.Random) -> None:
    file = chance.random() < 0.5
    path = some(root, chance, file=file)
    target: Path | str = outside / path.relative_to(root)
    target = chance.choice((target, outside / "file", path, "/dev/zero", "/etc/passwd", "nowhere"))
    shutil.rmtree(path) if path.is_dir() else path.unlink()
    path.symlink_to(target)


def linked_new(root: Path, outside: Path, chance: random.Random) -> None:
    folder = some(root, chance, file=False)
    names = (
        "drivers",
        "leases",
        "damaged",
        "reports",
        "checkpoints",
        "attempts",
        "log.txt",
        "5",
        ".x.json.tmp",
    )
    place = chance.choice((root, folder)) / chance.choice(names)
    place.symlink_to(chance.choice((outside, outside / "file")))


def piped(root: Path, outside: Path, chance: random.Random) -> None:
    path = some(root, chance)
    if chance.random() < 0.8:
        path.unlink()
    else:
        path = path.with_name(chance.choice(("drivers", "store.json", "record.json", "9.json")))
    os.mkfifo(path)


def inner(value: Any, chance: random.Random) -> None:
    """Put something strange somewhere into JSON data."""
    while True:
        places = list(value) if isinstance(value, dict) else range(len(value))
        if not places:
            return
        place = chance.choice(places)
        if not isinstance(value[place], (dict, list)) or chance.random() < 0.3:
            break
        value = value[place]
    if isinstance(value, dict) and chance.random() < 0.3:
        value[str(chance.choice(STRANGE))] = value.pop(place)
    else:
        value[place] = chance.choice(STRANGE)


def edited(root: Path, outside: Path, chance: random.Random) -> None:
    path = some(root, chance, "**/*.json")
    content = json.loads(path.read_bytes())
    inner(content, chance)
    path.write_text(json.dumps(content))


def seal(content: dict[str, Any], path: Path) -> None:
    path.write_text(json.dumps(content | {"checksum": digest(content)}))


def forged(root: Path, outside: Path, chance: random.Random) -> None:
    """Change a record, its checksum fits."""
    path = some(root, chance, "stages/*/attempts/*/record.json")
    content = json.loads(path.read_bytes())
    content.pop("checksum", None)
    for _ in range(chance.choice((1, 1, 3))):
        inner(content, chance)
    seal(content, path)


def fitting(root: Path, outside: Path, chance: random.Random) -> None:
    """Change an artifact, its checksum and that of its record fit."""
    path = some(root, chance, "stages/*/attempts/1/record.json")
    content = json.loads(path.read_bytes())
    content.pop("checksum", None)
    name = chance.choice(sorted(content["files"]))
    artifact = path.parents[2] / name
    data = bytearray(artifact.read_bytes())
    if artifact.suffix == ".json":
        document = json.loads(data)
        inner(document, chance)
        data = bytearray(json.dumps(document).encode())
    else:
        for _ in range(chance.choice((1, 5))):
            data[chance.randrange(min(len(data), chance.choice((9, 300, 10**9))))] ^= 1
    artifact.write_bytes(data)
    content["files"][name] = {"sha256": hashlib.sha256(data).hexdigest(), "bytes": len(data)}
    seal(content, path)


MUTATIONS: list[Callable[[Path, Path, random.Random], None]] = [
    flipped, truncated, longer, deleted, deleted_folder, duplicated, duplicated_folder, swapped,
    retyped, nested, linked, linked_new, piped, edited, forged, forged, fitting,
]  # fmt: skip
