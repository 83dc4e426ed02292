"""The linear probe against golden arrays, torch's own modules and scikit-learn."""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path

import numpy as np
import pytest
import torch
from sklearn.linear_model import LogisticRegression
from torch import Tensor, nn

from maect import evals
from maect.evals.linear_probe import Probes, ProbeSettings, choose, rate
from maect.parallel import Group
from maect.settings import ViewSettings

QUICK = ProbeSettings(epochs=4, batch_size=64, base_lrs=[0.02, 0.1, 0.4])


@pytest.fixture(scope="module")
def golden() -> dict[str, np.ndarray]:
    with np.load(Path(__file__).parents[1] / "golden" / "official_a.npz") as archive:
        wanted = ("probe/", "sched/probe")
        return {key: archive[key] for key in archive.files if key.startswith(wanted)}


def split(seed: int, rows: int, dim: int = 12, classes: int = 4) -> evals.Features:
    means = torch.from_numpy(np.random.default_rng(3).standard_normal((classes, dim)))
    draws = np.random.default_rng(seed)
    y = torch.from_numpy(draws.integers(0, classes, rows))
    x = 0.7 * means[y] + torch.from_numpy(draws.standard_normal((rows, dim)))
    return evals.Features(x.float() * 3 + 5, y)


def problem(train: int = 400) -> evals.EvalInput:
    return evals.EvalInput(split(0, train), split(1, 150), split(2, 200), classes=4, seed=1)


def test_outputs_and_running_statistics_equal_the_published_head(
    golden: dict[str, np.ndarray],
) -> None:
    x = torch.from_numpy(golden["probe/features"])
    probes = Probes(24, 10, [0.1])
    probes.weight = torch.from_numpy(golden["probe/weight"])
    trained = probes.logits(probes.normalize(x, training=True))[0].T
    np.testing.assert_allclose(trained, golden["probe/out_train"], atol=1e-6)
    np.testing.assert_allclose(probes.mean, golden["probe/running_mean"], atol=1e-6)
    np.testing.assert_allclose(probes.var, golden["probe/running_var"], atol=1e-6)
    evaluated = probes.logits(probes.normalize(x, training=False))[0].T
    np.testing.assert_allclose(evaluated, golden["probe/out_eval_after1"], atol=1e-6)


def test_learning_rate_follows_the_published_curve(golden: dict[str, np.ndarray]) -> None:
    curve = [rate(step, 50, 5) for step in range(50)]
    np.testing.assert_allclose(curve, golden["sched/probe_10ep_5upe_lin10pct_cosanneal_factor"])


def plain_probe(start: Tensor, lr: float, batches: list[tuple[Tensor, Tensor]]) -> nn.Sequential:
    """The same training with torch's modules, autograd and optimizer."""
    classes, dim = start.shape
    model = nn.Sequential(nn.BatchNorm1d(dim, affine=False), nn.Linear(dim, classes))
    with torch.no_grad():
        model[1].weight.copy_(start)
        model[1].bias.zero_()
    optimizer = torch.optim.SGD(model.parameters(), lr=lr, momentum=0.9)
    for step, (x, y) in enumerate(batches):
        optimizer.param_groups[0]["lr"] = lr * rate(step, len(batches), 3)
        optimizer.zero_grad()
        nn.functional.cross_entropy(model(x), y).backward()
        optimizer.step()
    return model.eval()


def test_trains_as_torch_modules_do_and_as_each_probe_alone() -> None:
    data = split(0, 320)
    batches = list(zip(data.x.split(32), data.y.split(32), strict=True)) * 3
    lrs = [0.05, 0.4, 2.0]
    together = Probes(12, 4, lrs, seed=5)
    start = together.weight[:4].clone()
    alone = [Probes(12, 4, [lr], seed=5) for lr in lrs]
    for step, (x, y) in enumerate(batches):
        for probes in (together, *alone):
            probes.step(x, y, rate(step, len(batches), 3))
    for i, lr in enumerate(lrs):
        weight = together.weight[4 * i : 4 * i + 4]
        torch.testing.assert_close(weight, alone[i].weight, rtol=1e-4, atol=1e-5)
        model = plain_probe(start, lr, batches)
        torch.testing.assert_close(weight, model[1].weight.detach(), rtol=1e-4, atol=1e-5)
        predicted, loss = alone[i].evaluate(data.x, data.y)
        logits = model(data.x).detach()
        np.testing.assert_array_equal(predicted[:, 0], logits.argmax(1).numpy())
        expected = nn.functional.cross_entropy(logits, data.y).item()
        assert loss[0] == pytest.approx(expected, rel=1e-4)


def test_agrees_with_scikit_learn_where_the_optimum_is_unique() -> None:
    data = problem(train=2000)
    settings = ProbeSettings(epochs=60, batch_size=500, base_lrs=[0.3])
    result = evals.get("probe").run(data, settings)
    model = LogisticRegression(C=np.inf, max_iter=1000).fit(data.train.x, data.train.y)
    same = (result.predictions["class"] == model.predict(data.test.x)).mean()
    assert same >= 0.99
    exact = 100 * model.score(data.test.x, data.test.y)
    assert result.values["accuracy"] == pytest.approx(exact, abs=1.0)


