"""Rules that join several settings of a suite: each value is allowed, but not together.

A rule yields what is wrong: the message, and the places of the values of which one should change.
The checks raise them as `UserError`.
"""

from __future__ import annotations

import os
from collections.abc import Collection, Iterable, Iterator
from itertools import chain, pairwise
from pathlib import Path
from typing import Any

from bench.errors import nearest_file, several, short, suggestion
from bench.suite.messages import Place, fault, require
from bench.suite.schema import SearchSettings, SuiteSettings, Variant
from bench.suite.yamlfile import Map
from maect import hub, methods
from maect.datasets import DataInfo
from maect.methods import Method

#: a message and the places that it is about
Faults = Iterator[tuple[Any, ...]]


def _check(faults: Iterable[tuple[Any, ...]], tree: Map) -> None:
    with several() as each:
        for message, *places in faults:
            with each():
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
    problem = _out_of_order([methods.get(stage) for stage in stages])
    if problem:
        yield f"stages [{', '.join(stages)}] form no chain; {problem}", ("stages",)
    if init == "pixels" and stages:
        cure = "take the stages out or write 'random'"
        yield f"init 'pixels' has no encoder to train; {cure}", at
    # a hub's name is looked for by the planner; isfile is False for what no file can be called
    known = init in ("random", "pixels") or hub.is_name(init)
    if here and not known and not os.path.isfile(os.path.expanduser(init)):
        hint = suggestion(init, ("random", "pixels"))
        hint = hint if "did you" in hint else nearest_file(Path(init))
        what = "neither 'random', 'pixels', timm:NAME, hf:OWNER/NAME nor a checkpoint file here"
        yield f"init '{short(init)}' is {what}{hint}", at
    if "mae" in stages and "mae" not in variant.row.augment:
        message = "there is no augment pipeline 'mae', which pretraining uses; add it to the "
        yield f"{message}profile", ("stages",)


def _out_of_order(chain: list[Method]) -> str | None:
    """Return what is wrong with the order of training stages, or None."""
    parts = [methods.PARTS.index(method.part) for method in chain]
    if any(later <= earlier for earlier, later in pairwise(parts)):
        return "the order is pretraining, a head, its tuning, each once, e.g. mae, head, tune"
    for before, after in pairwise(chain):
        if before.part == "head" and after.starts_from != before.name:
            return f"{after.name} does not go on with {before.name}; write {after.starts_from}"
    return None


def _sizes(variant: Variant) -> Faults:
    """Yield what is wrong with the encoder's sizes, the image's, and what either leaves."""
    row, model, size = variant.row, variant.row.model, variant.row.data.image_size
    patch, depth = model.patch_size, model.depth or 0
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
    for stage, section in row.sections.items():
        frozen, ratio = getattr(section, "frozen_blocks", 0) or 0, getattr(section, "mask_ratio", 0)
        if frozen > depth:
            message = f"frozen_blocks {frozen} is more than the {depth} blocks there are"
            yield f"{message}; write at most {depth}", (stage, "frozen_blocks")
        patches = (size // patch) ** 2
        visible = int(patches * (1 - ratio))
        if ratio and not 0 < visible < patches:
            what = "hide; raise it" if visible else "see; lower it or take a smaller patch_size"
            message = f"mask_ratio {ratio} leaves none of the {patches} patches to {what}"
            yield message, (stage, "mask_ratio"), at_patch
        inner = getattr(section, "blocks", [])
        if len({*inner}) < len(inner) or any(block >= depth - 1 for block in inner):
            message = f"{stage}.blocks {inner} should be blocks below the last of {depth}, each "
            yield f"{message}once; write 0 to {depth - 2}", (stage, "blocks"), (stage,)
        local = getattr(section, "local_size", None)
        if getattr(section, "local_views", 0) and (local is None or local % patch or local > size):
            message = f"{stage}.local_views need a local_size of at most {size} pixels that is a "
            yield f"{message}multiple of patch_size {patch}, not {local}", (stage, "local_views")
    if row.numerics.processors is not None:
        message = "numerics.processors is found out where the suite is planned; take it out"
        yield message, ("numerics", "processors")


def _queue(variant: Variant) -> Faults:
    """Yield how the queue, which the head stage fills, misses the tuning that goes on with it."""
    for stage, section in variant.row.sections.items():
        source, names = methods.get(stage).borrows
        held = variant.row.sections.get(source)
        if held is None or "queue_size" not in names or not hasattr(section, "topk"):
            continue
        queue, batch, at = held.queue_size, section.batch_size, (source, "queue_size")
        if queue % batch:
            near = max(1, round(queue / batch)) * batch
            message = f"{source}.queue_size {queue} is not a multiple of {stage}.batch_size {batch}"
            yield f"{message}; write {near}", at, (stage, "batch_size")
        if section.topk > queue:
            message = f"{stage}.topk {section.topk} is more than the queue of {queue} holds; lower "
            yield f"{message}it or raise {source}.queue_size", (stage, "topk"), at


def _counts(variant: Variant, images: int | None) -> Faults:
    """Yield batches and neighbours that the data are too few for, or shards do not divide."""
    row = variant.row
    for stage, section in row.sections.items():
        batch, at = section.batch_size, (stage, "batch_size")
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


def check_suite(
    spec: SuiteSettings,
    rows: Collection[str],
    variants: dict[str, Variant],
    tree: Map,
    *,
    whole: bool,
) -> None:
    """Check all that names rows and columns, and that rows fit each other.

    Not `whole`: some rows or evaluations have faults, and only the names of rows are checked.
    """
    with several() as each:
        for name, known, what, place in _names(spec, rows, variants):
            if whole or what == "variant":
                with each():
                    require(name, known, what, tree, place)
    if whole:
        _check(_together(spec, variants), tree)


def _names(
    spec: SuiteSettings, rows: Collection[str], variants: dict[str, Variant]
) -> Iterator[tuple[str, Collection[str], str, Place]]:
    """Yield each name of a row or column with those there are, what it is and its place."""
    metrics = set[str]()
    for variant in variants.values():
        for name, evaluation in variant.evaluations.items():
            metrics |= evaluation.columns(name).keys()
    columns = metrics | {"cost"}
    for name, variant in variants.items():
        if variant.match_compute is not None:
            yield variant.match_compute, rows, "variant", ("variants", name, "match_compute")
    for index, name in enumerate(spec.gallery):
        yield name, {*rows} & spec.variants.keys(), "variant", ("gallery", index)
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
                yield name, {*rows} | columns, "row or column", (*at, "groups", group, index)
    named = [(("secondary", index), one) for index, one in enumerate(spec.secondary)]
    for at, one in [(("primary",), spec.primary), *named] if spec.primary else named:
        yield one.row, rows, "variant", (*at, "row")
        yield one.against, rows, "variant", (*at, "against")
        yield one.metric, metrics, "metric", (*at, "metric")


def _together(spec: SuiteSettings, variants: dict[str, Variant]) -> Faults:
    """Yield rows that do not fit each other: of `match_compute`, of instructions, of a gallery."""
    for name, variant in variants.items():
        other = variants.get(variant.match_compute or "")
        tunes = other and any(methods.get(stage).part == "tuning" for stage in other.stages)
        if other and (not variant.stages or not tunes or other.match_compute):
            message = "match_compute goes with a row that trains and names a variant that tunes "
            message += "and has no match_compute of its own"
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
