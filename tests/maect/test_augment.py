"""Augmentation against torchvision's operators (blur: Pillow's), given the same parameters."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from PIL import Image, ImageFilter
from scipy import stats
from torch import Tensor
from torchvision.transforms import ColorJitter, InterpolationMode, RandomResizedCrop
from torchvision.transforms.v2 import functional as reference

from maect import image_ops as ops
from maect.augment import Augment, evaluation_transform, normalise
from maect.settings import ViewSettings

#: of 255, what rounding may cost
TOLERANCE = 2
BICUBIC = {"interpolation": InterpolationMode.BICUBIC, "antialias": True}
JITTER = (
    reference.adjust_brightness,
    reference.adjust_contrast,
    reference.adjust_saturation,
    reference.adjust_hue,
)
COLORS = ViewSettings(jitter=0.8, grey=0.2, blur=0.5, blur_sigma=(0.05, 1.0), solarise=0.2, hue=0.1)


def noise(count: int, height: int, width: int, channels: int = 3) -> Tensor:
    """Independent pixels: the hardest case for every filter."""
    rng = np.random.default_rng(height * 1000 + width)
    return torch.from_numpy(rng.integers(0, 256, (count, channels, height, width), np.uint8))


def smooth(count: int, height: int, width: int) -> Tensor:
    """Images with large shapes, as photographs have."""
    coarse = noise(count, 6, 8)
    return reference.resize(coarse, [height, width], **BICUBIC)


def augmenter(view: ViewSettings, size: int, channels: int = 3, **streams: object) -> Augment:
    """Makes views on the scale 0-255."""
    chosen = {"seed": 0, "role": "mae", **streams}
    return Augment(
        [view, view],
        image_size=size,
        mean=(0.0,) * channels,
        std=(1 / 255,) * channels,
        **chosen,  # type: ignore[arg-type]
    )


def pillow(image: Tensor) -> Image.Image:
    return Image.fromarray(image.permute(1, 2, 0).squeeze(2).numpy())


def tensor(image: Image.Image) -> Tensor:
    array = np.array(image)
    return torch.from_numpy(array if array.ndim == 3 else array[:, :, None]).permute(2, 0, 1)


def assert_close(
    got: Tensor, expected: Tensor | list[Tensor], tolerance: float = TOLERANCE
) -> None:
    expected = torch.stack(expected) if isinstance(expected, list) else expected
    assert got.shape == expected.shape
    assert (got.float() - expected.float()).abs().max() <= tolerance


def in_batch(operator, images: Tensor, *parameters: object) -> Tensor:  # type: ignore[no-untyped-def]
    batch = ops.Batch(images.float().clone())
    operator(batch, *parameters)
    return batch.restored()


# -------------------------------------------------------------------------------- operators


@pytest.mark.parametrize(
    ("height", "width", "size"),
    [(32, 32, 32), (8, 8, 8), (28, 28, 14), (40, 25, 32), (300, 200, 96)],
)
@pytest.mark.parametrize("channels", [1, 3])
def test_crop_and_flip(height: int, width: int, size: int, channels: int) -> None:
    images = noise(24, height, width, channels)
    augment = augmenter(ViewSettings(), size, channels)
    sides = np.full(24, height), np.full(24, width)
    parameters = augment.sample_parameters(3, np.arange(24), 0, *sides)
    assert parameters.boxes is not None
    expected = []
    for image, box, flip in zip(images, parameters.boxes, parameters.flip, strict=True):
        crop = reference.resized_crop(image, *box.tolist(), size=[size, size], **BICUBIC)
        expected.append(reference.horizontal_flip(crop) if flip else crop)
    assert 0 < parameters.flip.sum() < 24
    assert_close(augment(images, 3, np.arange(24)), expected)
    assert_close(augment(list(images), 3, np.arange(24)), expected)


def test_crop_equals_pillows_on_smooth_images() -> None:
    images = smooth(24, 32, 32)
    augment = augmenter(ViewSettings(flip=0.0), 32)
    parameters = augment.sample_parameters(0, np.arange(24), 0, np.full(24, 32), np.full(24, 32))
    assert parameters.boxes is not None
    expected = [
        tensor(
            reference.resized_crop(
                pillow(image), *box.tolist(), size=[32, 32], interpolation=InterpolationMode.BICUBIC
            )
        )
        for image, box in zip(images, parameters.boxes, strict=True)
    ]
    assert_close(augment(images, 0, np.arange(24)), expected)


@pytest.mark.parametrize(
    ("kind", "factors"),
    [
        (0, (0.6, 1.0, 1.4)),
        (1, (0.6, 1.0, 1.4)),
        (2, (0.8, 1.0, 1.2)),
        (3, (-0.5, -0.1, 0.07, 0.3, 0.5)),
    ],
)
@pytest.mark.parametrize("channels", [1, 3])
def test_parts_of_color_jitter(kind: int, factors: tuple[float, ...], channels: int) -> None:
    images = noise(12, 16, 20, channels)
    images[0] = 128  # without colour there is no hue to turn
    images[1, 1:] = images[1, :1]
    for factor in factors:
        order = np.tile([kind, *(other for other in range(4) if other != kind)], (12, 1))
        values = np.tile([1.0, 1.0, 1.0, 0.0], (12, 1))
        values[:, kind] = factor
        got = in_batch(ops.color_jitter, images, np.ones(12, bool), order, values)
        assert_close(got, [JITTER[kind](image, factor) for image in images])


def test_color_jitter_applies_each_images_own_order_to_the_chosen() -> None:
    images = smooth(64, 12, 12)
    rng = np.random.default_rng(0)
    order = np.argsort(rng.random((64, 4)), axis=1)
    factors = np.stack([*rng.uniform(0.6, 1.4, (3, 64)), rng.uniform(-0.1, 0.1, 64)], axis=1)
    chosen = rng.random(64) < 0.7
    expected = []
    for row, image in enumerate(images):
        changed = image.float() / 255
        for kind in order[row] if chosen[row] else ():
            changed = JITTER[kind](changed, float(factors[row, kind]))
        expected.append(changed * 255)
    got = in_batch(ops.color_jitter, images, chosen, order, factors)
    assert_close(got, expected, 0.1)


@pytest.mark.parametrize(("height", "width"), [(32, 32), (8, 8), (5, 3), (60, 90)])
@pytest.mark.parametrize("channels", [1, 3])
def test_blur_equals_pillows(height: int, width: int, channels: int) -> None:
    sigma = np.array([0.05, 0.1, 0.25, 0.3, 0.5, 0.7, 1.0, 1.2, 1.42, 1.5, 1.9, 2.0, 3.0, 5.5])
    images = noise(len(sigma), height, width, channels)
    expected = [
        tensor(pillow(image).filter(ImageFilter.GaussianBlur(s)))
        for image, s in zip(images, sigma.tolist(), strict=True)
    ]
    got = in_batch(ops.gaussian_blur, images, np.ones(len(sigma), bool), sigma)
    assert_close(got, expected)


def test_operators_leave_other_images_alone() -> None:
    images = noise(10, 8, 8)
    chosen = np.arange(10) % 3 == 0
    for operator, parameters in (
        (ops.gaussian_blur, (chosen, np.full(10, 2.0))),
        (ops.grey, (chosen,)),
        (ops.solarise, (chosen, 100)),
        (ops.color_jitter, (chosen, np.tile(np.arange(4), (10, 1)), np.full((10, 4), 0.4))),
    ):
        got = in_batch(operator, images, *parameters)
        same = (got == images).flatten(1).all(1).numpy()
        assert np.array_equal(same, ~chosen)


def test_grey_and_solarise() -> None:
    images = noise(6, 8, 8)
    everywhere = np.ones(6, bool)
    expected = [reference.rgb_to_grayscale(image, num_output_channels=3) for image in images]
    assert_close(in_batch(ops.grey, images, everywhere), expected)
    for threshold in (0, 128, 255):
        expected = [reference.solarize(image, threshold) for image in images]
        assert in_batch(ops.solarise, images, everywhere, threshold).equal(
            torch.stack(expected).float()
        )
    single = noise(6, 8, 8, channels=1)
    assert in_batch(ops.grey, single, everywhere).equal(single.float())


@pytest.mark.parametrize(("height", "width"), [(300, 400), (400, 300), (100, 100), (250, 260)])
def test_evaluation_resizes_the_shorter_side_and_crops_the_centre(height: int, width: int) -> None:
    images = noise(3, height, width)
    expected = [
        reference.center_crop(reference.resize(image, [256], **BICUBIC), [224, 224])
        for image in images
    ]
    norm = {"image_size": 224, "mean": (0.0,) * 3, "std": (1 / 255,) * 3}
    assert_close(evaluation_transform(images, **norm), expected)  # type: ignore[arg-type]
    assert_close(evaluation_transform(list(images), **norm), expected)  # type: ignore[arg-type]


def test_evaluation_only_normalises_images_of_the_right_size() -> None:
    images = noise(4, 32, 32)
    mean, std = (0.1, 0.2, 0.3), (0.5, 0.6, 0.7)
    got = evaluation_transform(images, image_size=32, mean=mean, std=std)
    expected = reference.normalize(images.float() / 255, list(mean), list(std))
    assert torch.allclose(got, expected, atol=1e-6)


# ------------------------------------------------------------------------------ whole pipeline


def test_operators_apply_in_the_published_order() -> None:
    images = smooth(48, 32, 32)
    view = COLORS.model_copy(update={"blur": 0.7, "grey": 0.5, "solarise": 0.5, "jitter": 0.7})
    augment = augmenter(view, 32)
    p = augment.sample_parameters(0, np.arange(48), 0, np.full(48, 32), np.full(48, 32))
    assert p.boxes is not None
    expected = []
    for row, image in enumerate(images):
        changed = reference.resized_crop(image, *p.boxes[row].tolist(), size=[32, 32], **BICUBIC)
        changed = reference.horizontal_flip(changed) if p.flip[row] else changed
        if p.jitter[row]:
            for kind in p.order[row]:
                changed = JITTER[kind](changed, float(p.factors[row, kind]))
        if p.blur[row]:
            sigma = float(p.sigma[row])
            changed = tensor(pillow(changed).filter(ImageFilter.GaussianBlur(sigma)))
        if p.grey[row]:
            changed = reference.rgb_to_grayscale(changed, num_output_channels=3)
        if p.solarise[row]:
            changed = reference.solarize(changed, view.solarise_threshold)
        expected.append(changed)
    # the reference cuts to whole levels after each of up to eight operators
    assert_close(augment(images, 0, np.arange(48)), expected, 10)
    combined = p.jitter.astype(int) + p.blur + p.grey + p.solarise
    assert {0, 1, 2, 3, 4} <= set(combined.tolist())


def test_single_channel_images_go_through_the_whole_pipeline() -> None:
    images = noise(32, 8, 8, channels=1)
    got = augmenter(COLORS, 8, channels=1)(images, 0, np.arange(32))
    assert got.shape == (32, 1, 8, 8)
    assert got.isfinite().all()


def test_the_result_does_not_depend_on_the_batch_around_an_image() -> None:
    images, indices = noise(40, 32, 32), np.arange(100, 140)
    augment = augmenter(COLORS, 32)
    whole = augment(images, 5, indices, 1)
    pieces = [augment(images[i : i + 7], 5, indices[i : i + 7], 1) for i in range(0, 40, 7)]
    assert whole.equal(torch.cat(pieces))
    order = np.random.default_rng(0).permutation(40)
    assert whole[order].equal(augment(images[order], 5, indices[order], 1))


def test_draws_depend_on_seed_role_epoch_index_and_view() -> None:
    images = noise(1, 32, 32).expand(8, -1, -1, -1)
    rows = np.arange(8)
    base = augmenter(COLORS, 32)
    first = base(images, 0, rows, 0)
    assert first.equal(augmenter(COLORS, 32)(images, 0, rows, 0))
    others = [
        base(images, 1, rows, 0),
        base(images, 0, rows, 1),
        base(images, 0, rows + 8, 0),
        augmenter(COLORS, 32, seed=1)(images, 0, rows, 0),
        augmenter(COLORS, 32, role="tune")(images, 0, rows, 0),
    ]
    for other in others:
        assert not (first == other).flatten(1).all(1).any()
    assert len({tuple(view.flatten().tolist()) for view in first}) == 8


def test_views_take_their_own_settings() -> None:
    still = ViewSettings(crop_scale=None, flip=0.0)
    views = [still, still.model_copy(update={"solarise": 1.0, "solarise_threshold": 0})]
    mean, std = (0.5,) * 3, (0.25,) * 3
    augment = Augment(views, image_size=32, mean=mean, std=std, seed=0, role="mae")
    images = noise(4, 32, 32)
    assert augment(images, 0, np.arange(4), 0).equal(normalise(images.float(), mean, std))
    assert augment(images, 0, np.arange(4), 1).equal(normalise(255 - images.float(), mean, std))


def test_precision_of_the_result_is_the_callers() -> None:
    images, augment = noise(4, 32, 32), augmenter(COLORS, 32)
    single = augment(images, 0, np.arange(4))
    double = augmenter(COLORS, 32, dtype=torch.float64)(images, 0, np.arange(4))
    assert double.dtype == torch.float64
    assert torch.allclose(single.double(), double, atol=1e-6)
    with torch.autocast("cpu", torch.bfloat16):
        assert augment(images, 0, np.arange(4)).equal(single)


# ---------------------------------------------------------------------------- distributions


def assert_same_distribution(ours: np.ndarray, theirs: np.ndarray) -> None:
    assert stats.ks_2samp(ours, theirs).pvalue > 1e-3


@pytest.mark.parametrize(("height", "width"), [(32, 32), (375, 500), (20, 120)])
def test_boxes_are_distributed_as_torchvisions(height: int, width: int) -> None:
    count = 4000
    torch.manual_seed(0)
    image = torch.empty(3, height, width)
    theirs = np.array(
        [RandomResizedCrop.get_params(image, [0.08, 1.0], [3 / 4, 4 / 3]) for _ in range(count)]
    )
    parameters = augmenter(ViewSettings(), 32).sample_parameters(
        0, np.arange(count), 0, np.full(count, height), np.full(count, width)
    )
    ours = parameters.boxes
    assert ours is not None
    for column in range(4):
        assert_same_distribution(ours[:, column], theirs[:, column])
    assert_same_distribution(ours[:, 2] * ours[:, 3], theirs[:, 2] * theirs[:, 3])
    assert (ours[:, :2] >= 0).all()
    assert (ours[:, 0] + ours[:, 2] <= height).all()
    assert (ours[:, 1] + ours[:, 3] <= width).all()


def test_jitter_is_distributed_as_torchvisions() -> None:
    count = 6000
    torch.manual_seed(0)
    spans = [[0.6, 1.4], [0.6, 1.4], [0.8, 1.2], [-0.1, 0.1]]
    theirs = [ColorJitter.get_params(*spans) for _ in range(count)]
    view = COLORS.model_copy(update={"jitter": 1.0})
    sides = np.full(count, 32)
    p = augmenter(view, 32).sample_parameters(0, np.arange(count), 0, sides, sides)
    for kind in range(4):
        assert_same_distribution(p.factors[:, kind], np.array([t[kind + 1] for t in theirs]))
    _, seen = np.unique(p.order @ [64, 16, 4, 1], return_counts=True)
    assert len(seen) == 24
    assert stats.chisquare(seen).pvalue > 1e-3


def test_each_operator_is_drawn_as_often_as_set_and_independently() -> None:
    count = 20_000
    sides = np.full(count, 32)
    p = augmenter(COLORS, 32).sample_parameters(0, np.arange(count), 0, sides, sides)
    drawn = {"flip": 0.5, "jitter": 0.8, "grey": 0.2, "blur": 0.5, "solarise": 0.2}
    chosen = np.stack([getattr(p, name) for name in drawn])
    assert chosen.mean(1) == pytest.approx(list(drawn.values()), abs=0.015)
    assert np.abs(np.corrcoef(chosen) - np.eye(5)).max() < 0.03
    low, high = COLORS.blur_sigma
    assert_same_distribution((p.sigma - low) / (high - low), np.linspace(0, 1, count))
