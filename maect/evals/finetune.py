"""Fine-tuning: the whole encoder and a linear head learn from few labelled images, or from all."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator, Mapping
from typing import TYPE_CHECKING, Annotated, Any, Literal, cast

import numpy as np
from pydantic import Field, PositiveInt, model_validator

from maect.evals.base import (
    EvalInput,
    EvalResult,
    Evaluator,
    each_image,
    labels_of,
    percent_correct,
)
from maect.evals.low_shot import Budget, budget_metrics, by_draw, derive, metric_name, shortages
from maect.settings import NonNegative, NonNegativeInt, Positive, Settings, Share, ViewSettings
from maect.streams import Stream, generator

if TYPE_CHECKING:
    from torch import Tensor, nn

#: the budget of all training images
_ALL = "100%"


class FineTuneSettings(Settings):
    """AdamW with layer-wise decay from the encoder's weights; a linear head from N(0, 0.01).

    The published recipes are settings of these fields: see docs/evaluation.md.
    """

    #: labelled images a class, or share of the training images; each is a metric of its own
    budgets: list[Budget | Literal["100%"]] = Field(default=["1%", "10%"], min_length=1)
    #: peak learning rates tried; with several, a part of the labelled images chooses
    lrs: list[Positive] = Field(default=[1e-3], min_length=1)
    #: share of each class's labelled images set apart to choose among `lrs`, one image at least
    held_out: Annotated[float, Field(gt=0.0, lt=1.0)] = 0.2
    #: over the labelled images
    epochs: PositiveInt = 50
    #: images; all labelled ones where they are fewer
    batch_size: PositiveInt = 128
    #: of AdamW
    weight_decay: NonNegative = 0.05
    #: learning rate of a block over that of the next one above
    layer_decay: Share = 0.75
    #: share of the target spread over all classes
    label_smoothing: Share = 0.1
    #: share of the steps
    warmup: Share = 0.1
    #: what is done to the training images
    view: ViewSettings = ViewSettings()
    #: magnitude of RandAugment's two operators, 0 to 10; 0: no RandAugment
    rand_augment: Annotated[int, Field(ge=0, le=10)] = 0
    #: probability that a rectangle of an image is replaced by noise
    erasing: Share = 0.0
    #: parameters of the Beta distributions of mixup and of CutMix; 0: never; both: half of the
    #: batches each
    mixup: NonNegative = 0.0
    #: as mixup, of CutMix
    cutmix: NonNegative = 0.0
    #: probability that the last block's branches are left out; it grows linearly with depth
    drop_path: Annotated[float, Field(ge=0.0, lt=1.0)] = 0.0
    #: first blocks that stay as they are, with the embedding and the class token
    frozen_blocks: NonNegativeInt = 0
    #: whether the sin-cos positions learn, too
    learn_positions: bool = False

    @model_validator(mode="after")
    def _choosable(self) -> FineTuneSettings:
        if "1" in self.budgets and len(self.lrs) > 1:
            raise ValueError(
                "budget 1 leaves no labelled image to choose among lrs; give one of lrs"
            )
        return self


class _Classifier:
    """An encoder with a linear head, and how it learns from one draw of labelled images."""

    def __init__(self, data: EvalInput, settings: FineTuneSettings) -> None:
        import torch
        from torch import nn

        from maect.optim import freeze
        from maect.regularize import add_drop_path

        assert data.images is not None
        self.data, self.images, self.settings = data, data.images, settings
        self.mixes = bool(settings.mixup or settings.cutmix)
        self.network = self.images.network().train().requires_grad_(True)
        self.vit = cast(Any, self.network.get_submodule("encoder"))
        if settings.learn_positions:
            fixed = self.vit.pos_embed
            del self.vit.pos_embed
            self.vit.pos_embed = nn.Parameter(fixed)
        if settings.frozen_blocks:
            freeze(self.vit, settings.frozen_blocks)
        rate = settings.drop_path
        self.paths = add_drop_path(self.vit.blocks, rate) if rate else []
        self.device = next(self.network.parameters()).device
        dim = data.train.x.shape[1]
        self.head = nn.Linear(dim, data.classes).to(self.device)
        start = generator(data.seed, "finetune", "init").standard_normal((data.classes, dim))
        with torch.no_grad():
            self.head.weight.copy_(torch.from_numpy(0.01 * start))
            self.head.bias.zero_()

    def learn(self, rows: np.ndarray, budget: str, draw: int, lr: float) -> int:
        """Train on the labelled images. Return the number of steps."""
        import torch

        from maect.optim import adamw, layer_decay, learning_rate, set_learning_rate
        from maect.optim import parameter_groups as groups_of
        from maect.parallel import GradientSum

        settings, purpose = self.settings, (self.data.seed, "finetune", budget, draw)
        named = dict(self.vit.named_parameters())
        named |= {f"head.{name}": p for name, p in self.head.named_parameters()}
        factors = layer_decay(named, len(self.vit.blocks), settings.layer_decay)
        groups = groups_of(named.items(), settings.weight_decay, factors)
        optimizer = adamw(groups, lr, betas=(0.9, 0.999))
        sums = GradientSum(self._used(rows[:1]), self.images.group)
        size = min(settings.batch_size, len(rows))
        an_epoch = len(rows) // size
        total = settings.epochs * an_epoch
        warmup = round(settings.warmup * total)
        orders, dropped = Stream(*purpose, "order"), Stream(*purpose, "drop_path")
        pieces = self.images.group.pieces(size, uneven=True)

        def batches() -> Iterator[tuple[int, np.ndarray]]:
            for epoch in range(settings.epochs):
                order = rows[orders.permutation(epoch, len(rows))]
                yield from ((epoch, b) for b in order[: an_epoch * size].reshape(-1, size))

        wanted = (
            (epoch, self._rows(batch, piece))
            for epoch, batch in batches()
            for piece in pieces
            if piece.stop > piece.start
        )
        self.images.expect_views(settings.view, "finetune", wanted)
        for step, (epoch, batch) in enumerate(batches()):
            set_learning_rate(optimizer, learning_rate(step, total, warmup, lr))
            sums.start()
            for piece in pieces:
                if piece.stop > piece.start:
                    if self.paths:
                        self._drop(dropped.uniform(epoch, batch[piece], len(self.paths)))
                    loss = self._loss(batch, piece, epoch, (*purpose, step, "mix"))
                    (loss * ((piece.stop - piece.start) / size)).backward()
                else:  # fewer images than pieces
                    for parameter in sums.parameters:
                        parameter.grad = torch.zeros_like(parameter)
                sums.add()
            sums.finish()
            optimizer.step()
        return total

    def _used(self, rows: np.ndarray) -> list[nn.Parameter]:
        """Return the parameters that the classes depend on: not those past the block read."""
        self.head(self.network(self.images.prepared("train", rows))).sum().backward()
        every = [*self.network.parameters(), *self.head.parameters()]
        return [parameter for parameter in every if parameter.grad is not None]

    def _drop(self, draws: np.ndarray | None) -> None:
        """Draw anew which images leave out which branches: [B, branches]; None: none does."""
        import torch

        own = None if draws is None else torch.from_numpy(draws).to(self.device)
        for number, path in enumerate(self.paths):
            path.draws = None if own is None else own[:, number]

    def _rows(self, batch: np.ndarray, piece: slice) -> np.ndarray:
        """Return the images of which a piece of a batch is made: where images are mixed, each is
        with the one before it in the batch, the first with the last."""
        return batch[np.arange(piece.start - self.mixes, piece.stop)]

    def _loss(
        self, batch: np.ndarray, piece: slice, epoch: int, key: tuple[int | str, ...]
    ) -> Tensor:
        """Return the mean loss of a piece of a batch; `key` is of the draws that mix images."""
        import torch
        from torch.nn import functional

        from maect.regularize import mix, strengthen

        settings, seed, rows = self.settings, self.data.seed, self._rows(batch, piece)
        targets = self.data.train.y[torch.from_numpy(rows)].to(self.device)
        views = self.images.views(settings.view, "finetune", epoch, rows)
        if settings.rand_augment or settings.erasing:
            views = strengthen(
                views,
                [(seed, "finetune", "strengthen", epoch, int(row)) for row in rows],
                magnitude=settings.rand_augment,
                erasing=settings.erasing,
                mean=self.images.mean,
                std=self.images.std,
            )
        if self.mixes:
            beta = (settings.mixup, settings.cutmix)
            views, targets = mix(views, targets, self.data.classes, key, *beta)
        logits = self.head(self.network(views))
        return functional.cross_entropy(logits, targets, label_smoothing=settings.label_smoothing)

    def classes(self, split: str, rows: np.ndarray) -> np.ndarray:
        """Return predicted classes of rows of a split: [M] -> [M] int32; ties: lower.

        -1, which is never right, where the logits are not finite.
        """
        self.network.eval()
        self._drop(None)

        def predict(views: Tensor) -> Tensor:
            logits: Tensor = self.head(self.network(views))
            return logits.max(1).indices.where(logits.isfinite().all(1), -1)

        return each_image(self.images, split, rows, predict).cpu().numpy().astype(np.int32)


def _held_out(labels: np.ndarray, share: float, order: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Return places of the labelled images that learn and of those that choose among rates.

    labels [N], and a random `order` of them [N]. Of every class with several images the `share` is
    held out, one image at least. Raises ValueError where no class has two.
    """
    chosen = np.zeros(len(labels), dtype=bool)
    for label in np.unique(labels):
        own = order[labels[order] == label]
        if len(own) > 1:
            chosen[own[: max(1, round(share * len(own)))]] = True
    if not chosen.any():
        raise ValueError(
            "no class has two labelled images, so none can be set apart to choose among lrs; "
            "give one of lrs"
        )
    return np.flatnonzero(~chosen), np.flatnonzero(chosen)


