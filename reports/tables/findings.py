"""What a table allows one to say: tests and their reach, shared ancestors, test images."""

from __future__ import annotations

import math
from typing import Any

import polars as pl

from reports.display import fixed, plural, short, signed
from reports.frames import DONE, SuiteView, lookup
from reports.tables.model import Cell, Column, Comparison, Table, number
from reports.tables.statistics import ALPHA, MOST, SHUFFLES, shuffled_spread


def headline(column: Column, told: dict[str, Any], found: Comparison | None) -> str:
    """Return what a comparison that the suite names says, whatever it says.

    `told` is the comparison as the suite names it; `found` is None where nothing can be compared.
    """
    kind = "primary" if told["primary"] else "further"
    named = f"{kind} comparison, named by the suite"
    row, against, label = (short(text) for text in (told["row"], told["against"], column.label))
    both = f"{row} against {against}, {label}"
    if found is None:
        return f"{both}: nothing to compare yet ({named})."
    unit = " points" if column.unit == "%" else f" {column.unit}" if column.unit else ""
    effect, over = f"{signed(found.mean, column.digits)}{unit}", f"over {plural(found.n, 'seed')}"
    if found.p is None or found.low is None or found.high is None:
        none = "one seed, or equal differences, allow no test"
        return f"{both}: {effect} {over}; {none} ({named})."
    low, high = (signed(end, column.digits) for end in (found.low, found.high))
    how = f"one-sample t {over} against a constant" if found.constant else f"paired t {over}"
    p = found.p if found.p_holm is None else found.p_holm
    chance = f"p {'< 0.001' if p < 0.001 else f'= {p:.3f}'}"
    if found.p_holm is not None:
        tests = plural(found.family, "test")
        chance += f" after Holm's correction over {tests}, which the interval is without"
    said = f"No difference is shown between {row} and {against}"
    if p < ALPHA:
        said = f"{row} is {'better' if found.survives else 'worse'} than {against}"
    return (
        f"{said} in {label}: {effect}, 95 % confidence interval {low} to {high} "
        f"({named}; {how}; {chance})."
    )


def best_row(table: Table) -> str:
    """Return the row of the highest mean in a table's first metric, for want of a comparison."""
    for column in table.metrics[:1]:
        valued = [row for row in table.rows if table.cell(row, column).valued]
        sign = 1 if column.higher_is_better else -1
        best = max(valued, key=lambda r: sign * (table.cell(r, column).mean or 0.0), default=None)
        if best is not None and len(valued) > 1:
            unit = f" {column.unit}" if column.unit else ""
            return (
                f"Best {short(column.label)} by its mean: {short(best.variant)}, "
                f"{number(table.cell(best, column), column)}{unit}, of {len(valued)} rows; the "
                "suite names no primary comparison."
            )
    return "The suite names no primary comparison."


def caveats(table: Table, view: SuiteView) -> list[str]:
    """Return what to bear in mind: what is open, what n can show, the images, the scale."""
    found, count = [], len(view.distinct)
    if count > len(view.done):
        found.append(f"{count - len(view.done)} of {plural(count, 'stage')} are not complete")
    one = next(iter(table.named), None)
    column = next((c for c in table.metrics if one and c.id == one.column), None)
    if one and column and one.detectable is not None:
        least = fixed(min(one.detectable, 100.0), column.digits)
        unit = "points" if column.unit == "%" else column.unit
        found.append(
            f"with {plural(one.n, 'seed')} a true difference below {least} {unit} would be "
            "missed more than once in five times"
        )
    if len(view.seeds) == 1:
        found.append("one seed tells nothing of the noise")
    image = _first_error(table, view)
    if image is not None:
        found.append(f"all seeds see the same {image[2]} (standard error {image[0]:.1f} points)")
    if view.model is None:
        found.append("at this scale only, the published results are of ImageNet-1K")
    return found


def findings(table: Table, view: SuiteView) -> list[str]:
    """Return sentences that belong under a table's comparisons."""
    return [
        *ranking(table, view),
        *numerics(table, view),
        *_shared_over_seeds(table, view),
        *_test_images(table, view),
    ]


