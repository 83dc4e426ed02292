"""What a suite file may say, and the suite that it becomes: types, defaults and limits."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal, NamedTuple, Self

from pydantic import (
    AfterValidator,
    ConfigDict,
    Field,
    NonNegativeInt,
    PositiveInt,
    create_model,
    model_validator,
)

from bench.suite.evaluations import Evaluation
from maect import methods
from maect.settings import (
    AugmentSettings,
    DataSettings,
    ModelSettings,
    NumericsSettings,
    Positive,
    Settings,
)

if TYPE_CHECKING:
    StageName = str
else:
    StageName = Literal[tuple(methods.names())]

#: more seeds than this are a slip of the keyboard
MAX_SEEDS = 1000
#: of a suite or a profile: it becomes part of a file's name
FileName = Annotated[str, Field(pattern=r"^[A-Za-z0-9][A-Za-z0-9_.-]{0,79}$")]
#: of an evaluation: the beginning of its columns' names; or of a kind of GPU
Word = Annotated[str, Field(pattern=r"^[A-Za-z0-9][A-Za-z0-9_-]{0,79}$")]


def _each_once(values: list[Any]) -> list[Any]:
    for index, value in enumerate(values):
        if value in values[:index]:
            raise ValueError(f"{value!r} stands twice; keep one")
    return values


#: of a list of names or numbers
Once = AfterValidator(_each_once)


class RowSettings(Settings):
    """Everything one row's stages depend on, after merging."""

    #: one plain line on what this profile is
    about: str = ""
    #: training stages in order; none: what `init` gives is evaluated as it is
    stages: list[StageName] = []
    #: where an encoder without an earlier stage starts: random weights, no encoder at all (pixels),
    #: a checkpoint file, or one of a hub: timm:NAME, hf:OWNER/NAME. A profile's or `--set`'s is of
    #: the rows that name none themselves
    init: str = "random"
    #: the images
    data: DataSettings
    #: the encoder, and the decoder of MAE pretraining
    model: ModelSettings
    #: how it is computed
    numerics: NumericsSettings = NumericsSettings()
    #: the pipelines by name; `mae` is the one of MAE pretraining
    augment: dict[str, AugmentSettings]
    #: the split that evaluations report on; choose settings on `selection`, look at `test` once.
    #: Of a suite with a search `selection` is the default
    report_on: Literal["test", "selection"] = "test"
    #: settings of the evaluations by name; those left out have their defaults. `block` and `pool`
    #: choose other tokens; `evaluation: knn` makes a further one under a name of its own
    evaluations: dict[Word, dict[str, Any]] = {}
    #: factor on the learning rate of a row's last stage: the same search for rows that are unlike
    lr_scale: Positive = 1.0

    def section(self, stage: str) -> Any:
        """Return the settings of a training stage; None where the suite has no such section."""
        return getattr(self, stage)

    @property
    def sections(self) -> dict[str, Any]:
        """Return the settings of all training stages that the suite has sections of, in the order
        of a chain."""
        found = {name: self.section(name) for name in methods.names()}
        return {name: section for name, section in found.items() if section is not None}


#: a row with an optional section for each training stage of `maect.methods`
ROW: type[RowSettings] = create_model(
    "RowSettings",
    __base__=RowSettings,
    **{name: (methods.get(name).settings | None, None) for name in methods.names()},  # type: ignore[call-overload]
)


class VariantSettings(Settings):
    """One row of the tables: a chain of training stages."""

    #: as in a profile; a profile's or a search's `stages` go before
    stages: list[StageName] = []
    #: as in a profile; what stands here goes before
    init: str | None = None
    #: pipeline of the head and tuning stages
    augment: str = "min"
    #: a row of `mae` alone trains for as many more steps as that variant's head and tuning cost in
    #: FLOPs; of any other row the last stage is as long as brings the row to that variant's cost
    match_compute: str | None = None
    #: settings of this row alone, as a profile has them
    set: dict[str, Any] = {}