def test_test_labels_choose_nothing() -> None:
    data = problem()
    run = evals.get("probe").run
    first = run(data, QUICK)
    order = torch.from_numpy(np.random.default_rng(9).permutation(len(data.test.y)))
    data.test.y = data.test.y[order]
    second = run(data, QUICK)
    for key in ("base_lr", "selection_accuracy"):
        assert first.chosen[key] == second.chosen[key]
    for key in ("class", "class_by_lr"):
        np.testing.assert_array_equal(first.predictions[key], second.predictions[key])
    assert first.values["accuracy"] > second.values["accuracy"]


def test_the_official_choice_stands_beside_ours() -> None:
    data = problem()
    result = evals.get("probe").run(data, QUICK)
    by_lr = result.predictions["class_by_lr"] == data.test.y.numpy()[:, None]
    official = result.values["accuracy_test_selected"]
    assert official >= 100 * by_lr.mean(0).max() - 1e-9
    gap = official - result.values["accuracy"]
    assert result.values["test_selection_gap"] == pytest.approx(gap)
    assert result.chosen["test_selected_base_lr"] in QUICK.base_lrs
    assert 1 <= result.chosen["test_selected_epoch"] <= QUICK.epochs


def test_choice_by_accuracy_then_loss_then_order() -> None:
    labels = torch.zeros(20, dtype=torch.int64)
    predicted = np.zeros((20, 5), np.int32)
    predicted[:2, 0] = predicted[0, 1:4] = 1  # 90, 95, 95, 95 and 100 %
    assert choose(predicted, labels, np.array([0.1, 0.4, 0.2, 0.2, np.nan])) == (2, 95.0)
    with pytest.raises(ValueError, match="not finite at any learning rate"):
        choose(predicted, labels, np.full(5, np.inf))


def test_a_batch_larger_than_the_data_takes_all_of_it_and_says_so() -> None:
    data = problem(train=50)
    result = evals.get("probe").run(data, ProbeSettings(epochs=3))
    assert result.protocol["batch_used"] == 50
    assert any("batch 50 instead of 1024" in note for note in result.notes)
    assert any("3 steps" in note for note in result.notes)


def test_a_restricted_probe_predicts_the_classes_of_the_reported_images() -> None:
    data = problem()
    shifted = data.test.y.remainder(2) == 0  # two of the four classes, as in ImageNet-A and -R
    data.test = evals.Features(data.test.x[shifted], data.test.y[shifted])
    free = evals.get("probe").run(data, QUICK)
    kind = evals.get("probe_restricted")
    bound = kind.run(data, kind.settings(**QUICK.model_dump()))
    assert {*free.predictions["class"].tolist()} == {0, 1, 2, 3}
    assert {*bound.predictions["class"].tolist()} == {0, 2}
    kept = np.isin(free.predictions["class"], [0, 2])
    np.testing.assert_array_equal(bound.predictions["class"][kept], free.predictions["class"][kept])
    assert bound.chosen["base_lr"] == free.chosen["base_lr"]
    assert bound.values["accuracy"] > free.values["accuracy"]


class AsTheyAre:
    """Images whose augmented views are the features as they are."""

    def __init__(self, data: evals.EvalInput) -> None:
        self.data, self.group = data, Group()
        self.asked: list[tuple[int, np.ndarray]] = []

    def network(self) -> torch.nn.Module:
        return torch.nn.Identity()

    def expect_views(
        self, view: ViewSettings, role: str, batches: Iterable[tuple[int, np.ndarray]]
    ) -> None:
        self.expected = list(batches)

    def views(self, view: ViewSettings, role: str, epoch: int, rows: np.ndarray) -> Tensor:
        assert (view, role) == (ViewSettings(flip=0.0), "probe")
        self.asked.append((epoch, rows))
        return self.data.train.x[torch.from_numpy(rows)]


def test_augmented_features_are_asked_for_epoch_by_epoch() -> None:
    data = problem()
    augmented = evals.get("probe_augmented")
    settings = augmented.settings(**QUICK.model_dump(), view=ViewSettings(flip=0.0))
    with pytest.raises(ValueError, match="needs the encoder"):
        augmented.run(data, settings)
    cached = evals.get("probe").run(data, QUICK)
    data.images = images = AsTheyAre(data)
    fresh = augmented.run(data, settings)
    assert fresh.values == cached.values  # the views here are the images as they are
    assert fresh.protocol["features"] == "augmented" != cached.protocol["features"]
    for (epoch, rows), expected in zip(images.asked, images.expected, strict=True):
        assert (epoch, rows.tolist()) == (expected[0], expected[1].tolist())
    assert [epoch for epoch, _ in images.asked] == [e for e in range(4) for _ in range(400 // 64)]
    first = np.concatenate([rows for epoch, rows in images.asked if epoch == 0])
    assert len(set(first.tolist())) == len(first)


def test_depends_on_the_seed_and_on_nothing_else() -> None:
    data, run = problem(), evals.get("probe").run
    first, second = (run(data, QUICK) for _ in range(2))
    assert first.values == second.values
    data.seed = 2
    other = run(data, QUICK)
    assert (first.predictions["class_by_lr"] != other.predictions["class_by_lr"]).any()
