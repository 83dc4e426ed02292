"""From a suite to its stages: a DAG in which each stage stands once, however many rows share it.

Planning imports neither torch nor Ray. A stage's key comes from its resolved settings, its
inputs' keys and the data's fingerprint. Every number that a worker computes with stands in these
settings: lengths in steps, peak rates, frozen blocks.
"""

from __future__ import annotations

import math
import os
from collections.abc import Mapping
from dataclasses import dataclass, field
from fnmatch import fnmatchcase
from functools import cache
from pathlib import Path
from typing import Any

from bench.environment import processors
from bench.errors import UserError, short, suggestion
from bench.plan.identity import code, stage_key
from bench.plan.stage import Plan, Row, Rung, Stage, entry_modules
from bench.plan.status import assess_all
from bench.store import calibration
from bench.store.store import Store
from bench.suite.evaluations import Evaluation
from bench.suite.load import data_info
from bench.suite.schema import SearchSettings, Suite, Variant
from maect import datasets, flops, hub, methods
from maect.datasets import DataInfo, lists
from maect.files import sha256
from maect.methods import Method
from maect.settings import DataSettings

#: settings of the data that say where it is or stand in for it while it is not here
_NOT_IN_KEY = ("path", "stage", "train_images", "classes", "low_shot")


def make_plan(
    suite: Suite, store: Store | None, *, keep_stale: bool = False, only: str = "*"
) -> Plan:
    """Return the plan of the rows whose name fits `only`, with what a store already has.

    Raises `UserError` where no row fits, a file of released weights is missing, or nothing tells
    how many training images there are.
    """
    plan = _Planner(suite, {} if store is None else store.processors).build(only)
    plan.keep_stale = keep_stale
    if store is not None:
        assess_all(plan, store)
        plan.calibration = calibration.read(store.root)
    return plan


@cache
def released(init: str) -> Path:
    """Return the file of weights that `init` means. Raises `hub.CheckpointError`."""
    path = Path(init).expanduser()
    if hub.is_name(init):
        return hub.find(init)
    if not path.is_file():
        raise hub.CheckpointError(
            f"there is no checkpoint '{init}'; init is 'random', 'pixels', the path of a file, "
            f"timm:NAME or hf:OWNER/NAME"
        )
    return path


class _Planner:
    """Collects the stages of a suite; equal keys become one stage."""

    def __init__(self, suite: Suite, processors: Mapping[str, str | None]) -> None:
        #: `processors`: of a store's records, by instructions; this machine's where it is not told
        self.suite, self.processors = suite, processors
        self.stages: dict[str, Stage] = {}
        self.data_root = str(datasets.data_root())
        #: what identifies released weights, by `init`
        self.weights: dict[str, dict[str, Any]] = {}

    def build(self, only: str) -> Plan:
        """Return the plan, no stage of it assessed yet."""
        chosen = [v for v in self.suite.variants.values() if fnmatchcase(v.name, only)]
        if not chosen:
            hint = suggestion(only, self.suite.variants)
            raise UserError(f"--only '{short(only)}' fits no row{hint}", file=self.suite.path)
        own = [variant.row.data for variant in chosen]
        others = [e.data for v in chosen for e in v.evaluations.values() if e.data is not None]
        for data in map(data_info, own + others):
            if "train" not in data.counts:
                raise UserError(str(data.hint), file=self.suite.path)
        rows = [
            _RowPlanner(self, variant, seed).row()
            for variant in chosen
            for seed in self.suite.seeds
        ]
        self._add_gallery(rows)
        return Plan(self.suite, rows, self.stages, rows[0].features.data)

    def add(
        self,
        kind: str,
        title: str,
        settings: dict[str, Any],
        inputs: dict[str, Stage],
        variant: Variant,
        *,
        data: DataSettings | None = None,
        steps: int | None = None,
        cost: float = 0.0,
    ) -> Stage:
        """Return the stage of these settings and inputs, new or known; `cost` in FLOPs.

        `data` is the stage's, by default the row's.
        """
        place = data or variant.row.data
        info = data_info(place)
        keys = {name: stage.key for name, stage in inputs.items()}
        key = stage_key(kind, settings, keys, info.fingerprint)
        if key not in self.stages:
            places = {"data_root": self.data_root, "data_path": place.path}
            places["data_stage"] = place.stage
            if "lists" in settings:
                places["low_shot"] = place.low_shot
            if settings.get("weights"):  # else they need not be here
                places["weights"] = str(released(variant.init).absolute())
            hashes = code(*entry_modules(kind))
            self.stages[key] = Stage(
                kind, key, title, settings, inputs, info, places, hashes, steps, cost
            )
        return self.stages[key]

    def _add_gallery(self, rows: list[Row]) -> None:
        """Add the stage of the suite's pictures, for its first seed, if both rows are planned."""
        first = {row.variant.name: row for row in rows if row.seed == self.suite.seeds[0]}
        if not self.suite.gallery or not all(name in first for name in self.suite.gallery):
            return
        before, after = (first[name] for name in self.suite.gallery)
        mae = next(s for row in (before, after) for s in row.chain if s.kind == "mae")
        settings = {name: mae.settings[name] for name in ("data", "model", "numerics", "seed")}
        settings |= {name: mae.settings["train"][name] for name in ("mask_ratio", "norm_pix")}
        settings["split"] = before.variant.row.report_on
        inputs = {"encoder": mae, "before": before.features, "after": after.features}
        title = f"gallery, {before.variant.name} beside {after.variant.name}, seed {before.seed}"
        after.gallery = self.add("gallery", title, settings, inputs, before.variant)


