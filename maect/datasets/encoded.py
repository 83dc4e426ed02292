"""Splits held encoded: images are decoded by threads, ahead of whoever asks for them."""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from functools import cached_property
from typing import TYPE_CHECKING

import numpy as np

from maect.datasets.base import DataError, Split, decode_threads
from maect.datasets.image_index import Index
from maect.datasets.images import decode

if TYPE_CHECKING:
    import torch

#: decoded images held beyond the batch that is asked for, bytes
AHEAD_BYTES = 1 << 30


@dataclass(eq=False)
class EncodedSplit(Split):
    """One split whose images are decoded when asked for; they keep their sizes."""

    rows: Index
    #: row of the split -> encoded bytes
    read: Callable[[int], bytes]

    def __post_init__(self) -> None:
        self._bytes = 3 * self.rows.sizes.astype(np.int64).prod(axis=1)
        self.expect([])

    @cached_property
    def _threads(self) -> ThreadPoolExecutor:
        return ThreadPoolExecutor(decode_threads())

    def _decode(self, row: int) -> np.ndarray:
        """Return pixels uint8 [h, w, 3] of one image."""
        try:
            return decode(self.read(row))[0]
        except (OSError, ValueError) as error:
            raise DataError(
                f"{self.rows.name(row)} could be read when the set was checked and cannot now: "
                f"{getattr(error, 'strerror', None) or error}. Restore it, or check the set again"
            ) from None

    def _submit(self, row: int) -> tuple[int, Future[np.ndarray]]:
        return row, self._threads.submit(self._decode, row)

    def expect(self, batches: Iterable[np.ndarray]) -> None:
        """Announce the batches to come: they are decoded ahead, as far as memory allows."""
        self._ahead: deque[tuple[int, Future[np.ndarray]]] = deque()
        self._held = 0
        self._expected: Iterator[int] = (int(row) for rows in batches for row in rows)

    def _fill(self, least: int) -> None:
        """Start decoding what comes next: `least` images, more while memory allows."""
        while len(self._ahead) < least or self._held < AHEAD_BYTES:
            row = next(self._expected, None)
            if row is None:
                return
            self._ahead.append(self._submit(row))
            self._held += int(self._bytes[row])

    def batch(self, indices: np.ndarray) -> list[torch.Tensor]:
        """Return images of the given samples: int64 [B] -> B of uint8 [3, h, w] on the CPU.

        Raises DataError where a file can no longer be read; ValueError where batches were
        announced and this is not the next.
        """
        import torch

        rows = [int(row) for row in indices]
        self._fill(len(rows))
        if self._ahead:
            taken = [self._ahead.popleft() for _ in rows if self._ahead]
            if [row for row, _ in taken] != rows:
                raise ValueError("these samples are not the batch that was announced next")
            self._held -= sum(int(self._bytes[row]) for row in rows)
            self._fill(0)
        else:
            taken = [self._submit(row) for row in rows]
        return [torch.from_numpy(future.result()).permute(2, 0, 1) for _, future in taken]
