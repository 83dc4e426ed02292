"""What all evaluations promise: found by name, described without torch, derivable again."""

from __future__ import annotations

import json
import subprocess
import sys
from contextlib import nullcontext

import numpy as np
import pytest
import torch

from maect import evals
from maect.evals.probe_attentive import Heads
from maect.evals.probe_dinov2 import read
from maect.models import Encoder
from maect.parallel import Group
from maect.settings import Settings, ViewSettings
from maect.stages.features import FeatureNetwork

SHORT = {
    "knn": {"k": [3, 5]},
    "probe": {"epochs": 2, "batch_size": 50, "base_lrs": [0.1, 0.4]},
    "low_shot": {"budgets": ["1", "10%"]},
    "cluster": {"runs": 2},
    "histogram": {"bins": 4},
    "probe_restricted": {"epochs": 2, "batch_size": 50, "base_lrs": [0.1, 0.4]},
    "low_shot_finetune": {"budgets": ["10%"], "epochs": 10, "lrs": [1e-4, 1e-2], "batch_size": 6},
    "probe_augmented": {"epochs": 2, "batch_size": 50, "base_lrs": [0.1, 0.4]},
    "probe_dinov2": {"epochs": 2, "batch_size": 50, "base_lrs": [0.1, 0.4]},
    "probe_attentive": {"epochs": 2, "batch_size": 50, "base_lrs": [0.01, 0.1]},
    "knn_dino": {"k": [3]},
    "knn_mim_refiner": {"k": [3]},
}


@pytest.fixture(autouse=True)
def one_thread() -> None:
    """Such small products only lose by more."""
    torch.set_num_threads(1)


class Pictures:
    """4 x 4 images that show their class, and an encoder of one block."""

    def __init__(self, labels: dict[str, np.ndarray], joined: bool) -> None:
        #: whether features are of several blocks, class token and mean
        self.joined = joined
        self.group, self.mean, self.std = Group(), (0.5,), (0.2,)
        draws = np.random.default_rng(1)
        shapes = draws.standard_normal((4, 1, 4, 4))
        self.images = {
            name: torch.from_numpy(
                shapes[y] + 0.5 * draws.standard_normal((len(y), 1, 4, 4))
            ).float()
            for name, y in labels.items()
        }

    def network(self) -> FeatureNetwork:
        torch.manual_seed(0)
        encoder = Encoder(4, 2, 1, dim=12, depth=1 + self.joined, heads=2)
        if self.joined:
            return FeatureNetwork(encoder, "both", [0, 1], nullcontext, norm=True)
        return FeatureNetwork(encoder, "mean", None, nullcontext)

    def views(self, view: ViewSettings, role: str, epoch: int, rows: np.ndarray) -> torch.Tensor:
        return self.images["train"][rows] + 0.1 * epoch

    def prepared(self, split: str, rows: np.ndarray) -> torch.Tensor:
        return self.images[split][rows]

    def expect_views(self, *announced: object) -> None:
        pass

    def expect_prepared(self, *announced: object) -> None:
        pass

    def at(self, place: int) -> Pictures:
        raise NotImplementedError


def data(name: str = "knn") -> evals.EvalInput:
    draws, joined = np.random.default_rng(0), evals.get(name).joins_blocks

    def split(rows: int) -> evals.Features:
        y = np.arange(rows) % 4
        x = 2.0 * np.eye(4, 12)[y] + draws.standard_normal((rows, 12))
        x = np.stack([np.tile(x, 2)] * 2, axis=1) if joined else x
        return evals.Features(torch.from_numpy(x).float(), torch.from_numpy(y))

    low_shot = {"1": [[0, 1, 2, 3], [4, 5, 6, 7], [8, 9, 10, 11]], "10%": [list(range(12))]}
    train, selection, test = split(120), split(40), split(61)
    labels = {"train": train.y, "selection": selection.y, "test": test.y}
    images = Pictures({name: y.numpy() for name, y in labels.items()}, joined)
    return evals.EvalInput(train, selection, test, 4, low_shot=low_shot, images=images)


def settings(name: str) -> Settings:
    return evals.get(name).settings(**SHORT[name])


def test_the_protocols_are_there() -> None:
    known = ["cluster", "histogram", "knn", "low_shot", "low_shot_finetune"]
    known += ["probe", "probe_augmented", "probe_restricted"]
    known += ["knn_dino", "knn_mim_refiner", "probe_attentive", "probe_dinov2"]
    assert evals.names() == sorted(known)


def test_an_unknown_name_is_answered_with_the_nearest() -> None:
    with pytest.raises(ValueError, match="no evaluation 'lowshot'; did you mean 'low_shot'"):
        evals.get("lowshot")
    with pytest.raises(ValueError, match="known are cluster, histogram"):
        evals.get("zzz")


def test_are_described_without_torch_and_scikit_learn() -> None:
    code = (
        "import sys, json\nfrom maect import evals\n"
        "found = {n: len(evals.get(n).metrics(evals.get(n).settings())) for n in evals.names()}\n"
        "print(json.dumps([found, [m for m in ('torch', 'sklearn', 'scipy') if m in sys.modules]]))"
    )
    found, loaded = json.loads(subprocess.check_output([sys.executable, "-c", code]))
    assert loaded == []
    assert set(found) == set(evals.names())


@pytest.mark.parametrize("name", evals.names())
def test_default_settings_survive_being_stored(name: str) -> None:
    kind = evals.get(name).settings
    assert kind.model_validate_json(json.dumps(kind().resolved())) == kind()


