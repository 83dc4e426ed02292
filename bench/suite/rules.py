"""Limits that join several settings of a suite: what each alone allows, but not together.

All functions raise `UserError`, with the place of the value that should change.
"""

from __future__ import annotations

import itertools
from pathlib import Path
from typing import TYPE_CHECKING, Any

from bench.errors import short, suggestion
from bench.suite.messages import fault
from bench.suite.yamlfile import Map
from maect.settings import TRAINING_STAGES

if TYPE_CHECKING:
    from bench.suite.schema import SuiteSettings, Variant

#: what the two rows of a gallery must have in common
_SAME = ("data", "report_on")
#: every choice of training stages in their order forms a chain: each may stand or be left out
CHAINS = [
    chain
    for count in range(len(TRAINING_STAGES) + 1)
    for chain in itertools.combinations(TRAINING_STAGES, count)
]


def check_variant(variant: Variant, tree: Map, where: tuple[Any, ...]) -> None:
    """A row's chain and where it starts. `where` is its place in the suite's `tree`."""
    stages = list(variant.stages)
    if variant.stages not in CHAINS:
        message = f"stages {stages} form no chain; the order is mae, head, tune, each once"
        raise fault(message.replace("'", ""), tree, (*where, "stages"))
    init = variant.init
    if init == "pixels" and stages:
        message = "init 'pixels' has no encoder to train; take the stages out or write 'random'"
        raise fault(message, tree, (*where, "init"))
    if init not in ("random", "pixels") and not _is_file(init):
        hint = suggestion(init, ("random", "pixels"))
        message = f"init '{short(init)}' is neither 'random', 'pixels' nor a checkpoint file here"
        raise fault(message + (hint if "did you" in hint else ""), tree, (*where, "init"))


def _is_file(path: str) -> bool:
    try:
        return Path(path).expanduser().is_file()
    except (OSError, RuntimeError):  # a name that no file, or no home, can have
        return False


def check_row(variant: Variant, images: int | None, tree: Map) -> None:
    """A row's settings, merged in `tree`, against each other and the number of training images."""
    _check_model(variant, tree)
    _check_queue(variant, tree)
    _check_data(variant, images, tree)


def check_augment(variant: Variant, tree: Map, at: tuple[Any, ...]) -> None:
    """The pipelines a row needs. `at` is where the suite's `tree` names its own."""
    pipelines = variant.row.augment
    if "mae" in variant.stages and "mae" not in pipelines:
        raise fault(
            "there is no augment pipeline 'mae', which pretraining uses; add it to the profile",
            tree,
            at[:-1],
        )
    contrastive = {"head", "tune"} & {*variant.stages}
    if (contrastive or variant.augment != "min") and variant.augment not in pipelines:
        hint = suggestion(variant.augment, pipelines)
        message = f"there is no augment pipeline '{short(variant.augment)}'{hint}"
        raise fault(message, tree, at)


