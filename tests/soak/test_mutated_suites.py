"""Suites with mutations of every kind, through `bench plan`: planned, or refused in words."""

from __future__ import annotations

import json
import random
import re
from collections.abc import Callable
from pathlib import Path

import pytest
from soak_helpers import cases, draw, told, unchanged

SUITES = Path(__file__).parents[2] / "suites"
FILES = sorted(SUITES.glob("*.yaml"))

#: what stands in place of a value
VALUES = ["null", "true", "-1", "0", "1e308", "1e999", ".nan", "-.inf", "9" * 400, "0x1F", "0o17"]
VALUES += ["2026-11-26", "2026-11-26T00:00:00Z", "10:30", "1_000", "''", "[]", "{}", "[[1], [2]]"]
VALUES += ["{a: {b: {c: 1}}}", "!!python/object:os.system x", "!!binary aGk=", "*no", "~nobody/x"]
VALUES += ["/dev/zero", "../../../etc/passwd", "a.b.c", "x" * 3000, "MAE", "knn", "mae", "random"]
VALUES += [r'"\e[31mred\a"', r'"\0"', r'"\ud800"', r'"\u202e"', '"é\u200d𝟘"', "{mae.steps: 3}", "?"]
VALUES += ["[" * 300, "[" * 60 + "]" * 60, "{a: " * 45 + "1" + "}" * 45, "&a [*a]", "|\n  text"]
#: keys that are added
KEYS = ["suite", "seeds", "mae", "mae.steps", "tune.frozen", "a" * 300, ".", "..", "x.", "<<", "1"]
KEYS += [r'"\e[31m"', '""', "null", "? [a]", "variants", "search", "evaluations", "set", "profiles"]
KEYS += ["profiles_from", "data.path", "evaluate", "gallery", "augment.mae.view0.flip"]
BOMB = "".join(f"b{n}: &b{n} [{', '.join([f'*b{n - 1}'] * 9)}]\n" for n in range(1, 12))
BYTES = [
    b"\t",
    b"- ",
    b": ",
    b"{",
    b"]",
    b'"',
    b"\xff\xfe",
    b"\x00",
    b"\x1b[2J",
    b"\r",
    b"\xc2\x9b31m",
]
BYTES += [
    b"---\n",
    b"%YAML 9.9\n",
    b"#",
    b"&a ",
    b"*a ",
    b"!!set ",
    b"\xe2\x80\xa8",
    b"\xed\xa0\x80",
]


def flipped(text: bytes, rng: random.Random) -> bytes:
    changed = bytearray(text)
    for _ in range(rng.randint(1, 4)):
        changed[rng.randrange(len(changed))] ^= 1 << rng.randrange(8)
    return bytes(changed)


def inserted(text: bytes, rng: random.Random) -> bytes:
    at = rng.randrange(len(text))
    return text[:at] + rng.choice(BYTES) + text[at + rng.choice((0, 0, 1, 30)) :]


def lines_changed(text: bytes, rng: random.Random) -> bytes:
    """Return the text with a line doubled, taken out, or put elsewhere."""
    lines = text.splitlines(keepends=True)
    for _ in range(rng.randint(1, 3)):
        line, at = rng.randrange(len(lines)), rng.randrange(len(lines))
        lines.insert(at if rng.random() < 0.5 else line, lines[line])
        del lines[rng.randrange(len(lines))]
    return b"".join(lines)


def valued(text: bytes, rng: random.Random) -> bytes:
    """Return the text with a value, in a line or in braces, replaced by another."""
    found = list(re.finditer(rb"(?<=: )[^\s,{}\[\]&*#][^\s,{}\[\]#]*", text))
    where = rng.choice(found)
    return text[: where.start()] + rng.choice(VALUES).encode() + text[where.end() :]


def keyed(text: bytes, rng: random.Random) -> bytes:
    """Return the text with a key renamed, or one added before it."""
    where = rng.choice(list(re.finditer(rb"(?<=[\s{])[A-Za-z_]\w*(?=: )", text)))
    new = rng.choice(KEYS).encode()
    new = new if rng.random() < 0.5 else new + b": " + rng.choice(VALUES).encode() + b", "
    end = where.end() if b": " not in new else where.start()
    return text[: where.start()] + new + text[end:]


def bombed(text: bytes, rng: random.Random) -> bytes:
    """Return the text after aliases that would blow up, merge keys, or one huge scalar."""
    heads = ["b0: &b0 [x]\n" + BOMB, "x: &x {a: 1}\ny: {<<: *x}\n", f"title: {'x' * 900_000}\n"]
    heads += [f"d{n}: {'{a: ' * n}1{'}' * n}\n" for n in (38, 2000)]
    heads += ["".join(f"k{n}: {n}\n" for n in range(9000))]
    return rng.choice(heads).encode() + text


KINDS: list[Callable[[bytes, random.Random], bytes]] = [
    flipped, inserted, lines_changed, valued, valued, keyed, keyed, bombed,
]  # fmt: skip


@pytest.mark.slow
@cases(400)
def test_a_mutated_suite_is_planned_or_refused(
    case: int, capsys: pytest.CaptureFixture[str], tmp_path: Path
):
    rng = draw("suites", case)
    folder = tmp_path / "suites"
    folder.mkdir()
    for file in FILES:
        (folder / file.name).write_bytes(file.read_bytes())
    suite = folder / rng.choice(FILES).name
    text = suite.read_bytes()
    for _ in range(rng.choice((1, 1, 1, 2, 3))):
        text = KINDS[case % len(KINDS)](text, rng)
    suite.write_bytes(text)
    with unchanged(tmp_path):
        as_json = ("--json",) if rng.random() < 0.5 else ()
        done = told(capsys, "plan", suite, "--store", tmp_path / "store", *as_json)
    assert done.code in (0, 2)
    if done.code:
        assert done.err.startswith("error: ")
        assert done.err.count("\n") == 1
        assert len(done.err) < 900
        return
    if as_json:
        stages = json.loads(done.out)["stages"]
        assert {stage["status"] for stage in stages} == {"pending"}
    else:
        assert re.search(r"= [1-9]\d* stages \(", done.out)