@pytest.mark.parametrize("name", evals.names())
def test_every_metric_follows_from_the_predictions(name: str) -> None:
    evaluator, given = evals.get(name), data(name)
    result = evaluator.run(given, settings(name))
    declared = evaluator.metrics(settings(name))
    assert set(result.values) == {metric.name for metric in declared}
    assert [metric.primary for metric in declared] == [True] + [False] * (len(declared) - 1)
    labels = given.test.y.numpy()
    assert evaluator.derive(result.predictions, labels) == result.values
    for metric, draws in evaluator.by_draw(result.predictions, labels).items():
        assert np.mean(draws) == pytest.approx(result.values[metric])
        assert len(draws) > 1
    for array in result.predictions.values():
        assert len(array) == len(labels)
        assert array.flags["C_CONTIGUOUS"]
        assert array.base is None
    shuffled = np.roll(labels, 1)
    # only what is no matter of classes stays as it is without them
    assert (name == "histogram") == (
        evaluator.derive(result.predictions, shuffled) == result.values
    )


@pytest.mark.parametrize("name", evals.names())
def test_permuted_test_labels_change_no_choice(name: str) -> None:
    """Only what says that it is chosen on the test split may follow the test labels."""
    given, run = data(name), evals.get(name).run
    first = run(given, settings(name))
    order = np.random.default_rng(1).permutation(len(given.test.y))
    given.test.y = given.test.y[torch.from_numpy(order)]
    second = run(given, settings(name))
    assert (second.values == first.values) == (name == "histogram")
    honest = [k for k in first.chosen if not k.startswith("test_selected")]
    assert {k: second.chosen[k] for k in honest} == {k: first.chosen[k] for k in honest}
    assert second.protocol == first.protocol
    for key, array in first.predictions.items():
        if not key.endswith("_test_selected"):
            np.testing.assert_array_equal(second.predictions[key], array)


@pytest.mark.parametrize("name", evals.names())
def test_results_and_protocols_are_plain_json(name: str) -> None:
    result = evals.get(name).run(data(name), settings(name))
    plain = [result.values, result.chosen, result.protocol, result.notes]
    assert json.loads(json.dumps(plain)) == plain
    assert result.protocol["evaluation"] == name
    stored = settings(name).resolved()
    assert {key: result.protocol[key] for key in stored} == stored


@pytest.mark.parametrize("name", [n for n in evals.names() if not evals.get(n).uses_seed])
def test_what_claims_to_use_no_seed_uses_none(name: str) -> None:
    given, run = data(name), evals.get(name).run
    first = run(given, settings(name))
    given.seed = 99
    assert run(given, settings(name)).values == first.values


def test_fine_tuning_learns_and_tells_what_it_lacks() -> None:
    finetune, given = evals.get("low_shot_finetune"), data()
    one_rate = finetune.settings(budgets=["10%"], epochs=10, lrs=[1e-2], batch_size=6)
    result, again = finetune.run(given, one_rate), finetune.run(data(), one_rate)
    assert result.values["accuracy_10pct"] > 60  # four classes, twelve images
    assert result.chosen == {"accuracy_10pct": [{"lr": 1e-2, "steps": 20, "images": 12}]}
    np.testing.assert_array_equal(
        again.predictions["class_10pct"], result.predictions["class_10pct"]
    )
    with pytest.raises(ValueError, match="no low-shot draws for 1%"):
        finetune.run(given, finetune.settings())
    given.images = None
    with pytest.raises(ValueError, match="needs the encoder"):
        finetune.run(given, settings("low_shot_finetune"))


def test_a_source_is_told_of_published_settings_only() -> None:
    dino, given = evals.get("knn_dino"), data()
    assert "2104.14294" in dino.run(given, dino.settings()).protocol["source"]
    assert "source" not in dino.run(given, dino.settings(k=[3])).protocol
    assert dino.metrics(dino.settings())[0].label == "k-NN, k=20 (DINO)"


def test_dinov2s_grid_reads_blocks_and_means() -> None:
    probe, given = evals.get("probe_dinov2"), data("probe_dinov2")
    result = probe.run(given, settings("probe_dinov2"))
    assert result.predictions["class_by_lr"].shape == (61, 2 * 2 * 2)
    assert result.chosen.keys() >= {"blocks", "mean", "base_lr", "test_selected_mean"}
    x = torch.arange(48.0).reshape(1, 2, 24)
    class_tokens = torch.cat([x[:, 0, :12], x[:, 1, :12]], dim=1)
    assert torch.equal(read(x, 2, False), class_tokens)
    assert torch.equal(read(x, 2, True), torch.cat([class_tokens, x[:, 1, 12:]], dim=1))
    assert torch.equal(read(x, 1, False), x[:, 1, :12])


def test_the_attentive_head_is_attention_with_one_query() -> None:
    """Against torch's own module, whose output projection is the identity."""
    attentive, given = evals.get("probe_attentive"), data()
    result = attentive.run(given, attentive.settings(epochs=3, batch_size=10, base_lrs=[0.03]))
    assert result.values["accuracy"] > 60  # four classes
    heads = Heads(12, 4, 2, given, attentive.settings())
    tokens = torch.from_numpy(np.random.default_rng(2).standard_normal((3, 5, 12))).float()
    own = heads.weights[0]
    module = torch.nn.MultiheadAttention(12, 2, bias=False, batch_first=True)
    with torch.no_grad():
        module.in_proj_weight.copy_(torch.cat([torch.eye(12), own["key"], own["value"]]))
        module.out_proj.weight.copy_(torch.eye(12))
        scaled = tokens / (1 + 1e-6) ** 0.5  # of the initial running statistics
        seen, _ = module(own["query"].expand(3, 1, -1), scaled, scaled)
        expected = seen[:, 0] @ own["linear"].T
        torch.testing.assert_close(heads.logits(tokens, training=False)[0], expected)
