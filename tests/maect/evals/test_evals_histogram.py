"""Colour histograms from features that hold them, and from features that do not."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from sklearn.linear_model import Ridge
from test_evals_registry import data

from maect import evals
from maect.evals.histogram import HistogramSettings, histograms


def pictures(split: str) -> torch.Tensor:
    """The pixels of a split, as far as they lie in [0, 1]."""
    images = data().images
    assert images is not None
    rows = np.arange(len(getattr(data(), split).y))
    return images.prepared(split, rows) * images.std[0] + images.mean[0]


def test_counts_the_pixels_of_each_channel() -> None:
    image = torch.tensor([[[0.0, 0.24], [0.25, 1.0]], [[0.5, 0.5], [0.6, 0.7]]])
    expected = [0.5, 0.25, 0, 0.25, 0, 0, 1, 0]
    assert histograms(image[None], 4).tolist() == [expected]


@pytest.mark.parametrize("informed", [True, False])
def test_what_features_hold_is_found(informed: bool) -> None:
    given = data()
    if informed:
        for split in ("train", "selection", "test"):
            getattr(given, split).x = histograms(pictures(split), 4).float()
    values = evals.get("histogram").run(given, HistogramSettings(bins=4)).values
    assert (values["r2"] > 99) == (values["misplaced"] < 1) == informed
    assert informed or values["r2"] < 30


def test_is_the_ridge_regression_of_scikit_learn() -> None:
    given, l2 = data(), 0.1
    result = evals.get("histogram").run(given, HistogramSettings(l2=[l2]))
    x = given.train.x.double().numpy()
    scaled = [
        (split.x.numpy() - x.mean(0)) / (x.std(0, ddof=1) + 1e-5)
        for split in (given.train, given.test)
    ]
    model = Ridge(alpha=l2 * len(x)).fit(scaled[0], histograms(pictures("train"), 8).numpy())
    np.testing.assert_allclose(result.predictions["predicted"], model.predict(scaled[1]), atol=1e-8)