class TableSettings(Settings):
    """One printed table."""

    #: above the table
    title: str = ""
    #: rows in order; left out: all variants
    rows: list[str] | None = None
    #: evaluations, single metrics as `knn.accuracy_k20`, or `cost`
    columns: list[str] = ["knn", "probe", "cost"]
    #: heading to the columns, or rows, that stand under it
    groups: dict[str, list[str]] | None = None
    #: the row that the others are compared with
    baseline: str | None = None
    #: decimals that are printed
    digits: Annotated[int, Field(ge=0, le=6)] = 1
    #: published figures in grey beside ours
    published: bool = False


class ComparisonSettings(Settings):
    """Two rows to be compared in one column, named before the run."""

    #: an evaluation, or one of its metrics as `knn.accuracy_k20`
    metric: str
    #: the row that should be better
    row: str
    #: the row that it is compared with
    against: str

    @model_validator(mode="after")
    def _two(self) -> Self:
        if self.row == self.against:
            raise ValueError("a comparison is of two rows; name another one as against")
        return self


class SearchSettings(Settings):
    """A search over settings, run by `python -m bench sweep`: each cell becomes a row."""

    #: the variant that the cells vary, or several, each in all cells; it is no row itself, except
    #: with `each` and where a row's cost is matched to it
    variant: str | Annotated[list[str], Field(min_length=1)]
    #: dotted setting, `augment` or `stages`, to the values it takes: a list, or a mapping of
    #: names to values where a value is a mapping itself or long; or, for `random`,
    #: {loguniform: [least, most]}
    grid: dict[str, Any] = Field(min_length=1)
    #: every combination; one setting changed at a time; combinations drawn at random; or those that
    #: Optuna draws as results come in
    method: Literal["grid", "each", "random", "optuna"] = "grid"
    #: combinations that `random` and `optuna` draw
    samples: PositiveInt | None = None
    #: of the draws
    seed: NonNegativeInt = 0
    #: stop cells that fall behind after a seed, through ASHA
    asha: bool = False
    #: points within the first seed's last training stage at which ASHA compares the cells instead:
    #: the last one `reduction` times nearer to its start than its end, and so on
    rungs: Annotated[int, Field(ge=0, le=20)] = 0
    #: of the cells that have come as far, ASHA goes on with one in so many
    reduction: Annotated[float, Field(gt=1)] = 2.0
    #: evaluation whose first metric `optuna` and ASHA go by, on the selection split
    metric: str = "knn"

    @model_validator(mode="after")
    def _fits(self) -> Self:
        draws = self.method in ("random", "optuna")
        if draws and self.samples is None:
            raise ValueError(f"method '{self.method}' needs samples, the number of cells to try")
        if not draws and self.samples is not None:
            raise ValueError("samples goes with methods 'random' and 'optuna'; take it out")
        if self.rungs and not self.asha:
            message = "rungs stop cells, and a grid that is reported runs every cell; add "
            raise ValueError(f"{message}'asha: true' to explore, or take rungs out")
        return self

    @property
    def variants(self) -> list[str]:
        """Return the variants that the cells vary."""
        return [self.variant] if isinstance(self.variant, str) else self.variant

    @property
    def explores(self) -> bool:
        """Return whether results decide which cells are run to their end."""
        return self.asha or self.method == "optuna"

    def rung_steps(self, steps: int) -> list[int]:
        """Return after how many of the steps of a training stage its cell is compared."""
        shares = (self.reduction ** (number - self.rungs) for number in range(self.rungs))
        return [int(steps * share + 1e-6) for share in shares]


def _ray_counts(share: float) -> float:
    if share != round(share, 4):
        raise ValueError(f"Ray counts GPUs in ten-thousandths; write {max(share, 1e-4):.4f}")
    return share


class DeviceSettings(Settings):
    """The GPUs that workers are given, where there are any; part of no key."""

    #: as Ray names it: A100, H100, L4, ...; none: any
    accelerator_type: Word | None = None
    #: of a GPU that each worker holds; below 1 several small stages run side by side on one
    gpu_share: Annotated[float, Field(gt=0, le=1), AfterValidator(_ray_counts)] = 1.0


class ProfileSettings(Settings):
    """A profile: settings of all rows, and what it says of single rows and of the suite."""

    model_config = ConfigDict(extra="allow")

    #: settings of single rows; null: the profile does without that row
    variants: dict[str, dict[str, Any] | None] = {}
    #: keys in place of the suite's own
    search: dict[str, Any] = {}


