"""Crops of encoded images, decoded and cut by processes ahead of whoever asks for them.

The processes are those of torch's DataLoader: what they cut comes back in order through shared
memory, and goes on to a GPU from pinned memory. They serve all splits of this process in turn, and
end with it, however it ends.
"""

from __future__ import annotations

import atexit
import multiprocessing
import os
import shutil
import signal
import sys
import threading
import time
from collections import deque
from collections.abc import Callable, Generator, Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from itertools import chain, islice
from types import ModuleType
from typing import TYPE_CHECKING, Any, Self

import numpy as np

from maect.datasets.base import DataError, Split, decode_threads, workers_here
from maect.datasets.image_index import Index
from maect.datasets.images import Place, decode, read_file

if TYPE_CHECKING:
    import torch

#: bytes of crops made ahead, at most; of the free shared memory a half, shared by all workers
AHEAD_BYTES = 1 << 29
#: what a process makes at a time: about so many bytes, and no more images
_TASK_BYTES, _TASK_IMAGES = 1 << 22, 32
#: images that a process without a GPU decodes first itself: as long as it takes to start others
ALONE = 1024
#: how often processes that died are replaced
_DEATHS = 3
_SHARED = "/dev/shm"


@dataclass(frozen=True)
class Cut:
    """What is cut out of each of B images; NumPy arrays of length B."""

    #: top, left, height, width [B, 4]; null: resize and centre crop
    boxes: np.ndarray | None
    flip: np.ndarray

    def piece(self, part: slice) -> Self:
        """Return the same of some of the images."""
        given = {name: value for name, value in vars(self).items() if value is not None}
        return replace(self, **{name: value[part] for name, value in given.items()})


@dataclass(frozen=True)
class Request:
    """Crops wanted of a split's images `rows` [B]: one for each of `cuts`, `size` pixels wide."""

    rows: np.ndarray
    cuts: Sequence[Cut]
    size: int

    @classmethod
    def centres(cls, rows: np.ndarray, size: int) -> Request:
        """Return the request of what evaluations are shown."""
        return cls(rows, [Cut(None, np.zeros(len(rows), bool))], size)

    def parts(self) -> list[slice]:
        """Return slices of the images that a process does at a time."""
        each = _TASK_BYTES // (3 * len(self.cuts) * self.size**2)
        each = min(max(each, 1), _TASK_IMAGES)
        return [slice(i, i + each) for i in range(0, max(1, len(self.rows)), each)]


@dataclass(frozen=True)
class Crops:
    """The crops of a request."""

    cuts: Sequence[Cut]
    #: of consecutive images, uint8 [V, b, 3, S, S], on the CPU
    pixels: list[torch.Tensor]

    def __len__(self) -> int:
        return len(self.cuts[0].flip)

    def view(self, number: int, device: torch.device) -> torch.Tensor:
        """Return one view of all images: uint8 [B, 3, S, S]."""
        import torch

        return torch.cat([part[number].to(device, non_blocking=True) for part in self.pixels])


@dataclass(frozen=True)
class Task:
    """Some images of a request: their names, where they lie, their heights and widths, and what is
    cut out."""

    names: list[str]
    places: list[Place]
    sizes: np.ndarray
    cuts: list[Cut]
    size: int


class _Cutter:
    """What a DataLoader takes for a data set: task -> its crops or what is wrong with an image, and
    the CPU time of a process other than the calling one since it last told."""

    told_s = 0.0

    def __getitem__(self, task: Task) -> tuple[torch.Tensor | DataError, float]:
        from torch.utils.data import get_worker_info

        elsewhere = get_worker_info() is not None
        crops: torch.Tensor | DataError
        try:
            crops = _cut(task, elsewhere)
        except DataError as error:
            crops = error
        last_s, self.told_s = self.told_s, time.process_time()
        return crops, self.told_s - last_s if elsewhere else 0.0


def _cut(task: Task, elsewhere: bool) -> torch.Tensor:
    import torch

    from maect.image_ops import center_crop, crop

    shape = (len(task.cuts), len(task.places), 3, task.size, task.size)
    crops = torch.empty(shape, dtype=torch.uint8)
    if elsewhere:  # here, where an error is told; DataLoader would do it where none is
        crops.share_memory_()
    for row, (name, place) in enumerate(zip(task.names, task.places, strict=True)):
        with readable_before(name):
            pixels = decode(read_file(*place), fast=elsewhere or _asked >= ALONE)[0]
            if (now := pixels.shape[:2]) != (then := tuple(task.sizes[row].tolist())):
                raise ValueError(f"its height and width are {now}, they were {then}")
        image = torch.from_numpy(pixels).permute(2, 0, 1)
        for view, cut in enumerate(task.cuts):
            if cut.boxes is None:
                found = center_crop(image, task.size)
            else:
                found = crop(image, cut.boxes[row], task.size)
            crops[view, row] = found.flip(2) if cut.flip[row] else found
    return crops


