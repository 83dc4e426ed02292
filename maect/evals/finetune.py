"""Fine-tuning: the whole encoder and a linear head learn from few labelled images, or from all."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator, Mapping
from typing import TYPE_CHECKING, Annotated, Any, Literal, cast

import numpy as np
from pydantic import Field, PositiveInt, model_validator

from maect.evals.base import EvalInput, EvalResult, Evaluator, Images, labels_of, percent_correct
from maect.evals.low_shot import (
    Budget,
    budget_metrics,
    by_draw,
    check_draws,
    derive,
    metric_name,
    shortages,
)
from maect.settings import NonNegative, NonNegativeInt, Positive, Settings, Share, ViewSettings
from maect.streams import Stream, generator

if TYPE_CHECKING:
    from torch import Tensor, nn

    from maect.parallel import GradientSum

#: images evaluated at a time
_IMAGES = 256
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

    def __init__(self, data: EvalInput, images: Images, settings: FineTuneSettings) -> None:
        import torch
        from torch import nn

        from maect.optim import freeze
        from maect.regularize import add_drop_path

        self.data, self.images, self.settings = data, images, settings
        self.network = images.network().train().requires_grad_(True)
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
        from maect.optim import adamw, layer_decay, learning_rate, set_learning_rate
        from maect.optim import parameter_groups as groups_of
        from maect.parallel import GradientSum

        settings, purpose = self.settings, ("finetune", budget, draw)
        named = dict(self.vit.named_parameters())
        factors = layer_decay(named, len(self.vit.blocks), settings.layer_decay)
        named |= {f"head.{name}": p for name, p in self.head.named_parameters()}
        factors |= {f"head.{name}": 1.0 for name, _ in self.head.named_parameters()}
        groups = groups_of(named.items(), settings.weight_decay, factors)
        optimizer = adamw(groups, lr, betas=(0.9, 0.999))
        sums = GradientSum(self._used(rows[:1]), self.images.group)
        size = min(settings.batch_size, len(rows))
        an_epoch = len(rows) // size
        total = settings.epochs * an_epoch
        warmup = round(settings.warmup * total)
        orders = Stream(self.data.seed, *purpose, "order")
        pieces = self.images.group.pieces(size, uneven=True)

        def batches() -> Iterator[tuple[int, np.ndarray]]:
            for epoch in range(settings.epochs):
                order = rows[orders.permutation(epoch, len(rows))]
                for place in range(an_epoch):
                    yield epoch, order[place * size : (place + 1) * size]

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
                self._add_gradient(batch, piece, epoch, (*purpose, step), sums)
            sums.finish()
            optimizer.step()
        return total

    def _used(self, rows: np.ndarray) -> list[nn.Parameter]:
        """Return the parameters that the classes depend on: not those past the block read."""
        self.head(self.network(self.images.prepared("train", rows))).sum().backward()
        every = [*self.network.parameters(), *self.head.parameters()]
        return [parameter for parameter in every if parameter.grad is not None]

    def _add_gradient(
        self,
        batch: np.ndarray,
        piece: slice,
        epoch: int,
        key: tuple[int | str, ...],
        sums: GradientSum,
    ) -> None:
        """Add the gradient of a piece of a batch, the rows of its images; `key` is the batch's."""
        import torch
        from torch.nn import functional

        settings, rows = self.settings, batch[piece]
        if not len(rows):  # fewer images than pieces
            for parameter in sums.parameters:
                parameter.grad = torch.zeros_like(parameter)
        else:
            views, targets = self._examples(batch, piece, epoch, key)
            if self.paths:
                dropped = Stream(self.data.seed, *key[:-1], "drop_path")
                draws = torch.from_numpy(dropped.uniform(epoch, rows, len(self.paths)))
                for path, own in zip(self.paths, draws.to(self.device).T, strict=True):
                    path.draws = own
            loss = functional.cross_entropy(
                self.head(self.network(views)), targets, label_smoothing=settings.label_smoothing
            )
            (loss * (len(rows) / len(batch))).backward()
        sums.add()

    def _rows(self, batch: np.ndarray, piece: slice) -> np.ndarray:
        """Return the images of which a piece of a batch is made."""
        # an image is mixed with the one before it in the batch: the first with the last
        mixing = bool(self.settings.mixup or self.settings.cutmix)
        return batch[np.arange(piece.start - mixing, piece.stop)]

    def _examples(
        self, batch: np.ndarray, piece: slice, epoch: int, key: tuple[int | str, ...]
    ) -> tuple[Tensor, Tensor]:
        """Return views [b, C, S, S] and labels [b], or [b, classes] where images are mixed."""
        import torch

        from maect.regularize import mix, strengthen

        settings, mixing = self.settings, bool(self.settings.mixup or self.settings.cutmix)
        rows = self._rows(batch, piece)
        labels = self.data.train.y[torch.from_numpy(rows)].to(self.device)
        views = self.images.views(settings.view, "finetune", epoch, rows)
        if settings.rand_augment or settings.erasing:
            views = strengthen(
                views,
                [(self.data.seed, "finetune", "strengthen", epoch, int(row)) for row in rows],
                magnitude=settings.rand_augment,
                erasing=settings.erasing,
                mean=self.images.mean,
                std=self.images.std,
            )
        if not mixing:
            return views, labels
        return mix(
            views,
            labels,
            self.data.classes,
            (self.data.seed, *key, "mix"),
            settings.mixup,
            settings.cutmix,
        )

    def classes(self, split: str, rows: np.ndarray) -> np.ndarray:
        """Return predicted classes of rows of a split: [M] -> [M] int32; ties: lower.

        -1, which is never right, where the logits are not finite.
        """
        import torch

        self.network.eval()
        for path in self.paths:
            path.draws = None

        def predict(part: slice) -> Tensor:
            logits: Tensor = self.head(self.network(self.images.prepared(split, rows[part])))
            return logits.max(1).indices.where(logits.isfinite().all(1), -1)

        group = self.images.group
        self.images.expect_prepared(split, (rows[p] for p in group.dealt(len(rows), _IMAGES)))
        with torch.no_grad():
            found = [part.cpu() for part in group.shared(len(rows), _IMAGES, predict)]
        return torch.cat(found).numpy().astype(np.int32)


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
    assert data.images is not None
    rows = np.asarray(data.low_shot[budget][draw])
    lr, tried = settings.lrs[0], {}
    if len(settings.lrs) > 1:
        order = Stream(data.seed, "finetune", budget, draw, "held_out").permutation(0, len(rows))
        labels = labels_of(data.train.y)[rows]
        learning, choosing = _held_out(labels, settings.held_out, order)
        accuracy = []
        for rate in settings.lrs:
            classifier = _Classifier(data, data.images, settings)
            classifier.learn(rows[learning], budget, draw, rate)
            found = classifier.classes("train", rows[choosing])
            accuracy.append(percent_correct(found, labels[choosing]))
        lr = settings.lrs[int(np.argmax(accuracy))]
        tried = {"held_out_images": len(choosing), "held_out_accuracy": accuracy}
    classifier = _Classifier(data, data.images, settings)
    steps = classifier.learn(rows, budget, draw, lr)
    classes = classifier.classes("test", np.arange(len(data.test.y)))
    if (classes < 0).any():
        raise ValueError(f"the logits are not finite after training at lr {lr}; lower lrs")
    return classes, {"lr": lr, "steps": steps, "images": len(rows), **tried}


def _compute(data: EvalInput, settings: FineTuneSettings) -> EvalResult:
    low_shot = {**data.low_shot, _ALL: [list(range(len(data.train.y)))]}
    data = dataclasses.replace(data, low_shot=low_shot)
    check_draws(data, settings.budgets)
    predictions, chosen = {}, {}
    for budget in settings.budgets:
        draws = [_tuned(data, settings, budget, i) for i in range(len(data.low_shot[budget]))]
        predictions[metric_name("class", budget)] = np.stack(
            [classes for classes, _ in draws], axis=1
        )
        chosen[metric_name("accuracy", budget)] = [found for _, found in draws]
    protocol: dict[str, Any] = {
        "optimizer": "AdamW, betas 0.9 and 0.999; linear warm-up, half a cosine to 0",
        "choice": "lr by accuracy on held-out labelled images after the last epoch, then the "
        "earlier one; then trained anew on all labelled images",
        "images": {name: [draw["images"] for draw in found] for name, found in chosen.items()},
        "value": "mean over the draws",
    }
    return EvalResult(predictions, chosen, protocol, shortages(data, settings.budgets))


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
