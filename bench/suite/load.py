"""Suite files: variants x seeds x evaluations and the tables to print, in one or more profiles.

`load_suite` reads, merges and checks a file; every mistake becomes a `UserError` that names the
file, the line and what to write instead. Settings of one row are the profile's, overlaid by the
profile's own `variants` entry of that name, then by the variant's `set`, then by `--set`.
"""

from __future__ import annotations

import re
from functools import cache
from pathlib import Path
from typing import Any

from bench.errors import UserError, short, suggestion
from bench.suite import rules, yamlfile
from bench.suite.evaluations import declare_all
from bench.suite.messages import check, fault
from bench.suite.schema import Cell, RowSettings, Suite, SuiteSettings, TableSettings, Variant
from bench.suite.search import cells_of, of_profile
from maect import datasets, evals
from maect.datasets import DataError, DataInfo
from maect.settings import DataSettings

#: more seeds than this are a slip of the keyboard
MAX_SEEDS = 1000
#: names of suites and profiles become names of files
_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9_.-]{0,79}")
_AS_A_FILE = "becomes a file's name; write letters, digits, '-' and '_' only"


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
        """Return the suite with its first `count` seeds. Raises `UserError`."""
        spec, seeds = self.spec, self.seeds(count)
        base, own = self.profile_tree()
        self.check_evaluations(base)
        search = of_profile(spec.search, base, self.tree, self.profile)
        cells = cells_of(search, spec.variants, self.tree)
        # a variant that a search varies is no row itself, unless one setting changes at a time
        varied = search.variant if search and search.method != "each" else None
        variants = {
            name: self.variant(name, name, {}, base, own)
            for name in spec.variants
            if name != varied
        }
        for label, cell in cells.items():
            assert search is not None
            variants[label] = self.variant(label, search.variant, cell, base, own)
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

    def check_evaluations(self, base: yamlfile.Map) -> None:
        """Raise `UserError` unless each name in `evaluate` is known and stands once."""
        declared = base.get("evaluations")
        known = {*evals.names(), *(declared if isinstance(declared, yamlfile.Map) else ())}
        names = self.spec.evaluate
        for index, name in enumerate(names):
            if name not in known:
                hint = suggestion(name, known)
                raise self.fault(f"there is no evaluation '{short(name)}'{hint}", "evaluate", index)
            if name in names[:index]:
                raise self.fault(f"'{name}' stands twice; keep one", "evaluate", index)

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
