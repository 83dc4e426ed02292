"""How numbers and foreign text are written, in one place, so that every format shows the same."""

from __future__ import annotations

import math
import re
import shutil
import textwrap
import unicodedata
from collections.abc import Iterable
from itertools import groupby

#: zero-width joiner: the one format character that emoji need
_JOINER = "\u200d"


def plain(text: object) -> str:
    """Return `text` without control and direction-changing characters; tabs and newlines stay.

    This is the guard of terminal and page, whatever a suite, a store or a log holds.
    """
    source = str(text)
    if source.isprintable():
        return source
    return "".join(c if _harmless(c) else "\ufffd" for c in source)


def _harmless(char: str) -> bool:
    """Return whether a character prints, or is white space that moves nothing."""
    return char.isprintable() or char in "\n\t" + _JOINER or unicodedata.category(char) == "Zs"


def short(text: object, limit: int = 60) -> str:
    """Return `text` on one line, cut to `limit` characters."""
    line = " ".join(plain(text).split())
    return line if len(line) <= limit else line[: limit - 1].rstrip() + "…"


def middle(text: object, limit: int = 48) -> str:
    """Return `text` on one line, cut in its middle: names of rows often differ at their ends."""
    line = short(text, 10_000)
    if len(line) <= limit:
        return line
    head = limit // 3
    return f"{line[:head]}…{line[head + 1 - limit :]}"


def tail(text: object, limit: int = 4000) -> str:
    """Return the end of a long text, with a word on what was left out."""
    source = plain(text)
    if len(source) <= limit:
        return source
    return f"[the first {len(source) - limit:,} characters are in the record]\n{source[-limit:]}"


def room(otherwise: int = 0) -> int:
    """Return the columns of the terminal, or `otherwise` where neither one nor COLUMNS tells."""
    return shutil.get_terminal_size((otherwise, 24)).columns


def wrap(text: str, width: int, indent: str = "  ") -> list[str]:
    """Return `text` in lines of whole words, `indent` before all but the first; width 0: in one."""
    if len(text) <= width or not width:
        return [text]
    lines = textwrap.TextWrapper(max(width, 40), subsequent_indent=indent)
    lines.break_on_hyphens = lines.break_long_words = False
    return lines.wrap(text) or [""]


def fixed(value: float, digits: int) -> str:
    """Return `value` with `digits` decimals and a plain ASCII minus; never "-0.0"."""
    text = f"{value:.{digits}f}"
    return text[1:] if float(text) == 0.0 and text.startswith("-") else text


def mean_sd(mean: float, sd: float | None, digits: int) -> str:
    """Return "97.7 ± 0.5"; without the spread where there is none."""
    return fixed(mean, digits) if sd is None else f"{fixed(mean, digits)} ± {fixed(sd, digits)}"


def signed(value: float, digits: int) -> str:
    """Return "+4.3" or "−0.2", for differences."""
    text = fixed(value, digits)
    if text.startswith("-"):
        return "−" + text[1:]
    return "+" + text if float(text) else text


def time_unit(hours: float) -> tuple[str, float]:
    """Return the unit in which `hours` reads well, and the factor from hours to it."""
    if hours >= 1.0:
        return "h", 1.0
    return ("min", 60.0) if hours * 60.0 >= 1.0 else ("s", 3600.0)


def device_word(kind: str | None) -> str:
    """Return what is held of a kind of device: "GPU"; of a CPU "core"; "device" of any other."""
    return {"gpu": "GPU", "cpu": "core"}.get(kind or "", "device")


def held(devices: float, kind: str | None, model: str | None) -> str:
    """Return the devices that an attempt held: "2 cores (AMD EPYC)", "0.25 GPU (L4)"."""
    word = device_word(kind)
    told = f"{devices:g} {word}" if devices < 1 else plural(int(devices), word)
    return told + (f" ({model})" if model else "")


def duration(seconds: float | None) -> str:
    """Return "1 h 12 min", "4 min 5 s" or "3.2 s"."""
    if seconds is None or not math.isfinite(seconds):
        return "not measured"
    if seconds < 60:
        return f"{seconds:.1f} s"
    minutes, rest = divmod(round(seconds), 60)
    if minutes < 60:
        return f"{minutes} min {rest} s"
    hours, minutes = divmod(minutes, 60)
    return f"{hours:,} h {minutes} min"


def amount(value: float) -> str:
    """Return three significant digits without an exponent, for costs in running text."""
    magnitude = abs(value)
    digits = 0 if magnitude >= 100 else 1 if magnitude >= 10 else 2 if magnitude >= 1 else 3
    if 0 < magnitude < 0.1:
        digits = min(2 - math.floor(math.log10(magnitude)), 9)
    return f"{value:,.{digits}f}"


def ranges(numbers: Iterable[int]) -> str:
    """Return "0 to 4, 7" for 0, 1, 2, 3, 4, 7; no range of fewer than three."""
    told: list[str] = []
    for _, group in groupby(enumerate(sorted(numbers)), lambda one: one[1] - one[0]):
        run = [str(number) for _, number in group]
        told += [f"{run[0]} to {run[-1]}"] if len(run) > 2 else run
    return ", ".join(told)


def slug(text: object) -> str:
    """Return `text` as part of an HTML id: letters, digits and hyphens."""
    return re.sub(r"[^A-Za-z0-9]+", "-", str(text)).strip("-").lower() or "x"


def plural(count: int, noun: str) -> str:
    """Return "1 stage" or "3 stages"."""
    return f"{count:,} {noun}" + ("" if count == 1 else "s")
