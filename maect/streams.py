"""Random numbers that depend on what they are for, and on nothing else.

Every draw is a function of (seed, role, purpose, epoch or step, sample index), so masks, crops,
orders and neighbour draws are the same whatever the number of workers, the device, the batch's
cut or a restart. All numbers are drawn on the CPU with NumPy and moved to the device.
"""

from __future__ import annotations

import hashlib

import numpy as np

_MULTIPLIERS = (np.uint64(0xD2511F53), np.uint64(0xCD9E8D57))
_WEYL = (0x9E3779B9, 0xBB67AE85)
_LOW = np.uint64(0xFFFFFFFF)
_32 = np.uint64(32)


def hash_key(*parts: int | str, bits: int = 64) -> int:
    """Return an integer of `bits` bits from the named parts, equal on any machine."""
    text = "\x1f".join(f"{type(part).__name__}:{part}" for part in parts)
    return int.from_bytes(hashlib.blake2b(text.encode(), digest_size=bits // 8).digest(), "big")


def generator(seed: int, *purpose: int | str) -> np.random.Generator:
    """Return a generator for bulk draws of one purpose (initial weights, say)."""
    return np.random.Generator(np.random.Philox(key=hash_key(seed, *purpose, bits=128)))


def philox(counters: np.ndarray, key: int) -> np.ndarray:
    """Return random bits: `counters` [4, n] uint32, `key` of 64 bits -> [4, n] uint32.

    Philox4x32-10 (Salmon et al. 2011, "Parallel random numbers: as easy as 1, 2, 3").
    """
    c0, c1, c2, c3 = (row.astype(np.uint64) for row in counters)
    k0, k1 = key & 0xFFFFFFFF, key >> 32
    for _ in range(10):
        first, second = c0 * _MULTIPLIERS[0], c2 * _MULTIPLIERS[1]
        c0, c1, c2, c3 = (
            (second >> _32) ^ c1 ^ np.uint64(k0),
            second & _LOW,
            (first >> _32) ^ c3 ^ np.uint64(k1),
            first & _LOW,
        )
        k0, k1 = (k0 + _WEYL[0]) & 0xFFFFFFFF, (k1 + _WEYL[1]) & 0xFFFFFFFF
    return np.stack([c0, c1, c2, c3]).astype(np.uint32)


class Stream:
    """Per-sample draws of one purpose, e.g. `Stream(seed, "mae", "mask")`."""

    def __init__(self, seed: int, *purpose: int | str) -> None:
        self.key = hash_key(seed, *purpose)

    def uniform(self, epoch: int, indices: np.ndarray, count: int) -> np.ndarray:
        """Return `count` numbers in [0, 1) for each sample index: [B] -> [B, count] float32."""
        indices = np.asarray(indices, dtype=np.uint64)
        blocks = -(-count // 4)
        counters = np.empty((4, len(indices), blocks), dtype=np.uint32)
        counters[0] = np.arange(blocks, dtype=np.uint32)
        counters[1] = (indices & _LOW).astype(np.uint32)[:, None]
        counters[2] = (indices >> _32).astype(np.uint32)[:, None]
        counters[3] = epoch
        bits = philox(counters.reshape(4, -1), self.key).reshape(4, len(indices), blocks)
        bits = bits.transpose(1, 2, 0).reshape(len(indices), 4 * blocks)[:, :count]
        return (bits >> np.uint32(8)).astype(np.float32) * np.float32(2.0**-24)

    def permutation(self, epoch: int, size: int) -> np.ndarray:
        """Return an order of `size` samples for one epoch: [size] int64."""
        index = np.arange(size)
        draws = self.uniform(epoch, index, 2).astype(np.float64)
        return np.argsort(draws[:, 0] + draws[:, 1] * 2.0**-24, kind="stable")
