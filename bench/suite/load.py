"""Suite files: variants x seeds x evaluations and the tables to print, in one or more profiles.

`load_suite` reads, merges and checks a file; every mistake becomes a `UserError` that names the
file, the line and what to write instead. Settings of one row are the profile's, overlaid by the
profile's own `variants` entry of that name, then by the variant's `set`, then by a cell of the
search, then by `--set`.
"""

from __future__ import annotations

import os
from collections.abc import Collection, Sequence
from contextlib import suppress
from functools import cache
from pathlib import Path
from typing import Any

from pydantic import ValidationError

from bench.errors import UserError, several, short, suggestion
from bench.suite import rules
from bench.suite.evaluations import declare_all
from bench.suite.messages import check, fault, require
from bench.suite.schema import MAX_SEEDS, ROW, Choices, Suite, SuiteSettings, TableSettings, Variant
from bench.suite.search import cells_of, varied_by
from bench.suite.yamlfile import Map, Seq, load, locate, merge, overlay, undotted, value
from maect import datasets, evals, methods
from maect.datasets import DataError, DataInfo
from maect.settings import DataSettings

#: parts of the suite that a profile may replace
OWN = ("evaluate", "tables", "primary", "secondary", "devices")
#: what may stand in for a faulty value while the rest of a file is looked at
_NEUTRAL: dict[Any, Any] = {"suite": "suite", "seeds": [0]}
#: two ways to say the same, of which a worker looks at the second where it is there
_FROZEN = ("frozen", "frozen_blocks")


#: what a bundle says of data, for where they are not at hand
told_of = dict[DataSettings, DataInfo]()


@cache
def data_info(settings: DataSettings) -> DataInfo:
    """Return the data's description, looked up once. Raises DataError."""
    try:
        found = datasets.describe(settings, datasets.data_root())
    except DataError:
        if settings not in told_of:
            raise
        return told_of[settings]
    return found if found.fingerprint else told_of.get(settings, found)


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


def faults_of(path: Path, profile: str | None = None) -> tuple[list[UserError], list[str]]:
    """Return every fault of a suite file, by line, and the profiles that were looked at.

    All profiles, unless one is named. One that is only taken over from another file, and does not
    fit this suite, is none of its profiles. What depends on a faulty value is not looked at.
    """
    try:
        tree = _with_profiles(path)
    except UserError as error:
        return error.faults, []
    faults, broken = _mend(tree)
    known, written = tree.get("profiles"), load(path).get("profiles")
    own = {*written} if isinstance(written, Map) else set()
    names = [profile] if profile else [*known] if isinstance(known, Map) else []
    if isinstance(tree.get("profile"), str) and tree["profile"] not in names and not profile:
        try:
            require(tree["profile"], names, "profile", tree, ("profile",))
        except UserError as error:
            faults.append(error)
    for name in [*names]:
        try:
            _Loader(path, merge(tree), [], name, broken).suite(None)
        except UserError as error:
            if name in {*own, profile, tree.get("profile")}:
                faults += error.faults
            else:
                names.remove(name)
    once = {str(fault): fault for fault in faults}
    return sorted(once.values(), key=lambda fault: fault.line), names


def _mend(tree: Map) -> tuple[list[UserError], set[str]]:
    """Take what is no suite's out of a file's content, so that the rest can be looked at.

    Return the faults, and the rows that have one.
    """
    faults, broken = list[UserError](), set[str]()
    for deep in (True, False):
        try:
            SuiteSettings.parse(tree)
            break
        except ValidationError as error:
            places = [wrong["loc"] for wrong in error.errors()]
        try:
            check(SuiteSettings, tree)
        except UserError as told:
            faults = faults or told.faults
        for loc in places:
            broken |= {str(loc[1])} if loc[0] == "variants" and len(loc) > 1 else set()
            _take_out(tree, loc if deep else loc[: 1 + (loc[0] in ("variants", "profiles"))])
    return faults, broken


def _take_out(tree: Map, loc: tuple[Any, ...]) -> None:
    """Take the value at a place out, or put a sound one there."""
    *above, last = loc
    section: Any = tree
    with suppress(LookupError, TypeError):
        for step in above:
            section = section[step]
    if above[:1] == ["variants"] and len(loc) == 2 and isinstance(section, Map):
        section.put(last, Map(*section.place), *section.place)
    elif isinstance(section, Map):
        section.pop(last, None)
    if loc[0] in _NEUTRAL:
        tree.put(loc[0], _NEUTRAL[loc[0]], *tree.place)


def _with_profiles(path: Path) -> Map:
    """Return the file's content, `profiles_from` filled in."""
    tree = load(path)
    sources = [tree]
    for name in _taken_from(tree):
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


def _taken_from(tree: Map) -> list[Any]:
    """Return the files that a suite takes profiles from, as it names them."""
    names = tree.get("profiles_from")
    return names if isinstance(names, list) else [names] if isinstance(names, str) else []