def ranking(table: Table, view: SuiteView) -> list[str]:
    """Return whether the seeds tell the cells of a search apart, a sentence a metric."""
    found = []
    searched = [row for row in table.rows if row.variant in view.cells]
    for column in table.metrics:
        cells = [table.cell(row, column) for row in searched]
        on_test = sum(_on_test(view, cell) for cell in cells)
        if on_test > 1:
            found.append(
                f"{short(column.label)}: {on_test} cells were looked at on the test split; the "
                "best of them is so partly by chance."
            )
        cells = [cell for cell in cells if cell.state != "pruned"]
        if len(cells) < 3 or not all(cell.valued for cell in cells):
            continue
        seeds = sorted(set.intersection(*({*c.by_seed} for c in cells)))
        means = sorted(cell.mean for cell in cells if cell.mean is not None)
        span = " to ".join(fixed(mean, column.digits) for mean in (means[0], means[-1]))
        text = f"{short(column.label)}: the means of the {len(cells)} cells go from {span}. "
        if len(seeds) < 2:
            found.append(text + "One seed tells nothing of the noise, so the order is no ranking.")
            continue
        share = shuffled_spread([[cell.by_seed[seed] for seed in seeds] for cell in cells])
        text += f"In {100 * share:.1f} % of {SHUFFLES:,} shuffles of the cells within each seed "
        text += "they lie as far apart: "
        if share > ALPHA:
            text += f"the differences are inside the noise of {plural(len(seeds), 'seed')}, and "
            text += "the order of the cells is no ranking."
        else:
            text += "not all of the differences are noise; cells close to each other stay unranked."
        found.append(text)
    return found


def _on_test(view: SuiteView, cell: Cell) -> bool:
    """Return whether a cell shows a number of the test split."""
    return cell.valued and lookup(view.record(cell.keys[0]), "protocol", "split") == "test"


#: measured with 4 shards and one worker on a core of a Xeon, digits, against 1 shard
_EXACT_COSTS = "an MAE step takes 69 % longer, one of the head 9 %, of tuning 8 %"


def numerics(table: Table, view: SuiteView) -> list[str]:
    """Return what the gradients' sums promise over workers, and on how many stages were trained."""
    of_table = pl.col("variant").is_in([row.variant for row in table.rows])
    trained = view.training.filter(of_table, pl.col("status").is_in(DONE))
    places = trained.select("shards", "workers", "device_kind", "backend").unique()
    places, found = places.drop_nulls(["shards", "workers"]), []
    for (shards,), group in places.sort("shards").group_by("shards", maintain_order=True):
        where = " and on ".join(sorted({_trained_on(**row) for row in group.rows(named=True)}))
        if shards == 1:
            found.append(
                f"Numerics `fast`, trained on {where}: another number of workers gives the same "
                "losses at first (to 1e-5), then figures that differ as seeds do."
            )
            continue
        count = int(str(shards))
        counts = [str(n) for n in range(1, count + 1) if count % n == 0]
        found.append(
            f"Numerics `exact`, trained on {where}: the same bits on {', '.join(counts[:-1])} or "
            f"{counts[-1]} workers. What that costs, measured with 4 shards on a CPU core: "
            f"{_EXACT_COSTS}."
        )
    return found


def _trained_on(workers: int, device_kind: str | None, backend: str | None, shards: int) -> str:
    kind = (device_kind or "device").upper()
    if workers == 1:
        return f"1 {kind} worker"
    over = f" over {backend.replace('nccl', 'NCCL')}" if backend else ""
    return f"{workers} {kind} workers{over}"


def bold_note(table: Table) -> list[str]:
    """Return what bold means in a table; nothing where nothing is tested."""
    return how_tested(table)[:1] if any(c.p is not None for c in table.comparisons) else []


