"""An evaluation as a suite declares it: which of maect's, its settings, and the tokens it reads."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from functools import cache
from typing import Any

from pydantic import PositiveInt, create_model

from bench.errors import several
from bench.suite.messages import check, fault, require
from bench.suite.yamlfile import Map
from maect import evals
from maect.settings import DataSettings, FeatureSettings, ModelSettings, Settings

#: features that an evaluation reads, in words
POOLS = {"cls": "class token", "mean": "mean of patches", "both": "class token and mean"}


class DeclaredSettings(FeatureSettings):
    """What may be said of any evaluation; its own settings stand beside it."""

    #: which of the evaluations it is, where its name is none of theirs: `evaluation: knn`
    evaluation: str | None = None
    #: the rows that have it; null: all
    rows: list[str] | None = None
    #: how many of the suite's seeds have it, the first ones; null: all
    seeds: PositiveInt | None = None
    #: another data set that it is of, its name or as `data` of a profile; null: the row's own
    data: str | dict[str, Any] | None = None


@dataclass(frozen=True)
class Evaluation:
    """`block` and `pool` are None where the suite declares neither: the row's usual features."""

    kind: str
    settings: Settings
    block: int | list[int] | None = None
    pool: str | None = None
    #: with `block`: whether the final norm follows there, too
    norm: bool = False
    #: the rows that have it; None: all
    rows: list[str] | None = None
    #: how many of the suite's seeds have it, the first ones; None: all
    seeds: int | None = None
    #: the data set that it is of, and its name; None: the one that the row is trained on
    data: DataSettings | None = None
    transfer: str | None = None

    @classmethod
    def of(cls, kind: str, stage: Mapping[str, Any]) -> Evaluation:
        """Return the evaluation that the settings of a stage describe."""
        settings = evals.get(kind).settings.parse(stage["settings"])
        return cls(kind, settings, **stage.get("tokens", {}), transfer=stage.get("transfer"))

    @property
    def evaluator(self) -> evals.Evaluator:
        """Return what computes it."""
        found = evals.get(self.kind)
        return evals.at_blocks(found, self.block) if isinstance(self.block, list) else found

    @property
    def needs_encoder(self) -> bool:
        """Return whether only a row with an encoder can have it."""
        return self.pool is not None or self.evaluator.needs_encoder

    @property
    def tokens(self) -> dict[str, Any]:
        """Return the tokens, if declared, as a stage's settings and a protocol have them."""
        norm = {"norm": True} if self.norm else {}
        return {"tokens": {"block": self.block, "pool": self.pool, **norm}} if self.pool else {}

    def said(self) -> list[str]:
        """Return tokens and data set in words, where they are declared."""
        words = [f"block {self.block}"] if isinstance(self.block, int) else []
        if isinstance(self.block, list):
            words = [f"blocks {', '.join(map(str, self.block))}"]
        words = [f"{word} and the final norm" for word in words] if self.norm else words
        words += [POOLS[self.pool]] if self.pool else []
        return words + ([f"on {self.transfer}"] if self.transfer else [])

    def metrics(self) -> list[evals.Metric]:
        """Return what it prints, the primary metric first; labels name tokens that are declared."""
        said = self.said()[isinstance(self.block, list) :]  # of several, each metric names its own
        return [
            dataclasses.replace(
                metric,
                label=", ".join([metric.label, *said]),
                series=", ".join([metric.series, *said]) if metric.along else "",
            )
            for metric in self.evaluator.metrics(self.settings)
        ]

    def measured(self, values: Mapping[str, float]) -> list[evals.Measured]:
        """Return the metrics with the values of a result, as a record holds them."""
        return [
            evals.Measured(**dataclasses.asdict(metric), value=values[metric.name])
            for metric in self.metrics()
        ]

    def columns(self, name: str) -> dict[str, evals.Metric]:
        """Return its metrics by their ids in tables, where a suite calls it `name`."""
        return {column_id(name, m.name, m.primary): m for m in self.metrics()}

    def resolved(self) -> dict[str, Any]:
        """Return its part of a stage's settings."""
        own = evals.get(self.kind).settings.model_fields
        settings = self.settings.model_dump(mode="json", include={*own})
        transfer = {"transfer": self.transfer} if self.transfer else {}
        return {"settings": settings, **self.tokens, **transfer}

    def plain(self, name: str) -> dict[str, Any]:
        """Return what a suite would write to declare it under `name`."""
        other = {} if name == self.kind else {"evaluation": self.kind}
        data = {} if self.data is None else {"data": self.data.resolved()}
        limits = {"rows": self.rows, "seeds": self.seeds}
        told = {name: value for name, value in limits.items() if value is not None}
        return other | self.resolved()["settings"] | self.tokens.get("tokens", {}) | told | data


