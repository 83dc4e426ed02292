"""k-NN against the published implementation, scikit-learn and a plain double-precision search."""

from __future__ import annotations

import re
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from sklearn.neighbors import KNeighborsClassifier
from torch import Tensor

from maect import evals
from maect.evals import neighbors
from maect.evals.nearest import KnnSettings
from maect.evals.neighbors import nearest, normalize_rows, standardized, statistics


@pytest.fixture(scope="module")
def golden() -> dict[str, np.ndarray]:
    with np.load(Path(__file__).parents[1] / "golden" / "official_a.npz") as archive:
        return {key: archive[key] for key in archive.files if key.startswith("knn/")}


def features(seed: int, rows: int, dim: int = 24, classes: int = 5) -> tuple[Tensor, Tensor]:
    """Overlapping classes around means that do not depend on the seed."""
    means = torch.from_numpy(np.random.default_rng(7).standard_normal((classes, dim)))
    draws = np.random.default_rng(seed)
    y = torch.from_numpy(draws.integers(0, classes, rows))
    noise = torch.from_numpy(draws.standard_normal((rows, dim)))
    return (0.5 * means[y] + noise).float(), y


def plain_search(stored: Tensor, queries: Tensor, k: int) -> np.ndarray:
    """Rows by descending similarity in double precision, then by row."""
    similarity = (queries.double() @ stored.double().T).numpy()
    return np.argsort(-similarity, axis=1, kind="stable")[:, :k]


@pytest.mark.parametrize("standardize", [False, True])
@pytest.mark.parametrize(("votes", "temperature"), [("distance", 0.07), ("uniform", None)])
def test_equals_the_published_accuracies(
    golden: dict[str, np.ndarray], standardize: bool, votes: str, temperature: float | None
) -> None:
    data = [golden[f"knn/{key}"] for key in ("train_x", "train_y", "test_x", "test_y")]
    data = [x.astype(np.float32) if x.dtype == np.float16 else x for x in data]
    counts = golden["knn/k"].tolist()
    accuracy = evals.knn(*data, counts, temperature, standardize)
    expected = golden[f"knn/acc_bn{int(standardize)}_{votes}"]
    assert list(accuracy.values()) == pytest.approx((100 * expected).tolist(), abs=1e-4)
    assert evals.knn(*data, counts[1], temperature, standardize) == accuracy[counts[1]]


def golden_input(golden: dict[str, np.ndarray]) -> evals.EvalInput:
    train, test = (
        evals.Features(
            torch.from_numpy(golden[f"knn/{name}_x"].astype(np.float32)),
            torch.from_numpy(golden[f"knn/{name}_y"].astype(np.int64)),
        )
        for name in ("train", "test")
    )
    return evals.EvalInput(train, test, test, classes=10)


@pytest.mark.parametrize("standardize", [False, True])
def test_equals_the_published_neighbor_purity(
    golden: dict[str, np.ndarray], standardize: bool
) -> None:
    counts = golden["knn/k"].tolist()
    settings = KnnSettings(k=counts, standardize=standardize)
    result = evals.get("knn").run(golden_input(golden), settings)
    expected = 100 * golden[f"knn/purity_correct_bn{int(standardize)}"]
    assert [result.values[f"purity_k{k}"] for k in counts] == pytest.approx(expected, abs=1e-4)
    if standardize:
        similarity = result.predictions["similarity"][:16, :10]
        np.testing.assert_allclose(similarity, golden["knn/top10_sim_bn1_first16"], atol=1e-6)


@pytest.mark.parametrize("temperature", [0.07, None])
def test_predicts_what_scikit_learn_predicts(temperature: float | None) -> None:
    (train_x, train_y), (test_x, test_y) = features(0, 1200), features(1, 300)
    data = evals.EvalInput(
        *(
            evals.Features(x, y)
            for x, y in ((train_x, train_y), (test_x, test_y), (test_x, test_y))
        ),
        classes=5,
    )
    settings = KnnSettings(k=[15], temperature=temperature, standardize=False)
    result = evals.get("knn").run(data, settings)
    weights = (lambda d: np.exp((1 - d) / temperature)) if temperature else "uniform"
    model = KNeighborsClassifier(15, metric="cosine", algorithm="brute", weights=weights)
    model.fit(train_x.numpy(), train_y.numpy())
    np.testing.assert_array_equal(result.predictions["class_k15"], model.predict(test_x.numpy()))
    assert result.values["accuracy_k15"] == pytest.approx(
        100 * model.score(test_x.numpy(), test_y.numpy())
    )


