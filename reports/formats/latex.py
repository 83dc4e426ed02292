"""LaTeX of the tables: booktabs rules, grey published columns, everything escaped."""

from __future__ import annotations

import unicodedata
from collections.abc import Sequence

from reports.display import short
from reports.formats.templates import environment
from reports.tables.model import Table, each, number, remark

#: characters by the name of what sets them in text, and in mathematics; then all that LaTeX minds
_TEXT = {"\\": "backslash", "~": "asciitilde", "^": "asciicircum", "<": "less", ">": "greater"}
_TEXT |= {"|": "bar"}
_MATH = {"±": "pm", "×": "times", "≤": "leq", "≥": "geq", "Δ": "Delta", "α": "alpha", "σ": "sigma"}
_MATH |= {"µ": "mu", "μ": "mu", "·": "cdot", "→": "rightarrow", "↑": "uparrow", "↓": "downarrow"}
_SPECIAL = {char: f"\\{char}" for char in "{}&#%_"}
_SPECIAL |= {char: rf"\text{name}{{}}" for char, name in _TEXT.items()}
_SPECIAL |= {char: rf"$\{name}$" for char, name in _MATH.items()}
# behind a line's end these would be read as its options
_SPECIAL |= {char: f"{{{char}}}" for char in "[]*"}
_SPECIAL |= {"$": r"\char36{}", "°": r"$^\circ$", "²": "$^2$", "³": "$^3$", "…": r"\dots{}"}
_SPECIAL |= {"−": "$-$", "–": "--", "—": "---", "\u00a0": "~"}
_SPECIAL |= {"`": r"\char96{}", "’": "'", "‘": "`", "“": "``", "”": "''", '"': "''"}


def escape(text: object, limit: int = 400) -> str:
    """Return one line of text that any LaTeX engine sets as it stands.

    A character without a glyph in pdflatex becomes its code point, "U+1F600".
    """
    parts = []
    for char in short(text, limit):
        if char in _SPECIAL:
            parts.append(_SPECIAL[char])
        elif char.isascii() or _accented(char):
            parts.append(char)
        else:
            parts.append(f"U+{ord(char):04X}")
    return "".join(parts)


def _accented(char: str) -> bool:
    """Return whether LaTeX's own fonts set a character of Latin-1 as it is."""
    if char in "æøåßÆØÅ":
        return True
    parts = unicodedata.decomposition(char).split()
    return ord(char) < 0x100 and len(parts) == 2 and not parts[0].startswith("<")


def to_latex(tables: Sequence[Table]) -> str:
    """Return a document that compiles by itself; each table stands alone for pasting elsewhere.

    All that the template prints is escaped.
    """
    made = environment(
        escape,
        keep_trailing_newline=True,
        block_start_string="<%",
        block_end_string="%>",
        variable_start_string="<<",
        variable_end_string=">>",
    )
    return made.get_template("tables.tex").render(
        tables=[*each(tables)], number=number, remark=remark
    )
