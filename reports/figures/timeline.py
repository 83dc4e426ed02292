"""Which worker did what when: a bar a stage, failed attempts outlined, long pauses cut out."""

from __future__ import annotations

from collections.abc import Iterator
from datetime import datetime
from typing import NamedTuple

import polars as pl

from reports.display import duration, plural, short
from reports.figures.model import Figure, Panel, Point, Series, figure
from reports.figures.palette import BAD, looks
from reports.figures.svg import WIDE
from reports.frames import DONE, SuiteView

#: bars beyond which the picture shows the longest ones only
_MOST = 1500
#: kind of a stage -> its name in the legend, the row whose look its bars have, their thickness
_KINDS = {
    "mae": ("MAE", "MAE", 15),
    "head": ("head", "NNCLR without MAE", 5),
    "tune": ("tuning", "MAE-CT", 10),
    "other": ("evaluation", "raw pixels", 3),
}
_LOOKS = {kind: looks([row])[row] for kind, (_, row, _) in _KINDS.items()}


class _Bar(NamedTuple):
    start: float
    end: float
    lane: str
    kind: str
    text: str


def timeline(view: SuiteView) -> Figure | None:
    """Return the stages over wall time; None where no stage has both times."""
    bars = list(_bars(view))
    if not bars:
        return None
    kept = sorted(sorted(bars, key=lambda b: b.start - b.end)[:_MOST])
    lanes = list(dict.fromkeys(b.lane for b in kept))
    pauses = _pauses(kept)
    caption = "Bars are stages and failed attempts by worker; empty is idle."
    if pauses:
        caption += f" {plural(len(pauses), 'pause')} in which nothing ran cut short (dashed)."
    if len(bars) > _MOST:
        caption += f" The {_MOST:,} longest of {len(bars):,} are drawn."
    first, last = kept[0].start, max(bar.end for bar in kept)
    shown = max(1e-3, last - first - sum(b - a for a, b in pauses))
    cut = 0.02 * shown  # width left to a pause
    size, unit = next(
        (s, u) for s, u in ((3600, "h"), (60, "min"), (1, "s")) if shown > s or s == 1
    )

    def at(moment: float) -> float:
        """Return the place on the axis of a moment, pauses shortened to `cut`."""
        lost = sum(min(moment, b) - a - cut for a, b in pauses if moment > a)
        return (moment - first - lost) / size

    series, pixel = [], shown / size / (WIDE - 100)
    for bar in kept:
        start, row = at(bar.start), lanes.index(bar.lane)
        end = max(at(bar.end) - pixel / 2, start + pixel)  # all apart, and none too narrow to see
        ends = [Point(start, row), Point(end, row)]
        number, width, dash = BAD, 10, "2 1"
        if bar.kind in _KINDS:
            number, width, dash = _LOOKS[bar.kind], _KINDS[bar.kind][2], ""
        series.append(Series(number, bar.text, ends, dots=False, width=width, dash=dash))
    legend = [(_LOOKS[kind], name) for kind, (name, _, _) in _KINDS.items()]
    if any(bar.kind not in _KINDS for bar in kept):
        legend.append((BAD, "failed, interrupted or lost"))
    panel = Panel(
        "By worker",
        series,
        plural(len(kept), "bar"),
        f"{unit} {'of running time' if pauses else 'since the first stage began'}",
        categories=lanes,
        cuts=[at(a) + cut / 2 / size for a, _ in pauses],
    )
    return figure("timeline", "Timeline", caption, [panel], legend, bars=True, folded=True)


def _bars(view: SuiteView) -> Iterator[_Bar]:
    """Yield a bar for each complete stage and each attempt that came to nothing."""
    columns = ["key", "started", "ended", "status", "error"]
    complete = view.done.select(*columns[:4], error=pl.lit(None, pl.String))
    failed = view.attempts.filter(~pl.col("status").is_in(["complete", "running"]))
    timed = pl.concat([complete, failed.select(columns)]).drop_nulls(["started", "ended"])
    for row in timed.iter_rows(named=True):
        stage = view.by_key.get(row["key"])
        start, end = (datetime.fromisoformat(row[at]).timestamp() for at in ("started", "ended"))
        if stage is None or end < start:
            continue
        kind = "head" if stage["kind"].endswith("head") else stage["kind"]
        if kind not in _KINDS:
            kind = "tune" if stage["group"] == "train" else "other"  # of any method
        said = row["status"]
        if said not in DONE:
            kind, said = "bad", f"{said}: {short(row['error'])}"
        where = f"{short(stage['variant'])}, seed {stage['seed']}"
        text = f"{short(stage['name'])} ({where}), {duration(end - start)}, {said}"
        yield _Bar(start, end, short(stage["worker"] or "no worker named", 17), kind, text)


def _pauses(bars: list[_Bar]) -> list[tuple[float, float]]:
    """Return gaps in which no worker did anything, where they are long beside the work itself."""
    busy, gaps, end = 0.0, [], bars[0].start
    for bar in bars:
        if bar.start > end:
            gaps.append((end, bar.start))
        busy += max(0.0, bar.end - max(bar.start, end))
        end = max(end, bar.end)
    return [(a, b) for a, b in gaps if b - a > max(60.0, 0.25 * busy)]
