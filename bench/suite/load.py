"""Suite files: variants x seeds x evaluations and the tables to print, in one or more profiles.

`load_suite` reads, merges and checks a file; every mistake becomes a `UserError` that names the
file, the line and what to write instead. Settings of one row are the profile's, overlaid by the
profile's own `variants` entry of that name, then by the variant's `set`, then by `--set`.
"""

from __future__ import annotations

import re
from dataclasses import dataclass, field
from functools import cache
from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import Field, NonNegativeInt

from bench.errors import UserError, short, suggestion
from bench.suite import rules, yamlfile
from bench.suite.evaluations import Evaluation, declare_all
from bench.suite.messages import check, fault
from bench.suite.search import Cell, SearchSettings, cells_of, of_profile
from maect import datasets, evals
from maect.datasets import DataError, DataInfo
from maect.settings import (
    AugmentSettings,
    DataSettings,
    HeadSettings,
    MAESettings,
    ModelSettings,
    NumericsSettings,
    Settings,
    TuneSettings,
)

#: more seeds than this are a slip of the keyboard
MAX_SEEDS = 1000
#: names of suites and profiles become names of files
_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9_.-]{0,79}")
_AS_A_FILE = "becomes a file's name; write letters, digits, '-' and '_' only"


class RowSettings(Settings):
    """Everything one row's stages depend on, after merging."""

    #: one plain line on what this profile is, printed on top of its tables
    about: str = ""
    data: DataSettings
    model: ModelSettings
    numerics: NumericsSettings = NumericsSettings()
    mae: MAESettings
    head: HeadSettings
    tune: TuneSettings
    #: the pipelines by name; `mae` is the one of MAE pretraining
    augment: dict[str, AugmentSettings]
    #: the split that evaluations report on; choose settings on `selection`, look at `test` once
    report_on: Literal["test", "selection"] = "test"
    #: settings of the evaluations by name; those left out have their defaults. `block` and `pool`
    #: choose other tokens; `evaluation: knn` makes a further one under a name of its own
    evaluations: dict[str, dict[str, Any]] = {}


class VariantSettings(Settings):
    """One row of the tables: a chain of training stages."""

    #: training stages in order; none: what `init` gives is evaluated as it is
    stages: list[Literal["mae", "head", "tune"]] = []
    #: where the encoder starts: random weights, no encoder at all (pixels), or a checkpoint file
    init: str = "random"
    #: pipeline of the head and tuning stages
    augment: str = "min"
    #: a row of `mae` alone trains for as many more steps as that variant's head and tuning cost in
    #: FLOPs; a row of `tune` alone for as many steps as all of that variant's stages cost
    match_compute: str | None = None
    set: dict[str, Any] = {}


class TableSettings(Settings):
    """One printed table."""

    title: str = ""
    #: rows in order; left out: all variants
    rows: list[str] | None = None
    #: evaluations, single metrics as `knn.accuracy_k20`, or `cost`
    columns: list[str] = ["knn", "probe", "cost"]
    groups: dict[str, list[str]] | None = None
    #: the row that the others are compared with
    baseline: str | None = None
    #: behind each metric its mean paired difference from the baseline
    deltas: bool = False
    digits: Annotated[int, Field(ge=0, le=6)] = 1
    #: published figures in grey beside ours
    published: bool = False


class SuiteSettings(Settings):
    suite: Annotated[str, Field(min_length=1)]
    title: str = ""
    notes: list[str] = []
    #: the profile used where none is named
    profile: str
    seeds: Annotated[list[NonNegativeInt], Field(min_length=1)]
    evaluate: Annotated[list[str], Field(min_length=1)]
    variants: Annotated[dict[str, VariantSettings], Field(min_length=1)]
    tables: list[TableSettings] = []
    #: two rows whose encoders are shown beside each other in pictures, e.g. [MAE, MAE-CT]
    gallery: list[str] = []
    search: SearchSettings | None = None
    #: suite files whose profiles this one takes over; its own are laid over them
    profiles_from: str | list[str] | None = None
    profiles: Annotated[dict[str, dict[str, Any]], Field(min_length=1)]


@dataclass(frozen=True)
class Variant:
    """A row with its settings resolved."""

    name: str
    stages: tuple[str, ...]
    init: str
    augment: str
    match_compute: str | None
    row: RowSettings
    #: the suite's evaluations by name, but for those that need an encoder where there is none
    evaluations: dict[str, Evaluation]


