"""How rows look in figures: colour, marker and dashes together, by what a row is."""

from __future__ import annotations

import re
from collections.abc import Iterable
from typing import NamedTuple

#: On a light page and on paper, and on a dark page. Found by a search over hues at spread-out
#: lightnesses: far apart (CIEDE2000) in normal sight, under protanopia, deuteranopia and
#: tritanopia (Machado et al. 2009, severity 1), and in grey.
LIGHT = (
    "#939461", "#3b0891", "#3c8b8b", "#145951", "#262326", "#882ec9", "#bf4912", "#7d1a01",
)  # fmt: skip
DARK = (
    "#75ca25", "#c4c1fb", "#08909c", "#affeb3", "#ded7d9", "#a381e3", "#c9979b", "#827051",
)  # fmt: skip
#: of what failed; of what is no row, a front or a number off the scale
BAD, PLAIN = -1, -2
#: shapes of a mark, and lengths of a line's dashes and gaps
MARKERS = ("circle", "square", "diamond", "up", "down", "cross", "plus", "star")
DASHES = ("", "7 3", "2 2.5", "8 3 2 3", "4 2", "10 3 2 3 2 3", "1 2", "12 4")
#: row, in lower-case letters -> its look in each report
_ROWS = {
    "rawpixels": 0,
    "randomencoder": 1,
    "mae": 2,
    "maecomputematched": 3,
    "computematchedmae": 3,
    "maematchedtomaectaug": 4,
    "nnclrwithoutmae": 5,
    "maect": 6,
    "maectaugmentmin": 6,
    "maectaug": 7,
    "maectaugmentaug": 7,
}


class Look(NamedTuple):
    """A place in the palette, a shape, the dashes of a line."""

    colour: int
    marker: str
    dash: str


def look(number: int) -> Look:
    """Return a look by its number: of each eight the same colours, with other marks and dashes."""
    if number < 0:
        return Look(number, MARKERS[0], "")
    colour, again = number % len(LIGHT), number // len(LIGHT)
    at = (colour + again) % len(MARKERS)
    return Look(colour, MARKERS[at], DASHES[at])


def looks(rows: Iterable[str]) -> dict[str, int]:
    """Return the number of each row's look.

    A row of the paper's table has its own in every report, whatever rows stand beside it. All
    others take what is left: first the colours that no such row has here.
    """
    rows = list(dict.fromkeys(rows))
    found = {row: known for row in rows if (known := _ROWS.get(_plain(row))) is not None}
    size, taken = len(LIGHT), set(found.values())
    free = sorted(
        range(size, size + size + len(rows)), key=lambda n: (n // size, n % size in taken)
    )
    others = iter(free)
    return {row: found[row] if row in found else next(others) for row in rows}


def _plain(row: str) -> str:
    return re.sub(r"[^a-z]", "", row.lower())


def style() -> str:
    """Return the colours as a style sheet, of a light page, a dark one, and paper."""
    light, dark = (";".join(f"--c{i}:{c}" for i, c in enumerate(them)) for them in (LIGHT, DARK))
    classes = "".join(f".c{i}{{--c:var(--c{i})}}" for i in range(len(LIGHT)))
    classes += f".c{BAD}{{--c:var(--bad)}}.c{PLAIN}{{--c:var(--soft)}}"
    media = f"@media screen and (prefers-color-scheme:dark){{:root{{{dark}}}}}"
    return f":root{{{light}}}{media}{classes}"