class SuiteSettings(Settings):
    """A suite file, all profiles in it."""

    #: its name, a part of the names of the files that it leaves
    suite: FileName
    #: of the page; by default the name
    title: str = ""
    #: sentences that stand on the page
    notes: list[str] = []
    #: the profile used where none is named
    profile: str
    #: each trains all rows anew; `--seeds N` takes the first N, or goes on counting
    seeds: Annotated[list[NonNegativeInt], Field(min_length=1, max_length=MAX_SEEDS), Once]
    #: evaluations of every row: those of the package, and those that a profile names
    evaluate: Annotated[list[str], Field(min_length=1), Once]
    #: the rows, by name
    variants: Annotated[dict[str, VariantSettings], Field(min_length=1)]
    #: the tables to print; by default one with all evaluations and the cost
    tables: list[TableSettings] = []
    #: the one comparison that is tested by itself at 5 %; the report opens with its effect
    primary: ComparisonSettings | None = None
    #: further ones to be told there, tested together with those of the tables
    secondary: list[ComparisonSettings] = []
    #: two rows whose encoders are shown beside each other in pictures, e.g. [MAE, MAE-CT]
    gallery: list[str] = []
    #: a search over settings, for `sweep`
    search: SearchSettings | None = None
    #: the GPUs that workers are given
    devices: DeviceSettings = DeviceSettings()
    #: suite files whose profiles this one takes over; its own are laid over them
    profiles_from: str | list[str] | None = None
    #: scales of the suite, by name
    profiles: Annotated[dict[FileName, ProfileSettings], Field(min_length=1)]


class Choice(NamedTuple):
    """A value of one setting, with the name that its rows bear."""

    name: str
    value: Any


#: what a search sets in one of its rows: dotted path of a setting -> its value
Choices = dict[str, Choice]


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
    seeds: list[int]
    variants: dict[str, Variant]
    tables: list[TableSettings]
    search: SearchSettings | None
    #: the rows that the search made: variant name -> what it sets in each
    cells: dict[str, Choices] = field(default_factory=dict)
    #: the two rows of the gallery, or none
    gallery: tuple[str, ...] = ()
    #: comparisons named before the run, the primary one and the others
    primary: ComparisonSettings | None = None
    secondary: list[ComparisonSettings] = field(default_factory=list)
    devices: DeviceSettings = field(default_factory=DeviceSettings)
    #: names of all profiles of the file
    profiles: list[str] = field(default_factory=list)

    @property
    def explores(self) -> bool:
        """Return whether it has a search whose results decide which cells are run to their end."""
        return self.search is not None and self.search.explores

    @property
    def isa(self) -> str:
        """Return the instructions that all rows compute with: a process has those of one kind."""
        return next(iter(self.variants.values())).row.numerics.isa

    def resolved(self) -> dict[str, Any]:
        """Return the suite as a file would say it, every default written out, this profile only.

        Read again it has the same rows with the same keys; a search's cells are rows like others.
        """
        left_out = {"stages", "init", *methods.names()}
        # those with all evaluations first, for their order
        rows = sorted(self.variants.values(), key=lambda v: -len(v.evaluations))
        evaluations = {v.name: {n: e.plain(n) for n, e in v.evaluations.items()} for v in rows}
        declared = {name: told for each in evaluations.values() for name, told in each.items()}
        return {
            "suite": self.name,
            "title": self.title,
            "notes": self.notes,
            "profile": self.profile,
            "seeds": self.seeds,
            "evaluate": list(declared),
            "variants": {
                v.name: {
                    "stages": list(v.stages),
                    "init": v.init,
                    "augment": v.augment,
                    "match_compute": v.match_compute,
                    "set": v.row.model_dump(mode="json", exclude=left_out)
                    | {name: section.resolved() for name, section in v.row.sections.items()}
                    # the learning rate of the last stage has been multiplied by it
                    | {"lr_scale": 1.0, "evaluations": evaluations[v.name]},
                }
                for v in self.variants.values()
            },
            "tables": [t.resolved() for t in self.tables],
            "primary": self.primary and self.primary.resolved(),
            "secondary": [comparison.resolved() for comparison in self.secondary],
            "gallery": list(self.gallery),
            "devices": self.devices.resolved(),
            "profiles": {self.profile: {"evaluations": declared}},
        }