def _tuned(
    data: EvalInput, settings: FineTuneSettings, budget: str, draw: int
) -> tuple[np.ndarray, dict[str, Any]]:
    """Classes of the test images [M] after fine-tuning on one draw, and what was chosen."""
    rows = np.asarray(data.low_shot[budget][draw])
    lr, tried = settings.lrs[0], {}
    if len(settings.lrs) > 1:
        order = Stream(data.seed, "finetune", budget, draw, "held_out").permutation(0, len(rows))
        labels = labels_of(data.train.y)[rows]
        learning, choosing = _held_out(labels, settings.held_out, order)
        accuracy = []
        for rate in settings.lrs:
            classifier = _Classifier(data, settings)
            classifier.learn(rows[learning], budget, draw, rate)
            found = classifier.classes("train", rows[choosing])
            accuracy.append(percent_correct(found, labels[choosing]))
        lr = settings.lrs[int(np.argmax(accuracy))]
        tried = {"held_out_images": len(choosing), "held_out_accuracy": accuracy}
    classifier = _Classifier(data, settings)
    steps = classifier.learn(rows, budget, draw, lr)
    classes = classifier.classes("test", np.arange(len(data.test.y)))
    if (classes < 0).any():
        raise ValueError(f"the logits are not finite after training at lr {lr}; lower lrs")
    return classes, {"lr": lr, "steps": steps, "images": len(rows), **tried}


