"""Linear probe: linear classifiers on the frozen features, all learning rates trained together.

The learning rate is chosen on the selection split. The published evaluation takes the learning
rate and the epoch that do best on the test split; that number is reported beside it, and never
used.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np
from pydantic import Field, PositiveInt

from maect.evals.base import (
    EvalInput,
    EvalResult,
    Evaluator,
    Features,
    Metric,
    labels_of,
    percent_correct,
)
from maect.settings import Positive, Settings, Share
from maect.streams import Stream, generator

if TYPE_CHECKING:
    import torch
    from torch import Tensor

#: rows of features evaluated at a time
_ROWS = 2048
#: steps below which the running statistics still remember their initial values (0.9^100 = 3e-5)
_FEW_STEPS = 100
_DIVERGED = "the loss is not finite at any learning rate; lower base_lrs"


class ProbeSettings(Settings):
    """SGD with momentum, warm-up and cosine, as published, on features computed once."""

    #: learning rates tried, for a batch of 256: each is multiplied by batch / 256
    base_lrs: list[Positive] = Field(
        default=[0.01, 0.02, 0.03, 0.04, 0.05, 0.06, 0.07, 0.08, 0.09, 0.1], min_length=1
    )
    #: over the training split
    epochs: PositiveInt = 50
    #: images; the whole training split where that is smaller
    batch_size: PositiveInt = 1024
    #: of SGD
    momentum: Share = 0.9
    #: share of the steps
    warmup: Share = 0.1


def rate(step: int, total: int, warmup: int) -> float:
    """Return the factor of the learning rate at `step` (from 0), the published probe's curve.

    From 0 to 1 in equal parts over the first `warmup` steps, both ends included; then half a
    cosine from 1 to 0 over the rest, both ends included.
    """
    if step < warmup:
        return step / (warmup - 1) if warmup > 1 else 1.0
    rest = total - warmup
    return (1 + math.cos(math.pi * (step - warmup) / (rest - 1))) / 2 if rest > 1 else 1.0


class Probes:
    """L linear classifiers over shared features: batch norm without affine, then Linear.

    weight [L * C, D] and bias [L * C]; all classifiers start from the same weights, N(0, 0.01),
    so what one becomes does not depend on which others are trained with it.
    """

    def __init__(
        self,
        dim: int,
        classes: int,
        lrs: list[float],
        *,
        momentum: float = 0.9,
        seed: int = 0,
        device: torch.device | None = None,
        batch_norm: bool = True,
    ) -> None:
        import torch

        self.batch_norm = batch_norm
        self.count, self.classes, self.momentum = len(lrs), classes, momentum
        start = generator(seed, "probe", "init").standard_normal((classes, dim)) * 0.01
        weight = torch.from_numpy(start).float().repeat(self.count, 1).to(device)
        self.weight, self.bias = weight, weight.new_zeros(len(weight), 1)
        self.velocity = (torch.zeros_like(self.weight), torch.zeros_like(self.bias))
        self.lrs = torch.tensor(lrs).repeat_interleave(classes)[:, None].to(device)
        self.mean, self.var = weight.new_zeros(dim), weight.new_ones(dim)

    def normalize(self, x: Tensor, training: bool) -> Tensor:
        """`BatchNorm1d(affine=False)` with torch's eps 1e-5 and momentum 0.1: [B, D] -> [B, D]."""
        from torch.nn import functional

        if not self.batch_norm:
            return x
        return functional.batch_norm(x, self.mean, self.var, training=training)

    def logits(self, normalized: Tensor) -> Tensor:
        """[B, D] -> [L, C, B]."""
        import torch

        flat = torch.addmm(self.bias, self.weight, normalized.T)
        return flat.view(self.count, self.classes, len(normalized))

    def step(self, x: Tensor, y: Tensor, factor: float) -> None:
        """One step of SGD on the mean cross entropy of x [B, D], y [B], at `factor` of the lrs."""
        normalized = self.normalize(x, training=True)
        gradient = self.logits(normalized).softmax(1)
        target = gradient.new_zeros(self.classes, len(y)).scatter_(0, y[None], 1.0)
        gradient = gradient.sub_(target).div_(len(y)).flatten(0, 1)  # of the logits, [L * C, B]
        gradients = (gradient @ normalized, gradient.sum(1, keepdim=True))
        for value, velocity, change in zip(
            (self.weight, self.bias), self.velocity, gradients, strict=True
        ):
            velocity.mul_(self.momentum).add_(change)
            value.addcmul_(self.lrs, velocity, value=-factor)

    def evaluate(
        self, x: Tensor, y: Tensor, *, restricted: bool = False
    ) -> tuple[np.ndarray, np.ndarray]:
        """With the running statistics: predicted classes [M, L] and mean cross entropy [L].

        x [M, D], y [M]. `restricted`: logits of classes that are not in y count for nothing.
        """
        import torch

        counts = np.bincount(labels_of(y), minlength=self.classes)
        absent = torch.from_numpy(counts == 0)[:, None].to(x.device)
        classes, losses = [], torch.zeros(self.count, dtype=torch.float64)
        for rows, labels in zip(x.split(_ROWS), y.split(_ROWS), strict=True):
            logits = self.logits(self.normalize(rows, training=False))
            if restricted:
                logits = logits.masked_fill(absent, -math.inf)
            classes.append(logits.max(1).indices.T.cpu())  # much faster than argmax
            picked = logits.gather(1, labels.expand(self.count, 1, -1)).squeeze(1)
            losses += (logits.logsumexp(1) - picked).double().sum(1).cpu()
        return torch.cat(classes).numpy().astype(np.int32), (losses / len(y)).numpy()


