"""`report --against` and `export --results`: what was measured, held against a file or a store."""

from __future__ import annotations

import json
import math
import shutil
import sys
from collections.abc import Callable
from pathlib import Path
from statistics import fmean, stdev
from typing import Any

import pytest
from bench_helpers import PAPER, ROOT, SMOKE, Bench, Done, fill_store, forge
from scipy import stats

from bench.store.store import Store
from reports.tables.statistics import power

CHOSEN = (SMOKE, "--only", "MAE", "--seeds", 2)
Change = Callable[[dict[str, Any]], object]


@pytest.fixture(scope="module")
def store(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Two seeds of MAE, and raw pixels, which are the same for both."""
    root = tmp_path_factory.mktemp("against") / "store"
    for row in ("MAE", "raw pixels"):
        fill_store(root, only=row, seeds=2)
    return root


@pytest.fixture
def exported(store: Path, tmp_path: Path, bench: Bench) -> Path:
    """A copy that a test may change."""
    kept, path = store.with_name("smoke.json"), tmp_path / "smoke.json"
    if not kept.exists():
        done = bench("export", SMOKE, "--store", store, "--results", "--to", kept)
        assert (done.code, done.out, done.err) == (0, f"results: {kept}\n", "")
    return Path(shutil.copy(kept, path))


@pytest.fixture
def held(store: Path, exported: Path, bench: Bench) -> Callable[..., Done]:
    """The store held against its own export, in which `change` was made to the cells of a row."""

    def run(change: Change, *arguments: object, row: str = "MAE", suite: Any = CHOSEN) -> Done:
        content = json.loads(exported.read_text())
        change(content["tables"][0]["rows"][row])
        exported.write_text(json.dumps(content))
        return bench("report", *suite, "--store", store, "--against", exported, *arguments)

    return run


def told(done: Done) -> dict[str, Any]:
    return dict(json.loads(done.out))


def spread(values: list[float], column: str = "knn") -> Change:
    rounded = [round(value, 3) for value in values]
    return lambda row: row.update({column: {"values": rounded}})


def test_a_file_of_results_is_of_the_committed_shape(exported: Path, store: Path):
    lines = exported.read_text().splitlines()
    content = json.loads(exported.read_text())
    committed = json.loads((ROOT / "docs/results/digits.json").read_text())
    assert content.keys() <= committed.keys()
    assert committed["environment"].keys() <= content["environment"].keys()
    assert content["what"] == "suite smoke, profile tiny, seeds 0 to 1"
    rows = content["tables"][0]["rows"]
    assert rows["MAE-CT"] == {} and "cost.total" in rows["MAE"]
    cell, fixed = rows["MAE"]["knn"], rows["raw pixels"]["knn"]
    assert (cell["seeds"], fixed["seeds"], fixed["n"]) == ([0, 1], [0, 1], 1)
    assert cell["mean"] == round(fmean(cell["values"]), 2)
    assert cell["sd"] == round(stdev(cell["values"]), 2)
    assert sum('"knn": {"mean"' in line and "seeds" in line for line in lines) == 2


def test_its_own_export_and_a_copy_have_the_same_digits(
    held: Callable[..., Done], store: Path, tmp_path: Path, bench: Bench
):
    done = held(lambda row: None, "--check")
    assert (done.code, done.err) == (0, "")
    first, *_, last, check = done.out.splitlines()
    assert first == "reproduced: of 2 cells 2 have the same digits."
    assert last == "Only there: 2 cells (raw pixels: knn, probe)."
    assert check.startswith("check: passed. 4 numbers in 1 table, with 8 stages behind them: no")
    assert "The stages of one kind behind a column have the same code, hardware, torch." in check
    copy = Path(shutil.copytree(store, tmp_path / "copy"))
    arguments = ("report", SMOKE, "--seeds", 2, "--store", store, "--against")
    found = told(bench(*arguments, copy, "--json"))
    assert found["sentence"] == "reproduced: of 4 cells 4 have the same digits."
    assert found["only_here"] == found["only_there"] == []
    assert "--against needs two stores" in bench(*arguments, store).err
    assert not list(store.glob("reports/*"))
    page = tmp_path / "page.html"
    done = bench(*arguments, copy, "--output", page)
    assert (done.code, done.out.splitlines()[-1]) == (0, f"report: {page}")
    said = "<dt>Against</dt> <dd>Reproduced: of 4 cells 4 have the same digits."
    assert said in page.read_text(encoding="utf-8")


def test_values_without_seeds_are_those_of_the_first(held: Callable[..., Done]):
    """As digits.json of ten seeds has them; of costs nothing is read."""

    def change(row: dict[str, Any]) -> None:
        row["knn"] = {"values": [*row["knn"]["values"], 1.0, 99.0]}
        row["cost.cpu"] = "unknown"

    found = told(held(change, "--json"))
    assert {one["verdict"] for one in found["cells"]} == {"the same digits"}
    assert found["cells"][0]["n"] == 4


def test_digits_are_compared_as_the_file_rounds_them(held: Callable[..., Done]):
    def whole(row: dict[str, Any]) -> None:
        for name in ("knn", "probe"):
            row[name] = {"values": [round(value) for value in row[name]["values"]]}

    assert "2 have the same digits" not in held(whole).out  # raw pixels have a decimal
    assert "2 have the same digits" in held(whole, row="raw pixels").out


def test_another_value_is_not_reproduced(held: Callable[..., Done]):
    def change(row: dict[str, Any]) -> None:
        mean = fmean(row["knn"]["values"])
        spread([mean - 40 + step for step in (-0.4, 0.4, -0.2, 0.2, 0.0)])(row)

    assert held(lambda row: None).code == 0
    done = held(change, "--check")
    sentence = "not reproduced: of 2 cells 1 has the same digits, 1 is not reproduced."
    assert (done.code, done.err) == (3, f"check: {sentence}\n")
    assert done.out.startswith(f"{sentence}\n")
    assert "\nnot reproduced:\n  MAE, k-NN, k=10: " in done.out
    assert "within seed noise" not in done.out
    assert "no difference of versions, processor or commit is known" in " ".join(done.out.split())
    assert held(lambda row: None).code == 0  # nobody asked for a check


def test_a_small_change_lies_within_noise_by_the_test(held: Callable[..., Done], store: Path):
    ours = [value for _, value in sorted(knn(store).items())]
    other = [round(fmean(ours) + step, 3) for step in (-1.6, 1.2, -0.4, 2.2, 0.6)]
    done = held(spread(other), "--check")
    assert done.code == 0
    assert done.out.splitlines()[0] == (
        "reproduced: of 2 cells 1 has the same digits, 1 lies within seed noise."
    )
    one = told(held(lambda row: None, "--json"))["cells"][0]
    error = stdev(other) * math.sqrt(1 / 5 + 1 / 2)
    assert one["mean"] == pytest.approx(fmean(ours) - fmean(other))
    p = 2 * stats.t.sf(abs(one["mean"]) / error, 4)
    assert one["p_holm"] == pytest.approx(p) == one["p"]
    # at 5 %, for it is the one test
    assert power(5, one["detectable"] / error / math.sqrt(5)) == pytest.approx(0.8, abs=1e-6)
    assert f"(p = {p:.3f}, seen from {one['detectable']:.1f})" in " ".join(done.out.split())
    assert one["verdict"] == "within seed noise" and one["low"] < 0 < one["high"]


def test_a_mean_just_outside_is_saved_by_the_correction_for_two_tests(
    held: Callable[..., Done], store: Path, exported: Path
):
    ours = fmean(knn(store).values())
    steps = [-1.6, 1.2, -0.4, 2.2, -1.4]
    shift = stats.t.isf(0.015, 4) * stdev(steps) * math.sqrt(1 / 5 + 1 / 2)
    outside = spread([ours + shift + step for step in steps])
    assert told(held(outside, "--json"))["cells"][0]["verdict"] == "not reproduced"

    second = fmean(json.loads(exported.read_text())["tables"][0]["rows"]["MAE"]["probe"]["values"])
    found = told(held(spread([second + step for step in steps], "probe"), "--json"))
    assert [one["verdict"] for one in found["cells"]] == ["within seed noise"] * 2
    assert found["cells"][0]["p"] == pytest.approx(0.03, abs=1e-3)
    assert found["cells"][0]["p_holm"] == pytest.approx(0.06, abs=2e-3)


@pytest.mark.parametrize("row", ["MAE", "raw pixels"])
def test_without_spread_there_is_no_noise(row: str, held: Callable[..., Done]):
    def one_seed(cells: dict[str, Any]) -> None:
        first = cells["knn"]["values"][0]
        cells["knn"] = {"values": [first + 0.2], "seeds": [0]}

    done = held(one_seed, "--check", row=row, suite=(SMOKE, "--only", row, "--seeds", 2))
    assert done.code == 3
    assert "1 is not reproduced" in done.out.splitlines()[0]
    assert "(one seed or no spread there)" in " ".join(done.out.split())


def test_what_may_explain_other_digits_is_named(
    held: Callable[..., Done], exported: Path, store: Path, tmp_path: Path, bench: Bench
):
    content = json.loads(exported.read_text())
    content["commit"] = "1234567890"
    content["environment"] |= {"vendor": "SomebodyElse", "torch": "2.0.0", "host": "x", "cores": 99}
    exported.write_text(json.dumps(content))
    assert "may explain" not in held(lambda row: None).out
    out = " ".join(held(spread([1.0, 2.0, 3.0])).out.split())
    assert "here, SomebodyElse there" in out and "here, 2.0.0 there" in out
    assert "here, 1234567 there" in out
    assert "cores" not in out and "host" not in out
    # and of another store
    copy = Store(Path(shutil.copytree(store, tmp_path / "copy")))
    for key in copy.stage_keys():
        record = copy.state(key).record
        assert record is not None
        plain = record.plain()
        for metric in plain["metrics"]:
            metric["value"] -= metric["name"] == "accuracy"
        forge(copy, plain | {"env": plain["env"] | {"torch": "2.0.0"}})
    found = told(bench("report", *CHOSEN, "--store", store, "--against", copy.root, "--json"))
    assert "not reproduced" in found["sentence"] or "noise" in found["sentence"]
    assert [name for name, *_ in found["environment"]] == ["torch"]


def test_the_committed_results_wait_for_a_run(tmp_path: Path, bench: Bench):
    empty = Store(tmp_path / "store")
    empty.create()
    results = ROOT / "docs/results/digits.json"
    arguments = ("report", PAPER, "--store", empty.root, "--against", results)
    done = bench(*arguments)
    assert (done.code, done.err) == (0, "")
    assert done.out.startswith("nothing to compare yet: ")
    assert "\nOnly there: " in done.out
    assert bench(*arguments, "--check").code == 3
    refused = bench("export", PAPER, "--store", empty.root, "--results", "--to", tmp_path / "x")
    assert (refused.code, (tmp_path / "x").exists()) == (2, False)
    assert "nothing of suite paper_table is measured yet; run it first" in refused.err


@pytest.mark.parametrize(
    "text",
    [
        "no JSON",
        "[1]",
        '{"what": "x"}',
        '{"tables": [{"rows": {"MAE": 9}}]}',
        '{"tables": [{"rows": {"MAE": {"knn": 9}}}]}',
        '{"tables": [{"rows": {"MAE": {"knn": {"mean": 9.0}}}}]}',
        *(
            f'{{"tables": [{{"rows": {{"MAE": {{"knn": {{"values": {values}}}}}}}}}]}}'
            for values in ('"12"', '["9"]', "[null]", "[NaN]", "[1e999]", f"[1{500 * '0'}]", "[]")
        ),
        '{"tables": [{"rows": {"MAE": {"knn": {"values": [1, 2], "seeds": [0, 0]}}}}]}',
        '{"tables": [{"rows": {"MAE": {"knn": {"values": [1, 2], "seeds": [0]}}}}]}',
        '{"tables": [], "environment": 9}',
    ],
)
def test_files_that_are_none_end_in_a_sentence(
    text: str, store: Path, tmp_path: Path, bench: Bench
):
    path = tmp_path / "other.json"
    path.write_text(text)
    done = bench("report", *CHOSEN, "--store", store, "--against", path, "--check")
    said = "it holds no results of a suite; such a file is written by: python -m bench export SUITE"
    assert (done.code, done.out) == (2, "")
    assert done.err == f"error: {path}: {said} --results --to FILE\n"


def test_a_file_of_another_suite_is_a_mistake_if_it_has_none_of_the_cells(
    store: Path, tmp_path: Path, bench: Bench
):
    path = tmp_path / "other.json"
    path.write_text('{"what": "another", "tables": [{"rows": {"x": {"knn": {"values": [1]}}}}]}')
    done = bench("report", *CHOSEN, "--store", store, "--against", path)
    said = "it has no row and column of suite smoke; is it of another? It says: another"
    assert (done.code, done.err) == (2, f"error: {path}: {said}\n")
    # of rows and columns of the same names the reader learns what they are of
    digits = ROOT / "docs/results/digits.json"
    done = bench("report", *CHOSEN, "--store", store, "--against", digits)
    assert done.out.startswith("not reproduced: of 2 cells 2 are not reproduced.")
    assert "(suites/paper_table.yaml, profile digits, seeds 0 to " in " ".join(done.out.split())


def test_mistaken_arguments(store: Path, exported: Path, tmp_path: Path, bench: Bench):
    arguments = ("report", *CHOSEN, "--store", store, "--against")
    for given, said in (
        ((exported.with_name("smok.json"),), f"did you mean '{exported}'?"),
        ((tmp_path / "none.json",), "cannot be read: no such file or directory; name a file"),
        ((exported, "--compare", store), "not allowed with argument"),
        ((tmp_path,), "there is no store"),
        ((exported, "--export", "csv"), "--against exports no tables"),
    ):
        done = bench(*arguments, *given)
        assert (done.code, done.out, said in done.err) == (2, "", True), done.err
    export = ("export", *CHOSEN, "--store", store)
    (tmp_path / "file").write_text("x")
    for given, said in (
        (("--results",), "--to"),
        (("--to", exported), "--results"),
        (("--results", "--to", tmp_path), "is a directory"),
        (("--results", "--to", tmp_path / "file/x"), "name another place: --to PATH"),
        (
            ("--figures", "pdf,gif", "--to", tmp_path),
            "'gif' is no format of figures: pdf, svg, png",
        ),
        (("--figures", "svg", "--to", tmp_path / "file/x"), "name another place: --to PATH"),
    ):
        done = bench(*export, *given)
        assert (done.code, done.out, said in done.err) == (2, "", True), done.err


def test_figures_for_a_paper_have_their_fonts_in_them(
    store: Path, tmp_path: Path, bench: Bench, monkeypatch: pytest.MonkeyPatch
):
    export = ("export", *CHOSEN, "--store", store, "--figures", "pdf,svg,png", "--to")
    for folder in ("one", "other"):
        done = bench(*export, tmp_path / folder)
        assert (done.code, done.err) == (0, "")
    files = sorted((tmp_path / "one").iterdir())
    assert done.out == f"figures: {len(files)} files in {tmp_path / 'other'}\n"
    assert {"seeds-1.pdf", "seeds-2.svg", "curves-1.png"} <= {file.name for file in files}
    for file in files:
        assert file.read_bytes() == (tmp_path / "other" / file.name).read_bytes()
        if file.suffix == ".pdf":
            fonts = file.read_bytes()
            assert fonts.count(b"/FontFile2") == fonts.count(b"/Type /FontDescriptor") > 0
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    monkeypatch.delitem(sys.modules, "reports.figures.paper", raising=False)
    done = bench(*export, tmp_path)
    said = "error: figures need matplotlib: pip install 'maect-bench[figures]'\n"
    assert (done.code, done.err) == (2, said)


def knn(root: Path) -> dict[int, float]:
    """Accuracy of k-NN of MAE by seed."""
    store, found = Store(root), {}
    for record in (store.state(key).record for key in store.stage_keys()):
        if record is not None and record.primary and record.name.startswith("MAE knn, seed "):
            found[int(record.name[-1])] = record.primary.value
    return found
