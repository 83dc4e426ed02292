"""The page in Chromium, network off: what a person sees at two widths, light, dark and printed."""

from __future__ import annotations

import json
import re
import shlex
import shutil
import subprocess
from pathlib import Path

import numpy as np
import pytest
from PIL import Image
from report_views import digits_view, full_view, headed_view, search_view
from test_report_html import failed_view, nasty_view

from reports.formats.html import render_html

CHROMIUM = shutil.which("chromium") or shutil.which("chromium-browser")
pytestmark = pytest.mark.needs("chromium", "chromium-browser")

FLAGS = shlex.split("""
--headless --no-sandbox --disable-gpu --disable-quic --no-first-run --disable-background-networking
--disable-component-update --disable-sync --disable-dev-shm-usage --hide-scrollbars
--enable-logging=stderr --allow-file-access-from-files --virtual-time-budget=4000
--host-resolver-rules='MAP * ~NOTFOUND'
""")

LIGHT, DARK = (f"--blink-settings=preferredColorScheme={i}" for i in (1, 0))

#: measures the page from a frame around it, since its own policy admits no script but its own
PROBE = """<!doctype html><body style="margin:0">
<iframe id="f" src="page.html" style="border:0;width:{width}px;height:1200px"></iframe>
<script>
document.getElementById("f").addEventListener("load", (event) => {{
  const page = event.target.contentDocument, root = page.documentElement;
  const view = event.target.contentWindow;
  const spare = {print} ? ".skip" : ".scroll, .skip, pre";
  const seen = [...page.querySelectorAll("body *")].filter((e) => e.checkVisibility());
  const wide = seen.filter((e) => !e.closest(spare) &&
    e.getBoundingClientRect().right > {width} + 1);
  const cut = [...page.querySelectorAll("svg text")].filter((t) => {{
    const r = t.getBoundingClientRect(), box = t.closest("svg").getBoundingClientRect();
    return r.left < box.left - 1 || r.right > box.right + 1 || r.bottom > box.bottom + 1;
  }}).map((t) => t.textContent);
  // what hides a part of its own text
  cut.push(...seen.filter((e) => e.clientWidth && view.getComputedStyle(e).overflowX === "hidden" &&
    e.scrollWidth > e.clientWidth + 1).map((e) => e.textContent));
  // every line of text on the page, from the top
  const lines = [], walker = page.createTreeWalker(page.body, NodeFilter.SHOW_TEXT);
  const range = page.createRange();
  const light = (colour) => colour.match(/[\\d.]+/g).slice(0, 3).map(Number).reduce((sum, c, i) =>
    sum + [0.2126, 0.7152, 0.0722][i] * (c <= 10 ? c / 3294.6 : ((c / 255 + 0.055) / 1.055) ** 2.4),
    0);
  const paper = light(view.getComputedStyle(page.body).backgroundColor);
  const pale = [], small = [], broken = [];
  while (walker.nextNode()) {{
    const node = walker.currentNode, parent = node.parentElement;
    if (!node.data.trim() || !parent.checkVisibility() || parent.closest(".skip")) continue;
    range.selectNodeContents(node);
    const style = view.getComputedStyle(parent);
    const own = [...range.getClientRects()].filter((r) => r.width > 1);
    if (own.length === 0) continue;
    lines.push(...own.map((r) => [r, node.data.trim(), parent]));
    const ink = light(parent.closest("svg") ? style.fill : style.color);
    const contrast = (Math.max(ink, paper) + 0.05) / (Math.min(ink, paper) + 0.05);
    if (contrast < 4.5) pale.push(node.data.trim() + " " + contrast.toFixed(1));
    for (const word of parent.closest("thead, dt") ? node.data.matchAll(/[^\\s/-]+/g) : []) {{
      range.setStart(node, word.index);
      range.setEnd(node, word.index + word[0].length);
      if (range.getClientRects().length > 1) broken.push(word[0]);
    }}
    if (own[0].height < 10 && !parent.closest("sup")) small.push(node.data.trim());
  }}
  lines.sort((a, b) => a[0].top - b[0].top);
  const overlaps = [];
  lines.forEach(([a, text, parent], i) => {{
    for (const [b, other, beside] of lines.slice(i + 1)) {{
      if (b.top > a.bottom - 3) break;
      const across = Math.min(a.right, b.right) - Math.max(a.left, b.left);
      const down = Math.min(a.bottom, b.bottom) - b.top;
      if (across > 1 && down > 0.3 * Math.min(a.height, b.height) && parent !== beside)
        overlaps.push(text.slice(0, 60) + " / " + other.slice(0, 60));
    }}
  }});
  {actions}
  const found = {{
    width: root.scrollWidth,
    wide: wide.map((e) => e.tagName + "." + e.className).slice(0, 5),
    cut: cut.slice(0, 5), overlaps: overlaps.slice(0, 5),
    pale: [...new Set(pale)].slice(0, 5), small: small.slice(0, 5),
    broken, opened: page.querySelectorAll("details.part[open] details.record[open]").length,
    lines: lines.length, height: root.scrollHeight,
    table: (page.querySelector(".result table") || root).getBoundingClientRect().bottom,
    swipe: [...page.querySelectorAll("#tables .swipe")].filter((e) => e.checkVisibility()).length,
    requests: view.performance.getEntriesByType("resource").map((r) => r.name),
    background: view.getComputedStyle(page.body).backgroundColor,
    ...(typeof extra === "undefined" ? {{}} : extra),
  }};
  const out = document.createElement("pre");
  out.id = "found";
  out.textContent = JSON.stringify(found);
  document.body.append(out);
}});
</script>"""

