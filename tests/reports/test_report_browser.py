"""The page in Chromium, network off: what a person sees at two widths, light, dark and printed."""

from __future__ import annotations

import json
import re
import shutil
import subprocess
from pathlib import Path

import pytest
from report_views import full_view
from test_report_html import nasty_view

from reports.html import render_html

CHROMIUM = shutil.which("chromium") or shutil.which("chromium-browser")
pytestmark = pytest.mark.skipif(CHROMIUM is None, reason="Chromium is not on the PATH")

FLAGS = [
    "--headless", "--no-sandbox", "--disable-gpu", "--disable-quic", "--no-first-run",
    "--disable-background-networking", "--disable-component-update", "--disable-sync",
    "--disable-dev-shm-usage", "--hide-scrollbars", "--host-resolver-rules=MAP * ~NOTFOUND",
    "--enable-logging=stderr", "--allow-file-access-from-files", "--virtual-time-budget=4000",
]  # fmt: skip

#: measures the page from a frame around it, since its own policy admits no script but its own
PROBE = """<!doctype html><body style="margin:0">
<iframe id="f" src="page.html" style="border:0;width:{width}px;height:1200px"></iframe>
<script>
document.getElementById("f").addEventListener("load", (event) => {{
  const page = event.target.contentDocument, root = page.documentElement;
  const view = event.target.contentWindow;
  const outside = (e) => !e.closest(".scroll, .skip, pre, details:not([open]), [hidden]");
  const wide = [...page.querySelectorAll("body *")].filter((e) => outside(e) &&
    e.getClientRects().length && e.getBoundingClientRect().right > {width} + 1);
  const texts = [...page.querySelectorAll("svg")].flatMap((svg) => {{
    const box = svg.getBoundingClientRect();
    return [...svg.querySelectorAll("text")].filter((t) => {{
      const r = t.getBoundingClientRect();
      return r.left < box.left - 1 || r.right > box.right + 1 || r.bottom > box.bottom + 1;
    }}).map((t) => t.textContent);
  }});
  const overlaps = [...page.querySelectorAll("svg")].flatMap((svg) => {{
    const boxes = [...svg.querySelectorAll("text")].map((t) => [t, t.getBoundingClientRect()]);
    return boxes.flatMap(([t, a], i) => boxes.slice(i + 1).filter(([, b]) =>
      Math.min(a.right, b.right) - Math.max(a.left, b.left) > 1 &&
      Math.min(a.bottom, b.bottom) - Math.max(a.top, b.top) > 2
    ).map(([u]) => t.textContent + " / " + u.textContent));
  }});
  {actions}
  const found = {{
    width: root.scrollWidth,
    wide: wide.map((e) => e.tagName + "." + e.className).slice(0, 5),
    cut: texts,
    overlaps,
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

#: clicks a header twice, unticks the first column, filters the records
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
  page.querySelector(".tools input[type=checkbox]").click();
  extra.hidden = page.querySelectorAll(".result table.sortable")[0].rows[3].cells[1].hidden;
  const input = page.querySelector("#records input[type=search]");
  input.value = "tune MAE-CT_aug";
  input.dispatchEvent(new Event("input"));
  extra.records = [...page.querySelectorAll("details.record")].filter((d) => !d.hidden).length;
  page.location.hash = page.querySelector("#values tbody a").getAttribute("href");
"""


def chromium(folder: Path, *arguments: str) -> tuple[str, str]:
    """Standard output and error of one headless run with a fresh profile."""
    assert CHROMIUM is not None
    done = subprocess.run(
        [CHROMIUM, *FLAGS, f"--user-data-dir={folder / 'profile'}", *arguments],
        capture_output=True, timeout=180, check=True, cwd=folder,
    )  # fmt: skip
    return done.stdout.decode(errors="replace"), done.stderr.decode(errors="replace")


def measure(folder: Path, page: str, width: int, *flags: str, actions: str = "") -> dict:
    """What the probe finds in the page at a width; fails on any message on the console."""
    (folder / "page.html").write_text(page, encoding="utf-8")
    probe = folder / "probe.html"
    probe.write_text(PROBE.format(width=width, actions=actions), encoding="utf-8")
    dom, log = chromium(folder, *flags, f"--window-size={width},1200", "--dump-dom", probe.as_uri())
    assert [line for line in log.splitlines() if "CONSOLE" in line] == []
    found = re.search(r'<pre id="found">(.*?)</pre>', dom, re.DOTALL)
    assert found is not None, dom[-2000:]
    return json.loads(
        found.group(1).replace("&amp;", "&").replace("&lt;", "<").replace("&gt;", ">")
    )


@pytest.mark.parametrize("make", [full_view, nasty_view])
@pytest.mark.parametrize("width", [390, 1440])
def test_nothing_overflows_is_cut_or_requested(make, width: int, tmp_path: Path) -> None:
    found = measure(tmp_path, render_html(make()), width)
    assert found["width"] <= width
    assert found["wide"] == []
    assert found["cut"] == []
    assert found["overlaps"] == []
    assert found["requests"] == []


def test_sorting_columns_and_filters_work(tmp_path: Path) -> None:
    found = measure(tmp_path, render_html(full_view()), 1440, actions=CLICKS)
    assert found["descending"][:2] == ["MAE-CT", "MAE-CT_aug"]
    assert found["descending"][-1] == "random encoder"
    assert found["ascending"] == found["descending"][::-1]
    assert found["hidden"] is True
    assert found["bold"] == "700"
    assert found["records"] == 3


def test_dark_is_dark_and_light_is_light(tmp_path: Path) -> None:
    page = render_html(full_view())
    light = measure(tmp_path, page, 1440)["background"]
    dark = measure(tmp_path, page, 1440, "--blink-settings=preferredColorScheme=0")["background"]
    assert sum(map(int, re.findall(r"\d+", light)[:3])) > 3 * 240
    assert sum(map(int, re.findall(r"\d+", dark)[:3])) < 3 * 40


def test_screenshots_and_print_come_out(tmp_path: Path) -> None:
    page = tmp_path / "page.html"
    page.write_text(render_html(full_view()), encoding="utf-8")
    chromium(tmp_path, "--window-size=1440,3000", "--screenshot=page.png", page.as_uri())
    chromium(tmp_path, "--print-to-pdf=page.pdf", "--no-pdf-header-footer", page.as_uri())
    assert (tmp_path / "page.png").stat().st_size > 50_000
    assert (tmp_path / "page.pdf").read_bytes().startswith(b"%PDF")
