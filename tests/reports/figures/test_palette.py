"""Looks of rows: colours apart for every eye and in grey, the same row alike in every report."""

from __future__ import annotations

from itertools import combinations

import numpy as np
import pytest

from reports.figures import palette

#: what linear RGB becomes: Machado, Oliveira, Fernandes, "A Physiologically-based Model for
#: Simulation of Color Vision Deficiency", IEEE TVCG 15 (2009), table for severity 1.0
SIGHT = {
    "normal": np.eye(3),
    "protanopia": [
        [0.152286, 1.052583, -0.204868],
        [0.114503, 0.786281, 0.099216],
        [-0.003882, -0.048116, 1.051998],
    ],
    "deuteranopia": [
        [0.367322, 0.860646, -0.227968],
        [0.280085, 0.672501, 0.047413],
        [-0.011820, 0.042940, 0.968881],
    ],
    "tritanopia": [
        [1.255528, -0.076749, -0.178779],
        [-0.078411, 0.930809, 0.147602],
        [0.004733, 0.691367, 0.303900],
    ],
}
#: sRGB to XYZ, D65 (IEC 61966-2-1)
XYZ = np.array(
    [[0.4124564, 0.3575761, 0.1804375], [0.2126729, 0.7151522, 0.0721750],
     [0.0193339, 0.1191920, 0.9503041]]
)  # fmt: skip
#: the page's paper, light and dark
THEMES = {"light": (palette.LIGHT, "#fdfdfb"), "dark": (palette.DARK, "#16171a")}


def linear(colour: str) -> np.ndarray:
    """Linear RGB [3] of "#rrggbb"."""
    value = np.array([int(colour[i : i + 2], 16) / 255 for i in (1, 3, 5)])
    return np.where(value <= 0.04045, value / 12.92, ((value + 0.055) / 1.055) ** 2.4)


def lab(rgb: np.ndarray) -> np.ndarray:
    """CIELAB [3] of linear RGB [3]."""
    t = XYZ @ rgb / XYZ.sum(1)
    x, y, z = np.where(t > (6 / 29) ** 3, np.cbrt(t), t * (29 / 6) ** 2 / 3 + 4 / 29)
    return np.array([116 * y - 16, 500 * (x - y), 200 * (y - z)])


def ciede2000(one: np.ndarray, other: np.ndarray) -> float:
    """Distance of two colours in CIELAB (Sharma, Wu, Dalal, Color Research 30, 2005)."""
    chroma = (np.hypot(*one[1:]) + np.hypot(*other[1:])) / 2
    stretch = 1.5 - 0.5 * np.sqrt(chroma**7 / (chroma**7 + 25.0**7))
    (l1, a1, b1), (l2, a2, b2) = one, other
    c1, c2 = np.hypot(a1 * stretch, b1), np.hypot(a2 * stretch, b2)
    h1, h2 = (np.degrees(np.arctan2(b, a * stretch)) % 360 for a, b in ((a1, b1), (a2, b2)))
    turn = (h2 - h1 + 180) % 360 - 180 if c1 * c2 else 0.0
    hue = np.radians((h1 + turn / 2) % 360 if c1 * c2 else h1 + h2)
    light, chroma = (l1 + l2) / 2 - 50, (c1 + c2) / 2
    t = 1 - 0.17 * np.cos(hue - np.pi / 6) + 0.24 * np.cos(2 * hue)
    t += 0.32 * np.cos(3 * hue + np.radians(6)) - 0.2 * np.cos(4 * hue - np.radians(63))
    dl = (l2 - l1) / (1 + 0.015 * light**2 / np.sqrt(20 + light**2))
    dc = (c2 - c1) / (1 + 0.045 * chroma)
    dh = 2 * np.sqrt(c1 * c2) * np.sin(np.radians(turn / 2)) / (1 + 0.015 * chroma * t)
    bend = np.radians(60 * np.exp(-(((np.degrees(hue) - 275) / 25) ** 2)))
    twist = -2 * np.sqrt(chroma**7 / (chroma**7 + 25.0**7)) * np.sin(bend)
    return float(np.sqrt(dl**2 + dc**2 + dh**2 + twist * dc * dh))


def test_distances_are_those_of_the_published_examples() -> None:
    """Pairs 1, 7 and 25 of the authors' table."""
    for one, other, distance in (
        ((50.0, 2.6772, -79.7751), (50.0, 0.0, -82.7485), 2.0425),
        ((50.0, 0.0, 0.0), (50.0, -1.0, 2.0), 2.3669),
        ((60.2574, -34.0099, 36.2677), (60.4626, -34.1751, 39.4387), 1.2644),
    ):
        assert ciede2000(np.array(one), np.array(other)) == pytest.approx(distance, abs=1e-4)


@pytest.mark.parametrize("theme", THEMES)
@pytest.mark.parametrize("sight", SIGHT)
def test_no_two_colours_look_alike(theme: str, sight: str) -> None:
    """A just noticeable difference is 1; beside each other 10 are another colour."""
    seen = [lab(np.clip(np.array(SIGHT[sight]) @ linear(c), 0, 1)) for c in THEMES[theme][0]]
    assert min(ciede2000(a, b) for a, b in combinations(seen, 2)) > 12


@pytest.mark.parametrize("theme", THEMES)
def test_colours_are_told_apart_in_grey_and_from_the_paper(theme: str) -> None:
    colours, paper = THEMES[theme]
    lightness = sorted(lab(linear(colour))[0] for colour in colours)
    assert min(np.diff(lightness)) > 6
    ink, ground = ([XYZ[1] @ linear(c) + 0.05 for c in some] for some in (colours, [paper]))
    assert min(max(i, ground[0]) / min(i, ground[0]) for i in ink) > 3  # WCAG 2.2, 1.4.11


def test_a_row_has_one_look_in_every_report() -> None:
    paper = ["raw pixels", "random encoder", "MAE", "MAE, compute-matched", "MAE-CT", "MAE-CT_aug"]
    alone = palette.looks(paper)
    beside = palette.looks(["other", *reversed(paper), "another"])
    assert {row: beside[row] for row in paper} == alone
    assert palette.looks(["MAE-CT augment=aug"])["MAE-CT augment=aug"] == alone["MAE-CT_aug"]
    for rows in (beside, palette.looks(f"row {i}" for i in "abcdefghijklmnopqrstuvwxyz")):
        told = [palette.look(number) for number in rows.values()]
        assert len({(one.colour, one.marker) for one in told}) == len(told)
        assert len({(one.colour, one.dash) for one in told}) == len(told)
