"""The page: harmless whatever the data, complete without JavaScript, quick when large."""

from __future__ import annotations

import json
import re
import time
from html.parser import HTMLParser

import polars as pl
import pytest
import yaml
from report_views import (
    RESOLVED,
    digits_view,
    full_view,
    gallery_of,
    key_of,
    metric,
    record,
    search_view,
    stage,
    view_of,
)

from reports.formats.exports import to_json, to_markdown
from reports.formats.html import extract_suite, render_html
from reports.formats.text import render_text
from reports.frames import FAILURES
from reports.tables.against import Reference, hold, measured
from reports.tables.build import build_tables

NASTY = "<script>alert(1)</script>{{ 7*7 }}{% raw %}\"'&😀\x1b[31m\x00</details></script><!--"


class Page(HTMLParser):
    """Ids, links and scripts of a page, and whether every element was closed in order."""

    VOID = ("meta", "link", "br", "input", "img", "hr")

    def __init__(self, html: str) -> None:
        super().__init__()
        self.ids: list[str] = []
        self.links: list[str] = []
        self.scripts: list[dict[str, str | None]] = []
        self.sources: list[str] = []
        self.handlers: list[str] = []
        self.open: list[str] = []
        self.text: list[str] = []
        self.feed(html)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        found = dict(attrs)
        if "id" in found:
            self.ids.append(found["id"] or "")
        if tag == "a":
            self.links.append(found["href"] or "")
        if tag == "script":
            self.scripts.append(found)
        self.sources += [v or "" for k, v in attrs if k in ("src", "srcset", "action", "data")]
        self.handlers += [k for k, _ in attrs if k.startswith("on")]
        if tag not in self.VOID:
            self.open.append(tag)

    def handle_startendtag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.handle_starttag(tag, attrs)
        if tag not in self.VOID:
            self.open.pop()

    def handle_endtag(self, tag: str) -> None:
        assert self.open, f"</{tag}> closes nothing"
        assert self.open.pop() == tag

    def handle_data(self, data: str) -> None:
        self.text.append(data)


def nasty_view():
    """Every string of a view that comes from elsewhere is hostile or long."""
    row = stage(key_of(1), "mae", NASTY, 0, name=NASTY, worker=NASTY, device_model=NASTY)
    log = NASTY + "x" * 10_000
    row["record"] = record(row, settings={NASTY: NASTY}, log_tail=log, env={"host": NASTY})
    evaluation = stage(key_of(2), "knn", NASTY, 0, status="failed", reason=NASTY)
    done = stage(key_of(3), "knn", "x" * 10_000, 0)
    times = {"started": "2026-03-01T12:00:00", "ended": "2026-03-01T12:00:01", "wall_s": 1.0}
    tries = [times | {"key": key_of(2), "attempt": 1, "status": "failed", "error": NASTY}]
    curve = {"step": [0.0, 1.0], "loss": [1.0, 0.5], NASTY: [1.0, 2.0]}
    run = {"started": NASTY, "ended": None, "wall_s": 1.0, "status": NASTY, "command": NASTY}
    bad = ("failed", NASTY, NASTY, log, [NASTY])
    return view_of(
        [row, evaluation, done],
        [metric("x" * 10_000, 0, key_of(3), 90.0, label=NASTY, unit=NASTY)],
        tries,
        failures=pl.DataFrame([(key_of(2), NASTY, *bad)], FAILURES, orient="row"),
        gallery=gallery_of(key_of(1), NASTY, "x" * 10_000, channels=3),
        provenance={NASTY: {NASTY: [NASTY]}},
        curves={key_of(1): curve},
        tables=[{"title": NASTY, "columns": ["knn", "cost"], "groups": {NASTY: ["knn"]}}],
        **{"notes": [NASTY], "problems": [NASTY], "runs": [run]},
        **dict.fromkeys(("suite", "title", "profile", "scale", "resolved"), NASTY),
    )