def _check_model(variant: Variant, tree: Map) -> None:
    row, model = variant.row, variant.row.model
    size, patch, depth = row.data.image_size, model.patch_size, model.depth or 0
    if size % patch:
        near = [n for n in range(min(patch, size), 0, -1) if size % n == 0][:1]
        near += [n for n in range(patch + 1, min(2 * patch, size) + 1) if size % n == 0][:1]
        message = f"patch_size {patch} does not divide image_size {size}; write "
        message += " or ".join(map(str, near))
        raise fault(message, tree, ("model", "patch_size"), ("data", "image_size"))
    for name, width in (("dim", model.dim or 0), ("decoder_dim", model.decoder_dim)):
        if int(width * model.mlp_ratio) < 1:
            message = (
                f"mlp_ratio {model.mlp_ratio} leaves no hidden unit at {name} {width}; raise it"
            )
            raise fault(message, tree, ("model", "mlp_ratio"))
    patches, ratio = (size // patch) ** 2, row.mae.mask_ratio
    visible = int(patches * (1 - ratio))
    if not 0 < visible < patches:
        what = "hide" if visible else "see"
        message = f"mask_ratio {ratio} leaves none of the {patches} patches to {what}"
        message += "; raise it" if visible else "; lower it or take a smaller patch_size"
        raise fault(message, tree, ("mae", "mask_ratio"), ("model", "patch_size"))
    if (row.tune.frozen_blocks or 0) > depth:
        message = (
            f"frozen_blocks {row.tune.frozen_blocks} is more than the {depth} blocks there are"
        )
        raise fault(f"{message}; write at most {depth}", tree, ("tune", "frozen_blocks"))


def _check_queue(variant: Variant, tree: Map) -> None:
    head, tune = variant.row.head, variant.row.tune
    if head.queue_size % tune.batch_size:
        near = max(1, round(head.queue_size / tune.batch_size)) * tune.batch_size
        raise fault(
            f"head.queue_size {head.queue_size} is not a multiple of tune.batch_size "
            f"{tune.batch_size}; write {near}",
            tree, ("head", "queue_size"), ("tune", "batch_size"),
        )  # fmt: skip
    if tune.topk > head.queue_size:
        raise fault(
            f"tune.topk {tune.topk} is more than the queue of {head.queue_size} holds; lower it "
            f"or raise head.queue_size",
            tree, ("tune", "topk"), ("head", "queue_size"),
        )  # fmt: skip


def _check_data(variant: Variant, images: int | None, tree: Map) -> None:
    row = variant.row
    for stage in TRAINING_STAGES:
        batch, at = getattr(row, stage).batch_size, (stage, "batch_size")
        if images is not None and batch > images:
            message = f"{stage}.batch_size {batch} is more than the {images} training images of "
            raise fault(f"{message}'{row.data.name}'; write at most {images}", tree, at)
        if batch % row.numerics.shards:
            message = f"{stage}.batch_size {batch} is not a multiple of numerics.shards "
            message += f"{row.numerics.shards}; change one of them"
            raise fault(message, tree, at, ("numerics", "shards"))
    for name, evaluation in variant.evaluations.items():
        most = max(getattr(evaluation.settings, "k", [1]))
        if images is not None and most > images:
            message = f"k {most} is more neighbours than the {images} training images; lower it"
            raise fault(message, tree, ("evaluations", name, "k"))
        blocks = evaluation.block if isinstance(evaluation.block, list) else [evaluation.block or 0]
        depth = row.model.depth or 0
        if max(blocks) >= depth:
            message = (
                f"block {max(blocks)} is none of the encoder's {depth}; write 0 to {depth - 1}"
            )
            raise fault(message, tree, ("evaluations", name, "block"))


def check_search(search: Any, variants: dict[str, Variant], cells: Any, tree: Map) -> None:
    """A search that goes by results must not go by the test split's."""
    if search is None or not search.explores:
        return
    for label in cells:
        variant = variants[label]
        if search.metric not in variant.evaluations:
            hint = suggestion(search.metric, variant.evaluations)
            message = f"the search goes by '{short(search.metric)}', which 'evaluate' does not have"
            raise fault(message + hint, tree, ("search", "metric"))
        if variant.row.report_on != "selection":
            message = "a search that goes by results must not see the test split; add "
            message += "'report_on: selection' to the profile, or run every cell: method 'grid'"
            raise fault(message, tree, ("search",))


def check_references(spec: SuiteSettings, variants: dict[str, Variant], tree: Map) -> None:
    """Names in `match_compute` and the tables."""
    for name, variant in variants.items():
        other = variant.match_compute
        if other is None:
            continue
        where = ("variants", name, "match_compute")
        if other not in variants:
            message = f"there is no variant '{short(other)}'{suggestion(other, variants)}"
            raise fault(message, tree, where)
        chain, alone = variants[other], (("mae",), ("tune",))
        if "tune" not in chain.stages or chain.match_compute or variant.stages not in alone:
            message = "match_compute goes with 'stages: [mae]' or 'stages: [tune]' and names a "
            message += "variant that tunes and has no match_compute of its own"
            raise fault(message, tree, where)
    _check_gallery(spec, variants, tree)
    columns = _columns(variants)
    for index, table in enumerate(spec.tables):
        at = ("tables", index)
        named: list[tuple[tuple[Any, ...], str]]
        named = [((*at, "rows", i), row) for i, row in enumerate(table.rows or [])]
        if table.baseline is not None:
            named.append(((*at, "baseline"), table.baseline))
        elif table.deltas:
            raise fault("deltas need a 'baseline' to be taken from", tree, (*at, "deltas"))
        for place, row in named:
            if row not in variants:
                message = f"there is no variant '{short(row)}'{suggestion(row, variants)}"
                raise fault(message, tree, place)
        for i, column in enumerate(table.columns):
            if column not in columns:
                message = f"there is no column '{short(column)}'{suggestion(column, columns)}"
                raise fault(message, tree, (*at, "columns", i))
        for group, members in (table.groups or {}).items():
            for i, member in enumerate(members):
                if member not in variants and member not in columns:
                    hint = suggestion(member, {*variants, *columns})
                    message = f"there is no row or column '{short(member)}'{hint}"
                    raise fault(message, tree, (*at, "groups", group, i))


def _check_gallery(spec: SuiteSettings, variants: dict[str, Variant], tree: Map) -> None:
    """Two rows of the same data, one of which has an MAE's decoder."""
    shown, at = spec.gallery, ("gallery",)
    if not shown:
        return
    known = [name for name in variants if name in spec.variants]
    for index, name in enumerate(shown):
        if name not in known:
            message = f"there is no variant '{short(name)}'{suggestion(name, known)}"
            raise fault(message, tree, (*at, index))
    if len(shown) != 2 or shown[0] == shown[1]:
        raise fault("gallery shows two rows beside each other, e.g. [MAE, MAE-CT]", tree, at)
    rows = [variants[name] for name in shown]
    if not any("mae" in row.stages for row in rows):
        message = "gallery shows what an MAE reconstructs; one of its rows must have a stage 'mae'"
        raise fault(message, tree, at)
    if any(getattr(rows[0].row, part) != getattr(rows[1].row, part) for part in _SAME):
        raise fault("the rows of gallery must report on the same images", tree, at)


def _columns(variants: dict[str, Variant]) -> set[str]:
    """What a table can have as columns: evaluations, their further metrics, and the cost."""
    known = {"cost"}
    for variant in variants.values():
        for name, evaluation in variant.evaluations.items():
            known |= evaluation.columns(name).keys()
    return known