def how_tested(table: Table) -> list[str]:
    """Return which test, over what, and what it allows one to say with this many seeds."""
    if not table.comparisons:
        return []
    most = max(c.n for c in table.comparisons)
    if most < 2:
        return ["One seed allows no test. `--seeds N` extends the suite by what is new only."]
    family = max(c.family for c in table.comparisons)
    method = (
        f"Bold: better than {short(table.baseline)} in a paired two-sided t-test over common "
        f"seeds, p < 0.05 after Holm's correction over the {plural(family, 'test')} of this report"
    )
    alone = any(c.primary for c in table.comparisons)
    method += ", the primary comparison by itself." if alone else "."
    count = sum(c.survives for c in table.comparisons)
    survived = f"{plural(count, 'difference')} {'survives' if count == 1 else 'survive'}"
    over = f"{plural(most, 'seed')} {survived if count else 'nothing survives'}"
    if most > 3:
        return [f"{method} Over {over}."]
    few = (
        f"Few seeds: over {over}, as is to be expected. See the smallest difference that this n "
        "could show, and the n that would settle the one seen; `--seeds N` extends the suite by "
        "what is new only."
    )
    return [method, few]


def needed_text(comparison: Comparison) -> str:
    """Return seeds that would settle a comparison, in words."""
    if comparison.p is None:
        return "–"
    return f"{comparison.needed:,}" if comparison.needed else f"> {MOST:,}"


def _shared_over_seeds(table: Table, view: SuiteView) -> list[str]:
    """Return the rows whose seeds start from one ancestor: their spread leaves that one's out."""
    users = (
        view.training.group_by("variant", "key", maintain_order=True)
        .agg(pl.len().alias("seeds"), pl.col("name").first())
        .group_by("variant", maintain_order=True)
        .agg(
            pl.col("name").filter(pl.col("seeds") > 1).alias("shared"),
            (pl.col("seeds") == 1).any().alias("own"),
        )
        .filter(pl.col("own") & (pl.col("shared").list.len() > 0))
    )
    shared = {row["variant"]: row["shared"] for row in users.iter_rows(named=True)}
    return [
        f"The seeds of {short(row.variant)} share an ancestor "
        f"({', '.join(map(short, shared[row.variant]))}): their spread leaves out how much that "
        "stage varies, and the differences are not independent."
        for row in table.rows
        if row.variant in shared
    ]


def _first_error(table: Table, view: SuiteView) -> tuple[float, float, str, str] | None:
    """Return the first sampling error of a table: error, mean, images, cell."""
    for column in table.columns:
        for row in table.rows:
            cell = table.cell(row, column)
            found = sampling_error(view, column, cell)
            if found is not None and cell.mean is not None:
                return found[0], cell.mean, found[1], f"{short(column.label)}, {short(row.variant)}"
    return None


def _test_images(table: Table, view: SuiteView) -> list[str]:
    """Return the sampling error of the images measured on, which no spread over seeds contains."""
    found = _first_error(table, view)
    if found is None:
        return []
    error, mean, images, where = found
    sentence = (
        f"± is over seeds, all measured on the same {images}. Their own sampling error comes on "
        f"top: one standard error is {error:.1f} points at {mean:.1f} % ({where}; binomial); the "
        "values by seed have it for each cell. All rows see the same images, which affects "
        "differences between rows less."
    )
    return [sentence]


def sampling_error(view: SuiteView, column: Column, cell: Cell) -> tuple[float, str] | None:
    """Return one standard error of an accuracy over its images, in points, and those images.

    Binomial. None of what is no accuracy, or where the record does not say how many images.
    """
    metric = str(view.measures.get(column.id, {}).get("metric", ""))
    if column.unit != "%" or "accuracy" not in metric or not cell.valued or cell.mean is None:
        return None
    record = view.record(cell.keys[0])
    split = str(lookup(record, "protocol", "split") or "test").partition(",")[0]
    images = lookup(record, "protocol", "test_images") or lookup(record, "data", "counts", split)
    if not isinstance(images, int) or images < 1 or not 0 < cell.mean < 100:
        return None
    return math.sqrt(cell.mean * (100 - cell.mean) / images), plural(images, f"{split} image")
