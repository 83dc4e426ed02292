"""Rules that join several settings of a suite: each value is allowed, but not together.

All functions raise `UserError`, with the place of the value that should change.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Collection
from pathlib import Path

from bench.errors import nearest_file, short, suggestion
from bench.suite.messages import Place, fault, require
from bench.suite.schema import (
    ComparisonSettings,
    SearchSettings,
    SuiteSettings,
    TableSettings,
    Variant,
)
from bench.suite.yamlfile import Map
from maect.settings import TRAINING_STAGES

# ----------------------------------------------------------------------------------- one row


def check_variant(variant: Variant, tree: Map, place: Callable[[str], Place]) -> None:
    """Check a row's chain, where it starts, and its pipelines.

    `place` leads to a setting of the row, by its name, in the suite's `tree`.
    """
    if variant.stages != tuple(stage for stage in TRAINING_STAGES if stage in variant.stages):
        stages = ", ".join(variant.stages)
        message = f"stages [{stages}] form no chain; the order is mae, head, tune, each once"
        raise fault(message, tree, place("stages"))
    _check_start(variant, tree, place("init"))
    pipelines = variant.row.augment
    if "mae" in variant.stages and "mae" not in pipelines:
        message = "there is no augment pipeline 'mae', which pretraining uses; add it to the "
        raise fault(f"{message}profile", tree, place("augment")[:-1])
    if variant.augment != "min" or {"head", "tune"} & {*variant.stages}:
        require(variant.augment, pipelines, "augment pipeline", tree, place("augment"))


def _check_start(variant: Variant, tree: Map, at: Place) -> None:
    """Check where the encoder of a row starts."""
    init = variant.init
    if init == "pixels" and variant.stages:
        message = "init 'pixels' has no encoder to train; take the stages out or write 'random'"
        raise fault(message, tree, at)
    if init not in ("random", "pixels") and not _is_file(init):
        hint = suggestion(init, ("random", "pixels"))
        hint = hint if "did you" in hint else nearest_file(Path(init))
        message = f"init '{short(init)}' is neither 'random', 'pixels' nor a checkpoint file here"
        raise fault(message + hint, tree, at)


def _is_file(path: str) -> bool:
    return os.path.isfile(os.path.expanduser(path))  # False for a name that no file can have


def check_row(variant: Variant, images: int | None, tree: Map) -> None:
    """Check a row's settings, merged in `tree`; `images` is the number of training images."""
    _check_model(variant, tree)
    _check_mask(variant, tree)
    _check_queue(variant, tree)
    _check_batches(variant, images, tree)
    _check_evaluations(variant, images, tree)


def _check_model(variant: Variant, tree: Map) -> None:
    """Check the encoder's sizes against the image and the blocks that tuning freezes."""
    model, size, frozen = variant.row.model, variant.row.data.image_size, variant.row.tune
    patch, depth = model.patch_size, model.depth or 0
    if size % patch:
        smaller = [n for n in range(min(patch, size), 0, -1) if size % n == 0]
        larger = [n for n in range(patch + 1, min(2 * patch, size) + 1) if size % n == 0]
        near = " or ".join(map(str, smaller[:1] + larger[:1]))
        message = f"patch_size {patch} does not divide image_size {size}; write {near}"
        raise fault(message, tree, ("model", "patch_size"), ("data", "image_size"))
    for name, width in (("dim", model.dim or 0), ("decoder_dim", model.decoder_dim)):
        if int(width * model.mlp_ratio) < 1:
            message = f"mlp_ratio {model.mlp_ratio} leaves no hidden unit at {name} {width}"
            raise fault(f"{message}; raise it", tree, ("model", "mlp_ratio"))
    if (frozen.frozen_blocks or 0) > depth:
        message = f"frozen_blocks {frozen.frozen_blocks} is more than the {depth} blocks there are"
        raise fault(f"{message}; write at most {depth}", tree, ("tune", "frozen_blocks"))