def declare_all(
    wanted: Iterable[str],
    model: ModelSettings,
    data: DataSettings,
    tree: Map,
    *,
    row: str | None = None,
    pixels: bool = False,
) -> dict[str, Evaluation]:
    """Return the evaluations `wanted`, by name, as a row's `tree` declares them.

    All others that it declares are checked for their names only. Left out is what names `rows`
    without this `row`, and, of a row of `pixels`, what needs an encoder. Raises `UserError`.
    """
    kinds = {name: name for name in wanted}
    for name, given in tree.get("evaluations", {}).items():
        kind = given.get("evaluation") if isinstance(given, Mapping) else None
        kinds[name] = name if kind is None else str(kind)
        place = ("evaluations", name, *(["evaluation"] if kind else []))
        require(kinds[name], evals.names(), "evaluation", tree, place)
    found = dict[str, Evaluation]()
    with several() as each:
        for name in wanted:
            with each():
                one = _declared(name, kinds[name], model, data, tree)
                if (one.rows is None or row in one.rows) and not (pixels and one.needs_encoder):
                    found[name] = one
    return found


def _declared(
    name: str, kind: str, model: ModelSettings, data: DataSettings, tree: Map
) -> Evaluation:
    """Return the evaluation under `evaluations.<name>` of a row's `tree`. Raises `UserError`."""
    at, depth = ("evaluations", name), model.depth or 0
    found: Any = check(declarable(kind, depth), tree.get("evaluations", {}).get(name, {}), at, tree)
    block = found.blocks(depth)
    blocks = block if isinstance(block, list) else [block or 0]
    if outside := [b for b in blocks if not 0 <= b < depth]:
        written = outside[-1] - depth * (outside[-1] < 0)
        message = f"block {written} is none of the encoder's {depth}; write 0 to {depth - 1}"
        raise fault(message, tree, (*at, "block"))
    if len({*blocks}) < len(blocks):
        raise fault(f"block {found.block} names a block twice", tree, (*at, "block"))
    pool = found.pool or (None if block is None else model.pool)
    if evals.get(kind).joins_blocks and (pool != "both" or not isinstance(block, list)):
        message = f"{kind} reads a list of blocks, class token and mean; write pool: both"
        raise fault(message, tree, at)
    own = Evaluation(kind, found, block, pool, found.norm, found.rows, found.seeds)
    if found.data is None:
        return own
    named = {"name": found.data} if isinstance(found.data, str) else found.data
    settings = {**named, "image_size": data.image_size}
    other = check(DataSettings, settings, (*at, "data"), tree)
    return dataclasses.replace(own, data=other, transfer=other.name)


@cache
def declarable(kind: str, depth: int | None = None) -> type[Settings]:
    """Return the type of what a suite may write of an evaluation, with its usual tokens.

    Of the last blocks these are as many as an encoder of `depth` blocks has.
    """
    own, tokens = evals.get(kind).settings, dict(evals.get(kind).tokens)
    if depth is not None and isinstance(tokens.get("block"), list):
        tokens["block"] = [block for block in tokens["block"] if block >= -depth]
    usual: Any = {n: (FeatureSettings.model_fields[n].annotation, v) for n, v in tokens.items()}
    return create_model(own.__name__, __base__=(own, DeclaredSettings), **usual)


def column_id(evaluation: str, metric: str, primary: bool) -> str:
    """Return the id by which tables know a metric of what a suite calls `evaluation`."""
    return evaluation if primary else f"{evaluation}.{metric}"
