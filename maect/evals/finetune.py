"""Low-shot by fine-tuning: the whole encoder and a linear head learn from few labelled images."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

import numpy as np
from pydantic import Field, PositiveInt

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
from maect.settings import NonNegative, Positive, Settings, Share, ViewSettings
from maect.streams import Stream, generator

if TYPE_CHECKING:
    from torch import Tensor, nn

    from maect.parallel import GradientSum

#: images evaluated at a time
_IMAGES = 256


class FineTuneSettings(Settings):
    """AdamW with layer-wise decay from the encoder's weights; a linear head from N(0, 0.01)."""

    #: labelled images a class, or share of the training images; each is a metric of its own
    budgets: list[Budget] = Field(default=["1%", "10%"], min_length=1)
    #: peak learning rates tried; with several, the selection split chooses
    lrs: list[Positive] = Field(default=[1e-3], min_length=1)
    epochs: PositiveInt = 50
    #: images; all labelled ones where they are fewer
    batch_size: PositiveInt = 128
    weight_decay: NonNegative = 0.05
    layer_decay: Share = 0.75
    label_smoothing: Share = 0.1
    #: share of the steps
    warmup: Share = 0.1
    #: what is done to the training images
    view: ViewSettings = ViewSettings()


class _Classifier:
    """An encoder with a linear head, and how it learns from one draw of labelled images."""

    def __init__(self, data: EvalInput, images: Images, settings: FineTuneSettings) -> None:
        import torch
        from torch import nn

        self.data, self.images, self.settings = data, images, settings
        self.network = images.network().train().requires_grad_(True)
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

        settings, vit = self.settings, self.network.get_submodule("encoder")
        named = dict(vit.named_parameters())
        depth = len(list(vit.get_submodule("blocks").children()))
        factors = layer_decay(named, depth, settings.layer_decay)
        named |= {f"head.{name}": p for name, p in self.head.named_parameters()}
        factors |= {f"head.{name}": 1.0 for name, _ in self.head.named_parameters()}
        groups = groups_of(named.items(), settings.weight_decay, factors)
        optimizer = adamw(groups, lr, betas=(0.9, 0.999))
        sums = GradientSum(self._used(rows[:1]), self.images.group)
        size = min(settings.batch_size, len(rows))
        an_epoch = len(rows) // size
        total = settings.epochs * an_epoch
        warmup = round(settings.warmup * total)
        orders = Stream(self.data.seed, "finetune", budget, draw, "order")
        for step in range(total):
            epoch, place = divmod(step, an_epoch)
            order = orders.permutation(epoch, len(rows))[place * size : (place + 1) * size]
            set_learning_rate(optimizer, learning_rate(step, total, warmup, lr))
            sums.start()
            for piece in self.images.group.pieces(size, uneven=True):
                self._add_gradient(rows[order[piece]], epoch, size, sums)
            sums.finish()
            optimizer.step()
        return total

    def _used(self, rows: np.ndarray) -> list[nn.Parameter]:
        """Return the parameters that the classes depend on: not those past the block read."""
        self.head(self.network(self.images.prepared("train", rows))).sum().backward()
        every = [*self.network.parameters(), *self.head.parameters()]
        return [parameter for parameter in every if parameter.grad is not None]

    def _add_gradient(self, rows: np.ndarray, epoch: int, size: int, sums: GradientSum) -> None:
        """Add the gradient of the part of a batch of `size` that the images `rows` are."""
        import torch
        from torch.nn import functional

        if not len(rows):  # fewer images than pieces
            for parameter in sums.parameters:
                parameter.grad = torch.zeros_like(parameter)
        else:
            labels = self.data.train.y[torch.from_numpy(rows)].to(self.device)
            views = self.images.views(self.settings.view, "finetune", epoch, rows)
            loss = functional.cross_entropy(
                self.head(self.network(views)),
                labels,
                label_smoothing=self.settings.label_smoothing,
            )
            (loss * (len(rows) / size)).backward()
        sums.add()

    def classes(self, split: str, count: int) -> np.ndarray:
        """Return predicted classes of a split of `count` images: [count] int32; ties: lower.

        -1, which is never right, where the logits are not finite.
        """
        import torch

        self.network.eval()

        def predict(rows: slice) -> Tensor:
            images = self.images.prepared(split, np.arange(rows.start, rows.stop))
            logits: Tensor = self.head(self.network(images))
            return logits.max(1).indices.where(logits.isfinite().all(1), -1)

        with torch.no_grad():
            found = [part.cpu() for part in self.images.group.shared(count, _IMAGES, predict)]
        return torch.cat(found).numpy().astype(np.int32)