def failed_view():
    """A tuning stage that failed, and its evaluation, which therefore never ran."""
    log = "\n".join(f"line {i}" for i in range(1, 11))
    tune, knn = key_of("tune"), key_of("knn")
    rows = [
        stage(key_of("mae"), "mae", "MAE-CT", 0),
        stage(tune, "tune", "MAE-CT", 0, status="failed", reason="the loss is nan"),
        stage(knn, "knn", "MAE-CT", 0, status="failed", reason="its input failed: tune"),
    ]
    error = {"class": "TrainingError", "message": "the loss is nan"}
    rows[1]["record"] = record(rows[1], status="failed", error=error, log_tail=log, files={})
    failure = (tune, "tuning, seed 0", "failed", *error.values(), log, ["MAE-CT"])
    tried = {"key": tune, "name": "tuning", "attempt": 1, "status": "failed", "wall_s": 1.0}
    return view_of(
        rows,
        [],
        [tried | {"error": "the loss is nan"}],
        failures=pl.DataFrame([failure], FAILURES, orient="row"),
        columns={"knn": metric("MAE-CT", 0, knn, 0.0)},
        tables=[{"title": "T", "columns": ["knn"]}],
    )


def test_a_failed_stage_is_told_on_the_page_and_in_the_terminal() -> None:
    """With error, end of the log and the rows it cost: above the tables, in its record, below."""
    html = render_html(failed_view())
    alert = html[html.index('class="warn failure"') : html.index('id="tables"')]
    assert f'href="#r-{key_of("tune")}">tuning, seed 0</a> failed: <code>TrainingError' in alert
    assert "the loss is nan. It costs the rows MAE-CT." in alert
    assert re.search(r"<details><summary>[^<]+</summary><pre>line 1\n.*line 10</pre>", alert, re.S)
    entry = html[html.index(f'id="r-{key_of("tune")}"') :].split("</details>")[0]
    for told in ("1: failed, 1.0 s: the loss is nan", "class: TrainingError", "line 10"):
        assert told in entry, told
    # in line with the numbers, also where these have a spread
    assert '<span class="sd"></span><span class="state">failed' not in render_html(search_view())
    terminal = render_text(failed_view())
    assert re.search(r"^MAE-CT +failed$", terminal, re.MULTILINE)
    failure = terminal[terminal.index("tuning, seed 0 failed: TrainingError: the loss is nan") :]
    assert "It costs the rows MAE-CT." in failure
    assert failure.endswith("".join(f"  | line {i}\n" for i in range(5, 11)))
    tables = build_tables(failed_view())
    assert "| MAE-CT | failed |" in to_markdown(tables)
    (row,) = json.loads(to_json(failed_view(), tables))["tables"][0]["rows"]
    told = row["cells"]["knn"]
    assert (told["state"], told["reason"]) == ("failed", "seed 0 failed: its input failed: tune")


@pytest.mark.parametrize("make", [full_view, nasty_view, failed_view])
def test_page_is_well_formed_and_asks_for_nothing(make) -> None:
    page = Page(render_html(make()))
    assert page.open == []
    assert len(page.ids) == len(set(page.ids))
    assert page.handlers == []
    assert [s for s in page.sources if not s.startswith("data:image/png;base64,")] == []
    assert [script.get("type") for script in page.scripts] == ["application/json", None]
    assert [link for link in page.links if not link.startswith("#")] == []
    assert {link[1:] for link in page.links} <= set(page.ids)


def test_foreign_text_is_shown_and_not_run() -> None:
    html = render_html(nasty_view())
    page = Page(html)
    assert "<script>alert" not in html
    assert "\x1b" not in html
    assert "\x00" not in html
    text = "".join(page.text)
    assert "<script>alert(1)</script>{{ 7*7 }}{% raw %}" in text
    suite, _, told = extract_suite(html).partition("# provenance:\n")
    assert suite == NASTY
    assert all(line.startswith("# ") for line in told.splitlines())
    terminal = render_text(nasty_view())
    assert "\x1b" not in terminal
    assert max(map(len, terminal.splitlines())) < 300


