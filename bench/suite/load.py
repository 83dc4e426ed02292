"""Suite files: variants x seeds x evaluations and the tables to print, in one or more profiles.

`load_suite` reads, merges and checks a file; every mistake becomes a `UserError` that names the
file, the line and what to write instead. Settings of one row are the profile's, overlaid by the
profile's own `variants` entry of that name, then by the variant's `set`, then by `--set`.
"""

from __future__ import annotations

import os
import re
from functools import cache
from pathlib import Path
from typing import Any

from bench.errors import UserError, nearest_file, short, suggestion
from bench.suite import rules
from bench.suite.evaluations import declare_all
from bench.suite.messages import check, fault, require
from bench.suite.schema import Choices, RowSettings, Suite, SuiteSettings, TableSettings, Variant
from bench.suite.search import cells_of, of_profile, varied_by
from bench.suite.yamlfile import Map, Seq, load, merge, overlay, undotted, value
from maect import datasets, evals
from maect.datasets import DataError, DataInfo
from maect.settings import DataSettings

#: more seeds than this are a slip of the keyboard
MAX_SEEDS = 1000
#: names of suites and profiles become names of files
_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9_.-]{0,79}")
#: parts of the suite that a profile may replace
_OWN = ("evaluate", "tables", "primary", "secondary")
#: two ways to say the same, of which a worker looks at the second where it is there
_FROZEN = ("frozen", "frozen_blocks")


@cache
def data_info(settings: DataSettings) -> DataInfo:
    """Return the data's description, looked up once. Raises DataError."""
    return datasets.describe(settings, datasets.data_root())


def load_suite(
    path: Path,
    *,
    profile: str | None = None,
    seeds: int | None = None,
    sets: list[str] | None = None,
) -> Suite:
    """Return the suite in a file, read and checked; imports nothing heavy. Raises `UserError`.

    `profile`: the one to use in place of the suite's own choice. `seeds`: how many. `sets`: further
    settings of all rows, each as `path.to.setting=value`.
    """
    tree = _with_profiles(path)
    overlays = [parse_set(text) for text in sets or []]
    return _Loader(path, tree, overlays, profile).suite(seeds)


def _with_profiles(path: Path) -> Map:
    """Return the file's content, `profiles_from` filled in."""
    tree = load(_existing(path))
    names = tree.get("profiles_from")
    sources = [tree]
    for name in [names] if isinstance(names, str) else names if isinstance(names, list) else []:
        source = path.parent / str(name)
        if not os.path.exists(source):  # names are relative to the suite's folder
            beside = [file.name for file in path.parent.glob("*.y*ml")]
            require(str(name), beside, "suite file", tree, ("profiles_from",))
        inherited = Map(*tree.place)
        profiles = load(source).get("profiles")
        if isinstance(profiles, Map):
            inherited.put("profiles", profiles, *profiles.place)
        sources.insert(-1, inherited)
    return merge(*sources)


def _existing(path: Path) -> Path:
    """Return `path`. Raises `UserError` where there is no such file."""
    try:
        os.stat(path)
    except (FileNotFoundError, NotADirectoryError):
        pass
    except OSError:
        return path  # who reads it tells why it cannot be read
    else:
        return path
    near = nearest_file(path, Path("suites"), path.parent / "suites", pattern="*.y*ml")
    raise UserError(f"there is no suite file '{short(str(path), 240)}'{near}")


def parse_set(text: str) -> Map:
    """Return `path.to.setting=value` of the command line as a mapping to lay over a profile.

    Raises `UserError`.
    """
    path, equals, given = text.partition("=")
    origin = f"--set {short(text)}"
    if not equals:
        raise UserError("write it as path=value, e.g. --set mae.steps=100", file=origin)
    return undotted(overlay(path.strip(), value(given.strip(), origin), (origin, None)))