def _check_mask(variant: Variant, tree: Map) -> None:
    """Check that an MAE sees some patches and hides some."""
    patches = (variant.row.data.image_size // variant.row.model.patch_size) ** 2
    ratio = variant.row.mae.mask_ratio
    visible = int(patches * (1 - ratio))
    if not 0 < visible < patches:
        what = "hide; raise it" if visible else "see; lower it or take a smaller patch_size"
        message = f"mask_ratio {ratio} leaves none of the {patches} patches to {what}"
        raise fault(message, tree, ("mae", "mask_ratio"), ("model", "patch_size"))


def _check_queue(variant: Variant, tree: Map) -> None:
    """Check the queue, which the head stage fills, against the tuning that goes on with it."""
    queue, tune, at = variant.row.head.queue_size, variant.row.tune, ("head", "queue_size")
    if queue % tune.batch_size:
        near = max(1, round(queue / tune.batch_size)) * tune.batch_size
        message = f"head.queue_size {queue} is not a multiple of tune.batch_size {tune.batch_size}"
        raise fault(f"{message}; write {near}", tree, at, ("tune", "batch_size"))
    if tune.topk > queue:
        message = f"tune.topk {tune.topk} is more than the queue of {queue} holds; lower it or "
        raise fault(f"{message}raise head.queue_size", tree, ("tune", "topk"), at)


def _check_batches(variant: Variant, images: int | None, tree: Map) -> None:
    """Check that the data have a whole batch, and that shards cut it into equal parts."""
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


def _check_evaluations(variant: Variant, images: int | None, tree: Map) -> None:
    """Check that there are as many neighbours and blocks as evaluations ask for."""
    depth = variant.row.model.depth or 0
    for name, evaluation in variant.evaluations.items():
        most = max(getattr(evaluation.settings, "k", [1]))
        if images is not None and evaluation.data is None and most > images:
            message = f"k {most} is more neighbours than the {images} training images; lower it"
            raise fault(message, tree, ("evaluations", name, "k"))
        block = evaluation.block or 0
        last = max(block) if isinstance(block, list) else block
        if last >= depth:
            message = f"block {last} is none of the encoder's {depth}; write 0 to {depth - 1}"
            raise fault(message, tree, ("evaluations", name, "block"))


# ----------------------------------------------------------------------------- the whole suite


def check_suite(spec: SuiteSettings, variants: dict[str, Variant], tree: Map) -> None:
    """Check all that names rows and columns: `match_compute`, the gallery and the tables."""
    for name, variant in variants.items():
        if variant.match_compute is not None:
            at = ("variants", name, "match_compute")
            require(variant.match_compute, variants, "variant", tree, at)
            _check_match(variant, variants[variant.match_compute], tree, at)
    if len({variant.row.numerics.isa for variant in variants.values()}) > 1:
        message = "numerics.isa is not the same in all rows; give it in the profile, once"
        raise fault(message, tree, ("numerics", "isa"))
    _check_gallery(spec, variants, tree)
    columns = {"cost"}
    for variant in variants.values():
        for name, evaluation in variant.evaluations.items():
            columns |= evaluation.columns(name).keys()
    for index, table in enumerate(spec.tables):
        _check_table(table, variants.keys(), columns, tree, ("tables", index))
    for index, one in enumerate(spec.secondary):
        _check_comparison(one, variants.keys(), columns, tree, ("secondary", index))
    if spec.primary is not None:
        _check_comparison(spec.primary, variants.keys(), columns, tree, ("primary",))


def _check_match(variant: Variant, other: Variant, tree: Map, at: Place) -> None:
    """Check a row that is to cost as much as the `other`."""
    alone = variant.stages in (("mae",), ("tune",))
    if not alone or "tune" not in other.stages or other.match_compute:
        message = "match_compute goes with 'stages: [mae]' or 'stages: [tune]' and names a "
        message += "variant that tunes and has no match_compute of its own"
        raise fault(message, tree, at)


def _check_gallery(spec: SuiteSettings, variants: dict[str, Variant], tree: Map) -> None:
    """Check that a gallery has two rows of the same data, one of them with an MAE's decoder."""
    shown, at = spec.gallery, ("gallery",)
    if not shown:
        return
    for index, name in enumerate(shown):
        require(name, variants.keys() & spec.variants.keys(), "variant", tree, (*at, index))
    if len(shown) != 2 or shown[0] == shown[1]:
        raise fault("gallery shows two rows beside each other, e.g. [MAE, MAE-CT]", tree, at)
    before, after = (variants[name] for name in shown)
    if "mae" not in before.stages + after.stages:
        message = "gallery shows what an MAE reconstructs; one of its rows must have a stage 'mae'"
        raise fault(message, tree, at)
    same_data = before.row.data == after.row.data
    if not same_data or before.row.report_on != after.row.report_on:
        raise fault("the rows of gallery must report on the same images", tree, at)


def _check_table(
    table: TableSettings, rows: Collection[str], columns: set[str], tree: Map, at: Place
) -> None:
    """Check the names in a table that stands at `at`."""
    for index, row in enumerate(table.rows or []):
        require(row, rows, "variant", tree, (*at, "rows", index))
    if table.baseline is not None:
        require(table.baseline, rows, "variant", tree, (*at, "baseline"))
    for index, column in enumerate(table.columns):
        require(column, columns, "column", tree, (*at, "columns", index))
    for group, members in (table.groups or {}).items():
        for index, member in enumerate(members):
            place = (*at, "groups", group, index)
            require(member, {*rows, *columns}, "row or column", tree, place)


def _check_comparison(
    named: ComparisonSettings, rows: Collection[str], columns: set[str], tree: Map, at: Place
) -> None:
    """Check the names in a comparison that stands at `at`."""
    require(named.row, rows, "variant", tree, (*at, "row"))
    require(named.against, rows, "variant", tree, (*at, "against"))
    require(named.metric, columns - {"cost"}, "metric", tree, (*at, "metric"))
    if named.row == named.against:
        raise fault("a comparison is of two rows; name another one", tree, (*at, "against"))


def check_search(search: SearchSettings | None, rows: list[Variant], tree: Map) -> None:
    """Check that a search that goes by results has some, and not of the test split."""
    if search is None or not search.explores:
        return
    for variant in rows:
        if search.metric not in variant.evaluations:
            hint = suggestion(search.metric, variant.evaluations)
            message = f"the search goes by '{short(search.metric)}', which 'evaluate' does not have"
            raise fault(message + hint, tree, ("search", "metric"))
        if variant.row.report_on != "selection":
            message = "a search that goes by results must not see the test split; add "
            message += "'report_on: selection' to the profile, or run every cell: method 'grid'"
            raise fault(message, tree, ("search",))
