"""Pictures that a gallery stage left: reconstructions, nearest neighbours, maps of the features."""

from __future__ import annotations

import base64
import io
from dataclasses import dataclass
from typing import Any

import numpy as np
from markupsafe import Markup

from reports.display import plural
from reports.figures.svg import PALETTE, picture, tag, words
from reports.formats.records import anchor
from reports.tables.model import row_label

#: width of a map, its margin, and room for its heading, in pixels
_MAP, _EDGE, _HEAD = 400, 8, 24


@dataclass
class Picture:
    """One image; `other` marks a neighbour of another class."""

    source: str
    label: str = ""
    other: bool = False


@dataclass
class Strip:
    """An image, what became of its nearest neighbour, and the neighbours before and after."""

    query: Picture
    change: str
    neighbors: list[list[Picture]]


@dataclass
class Gallery:
    """All of the page's gallery; captions are sentences."""

    record: str
    rows: list[str]
    #: (what, images)
    reconstructions: list[tuple[str, list[Picture]]]
    reconstructed: str
    strips: list[Strip]
    neighbors: str
    maps: list[Markup]
    mapped: str
    legend: list[tuple[str, str]]


def gallery(found: dict[str, Any] | None) -> Gallery | None:
    """Return the gallery of a view's `gallery`; None where there is none."""
    if found is None:
        return None
    arrays, rows = found["arrays"], [row_label(row) for row in found["rows"]]
    split, seed = found["split"], found["seed"]
    made = (
        f"Images of the {split} split with {100 * found['mask_ratio']:g} % of their patches "
        f"hidden, and what the MAE of seed {seed} makes of the hidden ones."
    )
    if found["norm_pix"]:
        made += (
            " It predicts patches whose mean is 0 and whose spread is 1; the true mean and "
            "spread of each are put back, which flatters it."
        )
    labels = arrays["map_label"]
    count = plural(len(labels), "image")
    return Gallery(
        anchor(found["key"]),
        rows,
        [
            (name, [Picture(_source(image)) for image in arrays[key]])
            for name, key in (
                ("image", "original"),
                ("what the MAE sees", "masked"),
                ("its reconstruction", "reconstructed"),
            )
        ],
        made,
        _strips(arrays),
        _changes(found, rows),
        [_map(points, labels, row) for points, row in zip(arrays["map"], rows, strict=True)],
        f"Features of {count} of the {split} split (seed {seed}), laid out in two dimensions by "
        "t-SNE; a colour a class. Which points lie together means something; distances between "
        "groups, sizes and directions do not.",
        [(f"c{label % PALETTE}", f"class {label}") for label in np.unique(labels)],
    )


def _source(image: np.ndarray) -> str:
    """Return uint8 [C, s, s] as a PNG in a data URI; in grey its first channel, unless C is 3."""
    from PIL import Image

    pixels = image.transpose(1, 2, 0) if len(image) == 3 else image[0]
    buffer = io.BytesIO()
    Image.fromarray(np.ascontiguousarray(pixels)).save(buffer, "PNG", optimize=True)
    return f"data:image/png;base64,{base64.b64encode(buffer.getvalue()).decode()}"


def _strips(arrays: dict[str, np.ndarray]) -> list[Strip]:
    found = []
    near, near_labels = arrays["neighbor"], arrays["neighbor_label"]
    for i, (image, label) in enumerate(zip(arrays["query"], arrays["query_label"], strict=True)):
        right = near_labels[:, i, 0] == label
        change = {
            (False, True): "came right",
            (True, False): "went wrong",
            (True, True): "right in both",
            (False, False): "wrong in both",
        }[bool(right[0]), bool(right[1])]
        neighbors = [
            [
                Picture(_source(other), f"class {at}", bool(at != label))
                for other, at in zip(near[row, i], near_labels[row, i], strict=True)
            ]
            for row in range(len(near))
        ]
        found.append(Strip(Picture(_source(image), f"class {label}"), change, neighbors))
    return found


def _changes(found: dict[str, Any], rows: list[str]) -> str:
    """Return what the strips show, and of how many images it holds."""
    summary = found["summary"]
    return (
        f"Images of the {found['split']} split and the training images nearest to them (cosine of "
        f"standardised features, seed {found['seed']}). From {rows[0]} to {rows[1]} the nearest "
        f"one came to be of the image's class for {summary['gained']} of "
        f"{plural(summary['images'], 'image')}, and ceased to be for {summary['lost']}. Shown are "
        "the first of each, so this is what changed and no average. A dashed frame means another "
        "class."
    )


def _map(points: np.ndarray, labels: np.ndarray, row: str) -> Markup:
    """Return points [M, 2] at one scale in both directions; the figure is as high as they need."""
    low, high = points.min(0), points.max(0)
    scale = (_MAP - 2 * _EDGE) / max(float((high - low).max()), 1e-9)
    width, height = scale * (high - low) + 2 * _EDGE
    offset = np.array([(_MAP - width) / 2 + _EDGE, _EDGE + _HEAD])
    height = round(float(height)) + _HEAD
    parts = [words(row, 0, 13, "head")]
    for (x, y), label in zip((points - low) * scale + offset, labels, strict=True):
        css = f"dot c{label % PALETTE}"
        parts.append(tag("circle", cx=float(x), cy=float(y), r=3, class_=css))
    return picture(f"Map of the features of {row}", parts, _MAP, height)
