"""An evaluation as a suite declares it: which of maect's, its settings, and the tokens it reads."""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from functools import cache
from typing import TYPE_CHECKING, Any

from pydantic import create_model

from bench.errors import short, suggestion
from bench.suite.messages import check, fault
from bench.suite.yamlfile import Map
from maect import evals
from maect.settings import FeatureSettings, ModelSettings, Settings

if TYPE_CHECKING:
    import torch

_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9_-]{0,79}")
_POOLS = {"cls": "class token", "mean": "mean of patches", "both": "class token and mean"}


@dataclass(frozen=True)
class Evaluation:
    """`block` and `pool` are None where the suite declares neither: the row's usual features."""

    kind: str
    settings: Settings
    block: int | list[int] | None = None
    pool: str | None = None

    @property
    def evaluator(self) -> evals.Evaluator:
        found = evals.get(self.kind)
        return evals.at_blocks(found, self.block) if isinstance(self.block, list) else found

    @property
    def needs_encoder(self) -> bool:
        """Whether it can only be had of a row with an encoder."""
        return self.pool is not None or self.evaluator.needs_encoder

    @property
    def tokens(self) -> dict[str, Any]:
        """The tokens where they are declared: part of a stage's settings and of a protocol."""
        return {"tokens": {"block": self.block, "pool": self.pool}} if self.pool else {}

    def said(self) -> list[str]:
        """The tokens in words, where they are declared."""
        words = [f"block {self.block}"] if isinstance(self.block, int) else []
        if isinstance(self.block, list):
            words = [f"blocks {', '.join(map(str, self.block))}"]
        return words + ([_POOLS[self.pool]] if self.pool else [])

    def metrics(self) -> list[evals.Metric]:
        """What it prints, the primary one first; labels tell other tokens from the usual ones."""
        said = self.said()[isinstance(self.block, list) :]  # of several, each metric names its own
        return [
            dataclasses.replace(metric, label=", ".join([metric.label, *said]))
            for metric in self.evaluator.metrics(self.settings)
        ]

    def columns(self, name: str) -> dict[str, evals.Metric]:
        """Its metrics by the ids that tables know them by, where a suite calls it `name`."""
        return {column_id(name, m.name, m.primary): m for m in self.metrics()}

    def resolved(self) -> dict[str, Any]:
        """Its part of a stage's settings."""
        return {"settings": self.settings.resolved(), **self.tokens}

    def plain(self, name: str) -> dict[str, Any]:
        """It as a suite would declare it under `name`."""
        other = {} if name == self.kind else {"evaluation": self.kind}
        return other | self.settings.resolved() | self.tokens.get("tokens", {})

    @classmethod
    def of(cls, kind: str, resolved: Mapping[str, Any]) -> Evaluation:
        """The evaluation that `resolved` describes."""
        settings = evals.get(kind).settings.parse(resolved["settings"])
        return cls(kind, settings, **resolved.get("tokens", {}))


def declare_all(
    wanted: Iterable[str], model: ModelSettings, tree: Map, *, pixels: bool = False
) -> dict[str, Evaluation]:
    """Those `wanted` by name, as a row's `tree` declares them; others are checked for their names.

    `pixels`: the row has no encoder, so what needs one is left out. Raises `UserError`.
    """
    kinds = {name: name for name in wanted}
    for name, given in tree.get("evaluations", {}).items():
        if not _NAME.fullmatch(name):
            message = f"the evaluation's name '{short(name)}' becomes a column's name; write "
            message += "letters, digits, '-' and '_' only"
            raise fault(message, tree, ("evaluations", name))
        declared = given.get("evaluation") if isinstance(given, Mapping) else None
        kinds[name] = name if declared is None else str(declared)
        if kinds[name] not in evals.names():
            message = f"there is no evaluation '{short(kinds[name])}'"
            message += suggestion(kinds[name], evals.names())
            if declared is None:
                message += ". One under a name of its own says e.g. 'evaluation: knn'"
            own = () if declared is None else ("evaluation",)
            raise fault(message, tree, ("evaluations", name, *own))
    found = {name: declare(name, kinds[name], model, tree) for name in wanted}
    return {name: e for name, e in found.items() if not (pixels and e.needs_encoder)}


def declare(name: str, kind: str, model: ModelSettings, tree: Map) -> Evaluation:
    """The evaluation under `evaluations.<name>` of a row's `tree`. Raises `UserError`."""
    given = tree.get("evaluations", {}).get(name, {})
    found = check(_declarable(kind), given, ("evaluations", name), tree).resolved()
    tokens = FeatureSettings.parse({key: found.pop(key) for key in FeatureSettings.model_fields})
    del found["evaluation"]
    block = tokens.blocks(model.depth or 0)
    pool = tokens.pool or (None if block is None else model.pool)
    return Evaluation(kind, evals.get(kind).settings.parse(found), block, pool)


@cache
def _declarable(kind: str) -> type[Settings]:
    """What a suite may write of an evaluation."""
    own = evals.get(kind).settings
    return create_model(
        own.__name__, __base__=(own, FeatureSettings), evaluation=(str | None, None)
    )


def eval_input(
    tensors: Mapping[str, torch.Tensor],
    reported: str,
    low_shot: Mapping[str, Any],
    seed: int,
    images: evals.Images | None = None,
) -> evals.EvalInput:
    """What an evaluation reads, from a features stage's tensors; it reports on split `reported`."""
    splits = {
        name: evals.Features(tensors[f"{source}_x"], tensors[f"{source}_y"])
        for name, source in (("train", "train"), ("selection", "selection"), ("test", reported))
    }
    return evals.EvalInput(
        **splits,
        classes=int(max(int(split.y.max()) for split in splits.values())) + 1,
        seed=seed,
        low_shot={budget: [draw.tolist() for draw in draws] for budget, draws in low_shot.items()},
        images=images,
    )


def column_id(evaluation: str, metric: str, primary: bool) -> str:
    """The id by which tables know a metric of what a suite calls `evaluation`."""
    return evaluation if primary else f"{evaluation}.{metric}"


def metric_rows(evaluation: Evaluation, values: Mapping[str, float]) -> list[dict[str, Any]]:
    """The metrics of a result as a record holds them."""
    return [
        {
            "name": metric.name,
            "label": metric.label,
            "value": values[metric.name],
            "unit": metric.unit,
            "higher_is_better": metric.higher_is_better,
            "primary": metric.primary,
        }
        for metric in evaluation.metrics()
    ]
