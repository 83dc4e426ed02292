"""Rules that join several settings of a suite: each value is allowed, but not together.

A rule yields what is wrong: the message, and the places of the values of which one should change.
The checks raise the first of them as `UserError`.
"""

from __future__ import annotations

import os
from collections.abc import Collection, Iterable, Iterator
from itertools import chain
from pathlib import Path
from typing import Any

from bench.errors import nearest_file, short, suggestion
from bench.suite.messages import Place, fault, require
from bench.suite.schema import (
    SearchSettings,
    SuiteSettings,
    Variant,
)
from bench.suite.yamlfile import Map
from maect import hub
from maect.datasets import DataInfo
from maect.settings import TRAINING_STAGES

#: a message and the places that it is about
Faults = Iterator[tuple[Any, ...]]


def _check(faults: Iterable[tuple[Any, ...]], tree: Map) -> None:
    for message, *places in faults:
        raise fault(message, tree, *places)


# ----------------------------------------------------------------------------------- one row


def check_row(variant: Variant, data: DataInfo, tree: Map) -> None:
    """Check a row's settings, merged in `tree`."""
    images = data.counts.get("train")
    here = data.fingerprint is not None
    faults = (_chain(variant, here), _sizes(variant), _queue(variant), _counts(variant, images))
    _check(chain.from_iterable(faults), tree)


def _chain(variant: Variant, here: bool) -> Faults:
    """Yield what is wrong with a row's chain and where it starts.

    A plan without the data needs no weights either: `here` tells whether the data are.
    """
    stages, init, at = variant.stages, variant.init, ("init",)
    if stages != tuple(stage for stage in TRAINING_STAGES if stage in stages):
        order = "the order is mae, head, tune, each once"
        yield f"stages [{', '.join(stages)}] form no chain; {order}", ("stages",)
    if init == "pixels" and stages:
        cure = "take the stages out or write 'random'"
        yield f"init 'pixels' has no encoder to train; {cure}", at
    named = hub.is_name(init)  # the planner looks for it
    # False for a name that no file can have
    if (
        not named
        and init not in ("random", "pixels")
        and not os.path.isfile(os.path.expanduser(init))
        and here
    ):
        hint = suggestion(init, ("random", "pixels"))
        hint = hint if "did you" in hint else nearest_file(Path(init))
        what = "neither 'random', 'pixels', timm:NAME, hf:OWNER/NAME nor a checkpoint file here"
        yield f"init '{short(init)}' is {what}{hint}", at
    if "mae" in stages and "mae" not in variant.row.augment:
        message = (
            "there is no augment pipeline 'mae', which pretraining uses; add it to the profile"
        )
        yield message, ("stages",)