@dataclass(frozen=True)
class Suite:
    """A suite file in one profile, checked and resolved."""

    path: Path
    name: str
    title: str
    notes: list[str]
    profile: str
    profiles: list[str]
    about: str
    seeds: list[int]
    variants: dict[str, Variant]
    tables: list[TableSettings]
    search: SearchSettings | None
    #: cell of the search behind a generated row: variant name to its settings
    cells: dict[str, Cell] = field(default_factory=dict)
    #: the two rows of the gallery, or none
    gallery: tuple[str, ...] = ()

    def resolved(self) -> dict[str, Any]:
        """The suite as plain data, every default written out, this profile only."""
        return {
            "suite": self.name,
            "profile": self.profile,
            "seeds": self.seeds,
            "variants": {
                v.name: {
                    "stages": list(v.stages),
                    "init": v.init,
                    "augment": v.augment,
                    "match_compute": v.match_compute,
                    "settings": v.row.resolved()
                    | {"evaluations": {n: e.plain(n) for n, e in v.evaluations.items()}},
                }
                for v in self.variants.values()
            },
            "tables": [t.resolved() for t in self.tables],
            "gallery": list(self.gallery),
        }


@cache
def data_info(settings: DataSettings) -> DataInfo:
    """The data's description, looked up once."""
    return datasets.describe(settings, datasets.data_root())


def load_suite(
    path: Path,
    *,
    profile: str | None = None,
    seeds: int | None = None,
    sets: list[str] | None = None,
) -> Suite:
    """Read and check a suite file. Raises `UserError`; starts and imports nothing heavy."""
    tree = _with_profiles(path)
    overlays = [parse_set(text) for text in sets or []]
    return _Builder(path, tree, overlays, profile).build(seeds)


def _with_profiles(path: Path) -> yamlfile.Map:
    """The file's content, `profiles_from` filled in."""
    tree = yamlfile.load(_existing(path))
    names = tree.get("profiles_from")
    sources = [tree]
    for name in [names] if isinstance(names, str) else names if isinstance(names, list) else []:
        try:
            source = _existing(path.parent / str(name))
        except UserError as error:
            raise fault(str(error), tree, ("profiles_from",)) from None
        inherited = yamlfile.Map(tree.file, tree.line)
        profiles = yamlfile.load(source).get("profiles")
        if isinstance(profiles, yamlfile.Map):
            inherited.put("profiles", profiles, str(source), profiles.line)
        sources.insert(-1, inherited)
    return yamlfile.merge(*sources)


def _existing(path: Path) -> Path:
    try:
        if path.exists():
            return path
        near = suggestion(path.name, [p.name for p in path.parent.glob("*.yaml")])
    except OSError as error:  # a name that no file can have
        near = f": {(error.strerror or str(error)).lower()}"
    shown = str(path) if len(str(path)) < 500 else short(str(path))
    raise UserError(f"there is no suite file '{shown}'{near}")


def parse_set(text: str) -> yamlfile.Map:
    """`path.to.setting=value` of the command line, as a mapping to lay over a profile."""
    path, equals, value = text.partition("=")
    steps = path.strip().split(".")
    origin = f"--set {short(text)}"
    if not equals or not all(steps):
        raise UserError("write it as path=value, e.g. --set mae.steps=100", file=origin)
    if len(steps) > yamlfile.MAX_DEPTH:
        raise UserError("the path has too many parts; write e.g. mae.steps=100", file=origin)
    return _overlay(steps, yamlfile.value(value.strip(), origin), origin, None)


def _overlay(path: list[str], value: Any, file: str, line: int | None) -> yamlfile.Map:
    """The mapping that sets one dotted path, every part of it placed in `file`."""
    tree = yamlfile.Map(file, line)
    inner = tree
    for step in path[:-1]:
        child = yamlfile.Map(file, line)
        inner.put(step, child, file, line)
        inner = child
    inner.put(path[-1], value, file, line)
    return tree


