"""Encoder, decoder, masking and initial weights, apart from the golden values."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from maect.heads import NNCLRHead
from maect.losses import mae_loss
from maect.models import (
    Decoder,
    Encoder,
    build_decoder,
    build_encoder,
    initialize,
    pool,
    random_masking,
    sincos_positions,
)
from maect.settings import ModelSettings

SIZES = {"patch_size": 4, "dim": 16, "depth": 3, "heads": 2}
DECODER = {"decoder_dim": 8, "decoder_depth": 1, "decoder_heads": 2}
SETTINGS = ModelSettings(size="custom", **SIZES, **DECODER)


def numbers(*shape: int, seed: int = 0) -> Tensor:
    return torch.from_numpy(np.random.default_rng(seed).random(shape, dtype=np.float32))


@pytest.fixture
def encoder() -> Encoder:
    return build_encoder(SETTINGS, image_size=16)


def test_positions_of_a_rectangle_tell_row_from_column() -> None:
    table = sincos_positions((2, 3), 8)
    assert table.shape == (6, 8)
    assert table.dtype == torch.float32
    # channels: sine and cosine of the column at two frequencies, then of the row
    column, row = 2.0, 1.0
    angles = [column, column / 100, row, row / 100]
    sines, cosines = np.sin(angles), np.cos(angles)
    expected = [*sines[:2], *cosines[:2], *sines[2:], *cosines[2:]]
    assert table[5].tolist() == pytest.approx(expected, abs=1e-6)
    with pytest.raises(ValueError, match="multiple of 4, not 6"):
        sincos_positions(2, 6)


def test_masking_keeps_the_lowest_noise() -> None:
    noise = torch.tensor([[0.3, 0.1, 0.9, 0.2], [0.5, 0.5, 0.5, 0.4]])
    keep, ids_restore, mask = random_masking(noise, 0.5)
    assert keep.tolist() == [[1, 3], [3, 0]]
    assert mask.tolist() == [[1, 0, 1, 0], [0, 1, 1, 0]]
    assert ids_restore.tolist() == [[2, 0, 3, 1], [1, 2, 3, 0]]
    with pytest.raises(ValueError, match=r"ratio 0.9 leaves none of 4"):
        random_masking(noise, 0.9)


def test_masking_ratio_zero_loses_no_position(encoder: Encoder) -> None:
    images = numbers(2, 3, 16, 16)
    keep, _, mask = random_masking(numbers(2, 16, seed=1), 0.0)
    assert not mask.any()
    whole, permuted = encoder(images), encoder(images, keep)
    torch.testing.assert_close(permuted[:, 0], whole[:, 0], atol=1e-5, rtol=0)
    torch.testing.assert_close(pool(permuted, "mean"), pool(whole, "mean"), atol=1e-5, rtol=0)


def test_hidden_pixels_change_nothing(encoder: Encoder) -> None:
    keep, _, mask = random_masking(numbers(2, 16), 0.75)
    images = numbers(2, 3, 16, 16, seed=1)
    hidden = mask.reshape(2, 1, 4, 4).repeat_interleave(4, 2).repeat_interleave(4, 3).bool()
    tokens = encoder(images, keep)
    assert tokens.shape == (2, 5, 16)
    assert torch.equal(tokens, encoder(images.masked_fill(hidden, 99.0), keep))


def test_frozen_blocks_get_no_gradient_and_change_no_value(encoder: Encoder) -> None:
    images = numbers(2, 3, 16, 16)
    tokens = encoder(images, frozen_blocks=2)
    assert torch.equal(tokens, encoder(images))
    tokens.square().sum().backward()
    trained = {name for name, p in encoder.named_parameters() if p.grad is not None}
    assert trained == {
        name for name, _ in encoder.named_parameters() if name.startswith(("blocks.2.", "norm."))
    }


def test_checkpointed_activations_give_the_same_gradients(encoder: Encoder) -> None:
    again = build_encoder("custom", image_size=16, **SIZES, checkpoint_activations=True)
    for model in (encoder, again):
        model(numbers(2, 3, 16, 16)).square().sum().backward()
    for one, other in zip(encoder.parameters(), again.parameters(), strict=True):
        assert torch.equal(one.grad, other.grad)


def test_features_by_depth(encoder: Encoder) -> None:
    images = numbers(2, 3, 16, 16)
    last, first = encoder.features_by_depth(images, [2, 0])
    assert torch.equal(encoder.norm(last), encoder(images))
    assert not torch.allclose(first, last)
    with pytest.raises(ValueError, match="3 blocks has no block 3"):
        encoder.features_by_depth(images, [3])


def test_pool() -> None:
    tokens = numbers(2, 5, 4)
    assert torch.equal(pool(tokens, "cls"), tokens[:, 0])
    torch.testing.assert_close(pool(tokens, "mean"), tokens[:, 1:].mean(1))


@pytest.mark.parametrize(
    ("name", "millions"),
    [("tiny", 5.52), ("small", 21.67), ("base", 85.80), ("large", 303.30), ("huge", 630.76)],
)
def test_sizes_have_the_published_number_of_parameters(name: str, millions: float) -> None:
    patch = 14 if name == "huge" else 16
    with torch.device("meta"):
        values = ModelSettings(size=name, patch_size=patch)  # type: ignore[arg-type]
        encoder = Encoder(224, patch, 3, values.dim, values.depth, values.heads)  # type: ignore[arg-type]
    count = sum(value.numel() for value in encoder.state_dict().values())
    assert count / 1e6 == pytest.approx(millions, abs=0.01)


def test_rectangular_images_and_one_channel() -> None:
    encoder = build_encoder(
        "custom", image_size=(8, 12), patch_size=2, in_chans=1, dim=8, depth=1, heads=2
    )
    assert encoder(numbers(2, 1, 8, 12)).shape == (2, 25, 8)


def test_bad_sizes_are_named() -> None:
    with pytest.raises(ValueError, match=r"should be 'tiny', 'small'.*'giant'"):
        build_encoder("giant")
    with pytest.raises(ValueError, match="size 'custom' needs depth, heads"):
        build_encoder("custom", dim=8)
    with pytest.raises(ValueError, match="15x15 have no whole patches of 4"):
        build_encoder(SETTINGS, image_size=15)


def test_initial_weights_depend_on_seed_role_and_name_alone() -> None:
    def weights(seed: int, role: str = "encoder", dtype: torch.dtype = torch.float32) -> Tensor:
        torch.manual_seed(seed + 7)  # of no consequence
        model = build_encoder(SETTINGS, image_size=16).to(dtype)
        initialize(model, seed, role)
        return model.blocks[1].mlp.fc1.weight.detach().clone()

    assert torch.equal(weights(1), weights(1))
    assert not torch.equal(weights(1), weights(2))
    assert not torch.equal(weights(1), weights(1, role="other"))
    assert torch.equal(weights(1, dtype=torch.float64), weights(1).double())


def test_initial_weights_follow_the_published_distributions() -> None:
    encoder = build_encoder("custom", image_size=32, patch_size=4, dim=64, depth=2, heads=4, seed=5)
    decoder = Decoder(64, (8, 8), 48, 32, 1, 4)
    initialize(decoder, 5, "decoder")

    def uniform(weight: Tensor, bound: float) -> None:
        assert weight.abs().max().item() <= bound
        assert weight.std().item() == pytest.approx(bound / 3**0.5, rel=0.05)
        assert abs(weight.mean().item()) < 0.05 * bound

    for weight in (encoder.blocks[0].attn.qkv.weight, encoder.blocks[1].mlp.fc2.weight):
        uniform(weight, (6 / sum(weight.shape)) ** 0.5)
    uniform(encoder.patch_embed.proj.weight, (6 / (64 + 48)) ** 0.5)
    uniform(decoder.pred.weight, (6 / (32 + 48)) ** 0.5)
    for token in (encoder.cls_token, decoder.mask_token):
        assert token.std().item() == pytest.approx(0.02, rel=0.3)
    for name, parameter in encoder.named_parameters():
        if name.endswith("bias"):
            assert not parameter.any()
        elif "norm" in name:
            assert (parameter == 1).all()
    assert not torch.equal(encoder.blocks[0].attn.qkv.weight, encoder.blocks[1].attn.qkv.weight)


def test_initial_head() -> None:
    head = NNCLRHead(16, 32, 48, 8, queue_size=64)
    initialize(head, 0, "head")
    head.reset_target()
    for module in head.projector:
        if isinstance(module, nn.Linear):
            bound = module.in_features**-0.5
            assert 0.95 * bound < module.weight.abs().max().item() <= bound
    for one, other in zip(
        head.projector.parameters(), head.target_projector.parameters(), strict=True
    ):
        assert torch.equal(one, other)
        assert one.data_ptr() != other.data_ptr()
    torch.testing.assert_close(head.queue.embeddings.norm(dim=1), torch.ones(64))
    before = head.queue.embeddings.clone()
    initialize(head, 1, "head")
    assert not torch.equal(head.queue.embeddings, before)


def test_other_precisions_agree_with_single(encoder: Encoder) -> None:
    decoder = build_decoder(SETTINGS, 16, 3)
    images = numbers(2, 3, 16, 16)
    keep, ids_restore, mask = random_masking(numbers(2, 16, seed=1), 0.75)

    def loss(dtype: torch.dtype) -> Tensor:
        latent = encoder.to(dtype)(images.to(dtype), keep)
        return mae_loss(decoder.to(dtype)(latent, ids_restore), images.to(dtype), mask, 4)

    double, single = loss(torch.float64), loss(torch.float32)
    assert double.dtype == torch.float64
    assert single.item() == pytest.approx(double.item(), rel=1e-6)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        half = loss(torch.float32)
    assert half.item() == pytest.approx(single.item(), rel=0.02)
    half.backward()
    assert all(p.grad.dtype == torch.float32 for p in decoder.parameters())