def _sizes(variant: Variant) -> Faults:
    """Yield what is wrong with the encoder's sizes, the image's, and what either leaves."""
    row, model, size = variant.row, variant.row.model, variant.row.data.image_size
    patch, depth, ratio = model.patch_size, model.depth or 0, variant.row.mae.mask_ratio
    at_patch = ("model", "patch_size")
    if size % patch:
        smaller = [n for n in range(min(patch, size), 0, -1) if size % n == 0]
        larger = [n for n in range(patch + 1, min(2 * patch, size) + 1) if size % n == 0]
        near = " or ".join(map(str, smaller[:1] + larger[:1]))
        message = f"patch_size {patch} does not divide image_size {size}; write {near}"
        yield message, at_patch, ("data", "image_size")
    for name, width in (("dim", model.dim or 0), ("decoder_dim", model.decoder_dim)):
        if int(width * model.mlp_ratio) < 1:
            message = f"mlp_ratio {model.mlp_ratio} leaves no hidden unit at {name} {width}"
            yield f"{message}; raise it", ("model", "mlp_ratio")
    if (row.tune.frozen_blocks or 0) > depth:
        message = (
            f"frozen_blocks {row.tune.frozen_blocks} is more than the {depth} blocks there are"
        )
        yield f"{message}; write at most {depth}", ("tune", "frozen_blocks")
    patches = (size // patch) ** 2
    visible = int(patches * (1 - ratio))
    if not 0 < visible < patches:
        what = "hide; raise it" if visible else "see; lower it or take a smaller patch_size"
        message = f"mask_ratio {ratio} leaves none of the {patches} patches to {what}"
        yield message, ("mae", "mask_ratio"), at_patch
    if row.numerics.processors is not None:
        message = "numerics.processors is found out where the suite is planned; take it out"
        yield message, ("numerics", "processors")


def _queue(variant: Variant) -> Faults:
    """Yield how the queue, which the head stage fills, misses the tuning that goes on with it."""
    queue, tune, at = variant.row.head.queue_size, variant.row.tune, ("head", "queue_size")
    if queue % tune.batch_size:
        near = max(1, round(queue / tune.batch_size)) * tune.batch_size
        message = f"head.queue_size {queue} is not a multiple of tune.batch_size {tune.batch_size}"
        yield f"{message}; write {near}", at, ("tune", "batch_size")
    if tune.topk > queue:
        message = f"tune.topk {tune.topk} is more than the queue of {queue} holds; lower it or "
        yield f"{message}raise head.queue_size", ("tune", "topk"), at


def _counts(variant: Variant, images: int | None) -> Faults:
    """Yield batches and neighbours that the data are too few for, or shards do not divide."""
    row = variant.row
    for stage in TRAINING_STAGES:
        batch, at = getattr(row, stage).batch_size, (stage, "batch_size")
        if images is not None and batch > images:
            message = f"{stage}.batch_size {batch} is more than the {images} training images of "
            yield f"{message}'{row.data.name}'; write at most {images}", at
        if batch % row.numerics.shards:
            message = f"{stage}.batch_size {batch} is not a multiple of numerics.shards "
            yield f"{message}{row.numerics.shards}; change one of them", at, ("numerics", "shards")
    for name, evaluation in variant.evaluations.items():
        most = max(getattr(evaluation.settings, "k", [1]))
        if images is not None and evaluation.data is None and most > images:
            message = f"k {most} is more neighbours than the {images} training images; lower it"
            yield message, ("evaluations", name, "k")


# ----------------------------------------------------------------------------- the whole suite


def check_suite(spec: SuiteSettings, variants: dict[str, Variant], tree: Map) -> None:
    """Check all that names rows and columns, and that rows fit each other."""
    for name, known, what, place in _names(spec, variants):
        require(name, known, what, tree, place)
    _check(_together(spec, variants), tree)


def _names(
    spec: SuiteSettings, variants: dict[str, Variant]
) -> Iterator[tuple[str, Collection[str], str, Place]]:
    """Yield each name of a row or column with those there are, what it is and its place."""
    rows, metrics = variants.keys(), set[str]()
    for variant in variants.values():
        for name, evaluation in variant.evaluations.items():
            metrics |= evaluation.columns(name).keys()
    columns = metrics | {"cost"}
    for name, variant in variants.items():
        if variant.match_compute is not None:
            yield variant.match_compute, rows, "variant", ("variants", name, "match_compute")
    for index, name in enumerate(spec.gallery):
        yield name, rows & spec.variants.keys(), "variant", ("gallery", index)
    for number, table in enumerate(spec.tables):
        at: Place = ("tables", number)
        for index, name in enumerate(table.rows or []):
            yield name, rows, "variant", (*at, "rows", index)
        if table.baseline is not None:
            yield table.baseline, rows, "variant", (*at, "baseline")
        for index, name in enumerate(table.columns):
            yield name, columns, "column", (*at, "columns", index)
        for group, members in (table.groups or {}).items():
            for index, name in enumerate(members):
                yield name, rows | columns, "row or column", (*at, "groups", group, index)
    named = [(("secondary", index), one) for index, one in enumerate(spec.secondary)]
    for at, one in [(("primary",), spec.primary), *named] if spec.primary else named:
        yield one.row, rows, "variant", (*at, "row")
        yield one.against, rows, "variant", (*at, "against")
        yield one.metric, metrics, "metric", (*at, "metric")


def _together(spec: SuiteSettings, variants: dict[str, Variant]) -> Faults:
    """Yield rows that do not fit each other: of `match_compute`, of instructions, of a gallery."""
    for name, variant in variants.items():
        other = variants.get(variant.match_compute or "")
        alone = variant.stages in (("mae",), ("tune",))
        if other and (not alone or "tune" not in other.stages or other.match_compute):
            message = "match_compute goes with 'stages: [mae]' or 'stages: [tune]' and names a "
            message += "variant that tunes and has no match_compute of its own"
            yield message, ("variants", name, "match_compute")
    if len({variant.row.numerics.isa for variant in variants.values()}) > 1:
        message = "numerics.isa is not the same in all rows; give it in the profile, once"
        yield message, ("numerics", "isa")
    if spec.gallery:
        shown = [variants[name] for name in spec.gallery]
        if len(shown) != 2 or shown[0] is shown[1]:
            message = "gallery shows two rows beside each other, e.g. [MAE, MAE-CT]"
        elif not any("mae" in variant.stages for variant in shown):
            message = "gallery shows what an MAE reconstructs; one of its rows must have a stage "
            message += "'mae'"
        elif len({(v.row.data, v.row.report_on) for v in shown}) > 1:
            message = "the rows of gallery must report on the same images"
        else:
            return
        yield message, ("gallery",)


def check_search(search: SearchSettings | None, rows: list[Variant], tree: Map) -> None:
    """Check that a search that goes by results has some, and not of the test split."""
    if search is None or not search.explores:
        return
    for variant in rows:
        if search.metric not in variant.evaluations:
            hint = suggestion(search.metric, variant.evaluations)
            message = f"the search goes by '{short(search.metric)}', which 'evaluate' does not have"
            raise fault(message + hint, tree, ("search", "metric"))
        if search.rungs and variant.evaluations[search.metric].evaluator.needs_encoder:
            message = f"rungs compare cells by stored features, and '{search.metric}' runs the "
            message += "encoder itself; take another metric, e.g. knn"
            raise fault(message, tree, ("search", "rungs"))
        if search.rungs and not variant.stages:
            message = f"rungs are points within a training stage, and row '{variant.name}' has none"
            raise fault(f"{message}; take rungs out", tree, ("search", "rungs"))
        if variant.row.report_on != "selection":
            message = "a search that goes by results must not see the test split; add "
            message += "'report_on: selection' to the profile, or run every cell: method 'grid'"
            raise fault(message, tree, ("search",))
