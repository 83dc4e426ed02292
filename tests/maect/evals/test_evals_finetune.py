"""Fine-tuning's recipes: what is drawn, for which image, and what chooses a learning rate."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from pydantic import ValidationError
from test_evals_registry import Pictures, data
from torchvision.transforms import v2

from maect import evals, regularize
from maect.evals.finetune import FineTuneSettings
from maect.models import Encoder


@pytest.fixture(autouse=True)
def one_thread() -> None:
    """Such small products only lose by more."""
    torch.set_num_threads(1)


MEAN, STD = (0.4, 0.5, 0.6), (0.2, 0.3, 0.25)


def run(**given: Any) -> evals.EvalResult:
    settings = {"budgets": ["10%"], "epochs": 2, "batch_size": 6} | given
    return evals.get("low_shot_finetune").run(data(), FineTuneSettings(**settings))


def views(count: int) -> torch.Tensor:
    """Normalised images of whole pixel values."""
    pixels = torch.from_numpy(np.random.default_rng(0).integers(0, 256, (count, 3, 16, 16)))
    return (
        (pixels / 255 - torch.tensor(MEAN)[:, None, None]) / torch.tensor(STD)[:, None, None]
    ).float()


def strengthened(images: torch.Tensor, epoch: int, magnitude: int, erasing: float) -> torch.Tensor:
    keys = [(0, epoch, row) for row in range(len(images))]
    return regularize.strengthen(
        images, keys, magnitude=magnitude, erasing=erasing, mean=MEAN, std=STD
    )


@pytest.mark.parametrize(("magnitude", "erasing"), [(9, 0.0), (0, 1.0), (9, 0.5)])
def test_an_image_is_drawn_for_by_its_key_alone(magnitude: int, erasing: float) -> None:
    images = views(24)
    before = torch.get_rng_state()
    whole = strengthened(images, 0, magnitude, erasing)
    torch.manual_seed(5)  # what the process drew before says nothing
    assert torch.equal(strengthened(images[:7], 0, magnitude, erasing), whole[:7])
    torch.set_rng_state(before)
    other = strengthened(images, 1, magnitude, erasing)
    changed = [not torch.equal(a, b) for a, b in zip(whole, other, strict=True)]
    assert sum(changed) > 12
    assert torch.equal(torch.get_rng_state(), before)


def test_an_image_without_operators_keeps_its_pixels() -> None:
    torch.testing.assert_close(strengthened(views(8), 0, 0, 0.0), views(8))
    # one of fourteen operators leaves an image as it is, so twice is one in 196
    same = (strengthened(views(800), 0, 9, 0.0) - views(800)).abs().amax((1, 2, 3)) < 1e-5
    assert 0 < same.sum() < 20


@pytest.mark.parametrize(("mixup", "cutmix"), [(0.8, 0.0), (0.0, 1.0), (0.8, 1.0)])
def test_mixing_piece_by_piece_is_mixing_the_batch(mixup: float, cutmix: float) -> None:
    images, labels = views(8), torch.arange(8) % 4

    def mixed(rows: np.ndarray) -> tuple[torch.Tensor, torch.Tensor]:
        return regularize.mix(images[rows], labels[rows], 4, (3, "batch"), mixup, cutmix)

    whole, targets = mixed(np.arange(-1, 8))
    for start, stop in ((0, 3), (3, 8)):
        piece, own = mixed(np.arange(start - 1, stop))
        assert torch.equal(piece, whole[start:stop])
        assert torch.equal(own, targets[start:stop])
    with regularize.seeded(3, "batch"):
        kinds = [v2.MixUp(alpha=0.8)] * bool(mixup) + [v2.CutMix(alpha=1.0)] * bool(cutmix)
        kind = kinds[int(torch.randint(len(kinds), ()))]
        expected = kind(images, torch.nn.functional.one_hot(labels, 4).float())
    torch.testing.assert_close((whole, targets), expected)
    assert torch.allclose(targets.sum(1), torch.ones(8))


def test_paths_are_dropped_for_whole_images_more_often_with_depth() -> None:
    encoder = Encoder(4, 2, 1, dim=12, depth=3, heads=2)
    paths = regularize.add_drop_path(encoder.blocks, 0.5)
    assert [path.rate for path in paths] == [0, 0, 0.25, 0.25, 0.5, 0.5]
    images, plain = torch.randn(4, 1, 4, 4), [path for path in paths if path.rate]
    expected = encoder(images)
    for path in plain:
        path.draws = torch.tensor([0.1, 0.3, 0.6, 0.9])
    found = encoder(images)
    assert not torch.allclose(found[:2], expected[:2])
    # kept branches are scaled, so that their mean is as without
    assert torch.equal(
        paths[2](torch.ones(4, 2, 3))[:, 0, 0], torch.tensor([0, 4 / 3, 4 / 3, 4 / 3])
    )
    for path in plain:
        path.draws = None
    assert torch.equal(encoder(images), expected)


def test_a_part_of_the_labelled_images_chooses_the_rate() -> None:
    result = run(epochs=10, lrs=[1e-5, 1e-2, 1e-3])
    (chosen,) = result.chosen["accuracy_10pct"]
    # of three images of each of four classes one is held out; the last training sees all twelve
    assert (chosen["held_out_images"], chosen["images"], chosen["steps"]) == (4, 12, 20)
    assert chosen["lr"] == [1e-5, 1e-2, 1e-3][int(np.argmax(chosen["held_out_accuracy"]))]
    alone = run(epochs=10, lrs=[chosen["lr"]])
    np.testing.assert_array_equal(
        alone.predictions["class_10pct"], result.predictions["class_10pct"]
    )


def test_labels_outside_of_the_budget_teach_and_choose_nothing() -> None:
    given, finetune = data(), evals.get("low_shot_finetune")
    settings = FineTuneSettings(budgets=["10%"], epochs=3, lrs=[1e-3, 1e-2])
    first = finetune.run(given, settings)
    given.train.y[12:] = 0
    given.selection.y[:] = 0
    second = finetune.run(given, settings)
    assert second.chosen == first.chosen
    assert second.values == first.values


def test_all_labels_are_a_budget() -> None:
    result = run(budgets=["100%", "10%"], batch_size=24)
    assert result.chosen["accuracy_100pct"] == [{"lr": 1e-3, "steps": 10, "images": 120}]
    primary, _ = evals.get("low_shot_finetune").metrics(FineTuneSettings(budgets=["100%", "10%"]))
    assert (primary.name, primary.label, primary.at) == ("accuracy_100pct", "100%, fine-tuned", 100)


@pytest.mark.parametrize(("learn_positions", "frozen_blocks"), [(False, 0), (True, 0), (True, 1)])
def test_positions_learn_and_blocks_freeze_where_asked(
    learn_positions: bool, frozen_blocks: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    given, networks = data(), []
    fresh = Pictures.network
    monkeypatch.setattr(
        Pictures, "network", lambda self: networks.append(fresh(self)) or networks[-1]
    )
    settings = FineTuneSettings(
        budgets=["10%"], epochs=1, learn_positions=learn_positions, frozen_blocks=frozen_blocks
    )
    evals.get("low_shot_finetune").run(given, settings)
    (tuned,), start = (one.encoder for one in networks), fresh(given.images).encoder
    moved = {
        name: not torch.equal(getattr(tuned, name), getattr(start, name))
        for name in ("pos_embed", "cls_token")
    }
    block = zip(tuned.blocks.parameters(), start.blocks.parameters(), strict=True)
    assert moved["pos_embed"] == (learn_positions and not frozen_blocks)
    assert moved["cls_token"] == (not frozen_blocks)
    assert any(not torch.equal(one, other) for one, other in block) == (not frozen_blocks)


def test_one_image_a_class_cannot_choose_a_rate() -> None:
    with pytest.raises(ValidationError, match="leaves no labelled image to choose among lrs"):
        FineTuneSettings(budgets=["1"], lrs=[1e-3, 1e-2])
    given = data()
    given.low_shot = {"10%": [[0, 1, 2, 3]]}
    with pytest.raises(ValueError, match="give one of lrs"):
        evals.get("low_shot_finetune").run(
            given, FineTuneSettings(budgets=["10%"], lrs=[1e-3, 1e-2])
        )