@dataclass
class _RowPlanner:
    """Plans one variant with one seed."""

    planner: _Planner
    variant: Variant
    seed: int
    chain: list[Stage] = field(default_factory=list)

    def row(self) -> Row:
        """Return the row, its stages planned in order."""
        for kind in self.variant.stages:
            self.chain.append(self._training(methods.get(kind)))
        features = self._features()
        evaluations = {}
        earlier = self.planner.suite.seeds.index(self.seed)  # how many seeds come before this one
        for name, evaluation in self.variant.evaluations.items():
            if evaluation.seeds is None or earlier < evaluation.seeds:
                source = self._features(evaluation)
                evaluations[name] = self._evaluation(name, evaluation, source)
        search, cells = self.planner.suite.search, self.planner.suite.cells
        if search and search.rungs and self.variant.name in cells and not earlier:
            self._add_rungs(search, encoder_stage(self.chain), evaluations[search.metric])
        return Row(self.variant, self.seed, self.chain, features, evaluations)

    def _add_rungs(self, search: SearchSettings, stage: Stage, evaluation: Stage) -> None:
        """Let a search compare its cells within a stage. Raises `UserError` where it cannot."""
        problem, steps = None, search.rung_steps(stage.steps or 0)
        if stage.rungs:
            problem = f"'{self.variant.name}' trains like another cell, and rungs tell none apart"
        elif steps[0] < 1 or len({*steps, stage.steps}) <= len(steps):
            problem = f"{stage.title} has {stage.steps} steps, too few for {len(steps)} rungs with "
            problem += f"reduction {search.reduction:g} (they would be at {steps})"
        if problem:
            raise UserError(f"{problem}; lower search.rungs to 0", file=self.planner.suite.path)
        stage.rungs = [Rung(step, evaluation) for step in steps]

    @property
    def data(self) -> DataInfo:
        """Return what is known of the row's data set."""
        return data_info(self.variant.row.data)

    # ----------------------------------------------------------------------- what settings hold

    def _common(self) -> dict[str, Any]:
        """Return what the settings of all stages hold that run an encoder."""
        row = self.variant.row
        data = _data_settings(row.data)
        model = {k: v for k, v in row.model.resolved().items() if k not in ("pool", "size")}
        return {"data": data, "model": model, "numerics": self._numerics(), "seed": self.seed}

    def _numerics(self) -> dict[str, Any]:
        """Return the row's numerics with the class of processors whose bits are equal."""
        numerics, told = self.variant.row.numerics, self.planner.processors
        known = told[numerics.isa] if numerics.isa in told else processors(numerics.isa)
        return numerics.resolved() | {"processors": known}

    def _start(self) -> dict[str, Any]:
        """Return what identifies the weights that an encoder without an earlier stage starts from:
        `init`, or of released ones their SHA-256, and their network where a file beside names it.

        Without the data no key is known, so the weights need not be here either: their name
        tells rows apart. Raises `UserError`.
        """
        init, known = self.variant.init, self.planner.weights
        if init in ("random", "pixels"):
            return {"init": init}
        if self.data.fingerprint is None and not os.path.isfile(os.path.expanduser(init)):
            return {"weights": "", "init": init}
        if init not in known:
            try:
                path = released(init)
                network = hub.network(path)
            except hub.CheckpointError as error:
                told = f"variant '{self.variant.name}': {error}"
                raise UserError(told, file=self.planner.suite.path) from None
            known[init] = {"weights": sha256(path), **({"network": network} if network else {})}
        return known[init]

    # -------------------------------------------------------------------------------- training

    def _training(self, method: Method) -> Stage:
        """Return a training stage; rows share it where nothing tells them apart."""
        variant, row, kind = self.variant, self.variant.row, method.name
        matched = self.planner.suite.variants.get(variant.match_compute or "")
        train = schedule(variant, kind, self.data, matched)
        borrowed = _borrowed(variant, method)
        options = methods.options_of(train, borrowed)
        settings = self._common() | ({} if self.chain else self._start())
        if not method.pipeline:
            settings["pool"] = row.model.pool
        views = row.augment[method.pipeline or variant.augment].views(getattr(train, "views", 2))
        if count := getattr(options, "local_views", 0):
            crop = {"crop_scale": options.local_scale}
            views += [views[-1].model_copy(update=crop)] * count
        settings["views"] = [view.resolved() for view in views]
        if borrowed:
            settings["head"] = borrowed
        settings["train"] = train.resolved()
        inputs = {"encoder": encoder_stage(self.chain)} if self.chain else {}
        if self.chain and self.chain[-1].kind == method.starts_from:
            inputs["head"] = self.chain[-1]
        name = f"{variant.name} {method.part}"
        if method.pipeline:
            name = variant.name if variant.match_compute else kind.upper()
        return self.planner.add(
            kind,
            f"{name}, seed {self.seed}",
            settings,
            inputs,
            variant,
            steps=train.steps,
            cost=train.steps * step_flops(variant, method, train, self.data),
        )

    # ------------------------------------------------------------------------------- evaluation

    def _features(self, evaluation: Evaluation | None = None) -> Stage:
        """Return the row's usual features, or those that an evaluation declares, by the tokens
        read and the data set."""
        row, info = self.variant.row, self.data
        other = evaluation.data if evaluation else None
        settings = self._common() | {"pool": row.model.pool}
        title = f"{self.variant.name} features"
        if evaluation and evaluation.pool:
            tokens = evaluation.tokens["tokens"]
            settings |= {name: value for name, value in tokens.items() if value is not None}
            if evaluation.evaluator.joins_blocks:
                settings["splits"] = ["selection", "test"]
            if settings["pool"] != row.model.pool or "block" in settings:
                title += f" ({', '.join(evaluation.said())})"
        if other is not None:
            settings["data"] = _data_settings(other)
            info = data_info(other)
            title += f" of {other.name}"
            if info.channels != self.data.channels:
                settings["channels"] = self.data.channels
        if not self.chain:
            settings |= self._start()
            if settings.get("init") != "random":
                del settings["seed"]  # pixels and released weights do not depend on it
            if settings.get("init") == "pixels":
                del settings["model"], settings["pool"]
                settings.pop("channels", None)
        inputs = {"encoder": encoder_stage(self.chain)} if self.chain else {}
        title += f", seed {self.seed}" if "seed" in settings else ""
        cost = self._forward(sum(info.counts.values()))
        return self.planner.add(
            "features", title, settings, inputs, self.variant, data=other, cost=cost
        )

    def _evaluation(self, name: str, evaluation: Evaluation, features: Stage) -> Stage:
        """Return the stage of an evaluation that the suite calls `name`."""
        evaluator, row = evaluation.evaluator, self.variant.row
        info = data_info(evaluation.data or row.data)
        settings = evaluation.resolved() | {"numerics": self._numerics(), "split": row.report_on}
        if "budgets" in settings["settings"]:
            settings |= _labelled(evaluation.data or row.data)
        inputs, cost = {"features": features}, 0.0
        if evaluator.passes is not None:
            settings = features.settings | settings
            inputs |= features.inputs
            counts = {"train": 0, "selection": 0, "test": 0} | info.counts
            cost = self._forward(evaluator.passes(evaluation.settings, counts, info.classes))
        if evaluator.uses_seed:
            settings["seed"] = self.seed
        title = f"{self.variant.name} {name}"
        if evaluator.uses_seed or "seed" in features.settings:
            title += f", seed {self.seed}"
        return self.planner.add(
            evaluation.kind, title, settings, inputs, self.variant, data=evaluation.data, cost=cost
        )

    def _forward(self, images: float) -> float:
        """Return the FLOPs of the encoder on so many images."""
        row = self.variant.row
        size = row.data.image_size
        return flops.forward_pass(row.model, size, self.data.channels, images)