class _Loader:
    """Turns one parsed file into a `Suite`, keeping the place of every value for messages."""

    def __init__(self, path: Path, tree: Map, sets: list[Map], profile: str | None) -> None:
        self.path, self.tree, self.sets = path, tree, sets
        self.spec = check(SuiteSettings, tree)
        #: what a reader of the table has to know of the command line
        self.notes: list[str] = []
        self.profile = self._profile(profile)
        own = tree["profiles"][self.profile]
        for key in _OWN:
            if key in own and own.places[key][0] == str(path):  # not those of another suite
                tree.put(key, own[key], *own.places[key])
        self.spec = check(SuiteSettings, tree)
        #: settings of all rows, and the profile's overlays of single ones
        self.base, self.overlays = self._settings()

    def suite(self, count: int | None) -> Suite:
        """Return the suite with its first `count` seeds. Raises `UserError`."""
        spec, seeds = self.spec, self._seeds(count)
        self._check_evaluations()
        search = of_profile(spec.search, self.tree, self.profile)
        cells = cells_of(search, spec.variants, self.tree)
        # what a search varies is a row only for `each`, or where another row matches its cost
        varied = {*search.variants} if search and search.method != "each" else set()
        varied -= {variant.match_compute for variant in spec.variants.values()}
        variants = {n: self._variant(n, n, {}) for n in spec.variants if n not in varied}
        if search is not None:
            variants |= {
                label: self._variant(label, varied_by(cell, search), cell)
                for label, cell in cells.items()
            }
        rules.check_suite(spec, variants, self.tree)
        rules.check_search(search, [variants[label] for label in cells], self.tree)
        return Suite(
            path=self.path,
            name=spec.suite,
            title=spec.title or spec.suite,
            notes=spec.notes + self.notes,
            profile=self.profile,
            seeds=seeds,
            variants=variants,
            tables=spec.tables or [TableSettings(columns=[*spec.evaluate, "cost"])],
            search=search,
            cells=cells,
            gallery=tuple(spec.gallery),
            primary=spec.primary,
            secondary=spec.secondary,
        )

    def _fault(self, message: str, *place: Any) -> UserError:
        return fault(message, self.tree, place)

    def _profile(self, chosen: str | None) -> str:
        """Return the name of the profile to use; all names are checked."""
        profiles = self.spec.profiles
        names: list[tuple[str, str, tuple[str, ...]]] = [("suite", self.spec.suite, ("suite",))]
        names += [("profile", name, ("profiles", name)) for name in profiles]
        for what, name, place in names:
            if not _NAME.fullmatch(name):
                message = (
                    f"the {what}'s name '{short(name)}' becomes a file's name; write letters, "
                )
                raise self._fault(f"{message}digits, '-' and '_' only", *place)
        if chosen and chosen not in profiles:
            hint = suggestion(chosen, profiles)
            raise UserError(f"there is no profile '{short(chosen)}'{hint}", file=self.path)
        if not chosen:
            require(self.spec.profile, profiles, "profile", self.tree, ("profile",))
        return chosen or self.spec.profile

    def _seeds(self, count: int | None) -> list[int]:
        """Return the first `count` seeds; past the declared ones the numbering goes on."""
        seeds = self.spec.seeds
        for index, seed in enumerate(seeds):
            if seed in seeds[:index]:
                raise self._fault(f"seed {seed} stands twice; keep one", "seeds", index)
        if len(seeds) > MAX_SEEDS:
            raise self._fault(f"more than {MAX_SEEDS} seeds; write fewer", "seeds")
        if count is None:
            return seeds
        if count > MAX_SEEDS:
            raise UserError(f"write at most {MAX_SEEDS}", file=f"--seeds {count}")
        first = max(seeds) + 1
        return [*seeds, *range(first, first + count)][:count]

    def _settings(self) -> tuple[Map, Map]:
        """Return the profile's settings of all rows, and what it lays over single rows."""
        base, where = merge(self.tree["profiles"][self.profile]), ("profiles", self.profile)
        base.place = self.tree["profiles"].places[self.profile]
        own = base.pop("variants", None)
        for key in (*_OWN, "search"):
            base.pop(key, None)
        base = undotted(base)
        if own is None:
            return base, Map(*base.place)
        if not isinstance(own, Map):
            message = "'variants' should be a mapping, e.g. {MAE: {mae: {steps: 9}}}"
            raise self._fault(message, *where, "variants")
        for name, changes in own.items():
            place = (*where, "variants", name)
            if not isinstance(changes, Map):
                message = (
                    f"'variants.{short(name)}' should be a mapping, e.g. {{mae: {{steps: 9}}}}"
                )
                raise self._fault(message, *place)
            own[name] = undotted(changes)
            # a suite need not have the rows of the one that its profiles come from
            if own.places[name][0] == str(self.path):
                require(name, self.spec.variants, "variant", self.tree, place)
        return base, own

    def _check_evaluations(self) -> None:
        """Raise `UserError` unless each name in `evaluate` is known and stands once."""
        declared, names = self.base.get("evaluations"), self.spec.evaluate
        known = {*evals.names(), *(declared if isinstance(declared, Map) else ())}
        for index, name in enumerate(names):
            require(name, known, "evaluation", self.tree, ("evaluate", index))
            if name in names[:index]:
                raise self._fault(f"'{name}' stands twice; keep one", "evaluate", index)
        for name, given in (declared if isinstance(declared, Map) else {}).items():
            rows = given.get("rows") if isinstance(given, Map) else None
            # a suite need not have the rows of the one that its profiles come from
            if isinstance(rows, Seq) and rows.place[0] == str(self.path):
                for index, row in enumerate(rows):
                    at = ("evaluations", name, "rows", index)
                    require(row, self.spec.variants, "variant", self.base, at)

    def _variant(self, label: str, source: str, cell: Choices) -> Variant:
        """Return the row `label`: the variant `source`, changed by a cell of the search."""
        spec = self.spec.variants[source]
        own = merge(Map(*self.base.place), *self._changes(source))
        chosen = self._chosen(cell)
        layers = (self.base, own, *chosen.values(), *self.sets)
        tree = merge(*layers)
        for path, change in chosen.items():
            if merge(tree, change) != tree:  # its label would say what is not so
                message = f"'{short(path)}' is varied by the search and set here too; keep one"
                raise fault(message, tree, tuple(path.split(".")))
        if merge(tree, own, *chosen.values()) != tree:
            self.notes.append(f"--set replaces settings that the suite gives row '{label}' alone.")
        row = check(RowSettings, tree)
        tunes = [t for layer in layers if isinstance(t := layer.get("tune"), Map)]
        given = [name for t in tunes for name in _FROZEN if t.get(name) is not None]
        exempt = (own.get("tune") or {}).get("frozen_blocks") is not None  # of this row alone
        if row.tune.frozen_blocks is not None and given[-1] == "frozen" and not exempt:
            message = "'tune.frozen' counts for nothing beside frozen_blocks "
            message += f"{row.tune.frozen_blocks}; set tune.frozen_blocks to null as well"
            raise fault(message, tree, ("tune", "frozen"))
        stages = tuple(cell["stages"].value if "stages" in cell else spec.stages)
        if stages:
            last = getattr(row, stages[-1]).scaled(row.lr_scale)
            row = row.model_copy(update={stages[-1]: last})
        variant = Variant(
            name=label,
            stages=stages,
            init=spec.init,
            augment=cell["augment"].value if "augment" in cell else spec.augment,
            match_compute=spec.match_compute,
            row=row,
            evaluations=declare_all(
                self.spec.evaluate,
                row.model,
                row.data,
                tree,
                row=source,
                pixels=spec.init == "pixels",
            ),
        )

        def place(name: str) -> tuple[Any, ...]:
            return ("search", "grid", name) if name in cell else ("variants", source, name)

        rules.check_variant(variant, self.tree, place)
        others = ((("evaluations", n, "data"), e.data) for n, e in variant.evaluations.items())
        for at, data in ((("data",), row.data), *others):
            try:
                data_info(data or row.data)
            except DataError as error:
                raise fault(str(error), tree, at) from None
        rules.check_row(variant, data_info(row.data).counts.get("train"), tree)
        return variant

    def _changes(self, source: str) -> list[Map]:
        """Return what the suite lays over the profile's settings for one row, in order."""
        changes = [self.overlays[source]] if source in self.overlays else []
        if self.spec.variants[source].set:
            changes.append(undotted(self.tree["variants"][source]["set"]))
        return changes

    def _chosen(self, cell: Choices) -> dict[str, Map]:
        """Return what a cell of the search sets, by path, but for the chain and its pipeline."""
        places = self.tree["search"]["grid"].places if cell else {}
        return {
            path: undotted(overlay(path, choice.value, places[path]))
            for path, choice in cell.items()
            if path not in ("augment", "stages", "variant")
        }
