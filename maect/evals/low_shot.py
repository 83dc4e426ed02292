"""Low-shot: logistic regression on the features of a few labelled images a class."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any, Literal

import numpy as np
from pydantic import Field

from maect.datasets.base import listed
from maect.evals.base import EvalInput, EvalResult, Evaluator, Features, Metric, labels_of
from maect.settings import Positive, Settings

if TYPE_CHECKING:
    from torch import Tensor

#: numbers of a draw's features up to which budgets are solved together: the cost is in the calls
_SMALL = 2**15
#: logits of draws solved together, eight copies of which are held in double precision
_LOGITS = 2**28

Budget = Literal["1", "2", "5", "1%", "10%"]


class LowShotSettings(Settings):
    """The published protocol: rows centred and normalised, no intercept, penalty 0.00025 / n."""

    #: labelled images a class, or share of the training images; each is a metric of its own
    budgets: list[Budget] = Field(default=["1", "2", "5", "10%"], min_length=1)
    #: the objective is mean cross entropy + l2 / (2 n) |W|^2 with n labelled images
    l2: Positive = 0.00025
    #: relative gain of the last Newton step below which a problem is solved
    tolerance: Positive = 1e-5


def centred_rows(x: Tensor) -> Tensor:
    """Return each row minus its own mean, divided by its L2 norm: [N, D] -> [N, D] float64.

    The published protocol's preparation.
    """
    x = x.double()
    x = x - x.mean(1, keepdim=True)
    return x / x.norm(dim=1, keepdim=True).clamp_min(1e-12)


def metric_name(what: str, budget: str) -> str:
    """Of what a budget gives, as records and predictions call it: accuracy_1, class_10pct."""
    return f"{what}_{budget.replace('%', 'pct')}"


def budget_label(budget: str) -> str:
    """Return a budget as tables call it: 1-shot, 10%."""
    return budget if budget.endswith("%") else f"{budget}-shot"


def budget_metrics(budgets: Sequence[str], how: str = "") -> list[Metric]:
    """Return an accuracy for each budget, the first one primary; `how` ends their labels."""
    return [
        Metric(
            metric_name("accuracy", budget),
            budget_label(budget) + how,
            "%",
            True,
            primary=i == 0,
            along="share of labels" if budget.endswith("%") else "images a class",
            at=float(budget.rstrip("%")),
            series=f"low-shot{how}",
        )
        for i, budget in enumerate(budgets)
    ]


def derive(predictions: Mapping[str, np.ndarray], labels: np.ndarray) -> dict[str, float]:
    """Return the mean over the draws of the accuracy on the whole test split, in percent."""
    return {
        key.replace("class", "accuracy"): 100.0 * float((drawn == labels[:, None]).mean())
        for key, drawn in predictions.items()
    }


def by_draw(predictions: Mapping[str, np.ndarray], labels: np.ndarray) -> dict[str, list[float]]:
    """Return the accuracy in percent of each draw, by metric, where there are several draws."""
    return {
        key.replace("class", "accuracy"): (100.0 * (drawn == labels[:, None]).mean(0)).tolist()
        for key, drawn in predictions.items()
        if drawn.shape[1] > 1
    }


def shortages(data: EvalInput, budgets: Sequence[str]) -> list[str]:
    """Return a sentence for each budget whose draws give a class fewer images than it says.

    Raises ValueError if the data set's split has no draws for one of the budgets.
    """
    if missing := [budget for budget in budgets if budget not in data.low_shot]:
        raise ValueError(f"the data set's split has no low-shot draws for {', '.join(missing)}")
    notes, labels = [], labels_of(data.train.y)
    for budget in budgets:
        least = 1 if budget.endswith("%") else int(budget)
        counts = np.bincount(labels[np.asarray(data.low_shot[budget][0])], minlength=data.classes)
        short = np.flatnonzero(counts < least)
        if len(short):
            named = listed(f"{counts[label]} of class {label}" for label in short)
            notes.append(
                f"{budget_label(budget)}: {len(short)} of {data.classes} classes have fewer than "
                f"{least} labelled images: {named}"
            )
    return notes


def _compute(data: EvalInput, settings: LowShotSettings) -> EvalResult:
    from maect.evals.logistic import fit_logistic

    notes, test = shortages(data, settings.budgets), centred_rows(data.test.x)
    found: dict[Budget, list[list[Any]]] = {budget: [] for budget in settings.budgets}
    for group in _groups(data, settings.budgets):
        x, y = _stacked(data.train, [np.asarray(data.low_shot[b][draw]) for b, draw in group])
        fitted = fit_logistic(x, y, data.classes, settings.l2, settings.tolerance)
        if not fitted.converged:
            named = dict.fromkeys(budget_label(budget) for budget, _ in group)
            notes.append(f"{', '.join(named)}: a regression missed its tolerance")
        classes, objective = _classes(test, fitted.weight).T, fitted.objective.tolist()
        for (budget, _), *one in zip(group, classes, objective, strict=True):
            found[budget].append(one)
    predictions, chosen = {}, {}
    for budget, solved in found.items():
        predicted, objectives = zip(*solved, strict=True)
        predictions[metric_name("class", budget)] = np.stack(predicted, axis=1)
        chosen[metric_name("accuracy", budget)] = {
            "images": [len(draw) for draw in data.low_shot[budget]],
            "objective": [*objectives],
        }
    protocol: dict[str, Any] = {
        "rows": "centred by their own mean, L2-normalised; no intercept",
        "images": {name: one["images"] for name, one in chosen.items()},
        "value": "mean over the draws",
        "ties": "lower class",
    }
    return EvalResult(predictions, chosen, protocol, notes)


def _groups(data: EvalInput, budgets: list[Budget]) -> list[list[tuple[Budget, int]]]:
    """Return draws to solve together, as budget and number: those of all small budgets, else those
    of one, or as many of them as leave memory."""
    groups: dict[tuple[str, int], list[tuple[Budget, int]]] = {}
    for budget in budgets:
        images = len(data.low_shot[budget][0])
        small = not budget.endswith("%") and images * data.train.x.shape[1] <= _SMALL
        most = max(1, _LOGITS // (images * data.classes))
        for draw in range(len(data.low_shot[budget])):
            key = ("", 0) if small else (budget, draw // most)
            groups.setdefault(key, []).append((budget, draw))
    return list(groups.values())


def _stacked(train: Features, draws: list[np.ndarray]) -> tuple[Tensor, Tensor]:
    """Prepared rows and classes of each draw, filled up to the longest: [P, n, D], [P, n]."""
    import torch

    device, most = train.x.device, max(map(len, draws))
    x = torch.zeros(len(draws), most, train.x.shape[1], dtype=torch.float64, device=device)
    y = torch.full((len(draws), most), -1, device=device)
    for i, draw in enumerate(draws):
        rows = torch.from_numpy(draw).to(device)
        x[i, : len(draw)] = centred_rows(train.x[rows])
        y[i, : len(draw)] = train.y[rows]
    return x, y


def _classes(test: Tensor, weight: Tensor) -> np.ndarray:
    """Return predicted classes: test [M, D], weight [P, C, D] -> [M, P] int32."""
    import torch

    parts = [(rows @ weight.mT).max(2).indices.T.cpu() for rows in test.split(2048)]
    return torch.cat(parts).numpy().astype(np.int32)


EVALUATOR = Evaluator(
    name="low_shot",
    label="low-shot",
    settings=LowShotSettings,
    metrics=lambda settings: budget_metrics(settings.budgets),
    compute=_compute,
    derive=derive,
    by_draw=by_draw,
    uses_seed=False,
)
