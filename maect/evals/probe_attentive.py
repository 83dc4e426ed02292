"""Attentive probe: one learned query attends to the patches, a linear layer reads what it sees.

The head is the one of AIM (El-Nouby et al. 2024, arXiv 2401.08541, `AttentionPoolingClassifier`):
patch tokens after the final norm, batch norm without affine parameters, keys and values without
bias, one query, heads as the encoder's, a linear layer without bias. How long it learns and at
which rates is ours; the rate is chosen on the selection split.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import numpy as np
from pydantic import Field, PositiveInt

from maect.evals.augmented_probe import AugmentedProbeSettings, fresh_crops
from maect.evals.base import (
    EvalInput,
    EvalResult,
    Evaluator,
    Images,
    Metric,
    each_image,
    percent_correct,
)
from maect.evals.linear_probe import choose
from maect.settings import NonNegative, Positive
from maect.streams import generator

if TYPE_CHECKING:
    from torch import Tensor


class AttentiveSettings(AugmentedProbeSettings):
    """AdamW on fresh crops, warm-up, half a cosine; all rates learn from the same batches."""

    #: learning rates tried, as they are
    base_lrs: list[Positive] = Field(default=[1e-4, 3e-4, 1e-3], min_length=1)
    epochs: PositiveInt = 10
    #: of AdamW; biases and norms have none
    weight_decay: NonNegative = 0.1


class Heads:
    """A head for each of L rates, all from the same first weights; `count` heads of attention."""

    def __init__(self, dim: int, classes: int, count: int, data: EvalInput, settings: Any) -> None:
        import torch

        from maect.optim import adamw, parameter_groups

        device, random = data.train.y.device, generator(data.seed, "attentive", "init")
        start = {"query": random.standard_normal((1, dim)) * 0.02}
        for name, rows in (("key", dim), ("value", dim), ("linear", classes)):
            start[name] = (2 * random.random((rows, dim)) - 1) * dim**-0.5
        self.count = count
        self.weights = [
            {
                name: torch.nn.Parameter(torch.from_numpy(value).float().to(device))
                for name, value in start.items()
            }
            for _ in settings.base_lrs
        ]
        self.optimizers = [
            adamw(parameter_groups(own.items(), settings.weight_decay), lr, (0.9, 0.999))
            for own, lr in zip(self.weights, settings.base_lrs, strict=True)
        ]
        self.mean, self.var = torch.zeros(dim, device=device), torch.ones(dim, device=device)

    def logits(self, tokens: Tensor, training: bool) -> list[Tensor]:
        """Return each head's logits: patch tokens [B, N, D] -> L of [B, C]."""
        from torch.nn import functional

        x = functional.batch_norm(
            tokens.flatten(0, 1), self.mean, self.var, training=training, eps=1e-6
        ).view_as(tokens)
        found = []
        for own in self.weights:
            query, key, value = (
                one.unflatten(-1, (self.count, -1)).transpose(1, 2)
                for one in (
                    own["query"].expand(len(x), 1, -1),
                    x @ own["key"].T,
                    x @ own["value"].T,
                )
            )  # [B, heads, 1 or N, D / heads]
            seen = functional.scaled_dot_product_attention(query, key, value)
            found.append(functional.linear(seen.transpose(1, 2).flatten(1), own["linear"]))
        return found

    def step(self, tokens: Tensor, y: Tensor, rates: list[float]) -> None:
        """One step of all heads on tokens [B, N, D], y [B], at these rates."""
        from torch.nn import functional

        from maect.optim import set_learning_rate

        for logits in self.logits(tokens, training=True):
            functional.cross_entropy(logits, y).backward()
        for optimizer, rate in zip(self.optimizers, rates, strict=True):
            set_learning_rate(optimizer, rate)
            optimizer.step()
            optimizer.zero_grad()


def _predicted(
    heads: Heads, patches: Any, images: Images, split: str, y: Tensor
) -> tuple[np.ndarray, np.ndarray]:
    """Return classes [M, L] int32 and mean cross entropies [L] on a split."""
    import torch
    from torch.nn import functional

    def of(views: Tensor) -> Tensor:
        return torch.stack(heads.logits(patches(views), training=False), dim=1)

    logits = each_image(images, split, np.arange(len(y)), of).to(y.device)
    losses = [float(functional.cross_entropy(one, y)) for one in logits.unbind(1)]
    return logits.max(2).indices.cpu().numpy().astype(np.int32), np.array(losses)


def _compute(data: EvalInput, settings: AttentiveSettings) -> EvalResult:
    import torch

    from maect.optim import learning_rate

    images = data.images
    assert images is not None
    network: Any = images.network().eval()
    vit = network.encoder

    def patches(views: Tensor) -> Tensor:
        with network.autocast():
            found: Tensor = vit(views)[:, 1:].float()
        return found

    count, y = len(data.train.y), data.train.y
    heads = Heads(vit.dim, data.classes, vit.heads, data, settings)
    total = settings.epochs * (count // min(settings.batch_size, count))
    warmup = round(settings.warmup * total)
    for step, (rows, tokens) in enumerate(fresh_crops(data, settings, patches)):
        rates = [learning_rate(step, total, warmup, lr) for lr in settings.base_lrs]
        heads.step(tokens, y[torch.from_numpy(rows).to(y.device)], rates)
    classes, losses = _predicted(heads, patches, images, "selection", data.selection.y)
    place, selected = choose(classes, data.selection.y, losses)
    test, _ = _predicted(heads, patches, images, "test", data.test.y)
    chosen = {"lr": settings.base_lrs[place], "selection_accuracy": selected}
    protocol = {
        "head": "one query over batch-normalised patch tokens, linear layer",
        "optimizer": "AdamW, betas 0.9 and 0.999; linear warm-up, half a cosine to 0",
        "choice": "lr by selection accuracy after the last epoch, then by its cross entropy",
        "train_images": count,
        "selection_images": len(data.selection.y),
    }
    return EvalResult({"class": test[:, place], "class_by_lr": test}, chosen, protocol)


EVALUATOR = Evaluator(
    name="probe_attentive",
    label="attentive probe",
    settings=AttentiveSettings,
    metrics=lambda settings: [Metric("accuracy", "attentive probe", "%", True, primary=True)],
    compute=_compute,
    derive=lambda found, labels: {"accuracy": percent_correct(found["class"], labels)},
    uses_seed=True,
    chooses=True,
    passes=lambda settings, images, classes: (
        settings.epochs * images["train"] + images["selection"] + images["test"]
    ),
    source="AIM, arXiv 2401.08541: its head; rates and epochs are ours",
)