def suite_files(path: Path) -> dict[str, Path]:
    """Return a suite's file and those that it takes profiles from, by their names.

    Raises `UserError` where one lies in another folder.
    """
    names = [path.name, *_taken_from(load(path))]
    for name in names:
        if name != Path(name).name:
            raise UserError(f"it takes profiles from another folder: {name}; copy it", file=path)
    return {name: path.parent / name for name in names}


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

    def __init__(
        self,
        path: Path,
        tree: Map,
        sets: list[Map],
        profile: str | None,
        broken: Collection[str] = (),
    ) -> None:
        #: `broken`: rows that nothing can be said of
        self.path, self.broken = path, broken
        #: each holds one setting of all rows; the GPUs are of no row
        self.sets = [given for given in sets if "devices" not in given]
        self.spec = check(SuiteSettings, tree)
        #: what a reader of the table has to know of the command line
        self.notes: list[str] = []
        profiles = self.spec.profiles
        if profile and profile not in profiles:
            hint = suggestion(profile, profiles)
            raise UserError(f"there is no profile '{short(profile)}'{hint}", file=self.path)
        if not profile:
            require(self.spec.profile, profiles, "profile", tree, ("profile",))
        self.profile = profile or self.spec.profile
        own = tree["profiles"][self.profile]
        for key in OWN:
            if key in own and own.places[key][0] == str(path):  # not those of another suite
                tree.put(key, own[key], *own.places[key])
        if "search" in own:  # each key of it in place of the suite's
            search = merge(tree.get("search") or Map(*own.place))
            for key, given in own["search"].items():
                search.put(key, given, *own["search"].places[key])
            tree.put("search", search, *own.places["search"])
        self.tree = merge(tree, *(given for given in sets if "devices" in given))
        self.spec = check(SuiteSettings, self.tree)
        #: settings of all rows, and the profile's overlays of single ones; None: not in the profile
        self.base, self.overlays = self._settings()
        declared = self.base.get("evaluations")
        self.declared: dict[str, Any] = declared if isinstance(declared, Map) else {}
        #: names that `evaluate` may have
        self.evaluations = {*evals.names(), *self.declared}

    def suite(self, count: int | None) -> Suite:
        """Return the suite with its first `count` seeds. Raises `UserError`."""
        spec, search = self.spec, self.spec.search
        names = [name for name in spec.variants if self.overlays.get(name, {}) is not None]
        # what a search varies is a row only for `each`, or where another row matches its cost
        varied = {*search.variants} if search and search.method != "each" else set()
        varied -= {spec.variants[name].match_compute for name in names}
        rows: dict[str, tuple[str, Choices]] = {n: (n, {}) for n in names if n not in varied}
        cells, variants = dict[str, Choices](), dict[str, Variant]()
        with several() as each:
            with each():
                self._check_evaluations()
            known = False
            with each():
                if search is not None:
                    cells = cells_of(search, names, self.tree)
                    rows |= {n: (varied_by(cell, search), cell) for n, cell in cells.items()}
                known = True
            for label, (source, cell) in rows.items():
                if source not in self.broken:
                    with each():
                        variants[label] = self._variant(label, source, cell)
            if known:
                whole = len(variants) == len(rows) and self.evaluations >= {*spec.evaluate}
                with each():
                    rules.check_suite(spec, rows, variants, self.tree, whole=whole)
        made = [variants[label] for label in cells if label in variants]  # not of broken rows
        rules.check_search(search, made, self.tree)
        return Suite(
            path=self.path,
            name=spec.suite,
            title=spec.title or spec.suite,
            notes=spec.notes + self.notes,
            profile=self.profile,
            seeds=self._seeds(count),
            variants=variants,
            tables=spec.tables or [TableSettings(columns=[*spec.evaluate, "cost"])],
            search=search,
            cells=cells,
            gallery=tuple(spec.gallery),
            primary=spec.primary,
            secondary=spec.secondary,
            devices=spec.devices,
            profiles=[*spec.profiles],
        )

    def _seeds(self, count: int | None) -> list[int]:
        """Return the first `count` seeds; past the declared ones the numbering goes on."""
        seeds = self.spec.seeds
        if count is None:
            return seeds
        if count > MAX_SEEDS:
            raise UserError(f"write at most {MAX_SEEDS}", file=f"--seeds {count}")
        first = max(seeds) + 1
        return [*seeds, *range(first, first + count)][:count]

    def _settings(self) -> tuple[Map, dict[str, Map | None]]:
        """Return the profile's settings of all rows, and what it lays over single rows."""
        base = merge(self.tree["profiles"][self.profile])
        base.place = self.tree["profiles"].places[self.profile]
        own = base.pop("variants", None) or Map(*base.place)
        for key in (*OWN, "search"):
            base.pop(key, None)
        base = undotted(base)
        if self.spec.search is not None and "report_on" not in base:
            base.put("report_on", "selection", *locate(self.tree, ("search",)))
        for name in own:
            # a suite need not have the rows of the one that its profiles come from
            if own.places[name][0] == str(self.path):
                at = ("profiles", self.profile, "variants", name)
                require(name, self.spec.variants, "variant", self.tree, at)
        return base, {name: None if m is None else undotted(m) for name, m in own.items()}

    def _check_evaluations(self) -> None:
        """Raise `UserError` unless each name in `evaluate` is known."""
        with several() as each:
            for index, name in enumerate(self.spec.evaluate):
                with each():
                    require(name, self.evaluations, "evaluation", self.tree, ("evaluate", index))
            for name, given in self.declared.items():
                rows = given.get("rows") if isinstance(given, Map) else None
                # a suite need not have the rows of the one that its profiles come from
                if isinstance(rows, Seq) and rows.place[0] == str(self.path):
                    for index, row in enumerate(rows):
                        at = ("evaluations", name, "rows", index)
                        with each():
                            require(row, self.spec.variants, "variant", self.base, at)

    def _variant(self, label: str, source: str, cell: Choices) -> Variant:
        """Return the row `label`: the variant `source`, changed by a cell of the search."""
        spec, tree = self.spec.variants[source], self._merged(label, source, cell)
        self._require_sections(tree)
        row = check(ROW, tree)
        augment = cell["augment"].value if "augment" in cell else spec.augment
        if augment != "min" or not all(methods.get(stage).pipeline for stage in row.stages):
            holder = ("search", "grid") if "augment" in cell else ("variants", source)
            place = (*holder, "augment")
            require(augment, row.augment, "augment pipeline", self.tree, place)
        if row.stages:
            last = row.section(row.stages[-1]).scaled(row.lr_scale)
            row = row.model_copy(update={row.stages[-1]: last})
        wanted = [name for name in self.spec.evaluate if name in self.evaluations]
        evaluations = declare_all(
            wanted, row.model, row.data, tree, row=source, pixels=row.init == "pixels"
        )
        variant = Variant(
            label, tuple(row.stages), row.init, augment, spec.match_compute, row, evaluations
        )
        others = [(("evaluations", n, "data"), e.data) for n, e in evaluations.items() if e.data]
        for at, data in ((("data",), row.data), *others):
            try:
                data_info(data)
            except DataError as error:
                raise fault(str(error), tree, at) from None
        rules.check_row(variant, data_info(row.data), tree)
        return variant

    def _require_sections(self, tree: Map) -> None:
        """Raise `UserError` where a stage of a row has no section, or one that says no length."""
        stages = tree.get("stages")
        for stage in stages if isinstance(stages, list) else []:
            if not isinstance(stage, str) or stage not in methods.names():
                continue  # told where the row is checked
            for name in filter(None, (methods.get(stage).borrows[0], stage)):
                given = tree.get(name)
                partly = isinstance(given, Map) and not {"steps", "epochs"} & given.keys()
                if given is None or (partly and name not in self.base):
                    raise fault(f"'{name}' is missing; add it", self.base, (name,))

    def _merged(self, label: str, source: str, cell: Choices) -> Map:
        """Return the settings of a row, all layers of them merged. Raises `UserError`."""
        spec, given = self.spec.variants[source], self.tree["variants"][source]
        changes = [self.overlays.get(source), undotted(given["set"]) if spec.set else None]
        sets = self.sets
        if spec.init is not None:  # neither the profile's nor `--set`'s is meant for this row
            changes.insert(0, overlay("init", spec.init, given.places["init"]))
            sets = [one for one in sets if "init" not in one]
        own = merge(Map(*self.base.place), *(change for change in changes if change is not None))
        chosen = self._chosen(cell)
        layers = (self.base, own, *chosen.values(), *sets)
        tree = merge(*layers)
        for path, change in chosen.items():
            if merge(tree, change) != tree:  # its label would say what is not so
                message = f"'{short(path)}' is varied by the search and set here too; keep one"
                raise fault(message, tree, tuple(path.split(".")))
        if merge(tree, own, *chosen.values()) != tree:
            self.notes.append(f"--set replaces settings that the suite gives row '{label}' alone.")
        for stage in methods.names():
            _check_frozen(stage, layers, own, tree)
        if "stages" in given and "stages" not in tree:  # a profile's or a search's go before
            tree.put("stages", given["stages"], *given.places["stages"])
        return tree

    def _chosen(self, cell: Choices) -> dict[str, Map]:
        """Return what a cell of the search sets, by path, but for its variant and pipeline."""
        places = self.tree["search"]["grid"].places if cell else {}
        return {
            path: undotted(overlay(path, choice.value, places[path]))
            for path, choice in cell.items()
            if path not in ("augment", "variant")
        }


def _check_frozen(stage: str, layers: Sequence[Map], own: Map, tree: Map) -> None:
    """Raise `UserError` where a stage's `frozen` is set last, beside a count that goes before."""
    given = [t for layer in layers if isinstance(t := layer.get(stage), Map)]
    set_last = [name for t in given for name in _FROZEN if t.get(name) is not None][-1:]
    # a count of this row alone is meant to go before the profile's share
    alone = isinstance(own.get(stage), Map) and own[stage].get("frozen_blocks") is not None
    section = tree.get(stage)
    count = section.get("frozen_blocks") if isinstance(section, Map) else None
    if count is not None and set_last == ["frozen"] and not alone:
        message = f"'{stage}.frozen' counts for nothing beside frozen_blocks {count}; "
        message += f"set {stage}.frozen_blocks to null as well"
        raise fault(message, tree, (stage, "frozen"))