def _compute(data: EvalInput, settings: FineTuneSettings) -> EvalResult:
    low_shot = {**data.low_shot, _ALL: [list(range(len(data.train.y)))]}
    data = dataclasses.replace(data, low_shot=low_shot)
    notes, predictions, chosen = shortages(data, settings.budgets), {}, {}
    for budget in settings.budgets:
        draws = (_tuned(data, settings, budget, i) for i in range(len(data.low_shot[budget])))
        classes, found = zip(*draws, strict=True)
        predictions[metric_name("class", budget)] = np.stack(classes, axis=1)
        chosen[metric_name("accuracy", budget)] = [*found]
    protocol: dict[str, Any] = {
        "optimizer": "AdamW, betas 0.9 and 0.999; linear warm-up, half a cosine to 0",
        "choice": "lr by accuracy on held-out labelled images after the last epoch, then the "
        "earlier one; then trained anew on all labelled images",
        "images": {name: [draw["images"] for draw in found] for name, found in chosen.items()},
        "value": "mean over the draws",
    }
    return EvalResult(predictions, chosen, protocol, notes)


def _passes(settings: FineTuneSettings, images: Mapping[str, int], classes: int) -> float:
    total, held = 0.0, settings.held_out
    for budget in settings.budgets:
        share = budget.endswith("%")
        draws = 1 if share else 3
        labelled = images["train"] * int(budget[:-1]) / 100 if share else int(budget) * classes
        trained, rates = 3 * settings.epochs * labelled, len(settings.lrs)
        tried = rates * (trained * (1 - held) + labelled * held) if rates > 1 else 0.0
        total += draws * (tried + trained + images["test"])
    return total


EVALUATOR = Evaluator(
    name="low_shot_finetune",
    label="low-shot, fine-tuned",
    settings=FineTuneSettings,
    metrics=lambda settings: budget_metrics(settings.budgets, ", fine-tuned"),
    compute=_compute,
    derive=derive,
    by_draw=by_draw,
    uses_seed=True,
    passes=_passes,
)
