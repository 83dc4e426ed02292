"""Pictures that a gallery stage left: reconstructions, nearest neighbours, maps of the features."""

from __future__ import annotations

import base64
import io
from collections.abc import Iterator
from typing import Any

import numpy as np
from markupsafe import Markup

from reports.display import middle
from reports.figures.palette import look
from reports.figures.svg import mark, picture, tag, words
from reports.formats.records import anchor

#: width of a map, its margin, and room for its heading, in pixels
_MAP, _EDGE, _HEAD = 400, 8, 24


#: is the nearest neighbour of the image's class, before and after -> what became of it
_CHANGES = {
    (False, True): "came right",
    (True, False): "went wrong",
    (True, True): "right in both",
    (False, False): "wrong in both",
}
#: row of the reconstructions -> the array of its images, what each shows
_SHOWN = {
    "image": ("original", "Test image"),
    "what the MAE sees": ("masked", "What the MAE sees of image"),
    "its reconstruction": ("reconstructed", "The MAE's reconstruction of image"),
}


def gallery(found: dict[str, Any] | None) -> dict[str, Any] | None:
    """Return a view's `gallery` as the page shows it; None where there is none.

    Besides what the view tells: pictures by row of reconstructions, strips of neighbours, maps.
    """
    if found is None:
        return None
    arrays, rows = found["arrays"], [middle(row) for row in found["rows"]]
    labels = arrays["map_label"]
    return found | {
        "record": anchor(found["key"]),
        "rows": rows,
        "summary": {name: int(found["summary"][name]) for name in ("images", "gained", "lost")},
        "reconstructions": {
            name: [_picture(image, f"{said} {i}") for i, image in enumerate(arrays[key], 1)]
            for name, (key, said) in _SHOWN.items()
        },
        "strips": [*_strips(arrays, rows)],
        "maps": [
            _map(points, labels, row) for points, row in zip(arrays["map"], rows, strict=True)
        ],
        "mapped": len(labels),
        "legend": [(int(label), f"class {label}") for label in np.unique(labels)],
    }


def _picture(image: np.ndarray, said: str, label: str = "", other: bool = False) -> dict[str, Any]:
    """Return one image, uint8 [C, s, s], as a PNG in a data URI, with the words in its place.

    It is grey, by its first channel, unless C is 3. `other` marks a neighbour of another class.
    """
    from PIL import Image

    pixels = image.transpose(1, 2, 0) if len(image) == 3 else image[0]
    buffer = io.BytesIO()
    Image.fromarray(np.ascontiguousarray(pixels)).save(buffer, "PNG", optimize=True)
    source = f"data:image/png;base64,{base64.b64encode(buffer.getvalue()).decode()}"
    return {"source": source, "said": said, "label": label, "other": other}


def _strips(arrays: dict[str, np.ndarray], rows: list[str]) -> Iterator[dict[str, Any]]:
    """Yield each image, what became of its nearest neighbour, its neighbours before and after."""
    near, near_labels = arrays["neighbor"], arrays["neighbor_label"]
    for i, (image, label) in enumerate(zip(arrays["query"], arrays["query_label"], strict=True)):
        before, after = near_labels[:, i, 0] == label
        told = f"query {i + 1}"
        yield {
            "query": _picture(image, f"Image of {told}, class {label}", f"class {label}"),
            "change": _CHANGES[bool(before), bool(after)],
            "neighbors": [
                [
                    _picture(
                        other,
                        f"Neighbour {n} of {told} by {row}, class {at}",
                        f"class {at}",
                        bool(at != label),
                    )
                    for n, (other, at) in enumerate(zip(images[i], ats[i], strict=True), 1)
                ]
                for row, images, ats in zip(rows, near, near_labels, strict=True)
            ],
        }


def _map(points: np.ndarray, labels: np.ndarray, row: str) -> Markup:
    """Return points [M, 2] at one scale in both directions; the figure is as high as they need."""
    low, high = points.min(0), points.max(0)
    scale = (_MAP - 2 * _EDGE) / max(float((high - low).max()), 1e-9)
    width, height = scale * (high - low) + 2 * _EDGE
    offset = np.array([(_MAP - width) / 2 + _EDGE, _EDGE + _HEAD])
    height = round(float(height)) + _HEAD
    parts = [words(row, 0, 13, "head")]
    for (x, y), label in zip((points - low) * scale + offset, labels, strict=True):
        drawn = mark(int(label), float(x), float(y), small=True)
        parts.append(tag("g", drawn, class_=f"c{look(int(label)).colour}"))
    return picture(f"Map of the features of {row}", parts, _MAP, height)
