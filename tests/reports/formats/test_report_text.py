"""The terminal's text where standard output lacks characters."""

from __future__ import annotations

import io
import sys

import pytest
from report_views import full_view

from reports.formats.text import render_text


@pytest.mark.parametrize(
    ("encoding", "spread"), [("ascii", "+/-"), ("latin-1", "±"), ("cp437", "±"), ("utf-8", "±")]
)
def test_tables_keep_their_columns_in_every_encoding(
    encoding: str, spread: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(sys, "stdout", io.TextIOWrapper(io.BytesIO(), encoding=encoding))
    text = render_text(full_view())
    text.encode(encoding)
    lines = text.splitlines()
    rules = [i for i, line in enumerate(lines) if line and set(line) <= {"─", "-"}]
    width = len(lines[rules[0]])
    assert all(len(line) <= width for line in lines[rules[0] : rules[2]])
    cells = [line for line in lines[rules[1] : rules[2]] if f" {spread} " in line]
    assert len({line.index(f" {spread} ") for line in cells}) == 1
    assert "?" not in "".join(lines[rules[0] : rules[2]])