def test_a_long_log_is_cut_to_its_end() -> None:
    html = render_html(nasty_view())
    assert "characters are in the record" in html
    assert len(html) < 400_000


def test_page_is_complete_without_javascript() -> None:
    html = render_html(full_view())
    text = " ".join("".join(Page(html[: html.index("<script")]).text).split())
    costs = ["Training cost per seed", "Suite, each stage once", "Saved by sharing"]
    kept = ["Attempts failed", "batch_size: 128", "epoch 2 loss 0.42", "ab" * 32, "seed 1: 98.2"]
    told = ["digits 8x8, ViT 0.1 M parameters, CPU", "97.7 ± 0.5", "Is the difference real?"]
    for expected in [*told, *costs, *kept, "abc123"]:
        assert expected in text, expected
    # the scale comes before everything else
    assert text.index("digits 8x8") < text.index("Table 1.")
    for figure in ("pareto", "seeds", "curves", "timeline"):
        assert f'id="{figure}"' in html


def test_the_gallery_says_what_changed_and_marks_other_classes() -> None:
    html = render_html(full_view())
    part = html[html.index('<details class="part" id="gallery"') :]
    part = part[: part.index("</details>")]
    text = " ".join("".join(Page(part).text).split())
    assert "came to be of the image's class for 2 of 60 images, and ceased to be for 1" in text
    assert [text.count(s) for s in ("came right", "went wrong", "right in both")] == [2, 1, 3]
    assert part.count('class="pic other"') == 4
    assert part.count("<img ") == 3 * 8 + 6 * 11
    assert part.count('class="dot"') + part.count('class="stroke"') == 2 * 60 + 10
    texts = re.findall(r'<img [^>]*alt="([^"]*)"', part)
    assert len(set(texts)) == len(texts)
    for said in ("What the MAE sees of image 3", "Neighbour 5 of query 4 by MAE-CT, class 9"):
        assert said in texts
    assert "gallery" not in render_html(full_view(gallery=None)).split("</style>")[1]


def answer(html: str) -> str:
    """The text of the block that opens the page."""
    part = html[html.index('<div class="answer">') :]
    return " ".join("".join(Page(part[: part.index("</div>\n<p")]).text).split())


def test_the_page_opens_with_its_answer() -> None:
    """The comparison, what it cost, at which scale, what to bear in mind; then the table."""
    view = digits_view()
    html = render_html(view)
    said = answer(html.replace("</dl>\n</div>", "</dl>\n</div>\n<p"))
    assert said.startswith("MAE-CT is better than MAE, compute-matched in k-NN, k=10: +5.5 points")
    assert "Cost 1.38 core-h for the whole suite, each stage once; training of one seed" in said
    assert "Scale digits at 8×8" in said
    assert "Caveat With 10 seeds a true difference below 1.3 points would be missed" in said
    assert "Against" not in said
    places = [
        html.index(f'id="{name}"') for name in ("t-0", "published", "pareto", "costs", "values")
    ]
    assert places == sorted(places)
    bold = html.index("Bold: better than MAE")
    assert html.index('id="t-0"') < bold < html.index('id="t-1"')
    folded = html[html.index('id="details"') :]
    assert folded.count('<details class="part"') == 5
    # nothing named: the best row, and that it is no comparison
    assert "Best k-NN (k=10) by its mean: MAE-CT, 97.7 ± 0.5 %, of 6 rows" in render_html(
        full_view()
    )


def test_the_page_says_whether_a_reference_is_reproduced() -> None:
    view = digits_view()
    tables = build_tables(view)
    cells = {at: cell for at, (_, cell) in measured(tables).items()}
    held = hold(tables, {}, Reference("docs/results/digits.json", "", cells, {}))
    said = answer(render_html(view, against=held).replace("</dl>\n</div>", "</dl>\n</div>\n<p"))
    assert (
        "Against Reproduced: of 56 cells 56 have the same digits. (docs/results/digits.json)"
        in said
    )