class _Builder:
    """Turns one parsed file into a `Suite`, keeping the place of every value for messages."""

    #: parts of the suite that a profile may replace
    OWN = frozenset({"evaluate", "tables"})

    def __init__(
        self, path: Path, tree: yamlfile.Map, sets: list[yamlfile.Map], profile: str | None
    ) -> None:
        self.path, self.tree, self.sets = path, tree, sets
        self.spec = spec = check(SuiteSettings, tree)
        if not _NAME.fullmatch(spec.suite):
            raise self.fault(f"the suite's name '{short(spec.suite)}' {_AS_A_FILE}", "suite")
        for name in spec.profiles:
            if not _NAME.fullmatch(name):
                raise self.fault(
                    f"the profile's name '{short(name)}' {_AS_A_FILE}", "profiles", name
                )
        self.profile = profile or spec.profile
        if self.profile not in spec.profiles:
            hint = suggestion(self.profile, spec.profiles)
            message = f"there is no profile '{short(self.profile)}'{hint}"
            if profile:
                raise UserError(message, file=path)
            raise self.fault(message, "profile")
        own = tree["profiles"][self.profile]
        for key in sorted(self.OWN & own.keys()):
            if own.lines[key][0] == str(path):  # not those of the suite that the profile is from
                tree.put(key, own[key], *own.lines[key])
        self.spec = check(SuiteSettings, tree)

    def fault(self, message: str, *where: Any) -> UserError:
        return fault(message, self.tree, where)

    def build(self, count: int | None) -> Suite:
        spec = self.spec
        seeds = self.seeds(count)
        base, own = self.profile_tree()
        declared = base.get("evaluations")
        known = {*evals.names(), *(declared if isinstance(declared, yamlfile.Map) else ())}
        for index, name in enumerate(spec.evaluate):
            if name not in known:
                hint = suggestion(name, known)
                raise self.fault(f"there is no evaluation '{short(name)}'{hint}", "evaluate", index)
            if name in spec.evaluate[:index]:
                raise self.fault(f"'{name}' stands twice; keep one", "evaluate", index)
        search = of_profile(spec.search, base, self.tree, self.profile)
        cells = cells_of(search, spec.variants, self.tree)
        template = search.variant if search and search.method != "each" else ""
        rows: dict[str, tuple[str, Cell]]
        rows = {label: (label, {}) for label in spec.variants if label != template}
        if search:
            rows |= {label: (search.variant, cell) for label, cell in cells.items()}
        variants = {
            label: self.variant(label, source, cell, base, own)
            for label, (source, cell) in rows.items()
        }
        rules.check_references(spec, variants, self.tree)
        rules.check_search(search, variants, cells, self.tree)
        return Suite(
            path=self.path,
            name=spec.suite,
            title=spec.title or spec.suite,
            notes=spec.notes,
            profile=self.profile,
            profiles=list(spec.profiles),
            about=next(iter(variants.values())).row.about,
            seeds=seeds,
            variants=variants,
            tables=spec.tables or [TableSettings(columns=[*spec.evaluate, "cost"])],
            search=search,
            cells=cells,
            gallery=tuple(spec.gallery),
        )

    def seeds(self, count: int | None) -> list[int]:
        declared = self.spec.seeds
        for index, seed in enumerate(declared):
            if seed in declared[:index]:
                raise self.fault(f"seed {seed} stands twice; keep one", "seeds", index)
        if len(declared) > MAX_SEEDS:
            raise self.fault(f"more than {MAX_SEEDS} seeds; write fewer", "seeds")
        if count is not None and count > MAX_SEEDS:
            raise UserError(f"write at most {MAX_SEEDS}", file=f"--seeds {count}")
        return seeds_of(declared, count)

    def profile_tree(self) -> tuple[yamlfile.Map, dict[str, yamlfile.Map]]:
        """The profile's settings, and its own overlays by variant."""
        base = yamlfile.merge(self.tree["profiles"][self.profile])
        base.file, base.line = self.tree["profiles"].lines[self.profile]
        where = ("profiles", self.profile, "variants")
        for key in self.OWN:
            base.pop(key, None)
        own = base.pop("variants", None)
        if own is None:
            return base, {}
        if not isinstance(own, yamlfile.Map):
            raise self.fault(
                "'variants' should be a mapping, e.g. {MAE: {mae: {steps: 9}}}", *where
            )
        for name, overlay in own.items():
            if not isinstance(overlay, yamlfile.Map):
                message = (
                    f"'variants.{short(name)}' should be a mapping, e.g. {{mae: {{steps: 9}}}}"
                )
                raise self.fault(message, *where, name)
            # a suite need not have the rows of the one that its profiles come from
            if name not in self.spec.variants and own.lines[name][0] == str(self.path):
                hint = suggestion(name, self.spec.variants)
                raise self.fault(f"there is no variant '{short(name)}'{hint}", *where, name)
        return base, own

    def variant(
        self,
        label: str,
        source: str,
        cell: Cell,
        base: yamlfile.Map,
        own: dict[str, yamlfile.Map],
    ) -> Variant:
        settings, node = self.spec.variants[source], self.tree["variants"][source]
        overlays = [own[source]] if source in own else []
        if settings.set:
            overlays.append(node["set"])
        for path, choice in cell.items():
            if path not in ("augment", "stages"):
                place = self.tree["search"]["grid"].lines[path]
                overlays.append(_overlay(path.split("."), choice.value, *place))
        tree = yamlfile.merge(base, *overlays, *self.sets)
        row = check(RowSettings, tree)
        result = Variant(
            name=label,
            stages=tuple(cell["stages"].value if "stages" in cell else settings.stages),
            init=settings.init,
            augment=cell["augment"].value if "augment" in cell else settings.augment,
            match_compute=settings.match_compute,
            row=row,
            evaluations=declare_all(
                self.spec.evaluate, row.model, tree, pixels=settings.init == "pixels"
            ),
        )
        where: tuple[Any, ...] = ("variants", source)
        rules.check_variant(result, self.tree, ("search", "grid") if "stages" in cell else where)
        at = ("search", "grid", "augment") if "augment" in cell else (*where, "augment")
        try:
            images = data_info(row.data).counts.get("train")
        except DataError as error:
            raise fault(str(error), tree, ("data",)) from None
        rules.check_row(result, images, tree)
        rules.check_augment(result, self.tree, at)
        return result


def seeds_of(declared: list[int], count: int | None) -> list[int]:
    """The first `count` seeds; past the declared ones the numbering goes on."""
    if count is None:
        return declared
    extra = range(max(declared) + 1, max(declared) + 1 + count)
    return [*declared, *extra][:count]
