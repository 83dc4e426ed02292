"""Low-shot regression against scikit-learn's optimum and the published predictions."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from sklearn.linear_model import LogisticRegression

from maect import evals
from maect.evals.logistic import fit_logistic
from maect.evals.low_shot import LowShotSettings, centred_rows

L2 = 0.00025


def split(seed: int, rows: int, dim: int, classes: int = 6) -> evals.Features:
    means = np.random.default_rng(3).standard_normal((classes, dim))
    draws = np.random.default_rng(seed)
    y = draws.permutation(np.arange(rows) % classes)
    x = 0.6 * means[y] + draws.standard_normal((rows, dim))
    return evals.Features(torch.from_numpy(x).float(), torch.from_numpy(y))


def objective(weight: np.ndarray, x: np.ndarray, y: np.ndarray) -> float:
    scores = x @ weight.T
    top = scores.max(1)
    fit = np.log(np.exp(scores - top[:, None]).sum(1)) + top - scores[np.arange(len(y)), y]
    return float(fit.sum() + L2 / 2 * (weight**2).sum())


@pytest.mark.parametrize(("rows", "dim"), [(6, 40), (60, 40), (400, 40), (30, 30)])
def test_reaches_the_optimum_that_scikit_learn_reaches(rows: int, dim: int) -> None:
    train, test = split(0, rows, dim), split(1, 300, dim)
    x, y = centred_rows(train.x), train.y
    ours = fit_logistic(x[None], y[None], 6, L2)
    model = LogisticRegression(C=1 / L2, fit_intercept=False, tol=1e-9, max_iter=20000)
    model.fit(x.numpy(), y.numpy())
    theirs = objective(model.coef_, x.numpy(), y.numpy())
    assert ours.converged
    assert objective(ours.weight[0].numpy(), x.numpy(), y.numpy()) <= theirs * (1 + 1e-6)
    assert ours.objective.item() == pytest.approx(theirs, rel=1e-5)
    query = centred_rows(test.x)
    margin = np.sort(model.decision_function(query.numpy()), axis=1)
    clear = margin[:, -1] - margin[:, -2] > 1e-2  # all but near ties
    predicted = (query @ ours.weight[0].T).argmax(1).numpy()
    np.testing.assert_array_equal(predicted[clear], model.predict(query.numpy())[clear])
    assert clear.mean() > 0.98


def test_problems_of_unequal_size_solved_together_are_as_if_alone() -> None:
    parts = [split(seed, rows, 20) for seed, rows in ((0, 6), (1, 12), (2, 30))]
    x, y = torch.zeros(3, 30, 20).double(), torch.full((3, 30), -1)
    for i, part in enumerate(parts):
        x[i, : len(part.y)], y[i, : len(part.y)] = centred_rows(part.x), part.y
    together = fit_logistic(x, y, 6, L2, tol=1e-8)
    for i, part in enumerate(parts):
        alone = fit_logistic(centred_rows(part.x)[None], part.y[None], 6, L2, tol=1e-8)
        assert together.objective[i].item() == pytest.approx(alone.objective.item(), rel=1e-7)
        torch.testing.assert_close(together.weight[i], alone.weight[0], rtol=1e-2, atol=1e-2)


def test_equals_the_published_predictions_but_for_their_stopping_point() -> None:
    with np.load(Path(__file__).parents[1] / "golden" / "official_a.npz") as archive:
        train_x, test_x, train_y, predicted, count, row = (
            archive[key]
            for key in (
                "knn/train_x",
                "knn/test_x",
                "knn/train_y",
                "lowshot/pred",
                "lowshot/n_train",
                "lowshot/train_pre_row0",
            )
        )
    x = centred_rows(torch.from_numpy(train_x[: int(count)].astype(np.float32)))
    np.testing.assert_allclose(x[0].numpy(), row, atol=1e-6)
    y = torch.from_numpy(train_y[: int(count)].astype(np.int64))
    weight = fit_logistic(x[None], y[None], 10, L2).weight[0]
    ours = centred_rows(torch.from_numpy(test_x.astype(np.float32))) @ weight.T
    assert (ours.argmax(1).numpy() == predicted).mean() >= 0.98


def low_shot_input() -> evals.EvalInput:
    train = split(0, 600, 24)
    draws = np.random.default_rng(1)
    members = [np.flatnonzero(train.y.numpy() == label) for label in range(6)]
    budgets = {
        str(k): [np.concatenate([draws.permutation(m)[:k] for m in members]) for _ in range(3)]
        for k in (1, 2)
    }
    budgets["10%"] = [draws.permutation(600)[:60]]
    rows = {key: [draw.tolist() for draw in drawn] for key, drawn in budgets.items()}
    return evals.EvalInput(train, split(1, 60, 24), split(2, 200, 24), classes=6, low_shot=rows)


def test_a_metric_is_the_mean_over_its_draws() -> None:
    data = low_shot_input()
    settings = LowShotSettings(budgets=["1", "2", "10%"])
    result = evals.get("low_shot").run(data, settings)
    for key, rows in (("1", 6), ("2", 12), ("10pct", 60)):
        drawn = result.predictions[f"class_{key}"]
        assert drawn.shape == (200, 1 if key == "10pct" else 3)
        each = 100 * (drawn == data.test.y.numpy()[:, None]).mean(0)
        assert result.values[f"accuracy_{key}"] == pytest.approx(each.mean())
        assert result.protocol["images"][f"accuracy_{key}"] == [rows] * drawn.shape[1]
    assert result.values["accuracy_1"] < result.values["accuracy_10pct"]
    assert result.notes == []


def test_only_the_drawn_images_are_looked_at() -> None:
    data, settings = low_shot_input(), LowShotSettings(budgets=["1", "2"])
    before = evals.get("low_shot").run(data, settings)
    used = {row for budget in ("1", "2") for draw in data.low_shot[budget] for row in draw}
    unused = [row for row in range(600) if row not in used]
    data.train.x[unused] = 0.0
    data.train.y[unused] = 0
    after = evals.get("low_shot").run(data, settings)
    assert before.values == after.values


def test_a_budget_that_the_data_lacks_is_refused() -> None:
    with pytest.raises(ValueError, match=r"no low-shot draws for 5, 1%"):
        evals.get("low_shot").run(low_shot_input(), LowShotSettings(budgets=["1", "5", "1%"]))