def _accuracy(predicted: np.ndarray, y: Tensor, loss: np.ndarray) -> np.ndarray:
    """Return the percentage of right classes [M, L] -> [L]; -1, never chosen, where the loss is
    not finite."""
    right = 100.0 * (predicted == labels_of(y)[:, None]).mean(0)
    return np.where(np.isfinite(loss), right, -1.0)


def choose(predicted: np.ndarray, y: Tensor, loss: np.ndarray) -> tuple[int, float]:
    """Return the place of the highest accuracy, of equal ones that of the lowest loss, then the
    first, and the accuracy in percent: [M, L], [M], [L].

    Raises ValueError where no loss is finite.
    """
    accuracy = _accuracy(predicted, y, loss)
    place = int(np.lexsort((loss, -accuracy))[0])
    if accuracy[place] < 0:
        raise ValueError(_DIVERGED)
    return place, float(accuracy[place])


#: rows [B] and features of training images
Batch = tuple[np.ndarray, "Tensor"]


def batches(data: EvalInput, settings: ProbeSettings) -> Iterator[tuple[int, np.ndarray]]:
    """Yield epoch and rows [B] of all batches, the last incomplete one of an epoch dropped."""
    images, orders = len(data.train.y), Stream(data.seed, "probe", "order")
    size = min(settings.batch_size, images)
    for epoch in range(settings.epochs):
        for rows in orders.permutation(epoch, images)[: images // size * size].reshape(-1, size):
            yield epoch, rows


def probe_metrics(label: str) -> list[Metric]:
    """Return what a probe prints; `label` names its protocol."""
    return [
        Metric("accuracy", label, "%", True, primary=True),
        Metric("accuracy_test_selected", f"{label}, chosen on test", "%", True),
        Metric("test_selection_gap", f"{label}, gain of choosing on test", "points", False),
    ]


def derive(predictions: Mapping[str, np.ndarray], labels: np.ndarray) -> dict[str, float]:
    """Return the accuracies in percent, and their difference in points."""
    honest = percent_correct(predictions["class"], labels)
    official = percent_correct(predictions["class_test_selected"], labels)
    return {
        "accuracy": honest,
        "accuracy_test_selected": official,
        "test_selection_gap": official - honest,
    }


def stored(data: EvalInput, settings: ProbeSettings) -> Iterator[Batch]:
    """Yield all batches with the stored features."""
    import torch

    for _, rows in batches(data, settings):
        place = torch.from_numpy(rows).to(data.train.x.device)
        yield rows, data.train.x.index_select(0, place)


def run_probe(
    data: EvalInput,
    settings: ProbeSettings,
    features: Iterator[Batch],
    name: str,
    *,
    restricted: bool = False,
    batch_norm: bool = True,
    readings: Sequence[dict[str, Any]] = ({},),
    read: Callable[..., Tensor] = lambda x: x,
) -> EvalResult:
    """Train the probes on `features` of all batches, choose, predict; the protocol calls these
    `name`.

    `restricted`: predict among the classes of the test images only. There is a classifier for each
    rate and each of `readings`, the arguments by which `read` makes x [B, D] of features.
    """
    import torch

    train, images = data.train, len(data.train.y)
    size = min(settings.batch_size, images)
    lrs = [lr * size / 256 for lr in settings.base_lrs]
    probes = [
        Probes(
            read(train.x[:0], **reading).shape[1],
            data.classes,
            lrs,
            momentum=settings.momentum,
            seed=data.seed,
            device=train.y.device,
            batch_norm=batch_norm,
        )
        for reading in readings
    ]
    candidates = [reading | {"base_lr": lr} for reading in readings for lr in settings.base_lrs]
    an_epoch = images // size
    total = settings.epochs * an_epoch
    warmup = round(settings.warmup * total)

    def evaluated(split: Features, **options: bool) -> tuple[np.ndarray, np.ndarray]:
        """Return classes [M, L] and mean cross entropies [L] of all candidates."""
        found = [
            one.evaluate(read(split.x, **reading).to(split.y.device), split.y, **options)
            for one, reading in zip(probes, readings, strict=True)
        ]
        classes, losses = zip(*found, strict=True)
        return np.concatenate(classes, axis=1), np.concatenate(losses)

    # ---- train; on the test split look at every epoch for the published choice, told beside ours
    official_accuracy = -1.0
    for step, (rows, x) in enumerate(features):
        y = train.y.index_select(0, torch.from_numpy(rows).to(train.y.device))
        for one, reading in zip(probes, readings, strict=True):
            one.step(read(x, **reading).to(y.device), y, rate(step, total, warmup))
        if (step + 1) % an_epoch:
            continue
        predicted, loss = evaluated(data.test, restricted=restricted)
        accuracy = _accuracy(predicted, data.test.y, loss)
        if accuracy.max() > official_accuracy:
            official_accuracy, at = accuracy.max(), int(accuracy.argmax())
            official = {f"test_selected_{n}": told for n, told in candidates[at].items()}
            official["test_selected_epoch"] = (step + 1) // an_epoch
            official_classes = predicted[:, at]

    # ---- choose on the selection split
    on_selection, loss = evaluated(data.selection)
    place, selected = choose(on_selection, data.selection.y, loss)
    if official_accuracy < 0:
        raise ValueError(_DIVERGED)
    predictions = {
        "class": predicted[:, place],
        "class_by_lr": predicted,
        "class_test_selected": official_classes,
    }
    chosen = {**candidates[place], "selection_accuracy": selected, **official}
    protocol = {
        "features": name,
        "batch_used": size,
        "choice": "base_lr by selection accuracy after the last epoch, then by its cross entropy",
        "train_images": images,
        "selection_images": len(data.selection.y),
        **({"predicted": "classes of the test images"} if restricted else {}),
    }
    notes = []
    if size < settings.batch_size:
        notes.append(f"batch {size} instead of {settings.batch_size}: that is all there is")
    if total < _FEW_STEPS and batch_norm:
        notes.append(
            f"only {total} steps: the running statistics of the batch norm still remember their "
            "initial values"
        )
    return EvalResult(predictions, chosen, protocol, notes)


EVALUATOR = Evaluator(
    name="probe",
    label="linear probe",
    settings=ProbeSettings,
    metrics=lambda settings: probe_metrics("linear probe"),
    compute=lambda data, settings: run_probe(data, settings, stored(data, settings), "cached"),
    derive=derive,
    uses_seed=True,
    chooses=True,
)

#: on images of some of its classes, as ImageNet-A and -R, which hold 200 of 1,000: the probe learns
#: all classes, and predicts among those of the reported images
PRESETS = [
    dataclasses.replace(
        EVALUATOR,
        name="probe_restricted",
        label="restricted probe",
        metrics=lambda settings: probe_metrics("linear probe, classes of these images"),
        compute=lambda data, settings: run_probe(
            data, settings, stored(data, settings), "cached", restricted=True
        ),
    )
]
