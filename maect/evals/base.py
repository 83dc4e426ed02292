"""What an evaluation takes and gives back. Importing this module does not import torch."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, Protocol

import numpy as np

from maect.datasets.base import DataError
from maect.finite import require_finite
from maect.settings import Settings, ViewSettings

if TYPE_CHECKING:
    from torch import Tensor, nn

    from maect.parallel import Group

#: per-test-image predictions of an evaluation; the first axis of every array is the test image
Predictions = dict[str, np.ndarray]
#: images that an encoder sees at a time
IMAGES = 256


@dataclass(frozen=True)
class Metric:
    """A number that an evaluation prints; `name` is its key in `EvalResult.values`."""

    name: str
    label: str
    unit: str
    higher_is_better: bool
    primary: bool = False
    #: what it is one point along: "block", "neighbours", "images a class"; empty where it is alone
    along: str = ""
    #: where along it
    at: float = 0.0
    #: label of the line whose point it is, without its place: "k-NN, k=10"
    series: str = ""


@dataclass(frozen=True)
class Measured(Metric):
    """A metric with its value."""

    value: float = float("nan")


@dataclass
class Features:
    """Features of one split: x [N, D] float32, y [N] int64; row i is image i of the split.

    Of features at K blocks x is [N, K, D]; see `maect.evals.by_block`. Raises ValueError where
    they are not finite: no evaluation sees such features.
    """

    x: Tensor
    y: Tensor

    def __post_init__(self) -> None:
        require_finite("the features", self.x)


class Images(Protocol):
    """The images behind the features and the encoder that made them."""

    #: the workers that share the work; all of them do the same otherwise
    group: Group

    @property
    def mean(self) -> tuple[float, ...]:
        """Channel means that all images are normalised by, for values in [0, 1]."""

    @property
    def std(self) -> tuple[float, ...]:
        """Channel deviations that all images are normalised by, for values in [0, 1]."""

    def network(self) -> nn.Module:
        """A fresh copy of what makes the features, images [B, C, S, S] -> [B, D] float32, with
        the ViT as its `encoder`."""

    def views(self, view: ViewSettings, role: str, epoch: int, rows: np.ndarray) -> Tensor:
        """Augmented training images: rows [B] -> [B, C, S, S]. Random numbers by seed and role."""

    def prepared(self, split: str, rows: np.ndarray) -> Tensor:
        """Images of "train", "selection" or "test" as the features saw them: [B, C, S, S]."""

    def expect_views(
        self, view: ViewSettings, role: str, batches: Iterable[tuple[int, np.ndarray]]
    ) -> None:
        """Announce all `views` of these epochs and rows to come, in order, to be decoded ahead."""

    def expect_prepared(self, split: str, batches: Iterable[np.ndarray]) -> None:
        """Announce all images of a split to be `prepared`, in order."""

    def at(self, place: int) -> Images:
        """The same with features of one of several blocks, the one at `place` of their list."""


@dataclass
class EvalInput:
    """All an evaluation may look at. It knows nothing of trainers.

    `low_shot` maps a budget ("1", "2", "5" images a class; "1%", "10%") to its draws, each a list
    of rows of `train`; only low-shot evaluations read it. `images` is there for evaluations that
    say `needs_encoder`.
    """

    train: Features
    selection: Features
    test: Features
    classes: int
    seed: int = 0
    low_shot: Mapping[str, list[list[int]]] = field(default_factory=dict)
    images: Images | None = None


@dataclass
class EvalResult:
    """chosen: what was selected, and never on the test split. protocol: all that defines the
    numbers besides the features; two results are comparable if it is equal. values: metric name ->
    number in the metric's unit, derived from `predictions` and the test labels.
    """

    predictions: Predictions
    chosen: dict[str, Any]
    protocol: dict[str, Any]
    notes: list[str] = field(default_factory=list)
    values: dict[str, float] = field(default_factory=dict)

    def __post_init__(self) -> None:
        # arrays that share no memory and have no gaps, as stored files want them
        self.predictions = {key: np.array(a, order="C") for key, a in self.predictions.items()}


@dataclass(frozen=True)
class Evaluator:
    """One evaluation: what a module of `maect.evals` exposes as `EVALUATOR`."""

    name: str
    label: str
    #: the type of its settings; its defaults are the published protocol
    settings: type[Settings]
    #: settings -> the metrics it prints, the primary one first
    metrics: Callable[[Any], list[Metric]]
    #: (input, settings) -> result without values, its protocol without what all protocols hold
    compute: Callable[[EvalInput, Any], EvalResult]
    #: (predictions, test labels [M]) -> metric name -> value in the metric's unit, never a share
    derive: Callable[[Predictions, np.ndarray], dict[str, float]]
    #: whether its result depends on the seed of `EvalInput`
    uses_seed: bool
    #: as `derive`, of values that are means over draws of labelled images: that of each draw
    by_draw: Callable[[Predictions, np.ndarray], dict[str, list[float]]] = lambda *_: {}
    #: of one that asks for `EvalInput.images`: (settings, images of each split, classes) -> images
    #: that the encoder sees, a backward pass counted as two more
    passes: Callable[[Any, Mapping[str, int], int], float] | None = None
    #: whether it chooses among its settings on the selection split
    chooses: bool = False
    #: the tokens that it reads where a suite names none, as `FeatureSettings` have them
    tokens: Mapping[str, Any] = field(default_factory=dict)
    #: whether it reads the features of all its blocks together, x [N, K, 2D] of class token and
    #: mean, and of the training images on fresh crops only, so that theirs are not kept (x is
    #: empty); else it is run on one block after the other
    joins_blocks: bool = False
    #: the publication whose protocol its default settings and tokens are
    source: str = ""

    @property
    def needs_encoder(self) -> bool:
        """Whether it asks for the encoder; then all workers of a group run it together."""
        return self.passes is not None

    def run(self, data: EvalInput, settings: Any) -> EvalResult:
        """Return the whole result. Raises ValueError where it needs an encoder and has none."""
        if self.needs_encoder and data.images is None:
            raise ValueError(f"{self.label} needs the encoder; it was given cached features only")
        found = self.compute(data, settings)
        usual = {"evaluation": self.name, "test_images": len(data.test.y), **settings.resolved()}
        if self.source and settings == self.settings():
            usual["source"] = self.source
        values = self.derive(found.predictions, labels_of(data.test.y))
        return dataclasses.replace(found, values=values, protocol=usual | found.protocol)

    def require_images(self, reported: str, counts: Mapping[str, int]) -> None:
        """Raise DataError where it needs the selection split, which may be empty by chance."""
        if (self.chooses or reported == "selection") and not counts.get("selection", 1):
            raise DataError(
                f"{self.label} needs images in the selection split, which has none: data.selection "
                f"is 0, or none of few training images fell into it. Give data.selection a number"
            )


def each_image(
    images: Images, split: str, rows: np.ndarray, compute: Callable[[Tensor], Tensor]
) -> Tensor:
    """Return `compute` of images of a split as the features saw them: rows [M] -> [M, ...].

    All workers share the work, in batches [B, C, S, S], and have the result.
    """
    import torch

    def of(part: slice) -> Tensor:
        return compute(images.prepared(split, rows[part]))

    group = images.group
    images.expect_prepared(split, (rows[part] for part in group.dealt(len(rows), IMAGES)))
    with torch.no_grad():
        return torch.cat(list(group.shared(len(rows), IMAGES, of)))


def percent_correct(predicted: np.ndarray, labels: np.ndarray) -> float:
    """Return the share of equal entries, in percent: [M], [M] -> float."""
    return 100.0 * float(np.mean(predicted == labels))


def labels_of(y: Any) -> np.ndarray:
    """Return labels as a NumPy array on the CPU: tensor or array-like [N] -> int64 [N]."""
    return np.asarray(y.cpu() if hasattr(y, "cpu") else y).astype(np.int64)
