"""From a suite to its stages: a DAG in which each stage stands once, however many rows share it.

Planning imports neither torch nor Ray. A stage's key comes from its resolved settings, its
inputs' keys and the data's fingerprint; what the store holds under that key decides whether the
stage is cached, stale or to be run.
"""

from __future__ import annotations

from fnmatch import fnmatchcase
from pathlib import Path
from typing import Any

from bench.errors import UserError
from bench.plan import schedules
from bench.plan.identity import code, stage_key
from bench.plan.stage import Plan, Row, Stage, entry_modules
from bench.plan.status import assess, mark
from bench.store.store import Store
from bench.suite.evaluations import Evaluation
from bench.suite.load import Suite, Variant, data_info
from maect import datasets, flops
from maect.datasets import DataInfo
from maect.files import sha256


def encoder_stage(chain: list[Stage]) -> Stage:
    """The last stage of a chain that changed the encoder; else its first, which holds it."""
    return next((stage for stage in reversed(chain) if stage.kind != "head"), chain[0])


class Planner:
    """Builds the stages of a suite; equal keys become one stage."""

    def __init__(self, suite: Suite) -> None:
        self.suite = suite
        self.stages: dict[str, Stage] = {}
        self.data_root = str(datasets.data_root())
        #: SHA-256 of each file of released weights
        self.checksums: dict[str, str] = {}

    def build(self, only: str) -> Plan:
        chosen = [v for v in self.suite.variants.values() if fnmatchcase(v.name, only)]
        if not chosen:
            known = ", ".join(f"'{name}'" for name in self.suite.variants)
            raise UserError(f"--only '{only}' fits no row; rows are {known}", file=self.suite.path)
        rows = [self.row(variant, seed) for variant in chosen for seed in self.suite.seeds]
        self.gallery(rows)
        return Plan(self.suite, rows, self.stages, rows[0].features.data)

    def row(self, variant: Variant, seed: int) -> Row:
        data = data_info(variant.row.data)
        chain: list[Stage] = []
        for kind in variant.stages:
            chain.append(getattr(self, kind)(variant, seed, data, chain))
        features = self.features(variant, seed, data, chain)
        more: list[Stage] = []
        evaluations = {}
        for name, evaluation in variant.evaluations.items():
            source = self.features(variant, seed, data, chain, evaluation)
            if source is not features and source not in more:
                more.append(source)
            evaluations[name] = self.evaluation(variant, seed, data, name, evaluation, source)
        return Row(variant, seed, chain, features, more, evaluations)

    def gallery(self, rows: list[Row]) -> None:
        """The stage of the suite's pictures, for its first seed, where both rows are planned."""
        first = {row.variant.name: row for row in rows if row.seed == self.suite.seeds[0]}
        if not self.suite.gallery or not all(name in first for name in self.suite.gallery):
            return
        before, after = (first[name] for name in self.suite.gallery)
        mae = next(s for row in (before, after) for s in row.chain if s.kind == "mae")
        settings = {name: mae.settings[name] for name in ("data", "model", "numerics", "seed")}
        settings |= {name: mae.settings["train"][name] for name in ("mask_ratio", "norm_pix")}
        settings["split"] = before.variant.row.report_on
        inputs = {"encoder": mae, "before": before.features, "after": after.features}
        label = f"gallery, {before.variant.name} beside {after.variant.name}, seed {before.seed}"
        data, variant = before.features.data, before.variant
        after.gallery = self.add("gallery", label, settings, inputs, data, variant)

    def add(
        self,
        kind: str,
        label: str,
        settings: dict[str, Any],
        inputs: dict[str, Stage],
        data: DataInfo,
        variant: Variant,
        *,
        steps: int | None = None,
        cost: float = 0.0,
    ) -> Stage:
        keys = {name: stage.key for name, stage in inputs.items()}
        key = stage_key(kind, settings, keys, data.fingerprint)
        if key not in self.stages:
            places = {"data_root": self.data_root, "data_path": variant.row.data.path}
            if "weights" in settings:
                places["weights"] = str(Path(variant.init).expanduser().resolve())
            self.stages[key] = Stage(
                kind,
                key,
                label,
                settings,
                inputs,
                data,
                places,
                code(*entry_modules(kind)),
                steps,
                cost,
            )
        return self.stages[key]

    def common(self, variant: Variant, seed: int) -> dict[str, Any]:
        row = variant.row
        data = {k: v for k, v in row.data.resolved().items() if k != "path"}
        model = {k: v for k, v in row.model.resolved().items() if k not in ("pool", "size")}
        return {"data": data, "model": model, "numerics": row.numerics.resolved(), "seed": seed}

    def start(self, variant: Variant) -> dict[str, Any]:
        """What an encoder without an earlier stage starts from."""
        if variant.init in ("random", "pixels"):
            return {"init": variant.init}
        path = Path(variant.init).expanduser()
        if not path.is_file():
            raise UserError(
                f"variant '{variant.name}': there is no checkpoint '{variant.init}'; init is "
                f"'random', 'pixels' or the path of a file",
                file=self.suite.path,
            )
        if variant.init not in self.checksums:
            self.checksums[variant.init] = sha256(path)
        return {"weights": self.checksums[variant.init]}

    def mae(self, variant: Variant, seed: int, data: DataInfo, chain: list[Stage]) -> Stage:
        train = self.schedule(variant, "mae", data)
        label = f"{variant.name if variant.match_compute else 'MAE'}, seed {seed}"
        settings = self.common(variant, seed) | {
            **self.start(variant),
            "views": [view.resolved() for view in variant.row.augment["mae"].views(1)],
        }
        return self.training("mae", label, train, settings, {}, data, variant)

    def schedule(self, variant: Variant, kind: str, data: DataInfo) -> Any:
        """Resolved settings of a row's training stage."""
        other = variant.match_compute
        return schedules.schedule(
            variant, kind, data, self.suite.variants[other] if other else None
        )

    def training(
        self,
        kind: str,
        label: str,
        train: Any,
        settings: dict[str, Any],
        inputs: dict[str, Stage],
        data: DataInfo,
        variant: Variant,
    ) -> Stage:
        """A training stage with its length and cost."""
        settings = settings | {"train": train.resolved()}
        cost = train.steps * schedules.step_flops(variant, kind, train, data)
        return self.add(kind, label, settings, inputs, data, variant, steps=train.steps, cost=cost)

    def contrastive(self, variant: Variant, seed: int, chain: list[Stage]) -> dict[str, Any]:
        views = variant.row.augment[variant.augment].views(2)
        return self.common(variant, seed) | {
            **({} if chain else self.start(variant)),
            "pool": variant.row.model.pool,
            "views": [view.resolved() for view in views],
        }

    def head(self, variant: Variant, seed: int, data: DataInfo, chain: list[Stage]) -> Stage:
        train = self.schedule(variant, "head", data)
        settings = self.contrastive(variant, seed, chain)
        inputs = {"encoder": chain[-1]} if chain else {}
        label = f"{variant.name} head, seed {seed}"
        return self.training("head", label, train, settings, inputs, data, variant)

    def tune(self, variant: Variant, seed: int, data: DataInfo, chain: list[Stage]) -> Stage:
        head, train = variant.row.head, self.schedule(variant, "tune", data)
        settings = self.contrastive(variant, seed, chain) | {
            "head": {
                name: getattr(head, name)
                for name in ("hidden_dim", "predictor_dim", "out_dim", "queue_size")
            },
        }
        inputs = {}
        if chain:
            inputs["encoder"] = encoder_stage(chain)
            if chain[-1].kind == "head":
                inputs["head"] = chain[-1]
        label = f"{variant.name} tuning, seed {seed}"
        return self.training("tune", label, train, settings, inputs, data, variant)

    def features(
        self,
        variant: Variant,
        seed: int,
        data: DataInfo,
        chain: list[Stage],
        evaluation: Evaluation | None = None,
    ) -> Stage:
        """The row's usual features, or those of the tokens that an evaluation declares."""
        settings = self.common(variant, seed) | {"pool": variant.row.model.pool}
        title = f"{variant.name} features"
        if evaluation is not None and evaluation.pool:
            settings["pool"] = evaluation.pool
            if evaluation.block is not None:
                settings["block"] = evaluation.block
            if settings["pool"] != variant.row.model.pool or "block" in settings:
                title += f" ({', '.join(evaluation.said())})"
        label = f"{title}, seed {seed}"
        if not chain:
            settings |= self.start(variant)
            if settings.get("init") != "random":
                del settings["seed"]  # pixels and released weights do not depend on it
                label = title
            if settings.get("init") == "pixels":
                del settings["model"], settings["pool"]
        images = sum(data.counts.values())
        cost = flops.forward_pass(
            variant.row.model, variant.row.data.image_size, data.channels, images
        )
        inputs = {"encoder": encoder_stage(chain)} if chain else {}
        return self.add("features", label, settings, inputs, data, variant, cost=cost)

    def evaluation(
        self,
        variant: Variant,
        seed: int,
        data: DataInfo,
        name: str,
        evaluation: Evaluation,
        features: Stage,
    ) -> Stage:
        settings = evaluation.resolved() | {
            "numerics": variant.row.numerics.resolved(),
            "split": variant.row.report_on,
        }
        inputs = {"features": features}
        label = f"{variant.name} {name}"
        cost, passes = 0.0, evaluation.evaluator.passes
        if passes is not None:
            settings = features.settings | settings
            inputs |= features.inputs
            counts = {"train": 0, "selection": 0, "test": 0} | data.counts
            images = passes(evaluation.settings, counts, data.classes)
            size = variant.row.data.image_size
            cost = images * flops.forward_pass(variant.row.model, size, data.channels, 1)
        if evaluation.evaluator.uses_seed:
            settings["seed"] = seed
        if evaluation.evaluator.uses_seed or "seed" in features.settings:
            label += f", seed {seed}"
        return self.add(evaluation.kind, label, settings, inputs, data, variant, cost=cost)


def make_plan(suite: Suite, store: Store, *, keep_stale: bool = False, only: str = "*") -> Plan:
    """The plan of the rows whose name fits the pattern `only`, with what the store already has."""
    plan = Planner(suite).build(only)
    for stage in plan.stages.values():
        if plan.unresolved is None:
            assess(stage, store, keep_stale=keep_stale)
    mark(plan, store)
    return plan