@contextmanager
def readable_before(name: str) -> Iterator[None]:
    """Raise DataError that names an image which has been read before, and says why it cannot be."""
    try:
        yield
    except (OSError, ValueError) as error:
        raise DataError(
            f"{name} could be read when the set was checked and cannot now: "
            f"{getattr(error, 'strerror', None) or error}. Restore it, or check the set again"
        ) from None


Results = Generator["torch.Tensor | DataError", None, None]


class Died(RuntimeError):
    """A process that decodes has ended without being asked to."""


class _Pool:
    """Processes that decode, or none: then the calling process does it when it is asked."""

    def __init__(self, wanted: int, pinned: bool) -> None:
        import torch
        from torch.utils.data import DataLoader

        self.wanted, self.pinned = wanted, pinned
        #: whose crops are being made
        self.owner: EncodedSplit | None = None
        self._sampler = _Sampler()
        self._work = self._results()
        # too little shared memory would end the processes
        room = shutil.disk_usage(_SHARED).free // 2 if os.path.isdir(_SHARED) else AHEAD_BYTES
        tasks = min(AHEAD_BYTES, room // workers_here()) // _TASK_BYTES
        processes = min(wanted, tasks)
        context = torch.multiprocessing.get_context("forkserver")
        context.set_forkserver_preload(["torchvision.io", "maect.image_ops", __name__])
        self._loader: Any = DataLoader(
            _Cutter(),  # type: ignore[arg-type]
            batch_size=None,
            sampler=self._sampler,
            num_workers=processes,
            pin_memory=pinned,
            generator=torch.Generator(),  # else it would take numbers from torch's own
            multiprocessing_context=context if processes else None,
            prefetch_factor=tasks // processes if processes else None,
            persistent_workers=processes > 0,
            worker_init_fn=_follow_parent,
        )

    def work(self, owner: EncodedSplit, tasks: Iterable[Task]) -> Results:
        """Begin with other tasks; return what comes of each, in order. It raises Died."""
        self._work.close()
        self.owner, self._sampler.tasks = owner, tasks
        self._work = self._results()
        return self._work

    def _results(self) -> Results:
        global used_s
        try:
            with _no_program():
                found = iter(self._loader)
            # to run before DataLoader's own, which waits for one process after the other
            atexit.unregister(self.close)
            atexit.register(self.close)
            for crops, seconds in found:
                used_s += seconds
                yield crops
        except (OSError, EOFError, RuntimeError) as error:
            workers = getattr(getattr(self._loader, "_iterator", None), "_workers", [])
            alive = isinstance(error, RuntimeError) and all(w.is_alive() for w in workers)
            if alive or not workers:
                raise
            self.wanted = -1  # another takes its place
            raise Died(str(error)) from None

    def close(self) -> None:
        """End the processes, in the order that DataLoader means; left to the garbage collector,
        queues may go first."""
        atexit.unregister(self.close)
        self._work.close()
        self.owner = self._loader = None


class _Sampler:
    """What gives a DataLoader its tasks."""

    tasks: Iterable[Task] = ()

    def __iter__(self) -> Iterator[Task]:
        return iter(self.tasks)


def _follow_parent(_: int) -> None:
    """End with the process that asks, and leave Ctrl-C to it.

    DataLoader's own watch asks for the parent, which here is the server that forks; and the server
    goes on as long as its children do.
    """
    signal.signal(signal.SIGINT, signal.SIG_IGN)

    def follow() -> None:
        multiprocessing.parent_process().join()  # type: ignore[union-attr]
        os._exit(1)

    threading.Thread(target=follow, daemon=True).start()


@contextmanager
def _no_program() -> Iterator[None]:
    """Keep processes that start from running this program's file again, which takes seconds."""
    program = sys.modules["__main__"]
    sys.modules["__main__"] = ModuleType("__main__")
    try:
        yield
    finally:
        sys.modules["__main__"] = program


def _wanted(gpu: bool) -> int:
    """Return how many processes are to decode: a GPU's own process keeps a core for itself, and
    one core without a GPU is better used by the process that asks."""
    given = os.environ.get("MAECT_DECODE_PROCESSES")
    if given and not given.isdecimal():
        raise DataError(f"MAECT_DECODE_PROCESSES is {given!r}; write a number of processes")
    cores = decode_threads()
    return int(given) if given else max(1, cores - 1) if gpu else cores if cores > 1 else 0


#: seconds of CPU time that the processes have used
used_s = 0.0
#: images that this process has asked for
_asked = 0
_pool: _Pool | None = None


def _current() -> _Pool:
    """Return what decodes now for this process."""
    global _pool
    import torch

    gpu = torch.cuda.is_initialized()
    wanted = _wanted(gpu) if gpu or _asked >= ALONE else 0  # a GPU is not kept waiting
    if _pool is None or (_pool.wanted, _pool.pinned) != (wanted, gpu):
        if _pool is not None:
            _pool.close()
        _pool = _Pool(wanted, gpu)
    return _pool


@dataclass(eq=False)
class EncodedSplit(Split):
    """A split whose images keep their sizes and are decoded when asked for; the crops of announced
    requests are made ahead, as far as memory allows."""

    rows: Index
    #: row of the split -> where its encoded bytes are
    place: Callable[[int], Place]

    def __post_init__(self) -> None:
        self._forget()

    @property
    def sizes(self) -> np.ndarray:
        return self.rows.sizes

    def batch(self, indices: np.ndarray) -> list[torch.Tensor]:
        """Return whole images: int64 [B] -> B of uint8 [3, h, w] on the CPU.

        Raises DataError where a file can no longer be read.
        """
        import torch

        found = []
        for row in np.asarray(indices).tolist():
            with readable_before(self.rows.name(row)):
                pixels, _ = decode(read_file(*self.place(row)))
            found.append(torch.from_numpy(pixels).permute(2, 0, 1))
        return found

    def _forget(self) -> None:
        self._rest: Iterator[Request] = iter(())
        #: requests whose tasks have been given, and whose crops have not been taken
        self._given: deque[Request] = deque()
        if _pool is not None and _pool.owner is self:
            _pool.owner = None

    def expect(self, requests: Iterable[Request]) -> None:
        """Begin with the crops of these requests, in place of any announced before."""
        self._forget()
        self._rest = iter(requests)
        self._begin(_current())

    def _begin(self, pool: _Pool) -> None:
        """Have everything done that has not been taken."""
        self._rest = chain(list(self._given), self._rest)
        self._given.clear()
        self._found = pool.work(self, self._tasks())

    def _tasks(self) -> Iterator[Task]:
        for request in self._rest:
            self._given.append(request)
            for part in request.parts():
                rows = request.rows[part].tolist()
                names, places = map(self.rows.name, rows), map(self.place, rows)
                cuts = [Cut(cut.boxes, cut.flip).piece(part) for cut in request.cuts]
                yield Task([*names], [*places], self.rows.sizes[rows], cuts, request.size)

    def crops(self, rows: np.ndarray, request: Callable[[], Request]) -> Crops:
        """Return the crops of images `rows` [B], of the announced request or of this one.

        Raises DataError where a file can no longer be read; ValueError where requests were
        announced and this is not the next; RuntimeError where processes die again and again.
        """
        global _asked
        for _ in range(1 + _DEATHS):
            try:
                if (pool := _current()).owner is not self:
                    self._begin(pool)
                found = self._next(rows, request)
            except Died as error:
                told = error
                continue
            _asked += len(rows)
            return found
        self._forget()
        raise RuntimeError(
            f"processes that decode images were ended {1 + _DEATHS} times ({told}): by lack of "
            f"memory, most often. MAECT_DECODE_PROCESSES=N starts fewer of them, 0 none"
        )

    def _next(self, rows: np.ndarray, request: Callable[[], Request]) -> Crops:
        first = next(self._found, None)
        if first is None:  # nothing was announced, or all of it was taken
            self.expect([request()])
            first = next(self._found)
        asked = self._given[0]
        found = [first, *islice(self._found, len(asked.parts()) - 1)]
        self._given.popleft()
        if not np.array_equal(asked.rows, rows):
            self._forget()
            raise ValueError("these samples are not the batch that was announced next")
        pixels = []
        for crops in found:
            if isinstance(crops, DataError):
                self._forget()
                raise crops
            pixels.append(crops)
        return Crops(asked.cuts, pixels)