@pytest.mark.parametrize("offset", [0.0, 1.0, 300.0])
def test_exact_however_close_the_rows_are(offset: float) -> None:
    """A common offset brings all similarities together, down to rounding errors of float32."""
    stored, queries = (normalize_rows(features(s, n)[0] + offset) for s, n in ((0, 4000), (1, 90)))
    similarity, row = nearest(stored, queries, 12)
    np.testing.assert_array_equal(row.numpy(), plain_search(stored, queries, 12))
    exact = (queries[:, None].double() * stored[row].double()).sum(2)
    assert torch.equal(similarity, exact)


def test_exact_across_blocks_of_stored_rows(monkeypatch: pytest.MonkeyPatch) -> None:
    stored, queries = (normalize_rows(features(s, n)[0]) for s, n in ((0, 1003), (1, 90)))
    monkeypatch.setattr(neighbors, "TRAIN_BLOCK", 100)
    monkeypatch.setattr(neighbors, "QUERY_BLOCK", 32)
    _, row = nearest(stored, queries, 9)
    np.testing.assert_array_equal(row.numpy(), plain_search(stored, queries, 9))


@pytest.mark.parametrize("block", [64, 65536])
def test_equal_similarities_are_ordered_by_row(monkeypatch: pytest.MonkeyPatch, block: int) -> None:
    monkeypatch.setattr(neighbors, "TRAIN_BLOCK", block)
    base = normalize_rows(features(0, 40)[0])
    stored = base.repeat(30, 1)  # row i equals rows i + 40, i + 80, ...
    similarity, row = nearest(stored, base, 7)
    expected = torch.arange(40)[:, None] + 40 * torch.arange(7)
    assert torch.equal(row, expected)
    assert bool((similarity == similarity[:, :1]).all())


def test_a_tied_vote_goes_to_the_lower_class() -> None:
    stored = torch.tensor([[1.0, 0.0], [0.0, 1.0]])
    query = torch.tensor([[1.0, 1.0]])
    for labels, winner in (([3, 1], 1), ([0, 2], 0)):
        right = evals.knn(
            stored, torch.tensor(labels), query, torch.tensor([winner]), 2, standardize=False
        )
        assert right == 100


def test_a_tiny_temperature_does_not_overflow() -> None:
    (train_x, train_y), (test_x, test_y) = features(0, 200), features(1, 50)
    sharp = evals.knn(train_x, train_y, test_x, test_y, 9, temperature=1e-5)
    assert sharp == evals.knn(train_x, train_y, test_x, test_y, 1)


def test_collapsed_and_zero_features_are_searched_all_the_same() -> None:
    ones = normalize_rows(torch.ones(900, 8))
    _, row = nearest(ones, ones[:3], 4)
    assert row.tolist() == [[0, 1, 2, 3]] * 3
    _, row = nearest(normalize_rows(torch.zeros(5, 8)), ones[:1], 3)
    assert row.tolist() == [[0, 1, 2]]


def test_bad_input_is_refused() -> None:
    x, y = features(0, 20)
    with pytest.raises(ValueError, match="k = 21 neighbours of 20"):
        evals.knn(x, y, x, y, 21)
    x[3, 2] = float("nan")
    with pytest.raises(ValueError, match="NaN"):
        evals.knn(x, y, x, y, 3)


@pytest.mark.parametrize("dim", [24, 32, 100, 192])
def test_statistics_of_a_few_columns_at_a_time_are_those_of_all(dim: int) -> None:
    """To the last bit, and so are the rows made with them."""
    x = features(0, 3001, dim)[0] * torch.linspace(0.1, 9, dim) + 5
    double = x.double()
    mean, deviation = double.mean(0), double.std(0, correction=1) + 1e-5
    rows = (double - mean) / deviation
    assert torch.equal(standardized(x, statistics(x)), rows)
    unit = (rows / rows.norm(dim=1, keepdim=True)).float()
    assert torch.equal(normalize_rows(x, statistics(x)), unit)


PEAK = """
import re
from pathlib import Path
import torch
from maect import evals
def memory(name):
    return 1024 * int(re.search(name + r":\\s+(\\d+)", Path("/proc/self/status").read_text())[1])
def split(count):
    return torch.randn(count, 1024), torch.randint(0, 9, (count,))
evals.knn(*split(2000), *split(20), 10)
x, y = split(90_000)
test = split(100)
before = memory("VmRSS")
Path("/proc/self/clear_refs").write_text("5")
evals.knn(x, y, *test, 10)
print("peak", (memory("VmHWM") - before) / (4 * x.numel()) + 1)
"""


@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")
def test_standardising_holds_half_a_copy_of_the_features_at_most() -> None:
    told = subprocess.run([sys.executable, "-c", PEAK], capture_output=True, text=True, check=True)
    times = float(re.search(r"peak ([\d.]+)", told.stdout)[1])
    assert 1.0 < times <= 1.5, f"{times} times the features"