def test_every_cell_leads_to_its_records() -> None:
    view = full_view()
    html = render_html(view)
    row = re.search(r'<th scope="row" title="MAE-CT">.*?</tr>', html, re.DOTALL)
    assert row is not None
    anchor = re.search(r'href="#(v-[^"]+)"', row.group())
    assert anchor is not None
    target = html[html.index(f'<tr id="{anchor.group(1)}"') :]
    target = target[: target.index("</tr>")]
    for seed in (0, 1, 2):
        assert f'href="#r-{key_of("knn", "MAE-CT", seed)}"' in target


def test_scripts_and_styles_are_allowed_by_their_hash_only() -> None:
    html = render_html(full_view())
    policy = re.search(r'Content-Security-Policy" content="([^"]+)"', html)
    assert policy is not None
    assert "default-src &#39;none&#39;" in policy.group(1)
    assert "unsafe" not in policy.group(1)


def test_suite_can_be_taken_out_again() -> None:
    text = extract_suite(render_html(full_view()))
    assert text == RESOLVED + "# provenance:\n#   commit: abc123\n"
    assert yaml.safe_load(text) == yaml.safe_load(RESOLVED)
    with pytest.raises(ValueError, match="embeds no suite"):
        extract_suite("<html></html>")


def test_tables_that_share_rows_and_columns_are_drawn_once() -> None:
    declared = {"title": "T", "columns": ["knn", "cost"]}
    again = declared | {"title": "T again", "baseline": "MAE"}
    html = render_html(full_view(tables=[declared, again, declared | {"columns": ["probe"]}]))
    assert [i for i in Page(html).ids if i.startswith("seeds")] == ["seeds", "seeds-3"]


def test_a_run_without_an_end_is_listed() -> None:
    html = render_html(full_view(runs=[{"started": "2026-03-01T12:00:00", "status": "running"}]))
    assert '<td class="row">running</td>' in html


def test_page_renders_while_the_run_goes_on() -> None:
    rows = [
        stage(key_of(0), "mae", "A", 0),
        stage(key_of(1), "knn", "A", 0, status="running", device_hours=None, started=None),
        stage(key_of(2), "mae", "A", 1, status="pending", started=None),
        stage(key_of(3), "knn", "A", 1, status="pending", reason="waits for mae"),
    ]
    html = render_html(view_of(rows, [], tables=[{"title": "T", "columns": ["knn", "cost"]}]))
    assert "1 of 4 stages complete; 1 running, 2 pending" in html
    assert "<dd>3 of 4 stages are not complete" in html
    assert "running" in html


def large_view(rows: int = 1000, seeds: int = 5):
    """10,000 stages: a MAE and its evaluation for every row and seed."""
    stages, metrics = [], []
    for i in range(rows):
        for seed in range(seeds):
            mae, knn = key_of("mae", i, seed), key_of("knn", i, seed)
            for row in (
                stage(mae, "mae", f"row {i}", seed),
                stage(knn, "knn", f"row {i}", seed),
            ):
                row["record"] = record(row)
                stages.append(row)
            metrics.append(metric(f"row {i}", seed, knn, 90 + (i * 7 + seed * 13) % 100 / 20))
    tables = [{"title": "T", "columns": ["knn", "cost"], "baseline": "row 0"}]
    problems = [f"store/{key_of(i)}/record.json: checksum differs" for i in range(100)]
    return view_of(stages, metrics, tables=tables, problems=problems)


def test_ten_thousand_stages_render_in_seconds() -> None:
    view = large_view()
    assert view.stages.height == 10_000
    began = time.process_time()
    html = render_html(view)
    took = time.process_time() - began
    assert took < 10
    assert "100 problems" in html
    assert len(html) < 30_000_000
