"""Split manifests: which images train, choose and test, and which few are labelled.

The lists for `digits`, `fashion_mnist` and `cifar10` are committed under `maect/splits`, each
with its hash. They were made by `make_split`, which tests run again. Where labels cannot be had
to commit a list (`cifar100`, folders, shards) the same function makes it from the data.
"""

from __future__ import annotations

import functools
import json
from collections.abc import Mapping
from dataclasses import dataclass
from importlib import resources
from typing import Any

import numpy as np

from maect.datasets.base import DataError
from maect.files import digest
from maect.streams import Stream

#: images of the splits that are drawn; train is the rest
SIZES = {
    "digits": {"test": 500, "selection": 200},
    "fashion_mnist": {"selection": 5000},
    "cifar10": {"selection": 5000},
    "cifar100": {"selection": 5000},
}
SHOTS = (1, 2, 5)
DRAWS = 3
SHARES = {"1%": 0.01, "10%": 0.1}


@dataclass(frozen=True)
class Manifest:
    """Rows of each split in the file they come from, and low-shot rows of the train split."""

    splits: dict[str, np.ndarray]
    low_shot: dict[str, list[np.ndarray]]
    sha256: str


def stratified(labels: np.ndarray, size: int, order: np.ndarray) -> np.ndarray:
    """`size` rows, shared among the classes in proportion, the first of each class in `order`.

    Remainders go to the classes with the largest fractions, lower class first on a tie. Returns
    sorted int64 rows.
    """
    counts = np.bincount(labels)
    exact = counts * (size / len(labels))
    take = np.floor(exact).astype(np.int64)
    rest = size - int(take.sum())
    take[np.argsort(take - exact, kind="stable")[:rest]] += 1
    return _first_of_each(labels, take, order)


def _first_of_each(labels: np.ndarray, take: np.ndarray, order: np.ndarray) -> np.ndarray:
    """Return the first `take[c]` rows of each class c in the given order, sorted.

    A class with fewer gives all its rows.
    """
    by_class = order[np.argsort(labels[order], kind="stable")]
    counts = np.bincount(labels)
    first = np.cumsum(counts) - counts
    chosen = [
        by_class[start : start + min(n, count)]
        for start, n, count in zip(first, take, counts, strict=True)
    ]
    return np.sort(np.concatenate(chosen))


def make_low_shot(name: str, train_labels: np.ndarray) -> dict[str, list[np.ndarray]]:
    """Rows of the train split that are labelled: k a class in three draws, and shares of it.

    A class that has fewer than k is drawn whole; see `maect.evals.low_shot.shortages`.
    """
    present = np.bincount(train_labels) > 0
    result = {}
    for shots in SHOTS:
        stream = Stream(0, "split", name, "low_shot", shots)
        take = np.full(len(present), shots)
        result[str(shots)] = [
            _first_of_each(train_labels, take, stream.permutation(draw, len(train_labels)))
            for draw in range(DRAWS)
        ]
    for label, share in SHARES.items():
        order = Stream(0, "split", name, "low_shot", label).permutation(0, len(train_labels))
        size = max(round(share * len(train_labels)), int(present.sum()))
        result[label] = [stratified(train_labels, size, order)]
    return result


def make_split(
    name: str, labels: np.ndarray, sizes: Mapping[str, int] | None = None
) -> dict[str, Any]:
    """The manifest of a set as JSON data, from the labels of the list its splits are drawn from.

    For `digits` that list is all 1,797 images, for the others the official training images. Each
    split is stratified and drawn from what the ones before it left; by default of these `SIZES`.
    """
    left = np.arange(len(labels), dtype=np.int64)
    splits = {}
    for split, size in (sizes or SIZES[name]).items():
        order = Stream(0, "split", name, split).permutation(0, len(left))
        chosen = stratified(labels[left], size, order)
        splits[split] = left[chosen]
        left = np.delete(left, chosen)
    low_shot = make_low_shot(name, labels[left])
    body = {
        "name": name,
        "images": len(labels),
        "splits": {split: rows.tolist() for split, rows in splits.items()},
        "low_shot": {key: [rows.tolist() for rows in draws] for key, draws in low_shot.items()},
    }
    return {**body, "sha256": digest(body)}


def parse(document: dict[str, Any]) -> Manifest:
    """Manifest from its JSON data. Raises DataError where the lists do not match their hash."""
    body = {key: value for key, value in document.items() if key != "sha256"}
    if digest(body) != document.get("sha256"):
        raise DataError(
            f"the split lists of {document.get('name')} do not match their own hash; "
            "restore maect/splits from the repository"
        )
    splits = {key: np.array(rows, dtype=np.int64) for key, rows in document["splits"].items()}
    drawn = np.concatenate(list(splits.values()))
    splits["train"] = np.delete(np.arange(document["images"], dtype=np.int64), drawn)
    low_shot = {
        key: [np.array(rows, dtype=np.int64) for rows in draws]
        for key, draws in document["low_shot"].items()
    }
    return Manifest(splits, low_shot, document["sha256"])


@functools.cache
def committed(name: str) -> Manifest | None:
    """Return the committed manifest of a set, or None where there is none."""
    file = resources.files("maect").joinpath("splits", f"{name}.json")
    return parse(json.loads(file.read_text())) if file.is_file() else None


def selection_rows(reported: str, images: int) -> dict[str, np.ndarray]:
    """Return which of the selection split's `images` choose, and which an evaluation reports on.

    By name, "selection" and "test", sorted int64, where the `reported` split is the selection
    split: what chose a learning rate cannot say how good it is. The halves are drawn without a look
    at the labels. Empty where the test split is reported on: then all of them choose.
    """
    if reported != "selection":
        return {}
    order = Stream(0, "split", "halves").permutation(0, images)
    choosing, reporting = order[: images // 2], order[images // 2 :]
    return {"selection": np.sort(choosing), "test": np.sort(reporting)}