def _data_settings(data: DataSettings) -> dict[str, Any]:
    """Return what a stage's settings hold of its data."""
    found = {name: value for name, value in data.resolved().items() if name not in _NOT_IN_KEY}
    if data.selection is None:  # what the data's fingerprint says
        del found["selection"]
    return found


def _labelled(data: DataSettings) -> dict[str, Any]:
    """Return what tells the labelled images where they are not those of the usual splits."""
    told: dict[str, Any] = {"selection": data.selection}
    if data.low_shot is not None:
        told["lists"] = lists.checksum(data.low_shot)
    return {name: value for name, value in told.items() if value is not None}


def encoder_stage(chain: list[Stage]) -> Stage:
    """Return a chain's last stage that changed the encoder; else its first, which holds it."""
    changed = (s for s in reversed(chain) if methods.get(s.kind).part != "head")
    return next(changed, chain[0])


# ------------------------------------------------------------------ schedules and what they cost


def schedule(variant: Variant, kind: str, data: DataInfo, matched: Variant | None = None) -> Any:
    """Return the resolved settings of a training stage: steps, peak rates, frozen blocks.

    With `matched` the last stage of a row is stretched, warm-up and decay with it, until the row
    costs at least as many FLOPs as that row. An MAE alone takes its own steps and as many more as
    all other stages of `matched` cost. Raises `UserError` where the stages before the last one cost
    as much already.
    """
    images, depth = data.counts["train"], variant.row.model.depth or 0
    settings = variant.row.section(kind)
    train = settings.resolve(images, depth)
    if matched is None or kind != variant.stages[-1]:
        return train
    own = train.steps or 0 if kind == "mae" else 0
    cost = math.fsum(_cost(matched, n, data) for n in matched.stages if n != "mae" or not own)
    cost -= math.fsum(_cost(variant, name, data) for name in variant.stages[:-1])
    steps = own + math.ceil(cost / step_flops(variant, methods.get(kind), train, data))
    if steps < 1:
        raise UserError(
            f"variant '{variant.name}': its stages before '{kind}' cost as many FLOPs as all of "
            f"'{matched.name}'; shorten them or take match_compute out"
        )
    return settings.model_copy(update={"steps": steps, "epochs": None}).resolve(images, depth)


def _cost(variant: Variant, kind: str, data: DataInfo) -> float:
    """Return the FLOPs of a stage of a row that is matched to none."""
    train = schedule(variant, kind, data)
    return float(train.steps * step_flops(variant, methods.get(kind), train, data))


def step_flops(variant: Variant, method: Method, train: Any, data: DataInfo) -> float:
    """Return the FLOPs of one step of a training stage, with its resolved settings `train`."""
    options, row = methods.options_of(train, _borrowed(variant, method)), variant.row
    return flops.step(method, row.model, options, row.data.image_size, data.channels)


def _borrowed(variant: Variant, method: Method) -> dict[str, Any]:
    """Return what a stage takes of another section's settings."""
    section, names = method.borrows
    return variant.row.section(section).model_dump(mode="json", include={*names}) if names else {}
