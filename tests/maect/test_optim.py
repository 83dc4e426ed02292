"""Schedule, groups, layer-wise decay, freezing and averages, apart from the golden values."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import nn

from maect.models import Encoder, build_encoder
from maect.optim import (
    adamw,
    freeze,
    layer_decay,
    learning_rate,
    parameter_groups,
    set_learning_rate,
    update_average,
)


@pytest.fixture
def encoder() -> Encoder:
    return build_encoder("custom", image_size=8, patch_size=4, dim=8, depth=3, heads=2)


def test_schedule_without_warmup_starts_at_the_peak() -> None:
    rates = [learning_rate(step, total=4, warmup=0, peak=2.0) for step in range(4)]
    assert rates == pytest.approx([2.0, 1 + 2**-0.5, 1.0, 1 - 2**-0.5])


def test_schedule_of_warmup_alone() -> None:
    assert learning_rate(1, total=2, warmup=2, peak=3.0) == pytest.approx(2.0)


def test_layer_decay_of_other_names(encoder: Encoder) -> None:
    factors = layer_decay(["pos_embed", "blocks.2.mlp.fc1.bias", "head.weight"], 3, 0.5)
    assert factors == {"pos_embed": 0.0625, "blocks.2.mlp.fc1.bias": 0.5, "head.weight": 1.0}
    with pytest.raises(ValueError, match=r"blocks.3.norm1.weight is beyond an encoder of 3"):
        layer_decay(["blocks.3.norm1.weight"], 3, 0.5)


def test_groups_scale_the_rate_and_hold_every_trainable_parameter_once(encoder: Encoder) -> None:
    trainable = freeze(encoder, 1)
    factors = layer_decay(trainable, 3, 0.5)
    groups = parameter_groups(encoder.named_parameters(), 0.1, factors)
    assert sorted(name for group in groups for name in group["names"]) == sorted(trainable)
    optimizer = adamw(groups, lr=1.0)
    set_learning_rate(optimizer, 0.8)
    for group in optimizer.param_groups:
        assert group["betas"] == (0.9, 0.95)
        for name, parameter in zip(group["names"], group["params"], strict=True):
            assert parameter is encoder.get_parameter(name)
            assert group["lr"] == pytest.approx(0.8 * factors[name])
            assert group["weight_decay"] == (0.1 if parameter.ndim > 1 else 0.0)


def test_groups_need_a_factor_for_each_name(encoder: Encoder) -> None:
    with pytest.raises(KeyError, match="cls_token"):
        parameter_groups(encoder.named_parameters(), 0.1, {"norm.weight": 1.0})


def test_freeze_nothing_and_everything(encoder: Encoder) -> None:
    assert freeze(encoder, 3) == ["norm.weight", "norm.bias"]
    assert len(freeze(encoder, 0)) == len(list(encoder.parameters()))
    with pytest.raises(ValueError, match="cannot freeze 4 blocks of an encoder of 3"):
        freeze(encoder, 4)


def test_average_follows_parameters_and_copies_buffers() -> None:
    model = nn.BatchNorm1d(2)
    average = copy.deepcopy(model).requires_grad_(False)
    with torch.no_grad():
        model.weight.fill_(5.0)
        model.running_mean.fill_(3.0)
    update_average(average, model, decay=0.75)
    assert average.weight.tolist() == [2.0, 2.0]
    assert average.running_mean.tolist() == [3.0, 3.0]
    assert not any(p.requires_grad for p in average.parameters())