#: clicks a header twice, filters the records
CLICKS = """
  const heads = [...page.querySelectorAll(".result thead button.sort")];
  const knn = heads.find((b) => b.textContent.startsWith("k-NN"));
  const rows = () => [...page.querySelectorAll(".result tbody tr th")].map((t) => t.textContent);
  const extra = {};
  const mean = page.querySelector("td.metric a");
  mean.parentElement.classList.add("bold");
  extra.bold = view.getComputedStyle(mean).fontWeight;
  knn.click(); extra.descending = rows().slice(0, 6);
  knn.click(); extra.ascending = rows().slice(0, 6);
  const input = page.querySelector("#records input[type=search]");
  input.value = "tune MAE-CT_aug";
  input.dispatchEvent(new Event("input"));
  extra.records = [...page.querySelectorAll("details.record")].filter((d) => !d.hidden).length;
  page.location.hash = page.querySelector("#values tbody a").getAttribute("href");
"""


def chromium(folder: Path, *arguments: str) -> tuple[str, str]:
    """Standard output and error of one headless run with a fresh profile."""
    assert CHROMIUM is not None
    command = [CHROMIUM, *FLAGS, f"--user-data-dir={folder / 'profile'}", *arguments]
    done = subprocess.run(command, capture_output=True, timeout=180, check=True, cwd=folder)
    return done.stdout.decode(errors="replace"), done.stderr.decode(errors="replace")


def measure(
    folder: Path, page: str, width: int, *flags: str, actions: str = "", as_print: bool = False
) -> dict:
    """What the probe finds in the page at a width; fails on any message on the console."""
    (folder / "page.html").write_text(page, encoding="utf-8")
    probe = folder / "probe.html"
    told = {"width": width, "actions": actions, "print": str(as_print).lower()}
    probe.write_text(PROBE.format(**told), encoding="utf-8")
    dom, log = chromium(folder, *flags, f"--window-size={width},1200", "--dump-dom", probe.as_uri())
    assert [line for line in log.splitlines() if "CONSOLE" in line] == []
    found = re.search(r'<pre id="found">(.*?)</pre>', dom, re.DOTALL)
    assert found is not None, dom[-2000:]
    return json.loads(
        found.group(1).replace("&amp;", "&").replace("&lt;", "<").replace("&gt;", ">")
    )


@pytest.mark.parametrize("make", [headed_view, search_view, nasty_view, failed_view])
@pytest.mark.parametrize("width", [390, 1440])
@pytest.mark.parametrize("scheme", [LIGHT, DARK])
def test_all_is_legible_and_nothing_overlaps_or_is_cut(
    make, width: int, scheme: str, tmp_path: Path
) -> None:
    found = measure(tmp_path, render_html(make()), width, scheme)
    assert found["width"] <= width
    assert found["lines"] > (50 if make is failed_view else 100)
    for name in ("wide", "cut", "overlaps", "broken", "pale", "small", "requests"):
        if (make, name) == (nasty_view, "broken"):  # its words have no end
            continue
        assert found[name] == [], name
    red, green, blue = map(int, re.findall(r"\d+", found["background"])[:3])
    assert (red + green + blue > 3 * 240) if scheme == LIGHT else (red + green + blue < 3 * 40)