def _tuned(
    data: EvalInput, settings: FineTuneSettings, budget: str, draw: int
) -> tuple[np.ndarray, dict[str, Any]]:
    """Classes of the test images [M] after fine-tuning on one draw, and what was chosen."""
    assert data.images is not None
    rows, labels = np.asarray(data.low_shot[budget][draw]), labels_of(data.selection.y)
    best: tuple[float, dict[str, Any], _Classifier] | None = None
    for lr in settings.lrs:
        classifier = _Classifier(data, data.images, settings)
        steps = classifier.learn(rows, budget, draw, lr)
        found: dict[str, Any] = {"lr": lr, "steps": steps, "images": len(rows)}
        accuracy = 0.0
        if len(settings.lrs) > 1:
            accuracy = percent_correct(classifier.classes("selection", len(labels)), labels)
            found["selection_accuracy"] = accuracy
        if best is None or accuracy > best[0]:
            best = accuracy, found, classifier
    assert best is not None
    classes = best[2].classes("test", len(data.test.y))
    if (classes < 0).any():
        raise ValueError(
            f"the logits are not finite after training at lr {best[1]['lr']}; lower lrs"
        )
    return classes, best[1]


def _run(data: EvalInput, settings: FineTuneSettings) -> EvalResult:
    if data.images is None:
        raise ValueError("fine-tuning needs the encoder; it was given cached features only")
    check_draws(data, settings.budgets)
    predictions, chosen = {}, {}
    for budget in settings.budgets:
        draws = [_tuned(data, settings, budget, i) for i in range(len(data.low_shot[budget]))]
        predictions[metric_name("class", budget)] = np.stack(
            [classes for classes, _ in draws], axis=1
        )
        chosen[metric_name("accuracy", budget)] = [found for _, found in draws]
    protocol: dict[str, Any] = {
        "evaluation": "low_shot_finetune",
        **settings.resolved(),
        "optimizer": "AdamW, betas 0.9 and 0.999; linear warm-up, half a cosine to 0",
        "choice": "lr by selection accuracy after the last epoch, then the earlier one",
        "images": {name: [draw["images"] for draw in found] for name, found in chosen.items()},
        "value": "mean over the draws",
        "selection_images": len(data.selection.y),
        "test_images": len(data.test.y),
    }
    values = derive(predictions, labels_of(data.test.y))
    return EvalResult(values, predictions, chosen, protocol, shortages(data, settings.budgets))


def _passes(settings: FineTuneSettings, images: Mapping[str, int], classes: int) -> float:
    total = 0.0
    for budget in settings.budgets:
        share = budget.endswith("%")
        draws = 1 if share else 3
        labelled = images["train"] * int(budget[:-1]) / 100 if share else int(budget) * classes
        chosen = images["selection"] if len(settings.lrs) > 1 else 0
        tried = len(settings.lrs) * (3 * settings.epochs * labelled + chosen)
        total += draws * (tried + images["test"])
    return total


EVALUATOR = Evaluator(
    name="low_shot_finetune",
    label="low-shot, fine-tuned",
    settings=FineTuneSettings,
    metrics=lambda settings: budget_metrics(settings.budgets, ", fine-tuned"),
    run=_run,
    derive=derive,
    by_draw=by_draw,
    uses_seed=True,
    chooses=lambda settings: len(settings.lrs) > 1,
    passes=_passes,
)
