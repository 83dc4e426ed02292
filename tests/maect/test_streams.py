"""Random draws: known answers, and dependence on nothing but what they are for."""

from __future__ import annotations

import numpy as np
import pytest

from maect.streams import Stream, generator, hash_key, philox

#: known answers of Philox4x32-10, from the Random123 distribution (kat_vectors)
KNOWN = [
    ((0, 0, 0, 0), (0, 0), (0x6627E8D5, 0xE169C58D, 0xBC57AC4C, 0x9B00DBD8)),
    ((0xFFFFFFFF,) * 4, (0xFFFFFFFF,) * 2, (0x408F276D, 0x41C83B0E, 0xA20BC7C6, 0x6D5451FD)),
    (
        (0x243F6A88, 0x85A308D3, 0x13198A2E, 0x03707344),
        (0xA4093822, 0x299F31D0),
        (0xD16CFE09, 0x94FDCCEB, 0x5001E420, 0x24126EA1),
    ),
]


@pytest.mark.parametrize(("counter", "key", "expected"), KNOWN)
def test_philox_gives_the_known_answers(counter, key, expected):
    counters = np.array(counter, dtype=np.uint32)[:, None]
    bits = philox(counters, key[0] | key[1] << 32)
    assert bits.dtype == np.uint32
    assert tuple(int(word) for word in bits[:, 0]) == expected


def test_philox_takes_many_counters_at_once():
    counters = np.array([counter for counter, _, _ in KNOWN], dtype=np.uint32).T
    together = philox(counters, 12345)
    for column in range(counters.shape[1]):
        alone = philox(counters[:, column : column + 1], 12345)
        assert np.array_equal(together[:, column : column + 1], alone)


def test_a_sample_draws_the_same_in_any_batch():
    stream, samples = Stream(3, "mae", "mask"), np.random.default_rng(0).permutation(500)
    whole = stream.uniform(2, samples, 17)
    assert whole.shape == (500, 17)
    assert whole.dtype == np.float32
    for pieces in (2, 5, 500):
        cut = [stream.uniform(2, part, 17) for part in np.split(samples, pieces)]
        assert np.array_equal(np.concatenate(cut), whole)
    back = stream.uniform(2, samples[::-1], 17)[::-1]
    assert np.array_equal(back, whole)


def test_further_draws_leave_the_first_ones_alone():
    stream = Stream(0, "x")
    index = np.arange(9)
    assert np.array_equal(stream.uniform(0, index, 30)[:, :7], stream.uniform(0, index, 7))


def test_draws_depend_on_seed_role_purpose_epoch_and_sample():
    index = np.arange(64)
    plain = Stream(0, "mae", "mask").uniform(0, index, 16)
    others = [
        Stream(1, "mae", "mask").uniform(0, index, 16),
        Stream(0, "head", "mask").uniform(0, index, 16),
        Stream(0, "mae", "crop").uniform(0, index, 16),
        Stream(0, "mae", "mask").uniform(1, index, 16),
        Stream(0, "mae", "mask").uniform(0, index + 64, 16),
        Stream(0, "mae", "mask").uniform(0, index + 2**32, 16),
    ]
    for other in others:
        assert np.mean(other == plain) < 0.01
        assert abs(np.corrcoef(other.ravel(), plain.ravel())[0, 1]) < 0.12
    assert np.array_equal(Stream(0, "mae", "mask").uniform(0, index, 16), plain)


def test_draws_are_uniform():
    draws = Stream(5, "uniform").uniform(0, np.arange(20_000), 8)
    assert draws.min() >= 0.0
    assert draws.max() < 1.0
    assert draws.mean() == pytest.approx(0.5, abs=0.003)
    assert draws.var() == pytest.approx(1 / 12, abs=0.001)
    # chi-square over 64 cells: 63 degrees of freedom, beyond 120 once in 50,000 tries
    counts = np.histogram(draws, 64, (0.0, 1.0))[0]
    expected = draws.size / 64
    assert ((counts - expected) ** 2 / expected).sum() < 120
    # neighbouring draws of a sample, and of neighbouring samples, are unrelated
    assert abs(np.corrcoef(draws[:, 0], draws[:, 1])[0, 1]) < 0.03
    assert abs(np.corrcoef(draws[:-1, 0], draws[1:, 0])[0, 1]) < 0.03


def test_a_permutation_holds_every_sample_once_and_differs_by_epoch():
    stream = Stream(0, "mae", "order")
    first = stream.permutation(0, 1097)
    assert first.dtype == np.int64
    assert np.array_equal(np.sort(first), np.arange(1097))
    assert np.array_equal(first, stream.permutation(0, 1097))
    second = stream.permutation(1, 1097)
    assert (first == second).mean() < 0.02
    assert (first == np.arange(1097)).mean() < 0.02
    assert stream.permutation(0, 1).tolist() == [0]


def test_places_in_a_permutation_are_equally_likely():
    where = np.array([Stream(seed, "o").permutation(0, 8) for seed in range(4000)])
    for place in range(8):
        counts = np.bincount(where[:, place], minlength=8)
        assert ((counts - 500) ** 2 / 500).sum() < 30  # 7 degrees of freedom


def test_names_cannot_run_into_each_other():
    assert hash_key(1, "ab") != hash_key(1, "a", "b")
    assert hash_key(1, "2") != hash_key(1, 2) != hash_key("1", 2)
    assert hash_key(12) != hash_key(1, 2)
    assert 0 <= hash_key("x") < 2**64
    assert 0 <= hash_key("x", bits=128) < 2**128
    # written down, so that records of older versions stay comparable
    assert hash_key(0, "mae", "mask") == 0x48F217A6581A46A7


def test_bulk_draws_belong_to_their_purpose():
    first = generator(0, "weights", "encoder").standard_normal(100)
    assert np.array_equal(first, generator(0, "weights", "encoder").standard_normal(100))
    assert not np.array_equal(first, generator(0, "weights", "decoder").standard_normal(100))
    assert not np.array_equal(first, generator(1, "weights", "encoder").standard_normal(100))