@pytest.mark.parametrize("width", [390, 1440])
def test_without_its_script_a_link_opens_the_record(width: int, tmp_path: Path) -> None:
    page = render_html(full_view())
    page = page[: page.rindex("<script>")] + "</body></html>"
    follow = 'page.querySelector("#values tbody a").click();'
    found = measure(tmp_path, page, width, actions=follow)
    assert found["opened"] == 1
    assert found["width"] <= width
    for name in ("wide", "cut", "overlaps", "broken"):
        assert found[name] == [], name


@pytest.mark.parametrize("make", [full_view, search_view])
def test_the_page_fits_the_width_of_paper(make, tmp_path: Path) -> None:
    page = render_html(make()).replace("@media print{", "@media all{")
    page = re.sub(r'<meta http-equiv="Content-Security-Policy"[^>]*>', "", page)
    paper = round((210 - 2 * 14) / 25.4 * 96)  # A4 upright, less its margins, in CSS pixels
    found = measure(tmp_path, page, paper, as_print=True)
    assert found["width"] <= paper
    for name in ("wide", "cut", "overlaps", "pale"):
        assert found[name] == [], name


def test_sorting_and_filters_work(tmp_path: Path) -> None:
    found = measure(tmp_path, render_html(full_view()), 1440, actions=CLICKS)
    assert found["descending"][:2] == ["MAE-CT", "MAE-CT_aug"]
    assert found["descending"][-1] == "random encoder"
    assert found["ascending"] == found["descending"][::-1]
    assert found["bold"] == "700"
    assert found["records"] == 3


@pytest.mark.parametrize("width", [390, 1440])
@pytest.mark.parametrize("scheme", [LIGHT, DARK])
def test_screenshots_come_out(width: int, scheme: str, tmp_path: Path) -> None:
    (tmp_path / "page.html").write_text(render_html(full_view()), encoding="utf-8")
    frame = tmp_path / "frame.html"  # a window is never as narrow as a telephone
    frame.write_text(
        '<!doctype html><body style="margin:0"><iframe src="page.html" '
        f'style="border:0;width:{width}px;height:3000px"></iframe>'
    )
    size = f"--window-size={max(width, 500)},3000"
    chromium(tmp_path, scheme, size, "--screenshot=page.png", frame.as_uri())
    picture = Image.open(tmp_path / "page.png").convert("L").crop((0, 0, width, 3000))
    pixels = np.asarray(picture)
    paper = int(np.median(pixels))
    assert paper > 240 if scheme == LIGHT else paper < 40
    # written on, but nothing runs out of its sides
    assert np.count_nonzero(abs(pixels.astype(int) - paper) > 60) > 20_000
    for side in (pixels[:, :4], pixels[:, -4:]):
        assert np.ptp(side) == 0


def test_it_prints_on_a_few_upright_pages(tmp_path: Path) -> None:
    page = tmp_path / "page.html"
    page.write_text(render_html(digits_view()), encoding="utf-8")
    chromium(tmp_path, "--print-to-pdf=page.pdf", "--no-pdf-header-footer", page.as_uri())
    data = (tmp_path / "page.pdf").read_bytes()
    boxes = re.findall(rb"/MediaBox \[0 0 ([\d.]+) ([\d.]+)\]", data)
    assert 3 <= len(boxes) <= 10
    assert {(round(float(w)), round(float(h))) for w, h in boxes} == {(595, 842)}


@pytest.mark.parametrize("width", [390, 1440])
def test_the_default_suite_is_short_and_its_tables_say_that_they_scroll(
    width: int, tmp_path: Path
) -> None:
    found = measure(tmp_path, render_html(digits_view()), width)
    assert found["height"] <= (6000 if width == 1440 else 10_000)
    # the answer and the main table are seen without scrolling
    assert found["table"] < 1200 or width == 390
    assert found["swipe"] == (3 if width == 390 else 0)
    for name in ("wide", "cut", "overlaps", "broken", "pale", "small"):
        assert found[name] == [], name
