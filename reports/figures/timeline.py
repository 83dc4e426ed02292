"""Which worker did what when: a bar a stage, failed attempts outlined, long pauses cut out."""

from __future__ import annotations

from dataclasses import dataclass
from datetime import UTC, datetime

import polars as pl
from markupsafe import Markup

from reports.display import duration, plural, short
from reports.facts import Facts
from reports.figures.charts import Figure
from reports.figures.svg import line, nice_step, picture, tag, words

_LEFT, _RIGHT, _ROW = 120, 1068, 22
#: bars beyond which the picture shows the longest ones only
_MOST = 1500
_STEPS = (1, 2, 5, 10, 15, 30, 60, 120, 300, 600, 900, 1800, 3600, 7200, 14400, 28800, 86400)
_KINDS = ("mae", "head", "tune")


@dataclass
class _Bar:
    lane: str
    start: float
    end: float
    css: str
    text: str


def timeline(facts: Facts) -> Figure | None:
    """Return the stages over wall time; None where no stage has both times."""
    bars = _bars(facts)
    if not bars:
        return None
    kept = sorted(sorted(bars, key=lambda b: b.start - b.end)[:_MOST], key=lambda b: b.start)
    pauses = _pauses(kept)
    lanes = list(dict.fromkeys(b.lane for b in kept))
    caption = "Bars are stages and failed attempts by worker; empty is idle."
    if pauses:
        caption += f" {plural(len(pauses), 'pause')} in which nothing ran cut short (dashed)."
    if len(bars) > _MOST:
        caption += f" The {_MOST:,} longest of {len(bars):,} are drawn."
    legend = [("k-mae", "MAE"), ("k-head", "head"), ("k-tune", "tuning"), ("k-other", "evaluation")]
    if any("k-bad" in b.css for b in kept):
        legend.append(("k-bad", "failed, interrupted or lost"))
    return Figure("timeline", "Timeline", caption, [_draw(kept, lanes, pauses)], legend, wide=True)


def _bars(facts: Facts) -> list[_Bar]:
    """Return a bar for each complete stage and each attempt that came to nothing."""
    columns = ["key", "started", "ended", "status", "error"]
    complete = facts.done.select(*columns[:4], error=pl.lit(""), failed=pl.lit(False))
    failed = facts.view.attempts.filter(~pl.col("status").is_in(["complete", "running"])).select(
        *columns, failed=pl.lit(True)
    )
    found = []
    for row in pl.concat([complete, failed]).iter_rows(named=True):
        stage = facts.stages.get(row["key"])
        start, end = _seconds(row["started"]), _seconds(row["ended"])
        if stage is None or start is None or end is None or end < start:
            continue
        kind = stage["kind"] if stage["kind"] in _KINDS else "other"
        said = f"{row['status']}: {short(row['error'])}" if row["failed"] else row["status"]
        where = f"{short(stage['variant'])}, seed {stage['seed']}"
        text = f"{short(stage['name'])} ({where}), {duration(end - start)}, {said}"
        lane = short(stage["worker"] or "no worker named", 17)
        found.append(_Bar(lane, start, end, "k-bad" if row["failed"] else f"k-{kind}", text))
    return found


def _seconds(text: str | None) -> float | None:
    """Return seconds since the epoch of an ISO time; one without a zone is read as UTC."""
    try:
        moment = datetime.fromisoformat(text or "")
    except ValueError:
        return None
    return (moment if moment.tzinfo else moment.replace(tzinfo=UTC)).timestamp()


def _pauses(bars: list[_Bar]) -> list[tuple[float, float]]:
    """Return gaps in which no worker did anything, where they are long beside the work itself."""
    busy, gaps, end = 0.0, [], bars[0].start
    for bar in bars:
        if bar.start > end:
            gaps.append((end, bar.start))
        busy += max(0.0, bar.end - max(bar.start, end))
        end = max(end, bar.end)
    return [(a, b) for a, b in gaps if b - a > max(60.0, 0.25 * busy)]


def _draw(bars: list[_Bar], lanes: list[str], pauses: list[tuple[float, float]]) -> Markup:
    first, last = bars[0].start, max(b.end for b in bars)
    shown = max(1e-3, last - first - sum(b - a for a, b in pauses))
    cut = 0.02 * shown  # width left to a pause

    def elapsed(moment: float) -> float:
        """Return seconds on the axis at `moment`, pauses shortened to `cut`."""
        lost = sum(min(moment, b) - a - cut for a, b in pauses if moment > a)
        return moment - first - lost

    scale = (_RIGHT - _LEFT) / (shown + cut * len(pauses))
    height = _ROW * len(lanes) + 46
    parts = []
    rows = {lane: 10 + i * _ROW for i, lane in enumerate(lanes)}
    for lane, y in rows.items():
        parts.append(words(lane, _LEFT - 8, y + 14, "tick", "end"))
        parts.append(line(_LEFT, _RIGHT, y + 20, y + 20, "grid"))
    for bar in bars:
        x, wide = elapsed(bar.start), elapsed(bar.end) - elapsed(bar.start)
        size = {"width": max(1.0, wide * scale - 0.5), "y": rows[bar.lane] + 3, "height": 14}
        said, css = tag("title", bar.text), f"bar {bar.css}"
        parts.append(tag("rect", said, x=_LEFT + x * scale, **size, class_=css))
    bottom = height - 36
    for a, _ in pauses:
        x = _LEFT + (elapsed(a) + cut / 2) * scale
        parts.append(line(x, x, 4, bottom, "cut"))
    parts += _axis(shown + cut * len(pauses), scale, bottom, bool(pauses))
    return picture(f"Timeline of {plural(len(bars), 'bar')}, a row a worker", parts, 1080, height)


def _axis(seconds: float, scale: float, bottom: float, cut: bool) -> list[Markup]:
    step = next((s for s in _STEPS if s >= seconds / 8), nice_step(seconds / 8))
    unit, size = ("h", 3600) if step >= 3600 else ("min", 60) if step >= 60 else ("s", 1)
    found = [line(_LEFT, _RIGHT, bottom, bottom, "axis")]
    for i in range(int(seconds / step) + 1):
        x = _LEFT + i * step * scale
        label = f"{i * step / size:g}"
        found.append(line(x, x, bottom, bottom + 4, "axis"))
        found.append(words(label, x, bottom + 16, "tick", "middle"))
    what = f"{unit} of running time" if cut else f"{unit} since the first stage began"
    return [*found, words(what, _RIGHT, bottom + 28, "label", "end")]
